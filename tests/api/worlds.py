"""Hides a service with a key of every kind and two tenants that must not see each other, and how it is asked."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import httpx
from fastapi import FastAPI
from starlette.routing import Route

from app.api import ops
from app.api.auth import Attempts, Keys
from app.api.embeddings import PATH
from app.storage import api_key
from app.tenant_desk import NewKey, TenantDesk
from tests.api.conftest import ADA, KEY, SMALL, Edge, running
from tests.api.conftest import TENANTS as CONFIGURED
from tests.contract.summed import bought, spared, sum_up

ADMIN_KEY, SECRET = "key-of-the-operator", "nothing-but-tests-knows-it"
PROVIDER_KEY = "sk-emulator-key"
OWN, FOREIGN, ABSENT = "team-1", "team-2", "team-3"
NO_MODEL = "text-embedding-ada-999"
SPAN, HOUR = "start=2031-11-01&end=2031-12-01", int(datetime(2031, 11, 1, tzinfo=UTC).timestamp()) // 3600

WRONG = ("unknown", "misspelt", "expired", "revoked", "elsewhere")
TENANTS = ("embed", "batch", "both", "foreign", "configured")
OPERATORS = ("operator", "admin")
ROLES = ("none", *WRONG, *TENANTS, *OPERATORS)


@dataclass(frozen=True)
class Answer:
    """What came back, as it was sent."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """Its value."""
        return dict(self.headers).get(name)

    @property
    def look(self) -> tuple[object, ...]:
        """All that must not differ between what is alike: not ids, times, nor digits and URLs in a text."""
        headers = ((name, re.sub("[0-9]+", "0", value)) for name, value in self.headers if name != "x-request-id")
        text = re.sub(r"(/|object: )[^\"]*(?=\")", r"\1", self.body.decode())
        return self.status, re.sub("[0-9]", "0", text), tuple(headers)


class Line:
    """A connection after the other, on which requests are sent as they are given: no client mends them."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._writer.close()

    async def ask(self, method: str, target: str, key: str = "", body: bytes = b"", **headers: str) -> Answer:
        """The answer to one request; header names with `_` for `-`."""
        named = {"host": "localhost", "content-length": str(len(body))}
        named |= {"authorization": f"Bearer {key}"} if key else {}
        named |= {"content-type": "application/json"} if body else {}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        self._writer.write(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + body)
        async with asyncio.timeout(20):
            status, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
            found = [(name.lower(), value) for name, _, value in (line.partition(": ") for line in lines)]
            length = 0 if method == "HEAD" else int(dict(found)["content-length"])
            answer = Answer(int(status.split()[1]), found, await self._reader.readexactly(length))
        if answer.header("connection") == "close":
            self._writer.close()
            await self.__aenter__()
        return answer


@dataclass
class World:
    """A service that others could reach, with two tenants made at run time that have what the other must not see."""

    edge: Edge
    ports: dict[str, int]
    keys: dict[str, str]
    ids: dict[str, dict[str, str]]
    """Of every parameter of a path what is one's own, another's, and nobody's."""
    secrets: frozenset[str]
    """What no answer and no line of the log may hold."""

    def routes(self, face: str) -> set[tuple[str, str]]:
        """Method and path of everything that is there."""
        runtime = self.edge.runtime
        keys, attempts = Keys(runtime), Attempts()
        admin = face == "admin port"
        api = ops.for_operators(runtime, attempts) if admin else ops.for_callers(runtime, keys, attempts)
        return _routes(api) | (set() if admin else {("POST", PATH)})


def _routes(api: FastAPI) -> set[tuple[str, str]]:
    assert all(isinstance(route, Route) for route in api.routes)  # anything else needs a walk of its own
    return {
        (method, route.path.replace(":path", ""))
        for route in api.routes
        if isinstance(route, Route)
        for method in route.methods or ()
    }


