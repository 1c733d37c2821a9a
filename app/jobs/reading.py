"""Hides how the lines of a shard come from the blob that they are in."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec

from app.job import Shard, file_blob
from app.job_ports import Blobs


class Line(msgspec.Struct, frozen=True):
    """A line that was found sound: its caller's name for it, and its body as it was written."""

    custom_id: str
    body: msgspec.Raw


_decode = msgspec.json.Decoder(Line).decode


async def lines_of(blobs: Blobs, file_id: str, shard: Shard, *, skip: int = 0) -> AsyncIterator[Line]:
    """The lines of a shard behind the first `skip`, in order; blank ones do not count."""
    pieces = blobs.reading(file_blob(file_id), offset_bytes=shard.offset_bytes, size_bytes=shard.size_bytes)
    number, rest = 0, b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            if line.strip():
                number += 1
                if number > skip:
                    yield _decode(line)
    if rest.strip() and number >= skip:
        yield _decode(rest)


def inputs_of(body: bytes) -> int:
    """How many embeddings a sound line asks for, about: what cannot be told counts as one."""
    try:
        given: Any = msgspec.json.decode(body).get("input")
    except msgspec.DecodeError:
        return 1
    return len(given) if isinstance(given, list) and given and not isinstance(given[0], int) else 1
