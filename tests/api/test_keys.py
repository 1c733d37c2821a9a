"""Keys made at run time, from outside: who gets in, with which, for how long, and what everybody else is told."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from app.domain import EmbeddingRequest
from app.storage import api_key
from app.storage.level import LevelDown
from tests.api.conftest import ADA, KEY, SMALL, Edge, running, serving
from tests.contract.test_alerts import listening
from tests.emulators.openai import OpenAIEmulator

ADMIN_KEY = "key-of-the-operator"
SHARED = """
[server]
log_file = "{folder}/{name}.jsonl"
secret = "nothing-but-tests-knows-it"
[stores]
database_url = "{database}"
[deployments.main]
dialect = "openai"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "text-embedding-3-small"
[models.text-embedding-3-small]
deployments = ["main"]
canary_interval_s = 0
"""
WRONG = [
    b"", b"Bearer", b"Bearer ", b"bearer {key}", b"Basic {key}", b"Bearer  {key}", b"Bearer\t{key}", b"Bearer {key} ",
    b"Bearer {key}x", b"Bearer eg_live_", b"Bearer eg_live_\xff\xfe", b"Bearer ' OR 1=1 --", b"Bearer " + b"e" * 60_000,
    b"Bearer eg_live_" + b"0" * 57, b"Bearer \xc3\xa9\xe2\x82\xac", b"{key}", b"Bearer {id}",
    b"Bearer eg_live_{id}" + b"0" * 49,
]  # fmt: skip


async def make(http: httpx.AsyncClient, tenant: str, **more: Any) -> str:
    """A key of a tenant, which is made if there is none."""
    await http.post("/admin/tenants", json={"name": tenant})
    answer = await http.post("/admin/keys", json={"tenant": tenant, **more})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["key"])


async def ask(http: httpx.AsyncClient, key: str, text: str = "text", **headers: str) -> httpx.Response:
    """One text, with `key`."""
    named = {"authorization": f"Bearer {key}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return await http.post("/v1/embeddings", json={"model": SMALL, "input": text}, headers=named)


def code(answer: httpx.Response) -> tuple[int, str | None]:
    """Status and code, in the one envelope."""
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    return answer.status_code, error["code"]


@pytest_asyncio.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    """A service with tenants in its configuration."""
    async with running(tmp_path) as made:
        yield made


# ── who gets in ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_new_key_opens_at_once_and_a_revoked_one_no_more(edge: Edge) -> None:
    """Beside those of the configuration, which go on as ever."""
    key = await make(edge.http, "made")
    assert (await ask(edge.http, key)).status_code == 200
    assert (await ask(edge.http, KEY)).status_code == 200
    assert (await edge.http.delete(f"/admin/keys/{key[8:16]}")).json()["state"] == "revoked"
    assert code(await ask(edge.http, key)) == (401, "invalid_api_key")
    assert (await ask(edge.http, KEY)).status_code == 200


async def test_whatever_stands_in_the_header_only_the_key_opens(edge: Edge) -> None:
    """T48: 401 or 400 or 431 in the envelope, never a crash, and one answer for all that is wrong."""
    key = await make(edge.http, "made")
    edge.http.headers["content-type"] = "application/json"
    told = set()
    for wrong in WRONG:
        value = wrong.replace(b"{key}", key.encode()).replace(b"{id}", key[8:16].encode())
        head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\nauthorization: "
        answer = await edge.raw(head + value + b"\r\n\r\n{}")
        status, error = answer.split(b" ", 2)[1], json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]
        assert status in {b"401", b"429"} or (status == b"400" and wrong.endswith(b" "))
        told.add(error["message"])
    assert len(told) <= 3
    twice = b"authorization: Bearer %b\r\n" % key.encode() * 2
    assert b" 401 " in await edge.raw(
        b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + twice + b"content-length: 2\r\n\r\n{}"
    )
    assert "loop.crashed" not in edge.log.read_text()
    assert key not in edge.log.read_text()


async def test_on_loopback_keys_are_asked_for_once_there_is_one(tmp_path: Path) -> None:
    """And from then on for ever: revoking the last one does not open the door again."""
    async with running(tmp_path, tenants="") as edge:
        assert (await ask(edge.http, "anything")).status_code == 200
        key = await make(edge.http, "made")
        assert code(await ask(edge.http, "anything")) == (401, "invalid_api_key")
        assert (await edge.http.get("/v1/models")).status_code == 401
        assert (await ask(edge.http, key)).status_code == 200
        await edge.http.delete(f"/admin/keys/{key[8:16]}")
        assert (await ask(edge.http, "anything")).status_code == 401


async def test_while_nobody_can_know_the_keys_none_is_called_wrong(tmp_path: Path) -> None:
    """503 for what may be a key, and for everybody where none is configured; a slip of the pen is known as such."""
    for tenants, expected in (("", [503, 503]), ('[tenants.t]\napi_key = "k"', [503, 401])):
        folder = tmp_path / f"with{len(tenants)}"
        folder.mkdir()
        async with running(folder, tenants=tenants) as edge:
            edge.runtime.directory._version = None
            assert [(await ask(edge.http, key)).status_code for key in (api_key.make(), "eg_live_wrong")] == expected
            assert (await edge.http.get("/readyz")).status_code == (200 if tenants else 503)
            await edge.runtime.directory.refresh()
            assert (await edge.http.get("/readyz")).status_code == 200


async def test_a_key_is_good_for_its_scopes_only(edge: Edge) -> None:
    """403 says that it is right, but not for this; an operator's key buys nothing."""
    batch = await make(edge.http, "made", scopes=["batch"])
    operator = (await edge.http.post("/admin/keys", json={"scopes": ["admin"]})).json()["key"]
    for key in (batch, operator):
        assert code(await ask(edge.http, key)) == (403, "insufficient_scope")
        models = await edge.http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        assert code(models) == (403, "insufficient_scope")
    assert not edge.upstream.arrivals


