"""What a line of bulk work says and gets: the very words of the online route, the same to the byte each time."""

import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pybase64
import pytest

from app.api.bulk_lines import BulkLines
from app.api.errors import NotReady
from app.domain import EmbeddingResult, Priority, Space
from app.errors import EmbedgateError, InvalidRequest, RejectedInput, Unauthenticated, UpstreamFailed
from app.job import Job, Order
from app.tenant_desk import Budget, NewKey, NewTenant, TenantDesk
from tests.api.conftest import SMALL, Edge, expected, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

SPACE = Space(SMALL, 1536)
TEXTS = ["first", "second"]


def order(tenant: str = "search", key: str = "", project: str = "") -> Order:
    """What somebody ordered."""
    return Order("batch_1", tenant, project, key, "file-1", 86_400, {})


def job(job_id: str = "batch_1") -> Job:
    """One under way."""
    ordered = Order(job_id, "search", "", "", "file-1", 86_400, {})
    return Job(ordered, "in_progress", created_at_ms=0, expires_at_ms=86_400_000)


def result(texts: list[str] = TEXTS) -> EmbeddingResult:
    """The answer to `texts`."""
    return EmbeddingResult([row.tobytes() for row in expected(texts)], 7, SPACE, cache_hits=0)


def body(**more: Any) -> bytes:
    """A line's body."""
    return orjson.dumps({"model": SMALL, "input": TEXTS, **more})


@pytest.fixture
def lines(edge: Edge) -> BulkLines:
    """Those of the service."""
    return BulkLines(edge.runtime)


async def test_a_body_becomes_a_request_at_bulk_priority(lines: BulkLines) -> None:
    """With everything that it says but its service tier, on the account of whoever ordered it."""
    said = body(dimensions=256, input_type="query", truncate="end", user="someone", service_tier="priority")
    request, asked = lines.read(said, order(project="nightly"))
    assert (request.tenant.name, request.model, request.texts) == ("search", SMALL, tuple(TEXTS))
    assert (request.priority, request.cause, request.deadline) == (Priority.BULK, "bulk", math.inf)
    assert (request.dimensions, request.input_type, request.truncation) == (256, "query", "end")
    assert request.spender.project == "nightly"
    assert request.spender.user not in {"", "someone"}
    assert not asked.base64


async def test_what_is_wrong_with_a_body_is_what_the_online_route_says(lines: BulkLines, edge: Edge) -> None:
    """Status and error are the same, for every kind of fault."""
    faults: tuple[dict[str, Any], ...] = (
        {"input": []},
        {"input": ["", "x"]},
        {"dimensions": "x"},
        {"what": 1},
        {"encoding_format": "int8"},
    )
    for said in faults:
        online = await edge.post({"model": SMALL, "input": TEXTS} | said)
        with pytest.raises(InvalidRequest) as caught:
            lines.read(body(**said), order())
        line = orjson.loads(lines.bad(job(), "one", caught.value))
        assert (line["response"]["status_code"], line["response"]["body"]) == (online.status_code, online.json())
        assert line["error"] is None


async def test_a_body_that_no_online_request_could_have_is_refused_alike(lines: BulkLines) -> None:
    """A line is no way around the bound of a body."""
    with pytest.raises(EmbedgateError) as caught:
        lines.read(body(input="x" * 2**24), order())
    line = orjson.loads(lines.bad(job(), "one", caught.value))
    assert line["response"]["status_code"] == 413
    assert line["response"]["body"]["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("form", [None, "float", "base64"])
async def test_a_good_line_is_the_online_answer(lines: BulkLines, form: str | None) -> None:
    """Numbers unless base64 was asked for; one line; its ids are OpenAI's in form."""
    _, asked = lines.read(body(encoding_format=form), order())
    written = lines.good(job(), 'a "name" of ü', asked, result())
    assert (written.count(b"\n"), written[-1:]) == (1, b"\n")
    line = orjson.loads(written)
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ('a "name" of ü', None, 200)
    assert len(line["id"].removeprefix("batch_req_")) == len(line["response"]["request_id"].removeprefix("req_")) == 24
    answer = line["response"]["body"]
    assert (answer["object"], answer["model"], answer["usage"]) == (
        "list", SMALL, {"prompt_tokens": 7, "total_tokens": 7},
    )  # fmt: skip
    rows = [each["embedding"] for each in answer["data"]]
    if form == "base64":
        rows = [np.frombuffer(pybase64.b64decode(row), "<f4") for row in rows]
    np.testing.assert_array_equal(np.array(rows, dtype="<f4"), expected(TEXTS))


async def test_a_line_written_twice_is_the_same_and_no_other_has_its_ids(lines: BulkLines) -> None:
    """Neither another line of the job, nor the same one of another job."""
    _, asked = lines.read(body(), order())
    first = lines.good(job(), "one", asked, result())
    assert lines.good(job(), "one", asked, result()) == first
    written = [
        lines.bad(each, name, UpstreamFailed()) for each in (job(), job("batch_2")) for name in ("one", "two")
    ]  # fmt: skip
    assert len({orjson.loads(line)["id"] for line in written}) == 4
    assert orjson.loads(first)["id"] == orjson.loads(written[0])["id"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(UpstreamFailed(), 502, "upstream_error"), (RejectedInput(0), 400, "upstream_rejected_input")],
    ids=["upstream", "rejected"],
)
async def test_a_bad_line_has_status_and_error(lines: BulkLines, error: EmbedgateError, status: int, code: str) -> None:
    """As an answer of ours, not as a failure to get one."""
    line = orjson.loads(lines.bad(job(), "one", error))
    assert (line["custom_id"], line["response"]["status_code"], line["error"]) == ("one", status, None)
    assert (line["response"]["body"]["error"]["code"], line["response"]["body"]["error"]["message"]) == (
        code,
        str(error),
    )


