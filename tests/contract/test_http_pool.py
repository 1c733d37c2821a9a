"""What one provider's connections promise: counted whatever happens, bounded in time, through proxies only if asked."""

import asyncio
import base64
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Self

import orjson
import pytest
from prometheus_client import generate_latest

from app.domain import ANONYMOUS, EmbeddingRequest
from app.errors import CallTimeout, ConfigurationError, ProviderError, Unreachable, UpstreamFailed
from app.providers.http import Endpoint, Pool
from app.providers.refusals import Answer
from app.runtime import Runtime
from app.settings import load
from tests.emulators import faults
from tests.emulators.faults import Wire
from tests.emulators.openai import OpenAIEmulator

BODY = orjson.dumps({"model": "text-embedding-3-small", "input": ["a text"], "encoding_format": "base64"})


async def post(endpoint: Endpoint, *, timeout_s: float = 10) -> Answer:
    """One call."""
    return await endpoint.post("embeddings", BODY, most_bytes=100_000, timeout_s=timeout_s)


async def failure(endpoint: Endpoint, *, timeout_s: float = 10) -> ProviderError:
    """The error of one call, which comes within two seconds."""
    started_s = time.monotonic()
    with pytest.raises(ProviderError) as failed:
        await post(endpoint, timeout_s=timeout_s)
    assert time.monotonic() - started_s < 2
    return failed.value


@pytest.fixture
async def emulator() -> AsyncIterator[OpenAIEmulator]:
    """OpenAI without keys, on loopback."""
    async with OpenAIEmulator(api_key=None) as running:
        yield running


Connect = Callable[..., Endpoint]


@pytest.fixture
async def connect(emulator: OpenAIEmulator) -> AsyncIterator[Connect]:
    """Makes Endpoints for the emulator, or another base URL, that are closed when the test is over."""
    made: list[Endpoint] = []

    def new(base_url: str = "", *, max_connections: int = 4, **options: object) -> Endpoint:
        made.append(
            Endpoint(base_url or emulator.base_url, {}, max_connections=max_connections, **options)  # type: ignore[arg-type]
        )
        return made[-1]

    yield new
    for endpoint in made:
        await endpoint.aclose()


class Door:
    """Holds calls until it is `open`; `reached` once one of them has come."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def hold(self, wire: Wire, content: bytes) -> None:
        """The fault."""
        self.reached.set()
        await self.open.wait()
        await wire.answer(200, content, {})


# ── the pool ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_pool_says_who_is_busy_and_who_waits(connect: Connect, emulator: OpenAIEmulator) -> None:
    """One of two calls has the only connection, the other waits for it; then it is idle, and at last closed."""
    endpoint, door = connect(max_connections=1), Door()
    assert endpoint.pool() == Pool(busy=0, idle=0, waiting=0)
    emulator.inject(door.hold)
    calls = [asyncio.create_task(post(endpoint)) for _ in range(2)]
    await door.reached.wait()
    assert endpoint.pool() == Pool(busy=1, idle=0, waiting=1)
    door.open.set()
    assert [answer.status for answer in await asyncio.gather(*calls)] == [200, 200]
    assert endpoint.pool() == Pool(busy=0, idle=1, waiting=0)
    await emulator.__aexit__()
    await all_closed(endpoint)


async def all_closed(endpoint: Endpoint) -> None:
    """Returns once it knows that its idle connections were closed by the other side."""
    while endpoint.pool().idle:  # noqa: ASYNC110 (the operating system tells it)
        await asyncio.sleep(0)


async def test_a_kept_connection_is_opened_once(connect: Connect, emulator: OpenAIEmulator) -> None:
    """Each new connection is told of with the wait for it, and after a reset there is a new one."""
    waits_s: list[float] = []
    endpoint = connect(on_opened=waits_s.append)
    for _ in range(3):
        await post(endpoint)
    assert len(waits_s) == 1
    assert 0 < waits_s[0] < 5
    emulator.inject(faults.reset, calls=1)
    await failure(endpoint)
    await post(endpoint)
    assert len(waits_s) == 2
    assert endpoint.pool() == Pool(busy=0, idle=1, waiting=0)


async def test_no_count_leaks(connect: Connect, emulator: OpenAIEmulator) -> None:
    """After calls that were cancelled at any point, were cut off or found nobody, nobody is busy or waits."""
    endpoint, chance = connect(max_connections=3), random.Random(5)

    async def leave_early() -> None:
        call = asyncio.create_task(post(endpoint))
        for _ in range(chance.randrange(60)):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    for _ in range(20):
        await asyncio.gather(*(leave_early() for _ in range(20)))
        assert endpoint.pool()[::2] == (0, 0)
    for fault in (faults.reset, faults.half_body, faults.endless_body):
        emulator.inject(fault, calls=1)
        await failure(endpoint)
        assert endpoint.pool()[::2] == (0, 0)
    await post(endpoint)
    assert 1 <= endpoint.pool().idle <= 3
    await emulator.__aexit__()
    await all_closed(endpoint)
    assert type(await failure(endpoint)) is Unreachable
    assert endpoint.pool()[::2] == (0, 0)


# ── time ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def mute() -> AsyncIterator[str]:
    """A server that takes connections and says nothing, as one would in the middle of TLS."""
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    for writer in writers:
        writer.close()


async def test_a_connection_that_is_not_made_in_time_costs_nothing(connect: Connect) -> None:
    """The connect time-out ends the attempt long before the call's, TLS included; nothing was sent."""
    async with mute() as place:
        failed = await failure(connect(f"https://{place}/v1", connect_timeout_s=0.05), timeout_s=30)
    assert type(failed) is Unreachable
    assert not failed.counted


