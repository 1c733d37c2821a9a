"""Every route with every kind of key: who gets in where, and that what is another's looks like what there is not."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from itertools import product
from pathlib import Path
from urllib.parse import unquote, urlencode

import pytest
import pytest_asyncio

from app.api.auth import Attempts
from app.api.embeddings import PATH
from tests.api.conftest import ADA, SMALL
from tests.api.worlds import (
    ABSENT,
    ADMIN_KEY,
    FOREIGN,
    NO_MODEL,
    OPERATORS,
    OWN,
    ROLES,
    SPAN,
    TENANTS,
    Answer,
    Line,
    World,
    peopled,
)
from tests.servers import free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")

METHODS = ("GET", "POST", "PATCH", "PUT", "DELETE", "HEAD", "OPTIONS")

# ── who may do what ─────────────────────────────────────────────────────────────────────────────────────────────────

IN = 0
"""Stands for any answer of who was let in."""

Access = Mapping[str, int]


def only(*roles: str, short: Iterable[str] = ()) -> Access:
    """These are let in; a key that falls `short` is right but not for this; no other is told more than a wrong one."""
    return {role: IN if role in roles else 403 if role in short else 401 for role in ROLES}


EVERYBODY = only(*ROLES)
BUYERS = only("embed", "both", "foreign", "configured", short=("batch", "operator"))
BULK = only("batch", "both", "foreign", "configured", short=("embed", "operator"))
OPERATED = only(*OPERATORS)
NOT_ALLOWED = dict.fromkeys(ROLES, 405)

FOR_ALL = {
    ("GET", "/healthz"): EVERYBODY, ("GET", "/readyz"): EVERYBODY,
    **{(method, path): EVERYBODY for path in ("/openapi.json", "/docs", "/docs/oauth2-redirect")
       for method in ("GET", "HEAD")},
}  # fmt: skip
FOR_CALLERS = {
    ("POST", PATH): BUYERS, ("GET", "/v1/models"): BUYERS, ("GET", "/v1/models/{model}"): BUYERS,
    ("GET", "/v1/usage"): only(*TENANTS, *OPERATORS),
    ("GET", "/v1/files"): BULK, ("POST", "/v1/files"): BULK, ("GET", "/v1/files/{file_id}"): BULK,
    ("DELETE", "/v1/files/{file_id}"): BULK, ("GET", "/v1/files/{file_id}/content"): BULK,
    ("GET", "/v1/batches"): BULK, ("POST", "/v1/batches"): BULK, ("GET", "/v1/batches/{batch_id}"): BULK,
    ("POST", "/v1/batches/{batch_id}/cancel"): BULK, ("GET", "/v1/batches/{batch_id}/events"): BULK,
}  # fmt: skip
FOR_OPERATORS = dict.fromkeys([
    ("GET", "/metrics"), ("GET", "/admin/usage/unconfirmed"),
    ("GET", "/admin/cache"), ("POST", "/admin/cache/invalidate"), ("POST", "/admin/cache/warm"),
    ("GET", "/admin/tenants"), ("POST", "/admin/tenants"), ("GET", "/admin/tenants/{name}"),
    ("PATCH", "/admin/tenants/{name}"), ("DELETE", "/admin/tenants/{name}"),
    ("GET", "/admin/tenants/{name}/webhook-secret"),
    *[(method, "/admin/tenants/{name}/projects/{project}") for method in ("GET", "PUT", "DELETE")],
    ("GET", "/admin/keys"), ("POST", "/admin/keys"), ("DELETE", "/admin/keys/{id}"),
    ("POST", "/admin/keys/{id}/rotate"),
], OPERATED)  # fmt: skip
MAY: dict[str, dict[tuple[str, str], Access]] = {
    "one port": FOR_ALL | FOR_CALLERS | FOR_OPERATORS,
    "main port": FOR_ALL | FOR_CALLERS,
    "admin port": FOR_ALL | FOR_OPERATORS | {("GET", "/v1/usage"): OPERATED},
}
"""By the port; a route that is not here fails the tests until somebody says who may use it."""


# ── what is asked ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worlds(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, World]]:
    """The services of all tests, which leave them as they were, by their ports; wrong keys are not counted."""
    ready: asyncio.Future[dict[str, World]] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()

    async def run() -> None:  # setting up and closing belong into one task
        async with AsyncExitStack() as stack:
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(Attempts, "MOST", 10**9)
            made = [
                await stack.enter_async_context(peopled(tmp_path_factory.mktemp("one"))),
                await stack.enter_async_context(peopled(tmp_path_factory.mktemp("two"), free_port())),
            ]
            ready.set_result({face: world for world in made for face in world.ports})
            await done.wait()

    task = asyncio.ensure_future(run())
    task.add_done_callback(lambda _: ready.done() or ready.cancel("the services did not start"))
    yield await ready
    done.set()
    await task


@pytest.fixture
def world(worlds: dict[str, World]) -> World:
    """The one with one port."""
    return worlds["one port"]


FACES = pytest.mark.parametrize("face", MAY)
TEXTS = json.dumps({"model": SMALL, "input": "walked"}).encode()


def body_for(method: str, path: str, role: str) -> bytes:
    """What changes nothing: a text that may be embedded, else an empty object."""
    if path == PATH:
        return json.dumps({"model": ADA if role == "foreign" else SMALL, "input": "walked"}).encode()
    return b"{}" if method in {"POST", "PATCH", "PUT"} else b""


def filled(
    path: str, ids: Mapping[str, Mapping[str, str]], whose: str, spell: Callable[[str], str] = lambda name: name
) -> str:
    """The path with everything that it names being of `whose`, and spelt so."""
    return re.sub(r"\{(\w+)\}", lambda found: spell(ids[found[1]][whose]), path)


def escaped(path: str) -> str:
    """The path with every letter escaped."""
    return re.sub("[a-z]", lambda found: f"%{ord(found[0]):x}", path)


def let_in(told: Mapping[str, Answer]) -> Access:
    """Who was, and with which status the others were not."""
    shut = {401, 403, 405}
    return {
        role: answer.status if answer.status in shut or b"Invalid URL" in answer.body else IN
        for role, answer in told.items()
    }


def check(world: World, answer: Answer, what: object) -> None:
    """What holds of every answer: no crash, no secret, an id if anybody read it, and refusals in the one envelope."""
    assert answer.status < 500, what
    assert answer.header("x-request-id") or (answer.status == 400 and answer.header("connection") == "close"), what
    if answer.status >= 400 and answer.body:
        assert answer.header("content-type") == "application/json", what
        told = json.loads(answer.body)
        assert sorted(told) == ["error"], what
        assert sorted(told["error"]) == ["code", "message", "param", "type"], what
    said = answer.body.decode() + repr(answer.headers)
    assert not [secret for secret in world.secrets if secret in said], what


# ── who gets in ─────────────────────────────────────────────────────────────────────────────────────────────────────


@FACES
async def test_of_every_route_it_is_said_who_may_use_it(worlds: dict[str, World], face: str) -> None:
    """In `MAY`: a route of which nothing is said there fails here; and those that describe themselves are the same."""
    world = worlds[face]
    assert world.routes(face) == set(MAY[face])
    async with Line(world.ports[face]) as line:
        described = json.loads((await line.ask("GET", "/openapi.json")).body)["paths"]
    shown = {(method.upper(), path) for path, methods in described.items() for method in methods}
    assert shown == {(method, path) for method, path in MAY[face] if not path.startswith(("/docs", "/openapi"))}


@FACES
async def test_every_role_gets_in_where_it_may_and_nowhere_else(worlds: dict[str, World], face: str) -> None:
    """By every method on every path; whatever is wrong with a key, where one is needed they all get one answer."""
    world, may = worlds[face], MAY[face]
    async with Line(world.ports[face]) as line:
        for path, method in product(sorted({path for _, path in may}), METHODS):
            target, told = filled(path, world.ids, "absent"), {}
            for role, key in world.keys.items():
                told[role] = await line.ask(method, target, key, body_for(method, path, role))
                check(world, told[role], (method, path, role))
            assert let_in(told) == may.get((method, path), NOT_ALLOWED), (method, path)
            refused = {answer.look for role, answer in told.items() if role != "none" and answer.status in {401, 405}}
            assert len(refused) <= 1, (method, path)


@pytest.mark.parametrize("face", ["main port", "admin port"])
async def test_what_belongs_to_the_other_port_is_an_unknown_url(worlds: dict[str, World], face: str) -> None:
    """For every key and method, in every header."""
    world, nowhere = worlds[face], "/no/where"
    there = {path for _, path in MAY[face]}
    async with Line(world.ports[face]) as line:
        for role, method in product(ROLES, METHODS):
            key = world.keys[role]
            unknown = await line.ask(method, nowhere, key)
            assert unknown.status == 404
            for path in sorted({path for _, path in MAY["one port"]} - there):
                target = filled(path, world.ids, "own")
                answer = await line.ask(method, target, key, body_for(method, path, role))
                assert answer.look == unknown.look, (method, path, role)


HIDDEN = ["/metrics", "/admin/keys", "/admin/tenants", f"/admin/tenants/{FOREIGN}", "/admin/usage/unconfirmed"]
DISGUISES = [
    "{}", "{}/", "/{}", "/.{}", "/v1/models/..{}", "/v1/models/%2e%2e{}", "/v1/embeddings/..{}", "/healthz/..{}",
    "{}%00", "{}%20", "{};x", "{}#x", "{}?x", "http://localhost{}", "http://x@localhost{}", "/v1/models/..%2f..{}",
]  # fmt: skip


@pytest.mark.parametrize("face", ["one port", "main port"])
async def test_no_spelling_of_a_path_leads_past_the_check(worlds: dict[str, World], face: str) -> None:
    """Dots, slashes, escapes, whole URLs: without an operator's key there is nothing behind any of them."""
    world = worlds[face]
    paths = [*HIDDEN, *(path.replace("/", "%2f") for path in HIDDEN), *map(str.upper, HIDDEN)]
    for target in (form.format(path) for form, path in product(DISGUISES, [*paths, *map(escaped, HIDDEN)])):
        async with Line(world.ports[face]) as line:
            for role in ("none", "both"):
                answer = await line.ask("GET", target, world.keys[role])
                check(world, answer, (target, role))
                assert answer.status in {400, 401, 403, 404}, (target, role)


