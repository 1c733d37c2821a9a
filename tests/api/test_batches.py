"""Ordering bulk work over HTTP: the official client's whole cycle, and the exact answers to what cannot be ordered."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import orjson
import pybase64
import pytest

from app.api import batches, bulk
from app.job import ENDED, LineError, Piece, Purpose, Shard, StoredFile, Task, Work
from app.tenant_desk import NewKey, NewTenant, TenantDesk, TenantTerms
from tests.api.conftest import ADA_KEY, KEY, SMALL, TENANTS, Edge, expected, running

NOBODY_WORKS = "[bulk]\ntasks = 0\nmax_open_batches = {most}\n"
GOOD = {"endpoint": "/v1/embeddings", "completion_window": "24h"}


@asynccontextmanager
async def ordered_at(folder: Path, *, most: int = 0, tenants: str = TENANTS) -> AsyncIterator[Edge]:
    """A service that takes so many orders, 0: any number, and leaves them to the test."""
    async with running(folder, tenants=NOBODY_WORKS.format(most=most) + tenants) as edge:
        yield edge


def client(edge: Edge, key: str = KEY) -> openai.AsyncOpenAI:
    """The official one; it does not try again."""
    return openai.AsyncOpenAI(api_key=key, base_url=f"{edge.url}/v1", max_retries=0)


async def stored(edge: Edge, tenant: str = "search", purpose: Purpose = "batch") -> str:
    """A file of the tenant, by id."""
    file = StoredFile(f"file-{secrets.token_hex(12)}", tenant, purpose, "in.jsonl", 100, 0)
    return (await edge.runtime.stores.jobs.add_file(file, most_bytes=0)).id


async def ask(
    edge: Edge, method: str, path: str = "", body: object = None, *, key: str = KEY, **headers: str
) -> httpx.Response:  # fmt: skip
    """One request below /v1/batches; bytes are sent as they are, header names with `_` for `-`."""
    named = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    content = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
    return await edge.http.request(method, f"/v1/batches{path}", content=content, headers=named)


async def order(edge: Edge, **more: Any) -> dict[str, Any]:
    """A new batch."""
    answer = await ask(edge, "POST", body={"input_file_id": await stored(edge), **GOOD, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def taken(edge: Edge) -> Task:
    """The one task that there is to do."""
    (task,) = await edge.runtime.stores.jobs.take("worker", most=9, for_s=60)
    return task


async def accepted(edge: Edge) -> None:
    """Somebody has read the file: two lines."""
    shards = [Shard(0, 2, 0, 100)]
    assert await edge.runtime.stores.jobs.accept(await taken(edge), model=SMALL, total=2, shards=shards)


async def embedded(edge: Edge) -> None:
    """Somebody has embedded one line, of 15 tokens, and failed on the other."""
    work = Work(texts=7, cached=3, calls=1.75, nano_usd=300)
    assert await edge.runtime.stores.jobs.commit(await taken(edge), Piece(0, 2, 1, 1, 15, 10, 10, work))


async def joined(edge: Edge, output: str = "file-out", errors: str = "file-err") -> None:
    """Somebody has put the parts together."""
    files = [StoredFile(name, "search", "batch_output", f"{name}.jsonl", 10, 0) for name in (output, errors)]
    assert await edge.runtime.stores.jobs.close(await taken(edge), output=files[0], errors=files[1])


def fault(answer: httpx.Response) -> tuple[int, str, str | None, str | None]:
    """Status, type, param and code of a refusal."""
    error = answer.json()["error"]
    assert error["message"]
    return answer.status_code, error["type"], error["param"], error["code"]


# ── the official client ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_official_client_follows_a_batch_from_order_to_files(tmp_path: Path) -> None:
    """Every field of every stage is OpenAI's; ours is one more, which the client keeps and does not mind."""
    async with ordered_at(tmp_path) as edge, client(edge) as made:
        file_id, before_s = await stored(edge), int(time.time())
        new = await made.batches.create(
            input_file_id=file_id, endpoint="/v1/embeddings", completion_window="24h", metadata={"of": "night"}
        )
        assert (new.object, new.endpoint, new.input_file_id, new.status) == (
            "batch", "/v1/embeddings", file_id, "validating",
        )  # fmt: skip
        assert len(new.id.removeprefix("batch_")) == 24
        assert (new.metadata, new.errors, new.model, new.usage) == ({"of": "night"}, None, None, None)
        assert before_s - 1 <= new.created_at <= time.time() + 1
        assert (new.expires_at or 0) - new.created_at == 86_400
        await accepted(edge)
        begun = await made.batches.retrieve(new.id)
        assert (begun.status, begun.model, begun.in_progress_at is None) == ("in_progress", SMALL, False)
        assert begun.request_counts is not None
        assert begun.request_counts.model_dump() == {"total": 2, "completed": 0, "failed": 0}
        assert begun.usage is not None
        assert (
            begun.usage.input_tokens_details.cached_tokens == begun.usage.output_tokens == begun.usage.total_tokens == 0
        )
        await embedded(edge)
        assert (await made.batches.retrieve(new.id)).status == "finalizing"
        await joined(edge)
        done = await made.batches.retrieve(new.id)
    assert (done.status, done.output_file_id, done.error_file_id) == ("completed", "file-out", "file-err")
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 2, "completed": 1, "failed": 1}
    assert done.usage is not None
    assert (done.usage.input_tokens, done.usage.total_tokens) == (15, 15)
    moments = (done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at)
    assert sorted(moments, key=lambda moment: moment or 0) == list(moments)
    assert (done.failed_at, done.expired_at, done.cancelling_at, done.cancelled_at) == (None,) * 4
    assert (done.model_extra or {})["embedgate"] == {
        "tier": "online", "paused": None, "output_is_ordered": True,
        "texts": 7, "cached_texts": 3, "calls": 2, "cost_usd": "0.0000003",
    }  # fmt: skip


