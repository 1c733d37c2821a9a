"""What lies beside an output: after every moment at which a run may end, the next one finds what it needs."""

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

from app.corpus.rows import DataError, Lost, Row
from app.corpus.trail import HASH_BYTES, Checkpoint, Failed, Known, Spent, Trail, hash_of

BEGIN = Checkpoint({"model": "m"}, "2026-11-01T00:00:00+00:00", sink={})


def hashes(*texts: str) -> list[bytes]:
    """Of rows with these texts."""
    return [hash_of(Row(0, "", text, {})) for text in texts]


def trail(folder: Path) -> Trail:
    """Beside `out`."""
    return Trail(str(folder / "out"))


def noted(made: Trail, checkpoint: Checkpoint, texts: Sequence[str], *failed: Failed) -> Checkpoint:
    """After these rows, too."""
    made.add(hashes(*texts), failed)
    return made.note(msgspec.structs.replace(checkpoint, rows=checkpoint.rows + len(texts)))


def test_what_was_not_noted_is_forgotten(tmp_path: Path) -> None:
    """A run that goes on has what the checkpoint tells of, and nothing of what came behind it."""
    made = trail(tmp_path)
    made.open(BEGIN)
    checkpoint = noted(made, BEGIN, ["a", "b"], Failed(1, "id1", "why"))
    made.add(hashes("lost"), [Failed(2, "id2", "lost")])
    made.close()
    again = trail(tmp_path)
    assert again.checkpoint() == checkpoint
    again.open(checkpoint)
    noted(again, checkpoint, ["c"], Failed(2, "id2", "why"))
    again.finish(META, failed=2)
    assert (tmp_path / "out.hashes").read_bytes() == b"".join(hashes("a", "b", "c"))
    failed = [msgspec.json.decode(line, type=Failed) for line in (tmp_path / "out.failed.jsonl").read_bytes().split()]
    assert failed == [Failed(1, "id1", "why"), Failed(2, "id2", "why")]
    assert again.meta() == META
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.failed.jsonl", "out.hashes", "out.meta.json"]


def test_the_last_list_of_failures_goes_when_there_are_none(tmp_path: Path) -> None:
    """An output without failed rows has no such list beside it."""
    (tmp_path / "out.failed.jsonl").write_text("of before\n")
    made = trail(tmp_path)
    made.open(BEGIN)
    noted(made, BEGIN, ["a"])
    made.finish({}, failed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.hashes", "out.meta.json"]


@pytest.mark.parametrize("steps", range(4))
def test_who_died_while_finishing_can_finish_again(tmp_path: Path, steps: int) -> None:
    """Whichever of the files got its name already, next to those of an output of before."""
    for name in ("hashes", "failed.jsonl"):
        (tmp_path / f"out.{name}").write_bytes(b"of another output")
    made = trail(tmp_path)
    made.open(BEGIN)
    checkpoint = noted(made, BEGIN, ["a", "b"], Failed(1, "id1", "why"))
    made.close()
    for name in ("hashes", "failed.jsonl")[:steps]:
        (tmp_path / f"out.{name}.partial").replace(tmp_path / f"out.{name}")
    if steps == 3:
        (tmp_path / "out.meta.json").write_text("{}")
    again = trail(tmp_path)
    again.open(checkpoint)
    again.finish({"rows": 2}, failed=1)
    assert (tmp_path / "out.hashes").read_bytes() == b"".join(hashes("a", "b"))
    assert b'"why"' in (tmp_path / "out.failed.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.failed.jsonl", "out.hashes", "out.meta.json"]


@pytest.mark.parametrize("name", ["hashes", "failed.jsonl"])
@pytest.mark.parametrize("left", [None, 3])
def test_what_a_checkpoint_tells_of_has_to_be_there(tmp_path: Path, name: str, left: int | None) -> None:
    """What is short of it is told, each time, and left as it is."""
    made = trail(tmp_path)
    made.open(BEGIN)
    checkpoint = noted(made, BEGIN, ["a"], Failed(0, "id0", "why"))
    made.close()
    file = tmp_path / f"out.{name}.partial"
    if left is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:left])
    for _ in range(2):
        with pytest.raises(Lost, match="is shorter than the checkpoint says"):
            made.open(checkpoint)
        made.close()
        assert file.exists() == (left is not None)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"no json", b"{}", b'{"version": 2, "subject": {}, "started_at": ""}',
        b'{"subject": {}, "started_at": "", "rows": -1, "sink": {}}',
        b'{"subject": {}, "started_at": "", "rows": 1}',
        b'{"subject": {"rows": 2}, "started_at": "", "rows": 3, "sink": {}}',
        b'{"subject": {}, "started_at": "", "hashes_bytes": -16}',
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_none_is_told(tmp_path: Path, content: bytes) -> None:
    """Torn, of something else, of another version, or of rows that cannot be there."""
    (tmp_path / "out.progress").write_bytes(content)
    with pytest.raises(Lost, match="is no checkpoint that can be read"):
        trail(tmp_path).checkpoint()


