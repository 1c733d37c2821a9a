"""What operators and orchestrators ask: probes, metrics, the API's own description; and the headers of every answer."""

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.embeddings import PATH
from tests.api.conftest import ADA, KEY, SMALL, Edge, running

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_it_lives_and_is_ready(edge: Edge) -> None:
    """Both probes answer without a key."""
    for path, status in (("/healthz", "ok"), ("/readyz", "ready")):
        answer = await edge.http.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": status})


async def test_not_ready_says_why_and_still_lives(tmp_path: Path) -> None:
    """While it drains, readiness is a 503 in the usual envelope; liveness stays 200."""
    async with running(tmp_path) as edge:
        edge.runtime.draining = True
        ready, alive = await edge.http.get("/readyz"), await edge.http.get("/healthz")
    error = ready.json()["error"]
    assert (ready.status_code, error["code"], alive.status_code) == (503, "not_ready", 200)
    assert "draining" in error["message"]
    assert int(ready.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v1/foo", 404, "Invalid URL (GET /v1/foo)"),
        ("POST", "/v1/embeddings/", 404, "Invalid URL (POST /v1/embeddings/)"),
        ("GET", "/", 404, "Invalid URL (GET /)"),
        ("GET", "/v1/%0d%0ax" + "y" * 99, 404, "Invalid URL (GET /v1/x" + "y" * 57 + ")"),
        ("POST", "/v1/models", 405, "Not allowed to POST on /v1/models."),
        ("DELETE", f"/v1/models/{SMALL}", 405, f"Not allowed to DELETE on /v1/models/{SMALL}."),
        ("PUT", "/metrics", 405, "Not allowed to PUT on /metrics."),
    ],
)
async def test_the_frameworks_errors_have_our_envelope(
    edge: Edge, method: str, path: str, status: int, message: str
) -> None:
    """Unknown paths and methods are told of as everything else is."""
    answer = await edge.http.request(method, path)
    code = "method_not_supported" if status == 405 else None
    expected = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    assert (answer.status_code, answer.json()) == (status, {"error": expected})
    assert answer.headers.get("allow") == ("GET" if status == 405 else None)


@pytest.mark.parametrize("path", ["/healthz", "/v1/nowhere", PATH])
async def test_every_answer_has_a_request_id(edge: Edge, path: str) -> None:
    """The caller's own id comes back if it is well-formed; any other is replaced."""
    for given, kept in (("my-id_1.x", True), ("a" * 64, True), ("a" * 65, False), ("a b", False), ("", False)):
        answer = await edge.http.get(path, headers={"x-request-id": given})
        found = answer.headers["x-request-id"]
        assert found == given if kept else re.fullmatch(r"req_[0-9a-f]{24,}", found)
        assert int(answer.headers["openai-processing-ms"]) >= 0


async def test_an_answer_tells_where_its_vectors_come_from(edge: Edge) -> None:
    """A first answer names the deployment, its wait and its batch; the same again came from the cache."""
    first = await edge.post({"model": SMALL, "input": ["told", "twice", "told"]})
    second = await edge.post({"model": SMALL, "input": ["told", "new"]})
    third = await edge.post({"model": SMALL, "input": "told"})
    assert [each.headers["x-embedgate-cache"] for each in (first, second, third)] == [
        "hit=0,miss=3", "hit=1,miss=1", "hit=1,miss=0",
    ]  # fmt: skip
    assert (first.headers["x-embedgate-deployment"], first.headers["x-embedgate-batch-items"]) == ("main", "2")
    assert int(first.headers["x-embedgate-queue-ms"]) >= 0
    assert "x-embedgate-deployment" not in third.headers
    assert first.headers["x-embedgate-space"] == third.headers["x-embedgate-space"]