async def test_the_official_client_gets_a_file_embedded(tmp_path: Path) -> None:
    """Upload, order, wait, download: each good line once and in order, as it asked to be written; the bad one apart."""
    texts = [f"text of line {number}" for number in range(6)]
    bodies: list[dict[str, Any]] = [{"input": text} for text in texts] + [{"input": "x", "dimensions": 0}]
    bodies[5] |= {"encoding_format": "base64"}
    lines = [
        orjson.dumps(
            {"custom_id": f"line-{at}", "method": "POST", "url": "/v1/embeddings", "body": {"model": SMALL} | body}
        )
        for at, body in enumerate(bodies)
    ]
    async with running(tmp_path) as edge, bulk.runner(edge.runtime), client(edge) as made, asyncio.timeout(30):
        file = await made.files.create(file=("in.jsonl", b"\n".join(lines)), purpose="batch")
        batch = await made.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
        )  # fmt: skip
        while batch.status not in ENDED:
            await asyncio.sleep(0.02)
            batch = await made.batches.retrieve(batch.id)
        assert (batch.status, batch.output_file_id is None, batch.error_file_id is None) == ("completed", False, False)
        output, errors = [
            [orjson.loads(line) for line in (await made.files.content(id_ or "")).content.splitlines()]
            for id_ in (batch.output_file_id, batch.error_file_id)
        ]
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 7, "completed": 6, "failed": 1}
    assert [line["custom_id"] for line in output] == [f"line-{at}" for at in range(6)]
    rows = [line["response"]["body"]["data"][0]["embedding"] for line in output]
    rows[5] = np.frombuffer(pybase64.b64decode(rows[5]), "<f4")
    np.testing.assert_array_equal(np.array(rows, "<f4"), expected(texts))
    assert [(line["custom_id"], line["response"]["status_code"]) for line in errors] == [("line-6", 400)]


async def test_the_official_client_walks_through_all_pages(tmp_path: Path) -> None:
    """The newest first, each once, whatever the page's size; another tenant's are not among them."""
    async with ordered_at(tmp_path) as edge, client(edge) as made, client(edge, ADA_KEY) as other:
        assert (await ask(edge, "GET")).json() == {
            "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
        }  # fmt: skip
        ids = [(await order(edge))["id"] for _ in range(5)]
        rows = [await edge.runtime.stores.jobs.job("search", id_) for id_ in ids]
        newest_first = [id_ for _, id_ in sorted(((row.created_at_ms, row.id) for row in rows if row), reverse=True)]
        for limit in (1, 2, 5, 100):
            assert [batch.id async for batch in made.batches.list(limit=limit)] == newest_first
        page = (await ask(edge, "GET", "?limit=2")).json()
        assert (page["first_id"], page["last_id"], page["has_more"]) == (*newest_first[:2], True)
        assert [batch.id async for batch in other.batches.list()] == []