META = {
    "space": "s", "dimensions": 3, "rows": 3, "failed": 0, "tokens": 9, "calls": 0.5, "cost_usd": "0.1", "seconds": 1.5,
    "started_at": "2026-11-01T00:00:00+00:00", "subject": {"failed": "nan"}, "sink": {"rows": 3}, "text": "title",
}  # fmt: skip


def test_what_is_known_of_an_output_is_read_again(tmp_path: Path) -> None:
    """All of it, also what only people read."""
    made = trail(tmp_path)
    made.open(BEGIN)
    made.finish(META, failed=0)
    assert made.meta() == META
    (tmp_path / "out.meta.json").write_bytes(orjson.dumps(META | {"cost_usd": None}))
    assert made.meta() == META | {"cost_usd": None}


@pytest.mark.parametrize(
    "change",
    [
        {"subject": 5}, {"subject": {}}, {"subject": {"failed": 1}}, {"rows": "3"}, {"rows": -3},
        {"sink": {"bytes": 3}}, {"sink": {"rows": "x"}}, {"failed": None}, {"seconds": "x"}, {"cost_usd": "much"},
        {"dimensions": []},
    ],
)  # fmt: skip
def test_what_is_known_of_an_output_has_to_be_as_it_was_written(tmp_path: Path, change: dict[str, Any]) -> None:
    """Else nothing is known; so it is with what is torn."""
    (tmp_path / "out.meta.json").write_bytes(orjson.dumps(META | change))
    assert trail(tmp_path).meta() is None
    (tmp_path / "out.meta.json").write_bytes(orjson.dumps(META)[:-9])
    assert trail(tmp_path).meta() is None


def test_a_list_of_failures_that_is_none_is_not_read(tmp_path: Path) -> None:
    """Nothing is known of the rows then."""
    (tmp_path / "out.hashes").write_bytes(b"".join(hashes("a", "b")))
    for line in (b"torn", b'{"row": -9, "id": "", "reason": ""}'):
        (tmp_path / "out.failed.jsonl").write_bytes(line)
        assert trail(tmp_path).failed() is None
        assert trail(tmp_path).known(omitted=False) is None


@pytest.mark.parametrize("name", ["hashes", "failed.jsonl", "meta.json"])
def test_a_place_that_is_taken_is_told_by_its_name_before_a_row_is_bought(tmp_path: Path, name: str) -> None:
    """A folder, where a file has to be in the end."""
    (tmp_path / f"out.{name}").mkdir()
    with pytest.raises(DataError, match=rf"out\.{name}: cannot be written: Is a directory$"):
        trail(tmp_path).open(BEGIN)


@contextmanager
def no_file_above(size_bytes: int) -> Iterator[None]:
    """A disk that is full once a file gets so large."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A piece that fits in part is told at once, and gone on with where the last checkpoint was."""
    made = trail(tmp_path)
    made.open(BEGIN)
    checkpoint = noted(made, BEGIN, ["a"])
    with (
        no_file_above(int(2.5 * HASH_BYTES)),
        pytest.raises(DataError, match=r"out\.hashes: cannot be written: File too"),
    ):
        made.add(hashes("b", "c"), [])
    made.close()
    assert made.checkpoint() == checkpoint
    made.open(checkpoint)
    noted(made, checkpoint, ["b", "c"])
    made.finish({}, failed=0)
    assert (tmp_path / "out.hashes").read_bytes() == b"".join(hashes("a", "b", "c"))


def test_a_text_is_found_in_the_first_row_that_has_a_vector(tmp_path: Path) -> None:
    """Also where the heads of hashes are the same; rows without a vector are not known."""
    one, other, twin = b"h" * 8 + b"1" * 8, b"h" * 8 + b"2" * 8, b"t" * HASH_BYTES
    known = Known(b"".join([one, twin, other, twin, twin]), [1, 99])
    assert [known.row(each) for each in (one, other, twin)] == [0, 2, 3]
    assert known.row(b"h" * 8 + b"3" * 8) is None
    assert known.row(b"z" * HASH_BYTES) is None
    assert Known(b"", []).row(one) is None
    made = trail(tmp_path)
    assert made.known(omitted=False) is None
    (tmp_path / "out.hashes").write_bytes(b"".join(hashes("a", "b")))
    (tmp_path / "out.failed.jsonl").write_bytes(msgspec.json.encode(Failed(0, "", "")) + b"\n")
    for omitted, rows in ((False, [None, 1]), (True, [0, 1])):
        found = made.known(omitted=omitted)
        assert found is not None
        assert [found.row(each) for each in hashes("a", "b")] == rows
    (tmp_path / "out.hashes").write_bytes(b"torn")
    assert made.known(omitted=False) is None


def test_money_that_is_not_known_stays_so() -> None:
    """Sums of what rows took."""
    assert Spent(1, 2, 3, 4, 5, 0.5, 7) + Spent(10, 20, 30, 40, 50, 0.25, 70) == Spent(11, 22, 33, 44, 55, 0.75, 77)
    assert (Spent(nano_usd=None) + Spent(nano_usd=7)).nano_usd is None
