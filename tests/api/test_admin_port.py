"""A port of operators' own: what is there and who may use it, what is left on the other one, how both begin and end."""

import asyncio
import json
import signal
import socket
import subprocess
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import KEY, SMALL, Edge, running
from tests.api.test_cli import COMMAND, ENVIRON, embedgate
from tests.api.worlds import FACTS, SPAN
from tests.contract.summed import sum_up
from tests.emulators.faults import Wire
from tests.servers import free_port

ADMIN_KEY = "key-of-the-operator"
ELSEWHERE = 'host = "0.0.0.0"'
OF_OPERATORS = ["/metrics", "/admin/cache", "/admin/tenants", "/admin/keys", "/admin/usage/unconfirmed"]


@asynccontextmanager
async def parted(
    folder: Path, server: str = "", tenants: str | None = None
) -> AsyncIterator[tuple[Edge, httpx.AsyncClient]]:
    """A service, and a client of its admin port."""
    port = free_port()
    more: dict[str, Any] = {} if tenants is None else {"tenants": tenants}
    async with (
        running(folder, server=f"{server}\nadmin_port = {port}", **more) as edge,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as operators,
    ):
        yield edge, operators


def bearing(key: str) -> dict[str, str]:
    """The header that shows `key`, if there is one."""
    return {"authorization": f"Bearer {key}"} if key else {}


async def statuses(http: httpx.AsyncClient, key: str = "", paths: list[str] | None = None, **headers: str) -> set[int]:
    """How everything of operators is answered to who shows `key`."""
    asked = [*OF_OPERATORS, "/v1/usage"] if paths is None else paths
    return {(await http.get(path, headers=bearing(key) | headers)).status_code for path in asked}


# ── who may, and where ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_on_the_main_port_nothing_of_operators_is_left(tmp_path: Path) -> None:
    """Whoever asks by whatever name; callers' routes are where they were."""
    async with parted(tmp_path, f'admin_key = "{ADMIN_KEY}"') as (edge, operators):
        for key in ("", KEY, ADMIN_KEY):
            assert await statuses(edge.http, key, OF_OPERATORS) == {404}
            assert await statuses(edge.http, key, OF_OPERATORS, host=operators.base_url.netloc.decode()) == {404}
        assert await statuses(edge.http, KEY, ["/healthz", "/readyz", "/v1/models", "/v1/usage"]) == {200}
        assert (await edge.post({"model": SMALL, "input": "x"})).status_code == 200
        described = (await edge.http.get("/openapi.json")).json()["paths"]
        assert not [path for path in described if path.startswith(("/admin", "/metrics"))]
        assert "/v1/embeddings" in described


async def test_on_the_admin_port_there_is_nothing_else(tmp_path: Path) -> None:
    """Probes, and what operators use; nobody buys anything there."""
    async with parted(tmp_path) as (edge, operators):
        for method, path in (("POST", "/v1/embeddings"), ("GET", "/v1/models"), ("GET", f"/v1/models/{SMALL}")):
            answer = await operators.request(method, path, headers=bearing(KEY), json={"model": SMALL, "input": "x"})
            assert answer.json()["error"]["message"] == f"Invalid URL ({method} {path})"
        assert await statuses(operators, "", [*OF_OPERATORS, "/healthz", "/readyz", "/v1/usage", "/docs"]) == {200}
        described = (await operators.get("/openapi.json")).json()["paths"]
        assert {"/admin/keys", "/metrics", "/v1/usage"} <= described.keys()
        assert "/v1/embeddings" not in described
        assert not edge.upstream.arrivals


async def test_on_loopback_only_a_name_of_this_machine_opens_it(tmp_path: Path) -> None:
    """As on a port for all: a page in a browser that was led here finds nothing."""
    async with parted(tmp_path) as (_, operators):
        assert await statuses(operators, host="rebound.example") == {404}
        assert await statuses(operators, host="localhost:1") == {200}


async def test_elsewhere_it_is_free_until_operators_have_a_key(tmp_path: Path) -> None:
    """It was opened on purpose; with the first key for operators it asks for one, and ending that opens nothing."""
    async with parted(tmp_path, ELSEWHERE) as (edge, operators):
        assert await statuses(operators, host="metrics.internal") == {200}
        made = (await operators.post("/admin/keys", json={"scopes": ["admin"]})).json()
        key = made["key"]
        assert await statuses(operators) == {401}
        assert await statuses(operators, KEY) == {401}
        assert await statuses(operators, key) == {200}
        assert await statuses(edge.http, key, OF_OPERATORS) == {404}
        assert (await operators.delete(f"/admin/keys/{made['id']}", headers=bearing(key))).status_code == 200
        assert await statuses(operators) == {401}