async def test_the_official_client_calls_a_batch_off(tmp_path: Path) -> None:
    """At once where nobody has begun, else `cancelling` first; one that has ended cannot be, and is not tried again."""
    async with ordered_at(tmp_path) as edge, client(edge) as made:
        new = await order(edge)
        assert (await made.batches.cancel(new["id"])).status == "cancelled"
        begun = await order(edge)
        await accepted(edge)
        first, again = [await made.batches.cancel(begun["id"]) for _ in range(2)]
        assert (first.status, first.cancelling_at, again.status) == ("cancelling", again.cancelling_at, "cancelling")
        await joined(edge)
        with pytest.raises(openai.ConflictError) as caught:
            await made.with_options(max_retries=2).batches.cancel(begun["id"])
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert caught.value.body == {
            "message": "Cannot cancel a batch with status 'cancelled'.", "type": "invalid_request_error",
            "param": None, "code": "batch_ended",
        }  # fmt: skip
    log = [orjson.loads(line) for line in edge.log.read_bytes().splitlines()]
    told = [(line["event"], line["job"], line["tenant"]) for line in log if line["event"].startswith("job.")]
    assert told[:2] == [("job.created", new["id"], "search"), ("job.cancelled", new["id"], "search")]


async def test_the_official_client_is_told_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    """Line by line, in the batch that failed."""
    async with ordered_at(tmp_path) as edge, client(edge) as made:
        new = await order(edge)
        errors = [LineError("invalid_json_line", "This line is not parseable as valid JSON.", None, 3)]
        assert await edge.runtime.stores.jobs.refuse(await taken(edge), errors)
        failed = await made.batches.retrieve(new["id"])
    assert (failed.status, failed.failed_at is None, failed.usage) == ("failed", False, None)
    assert failed.errors is not None
    assert failed.errors.object == "list"
    assert [error.model_dump() for error in failed.errors.data or []] == [
        {"code": "invalid_json_line", "message": "This line is not parseable as valid JSON.", "param": None, "line": 3}
    ]


async def test_the_official_clients_errors_are_its_own_classes(tmp_path: Path) -> None:
    """What is another's is as absent as what there is not, for every call."""
    async with ordered_at(tmp_path) as edge, client(edge) as made, client(edge, ADA_KEY) as other:
        new = await order(edge)
        for id_ in (new["id"], "batch_0"):
            said = {"message": f"No such Batch object: {id_}", "type": "invalid_request_error", "code": None}
            for call in (other.batches.retrieve, other.batches.cancel):
                with pytest.raises(openai.NotFoundError) as caught:
                    await call(id_)
                assert caught.value.body == said | {"param": "id"}
            with pytest.raises(openai.NotFoundError) as caught:
                await other.batches.list(after=id_)
            assert caught.value.body == said | {"param": "after"}
            assert fault(await ask(edge, "GET", f"/{id_}/events", key=ADA_KEY))[:3] == (
                404, "invalid_request_error", "id",
            )  # fmt: skip
        with pytest.raises(openai.BadRequestError):
            await made.batches.create(input_file_id="x", endpoint="/v1/completions", completion_window="24h")
        assert (await made.batches.retrieve(new["id"])).status == "validating"


async def test_a_batch_that_waits_says_for_what(tmp_path: Path) -> None:
    """In its metadata beside the caller's own, where every client shows it, and in our field."""
    async with ordered_at(tmp_path) as edge, client(edge) as made:
        new = await order(edge, metadata={"embedgate_tier": "online"})
        await accepted(edge)
        await edge.runtime.stores.jobs.pause(await taken(edge), "budget", for_s=60)
        found = await made.batches.retrieve(new["id"])
    assert found.status == "in_progress"
    assert found.metadata == {"embedgate_tier": "online", "embedgate_paused": "budget"}
    own = (found.model_extra or {})["embedgate"]
    assert (own["tier"], own["paused"], own["cost_usd"]) == ("online", "budget", "0.00")


