"""What HTTP itself may do to us: broken heads, slow peers, callers that leave, big answers, a stop in mid-flight."""

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import orjson
import pytest

from app.api import server
from app.errors import ConfigurationError
from app.settings import load
from tests.api.conftest import KEY, SMALL, Edge, expected, running
from tests.api.test_bad_inputs import good

pytestmark = pytest.mark.asyncio(loop_scope="module")

HEAD = b"POST /v1/embeddings HTTP/1.1\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n"
HOST = b"Host: embedgate:8080\r\n"


def whole(body: bytes, *headers: bytes) -> bytes:
    """A complete request."""
    return HEAD + HOST + b"".join(headers) + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def until(met: Callable[[], bool]) -> None:
    """Gives everybody their turn until `met`."""
    async with asyncio.timeout(5):
        while not met():  # noqa: ASYNC110 — what is awaited has no event
            await asyncio.sleep(0)


# ── heads ───────────────────────────────────────────────────────────────────────────────────────────────────────────

BROKEN = {
    "header of 70 kB": (431, HEAD + HOST + b"X-Long: " + b"x" * 70_000 + b"\r\n\r\n"),
    "endless header": (431, HEAD + HOST + b"X-Long: " + b"x" * 2_000_000),
    "endless URL": (431, b"GET /" + b"x" * 2_000_000),
    "200 headers": (431, HEAD + HOST + b"".join(b"X-%d: 1\r\n" % n for n in range(200)) + b"\r\n"),
    "bad chunk size": (400, HEAD + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
    "length and chunks": (400, HEAD + HOST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "two lengths": (400, HEAD + HOST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
    "host with a path": (400, HEAD + b"Host: a/..?\r\nContent-Length: 0\r\n\r\n"),
    "host with a fragment": (400, HEAD + b"Host: x#\r\nContent-Length: 0\r\n\r\n"),
    "no host": (400, HEAD + b"Content-Length: 0\r\n\r\n"),
    "two hosts": (400, HEAD + HOST + HOST + b"Content-Length: 0\r\n\r\n"),
    "NUL in the key": (400, b"POST /v1/embeddings HTTP/1.1\r\nAuthorization: Bearer a\0b\r\n\r\n"),
    "no HTTP": (400, b"hello\r\n\r\n"),
    "a tunnel": (400, b"CONNECT example.org:443 HTTP/1.1\r\n" + HOST + b"\r\n"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_head_is_refused_and_the_connection_closed(edge: Edge, name: str) -> None:
    """E44: our envelope, `connection: close`, and no text of such a request reaches a provider."""
    status, sent = BROKEN[name]
    calls = len(edge.upstream.arrivals)
    head, _, body = (await edge.raw(sent)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in head
    assert orjson.loads(body)["error"]["type"] == "invalid_request_error"
    assert len(edge.upstream.arrivals) == calls


async def test_a_trailer_is_no_header(edge: Edge) -> None:
    """A key that comes after the body opens nothing."""
    sent = b"POST /v1/embeddings HTTP/1.1\r\n" + HOST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = good(b'"x"')
    sent += b"%x\r\n%b\r\n0\r\nAuthorization: Bearer %b\r\n\r\n" % (len(body), body, KEY.encode())
    assert (await edge.raw(sent)).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("framing", ["one byte at a time", "chunks", "HTTP/1.0", "expectation", "host as in IPv6"])
async def test_odd_framing_is_understood(edge: Edge, framing: str) -> None:
    """What is unusual but correct HTTP is served."""
    body, close = good(b'"framed"'), b"Connection: close\r\n"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    parts = {
        "one byte at a time": [bytes([byte]) for byte in whole(body, close)],
        "chunks": [HEAD + HOST + close + b"Transfer-Encoding: chunked\r\n\r\n" + chunks],
        "HTTP/1.0": [whole(body).replace(b"HTTP/1.1", b"HTTP/1.0").replace(HOST, b"")],
        "expectation": [whole(body, close, b"Expect: 100-continue\r\n")],
        "host as in IPv6": [whole(body, close).replace(HOST, b"Host: [::1]:8080\r\n")],
    }[framing]
    answer = await edge.raw(*parts)
    assert b"HTTP/1.1 200 OK" in answer
    assert b'"index":0' in answer


# ── patience ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sent", [b"", b"POST /v1/emb", HEAD + b"X-Slow: 1"], ids=["nothing", "half a line", "no end"])
async def test_a_head_that_does_not_end_is_given_up(edge: Edge, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """T23: who opens a connection and sends nothing complete loses it, without an answer."""
    monkeypatch.setattr(server, "PATIENCE_S", 0.1)
    with suppress(ConnectionResetError):
        assert await edge.raw(sent) == b""


async def test_a_body_that_does_not_end_is_given_up(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """T23: a body that trickles loses its connection, is told of as 499, and nothing is asked of the engine."""
    monkeypatch.setattr(server, "PATIENCE_S", 0.1)
    left, calls = edge.answers(499), len(edge.upstream.arrivals)
    with suppress(ConnectionResetError):
        assert await edge.raw(HEAD + HOST + b"Content-Length: 100\r\n\r\n{") == b""
    await until(lambda: edge.answers(499) == left + 1)
    assert len(edge.upstream.arrivals) == calls


async def test_an_answer_that_nobody_reads_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T23: a caller that asks for much and never reads is cut off, and its request ends."""
    monkeypatch.setattr(server, "PATIENCE_S", 0.1)
    texts = orjson.dumps([f"text {n}" for n in range(1024)])
    async with running(tmp_path) as edge:
        await edge.post(content=good(texts + b',"encoding_format":"base64"'))
        reader, writer = await edge.connect()
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(whole(good(texts)))
        await until(lambda: edge.answers(499) == 1 and not edge.server.server_state.tasks)
        writer.close()


# ── callers that leave ──────────────────────────────────────────────────────────────────────────────────────────────


async def leave(edge: Edge, *sent: bytes) -> None:
    """Sends each of `sent` on a connection of its own, and goes away with a reset once the server works on all."""
    working = len(edge.server.server_state.tasks)
    writers = [(await edge.connect())[1] for _ in sent]
    for writer, data in zip(writers, sent, strict=True):
        writer.write(data)
    await until(lambda: len(edge.server.server_state.tasks) == working + len(sent))
    for writer in writers:
        reset_at_once = (1).to_bytes(4, "little") + bytes(4)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_at_once)
        writer.close()


async def test_who_leaves_before_the_end_of_the_body_is_no_error(tmp_path: Path) -> None:
    """E45: nothing is sent, and it is told of as 499, never as 400."""
    async with running(tmp_path) as edge:
        await leave(edge, HEAD + HOST + b"Content-Length: 100\r\n\r\n{")
        await until(lambda: edge.answers(499) == 1 and not edge.server.server_state.tasks)
        assert not edge.upstream.arrivals


async def test_who_leaves_while_waiting_harms_nobody(tmp_path: Path) -> None:
    """T19: of many callers in flight some leave; their requests end as 499, and every other gets its own vector."""
    async with running(tmp_path) as edge:
        edge.upstream.latency_s = 0.2
        staying = [asyncio.ensure_future(edge.post({"model": SMALL, "input": f"stays {n}"})) for n in range(20)]
        await until(lambda: len(edge.server.server_state.tasks) == 20)
        await leave(edge, *(whole(good(b'"leaves %d"' % n)) for n in range(20)))
        for n, answer in enumerate(await asyncio.gather(*staying)):
            assert answer.json()["data"][0]["embedding"] == pytest.approx(expected([f"stays {n}"])[0].tolist())
        await until(lambda: edge.answers(499) == 20 and not edge.server.server_state.tasks)
        assert edge.answers(200) == 20


# ── big answers ─────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def stopwatch() -> AsyncIterator[list[float]]:
    """How late the loop was, in seconds, each time it could have been on time."""
    lags: list[float] = []

    async def watch() -> None:
        while True:
            started_s = time.perf_counter()
            await asyncio.sleep(0.002)
            lags.append(time.perf_counter() - started_s - 0.002)

    task = asyncio.ensure_future(watch())
    yield lags
    task.cancel()


@pytest.mark.parametrize("encoding", ["base64", "float"])
async def test_a_big_answer_lets_others_have_their_turn(edge: Edge, encoding: str) -> None:
    """T20: while 2,048 cached vectors of 1,536 are written, the loop is free at least every 50 ms."""
    body = orjson.dumps({"model": SMALL, "input": [f"big {n}" for n in range(2048)], "encoding_format": encoding})
    await edge.post(content=body)
    reader, writer = await edge.connect()
    async with stopwatch() as lags:
        writer.write(HEAD + HOST + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        size_bytes = 0
        while piece := await reader.read(1 << 20):
            size_bytes += len(piece)
    writer.close()
    assert size_bytes > 2048 * 1536 * 5
    assert sorted(lags)[int(len(lags) * 0.99)] < 0.05


async def test_a_big_answer_to_an_old_client_has_no_chunks(edge: Edge) -> None:
    """HTTP/1.0 knows no chunked encoding: the answer ends with the connection."""
    texts = orjson.dumps([f"old {n}" for n in range(300)])
    answer = await edge.raw(whole(good(texts)).replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert len(orjson.loads(body)["data"]) == 300


# ── stopping ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_signal_lets_what_was_begun_finish(tmp_path: Path) -> None:
    """SIGTERM: a request in flight is answered, its connection closed, no new one taken, and `serve` just returns."""
    async with running(tmp_path) as edge:
        edge.upstream.latency_s = 0.3
        asking = asyncio.ensure_future(edge.post({"model": SMALL, "input": "in flight"}))
        await until(lambda: bool(edge.upstream.arrivals))
        signal.raise_signal(signal.SIGTERM)
        ready = await edge.http.get("/readyz")
        answer = await asking
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "not_ready")
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")


async def test_a_request_that_outlives_the_grace_is_told(tmp_path: Path) -> None:
    """What has not ended a deadline's time after the signal is answered with a 503, and the server stops."""
    async with running(tmp_path, server="deadline_s = 1") as edge:
        edge.upstream.latency_s = 1.5
        body = {"model": SMALL, "input": "hangs"}
        asking = asyncio.ensure_future(edge.post(body, x_embedgate_deadline_ms="60000"))
        await until(lambda: bool(edge.upstream.arrivals))
        edge.server.drain()
        answer = await asking
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


async def test_a_port_that_is_taken_is_a_configuration_error(edge: Edge, tmp_path: Path) -> None:
    """The operator reads one line that names the address, before any model is loaded."""
    port = int(edge.url.rsplit(":", 1)[1])
    settings = load(None, {"EMBEDGATE_SERVER__PORT": str(port), "EMBEDGATE_SERVER__LOG_FILE": str(tmp_path / "log")})
    with pytest.raises(ConfigurationError, match=rf"^Cannot listen on 127\.0\.0\.1:{port}: .*in use\.$"):
        await server.serve(settings, lambda url: None)