async def test_a_key_is_taken_from_its_networks_only(edge: Edge) -> None:
    """From elsewhere it is as wrong as any."""
    near = await make(edge.http, "made", networks=["10.0.0.0/8", "127.0.0.0/8"])
    far = await make(edge.http, "made", networks=["10.0.0.0/8", "::1/128"])
    assert (await ask(edge.http, near)).status_code == 200
    told, unknown = await ask(edge.http, far), await ask(edge.http, api_key.make())
    assert told.json() == unknown.json()
    assert (told.status_code, unknown.status_code) == (401, 401)


async def test_a_foreign_tenant_sees_what_an_absent_one_would(edge: Edge) -> None:
    """Models that a key may not use, and models that there are not: the same answer but for the name."""
    key = await make(edge.http, "made", models=[SMALL])
    for path in ("/v1/models/", "/v1/embeddings"):

        async def answer(model: str, path: str = path) -> Any:
            headers = {"authorization": f"Bearer {key}"}
            if path.endswith("/"):
                found = await edge.http.get(path + model, headers=headers)
            else:
                found = await edge.http.post(path, json={"model": model, "input": "x"}, headers=headers)
            return found.status_code, json.loads(found.text.replace(model, "?"))

        assert await answer(ADA) == await answer("no-such-model-at-all")
    listed = (await edge.http.get("/v1/models", headers={"authorization": f"Bearer {key}"})).json()["data"]
    assert [model["id"] for model in listed] == [SMALL]


# ── on whose account ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_project_and_user_go_with_what_is_bought(edge: Edge) -> None:
    """The user only as a hash; a key that has a project takes no other."""
    await edge.http.post("/admin/tenants", json={"name": "made"})
    await edge.http.put("/admin/tenants/made/projects/ix", json={"budget_usd_per_day": "0.5"})
    free, pinned = await make(edge.http, "made"), await make(edge.http, "made", project="ix")
    seen: list[EmbeddingRequest] = []
    embed = edge.runtime.gateway.embed

    async def watched(request: EmbeddingRequest, *bought: Any) -> Any:
        seen.append(request)
        return await embed(request, *bought)

    edge.runtime.gateway.embed = watched  # type: ignore[method-assign,assignment]
    await ask(edge.http, free)
    await ask(edge.http, free, x_embedgate_project="ix")
    await ask(edge.http, pinned, x_embedgate_project="ix")
    body = {"model": SMALL, "input": "x", "user": "someone@example.com"}
    await edge.http.post("/v1/embeddings", json=body, headers={"authorization": f"Bearer {pinned}"})
    found = [(each.spender.project, each.spender.key, bool(each.spender.allowances)) for each in seen]
    ids = free[8:16], pinned[8:16]
    assert found == [("", ids[0], False), ("ix", ids[0], True), ("ix", ids[1], True), ("ix", ids[1], True)]
    assert ([len(each.spender.user) for each in seen], "someone" in seen[3].spender.user) == ([0, 0, 0, 16], False)
    for key, project in ((pinned, "web"), (free, "a/b"), (free, "a b"), (free, "x" * 129)):
        refused = await ask(edge.http, key, x_embedgate_project=project)
        assert code(refused) == (400, "invalid_value")
        assert refused.json()["error"]["param"] == "x-embedgate-project"
    assert (len(seen), "someone@example.com" in edge.log.read_text()) == (4, False)