async def test_a_batch_is_done_as_its_metadata_says_or_else_as_its_tenants_are(tmp_path: Path) -> None:
    """The caller's metadata stays what it was; a tenant of the file has its tier, one that names none is online."""
    tenants = TENANTS.replace("[tenants.archive]", '[tenants.archive]\nbulk_tier = "vendor_batch"')
    said: list[dict[str, str] | None] = [
        None, {"a": "b"}, {"embedgate_tier": "online"}, {"embedgate_tier": "vendor_batch"},
    ]  # fmt: skip
    found = {}
    async with ordered_at(tmp_path, tenants=tenants) as edge:
        for tenant, key in (("search", KEY), ("archive", ADA_KEY)):
            tiers = []
            for metadata in said:
                file_id = await stored(edge, tenant)
                answer = await ask(edge, "POST", body={"input_file_id": file_id, **GOOD, "metadata": metadata}, key=key)
                new = (await ask(edge, "GET", f"/{answer.json()['id']}", key=key)).json()
                assert new["metadata"] == metadata
                tiers.append(new["embedgate"]["tier"])
            found[tenant] = tiers
    assert found == {
        "search": ["online", "online", "online", "vendor_batch"],
        "archive": ["vendor_batch", "vendor_batch", "online", "vendor_batch"],
    }


async def test_the_tier_of_a_tenant_made_at_run_time_is_that_of_its_orders_from_then_on(tmp_path: Path) -> None:
    """What was ordered before stays as it was ordered."""
    async with ordered_at(tmp_path) as edge:
        stores = edge.runtime.stores
        desk = TenantDesk(edge.runtime.settings, stores.database, stores.directory, stores.secret)
        await desk.create_tenant(NewTenant(name="team", bulk_tier="vendor_batch"))
        key = (await desk.create_key(NewKey(tenant="team")))["key"]
        ids = []
        for terms in (None, TenantTerms()):
            if terms is not None:
                await desk.update_tenant("team", terms, ["bulk_tier"])
            await edge.runtime.directory.refresh()
            body = {"input_file_id": await stored(edge, "team"), **GOOD}
            ids.append((await ask(edge, "POST", body=body, key=key)).json()["id"])
        found = [(await ask(edge, "GET", f"/{id_}", key=key)).json() for id_ in ids]
    assert [each["embedgate"]["tier"] for each in found] == ["vendor_batch", "online"]


# ── what cannot be ordered ──────────────────────────────────────────────────────────────────────────────────────────

