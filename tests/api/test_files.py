"""Keeping files over HTTP: the official client's calls, and the exact answers to what is no file that we keep."""

import asyncio
import io
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import openai
import psutil
import pytest

from tests.api.conftest import ADA_KEY, KEY, TENANTS, Edge, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

MOST_BYTES = 100_000
LINES = b"".join(b'{"custom_id": "r-%d"}\r\n' % number for number in range(1000))
EDGE = "----edge-of-a-part"
DAY_S = 86_400
MIB = 2**20


def client(edge: Edge, key: str = KEY) -> openai.AsyncOpenAI:
    """The official one; it does not try again."""
    return openai.AsyncOpenAI(api_key=key, base_url=f"{edge.url}/v1", max_retries=0)


@asynccontextmanager
async def keeping(folder: Path, **bulk: object) -> AsyncIterator[Edge]:
    """A service of its own with these bounds."""
    lines = "\n".join(f"{name} = {value}" for name, value in {"tasks": 0, **bulk}.items())
    async with running(folder, tenants=f"[bulk]\n{lines}\n{TENANTS}") as edge:
        yield edge


def part(name: str, value: bytes | str, filename: str | bytes | None = None) -> bytes:
    """One part as it is sent, without what stands between parts."""
    said = b'form-data; name="%b"' % name.encode()
    if filename is not None:
        said += b'; filename="%b"' % (filename.encode() if isinstance(filename, str) else filename)
    data = value.encode() if isinstance(value, str) else value
    return b"Content-Disposition: %b\r\n\r\n%b" % (said, data)


PURPOSE, FILE = part("purpose", "batch"), part("file", LINES, "in.jsonl")


def form(*parts: bytes, edge: str = EDGE, end: bool = True) -> bytes:
    """A whole form of these parts."""
    between = b"--%b" % edge.encode()
    return b"".join(b"%b\r\n%b\r\n" % (between, each) for each in parts) + (between + b"--\r\n" if end else b"")


async def send(
    edge: Edge, body: bytes | AsyncIterator[bytes], *, key: str = KEY, limit: str = EDGE, **headers: str
) -> httpx.Response:
    """A form as it is."""
    named = {"authorization": f"Bearer {key}", "content-type": f"multipart/form-data; boundary={limit}", **headers}
    return await edge.http.post("/v1/files", content=body, headers=named)


async def ask(edge: Edge, method: str, path: str = "", key: str = KEY, **query: object) -> httpx.Response:
    """One request below /v1/files."""
    path += f"?{urlencode(query)}" if query else ""
    return await edge.http.request(method, f"/v1/files{path}", headers={"authorization": f"Bearer {key}"})


