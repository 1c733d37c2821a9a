"""Hides how bytes are kept as files in a folder, whole or not at all; and which of the places for them is meant."""

import asyncio
import errno
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Final

from app.errors import ConfigurationError
from app.job_ports import Blobs, Writer

PIECE_BYTES: Final = 2**20
"""As much as is read or written at once."""

_S3 = "s3://"
_DRAFTS = ".drafts"
_LEFT_OVER_S = 86_400.0
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*").fullmatch


def open_blobs(url: str, data_dir: Path) -> Blobs:
    """Where `url` says: a folder, `s3://bucket/prefix`, "" for a folder in `data_dir`. Blocks; ConfigurationError."""
    if url.startswith(_S3):
        try:
            from app.storage.object_blobs import ObjectBlobs
        except ModuleNotFoundError:
            raise ConfigurationError('bulk.blobs: "s3://" needs the package obstore (embedgate[s3])') from None
        return ObjectBlobs(url)
    if "://" in url:
        raise ConfigurationError('bulk.blobs: must be a folder or "s3://bucket/prefix"')
    folder = Path(url).expanduser() if url else data_dir / "bulk"
    try:
        return LocalBlobs(folder)
    except OSError as error:
        raise ConfigurationError(f"bulk.blobs: {folder} cannot be written: {error.strerror}") from error


def checked(name: str) -> str:
    """The name, if it is one that leads nowhere else; no part of one begins with a dot. Raises OSError."""
    if not _NAME(name):
        raise OSError(errno.EINVAL, "No blob can have this name")
    return name


class LocalBlobs:
    """`Blobs` in a folder that all replicas see. To be made off the loop: what processes left that died is removed.

    Raises OSError when it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._drafts = folder / _DRAFTS
        _make(self._drafts)
        if not os.access(self._drafts, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        _sweep(self._drafts)

    @asynccontextmanager
    async def writing(self, name: str) -> AsyncIterator[Writer]:
        """See `Blobs`. One that is cancelled while the block is left may be there or not."""
        path, draft = self._folder / checked(name), _Draft(self._drafts / secrets.token_hex(16))
        writer = _Writer(draft)
        try:
            yield writer
            await writer.flush()
            await asyncio.to_thread(draft.publish, path)
        except BaseException:
            await asyncio.to_thread(draft.discard)
            raise

    async def reading(self, name: str, *, offset_bytes: int = 0, size_bytes: int | None = None) -> AsyncIterator[bytes]:
        """See `Blobs`. Nothing is kept open between two pieces, so whoever reads may stop anywhere."""
        path, at = self._folder / checked(name), offset_bytes
        end = None if size_bytes is None else offset_bytes + size_bytes
        while True:
            wanted_bytes = PIECE_BYTES if end is None else min(PIECE_BYTES, end - at)
            data = await asyncio.to_thread(_read, path, at, wanted_bytes)
            if not data:
                return
            yield data
            at += len(data)

    async def delete(self, names: Collection[str]) -> None:
        """See `Blobs`."""
        paths = [self._folder / checked(name) for name in names]
        await asyncio.to_thread(_delete, paths)

    async def delete_under(self, prefix: str) -> None:
        """See `Blobs`."""
        with suppress(FileNotFoundError):
            await asyncio.to_thread(shutil.rmtree, self._folder / checked(prefix))


class _Writer:
    """Goes to a thread once for many small writes."""

    def __init__(self, draft: "_Draft") -> None:
        self._draft = draft
        self._held = bytearray()

    async def write(self, data: bytes) -> None:
        self._held += data
        if len(self._held) >= PIECE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        held, self._held = self._held, bytearray()
        await asyncio.to_thread(self._draft.write, held)


class _Draft:
    """A file under a name that nobody asks for. Its methods block.

    Who waited for one of them may have been cancelled, and it still runs when the next one is called: each waits for
    the one before, and after `discard` nothing happens any more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._over = False
        self._lock = threading.Lock()

    def write(self, data: bytes | bytearray) -> None:
        with self._lock:
            if self._over:
                return
            if self._file is None:
                self._file = FileIO(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w")
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]

    def publish(self, path: Path) -> None:
        """From now on, and after power was lost, it is the file at `path`."""
        with self._lock:
            if self._over or self._file is None:
                return
            os.fsync(self._file.fileno())
            self._close()
            _make(path.parent)
            self._path.replace(path)
            _sync(path.parent)

    def discard(self) -> None:
        with self._lock:
            self._close()
            self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        self._over = True
        if self._file is not None:
            self._file.close()


def _read(path: Path, offset_bytes: int, size_bytes: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), size_bytes, offset_bytes)


def _delete(paths: Collection[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _make(folder: Path) -> None:
    """Makes the folder and those above it, so that they are there after power was lost."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(drafts: Path) -> None:
    for path in drafts.iterdir():
        with suppress(FileNotFoundError):  # somebody else sweeps, too
            if path.stat().st_mtime < time.time() - _LEFT_OVER_S:
                path.unlink()