_LONG = "x" * 513
FAULTS: dict[str, tuple[Mapping[str, Any], str, str]] = {
    "no file": ({"input_file_id": ...}, "input_file_id", "missing_required_parameter"),
    "a file that is no string": ({"input_file_id": 7}, "input_file_id", "invalid_type"),
    "no endpoint": ({"endpoint": ...}, "endpoint", "missing_required_parameter"),
    "another endpoint": ({"endpoint": "/v1/chat/completions"}, "endpoint", "invalid_value"),
    "an endpoint of null": ({"endpoint": None}, "endpoint", "invalid_type"),
    "no window": ({"completion_window": ...}, "completion_window", "missing_required_parameter"),
    "another window": ({"completion_window": "48h"}, "completion_window", "invalid_value"),
    "a field that there is not": ({"priority": "high"}, "priority", "unknown_parameter"),
    "metadata that is a list": ({"metadata": ["a"]}, "metadata", "invalid_type"),
    "too many pairs": ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "object_above_max_properties"),
    "too long a key": ({"metadata": {"k" * 65: ""}}, "metadata", "string_above_max_length"),
    "too long a value": ({"metadata": {"k": _LONG}}, "metadata", "string_above_max_length"),
    "a value that is a number": ({"metadata": {"k": 1}}, "metadata", "invalid_type"),
    "a tier that there is not": ({"metadata": {"embedgate_tier": "free"}}, "metadata", "invalid_value"),
    "a tier of nobody": ({"metadata": {"embedgate_tier": ""}}, "metadata", "invalid_value"),
    "expiry of a string": ({"output_expires_after": "1h"}, "output_expires_after", "invalid_type"),
    "expiry without seconds": (
        {"output_expires_after": {"anchor": "created_at"}},
        "output_expires_after.seconds", "missing_required_parameter",
    ),
    "expiry without anchor": (
        {"output_expires_after": {"seconds": 3600}}, "output_expires_after.anchor", "missing_required_parameter",
    ),
    "another anchor": (
        {"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor", "invalid_value",
    ),
    "too soon": (
        {"output_expires_after": {"anchor": "created_at", "seconds": 3599}},
        "output_expires_after.seconds", "integer_below_min_value",
    ),
    "too late": (
        {"output_expires_after": {"anchor": "created_at", "seconds": 2_592_001}},
        "output_expires_after.seconds", "integer_above_max_value",
    ),
    "seconds with a fraction": (
        {"output_expires_after": {"anchor": "created_at", "seconds": 3600.0}},
        "output_expires_after.seconds", "invalid_type",
    ),
    "seconds that are true": (
        {"output_expires_after": {"anchor": "created_at", "seconds": True}},
        "output_expires_after.seconds", "invalid_type",
    ),
    "more than anchor and seconds": (
        {"output_expires_after": {"anchor": "created_at", "seconds": 3600, "days": 1}},
        "output_expires_after.days", "unknown_parameter",
    ),
}  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", FAULTS)
async def test_what_is_wrong_with_an_order_is_named(edge: Edge, name: str) -> None:
    """With the path of the first field that is wrong."""
    changed, param, code = FAULTS[name]
    body = {"input_file_id": "file-none", **GOOD, **changed}
    answer = await ask(edge, "POST", body={field: value for field, value in body.items() if value is not ...})
    assert fault(answer) == (400, "invalid_request_error", param, code)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("body", [b"", b"[]", b'"x"', b"{", b'{"a": NaN}', b"\xff", b"[" * 100, b'{"a":"\\ud800"}'])
async def test_a_body_that_is_no_object_is_refused_as_a_whole(edge: Edge, body: bytes) -> None:
    """No field is to blame."""
    answer = await ask(edge, "POST", body=body)
    assert fault(answer) == (400, "invalid_request_error", None, None)


@pytest.mark.asyncio(loop_scope="module")
async def test_an_order_is_small_and_json(edge: Edge) -> None:
    """A megabyte is none, whatever it holds, nor is a form."""
    large = orjson.dumps({"input_file_id": "file-none", **GOOD, "metadata": {"k": "x" * 2**20}})
    assert fault(await ask(edge, "POST", body=large)) == (413, "invalid_request_error", None, "request_too_large")
    form = await ask(edge, "POST", body=b"{}", content_type="application/x-www-form-urlencoded")
    assert fault(form) == (415, "invalid_request_error", None, "unsupported_media_type")


async def test_a_file_must_be_the_tenants_own_and_made_for_it(tmp_path: Path) -> None:
    """Foreign, deleted and absent ones are alike, whatever their name; an output file is refused."""
    async with ordered_at(tmp_path) as edge:
        deleted = await stored(edge)
        await edge.runtime.stores.jobs.delete_file("search", deleted)
        foreign = await stored(edge, "archive")
        for file_id in (foreign, deleted, "file-none", "", "../x", "ü\0" * 99):
            answer = await ask(edge, "POST", body={"input_file_id": file_id, **GOOD})
            assert fault(answer) == (404, "invalid_request_error", "input_file_id", None)
            shown = "".join(each for each in file_id[:64] if each.isprintable())
            assert answer.json()["error"]["message"] == f"No such File object: {shown}"
        output = await stored(edge, purpose="batch_output")
        answer = await ask(edge, "POST", body={"input_file_id": output, **GOOD})
    assert fault(answer) == (400, "invalid_request_error", "input_file_id", "invalid_value")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("query", "param", "code"),
    [
        ("limit=0", "limit", "integer_below_min_value"), ("limit=101", "limit", "integer_above_max_value"),
        ("limit=-1", "limit", "integer_below_min_value"), ("limit=x", "limit", "invalid_type"),
        ("limit=1.5", "limit", "invalid_type"), ("limit=", "limit", "invalid_type"),
        (f"limit={'9' * 5000}", "limit", "invalid_type"), ("order=asc", "order", "unknown_parameter"),
    ],
)  # fmt: skip
async def test_a_page_is_of_1_to_100_batches(edge: Edge, query: str, param: str, code: str) -> None:
    """And asked for by its two parameters only."""
    assert fault(await ask(edge, "GET", f"?{query}")) == (400, "invalid_request_error", param, code)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("id_", ["batch_%00", "batch_%C3%BC", "%2e%2e", "x" * 5000, "batch_%0D%0A"])