def refusal(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    """Status, param and code of what is an error in the one envelope."""
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return answer.status_code, error["param"], error["code"]


def kept(edge: Edge) -> list[Path]:
    """Every file that there is on the disk, whole or not."""
    folder = Path(edge.runtime.settings.stores.data_dir) / "bulk"
    return [path for path in folder.rglob("*") if path.is_file()]


async def until(holds: Callable[[], object]) -> None:
    """What is at work on other connections or threads has come so far."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 — what is awaited has no event
            await asyncio.sleep(0)


async def listed(edge: Edge, key: str = KEY) -> list[dict[str, Any]]:
    """What is told of all files."""
    found: list[dict[str, Any]] = (await ask(edge, "GET", key=key)).json()["data"]
    return found


# ── the official client ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_official_client_uploads_in_every_form(tmp_path: Path) -> None:
    """Bytes with a name, a path, an open file: what it gets is a file object, and the same bytes."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(LINES)
    async with keeping(tmp_path) as edge, client(edge) as made:
        with path.open("rb") as opened:
            for given in (("in.jsonl", LINES), path, opened, ("in.jsonl", io.BytesIO(LINES), "application/jsonl")):
                before_s = int(time.time())
                file = await made.files.create(file=given, purpose="batch")
                assert re.fullmatch(r"file-[0-9A-Za-z]{24}", file.id)
                assert before_s <= file.created_at <= time.time() + 1
                assert file.expires_at == file.created_at + 30 * DAY_S
                assert (file.object, file.bytes, file.filename) == ("file", len(LINES), "in.jsonl")
                assert (file.purpose, file.status, file.status_details) == ("batch", "processed", None)
                assert await made.files.retrieve(file.id) == file
                assert (await made.files.content(file.id)).content == LINES


async def test_the_official_client_goes_through_all_pages(tmp_path: Path) -> None:
    """Page by page, the newest first or last, and every file once."""
    async with keeping(tmp_path) as edge, client(edge) as made:
        ids = [(await made.files.create(file=(f"{n}.jsonl", b"x" * n), purpose="batch")).id for n in range(7)]
        assert [file.id async for file in made.files.list(limit=3, order="asc")] == ids
        assert [file.id async for file in made.files.list(limit=3)] == ids[::-1]
        assert [file.id async for file in made.files.list()] == ids[::-1]
        assert [file.id async for file in made.files.list(limit=7, purpose="batch")] == ids[::-1]
        assert [file.id async for file in made.files.list(purpose="batch_output")] == []
        page = await ask(edge, "GET", limit=2, order="asc", after=ids[2])
    told = page.json()
    assert [file["bytes"] for file in told.pop("data")] == [3, 4]
    assert told == {"object": "list", "first_id": ids[3], "last_id": ids[4], "has_more": True}


async def test_a_deleted_file_is_not_there_any_more(tmp_path: Path) -> None:
    """To nobody; deleting it again finds nothing to delete."""
    async with keeping(tmp_path) as edge, client(edge) as made:
        file = await made.files.create(file=("in.jsonl", LINES), purpose="batch")
        deleted = await made.files.delete(file.id)
        assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
        for call in (made.files.retrieve, made.files.content, made.files.delete):
            with pytest.raises(openai.NotFoundError) as caught:
                await call(file.id)
            message, kind = f"No such File object: {file.id}", "invalid_request_error"
            assert caught.value.body == {"message": message, "type": kind, "param": "id", "code": None}
        assert await listed(edge) == []


async def test_a_file_lives_as_long_as_was_asked_for(tmp_path: Path) -> None:
    """From the moment of its creation."""
    async with keeping(tmp_path, keep_days=3) as edge, client(edge) as made:
        usual = await made.files.create(file=("in.jsonl", LINES), purpose="batch")
        assert usual.expires_at == usual.created_at + 3 * DAY_S
        for seconds in (3600, 2_592_000):
            file = await made.files.create(
                file=("in.jsonl", LINES), purpose="batch", expires_after={"anchor": "created_at", "seconds": seconds}
            )
            assert file.expires_at == file.created_at + seconds


async def test_a_file_that_a_batch_reads_is_not_deleted(tmp_path: Path) -> None:
    """Until the batch has ended; the official client does not ask again."""
    async with keeping(tmp_path) as edge, client(edge) as made:
        file = await made.files.create(file=("in.jsonl", LINES), purpose="batch")
        await made.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        answer = await ask(edge, "DELETE", f"/{file.id}")
        assert refusal(answer) == (409, None, "file_in_use")
        assert answer.headers["x-should-retry"] == "false"
        assert (await made.files.content(file.id)).content == LINES


async def test_it_works_without_any_key(tmp_path: Path) -> None:
    """On loopback, while nobody has one."""
    async with running(tmp_path, tenants="") as edge, client(edge, "any") as made:
        file = await made.files.create(file=("in.jsonl", LINES), purpose="batch")
        assert (await made.files.content(file.id)).content == LINES


# ── whose it is ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_anothers_looks_like_what_there_is_not(edge: Edge) -> None:
    """By every way to ask for it; and nothing happens to it."""
    mine = (await send(edge, form(PURPOSE, FILE))).json()["id"]
    absent = mine[:-3] + "abc"
    for method, path in (("GET", "/{}"), ("GET", "/{}/content"), ("DELETE", "/{}")):
        told = [await ask(edge, method, path.format(name), ADA_KEY) for name in (mine, absent)]
        assert [refusal(answer) for answer in told] == [(404, "id", None)] * 2
        assert told[0].text.replace(mine, absent) == told[1].text
    pages = [await ask(edge, "GET", key=ADA_KEY, after=name) for name in (mine, absent)]
    assert [refusal(answer) for answer in pages] == [(404, "after", None)] * 2
    assert await listed(edge, ADA_KEY) == []
    assert (await ask(edge, "GET", f"/{mine}/content")).content == LINES


@pytest.mark.parametrize(
    "name", ["x", "file-%00", "file-'%20or%20'1'='1", "file-%ff", "..", "f" * 3000, "file-%0d%0ax"]
)
async def test_no_name_is_a_crash(edge: Edge, name: str) -> None:
    """It is the name of nothing."""
    for method in ("GET", "DELETE"):
        assert (await ask(edge, method, f"/{name}")).status_code == 404
    assert (await ask(edge, "GET", f"?after={name}")).status_code == 404


async def test_a_tenant_may_keep_so_many_bytes(tmp_path: Path) -> None:
    """What would be more is refused, and nothing of it is left; another tenant has room of its own."""
    async with keeping(tmp_path, max_stored_bytes=2 * len(LINES)) as edge:
        ids = [(await send(edge, form(PURPOSE, FILE))).json()["id"] for _ in range(2)]
        answer = await send(edge, form(PURPOSE, FILE))
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "batch_limit_exceeded")
        assert answer.headers["x-should-retry"] == "false"
        assert len(kept(edge)) == 2
        assert (await send(edge, form(PURPOSE, FILE), key=ADA_KEY)).status_code == 200
        await ask(edge, "DELETE", f"/{ids[0]}")
        assert (await send(edge, form(PURPOSE, FILE))).status_code == 200


