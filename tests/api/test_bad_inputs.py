"""What callers send wrong, and the exact answer: each row of the contract is a case."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_letters
from typing import Any, cast

import httpx
import pytest

from app.domain import EmbeddingRequest, EmbeddingResult
from app.engine.gateway import Gateway
from tests.api.conftest import ADA, ADA_KEY, KEY, SMALL, Edge, running
from tests.emulators import faults

pytestmark = pytest.mark.asyncio(loop_scope="module")

UNREADABLE = "We could not parse the JSON body of your request."
NO_KEY = "You didn't provide an API key. Send it as 'Authorization: Bearer YOUR_KEY'."
WRONG_KEY = "Incorrect API key provided."
MEDIA = "Unsupported content type. Use 'application/json'."
COMPRESSED = "Compressed request bodies are not supported."
FORMS = "expected one of a string, array of strings, array of integers, or array of integer arrays"
LONGER_AT_LEAST = "This model's maximum context length is 8192 tokens, however you requested at least "
LONGER = "This model's maximum context length is 8192 tokens, however you requested {0} tokens ({0} in your prompt; 0 for the completion). Please reduce your prompt; or completion length."  # noqa: E501


def too_long(count: int | str) -> str:
    """The text of E17."""
    return (
        "Invalid 'input': array too long. Expected an array with maximum length 2048, "
        f"but got an array with length {count} instead."
    )


def empty_array(path: str) -> str:
    """The text of E16."""
    return f"Invalid '{path}': empty array. Expected an array with minimum length 1, but got an empty array instead."


def words(tokens: int, first: str = "word") -> str:
    """A text of so many tokens."""
    return first + " a" * (tokens - 1)


def wrong_type(path: str, expected: str, got: str) -> str:
    """The text of an `invalid_type`."""
    return f"Invalid type for '{path}': {expected}, but got {got} instead."


@dataclass(frozen=True)
class Row:
    """What is sent beside or instead of a good request, and what must come back; `message` None: any."""

    name: str
    status: int
    message: str | None
    param: str | None = None
    code: str | None = None
    change: dict[str, Any] | None = None
    body: Any = None
    content: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "invalid_request_error"
    answered: dict[str, str] = field(default_factory=dict)


def raw(name: str, content: bytes) -> Row:
    """A body that is no JSON we can read."""
    return Row(f"E6 {name}", 400, UNREADABLE, content=content)


def good(text: bytes) -> bytes:
    """A good body but for `text` in the place of its input."""
    return b'{"model":"' + SMALL.encode() + b'","input":' + text + b"}"


def value(name: str, change: dict[str, Any], message: str | None, param: str | None, code: str | None) -> Row:
    """A field with a value that is refused."""
    return Row(name, 400, message, param, code, change=change)


def key(name: str, authorization: str) -> Row:
    """A key that is none."""
    answered = {"www-authenticate": "Bearer"}
    headers = {"authorization": authorization}
    return Row(f"E2 {name}", 401, WRONG_KEY, None, "invalid_api_key", headers=headers, answered=answered)


def token_id(name: str, input_: list[Any], path: str) -> Row:
    """A token array with an id that is none."""
    return value(f"E19 {name}", {"input": input_}, f"Invalid token id in '{path}'.", path, "invalid_token_id")


ROWS = [
    key("wrong", "Bearer wrong"),
    key("valid prefix", f"Bearer {KEY[:-1]}"),
    key("longer", f"Bearer {KEY}x"),
    key("no scheme", KEY),
    key("basic", "Basic a2V5Og=="),
    key("empty", "Bearer"),
    key("two words", f"Bearer {KEY} {KEY}"),
    key("lower case", f"bearer {KEY}"),
    key("statement", "Bearer ' OR 1=1 --"),
    key("60 kB", "Bearer " + "k" * 60_000),
    Row("E3 unknown", 404, "The model `nope` does not exist or you do not have access to it.", None, "model_not_found",
        change={"model": "nope"}),
    Row("E3 foreign", 404, f"The model `{SMALL}` does not exist or you do not have access to it.", None,
        "model_not_found", headers={"authorization": f"Bearer {ADA_KEY}"}),
    Row("E3 strange", 404, "The model `a" + "b" * 62 + "` does not exist or you do not have access to it.", None,
        "model_not_found", change={"model": "a\n" + "b" * 5000}),
    raw("nothing", b""),
    raw("no JSON", b"hello"),
    raw("cut off", good(b'"x"')[:-1]),
    raw("trailing bytes", good(b'"x"') + b"x"),
    raw("NaN", good(b"NaN")),
    raw("Infinity", good(b"[Infinity]")),
    raw("1e999", good(b"[1e999]")),
    raw("-1e999 elsewhere", good(b'"x","dimensions":-1e999')),
    raw("integer of 4,301 digits", good(b"[" + b"1" * 4301 + b"]")),
    raw("BOM", b"\xef\xbb\xbf" + good(b'"x"')),
    raw("UTF-16", good(b'"x"').decode().encode("utf-16")),
    raw("invalid UTF-8", good(b'"\xff"')),
    raw("UTF-8 of a surrogate", good(b'"\xed\xa0\x80"')),
    raw("high surrogate", good(rb'"\ud800"')),
    raw("low surrogate", good(rb'"\udc00"')),
    raw("surrogate in an unknown name", good(rb'"x","\ud800":1')),
    raw("surrogate in an unknown field", good(rb'"x","other":"\ud800"')),
    raw("control character", good(b'"a\x01b"')),
    raw("nesting of 65", good(b"[" * 64 + b"]" * 64)),
    raw("nesting of 65 in an unknown field", good(b'"x","other":' + b"[" * 64 + b"]" * 64)),
    raw("nesting of 100,000", b"[" * 100_000),
    raw("nesting of 100,000, closed", good(b"[" * 100_000 + b"]" * 100_000)),
    raw("nesting of 2,000,000 and huge", good(b"[" * 2_000_000 + b"]" * 2_000_000)),
    raw("array", b"[1]"),
    raw("string", b'"x"'),
    raw("null", b"null"),
    value("nesting of 64", {"other": None}, "Unknown parameter: 'other'.", "other", "unknown_parameter"),
    Row("nesting of 64 is not too deep", 400, "Unknown parameter: 'other'.", "other", "unknown_parameter",
        content=good(b'"x","other":' + b"[" * 63 + b"]" * 63)),
    Row("brackets in strings are no nesting", 400, "Unknown parameter: 'other'.", "other", "unknown_parameter",
        content=good(b'"x","other":["' + rb'\"\\[' * 100 + b'"]')),
    Row("E8 text", 415, MEDIA, None, "unsupported_media_type", headers={"content-type": "text/plain"}),
    Row("E8 form", 415, MEDIA, None, "unsupported_media_type",
        headers={"content-type": "application/x-www-form-urlencoded"}),
    Row("E8 multipart", 415, MEDIA, None, "unsupported_media_type",
        headers={"content-type": "multipart/form-data; boundary=x"}),
    *(
        Row(f"E9 {coding}", 415, COMPRESSED, None, "unsupported_content_encoding",
            headers={"content-encoding": coding}, answered={"accept-encoding": "identity"})
        for coding in ("gzip", "br", "zstd", "GZIP, identity")
    ),
    Row("E11", 400, "you must provide a model parameter", body={"input": "x"}),
    Row("E11 of nothing at all", 400, "you must provide a model parameter", body={}),
    Row("E13", 400, "Missing required parameter: 'input'.", "input", "missing_required_parameter",
        body={"model": SMALL}),
    *(
        value(f"E14 {got}", {"input": bad}, wrong_type("input", FORMS, got), "input", "invalid_type")
        for bad, got in ((None, "null"), (True, "a boolean"), (5, "an integer"), ({}, "an object"), (1.5, "a number"))
    ),
    value("E14 object inside", {"input": [{}]},
          wrong_type("input[0]", "expected one of a string, an integer, or an array of integers", "an object"),
          "input[0]", "invalid_type"),
    value("E14 number among strings", {"input": ["a", 5]}, wrong_type("input[1]", "expected a string", "an integer"),
          "input[1]", "invalid_type"),
    value("E14 null among strings", {"input": ["a", None]}, wrong_type("input[1]", "expected a string", "null"),
          "input[1]", "invalid_type"),
    value("E14 string among ids", {"input": [1, "a"]}, wrong_type("input[1]", "expected an integer", "a string"),
          "input[1]", "invalid_type"),
    value("E14 string among arrays", {"input": [[1], "a"]},
          wrong_type("input[1]", "expected an array of integers", "a string"), "input[1]", "invalid_type"),
    value("E14 string in an array", {"input": [[1], [2, "a"]]},
          wrong_type("input[1][1]", "expected an integer", "a string"), "input[1][1]", "invalid_type"),
    value("model is a number", {"model": 5}, wrong_type("model", "expected a string", "an integer"), "model",
          "invalid_type"),
    value("E15", {"input": ["ok", ""]}, "Invalid 'input[1]': input cannot be an empty string.", "input[1]",
          "empty_string"),
    value("E15 alone in a list", {"input": [""]}, "Invalid 'input[0]': input cannot be an empty string.", "input[0]",
          "empty_string"),
    value("E16", {"input": []}, empty_array("input"), "input", "empty_array"),
    value("E16 inside", {"input": [[1], []]}, empty_array("input[1]"), "input[1]", "empty_array"),
    value("E17 strings", {"input": ["a"] * 2049}, too_long(2049), "input", "array_above_max_length"),
    value("E17 arrays", {"input": [[1]] * 2049}, too_long(2049), "input", "array_above_max_length"),
    value("E17 bulky", {"input": ["a" * 1000] * 3000}, too_long(3000), "input", "array_above_max_length"),
    token_id("-1", [[1, 2, 3, -1]], "input[0][3]"),
    token_id("one past the vocabulary", [5, 100_277], "input[1]"),
    token_id("unassigned", [100_256], "input[0]"),
    token_id("1.0", [[1, 1.0]], "input[0][1]"),
    token_id("true", [[True]], "input[0][0]"),
    token_id("2^63", [[7], [2**63]], "input[1][0]"),
    token_id("2^64", [2**64], "input[0]"),
    token_id("first bad of two", [1, -1, True], "input[1]"),
    token_id("401 digits", [10**400], "input[0]"),
    Row("E20", 400, LONGER.format(8610), change={"input": words(8610)}),
    Row("E21", 400, "Requested 416735 tokens, max 300000 tokens per request", None, "max_tokens_per_request",
        kind="max_tokens_per_request",
        change={"input": [words(8_000, first) for first in ascii_letters] + [words(735)]}),
    Row("E21 bulky", 400, "Requested 2000000 tokens, max 300000 tokens per request", None, "max_tokens_per_request",
        change={"input": [[1] * 8_000] * 250}, kind="max_tokens_per_request"),
    value("E22", {"encoding_format": "int8"}, "Invalid value: 'int8'. Supported values are: 'float' and 'base64'.",
          "encoding_format", "invalid_value"),
    value("E22 number", {"encoding_format": 5}, "Invalid value: '5'. Supported values are: 'float' and 'base64'.",
          "encoding_format", "invalid_value"),
    *(
        value(f"E23 {width}", {"dimensions": width},
              f"Invalid value for 'dimensions' = {width}. Must be {bound}.", "dimensions", code)
        for width, bound, code in (
            (0, "greater than or equal to 1", "integer_below_min_value"),
            (-1, "greater than or equal to 1", "integer_below_min_value"),
            (5000, "less than or equal to 1536", "integer_above_max_value"),
            (2**63 - 1, "less than or equal to 1536", "integer_above_max_value"),
        )
    ),
    *(
        value(f"E24 {got} {bad}", {"dimensions": bad}, wrong_type("dimensions", "expected an integer", got),
              "dimensions", "invalid_type")
        for bad, got in ((True, "a boolean"), ("256", "a string"), (256.0, "a number"), (2**64, "a number"))
    ),
    Row("E25", 400, "This model does not support specifying dimensions.", change={"model": ADA, "dimensions": 8}),
    value("E26 number", {"user": 5}, wrong_type("user", "expected a string", "an integer"), "user", "invalid_type"),
    value("E26 long", {"user": "u" * 300}, None, "user", "string_above_max_length"),
    value("E26 control", {"user": "a\x00b"}, None, "user", "invalid_type"),
    *(
        value(f"E27 {name}", {name: "x"}, f"Unknown parameter: '{name}'.", name, "unknown_parameter")
        for name in ("api_base", "base_url", "api_key", "extra_headers", "timeout", "provider")
    ),
    value("E27 strange name", {"a\r\n" + "b" * 99: 1}, f"Unknown parameter: 'a{'b' * 61}'.", "a" + "b" * 61,
          "unknown_parameter"),
    value("service_tier", {"service_tier": "fast"},
          "Invalid value: 'fast'. Supported values are: 'auto', 'default', 'flex' and 'priority'.", "service_tier",
          "invalid_value"),
    value("input_type number", {"input_type": 5}, wrong_type("input_type", "expected a string", "an integer"),
          "input_type", "invalid_type"),
    value("truncate", {"truncate": "start"}, "Invalid value: 'start'. Supported values are: 'none' and 'end'.",
          "truncate", "invalid_value"),
    *(
        Row(f"deadline {bad}", 400, None, "x-embedgate-deadline-ms", "invalid_value",
            headers={"x-embedgate-deadline-ms": bad})
        for bad in ("0", "-5", "1.5", "soon", "3600001", "9" * 5000)
    ),
    Row("priority", 400, "Invalid value: 'urgent'. Supported values are: 'interactive', 'default' and 'bulk'.",
        "x-embedgate-priority", "invalid_value", headers={"x-embedgate-priority": "urgent"}),
]  # fmt: skip


def assert_error(answer: httpx.Response, row: Row) -> None:
    """Status, envelope and headers are exactly those of `row`."""
    assert answer.status_code == row.status, answer.text[:300]
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == (row.kind, row.param, row.code)
    if row.message is not None:
        assert error["message"] == row.message
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    for name, expected in row.answered.items():
        assert answer.headers[name] == expected


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
async def test_what_is_wrong_gets_the_exact_error(edge: Edge, row: Row) -> None:
    """Each bad request gets its row's status, type, param, code, message and headers, and costs nothing upstream."""
    body = row.body if row.body is not None else {"model": SMALL, "input": "x", **(row.change or {})}
    calls = len(edge.upstream.arrivals)
    answer = await edge.post(body, row.content, **row.headers)
    assert_error(answer, row)
    assert len(edge.upstream.arrivals) == calls