async def test_elsewhere_a_configured_admin_key_is_asked_for(tmp_path: Path) -> None:
    """From the beginning, and on every route but the probes; a tenant's key is as wrong as any."""
    async with parted(tmp_path, f'{ELSEWHERE}\nadmin_key = "{ADMIN_KEY}"') as (_, operators):
        assert await statuses(operators) == {401}
        assert await statuses(operators, KEY) == {401}
        assert await statuses(operators, ADMIN_KEY) == {200}
        assert await statuses(operators, "", ["/healthz", "/readyz"]) == {200}


async def test_while_nobody_can_know_the_keys_it_is_closed(tmp_path: Path) -> None:
    """Somebody may have made one for operators; a database that is down opens nothing."""
    async with parted(tmp_path, ELSEWHERE) as (edge, operators):
        edge.runtime.directory._version = None
        assert await statuses(operators) == {503}
        assert (await operators.get("/metrics")).json()["error"]["code"] == "not_ready"
        await edge.runtime.directory.refresh()
        assert await statuses(operators) == {200}


async def test_operators_see_everybodys_usage_there(tmp_path: Path) -> None:
    """Also who shows a tenant's key; on the main port that is told of its own, as ever."""
    async with parted(tmp_path) as (edge, operators):
        await sum_up(edge.runtime.stores.database, FACTS)
        told = [await http.get(f"/v1/usage?{SPAN}", headers=bearing(KEY)) for http in (operators, edge.http)]
        assert [answer.json()["totals"]["cost_nano_usd"] for answer in told] == [2664, 888]
        assert await statuses(edge.http, "", ["/v1/usage"]) == {401}
        assert await statuses(operators, "", ["/v1/usage"]) == {200}


# ── beginning and end ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_both_ports_drain_together(tmp_path: Path) -> None:
    """Nobody can connect to either any more, and what an operator has begun is finished."""
    released = asyncio.Event()

    async def hold(wire: Wire, content: bytes) -> None:
        await released.wait()
        await wire.answer(200, content, {})

    async with parted(tmp_path) as (edge, operators), asyncio.TaskGroup() as group:
        edge.upstream.inject(hold, calls=1)
        body = {"model": SMALL, "input": ["warmed"]}
        begun = group.create_task(operators.post("/admin/cache/warm", json=body))
        while not edge.upstream.arrivals:  # noqa: ASYNC110 — nobody tells
            await asyncio.sleep(0.005)
        edge.server.drain()
        while edge.server.servers[-1].sockets:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        for http in (edge.http, operators):
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", http.base_url.port)
        released.set()
        answer = await begun
        assert (answer.status_code, answer.json()["texts"]) == (200, 1)
        assert answer.headers["connection"] == "close"
    assert '"service.draining"' in edge.log.read_text()


async def test_the_log_tells_both_addresses(tmp_path: Path) -> None:
    """In the one event of the start."""
    async with parted(tmp_path) as (edge, operators):
        pass
    events = [json.loads(line) for line in edge.log.read_text().splitlines()]
    (started,) = [event for event in events if event["event"] == "service.started"]
    assert started["base_url"] == f"{edge.url}/v1"
    assert started["admin_url"] == str(operators.base_url)


def test_an_admin_port_in_use_is_told_in_one_line(tmp_path: Path) -> None:
    """Exit code 2, and nothing is served on the other port either."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        shown = embedgate("serve", "--port", "0", folder=tmp_path, EMBEDGATE_SERVER__ADMIN_PORT=port)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == f"embedgate: Cannot listen on 127.0.0.1:{port}: Address already in use.\n"


def test_the_command_line_tells_it(tmp_path: Path) -> None:
    """`check` prints it, and cautions where anybody may connect; `serve` announces it, answers there, and leaves."""
    port = free_port()
    environ = {"EMBEDGATE_SERVER__ADMIN_PORT": str(port), "EMBEDGATE_TENANTS__T__API_KEY": "k"}
    (tmp_path / "embedgate.toml").write_text('[tenants.t]\napi_key = "k"\n')
    checked = embedgate("check", folder=tmp_path, **environ)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert f"admin_port = {port}\n" in checked.stdout
    elsewhere = embedgate("check", folder=tmp_path, EMBEDGATE_SERVER__HOST="0.0.0.0", **environ)
    assert (elsewhere.returncode, "server.admin_port: whoever can connect is an operator" in elsewhere.stderr) == (
        0,
        True,
    )
    more = environ | {"EMBEDGATE_STORES__DATA_DIR": str(tmp_path / "data")}
    with subprocess.Popen(
        [*COMMAND, "serve", "--port", "0"], cwd=tmp_path, env=ENVIRON | more,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert lines[2].startswith(f"operators http://127.0.0.1:{port}, ")