# ── what is no file ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["in.json", "in.jsonl.gz", "jsonl", "", "in.jsonl/", "in"])
async def test_b1_a_name_must_say_jsonl(edge: Edge, name: str) -> None:
    """In OpenAI's words."""
    before = kept(edge)
    answer = await send(edge, form(PURPOSE, part("file", LINES, name)))
    assert refusal(answer) == (400, "file", "invalid_value")
    assert answer.json()["error"]["message"] == "Invalid file format for Batch API. Must be .jsonl"
    assert kept(edge) == before


async def test_b3_what_is_too_large_is_refused_while_it_comes(tmp_path: Path) -> None:
    """Whether it says so or not, before or after its purpose; of the largest that is not, no byte is missing."""
    async with keeping(tmp_path, max_file_bytes=MOST_BYTES) as edge:
        for size_bytes in (MOST_BYTES + 1, 10 * MIB, 60 * MIB):
            file = part("file", bytes(size_bytes), "in.jsonl")
            for body in (form(PURPOSE, file), form(file, PURPOSE)):
                for sent in (body, _pieces(body)):
                    answer = await send(edge, sent)
                    assert refusal(answer) == (413, None, "request_too_large")
                    assert (
                        answer.json()["error"]["message"] == f"Request body too large. Maximum is {MOST_BYTES} bytes."
                    )
                    assert answer.headers["x-should-retry"] == "false"
        assert kept(edge) == []
        answer = await send(edge, form(PURPOSE, part("file", bytes(MOST_BYTES), "in.jsonl")))
        assert answer.json()["bytes"] == MOST_BYTES


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    """The body without a word of its length."""
    for at in range(0, len(body), 50_000):
        yield body[at : at + 50_000]