# ── what is another's ───────────────────────────────────────────────────────────────────────────────────────────────

ODD = {
    "as it is": "{}", "with a query": "{}?x={}", "blank": "{}%20", "blank before": "%20{}", "nul": "{}%00",
    "no text": "%ff{}", "dots": "x/../{}", "dots before": "../{}", "escaped dots": "%2e%2e%2f{}", "dot": "./{}",
    "slash": "{}/", "escape": "%25{}", "lines": "{}%0d%0aset-cookie:%20x=y", "sql": "{}'%20or%20'1'='1",
    "script": "%c3%a9{}", "doubled": "{}%2f{}", "nothing": "",
}  # fmt: skip
SPELLINGS: dict[str, Callable[[str], str]] = {
    **{name: partial(str.replace, form, "{}") for name, form in ODD.items()},
    "case": str.swapcase, "long": lambda name: name * 2000,
}  # fmt: skip
NAMING = sorted((method, path) for method, path in MAY["one port"] if "{" in path)


@pytest.mark.parametrize("role", ["none", "unknown", "embed", "batch", "both"])
async def test_what_is_anothers_looks_like_what_there_is_not(world: World, role: str) -> None:
    """On every route that names something, however it is spelt: status, headers and body."""
    key = world.keys[role]
    async with Line(world.ports["one port"]) as line:
        for (method, path), (spelling, spell) in product(NAMING, SPELLINGS.items()):
            looks = set()
            for whose in ("foreign", "absent"):
                answer = await line.ask(
                    method, filled(path, world.ids, whose, spell), key, body_for(method, path, role)
                )
                check(world, answer, (method, path, spelling))
                assert answer.status in {400, 401, 403, 404, 405}
                looks.add(answer.look)
            assert len(looks) == 1, (method, path, spelling)