async def test_limits_made_at_run_time_hold(edge: Edge) -> None:
    """And so do changed ones."""
    key = await make(edge.http, "made")
    await edge.http.patch("/admin/tenants/made", json={"requests_per_minute": 1})
    assert [(await ask(edge.http, key, text)).status_code for text in ("one", "two")] == [200, 429]
    await edge.http.patch("/admin/tenants/made", json={"requests_per_minute": 0})
    assert (await ask(edge.http, key, "three")).status_code == 200


async def test_a_budget_made_at_run_time_holds_and_is_told(tmp_path: Path) -> None:
    """To the last token; what is cached goes on being answered, and the tenant's webhook hears of every part."""
    async with OpenAIEmulator() as upstream, listening() as hook:
        text = SHARED.format(folder=tmp_path, name="log", database="", upstream=upstream.base_url)
        text = text.replace("[models", "usd_per_million_tokens = 20\n[models")
        async with serving(tmp_path, text) as (*_, runtime, http):
            key = await make(http, "made")
            terms = {"budget_usd_per_month": "0.0002", "webhook_url": hook.url}
            changed = (await http.patch("/admin/tenants/made", json=terms)).json()
            assert {name: changed[name] for name in terms} == terms
            texts = [*"abcdefghijkl"]
            answers = [await ask(http, key, text) for text in texts]
            assert [each.status_code for each in answers] == [200] * 10 + [429] * 2
            assert [(await ask(http, key, text)).status_code for text in texts] == [200] * 10 + [429] * 2
            assert code(answers[-1]) == (429, "insufficient_quota")
            async with asyncio.timeout(10):
                while len(hook.messages) < 3:  # noqa: ASYNC110 — it tells nobody
                    await asyncio.sleep(0.02)
            secret = (await http.get("/admin/tenants/made/webhook-secret")).json()["secret"]
            shown = (await http.get("/admin/tenants/made")).json()
            assert runtime.telemetry.registry.get_sample_value(
                "embedgate_budget_alerts_total", {"tenant": "other", "percent": "100"}
            ) == 1  # fmt: skip
    assert (hook.percents, upstream.bill.tokens) == ([50, 80, 100], 10)
    assert all(message.signed_with(secret) for message in hook.messages)
    assert (shown["spent_usd_today"], shown["spent_usd_this_month"]) == ("0.0002", "0.0002")


async def test_the_cache_of_a_tenant_made_at_run_time_is_its_own(edge: Edge) -> None:
    """What others bought it buys again, once."""
    key, texts = await make(edge.http, "made"), ["one", "two"]
    for text in texts:
        await ask(edge.http, KEY, text)
    hits = [(await ask(edge.http, key, text)).headers["x-embedgate-cache"] for text in texts * 2]
    assert hits == ["hit=0,miss=1"] * 2 + ["hit=1,miss=0"] * 2


# ── the routes of operators ─────────────────────────────────────────────────────────────────────────────────────────

