"""How an input file is checked: each row of what callers send wrong, where it is told, and how the rest is cut."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import orjson
import pytest

from app.job import LineError
from app.jobs.intake import MOST_ERRORS, Intake

MODEL = "small"


def line(custom_id: Any = "a", given: Any = "text", model: Any = MODEL, **more: Any) -> bytes:
    """A line as it should be, or nearly so."""
    body = {"model": model, "input": given}
    return orjson.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body} | more)


def without(name: str) -> bytes:
    """A line in which something is missing."""
    found = orjson.loads(line())
    del found[name]
    return orjson.dumps(found)


def unfit(model: str) -> LineError | None:
    """Why a model cannot be had."""
    return None if model in {MODEL, "large"} else LineError("model_not_found", "There is none.", "body.model")


def checked(data: bytes, pieces: Sequence[int] = (), /, **bounds: int) -> Intake:
    """What came of a file that arrives in pieces of these sizes, then as a whole."""
    limits = {"max_lines": 50_000, "max_inputs": 50_000, "shard_lines": 3} | bounds
    with Intake(wrong=unfit, **limits) as intake:
        at = 0
        for size in (*pieces, len(data)):
            intake.feed(data[at : at + size])
            at += size
        intake.finish()
    return intake


def told(data: bytes, **bounds: int) -> list[tuple[str, str | None, int | None]]:
    """Code, param and line of all that is wrong."""
    return [(error.code, error.param, error.line) for error in checked(data, (), **bounds).errors]


def test_a_good_file_is_cut_into_shards() -> None:
    """Where each begins in the file, whatever ends the lines; blank lines at the end and a BOM do not matter."""
    lines = [line(f"id{number}") for number in range(7)]
    for end, start, rest in ((b"\n", b"", b""), (b"\r\n", b"\xef\xbb\xbf", b"\r\n\r\n  \n"), (b"\n", b"", b"\n")):
        data = start + end.join(lines) + rest
        intake = checked(data)
        assert not intake.errors
        assert (intake.total, intake.model) == (7, MODEL)
        spans = [(shard.first_line, shard.lines) for shard in intake.shards]
        assert spans == [(0, 3), (3, 3), (6, 1)]
        for shard in intake.shards:
            part = data[shard.offset_bytes : shard.offset_bytes + shard.size_bytes].split(b"\n")
            found = [orjson.loads(each)["custom_id"] for each in part if each.strip()]
            assert found == [f"id{number}" for number in range(shard.first_line, shard.first_line + shard.lines)]


def test_it_does_not_matter_how_the_file_arrives() -> None:
    """Cut at any byte."""
    data = b"\xef\xbb\xbf" + b"\n".join(line(f"{number}", ["a", "b"]) for number in range(20)) + b"\n"
    whole = checked(data).shards
    rng = random.Random(3)
    for _ in range(20):
        pieces = [3, *(rng.randint(1, 200) for _ in range(30))]
        assert checked(data, pieces).shards == whole


WRONG = [
    pytest.param(b"", "empty_file", None, None, id="nothing"),
    pytest.param(b"\n \r\n", "empty_file", None, None, id="blank"),
    pytest.param(line("1") + b"\n" + b"{", "invalid_json_line", None, 2, id="no json"),
    pytest.param(line("1") + b"\n\n" + line("2"), "invalid_json_line", None, 2, id="blank in the middle"),
    pytest.param(b'{"a": NaN}', "invalid_json_line", None, 1, id="NaN"),
    pytest.param(b'{"a": "\xff"}', "invalid_json_line", None, 1, id="not UTF-8"),
    pytest.param(b'{"a": "\\ud800"}', "invalid_json_line", None, 1, id="surrogate"),
    pytest.param(b"[" * 65 + b"]" * 65, "invalid_json_line", None, 1, id="nested"),
    pytest.param(b"[1]", "invalid_json_line", None, 1, id="array"),
    pytest.param(b'"x"', "invalid_json_line", None, 1, id="string"),
    pytest.param(b"null", "invalid_json_line", None, 1, id="null"),
    pytest.param(line(body="x"), "invalid_json_line", None, 1, id="body is no object"),
    *[
        pytest.param(without(name), "missing_required_parameter", name, 1, id=f"no {name}")
        for name in ("custom_id", "method", "url", "body")
    ],
    pytest.param(line(method="GET"), "invalid_value", "method", 1, id="GET"),
    pytest.param(line(url="/v1/chat/completions"), "url_mismatch", "url", 1, id="url"),
    pytest.param(line("x" * 513), "invalid_value", "custom_id", 1, id="long id"),
    pytest.param(line("\0"), "invalid_value", "custom_id", 1, id="NUL"),
    pytest.param(line(7), "invalid_value", "custom_id", 1, id="number as id"),
    pytest.param(line("1") + b"\n" + line("1"), "duplicate_custom_id", "custom_id", 2, id="twice"),
    pytest.param(line("1") + b"\n" + line("2", model="large"), "model_mismatch", "body.model", 2, id="two models"),
    pytest.param(line(model="gone"), "model_not_found", "body.model", 1, id="unknown model"),
]


@pytest.mark.parametrize(("data", "code", "param", "number"), WRONG)
def test_what_is_wrong_is_told_with_its_line(data: bytes, code: str, param: str | None, number: int | None) -> None:
    """One error for one mistake; nothing is cut to be done."""
    assert told(data) == [(code, param, number)]


def test_the_known_words_are_used() -> None:
    """Clients look for them."""
    (broken,) = checked(b"{").errors
    assert broken == LineError("invalid_json_line", "This line is not parseable as valid JSON.", None, 1)
    (other,) = checked(b"[1]").errors
    assert other.message == "This line is not a JSON object."


def test_too_much_is_told_once() -> None:
    """Too many lines, or too many embeddings in them: texts and token arrays count one by one."""
    three = b"\n".join(line(f"{number}") for number in range(4))
    assert told(three, max_lines=3) == [("too_many_tasks", None, None)]
    many = line("a", ["x"] * 3) + b"\n" + line("b", [[1, 2], [3]]) + b"\n" + line("c", [1, 2, 3])
    assert told(many, max_inputs=5) == [("too_many_tasks", None, None)]
    assert told(many, max_inputs=6) == []


def test_the_first_hundred_mistakes_are_told() -> None:
    """And the rest is not read."""

    def broken() -> Iterator[bytes]:
        for _ in range(500):
            yield b"{\n"

    assert len(checked(b"".join(broken())).errors) == MOST_ERRORS
    with Intake(wrong=lambda _: None, max_lines=10**6, max_inputs=10**6, shard_lines=10) as intake:
        assert not intake.feed(b"{\n" * 500)


def test_what_is_wrong_with_a_body_only_is_left_to_its_turn() -> None:
    """An empty input, a model that is no string: the line fails, not the job."""
    data = b"\n".join([line("1"), line("2", []), line("3", model=5), line("4", given=None)])
    assert not checked(data).errors


def test_a_line_without_an_end_is_not_read_forever() -> None:
    """Thirty-two megabytes are enough."""
    with Intake(wrong=lambda _: None, max_lines=10, max_inputs=10, shard_lines=10) as intake:
        assert intake.feed(b'"' + b"x" * 2**20)
        assert not intake.feed(b"x" * 2**25)
        intake.finish()
        assert [error.code for error in intake.errors] == ["invalid_json_line"]


def test_a_million_ids_are_compared_without_keeping_them() -> None:
    """A tenth of that here: the second of two equal ones is found wherever it stands."""
    lines = [line(f"request-{number}") for number in range(100_000)]
    data = b"\n".join([*lines, lines[17]])
    assert told(data, max_lines=10**6, max_inputs=10**6) == [("duplicate_custom_id", "custom_id", 100_001)]
