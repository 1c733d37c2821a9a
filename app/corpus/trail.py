"""Hides what a run leaves beside its output: how far it is, what failed, what every row was, what came of it all."""

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from app.corpus.rows import Count, DataError, Lost, Row
from app.corpus.sinks import fsync

HASH_BYTES: Final = 16
_VERSION = 1


class Failed(msgspec.Struct, frozen=True):
    """A row that has no vector, and why."""

    row: Count
    id: str
    reason: str


class Spent(msgspec.Struct, frozen=True):
    """What rows took so far: `kept` ones were not bought at all; money that is None is not known."""

    rows: int = 0
    failed: int = 0
    kept: int = 0
    cached: int = 0
    tokens: int = 0
    calls: float = 0.0
    nano_usd: int | None = 0

    def __add__(self, other: "Spent") -> "Spent":
        """Both together."""
        cost = None if self.nano_usd is None or other.nano_usd is None else self.nano_usd + other.nano_usd
        return Spent(
            self.rows + other.rows, self.failed + other.failed, self.kept + other.kept, self.cached + other.cached,
            self.tokens + other.tokens, self.calls + other.calls, cost,
        )  # fmt: skip


class Checkpoint(msgspec.Struct, frozen=True):
    """How far a run is: `rows` are done and safe, in order; `sink` is how the output goes on from there.

    `subject` is what decides what the output holds: a run with another one is another run.
    """

    subject: dict[str, Any]
    started_at: str
    rows: Count = 0
    sink: dict[str, Any] | None = None
    hashes_bytes: Count = 0
    failed_bytes: Count = 0
    spent: Spent = Spent()
    seconds: float = 0.0
    version: int = _VERSION

    @property
    def credible(self) -> bool:
        """Whether it is one of ours, and so many rows may be there: in a sink, and no more than were asked for."""
        asked_for = self.subject.get("rows")
        there = not self.rows or self.sink is not None
        return self.version == _VERSION and there and not (isinstance(asked_for, int) and self.rows > asked_for)


class _Subject(msgspec.Struct):
    failed: str


class _State(msgspec.Struct):
    rows: Count


class _Meta(msgspec.Struct):
    """What others rely on in what is known of a finished output; people find more there."""

    subject: _Subject
    space: str
    dimensions: Count
    rows: Count
    failed: Count
    tokens: Count
    calls: float
    cost_usd: Decimal | None
    started_at: str
    seconds: float
    sink: _State


