"""Hides how a process writes down what must outlive it: frames in files of its own, which others inherit."""

import os
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]

SEGMENT_BYTES: Final = 4 * 2**20
"""Of a file; all of it is taken from the disk before the first frame."""

_SEGMENTS = "[0-9]" * 8
_HEAD = struct.Struct("<II")  # length of the payload and its CRC32; a length of 0 is where nothing was written yet


class JournalFull(Exception):
    """Nothing more can be written but what was promised; without a path."""


class DiskFull(JournalFull):
    """It is the disk that takes nothing more."""


class Place(NamedTuple):
    """Where the next frame is: the number of its segment, and bytes from the beginning of that."""

    segment: int = 0
    offset_bytes: int = 0


class Record:
    """What a process wrote down, to be read and removed by whoever has it: this process, since it holds its lock."""

    def __init__(self, home: Path, lock: int | None = None) -> None:
        self._home = home
        self._lock = lock
        self._ends = {} if lock is None else {int(path.name): path.stat().st_size for path in home.glob(_SEGMENTS)}
        """How far each segment is written, by its number."""

    @property
    def owner(self) -> str:
        """Who wrote it."""
        return self._home.name

    @property
    def size_bytes(self) -> int:
        """What it takes of the disk."""
        return sum(self._ends.values())

    @property
    def end(self) -> Place:
        """Where it is written up to."""
        number = max(self._ends, default=0)
        return Place(number, self._ends.get(number, 0))

    def read(self, at: Place, most: int) -> tuple[list[tuple[int, bytes]], Place]:
        """At most `most` payloads from `at` on, each with the number of its segment, and where the next one will be.

        Fewer than `most`: these are all. May be called in a thread.
        """
        found: list[tuple[int, bytes]] = []
        for number, end in sorted(self._ends.items()):
            if number < at.segment or len(found) == most:
                continue
            start = at.offset_bytes if number == at.segment else 0
            with self._path(number).open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), end - start, start)
            read_bytes = 0
            for payload in islice(_whole(data), most - len(found)):
                found.append((number, payload))
                read_bytes += _HEAD.size + len(payload)
            at = Place(number, start + read_bytes)
        return found, at

    def forget(self, before: int) -> None:
        """Removes the segments with lower numbers, but never the last."""
        last = max(self._ends, default=0)
        for number in [number for number in self._ends if number < min(before, last)]:
            self._remove(number)

    def remove(self) -> None:
        """Deletes it, since all of it is known elsewhere."""
        for number in [*self._ends]:
            self._remove(number)
        with suppress(OSError):  # it was never made, or somebody put something there
            self._home.rmdir()
        self.close()

    def close(self) -> None:
        """Leaves it to whoever comes next."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def _remove(self, number: int) -> None:
        self._path(number).unlink(missing_ok=True)
        del self._ends[number]

    def _path(self, number: int) -> Path:
        return self._home / f"{number:08d}"


class Journal(Record):
    """Frames in order, each written at once and by one call of the system; they outlive the process.

    A frame may promise another one, for which there is room from then on, whatever becomes of the disk. Of a power cut
    the last frames may be torn or missing: nothing after a frame that is not whole is believed, up to the next segment.

    `owner` is a name that no other process ever had; what is in `folder` may take `max_bytes`.
    """

    def __init__(
        self, folder: Path, owner: str, *, max_bytes: int, segment_bytes: int = SEGMENT_BYTES
    ) -> None:  # fmt: skip
        super().__init__(folder / owner)
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._file: int | None = None
        self._number = 0
        self._promised_bytes = 0
        self._late: deque[tuple[bytes, int]] = deque()
        self._inherited: list[Record] = []

    @property
    def size_bytes(self) -> int:
        """What it takes of the disk, with all that it inherited."""
        return len(self._ends) * self._segment_bytes + sum(record.size_bytes for record in self._inherited)

    def append(self, payload: bytes, *, promise_bytes: int = 0) -> None:
        """Writes a frame, and promises room for one of at most `promise_bytes`. Raises JournalFull."""
        frame, promise = _framed(payload), promise_bytes and promise_bytes + _HEAD.size
        needed = len(frame) + promise + self._promised_bytes
        if self._file is None or self._ends[self._number] + needed > self._segment_bytes:
            self._begin_segment(needed)
        try:
            self._write(frame)
        except OSError as error:
            raise DiskFull(f"the journal cannot be written: {error.strerror}") from None
        self._promised_bytes += promise

    def redeem(self, payload: bytes, promise_bytes: int) -> None:
        """Writes the frame that was promised; one that the disk refuses now is written by a later `catch_up`."""
        self._late.append((_framed(payload), promise_bytes + _HEAD.size))
        self.catch_up()

    def catch_up(self) -> None:
        """Writes what the disk refused."""
        with suppress(OSError):
            while self._late:
                frame, promise = self._late[0]
                self._write(frame)
                self._promised_bytes -= promise
                self._late.popleft()

    def inherit(self) -> list[Record]:
        """What processes left that are gone; it counts for `size_bytes` until it is disowned."""
        heirlooms = []
        for home in sorted(self._home.parent.iterdir()):
            with suppress(FileNotFoundError):  # who had it before removed it meanwhile
                own = home == self._home or home.name.startswith(".")
                if not own and home.is_dir() and (lock := _locked(home)) is not None:
                    heirlooms.append(Record(home, lock))
        self._inherited += heirlooms
        return heirlooms

    def disown(self, heirloom: Record) -> None:
        """Deletes what was inherited, since all of it is known elsewhere."""
        heirloom.remove()
        self._inherited.remove(heirloom)

    def close(self) -> None:
        """Leaves it, and what it inherited, to whoever comes next."""
        for heirloom in self._inherited:
            heirloom.close()
        if self._file is not None:
            os.close(self._file)
        self._file = None
        super().close()

    def _write(self, frame: bytes) -> None:
        """Over what is left of a frame that did not get there whole."""
        assert self._file is not None  # noqa: S101 — whoever writes has begun a segment
        end = self._ends[self._number]
        if os.pwrite(self._file, frame, end) != len(frame):
            raise OSError(0, "not all of it")
        self._ends[self._number] = end + len(frame)

    def _begin_segment(self, needed_bytes: int) -> None:
        """What was promised moves along: the room for it in the segment before is given up."""
        if needed_bytes > self._segment_bytes:
            raise JournalFull("more is under way than a segment of the journal holds")
        if self.size_bytes + self._segment_bytes > self._max_bytes:
            raise JournalFull("ledger.journal_max_bytes is reached")
        try:
            if self._lock is None:
                self._lock = _made(self._home)
            file = _allocated(self._path(self._number + 1), self._segment_bytes)
        except OSError as error:
            raise DiskFull(f"the journal cannot grow: {error.strerror}") from None
        if self._file is not None:
            os.close(self._file)
        self._file, self._number = file, self._number + 1
        self._ends[self._number] = 0


def _framed(payload: bytes) -> bytes:
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def _whole(data: bytes) -> Iterator[bytes]:
    """The payloads up to the first that is not whole."""
    start = _HEAD.size
    while start <= len(data):
        length, checksum = _HEAD.unpack_from(data, start - _HEAD.size)
        payload = data[start : start + length]
        if not length or len(payload) < length or zlib.crc32(payload) != checksum:
            return
        yield payload
        start += length + _HEAD.size


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _made(home: Path) -> int:
    """The lock of a new folder, which is seen by others only when it is locked."""
    hidden = home.with_name(f".{home.name}")
    hidden.mkdir(mode=0o700, exist_ok=True)
    lock = _locked(hidden)
    assert lock is not None  # noqa: S101 — nobody else knows this name
    hidden.rename(home)
    return lock


def _locked(home: Path) -> int | None:
    """A descriptor that keeps `home` for this process; None: another one has it."""
    lock = os.open(os.devnull if fcntl is None else home, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        home.stat()  # it may have gone while it was being locked
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return lock


def _allocated(path: Path, size_bytes: int) -> int:
    """A new file, open, whose bytes are all there and 0; or OSError and no file."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size_bytes)
        elif os.pwrite(file, bytes(size_bytes), 0) != size_bytes:
            raise OSError(0, "not all of it was written")
    except OSError:
        os.close(file)
        path.unlink()
        raise
    return file