async def test_metrics_are_free_on_loopback_and_hold_no_callers_words(edge: Edge) -> None:
    """Odd models, paths, keys and ids add no series: labels come from the configuration."""

    async def scrape() -> list[str]:
        lines = (await edge.http.get("/metrics")).text.splitlines()
        return sorted(line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#"))

    async def be_odd(n: int) -> None:
        await edge.post({"model": f"model-{n}", "input": "x", "user": f"user-{n}"}, x_request_id=f"id-{n}")
        await edge.http.get(f"/path-{n}")
        await edge.http.post(PATH, headers={"authorization": f"Bearer key-{n}"}, json={})

    await be_odd(0)
    while "embedgate_ledger_unbooked 0.0" not in (await edge.http.get("/metrics")).text:  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # what was bought before is counted once it is booked
    before = await scrape()
    for n in range(1, 30):
        await be_odd(n)
    assert await scrape() == before
    assert not re.search(rf"{KEY}|model-0|user-0|id-0|path-0|key-0", "\n".join(before))


async def test_metrics_elsewhere_need_the_admin_key(tmp_path: Path) -> None:
    """On a host that others can reach, a tenant's key is not enough."""
    async with running(tmp_path, server='host = "0.0.0.0"\nadmin_key = "key-of-the-operator"') as edge:
        answers = [
            await edge.http.get("/metrics", headers={"authorization": f"Bearer {key}"} if key else {})
            for key in ("", KEY, "key-of-the-operator")
        ]
    assert [each.status_code for each in answers] == [401, 401, 200]
    assert "embedgate_requests" in answers[2].text


async def test_metrics_elsewhere_without_an_admin_key_do_not_exist(tmp_path: Path) -> None:
    """Nothing is open by default."""
    async with running(tmp_path, server='host = "0.0.0.0"') as edge:
        assert (await edge.http.get("/metrics")).status_code == 404


async def test_a_model_tells_what_a_client_needs_to_know(edge: Edge) -> None:
    """Beside OpenAI's fields: in which space its vectors lie, how wide they are or may be, how much a text may hold."""
    headers = {"authorization": f"Bearer {KEY}"}
    small, ada = [(await edge.http.get(f"/v1/models/{name}", headers=headers)).json() for name in (SMALL, ADA)]
    assert small == {
        "id": SMALL, "object": "model", "created": 1705948997, "owned_by": "system",
        "embedgate": {
            "space": (await edge.post({"model": SMALL, "input": "x"})).headers["x-embedgate-space"], "input_types": {},
            "dimensions": 1536, "sizes": [[1, 1536]], "unit_length": True, "max_input_tokens": 8192,
            "long_input": "error", "tokenizer": "cl100k_base", "usd_per_million_tokens": 0.02,
        },
    }  # fmt: skip
    assert (ada["embedgate"]["sizes"], ada["embedgate"]["usd_per_million_tokens"]) == ([], 0.1)
    assert (await edge.http.get("/v1/models", headers=headers)).json() == {"object": "list", "data": [small, ada]}
    document = (await edge.http.get("/openapi.json")).json()
    described = document["components"]["schemas"]["Model"]["properties"]["embedgate"]
    assert set(described["properties"]) == set(described["required"]) == set(small["embedgate"])


def _references(node: Any) -> set[str]:
    """Every `$ref` in a document."""
    if isinstance(node, dict):
        own = {node["$ref"]} if "$ref" in node else set()
        return own.union(*map(_references, node.values()))
    return set().union(*map(_references, node)) if isinstance(node, list) else set()


async def test_the_api_describes_itself_in_full(edge: Edge) -> None:
    """The embeddings route is there with every field, form of input, status and header; nothing is left dangling."""
    document = (await edge.http.get("/openapi.json")).json()
    assert set(document["paths"]) == {
        "/v1/embeddings", "/v1/models", "/v1/models/{model}", "/healthz", "/readyz", "/metrics",
        "/admin/cache", "/admin/cache/invalidate", "/admin/cache/warm", "/v1/usage", "/admin/usage/unconfirmed",
        "/admin/tenants", "/admin/tenants/{name}", "/admin/tenants/{name}/projects/{project}",
        "/admin/tenants/{name}/webhook-secret",
        "/admin/keys", "/admin/keys/{id}", "/admin/keys/{id}/rotate",
        "/v1/files", "/v1/files/{file_id}", "/v1/files/{file_id}/content",
        "/v1/batches", "/v1/batches/{batch_id}", "/v1/batches/{batch_id}/cancel", "/v1/batches/{batch_id}/events",
    }  # fmt: skip
    route = document["paths"]["/v1/embeddings"]["post"]
    schemas = document["components"]["schemas"]
    assert {name.rsplit("/", 1)[1] for name in _references(document)} == set(schemas)
    fields = schemas["EmbeddingRequest"]["properties"]
    assert set(fields) == {
        "input", "model", "encoding_format", "dimensions", "user", "service_tier", "input_type", "truncate",
    }  # fmt: skip
    assert len(fields["input"]["oneOf"]) == 4
    assert set(route["responses"]) == {
        "200", "400", "401", "403", "404", "405", "413", "415", "429", "500", "502", "503", "504",
    }  # fmt: skip
    answer = await edge.post({"model": SMALL, "input": "described"})
    described = set(route["responses"]["200"]["headers"])
    told = {name for name in answer.headers if name.startswith(("x-", "openai-"))}
    assert told | {"x-embedgate-degraded"} == described
    page = await edge.http.get("/docs")
    assert (page.status_code, "/openapi.json" in page.text) == (200, True)
    assert "Validation" not in (await edge.http.get("/openapi.json")).text


async def test_without_keys_everybody_may_call(tmp_path: Path) -> None:
    """On loopback and with no key configured, any key and none are good."""
    async with running(tmp_path, tenants="") as edge:
        answers: list[httpx.Response] = [await edge.post({"model": SMALL, "input": "x"})]
        answers.append(await edge.http.post(PATH, json={"model": SMALL, "input": "x"}))
    assert [each.status_code for each in answers] == [200, 200]


async def test_whoever_tries_keys_is_told_to_wait_and_whoever_has_one_is_not(tmp_path: Path) -> None:
    """From one address thirty wrong keys a minute, on whatever route; right ones pass all the same."""
    async with running(tmp_path) as edge:
        for path in ("/v1/models", "/v1/embeddings"):
            codes = []
            for number in range(31):
                answer = await edge.http.request(
                    "GET" if path == "/v1/models" else "POST", path, headers={"authorization": f"Bearer guess{number}"}
                )
                codes.append(answer.status_code)
            assert codes[-1] == 429
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            assert 2 <= int(answer.headers["retry-after"]) <= 3
        assert codes[0] == 429
        assert (await edge.post({"model": SMALL, "input": "with a key"})).status_code == 200