ROUTES = [
    ("GET", "/admin/tenants"), ("POST", "/admin/tenants"), ("GET", "/admin/tenants/made"),
    ("PATCH", "/admin/tenants/made"), ("DELETE", "/admin/tenants/made"), ("GET", "/admin/tenants/made/webhook-secret"),
    ("GET", "/admin/tenants/made/projects/p"),
    ("PUT", "/admin/tenants/made/projects/p"), ("DELETE", "/admin/tenants/made/projects/p"), ("GET", "/admin/keys"),
    ("POST", "/admin/keys"), ("POST", "/admin/keys/00000000/rotate"), ("DELETE", "/admin/keys/00000000"),
]  # fmt: skip


async def test_elsewhere_only_operators_pass(tmp_path: Path) -> None:
    """The configured admin key and one made for operators; no key, a tenant's of either kind, a revoked one do not."""
    async with running(tmp_path, server=f'host = "0.0.0.0"\nadmin_key = "{ADMIN_KEY}"') as edge:
        edge.http.headers["authorization"] = f"Bearer {ADMIN_KEY}"
        key = await make(edge.http, "made")
        operator, former = [
            (await edge.http.post("/admin/keys", json={"scopes": ["admin"]})).json()["key"] for _ in range(2)
        ]
        await edge.http.delete(f"/admin/keys/{former[8:16]}")
        for given, passes in ((operator, True), (ADMIN_KEY, True), (key, False), (KEY, False), (former, False)):
            for method, path in ROUTES[:1] if not passes else ROUTES:
                answer = await edge.http.request(method, path, headers={"authorization": f"Bearer {given}"})
                assert (answer.status_code != 401) is passes, (method, path)
        del edge.http.headers["authorization"]
        assert [(await edge.http.request(*route)).status_code for route in ROUTES] == [401] * len(ROUTES)


async def test_elsewhere_a_server_may_begin_with_no_tenant_and_serves_nobody(tmp_path: Path) -> None:
    """Where others can reach it keys are always asked for, also before the first is made."""
    async with running(tmp_path, server=f'host = "0.0.0.0"\nadmin_key = "{ADMIN_KEY}"', tenants="") as edge:
        assert (await ask(edge.http, "anything")).status_code == 401
        edge.http.headers["authorization"] = f"Bearer {ADMIN_KEY}"
        assert (await ask(edge.http, await make(edge.http, "made"))).status_code == 200


async def test_nonsense_is_refused_in_the_usual_envelope(edge: Edge) -> None:
    """Unknown fields, wrong types, names that fit nowhere, amounts that are none: 400, and nothing is made."""
    bad: list[tuple[str, str, Any]] = [
        ("POST", "/admin/tenants", {}),
        ("POST", "/admin/tenants", {"name": "a", "extra": 1}),
        *[("POST", "/admin/tenants", {"name": name})
          for name in ("", "a/b", "a b", "x" * 129, "é", "a\n", ".", "anonymous", 7)],
        *[("POST", "/admin/tenants", {"name": "a", "budget_usd_per_day": amount})
          for amount in ("-1", "NaN", "sNaN", "Infinity", "1e30", "0.0000000001", "1e-999999", "9000001", "x", True)],
        ("POST", "/admin/tenants", {"name": "a", "weight": 0}),
        ("POST", "/admin/tenants", {"name": "a", "models": []}),
        ("POST", "/admin/tenants", {"name": "a", "models": ["nobody"]}),
        *[("POST", "/admin/tenants", {"name": "a", "bulk_tier": tier}) for tier in ("", "free", None, 7)],
        *[("POST", "/admin/tenants", {"name": "a", "webhook_url": url})
          for url in ("file:///etc/passwd", "https://", "https://user:word@example.com/", "https://:word@example.com/",
                      "https://example.com:99999/", "https://example.com/a b", "https://exämple.com/", 7,
                      "https://example.com/" + "a" * 2048)],
        ("PUT", "/admin/tenants/search/projects/a", {"budget_usd_per_day": "-0.01"}),
        ("POST", "/admin/keys", {"tenant": "search", "budget_usd_per_day": "0.0000000001"}),
        ("POST", "/admin/tenants", {"name": "search"}),
        ("PATCH", "/admin/tenants/search", {"weight": 2}),
        ("PUT", "/admin/tenants/search/projects/a%20b", {}),
        ("POST", "/admin/keys", {}),
        ("POST", "/admin/keys", {"tenant": "search", "scopes": ["admin"]}),
        ("POST", "/admin/keys", {"tenant": "search", "networks": ["10.0.0.1/8"]}),
        ("POST", "/admin/keys", {"tenant": "search", "expires_s": 0}),
        ("POST", "/admin/keys/00000000/rotate", {"overlap_s": -1}),
        ("GET", "/admin/keys?limit=0", None),
        ("GET", "/admin/tenants?offset=3", None),
    ]  # fmt: skip
    for method, path, body in bad:
        answer = await edge.http.request(method, path, json=body)
        assert code(answer)[0] == 400, (method, path, body, answer.text)
    absent = [("GET", "/admin/tenants/nobody"), ("DELETE", "/admin/keys/nobody"), ("DELETE", "/admin/tenants/x")]
    for method, path in absent:
        assert code(await edge.http.request(method, path)) == (404, "not_found")
    assert [row["name"] for row in (await edge.http.get("/admin/tenants")).json()["data"]] == ["search", "archive"]