async def test_no_list_and_no_order_knows_what_is_anothers(world: World) -> None:
    """It is in no list, no place in one, and nothing that a batch could read."""
    key, file, batch = world.keys["both"], world.ids["file_id"], world.ids["batch_id"]
    async with Line(world.ports["one port"]) as line:

        async def looks(method: str, target: str, wanted: str = "") -> set[tuple[object, ...]]:
            ids = file if "file" in target + wanted else batch
            asked = (
                (target.format(ids[whose]), wanted % ids[whose] if wanted else "") for whose in ("foreign", "absent")
            )
            return {(await line.ask(method, *(each, key, body.encode()))).look for each, body in asked}

        for path, ids in (("/v1/files", file), ("/v1/batches", batch)):
            listed = (await line.ask("GET", path, key)).body.decode()
            assert (ids["own"] in listed, ids["foreign"] in listed) == (True, False)
            assert [look[0] for look in await looks("GET", f"{path}?after={{}}")] == [404]
        order = f'{{"input_file_id": "%s", "endpoint": "{PATH}", "completion_window": "24h"}}'
        assert [look[0] for look in await looks("POST", "/v1/batches", order)] == [404]


async def test_only_its_own_name_leads_to_what_is_ones_own(world: World) -> None:
    """No other spelling of it does."""
    async with Line(world.ports["one port"]) as line:
        found = {
            name
            for name, spell in SPELLINGS.items()
            if (await line.ask("GET", f"/v1/models/{spell(SMALL)}", world.keys["both"])).status == 200
        }
    assert found == {"as it is", "with a query"}