SMALL_FILE = part("file", b"{}", "in.jsonl")
MALFORMED = {
    "10,000 parts": form(*[SMALL_FILE] * 10_000),
    "10,000 empty parts": form(*[b""] * 10_000),
    "a long boundary without end": form(FILE, edge="-" * 70, end=False),
    "no end": form(PURPOSE, FILE, end=False),
    "no end of the file": form(PURPOSE, FILE, end=False)[:-100],
    "no end of a head": form(PURPOSE, end=False) + b"--%b\r\nContent-Disposition: form-data" % EDGE.encode(),
    "two files": form(PURPOSE, SMALL_FILE, SMALL_FILE),
    "no file": form(PURPOSE),
    "no parts": form(),
    "nothing": b"",
    "another boundary": form(PURPOSE, FILE, edge="another"),
    "a preamble without end": b"x" * 5 * MIB,
    "a preamble of lines": b"\r\n" * 2 * MIB,
    "a long head": form(PURPOSE, b"X-Long: " + b"x" * 100_000 + b"\r\n\r\n"),
    "a hundred heads": form(PURPOSE, b"X-Head: x\r\n" * 100 + b"\r\n"),
    "no heads": form(PURPOSE, b"no head\r\n\r\nx"),
    "parts of parts": form(PURPOSE, b'Content-Type: multipart/mixed; boundary="x"\r\n\r\n--x--\r\n'),
    "a wrong length": form(PURPOSE, b"Content-Length: 9\r\n" + SMALL_FILE),
    "a length that is none": form(PURPOSE, b"Content-Length: -1\r\n" + SMALL_FILE),
    "a length of many digits": form(PURPOSE, b"Content-Length: %b\r\n" % (b"9" * 6000) + SMALL_FILE),
    "a name in two lines": form(PURPOSE, part("file", b"{}", b"a\r\nb.jsonl")),
    "json": b'{"purpose": "batch"}',
}  # fmt: skip
MISSING = {"no file", "no parts"}


@pytest.mark.parametrize("what", MALFORMED)
async def test_b4_what_is_no_form_is_refused_cheaply(edge: Edge, what: str) -> None:
    """With one answer that names the file, and nothing is left."""
    before, began_s = kept(edge), time.process_time()
    answer = await send(edge, MALFORMED[what])
    assert time.process_time() - began_s < 1
    assert refusal(answer) == (400, "file", "missing_required_parameter" if what in MISSING else None)
    assert kept(edge) == before


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "text/plain",
        "application/json",
        "multipart/mixed; boundary=x",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'x' * 60_000}",
        "multipart/form-data; boundary=\xff",
    ],
)
async def test_b4_a_body_of_another_kind_is_no_form(edge: Edge, kind: str) -> None:
    """Nor is one whose boundary nobody can find."""
    headers = {b"authorization": b"Bearer %b" % KEY.encode(), b"content-type": kind.encode("latin-1")}
    answer = await edge.http.post("/v1/files", content=form(PURPOSE, FILE), headers=headers)
    assert refusal(answer) == (400, "file", None)


async def test_b4_a_boundary_of_a_megabyte_is_a_head_too_large(edge: Edge) -> None:
    """As every such head is."""
    answer = await send(edge, b"", limit="x" * MIB)
    assert refusal(answer) == (431, None, "request_header_fields_too_large")


NAMES: dict[str | bytes, str] = {
    "../../x.jsonl": "x.jsonl",
    "/etc/x.jsonl": "x.jsonl",
    "C:\\\\folder\\\\x.jsonl": "x.jsonl",
    "a%0D%0Ab.jsonl": "a%0D%0Ab.jsonl",
    b"a\0b\x07\x1b[2J.jsonl": "a_b__[2J.jsonl",
    "x" * 10_000 + ".jsonl": "x" * 249 + ".jsonl",
    "naïve 嵌入.jsonl": "naïve 嵌入.jsonl",
    b"\xff\xfe.jsonl": "\ufffd\ufffd.jsonl",
    'a\\"b; name=x; c.jsonl': 'a"b; name=x; c.jsonl',
    "a\u202eb.JSONL": "ab.JSONL",
    ".jsonl": ".jsonl",
}


