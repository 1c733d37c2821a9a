"""The routes with which operators tend the cache: who may use them, what they do, what they say to nonsense."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.api.conftest import ADA, KEY, SMALL, Edge, expected, running, serving
from tests.emulators.faults import Wire
from tests.emulators.openai import OpenAIEmulator

pytestmark = pytest.mark.asyncio(loop_scope="module")

STATS, INVALIDATE, WARM = "/admin/cache", "/admin/cache/invalidate", "/admin/cache/warm"
JSON = {"content-type": "application/json"}
ADMIN_KEY = "key-of-the-operator"
ONE_SLOT = """
[server]
log_file = "{folder}/log.jsonl"
[deployments.main]
dialect = "openai"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "text-embedding-3-small"
max_in_flight = 1
max_batch_items = 1
[models.text-embedding-3-small]
deployments = ["main"]
canary_interval_s = 0
"""


def bought(edge: Edge) -> list[str]:
    """Every text that was ever sent upstream, in order."""
    inputs = (arrival.body["input"] for arrival in edge.upstream.arrivals)
    return [text for given in inputs for text in ([given] if isinstance(given, str) else given)]


async def until(holds: Callable[[], bool]) -> None:
    """Waits for what nobody tells."""
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def written(edge: Edge, rows: int) -> dict[str, Any]:
    """The stats once so many rows are in the database."""
    while True:
        stats: dict[str, Any] = (await edge.http.get(STATS)).json()
        if stats["sql"]["entries"] >= rows:
            return stats
        await asyncio.sleep(0.01)


# ── who may ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("method", "path"), [("GET", STATS), ("POST", INVALIDATE), ("POST", WARM)])
async def test_elsewhere_only_the_admin_key_opens_them(tmp_path: Path, method: str, path: str) -> None:
    """On a host that others can reach neither no key nor a tenant's is enough, and nothing is done for them."""
    body = {"all": True} if path == INVALIDATE else {"model": SMALL, "input": ["warmed"]}
    async with running(tmp_path, server=f'host = "0.0.0.0"\nadmin_key = "{ADMIN_KEY}"') as edge:

        async def ask(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            sent: dict[str, Any] = {"json": body} if method == "POST" else {}
            return (await edge.http.request(method, path, headers=headers, **sent)).status_code

        assert [await ask(""), await ask(KEY), await ask(ADMIN_KEY + "x")] == [401, 401, 401]
        assert not edge.upstream.arrivals
        assert await ask(ADMIN_KEY) == 200


@pytest.mark.parametrize(("method", "path"), [("GET", STATS), ("POST", INVALIDATE), ("POST", WARM)])
async def test_elsewhere_without_an_admin_key_there_is_nothing(tmp_path: Path, method: str, path: str) -> None:
    """As if they had never been: whatever is sent, the answer is that of any unknown path."""
    async with running(tmp_path, server='host = "0.0.0.0"') as edge:
        answer = await edge.http.request(method, path, headers={"authorization": f"Bearer {KEY}"}, content=b"{")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == f"Invalid URL ({method} {path})"


# ── what they do ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["rebound.example", "rebound.example:80", "10.0.0.1", "localhost.evil"])
@pytest.mark.parametrize("path", [STATS, "/admin/keys", "/metrics"])
async def test_on_loopback_only_a_name_of_this_machine_opens_them(edge: Edge, host: str, path: str) -> None:
    """A page in a browser that was led here, or a proxy for others, asks for another name: to it there is nothing."""
    assert (await edge.http.get(path, headers={"host": host})).status_code == 404
    for name in ("localhost", "127.0.0.1:8080", "[::1]:8080"):
        assert (await edge.http.get(path, headers={"host": name})).status_code == 200


async def test_warmed_texts_are_bought_once_and_then_asked_for_free(edge: Edge) -> None:
    """What was there already is told apart; every one is answered from the cache afterwards."""
    texts = [f"warmed {number}" for number in range(300)]
    await edge.post({"model": SMALL, "input": texts[:3]})
    answer = await edge.http.post(WARM, json={"model": SMALL, "input": texts})
    told = answer.json()
    assert (answer.status_code, told["texts"], told["kept"], told["failed"]) == (200, 300, 3, 0)
    assert told["tokens"] == sum(edge.upstream.count(text) for text in texts)
    again = (await edge.http.post(WARM, json={"model": SMALL, "input": texts})).json()
    assert (again["kept"], again["tokens"]) == (300, told["tokens"])
    assert sorted(text for text in bought(edge) if text.startswith("warmed")) == sorted(texts)
    asked = await edge.post({"model": SMALL, "input": texts[299]})
    assert asked.headers["x-embedgate-cache"] == "hit=1,miss=0"
    assert np.array_equal(np.array(asked.json()["data"][0]["embedding"], "<f4"), expected([texts[299]])[0])


async def test_one_bad_text_does_not_keep_the_others_out(edge: Edge) -> None:
    """Too long for the model, or refused by the provider: it is counted, the rest is kept."""
    edge.upstream.poison = {"poisonous"}
    texts = ["good before", "word " * 9000, "poisonous", "good after"]
    told = (await edge.http.post(WARM, json={"model": SMALL, "input": texts})).json()
    assert (told["texts"], told["failed"]) == (4, 2)
    asked = await edge.post({"model": SMALL, "input": ["good before", "good after"]})
    assert asked.headers["x-embedgate-cache"] == "hit=2,miss=0"


async def test_a_group_of_tenants_is_warmed_by_its_name(edge: Edge) -> None:
    """What was bought for one is not there for those who name none."""
    told = await edge.http.post(WARM, json={"model": SMALL, "input": ["of a group"], "cache_group": "theirs"})
    assert told.status_code == 200
    asked = await edge.post({"model": SMALL, "input": "of a group"})
    assert asked.headers["x-embedgate-cache"] == "hit=0,miss=1"


async def test_warming_lets_everybody_else_go_first(tmp_path: Path) -> None:
    """It has the priority of bulk work: who comes after it is served before it."""
    released = asyncio.Event()

    async def hold(wire: Wire, content: bytes) -> None:
        await released.wait()
        await wire.answer(200, content, {})

    async with OpenAIEmulator() as upstream:
        upstream.inject(hold, calls=1)
        text = ONE_SLOT.format(folder=tmp_path, upstream=upstream.base_url)
        async with serving(tmp_path, text) as (_, _, runtime, http), asyncio.TaskGroup() as group:

            async def ask(path: str, texts: list[str], waiting: int) -> None:
                group.create_task(http.post(path, json={"model": SMALL, "input": texts}))
                await until(lambda: sum(runtime.gateway._bound.items) == waiting)

            await ask("/v1/embeddings", ["first"], 0)
            await until(lambda: len(upstream.arrivals) == 1)
            await ask(WARM, ["warmed one", "warmed two", "warmed three"], 3)
            await ask("/v1/embeddings", ["last"], 4)
            released.set()
    assert [arrival.body["input"] for arrival in upstream.arrivals] == [
        "first", "last", "warmed one", "warmed two", "warmed three",
    ]  # fmt: skip


@pytest.mark.parametrize("by", ["model", "space", "all", "older_than_s"])
async def test_what_was_invalidated_is_bought_again(tmp_path: Path, by: str) -> None:
    """At once in the process that was told; of another model, or younger, nothing is lost."""
    async with running(tmp_path, tenants="") as edge:
        asked = await edge.post({"model": SMALL, "input": "stale"})
        await edge.post({"model": ADA, "input": "kept"})
        await written(edge, 2)
        named = {"model": SMALL, "space": asked.headers["x-embedgate-space"], "all": True, "older_than_s": 10**30}[by]
        answer = await edge.http.post(INVALIDATE, json={by: named})
        dropped = {"all": 2, "older_than_s": 0}.get(by, 1)
        assert (answer.status_code, answer.json()) == (200, {"rows": dropped})
        again = [await edge.post({"model": SMALL, "input": "stale"}), await edge.post({"model": ADA, "input": "kept"})]
        assert [each.headers["x-embedgate-cache"] for each in again] == [
            "hit=1,miss=0" if by == "older_than_s" else "hit=0,miss=1",
            "hit=0,miss=1" if by == "all" else "hit=1,miss=0",
        ]


async def test_stats_tell_how_full_each_level_is(tmp_path: Path) -> None:
    """Entries, bytes and the bound, nearest level first."""
    async with running(tmp_path, tenants="") as edge:
        await edge.post({"model": SMALL, "input": ["one", "two"]})
        stats = await written(edge, 2)
    assert list(stats) == ["memory", "sql"]
    assert (stats["memory"]["entries"], stats["memory"]["max"]) == (2, 2**28)
    assert all(level["bytes"] > 2 * 6144 for level in stats.values())


# ── nonsense ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (INVALIDATE, b"", 400, "invalid_json"),
        (INVALIDATE, b"all", 400, "invalid_json"),
        (INVALIDATE, b'{"all": true', 400, "invalid_json"),
        (INVALIDATE, b'{"model": "\xff"}', 400, "invalid_json"),
        (INVALIDATE, b'{"model": ' + b"[" * 100_000, 400, "invalid_value"),
        (INVALIDATE, b"[]", 400, "invalid_value"),
        (INVALIDATE, b"{}", 400, "invalid_value"),
        (INVALIDATE, b'{"all": false}', 400, "invalid_value"),
        (INVALIDATE, b'{"all": "yes"}', 400, "invalid_value"),
        (INVALIDATE, b'{"everything": true}', 400, "invalid_value"),
        (INVALIDATE, b'{"all": true, "model": "text-embedding-3-small"}', 400, "invalid_value"),
        (INVALIDATE, b'{"older_than_s": -1}', 400, "invalid_value"),
        (INVALIDATE, b'{"older_than_s": "90d"}', 400, "invalid_value"),
        (INVALIDATE, b'{"older_than_s": true}', 400, "invalid_value"),
        (INVALIDATE, b'{"space": "*"}', 400, "invalid_value"),
        (INVALIDATE, b'{"space": "model text-embedding-3-small"}', 400, "invalid_value"),
        (INVALIDATE, b'{"space": "s1-\\u0000"}', 400, "invalid_value"),
        (INVALIDATE, b'{"model": "nobody"}', 404, "model_not_found"),
        (INVALIDATE, b'{"model": "\\ud800"}', 400, "invalid_json"),
        (WARM, b'{"model": "text-embedding-3-small"}', 400, "invalid_value"),
        (WARM, b'{"model": "text-embedding-3-small", "input": "text"}', 400, "invalid_value"),
        (WARM, b'{"model": "text-embedding-3-small", "input": [1]}', 400, "invalid_value"),
        (WARM, b'{"model": "text-embedding-3-small", "input": ["\\udfff"]}', 400, "invalid_json"),
        (WARM, b'{"model": "text-embedding-3-small", "input": ["x"], "input_type": "other"}', 400, "invalid_value"),
        (WARM, b'{"model": "text-embedding-3-small", "input": ["x"], "extra": 1}', 400, "invalid_value"),
        (WARM, b'{"model": "nobody", "input": ["x"]}', 404, "model_not_found"),
        (WARM, b'{"model": "nobody", "input": []}', 404, "model_not_found"),
    ],
)
async def test_nonsense_is_refused_in_the_usual_envelope(
    edge: Edge, path: str, body: bytes, status: int, code: str
) -> None:
    """Whatever is sent, the caller is told what is wrong with it, and nothing is invalidated."""
    await edge.post({"model": SMALL, "input": "untouched"})
    answer = await edge.http.post(path, content=body, headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (status, "invalid_request_error", code)
    asked = await edge.post({"model": SMALL, "input": "untouched"})
    assert asked.headers["x-embedgate-cache"] == "hit=1,miss=0"


@pytest.mark.parametrize(
    "headers",
    [{}, {"content-type": "text/plain"}, {"content-type": "multipart/form-data"}, JSON | {"content-encoding": "gzip"}],
)
async def test_only_plain_json_is_read(edge: Edge, headers: dict[str, str]) -> None:
    """Pages in a browser on this machine may send anything but that without being asked whether they may."""
    answer = await edge.http.post(INVALIDATE, content=b'{"all": true}', headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (415, "invalid_request_error")
    named = await edge.http.post(INVALIDATE, content=b"{}", headers={"content-type": "Application/JSON; charset=utf-8"})
    assert named.status_code == 400


async def test_a_body_that_is_too_large_is_not_read(edge: Edge) -> None:
    """Announced or not."""
    announced = await edge.raw(
        b"POST /admin/cache/warm HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"connection: close\r\ncontent-length: 16777217\r\n\r\n{"
    )
    assert announced.startswith(b"HTTP/1.1 413")

    async def pieces() -> Any:
        for _ in range(17):
            yield b" " * 2**20

    answer = await edge.http.post(WARM, content=pieces(), headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


async def test_a_caller_that_leaves_is_no_crash(tmp_path: Path) -> None:
    """Half a body and no more: nobody is alarmed."""
    async with running(tmp_path) as edge:
        _, writer = await edge.connect()
        head = b"POST /admin/cache/warm HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(head + b"content-length: 99\r\n\r\n{")
        await writer.drain()
        await until(lambda: bool(edge.server.server_state.tasks))
        writer.close()
        await until(lambda: not edge.server.server_state.tasks)
    events = [json.loads(line)["event"] for line in edge.log.read_text().splitlines()]
    assert not [event for event in events if "crash" in event]


async def test_a_database_that_is_down_is_told_as_such(tmp_path: Path) -> None:
    """An invalidation that may not have reached everybody is none; the caller may try again."""
    async with running(tmp_path) as edge:
        edge.runtime.stores.database.up = False
        answer = await edge.http.post(INVALIDATE, json={"all": True})
        stats: httpx.Response = await edge.http.get(STATS)
        edge.runtime.stores.database.up = True
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "not_ready")
    assert "database" in error["message"]
    assert int(answer.headers["retry-after"]) >= 1
    assert (stats.status_code, stats.json()["sql"]) == (200, None)