async def test_without_a_key_the_scheme_is_named(edge: Edge) -> None:
    """E1: no Authorization header at all."""
    answer = await edge.http.post("/v1/embeddings", json={"model": SMALL, "input": "x"})
    assert_error(answer, Row("E1", 401, NO_KEY, answered={"www-authenticate": "Bearer"}))


@pytest.mark.parametrize("second", [KEY, ADA_KEY, "wrong"])
async def test_two_keys_are_no_key(edge: Edge, second: str) -> None:
    """E2: two Authorization headers are refused, even if both are good; and so is one that is not ASCII."""
    headers = [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {second}")]
    answer = await edge.http.post("/v1/embeddings", headers=headers, json={"model": SMALL, "input": "x"})
    assert_error(answer, Row("E2", 401, WRONG_KEY, None, "invalid_api_key"))
    strange = [(b"authorization", b"Bearer \xff\xe9")]
    answer = await edge.http.post("/v1/embeddings", headers=strange, json={"model": SMALL, "input": "x"})
    assert_error(answer, Row("E2", 401, WRONG_KEY, None, "invalid_api_key"))


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_only_post_is_allowed(edge: Edge, method: str) -> None:
    """E4: any other method is told which one is allowed."""
    answer = await edge.http.request(method, "/v1/embeddings")
    message = f"Not allowed to {method} on /v1/embeddings."
    assert_error(answer, Row("E4", 405, message, None, "method_not_supported", answered={"allow": "POST"}))


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_above_16_mib_is_refused_and_the_connection_closed(edge: Edge, chunked: bool) -> None:
    """E10: by its Content-Length before it is read, or when its chunks have become too many."""

    async def pieces() -> Any:
        for _ in range(17):
            yield b" " * 1_048_576

    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    content = pieces() if chunked else b" " * (16_777_216 + 1)
    answer = await edge.http.post("/v1/embeddings", headers=headers, content=content)
    message = "Request body too large. Maximum is 16777216 bytes."
    assert_error(answer, Row("E10", 413, message, None, "request_too_large", answered={"connection": "close"}))


async def test_a_body_of_exactly_16_mib_is_read(edge: Edge) -> None:
    """What is just within the bound is judged by what it says."""
    answer = await edge.post(content=good(b'"x"').ljust(16_777_216))
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'{"model":"nope","input":"x","model":"text-embedding-3-small"}', id="E28 last of two"),
        pytest.param(good(b'"x","encoding_format":null,"dimensions":null,"user":null'), id="null is default"),
        pytest.param(good(rb'"\ud83d\ude00 \u0000 e\u0301"'), id="odd but Unicode"),
        pytest.param(good(b'" "'), id="a blank"),
        pytest.param(b"\r\n\t " + good(b'"x"') + b" \n", id="white space around"),
        pytest.param(good(b"[-0, 5]"), id="minus zero"),
    ],
)
async def test_odd_is_not_wrong(edge: Edge, content: bytes) -> None:
    """What is valid JSON and within the limits is embedded as it stands."""
    answer = await edge.post(content=content)
    assert answer.status_code == 200, answer.text[:300]


