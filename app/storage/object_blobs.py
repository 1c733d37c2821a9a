"""Hides how bytes are kept in a bucket of an S3-compatible store, whole or not at all."""

from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from app.errors import ConfigurationError
from app.job_ports import Writer
from app.storage.blobs import PIECE_BYTES, checked

if TYPE_CHECKING:
    from obstore import AsyncWritableFile

_PART_BYTES: Final = 8 * 2**20
"""Of a multipart upload, which has at most 10,000, and of a download: as much is held in memory."""

_PARTS_AT_ONCE = 2
_AT_ONCE = 1000  # names that S3 lists, or deletes, with one call


class ObjectBlobs:
    """`Blobs` at `s3://bucket/prefix`; keys, region and endpoint come from the environment, as AWS' tools name them.

    What is written in parts and never finished is invisible, but kept by the store: a lifecycle rule of the bucket
    (AbortIncompleteMultipartUpload) removes it. Raises ConfigurationError.
    """

    def __init__(self, url: str) -> None:
        try:
            self._store = S3Store.from_url(
                url,
                client_options={"allow_http": True},  # the operator's endpoint says which
                retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=30)},
            )
        except (BaseError, ValueError):
            raise ConfigurationError('bulk.blobs: must be a folder or "s3://bucket/prefix"') from None

    @asynccontextmanager
    async def writing(self, name: str) -> AsyncIterator[Writer]:
        """See `Blobs`. One that is cancelled while the block is left may be there or not."""
        file = obstore.open_writer_async(
            self._store, checked(name), buffer_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE
        )
        yield _Writer(file)
        with _as_oserror():
            await file.close()

    async def reading(self, name: str, *, offset_bytes: int = 0, size_bytes: int | None = None) -> AsyncIterator[bytes]:
        """See `Blobs`. Part by part, so that a slow reader keeps no answer of the store waiting."""
        with _as_oserror():
            end = (await obstore.head_async(self._store, checked(name)))["size"]
        if size_bytes is not None:
            end = min(end, offset_bytes + size_bytes)
        for start in range(offset_bytes, end, _PART_BYTES):
            with _as_oserror():
                part = await obstore.get_range_async(self._store, name, start=start, end=min(end, start + _PART_BYTES))
            view = memoryview(part)
            for at in range(0, len(view), PIECE_BYTES):
                yield bytes(view[at : at + PIECE_BYTES])

    async def delete(self, names: Collection[str]) -> None:
        """See `Blobs`."""
        if names:
            with _as_oserror():
                await obstore.delete_async(self._store, [checked(name) for name in names])

    async def delete_under(self, prefix: str) -> None:
        """See `Blobs`."""
        with _as_oserror():
            async for found in obstore.list(self._store, prefix=checked(prefix), chunk_size=_AT_ONCE):
                await obstore.delete_async(self._store, [each["path"] for each in found])


class _Writer:
    """Theirs, with our errors."""

    def __init__(self, file: "AsyncWritableFile") -> None:
        self._file = file

    async def write(self, data: bytes) -> None:
        with _as_oserror():
            await self._file.write(data)


@contextmanager
def _as_oserror() -> Iterator[None]:
    try:
        yield
    except (BaseError, ValueError) as error:
        raise OSError("The object store did not do it") from error