async def test_a_name_however_odd_is_just_not_there(edge: Edge, id_: str) -> None:
    """On every route that takes one."""
    for method, path in (("GET", f"/{id_}"), ("POST", f"/{id_}/cancel"), ("GET", f"/{id_}/events")):
        assert fault(await ask(edge, method, path)) == (404, "invalid_request_error", "id", None)
    assert fault(await ask(edge, "GET", f"?after={id_}")) == (404, "invalid_request_error", "after", None)


# ── twice, too many, on whose account ───────────────────────────────────────────────────────────────────────────────


async def test_an_order_that_is_sent_again_is_one_order(tmp_path: Path) -> None:
    """With one key and one body, at once or later; another body is refused, another tenant's key is another key."""
    async with ordered_at(tmp_path) as edge:
        body = {"input_file_id": await stored(edge), **GOOD}
        first = await asyncio.gather(*(ask(edge, "POST", body=body, idempotency_key="k" * 255) for _ in range(9)))
        assert len({answer.json()["id"] for answer in first}) == 1
        other = await ask(edge, "POST", body=body | {"metadata": {"a": "b"}}, idempotency_key="k" * 255)
        assert fault(other) == (422, "invalid_request_error", None, "idempotency_mismatch")
        theirs = {"input_file_id": await stored(edge, "archive"), **GOOD}
        foreign = await ask(edge, "POST", body=theirs, key=ADA_KEY, idempotency_key="k" * 255)
        assert foreign.status_code == 200
        assert len((await ask(edge, "GET")).json()["data"]) == 1
        for wrong in ("", "k" * 256):
            answer = await ask(edge, "POST", body=body, idempotency_key=wrong)
            assert fault(answer) == (400, "invalid_request_error", "Idempotency-Key", "invalid_value")
        await ask(edge, "POST", f"/{first[0].json()['id']}/cancel")
        await edge.runtime.stores.jobs.delete_file("search", body["input_file_id"])
        again = await ask(edge, "POST", body=body, idempotency_key="k" * 255)
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")
    assert edge.log.read_bytes().count(b'"event":"job.created"') == 2


async def test_a_tenant_has_only_so_many_open_batches(tmp_path: Path) -> None:
    """The next one is refused for good, until one has ended; other tenants have their own."""
    async with ordered_at(tmp_path, most=2) as edge:
        first, _ = [await order(edge) for _ in range(2)]
        body = {"input_file_id": await stored(edge), **GOOD}
        answer = await ask(edge, "POST", body=body)
        assert fault(answer) == (429, "requests", None, "batch_limit_exceeded")
        assert answer.headers["x-should-retry"] == "false"
        theirs = {"input_file_id": await stored(edge, "archive"), **GOOD}
        assert (await ask(edge, "POST", body=theirs, key=ADA_KEY)).status_code == 200
        await ask(edge, "POST", f"/{first['id']}/cancel")
        assert (await ask(edge, "POST", body=body)).status_code == 200


async def test_an_order_says_who_pays(tmp_path: Path) -> None:
    """The key and the project that it, or a header, names; a key that is not made for batches orders nothing."""
    async with ordered_at(tmp_path) as edge:
        runtime = edge.runtime
        stores = runtime.stores
        desk = TenantDesk(runtime.settings, stores.database, stores.directory, stores.secret)
        await desk.create_tenant(NewTenant(name="team"))
        both, online = [
            await desk.create_key(NewKey(tenant="team", scopes=list(scopes)))
            for scopes in (("embed", "batch"), ("embed",))
        ]
        await runtime.directory.refresh()
        body = {"input_file_id": await stored(edge, "team"), **GOOD}
        answer = await ask(edge, "POST", body=body, key=both["key"], x_embedgate_project="nightly")
        job = await stores.jobs.job("team", answer.json()["id"])
        assert job is not None
        assert (job.order.tenant, job.order.key, job.order.project) == ("team", both["id"], "nightly")
        wrong = await ask(edge, "POST", body=body, key=both["key"], x_embedgate_project="no name")
        assert fault(wrong) == (400, "invalid_request_error", "x-embedgate-project", "invalid_value")
        refused = [
            await ask(edge, "POST", body=body, key=online["key"]),
            await ask(edge, "GET", key=online["key"]),
            await ask(edge, "GET", f"/{job.id}", key=online["key"]),
            await ask(edge, "POST", f"/{job.id}/cancel", key=online["key"]),
            await ask(edge, "GET", f"/{job.id}/events", key=online["key"]),
        ]
    assert {fault(answer) for answer in refused} == {(403, "invalid_request_error", None, "insufficient_scope")}