class Trail:
    """The files beside the output `out`: `.progress`, `.failed.jsonl`, `.hashes`, `.meta.json`. Raises DataError.

    What is written is safe once `note` has returned, and all of it, or none. What is ordered from a vendor is noted by
    others, in the folder `.orders`.
    """

    def __init__(self, out: str) -> None:
        self.progress_file, self.failed_file, self.hashes_file, self.meta_file = (
            Path(f"{out}.{end}") for end in ("progress", "failed.jsonl", "hashes", "meta.json")
        )
        self.orders_folder = Path(f"{out}.orders")
        self._hashes: FileIO | None = None
        self._failed: FileIO | None = None

    # ── a run ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def checkpoint(self) -> Checkpoint | None:
        """What an earlier run left that did not end; None: there is none."""
        found = _read(self.progress_file)
        if found is None:
            return None
        try:
            checkpoint = msgspec.json.decode(found, type=Checkpoint)
        except msgspec.MsgspecError:
            checkpoint = None
        if checkpoint is None or not checkpoint.credible:
            text = "is no checkpoint that can be read; remove it, or begin anew with --force"
            raise Lost(f"{self.progress_file}: {text}")
        return checkpoint

    def open(self, checkpoint: Checkpoint) -> None:
        """Goes on from there: what was written behind it is forgotten. Raises Lost."""
        self.close()
        for file in (self.hashes_file, self.failed_file, self.meta_file):
            if file.is_dir():  # else that was told once all is done
                raise _unwritten(file, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
        self._hashes = _opened(self.hashes_file, checkpoint.hashes_bytes)
        self._failed = _opened(self.failed_file, checkpoint.failed_bytes)

    def add(self, hashes: Sequence[bytes], failed: Sequence[Failed]) -> None:
        """The next rows."""
        assert self._hashes is not None  # noqa: S101
        assert self._failed is not None  # noqa: S101
        try:
            _put(self._hashes, b"".join(hashes))
            _put(self._failed, b"".join(msgspec.json.encode(each) + b"\n" for each in failed))
        except OSError as error:
            raise _unwritten(self.hashes_file, error) from error

    def note(self, checkpoint: Checkpoint) -> Checkpoint:
        """Makes what was added safe, then says how far the run is; the checkpoint with all that."""
        assert self._hashes is not None  # noqa: S101
        assert self._failed is not None  # noqa: S101
        try:
            for file in (self._hashes, self._failed):
                os.fdatasync(file.fileno())
            checkpoint = msgspec.structs.replace(
                checkpoint, hashes_bytes=self._hashes.tell(), failed_bytes=self._failed.tell()
            )
            _write(self.progress_file, msgspec.json.encode(checkpoint))
        except OSError as error:
            raise _unwritten(self.progress_file, error) from error
        return checkpoint

    def retract(self) -> None:
        """What was known of an output that is there holds no longer, for it is about to be replaced."""
        try:
            self.meta_file.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritten(self.meta_file, error) from error

    def finish(self, meta: Mapping[str, Any], *, failed: int) -> None:
        """The output is there: what belongs to it stays, what was for the way goes. Who dies in it can go on."""
        self.close()
        try:
            _partial(self.hashes_file).replace(self.hashes_file)
            if failed:
                _partial(self.failed_file).replace(self.failed_file)
            else:
                _partial(self.failed_file).unlink(missing_ok=True)
                self.failed_file.unlink(missing_ok=True)
            _write(self.meta_file, orjson.dumps(meta, option=orjson.OPT_INDENT_2) + b"\n")
            with suppress(FileNotFoundError):
                shutil.rmtree(self.orders_folder)
            self.progress_file.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritten(self.meta_file, error) from error

    def close(self) -> None:
        """Lets go of files."""
        for file in (self._hashes, self._failed):
            if file is not None:
                file.close()
        self._hashes = self._failed = None

    def forget(self) -> None:
        """Removes what an earlier run left that did not end, but for its orders."""
        try:
            for file in (self.progress_file, _partial(self.hashes_file), _partial(self.failed_file)):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritten(self.progress_file, error) from error

    # ── an output that is there ─────────────────────────────────────────────────────────────────────────────────────

    def meta(self) -> dict[str, Any] | None:
        """What is known of a finished output; None: there is none that can be read."""
        found = _read(self.meta_file)
        with suppress(msgspec.MsgspecError):
            msgspec.json.decode(found or b"", type=_Meta)
            return msgspec.json.decode(found or b"", type=dict[str, Any])
        return None

    def known(self, *, omitted: bool) -> "Known | None":
        """Which texts the rows of a finished output are of, from which failed ones were `omitted`; None: not known."""
        found, failed = _read(self.hashes_file), () if omitted else self.failed()
        if found is None or len(found) % HASH_BYTES or failed is None:
            return None
        return Known(found, [each.row for each in failed])

    def failed(self) -> Sequence[Failed] | None:
        """Rows of a finished output that have no vector; None: it cannot be read which."""
        with suppress(msgspec.MsgspecError):
            lines = (_read(self.failed_file) or b"").splitlines()
            return [msgspec.json.decode(line, type=Failed) for line in lines]
        return None


class Known:
    """Rows of a finished output by the hash of their text, 16 bytes each; those `without` a vector are not known."""

    def __init__(self, hashes: bytes, without: Sequence[int]) -> None:
        self._hashes = np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES)
        heads = self._hashes[:, :8].copy().view(np.uint64).reshape(-1)
        there = np.ones(len(heads), bool)
        there[[row for row in without if row < len(heads)]] = False
        self._rows: npt.NDArray[np.int64] = np.flatnonzero(there)
        order = np.argsort(heads[self._rows], kind="stable")
        self._rows = self._rows[order]
        self._heads = heads[self._rows]

    def row(self, digest: bytes) -> int | None:
        """The first row that is of this text."""
        at = int(np.searchsorted(self._heads, np.frombuffer(digest[:8], np.uint64)[0]))
        while at < len(self._heads) and self._heads[at].tobytes() == digest[:8]:
            row = int(self._rows[at])
            if self._hashes[row].tobytes() == digest:
                return row
            at += 1
        return None


def hash_of(row: Row) -> bytes:
    """Of a row's text."""
    return blake2b(row.text.encode(errors="surrogatepass"), digest_size=HASH_BYTES).digest()


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _partial(file: Path) -> Path:
    return Path(f"{file}.partial")


def _opened(file: Path, size_bytes: int) -> FileIO:
    """What will be `file`, cut to this size; who died in `finish` may have left it under its own name already."""
    partial = _partial(file)
    try:
        if size_bytes and not partial.exists() and file.exists() and file.stat().st_size == size_bytes:
            file.replace(partial)
        if size_bytes > (partial.stat().st_size if partial.exists() else 0):
            raise Lost(f"{partial}: is shorter than the checkpoint says; begin anew with --force")
        opened = FileIO(partial, "r+b" if partial.exists() else "w+b")
        opened.truncate(size_bytes)
        opened.seek(size_bytes)
    except OSError as error:
        raise _unwritten(partial, error) from error
    return opened


def _put(file: FileIO, data: bytes) -> None:
    """All of it; a disk that gets full takes a part and says so only the next time."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def _write(file: Path, data: bytes) -> None:
    """As a whole or not at all, and safe."""
    draft = Path(f"{file}.draft")
    with draft.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)
    fsync(file.parent)


def _unwritten(file: Path, error: OSError) -> DataError:
    return DataError(f"{file}: cannot be written: {error.strerror}")