@pytest.mark.parametrize("fault", [faults.hang, faults.stalled_body], ids=["before the head", "in the body"])
async def test_silence_ends_at_the_read_time_out(
    connect: Connect, emulator: OpenAIEmulator, fault: faults.Fault
) -> None:
    """The read time-out ends a call long before the call's own; it may have cost something."""
    emulator.inject(fault, calls=1)
    endpoint = connect(read_timeout_s=0.1)
    failed = await failure(endpoint, timeout_s=30)
    assert type(failed) is CallTimeout
    assert failed.counted
    assert (await post(endpoint)).status == 200


async def test_a_trickle_is_no_silence(connect: Connect, emulator: OpenAIEmulator) -> None:
    """A reply that takes longer than the read time-out, but never falls silent, arrives."""
    emulator.inject(faults.slow_body(pieces=40, pause_s=0.02), calls=1)
    assert (await post(connect(read_timeout_s=0.6))).status == 200


async def test_the_calls_time_bounds_all_others(connect: Connect, emulator: OpenAIEmulator) -> None:
    """Longer connect and read time-outs give no call more time than it has."""
    emulator.inject(faults.hang, calls=1)
    assert type(await failure(connect(read_timeout_s=60), timeout_s=0.1)) is CallTimeout
    async with mute() as place:
        endpoint = connect(f"https://{place}/v1", connect_timeout_s=60)
        assert type(await failure(endpoint, timeout_s=0.1)) is CallTimeout