@pytest.mark.parametrize("name", NAMES)
async def test_b5_what_is_kept_of_a_name_does_no_harm(edge: Edge, name: str | bytes) -> None:
    """Whatever it was: the file has an id of ours, and no path is made of the name."""
    answer = await send(edge, form(PURPOSE, part("file", LINES, name)))
    assert answer.status_code == 200
    assert answer.json()["filename"] == NAMES[name]
    assert len(NAMES[name]) <= 255
    assert answer.json()["id"] in {path.name for path in kept(edge)}


async def test_b5_an_encoded_name_is_read(edge: Edge) -> None:
    """As RFC 5987 has it; line ends do not get through."""
    encoded = b"Content-Disposition: form-data; name=file; filename*=UTF-8''na%C3%AFve%0D%0Ax.jsonl\r\n\r\n{}"
    assert (await send(edge, form(PURPOSE, encoded))).json()["filename"] == "naïvex.jsonl"


async def test_parts_come_in_any_order(edge: Edge) -> None:
    """What they say is the same."""
    fields = [PURPOSE, part("expires_after[anchor]", "created_at"), part("expires_after[seconds]", "3600")]
    for parts in ([*fields, FILE], [FILE, *fields], [fields[2], FILE, fields[0], fields[1]]):
        told = (await send(edge, form(*parts))).json()
        assert (told["bytes"], told["expires_at"] - told["created_at"]) == (len(LINES), 3600)
        assert (await ask(edge, "GET", f"/{told['id']}/content")).content == LINES


WRONG_FIELDS: dict[str, tuple[list[bytes], str, str | None]] = {
    "no purpose": ([], "purpose", "missing_required_parameter"),
    "another purpose": ([part("purpose", "fine-tune")], "purpose", "invalid_value"),
    "ours": ([part("purpose", "batch_output")], "purpose", "invalid_value"),
    "twice": ([PURPOSE, PURPOSE], "purpose", "invalid_value"),
    "long": ([part("purpose", "batch" * 1000)], "purpose", "string_above_max_length"),
    "unknown": ([PURPOSE, part("colour", "red")], "colour", "unknown_parameter"),
    "another file": ([PURPOSE, part("image", "x", "x.jsonl")], "image", "unknown_parameter"),
    "without a name": ([PURPOSE, b"Content-Type: text/plain\r\n\r\nx"], "file", None),
    "no anchor": (
        [PURPOSE, part("expires_after[seconds]", "3600")], "expires_after.anchor", "missing_required_parameter",
    ),
    "no seconds": (
        [PURPOSE, part("expires_after[anchor]", "created_at")], "expires_after.seconds", "missing_required_parameter",
    ),
    "another anchor": ([PURPOSE, part("expires_after[anchor]", "now")], "expires_after.anchor", "invalid_value"),
}  # fmt: skip
ANCHOR = part("expires_after[anchor]", "created_at")
for _seconds, _code in (
    ("3599", "integer_below_min_value"), ("-1", "integer_below_min_value"), ("2592001", "integer_above_max_value"),
    ("3600.0", "invalid_type"), ("٣٦٠٠", "invalid_type"), ("", "invalid_type"), ("1" * 500, "invalid_type"),
):  # fmt: skip
    _parts = [PURPOSE, ANCHOR, part("expires_after[seconds]", _seconds)]
    WRONG_FIELDS[f"seconds {_seconds[:9]}"] = (_parts, "expires_after.seconds", _code)


@pytest.mark.parametrize("what", WRONG_FIELDS)
@pytest.mark.parametrize("file_first", [False, True])
async def test_a_wrong_field_is_named(edge: Edge, what: str, file_first: bool) -> None:
    """Whether it comes before the file or after it; nothing is left of the file."""
    before = kept(edge)
    parts, param, code = WRONG_FIELDS[what]
    answer = await send(edge, form(FILE, *parts) if file_first else form(*parts, FILE))
    assert refusal(answer) == (400, param, code)
    assert kept(edge) == before