@pytest.mark.parametrize("given", ["Application/JSON; charset=utf-8", "application/json"])
async def test_the_media_type_may_be_written_in_many_ways(edge: Edge, given: str) -> None:
    """Case and parameters of the content type do not matter, nor does saying that nothing is compressed."""
    answer = await edge.post({"model": SMALL, "input": "x"}, content_type=given, content_encoding="identity")
    assert answer.status_code == 200


MANY = "65536 or more"
HOSTILE = {
    "strings": ("input", too_long(MANY), good(b"[" + b",".join([b'"a"'] * 4_000_000) + b"]")),
    "arrays": ("input", too_long(MANY), good(b"[" + b",".join([b"[1]"] * 3_000_000) + b"]")),
    "empty arrays": ("input", too_long(MANY), good(b"[" + b",".join([b"[]"] * 5_000_000) + b"]")),
    "arrays in an array": ("input[1][2]", wrong_type("input[1][2]", "expected an integer", "an array"),
                           good(b"[[7],[1,2," + b",".join([b"[]"] * 5_000_000) + b"]]")),
    "arrays in a wrong field": ("user", wrong_type("user", "expected a string", "an array"),
                                good(b'"x","user":[' + b",".join([b"[]"] * 5_000_000) + b"]")),
    "arrays in an unknown field": ("other", "Unknown parameter: 'other'.",
                                   good(b'"x","other":[' + b",".join([b"[]"] * 5_000_000) + b"]")),
    "ids": (None, "Requested 3000000 tokens, max 300000 tokens per request",
            good(b"[" + b",".join([b"9999"] * 3_000_000) + b"]")),
    "a long text": (None, LONGER_AT_LEAST, good(b'"' + b"word " * 3_000_000 + b'"')),
    "an unbroken text": (None, LONGER_AT_LEAST, good(b'"' + b"a" * 16_000_000 + b'"')),
}  # fmt: skip