async def test_lists_come_in_pages(edge: Edge) -> None:
    """By name, each once, with what is configured before the first."""
    for n in range(5):
        await edge.http.post("/admin/tenants", json={"name": f"t{n}", "budget_usd_per_day": 0.1 + n})
    names, after, more = [], "", True
    while more:
        page = (await edge.http.get("/admin/tenants", params={"limit": 2, "after": after})).json()
        names += [row["name"] for row in page["data"]]
        after, more = names[-1], page["has_more"]
    assert names == ["search", "archive", "t0", "t1", "t2", "t3", "t4"]
    shown = (await edge.http.get("/admin/tenants/t3")).json()
    assert (shown["budget_usd_per_day"], shown["projects"], shown["configured"]) == ("3.10", [], False)


async def test_the_document_describes_what_operators_are_shown(edge: Edge) -> None:
    """Every field of a tenant, of its projects and of its secret."""
    await make(edge.http, "made")
    await edge.http.put("/admin/tenants/made/projects/ix", json={})
    schemas = (await edge.http.get("/openapi.json")).json()["components"]["schemas"]
    tenant = (await edge.http.get("/admin/tenants/made")).json()
    secret = (await edge.http.get("/admin/tenants/made/webhook-secret")).json()
    for name, shown in (("Tenant", tenant), ("Project", tenant["projects"][0]), ("WebhookSecret", secret)):
        assert set(schemas[name]["properties"]) == set(shown)


async def test_a_database_that_is_down_is_told_as_such(edge: Edge) -> None:
    """Operators are asked to come again; callers notice nothing."""
    key = await make(edge.http, "made")
    edge.runtime.stores.database.up = False
    assert code(await edge.http.post("/admin/keys", json={"tenant": "made"})) == (503, "not_ready")
    with pytest.raises(LevelDown):
        await edge.runtime.directory.refresh()
    assert (await ask(edge.http, key)).status_code == 200
    edge.runtime.stores.database.up = True


# ── several replicas ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_whatever_changes_holds_on_every_replica_within_5_s(tmp_path: Path, postgres_url: str) -> None:
    """A new key, the end of a rotation without overlap, and a revocation."""
    async with OpenAIEmulator() as upstream:

        def text(name: str) -> str:
            return SHARED.format(folder=tmp_path, name=name, database=postgres_url, upstream=upstream.base_url)

        folders = [tmp_path / name for name in ("one", "other")]
        for folder in folders:
            folder.mkdir()
        async with (
            serving(folders[0], text("one")) as (*_, one),
            serving(folders[1], text("other")) as (*_, other),
        ):

            async def until(key: str, status: int) -> float:
                started = time.monotonic()
                async with asyncio.timeout(5):
                    while (await ask(other, key)).status_code != status:  # noqa: ASYNC110 — nobody tells
                        await asyncio.sleep(0.1)
                return time.monotonic() - started

            key = await make(one, "made")
            took = [await until(key, 200)]
            new = (await one.post(f"/admin/keys/{key[8:16]}/rotate", json={"overlap_s": 0})).json()["key"]
            took += [await until(key, 401), await until(new, 200)]
            await one.delete(f"/admin/keys/{key[8:16]}")
            took.append(await until(new, 401))
    print("a second replica knew after", ", ".join(f"{each:.1f} s" for each in took))