async def test_a_model_that_a_key_may_not_use_is_not_there(world: World) -> None:
    """Not in the list, and to buy from no more than one that there is not, however it is spelt."""
    may = {"embed": [SMALL], "both": [SMALL], "foreign": [ADA], "configured": [SMALL, ADA]}
    async with Line(world.ports["one port"]) as line:
        for role, models in may.items():
            listed = json.loads((await line.ask("GET", "/v1/models", world.keys[role])).body)["data"]
            assert [model["id"] for model in listed] == models
        for role, spell in product(("embed", "both"), SPELLINGS.values()):
            looks = set()
            for model in (ADA, NO_MODEL):
                body = json.dumps({"model": unquote(spell(model)), "input": "walked"}).encode()
                answer = await line.ask("POST", PATH, world.keys[role], body)
                check(world, answer, (role, model))
                looks.add(answer.look)
            assert len(looks) == 1
            assert looks.pop()[0] in {400, 404}


async def test_anothers_project_is_a_name_like_any_other(world: World) -> None:
    """Projects are a tenant's own: what is bought for one of that name is bought for nobody else."""
    async with Line(world.ports["one port"]) as line:
        await line.ask("POST", PATH, world.keys["both"], TEXTS)
        looks = set()
        for project in (world.ids["project"]["foreign"], world.ids["project"]["absent"]):
            answer = await line.ask("POST", PATH, world.keys["both"], TEXTS, x_embedgate_project=project)
            looks.add(answer.look)
    assert [look[0] for look in looks] == [200]


SPENT = {
    "embed": (OWN, 111),
    "batch": (OWN, 111),
    "both": (OWN, 111),
    "foreign": (FOREIGN, 666),
    "configured": ("search", 888),
}
QUESTIONS = ["", "group=tenant", "by=hour&group=tenant,project,model,deployment,cause", "by=total&group=", "limit=1"]