# ── proxies ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Proxy:
    """A forward proxy on loopback that writes down the head of each request; with `refuses` it answers 407."""

    def __init__(self, *, refuses: bool = False) -> None:
        self._refuses = refuses
        self._tasks: set[asyncio.Future[None]] = set()
        self.heads: list[str] = []
        self.place = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.place = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.ensure_future(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            if self._refuses:
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
                return
            method, url, rest = head.split(" ", 2)
            host, _, path = url.removeprefix("http://").partition("/")
            length = int(rest.lower().partition("content-length: ")[2].partition("\r")[0])
            there, back = await asyncio.open_connection(*host.split(":"))
            with closing(back):
                last = rest.replace("HTTP/1.1", "HTTP/1.1\r\nConnection: close", 1)
                back.write(f"{method} /{path} {last}".encode() + await reader.readexactly(length))
                writer.write(await there.read())


def only_proxies(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """An environment with no other variables about proxies than these."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


async def test_the_environments_proxy_is_used_only_when_asked(
    connect: Connect, emulator: OpenAIEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its proxy gets the call, with its own password, where the operator says so; its exceptions hold."""
    async with Proxy() as proxy:
        only_proxies(monkeypatch, http_proxy=f"http://me:secret@{proxy.place}")
        assert (await post(connect())).status == 200
        assert proxy.heads == []
        assert (await post(connect(proxy_from_environment=True))).status == 200
        [head] = proxy.heads
        assert head.startswith(f"POST {emulator.base_url}/embeddings HTTP/1.1\r\n")
        assert f"\r\nProxy-Authorization: Basic {base64.b64encode(b'me:secret').decode()}\r\n" in head
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert (await post(connect(proxy_from_environment=True))).status == 200
        assert len(proxy.heads) == 1
    assert len(emulator.arrivals) == 3


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_refuses_costs_nothing(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Whether it is to forward a call or to open a tunnel, nothing reached the provider."""
    async with Proxy(refuses=True) as proxy:
        only_proxies(monkeypatch, **{f"{scheme}_proxy": f"http://{proxy.place}"})
        failed = await failure(connect(f"{scheme}://provider.example/v1", proxy_from_environment=True))
    assert type(failed) is Unreachable
    assert not failed.counted
    assert proxy.heads[0].split()[0] == {"http": "POST", "https": "CONNECT"}[scheme]


@pytest.mark.parametrize("named", ["socks5://:secret@127.0.0.1:1080", "http://:secret@", "http://me:secret@[::1"])
async def test_a_proxy_that_cannot_be_used_is_refused_at_once(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """The operator is told which variable is wrong, and not its password."""
    only_proxies(monkeypatch, https_proxy=named)
    with pytest.raises(ConfigurationError, match="https_proxy") as refused:
        connect("https://provider.example/v1", proxy_from_environment=True)
    assert "secret" not in str(refused.value)


async def test_no_password_of_the_environment_is_sent(
    connect: Connect, emulator: OpenAIEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A .netrc that names the provider stays unread, with proxies or without."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret")
    monkeypatch.setenv("NETRC", str(netrc))
    for asked in (False, True):
        await post(connect(proxy_from_environment=asked))
        assert "authorization" not in emulator.arrivals[-1].headers


# ── the configuration ───────────────────────────────────────────────────────────────────────────────────────────────

CONFIGURATION = """
[server]
log_file = '{log}'
[deployments.far]
dialect = "openai"
base_url = "{base_url}"
model = "text-embedding-3-small"
proxy_from_environment = true
read_timeout_s = 0.1
attempts = 1
[deployments.mute]
dialect = "openai"
base_url = "https://{mute}/v1"
model = "text-embedding-3-small"
connect_timeout_s = 0.1
attempts = 1
[models.far]
deployments = ["far"]
[models.mute]
deployments = ["mute"]
"""


async def test_the_configuration_reaches_the_connections(
    emulator: OpenAIEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time-outs and proxies of each deployment are its own, and its connections show in the metrics."""
    path, log = tmp_path / "embedgate.toml", tmp_path / "log"
    async with mute() as place, Proxy() as proxy:
        only_proxies(monkeypatch, http_proxy=f"http://{proxy.place}")
        path.write_text(CONFIGURATION.format(log=log, base_url=emulator.base_url, mute=place))
        async with Runtime(load(path, {})) as runtime:

            async def ask(model: str, text: str) -> None:
                request = EmbeddingRequest(ANONYMOUS, model, (text,), time.monotonic() + 30)
                await runtime.gateway.embed(request)

            await ask("far", "a text")
            emulator.inject(faults.hang)
            for model in ("far", "mute"):
                with pytest.raises(UpstreamFailed):
                    await ask(model, "another text")
            scraped = generate_latest(runtime.telemetry.registry).decode()
    assert len(proxy.heads) == 2
    lines = [orjson.loads(line) for line in log.read_bytes().splitlines()]
    outcomes = [(line["deployment"], line["outcome"]) for line in lines if line["event"] == "batch.settled"]
    assert outcomes == [("far", "ok"), ("far", "CallTimeout"), ("mute", "Unreachable")]
    for state in ("busy", "idle", "waiting"):
        assert f'embedgate_pool_connections{{deployment="far",state="{state}"}} 0.0\n' in scraped
    assert 'embedgate_pool_connections_opened_total{deployment="far"} 2.0\n' in scraped
    assert 'embedgate_pool_wait_seconds_count{deployment="far"} 2.0\n' in scraped
    assert 'embedgate_pool_connections{deployment="mute",state="idle"} 0.0\n' in scraped
    assert 'embedgate_pool_connections_opened_total{deployment="mute"}' not in scraped