async def _made(edge: Edge, http: Any) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """A key for every role, and what is whose."""

    async def key(tenant: str, *scopes: str, **more: Any) -> str:
        body = {"tenant": tenant, "scopes": scopes or ["embed", "batch"], **more}
        answer = await http.post("/admin/keys", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["key"])

    for name, model in ((OWN, SMALL), (FOREIGN, ADA)):
        await http.post("/admin/tenants", json={"name": name, "models": [model]})
        await http.put(f"/admin/tenants/{name}/projects/{name}-project", json={})
    runtime = edge.runtime
    stores = runtime.stores
    desk = TenantDesk(runtime.settings, stores.database, stores.directory, stores.secret)
    keys = {
        "none": "", "unknown": api_key.make(), "embed": await key(OWN, "embed"), "batch": await key(OWN, "batch"),
        "both": await key(OWN), "foreign": await key(FOREIGN), "configured": KEY,
        "expired": str((await desk.create_key(NewKey(tenant=OWN, expires_s=0)))["key"]), "revoked": await key(OWN),
        "elsewhere": await key(OWN, networks=["10.0.0.0/8"]), "operator": await key("", "admin"), "admin": ADMIN_KEY,
    }  # fmt: skip
    files = {whose: await _uploaded(edge, keys[role]) for whose, role in (("own", "both"), ("foreign", "foreign"))}
    keys["misspelt"] = keys["both"][:-1] + ("0" if keys["both"][-1] != "0" else "1")
    await http.delete(f"/admin/keys/{keys['revoked'][8:16]}")
    await runtime.directory.refresh()
    ids = {
        "model": {"own": SMALL, "foreign": ADA, "absent": NO_MODEL},
        "name": {"own": OWN, "foreign": FOREIGN, "absent": ABSENT},
        "project": {"own": f"{OWN}-project", "foreign": f"{FOREIGN}-project", "absent": f"{ABSENT}-project"},
        "id": {"own": keys["both"][8:16], "foreign": keys["foreign"][8:16], "absent": "0" * 8},
        "file_id": {whose: file for whose, (file, _) in files.items()} | {"absent": "file-" + "0" * 24},
        "batch_id": {whose: batch for whose, (_, batch) in files.items()} | {"absent": "batch_" + "0" * 24},
    }
    return keys, ids


async def _uploaded(edge: Edge, key: str) -> tuple[str, str]:
    """A file and a batch that reads it, of whose key it is."""
    line = {"custom_id": "1", "method": "POST", "url": PATH, "body": {"model": "none", "input": "x"}}
    async with httpx.AsyncClient(base_url=edge.url, headers={"authorization": f"Bearer {key}"}) as http:
        form = {"file": ("lines.jsonl", json.dumps(line).encode())}
        file = (await http.post("/v1/files", files=form, data={"purpose": "batch"})).json()["id"]
        wanted = {"input_file_id": file, "endpoint": PATH, "completion_window": "24h"}
        return file, (await http.post("/v1/batches", json=wanted)).json()["id"]


def _secrets(edge: Edge, keys: Collection[str]) -> frozenset[str]:
    """Keys, what makes them keys, and what is kept of them."""
    found = {key for key in keys if key} | {key[16:-6] for key in keys if len(key) == api_key.LENGTH}
    for entry in edge.runtime.directory._keys.values():
        found |= {entry.digest.hex(), repr(entry.digest)[2:-1]}
    return frozenset(found | {SECRET, PROVIDER_KEY})


FACTS = (
    bought(HOUR, OWN, SMALL, 111, project=f"{OWN}-project", deployment="main"),
    spared(HOUR, OWN, SMALL, 5),
    bought(HOUR, FOREIGN, ADA, 222, project=f"{FOREIGN}-project", deployment="ada", cause="retry"),
    bought(HOUR + 24, FOREIGN, ADA, 444, deployment="ada"),
    bought(HOUR, "search", SMALL, 888),
    bought(HOUR, "", SMALL, 999, cause="canary"),
)


@asynccontextmanager
async def peopled(folder: Path, admin_port: int = 0, stores: str = "") -> AsyncIterator[World]:
    """A world in a folder of its own, with lines of the configuration for its stores."""
    server = f'host = "0.0.0.0"\nsecret = "{SECRET}"\nadmin_key = "{ADMIN_KEY}"\nadmin_port = {admin_port}'
    async with running(folder, server=server, tenants=stores + CONFIGURED) as edge:
        main = int(edge.url.rpartition(":")[2])
        edge.http.headers["authorization"] = f"Bearer {ADMIN_KEY}"
        edge.http.base_url = f"http://127.0.0.1:{admin_port or main}"
        await sum_up(edge.runtime.stores.database, FACTS)
        keys, ids = await _made(edge, edge.http)
        ports = {"main port": main, "admin port": admin_port} if admin_port else {"one port": main}
        yield World(edge, ports, keys, ids, _secrets(edge, keys.values()))