@pytest.mark.parametrize(("param", "message", "content"), HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_refusal_is_cheap_however_large_the_body(
    edge: Edge, param: str | None, message: str, content: bytes
) -> None:
    """16 MB of what cannot be served get the exact error after little more work than reading them."""
    started_s = time.process_time()
    answer = await edge.post(content=content)
    took_s = time.process_time() - started_s
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(message)
    assert took_s < 0.6  # client and server share this process: sending takes a part of it


# ── what happens behind the edge ────────────────────────────────────────────────────────────────────────────────────


def assert_later(answer: httpx.Response, code: str, message: str) -> None:
    """A 503 with both forms of an honest wait."""
    row = Row(code, 503, message, None, code, kind="service_unavailable_error")
    assert_error(answer, row)
    wait_ms = int(answer.headers["retry-after-ms"])
    assert 1 <= wait_ms <= 60_000
    assert int(answer.headers["retry-after"]) == max(1, -(-wait_ms // 1000))


async def test_a_full_queue_is_a_503(tmp_path: Path) -> None:
    """E36: while the provider hangs and a text waits, the next is refused at once."""
    async with running(tmp_path, queue="max_items = 1") as edge:
        edge.upstream.latency_s = 0.5
        asking = [asyncio.ensure_future(edge.post({"model": SMALL, "input": f"text {n}"})) for n in range(20)]
        done, waiting = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        answer = done.pop().result()
    assert_later(answer, "server_is_overloaded", "The server is overloaded. Please try again later.")


async def test_a_deadline_that_passes_is_a_504(tmp_path: Path) -> None:
    """E37: a provider that hangs does not keep the caller beyond what the caller said."""
    async with running(tmp_path) as edge:
        edge.upstream.inject(faults.hang)
        started_s = time.monotonic()
        answer = await edge.post({"model": SMALL, "input": "x"}, x_embedgate_deadline_ms="200")
        took_s = time.monotonic() - started_s
    message = "The request timed out before it could be completed."
    assert_error(answer, Row("E37", 504, message, None, "deadline_exceeded", kind="server_error"))
    assert 0.2 <= took_s < 1


async def test_a_failing_provider_is_a_502(tmp_path: Path) -> None:
    """E38: when all attempts are used up."""
    async with running(tmp_path) as edge:
        edge.upstream.inject(faults.status(500))
        answer = await edge.post({"model": SMALL, "input": "x"})
    message = "The upstream provider failed."
    assert_error(answer, Row("E38", 502, message, None, "upstream_error", kind="server_error"))


async def test_a_text_the_provider_refuses_is_a_400(tmp_path: Path) -> None:
    """E40: our checks passed, the provider's did not."""
    async with running(tmp_path) as edge:
        edge.upstream.poison.add("bad words")
        answer = await edge.post({"model": SMALL, "input": ["fine", "bad words"]})
    assert_error(answer, Row("E40", 400, "The provider rejected this input.", "input", "upstream_rejected_input"))


async def test_an_outage_is_a_503_at_once_for_who_cannot_wait(tmp_path: Path) -> None:
    """E41: with every breaker open, a deadline before the next probe is refused without waiting."""
    async with running(tmp_path) as edge:
        edge.upstream.inject(faults.status(500))
        for n in range(5):
            await edge.post({"model": SMALL, "input": f"x{n}"})
        answer = await edge.post({"model": SMALL, "input": "y"}, x_embedgate_deadline_ms="50")
    assert_later(answer, "provider_unavailable", "No provider is available for this model.")


async def test_a_draining_server_says_so_and_closes(tmp_path: Path) -> None:
    """E41: what comes on a kept connection while the server drains is sent elsewhere."""
    async with running(tmp_path) as edge:
        edge.runtime.draining = True
        answer = await edge.post({"model": SMALL, "input": "x"})
    assert_later(answer, "shutting_down", "The server is shutting down.")
    assert answer.headers["connection"] == "close"


class _Broken:
    """A gateway with a bug."""

    def __init__(self, gateway: Gateway) -> None:
        self.routes = gateway.routes

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResult:
        raise ZeroDivisionError(str(request.texts))


async def test_a_bug_is_a_500_that_tells_nothing(tmp_path: Path) -> None:
    """E42: neither caller nor log sees what was in the exception."""
    async with running(tmp_path) as edge:
        edge.runtime.gateway = cast("Gateway", _Broken(edge.runtime.gateway))
        answer = await edge.post({"model": SMALL, "input": "a secret text"})
    message = "The server had an error while processing your request."
    assert_error(answer, Row("E42", 500, message, None, "internal_error", kind="server_error"))
    log = await asyncio.to_thread(edge.log.read_text)
    assert "ZeroDivisionError" in log
    assert "secret" not in log