async def test_a_compressed_form_is_refused(edge: Edge) -> None:
    """As every compressed body is."""
    answer = await send(edge, form(PURPOSE, FILE), **{"content-encoding": "gzip"})
    assert refusal(answer) == (415, None, "unsupported_content_encoding")


WRONG_QUERIES = {
    "limit=0": ("limit", "integer_below_min_value"), "limit=10001": ("limit", "integer_above_max_value"),
    "limit=x": ("limit", "invalid_type"), "limit=": ("limit", "invalid_type"), "limit=1e3": ("limit", "invalid_type"),
    "order=up": ("order", "invalid_value"), "purpose=fine-tune": ("purpose", "invalid_value"),
    "purpose=": ("purpose", "invalid_value"), "before=x": ("before", "unknown_parameter"),
}  # fmt: skip


@pytest.mark.parametrize("query", WRONG_QUERIES)
async def test_a_wrong_query_is_named(edge: Edge, query: str) -> None:
    """With the parameter that is wrong."""
    assert refusal(await ask(edge, "GET", f"?{query}")) == (400, *WRONG_QUERIES[query])


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_who_leaves_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    """Neither on the disk nor in the list."""
    body = form(PURPOSE, part("file", bytes(8 * MIB), "in.jsonl"))
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: multipart/form-data; boundary={EDGE}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    async with keeping(tmp_path) as edge:
        _, writer = await edge.connect()
        writer.write(head.encode() + body[: 5 * MIB])
        await until(lambda: kept(edge))
        writer.transport.abort()
        await until(lambda: not kept(edge))
        assert await listed(edge) == []


async def test_what_cannot_be_written_is_not_kept(tmp_path: Path) -> None:
    """The caller may try again, and no row is left of it."""
    async with keeping(tmp_path) as edge:
        blocked = tmp_path / "data" / "bulk" / "files"
        blocked.write_bytes(b"no folder")
        answer = await send(edge, form(PURPOSE, FILE))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert answer.headers["retry-after"]
        assert await listed(edge) == []
        blocked.unlink()
        assert (await send(edge, form(PURPOSE, FILE))).status_code == 200


async def test_a_file_whose_bytes_are_gone_has_no_content(edge: Edge) -> None:
    """Which is told before anything is sent."""
    made = (await send(edge, form(PURPOSE, FILE))).json()["id"]
    next(path for path in kept(edge) if path.name == made).unlink()
    assert refusal(await ask(edge, "GET", f"/{made}/content")) == (404, "id", None)


async def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    """Neither while it comes nor while it goes: 64 MB, and in between nothing but pieces of it."""
    line = json.dumps({"custom_id": "r", "body": "x" * 1000}).encode() + b"\n"
    piece, pieces, process = line * 60, 1000, psutil.Process()
    peaks: list[int] = []

    async def body() -> AsyncIterator[bytes]:
        yield form(PURPOSE, part("file", b"", "in.jsonl"), end=False)[:-2]
        for _ in range(pieces):
            peaks.append(process.memory_info().rss)
            yield piece
        yield b"\r\n--%b--\r\n" % EDGE.encode()

    async with keeping(tmp_path) as edge:
        await send(edge, form(PURPOSE, FILE))
        before_bytes, peaks = process.memory_info().rss, []
        told = (await send(edge, body())).json()
        assert told["bytes"] == len(piece) * pieces > 60_000_000
        path, headers = f"/v1/files/{told['id']}/content", {"authorization": f"Bearer {KEY}"}
        size_bytes = 0
        async with edge.http.stream("GET", path, headers=headers) as answer:
            assert answer.headers["content-length"] == str(told["bytes"])
            assert "content-encoding" not in answer.headers
            async for chunk in answer.aiter_raw():
                size_bytes += len(chunk)
                peaks.append(process.memory_info().rss)
        assert size_bytes == told["bytes"]
        assert max(peaks) - before_bytes <= 30 * MIB