async def test_without_any_key_this_machine_may_order(tmp_path: Path) -> None:
    """As it may embed."""
    async with ordered_at(tmp_path, tenants="") as edge:
        body = {"input_file_id": await stored(edge, "anonymous"), **GOOD}
        answer = await ask(edge, "POST", body=body)
    assert (answer.status_code, answer.json()["status"]) == (200, "validating")


async def test_a_database_that_is_down_is_told_as_such(tmp_path: Path) -> None:
    """Who asks may ask again."""
    async with ordered_at(tmp_path) as edge:
        edge.runtime.stores.database.up = False
        answers = [
            await ask(edge, "POST", body={"input_file_id": "file-1", **GOOD}),
            *[await ask(edge, method, path) for method, path in (("GET", ""), ("GET", "/b"), ("POST", "/b/cancel"))],
        ]
        edge.runtime.stores.database.up = True
    assert {(answer.status_code, answer.json()["error"]["code"]) for answer in answers} == {(503, "not_ready")}


# ── following ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_batch_is_followed_to_its_end(tmp_path: Path) -> None:
    """An event at once and for each change that is seen, and after the last one the stream is over."""
    async with ordered_at(tmp_path) as edge, asyncio.timeout(20):
        new = await order(edge)
        headers, seen = {"authorization": f"Bearer {KEY}"}, []
        async with edge.http.stream("GET", f"/v1/batches/{new['id']}/events", headers=headers) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            async for line in stream.aiter_lines():
                if line.startswith("data: "):
                    seen.append(orjson.loads(line.removeprefix("data: ")))
                    if len(seen) == 1:
                        await accepted(edge)
                        await embedded(edge)
                    if len(seen) == 2:
                        await joined(edge)
        assert [batch["status"] for batch in seen] == ["validating", "finalizing", "completed"]
        assert seen[0] == new
        assert seen[-1] == (await ask(edge, "GET", f"/{new['id']}")).json()


async def test_a_tenant_follows_only_so_many_and_who_leaves_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stream too many is told to wait; it gets in once another caller has gone."""
    monkeypatch.setattr(batches, "_MOST_STREAMS", 1)
    async with ordered_at(tmp_path) as edge, asyncio.timeout(20):
        path, headers = f"/v1/batches/{(await order(edge))['id']}/events", {"authorization": f"Bearer {KEY}"}
        async with edge.http.stream("GET", path, headers=headers) as first:
            lines = first.aiter_lines()  # who lets go of it leaves
            assert await anext(lines) == "event: batch"
            refused = await edge.http.get(path, headers=headers)
            assert fault(refused) == (429, "requests", None, "rate_limit_exceeded")
            assert int(refused.headers["retry-after"]) > 0
        while True:
            async with edge.http.stream("GET", path, headers=headers) as second:
                if second.status_code == 200:
                    break
            await asyncio.sleep(0)


async def test_at_drain_streams_end(tmp_path: Path) -> None:
    """And do not hold the process up."""
    async with ordered_at(tmp_path) as edge, asyncio.timeout(10):
        path, headers = f"/v1/batches/{(await order(edge))['id']}/events", {"authorization": f"Bearer {KEY}"}
        async with edge.http.stream("GET", path, headers=headers) as stream:
            lines = stream.aiter_lines()
            assert await anext(lines) == "event: batch"
            edge.server.drain()
            assert len([line async for line in lines if line.startswith("event")]) == 0
