"""What is written down outlives whoever wrote it: frames, their room on the disk, and who inherits them."""

import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.storage.journal import Journal, JournalFull, Place, Record

SEGMENT_BYTES = 4096
ENOUGH = 2**20

DIES = """
import os, signal, sys
from pathlib import Path
from app.storage.journal import Journal
journal = Journal(Path(sys.argv[1]), "dead", max_bytes=2**20, segment_bytes=4096)
for number in range(100):
    journal.append(b"frame %d" % number + bytes(100))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """An empty one, of small segments."""
    made = Journal(tmp_path, "a", max_bytes=ENOUGH, segment_bytes=SEGMENT_BYTES)
    yield made
    made.close()


def payloads(record: Record, at: Place = Place(), most: int = 10_000) -> list[bytes]:  # noqa: B008 — it is frozen
    """What there is from `at` on."""
    return [payload for _, payload in record.read(at, most)[0]]


def segments(home: Path) -> list[str]:
    """The names of its files."""
    return sorted(path.name for path in home.iterdir())


def heir_of(folder: Path, *, max_bytes: int = ENOUGH) -> tuple[Journal, list[Record]]:
    """Another process's journal, and what that inherits."""
    other = Journal(folder, "heir", max_bytes=max_bytes, segment_bytes=SEGMENT_BYTES)
    return other, other.inherit()


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """The system refuses what would make a file longer, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def calls_that_write() -> int:
    """How often this thread has asked the system to write something."""
    counted = Path(f"/proc/self/task/{threading.get_native_id()}/io").read_text()
    return int(dict(line.split(": ") for line in counted.splitlines())["syscw"])


# ── frames ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_written_is_read_in_order_over_many_segments(journal: Journal) -> None:
    """All of it, in pieces, each from where the one before ended."""
    written = [b"%d" % number * 100 for number in range(200)]
    at, read = Place(), list[bytes]()
    for start in range(0, 200, 50):
        for payload in written[start : start + 50]:
            journal.append(payload)
        while True:
            found, at = journal.read(at, 7)
            read += [payload for _, payload in found]
            if len(found) < 7:
                break
    assert read == written
    assert journal.size_bytes > 3 * SEGMENT_BYTES


def test_a_frame_is_one_write(journal: Journal) -> None:
    """So a process that is killed wrote it whole or not at all."""
    journal.append(b"first")
    before = calls_that_write()
    journal.append(b"second", promise_bytes=10)
    journal.redeem(b"third", 10)
    assert calls_that_write() - before == 2
    assert payloads(journal) == [b"first", b"second", b"third"]


@given(damage=st.integers(0, 300), cut=st.booleans())
def test_what_is_torn_is_left_out_and_all_before_it_is_believed(
    tmp_path_factory: pytest.TempPathFactory, damage: int, cut: bool
) -> None:
    """Wherever a file ends too early or a bit of it is wrong; the next segment is believed again."""
    folder = tmp_path_factory.mktemp("journals")
    journal = Journal(folder, "a", max_bytes=ENOUGH, segment_bytes=SEGMENT_BYTES)
    written = [b"%03d" % number + bytes(92) for number in range(3)]  # of 103 bytes each with their heads
    for payload in written:
        journal.append(payload)
    journal.append(bytes(4000))  # in the next segment
    journal.close()
    first = folder / "a" / "00000001"
    data = bytearray(first.read_bytes())
    if cut:
        del data[damage:]
    else:
        data[damage] ^= 0x40
    first.write_bytes(data)
    other, (record,) = heir_of(folder)
    assert payloads(record) == [*written[: damage // 103], bytes(4000)]
    other.close()


# ── room ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_promised_fits_when_nothing_else_does(tmp_path: Path) -> None:
    """However many are under way when the bound is reached, all of them can be ended."""
    journal = Journal(tmp_path, "a", max_bytes=2 * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES)
    begun = 0
    with suppress(JournalFull):
        while begun < 1000:
            journal.append(b"b" * 100, promise_bytes=40)
            begun += 1
    with pytest.raises(JournalFull, match="journal_max_bytes"):
        journal.append(b"b" * 100, promise_bytes=40)
    assert begun > 40
    for _ in range(begun):
        journal.redeem(b"e" * 40, 40)
    assert payloads(journal).count(b"e" * 40) == begun
    assert journal.size_bytes == 2 * SEGMENT_BYTES
    journal.close()


def test_a_disk_that_is_full_refuses_what_begins_and_takes_what_ends(journal: Journal) -> None:
    """The room of a segment is taken before its first frame; once there is more, more is taken."""
    journal.append(b"begun", promise_bytes=10)
    with files_of_at_most(SEGMENT_BYTES - 1):
        with pytest.raises(JournalFull, match="cannot grow: File too large"):
            journal.append(bytes(4060))
        journal.redeem(b"ended", 10)
    assert payloads(journal) == [b"begun", b"ended"]
    journal.append(bytes(4060))
    assert payloads(journal) == [b"begun", b"ended", bytes(4060)]


def test_an_end_that_the_disk_refused_is_written_later(journal: Journal) -> None:
    """Over what got there of it; nothing after it is lost."""
    journal.append(b"begun", promise_bytes=10)
    with files_of_at_most(16):  # so that three bytes of the next frame get there
        journal.redeem(b"ended", 10)
        with pytest.raises(JournalFull, match="cannot be written"):
            journal.append(b"refused")
    assert payloads(journal) == [b"begun"]
    journal.append(b"another")
    journal.catch_up()
    assert payloads(journal) == [b"begun", b"another", b"ended"]


def test_segments_that_are_known_elsewhere_are_removed_but_the_last(journal: Journal, tmp_path: Path) -> None:
    """And with the last one the folder, when it is no longer wanted."""
    for _ in range(3):
        journal.append(bytes(4000))
    journal.forget(before=2)
    assert segments(tmp_path / "a") == ["00000002", "00000003"]
    journal.forget(before=9)
    assert segments(tmp_path / "a") == ["00000003"]
    journal.remove()
    assert segments(tmp_path) == []


def test_a_journal_without_frames_leaves_no_trace(journal: Journal, tmp_path: Path) -> None:
    """Tools that buy nothing write nothing."""
    assert journal.read(Place(), 10) == ([], Place())
    journal.remove()
    assert segments(tmp_path) == []


# ── heirs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_journal_of_a_process_that_was_killed_is_inherited_once(tmp_path: Path) -> None:
    """Whole, by one of those who come; it counts for its bound until it is disowned."""
    died = subprocess.run([sys.executable, "-c", DIES, tmp_path], check=False, timeout=30)
    assert died.returncode == -9
    one, (record,) = heir_of(tmp_path)
    two = Journal(tmp_path, "two", max_bytes=ENOUGH, segment_bytes=SEGMENT_BYTES)
    assert two.inherit() == one.inherit() == []
    assert record.owner == "dead"
    assert [payload[:8].rstrip(b"\0") for payload in payloads(record)] == [
        b"frame %d" % number for number in range(100)
    ]
    assert one.size_bytes == record.size_bytes == 3 * SEGMENT_BYTES
    one.disown(record)
    assert one.size_bytes == 0
    assert segments(tmp_path) == []


def test_a_living_process_is_not_inherited_from(journal: Journal, tmp_path: Path) -> None:
    """Until it closes what it has; and what an heir closes goes to the next one."""
    journal.append(b"frame")
    other, records = heir_of(tmp_path)
    assert records == []
    journal.close()
    assert [payloads(record) for record in other.inherit()] == [[b"frame"]]
    other.close()
    last, records = heir_of(tmp_path)
    assert [payloads(record) for record in records] == [[b"frame"]]
    last.close()


def test_what_was_inherited_counts_for_the_bound(tmp_path: Path) -> None:
    """A service that is killed again and again while the database is away does not fill the disk."""
    first = Journal(tmp_path, "a", max_bytes=ENOUGH, segment_bytes=SEGMENT_BYTES)
    first.append(b"frame")
    first.close()
    other, (record,) = heir_of(tmp_path, max_bytes=SEGMENT_BYTES)
    with pytest.raises(JournalFull, match="journal_max_bytes"):
        other.append(b"frame")
    other.disown(record)
    other.append(b"frame")
    other.close()


def test_files_are_their_owners_alone(journal: Journal, tmp_path: Path) -> None:
    """Nobody else reads who bought what."""
    journal.append(b"frame")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"a": 0o700, "00000001": 0o600}