@pytest.mark.parametrize("role", TENANTS)
async def test_of_what_was_spent_a_tenant_sees_its_own(world: World, role: str) -> None:
    """However it asks; and by no filter does it learn of another tenant, its projects, or what it buys where."""
    own, spent = SPENT[role]
    others = {"tenant": (FOREIGN if own != FOREIGN else OWN, ABSENT), "project": (f"{FOREIGN}-project", "x")}
    others |= {"model": (ADA, NO_MODEL), "deployment": ("ada", "x"), "cause": ("canary", "x")}
    filters = others if own == OWN else {"tenant": others["tenant"]}

    async with Line(world.ports["one port"]) as line:

        async def ask(question: str, **only: str) -> bytes:
            target = f"/v1/usage?{SPAN}&{question}&{urlencode(only)}".rstrip("&")
            answer = await line.ask("GET", target.replace("&&", "&"), world.keys[role])
            check(world, answer, target)
            assert answer.status == 200
            return answer.body

        for question in QUESTIONS:
            told = json.loads(await ask(question))
            assert {row.get("tenant", own) for row in told["data"]} == {own}
            assert told["totals"]["cost_nano_usd"] == spent
            assert json.loads(await ask(question, tenant=own)) == told
            for name, (foreign, absent) in filters.items():
                assert await ask(question, **{name: foreign}) == await ask(question, **{name: absent})


# ── oddities and secrets ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
async def test_no_name_however_odd_is_a_crash(tmp_path: Path, database: str, request: pytest.FixtureRequest) -> None:
    """In a path, a query or a body, whatever keeps the tenants: it is refused, or a list of it is empty."""
    stores = f'[stores]\ndatabase_url = "{request.getfixturevalue("postgres_url")}"\n' if database == "postgres" else ""
    async with peopled(tmp_path, stores=stores) as world, Line(world.ports["one port"]) as line:
        for (method, path), (spelling, spell) in product(NAMING, SPELLINGS.items()):
            target = filled(path, world.ids, "absent", spell)
            for role in ("operator", "both"):
                answer = await line.ask(method, target, world.keys[role], body_for(method, path, role))
                check(world, answer, (method, path, spelling))
                assert answer.status >= 400
        for query, spell in product(
            ["keys?tenant=", "keys?after=", "tenants?after=", "usage/unconfirmed?tenant="], SPELLINGS.values()
        ):
            answer = await line.ask("GET", f"/admin/{query}{spell(ABSENT)}", world.keys["operator"])
            check(world, answer, (query, spell(ABSENT)))
        for field in ("tenant", "project"):
            body = json.dumps({"tenant": OWN, field: "nul\0"}).encode()
            answer = await line.ask("POST", "/admin/keys", world.keys["operator"], body)
            check(world, answer, field)
            assert answer.status == 400


async def test_no_line_of_the_log_holds_a_key(tmp_path: Path) -> None:
    """Nor what is kept of it, whoever shows it where, or makes it."""
    async with peopled(tmp_path) as world, Line(world.ports["one port"]) as line:
        for role, (method, path) in product(ROLES, FOR_CALLERS | FOR_OPERATORS):
            target, body = filled(path, world.ids, "absent"), body_for(method, path, role)
            await line.ask(method, target, world.keys[role], body)
            await line.ask(method, target, "", body, authorization=world.keys[role] or "?")
            await line.ask(method, f"{target}?key={world.keys[role]}", "", body)
        rotated = await line.ask("POST", f"/admin/keys/{world.ids['id']['own']}/rotate", ADMIN_KEY, b"{}")
    new = json.loads(rotated.body)["key"]
    log = world.edge.log.read_text()
    assert "key.rotated" in log
    assert not [secret for secret in {*world.secrets, new} if secret in log]