@pytest.mark.parametrize("code", ["batch_expired", "batch_cancelled"])
async def test_a_line_that_was_not_tried_has_no_response(lines: BulkLines, code: str) -> None:
    """But an error that says why."""
    written = lines.undone(job(), "one", code)
    line = orjson.loads(written)
    assert (line["custom_id"], line["response"], line["error"]["code"]) == ("one", None, code)
    assert line["error"]["message"]
    assert written.endswith(b"}\n")


# ── on whose account ────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def staffed(folder: Path) -> AsyncIterator[tuple[Edge, TenantDesk]]:
    """A service of its own, and who makes tenants and keys there."""
    async with running(folder) as edge:
        runtime = edge.runtime
        stores = runtime.stores
        made = TenantDesk(runtime.settings, stores.database, stores.directory, stores.secret)
        await made.create_tenant(NewTenant(name="team", models=["*"]))
        await made.set_project("team", "nightly", Budget(budget_usd_per_day=Decimal(2)))
        yield edge, made


async def test_a_line_is_bought_with_the_key_that_ordered_it(tmp_path: Path) -> None:
    """Within the budgets of key and project; its models are all that may be asked for."""
    async with staffed(tmp_path) as (edge, made):
        key = await made.create_key(
            NewKey(tenant="team", project="nightly", models=[SMALL], budget_usd_per_day=Decimal(1))
        )
        await edge.runtime.directory.refresh()
        ordered = order("team", key["id"], "nightly")
        request, _ = BulkLines(edge.runtime).read(body(), ordered)
        assert (request.tenant.name, request.tenant.models) == ("team", frozenset({SMALL}))
        assert (request.spender.key, request.spender.project) == (key["id"], "nightly")
        assert [account for account, _ in request.spender.allowances] == [f"key {key['id']}", "project team/nightly"]


async def test_nothing_is_bought_for_whom_is_gone(tmp_path: Path) -> None:
    """A revoked key, a deleted tenant, a key of another tenant, and a tenant that nobody configures any more."""
    async with staffed(tmp_path) as (edge, made):
        key, revoked = [await made.create_key(NewKey(tenant="team")) for _ in range(2)]
        await made.revoke_key(revoked["id"])
        await edge.runtime.directory.refresh()
        lines = BulkLines(edge.runtime)
        for ordered in (order("team", revoked["id"]), order("search", key["id"]), order("team"), order("nobody")):
            with pytest.raises(Unauthenticated):
                lines.read(body(), ordered)
        assert lines.read(body(), order("team", key["id"]))
        await made.delete_tenant("team")
        await edge.runtime.directory.refresh()
        with pytest.raises(Unauthenticated) as caught:
            lines.read(body(), order("team", key["id"]))
        assert orjson.loads(lines.bad(job(), "one", caught.value))["response"]["status_code"] == 401


async def test_nobody_is_taken_for_gone_before_the_keys_were_read(tmp_path: Path) -> None:
    """A process that has just started asks to be asked again; whom the configuration names it knows."""
    async with staffed(tmp_path) as (edge, made):
        key = await made.create_key(NewKey(tenant="team"))
        directory = edge.runtime.directory
        directory._version = None
        lines = BulkLines(edge.runtime)
        with pytest.raises(NotReady):
            lines.read(body(), order("team", key["id"]))
        assert lines.read(body(), order())
        await directory.refresh()
        assert lines.read(body(), order("team", key["id"]))


async def test_where_no_key_is_needed_lines_are_nobodys(tmp_path: Path) -> None:
    """As online."""
    async with running(tmp_path, tenants="") as edge:
        request, _ = BulkLines(edge.runtime).read(body(), order("anonymous"))
    assert request.tenant.name == "anonymous"


async def test_writing_a_line_takes_microseconds(lines: BulkLines) -> None:
    """Below 60 µs for a vector of 1,536 as base64, at best: a job of a million lines is written in a minute."""
    spent_us = {}
    for form in ("base64", "float"):
        _, asked = lines.read(body(encoding_format=form), order())
        answer, ordered, best_s = result(TEXTS[:1]), job(), 1.0
        for _ in range(20):
            started = time.perf_counter()
            for number in range(50):
                lines.good(ordered, f"line-{number}", asked, answer)
            best_s = min(best_s, (time.perf_counter() - started) / 50)
        spent_us[form] = best_s * 1e6
    print(f"a line of 1,536: {spent_us}")
    assert spent_us["base64"] < 60
