"""Hides how the pieces of a job become its output file and its error file, in the order of the input's lines."""

from collections.abc import AsyncIterator
from hashlib import blake2b
from typing import Final

from app.job import Job, StoredFile, Task, file_blob, parts_prefix, piece_blobs
from app.job_ports import Blobs, JobStore
from app.jobs.embedding import Wire
from app.jobs.reading import lines_of

_LEFT_OVER: Final = {"expired": "batch_expired", "cancelled": "batch_cancelled"}
_ID_CHARS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_LENGTH = 24


async def join(task: Task, store: JobStore, blobs: Blobs, wire: Wire, *, keep_s: int) -> bool:
    """Writes both files, as far as there is something in them, and closes the job; False: somebody else holds it.

    They are kept for `keep_s` unless the order says for how long. Whoever does it again writes the same bytes under the
    same names. Raises OSError.
    """
    job = task.job
    pieces = [(number, fence, piece) for number, fence, piece in await store.pieces(job.id)]
    good = [piece_blobs(job.id, number, fence, each.number)[0] for number, fence, each in pieces if each.output_bytes]
    bad = [piece_blobs(job.id, number, fence, each.number)[1] for number, fence, each in pieces if each.error_bytes]
    output = await _written(job, "output", blobs, _read(blobs, good), keep_s)
    errors = await _written(job, "error", blobs, _with_leftovers(job, store, blobs, wire, bad), keep_s)
    if not await store.close(task, output=output, errors=errors):
        return False
    await blobs.delete_under(parts_prefix(job.id))
    return True


async def _read(blobs: Blobs, names: list[str]) -> AsyncIterator[bytes]:
    for name in names:
        async for data in blobs.reading(name):
            yield data


async def _with_leftovers(
    job: Job, store: JobStore, blobs: Blobs, wire: Wire, names: list[str]
) -> AsyncIterator[bytes]:  # fmt: skip
    """Lines that failed, then those that were not tried since the job was over before their turn came."""
    async for data in _read(blobs, names):
        yield data
    code = _LEFT_OVER.get(job.ending)
    for task in await store.tasks(job.id) if code else ():
        if code and task.shard is not None and task.done_lines < task.shard.lines:
            async for line in lines_of(blobs, job.order.input_file_id, task.shard, skip=task.done_lines):
                yield wire.undone(job, line.custom_id, code)


async def _written(
    job: Job, what: str, blobs: Blobs, data: AsyncIterator[bytes], keep_s: int
) -> StoredFile | None:  # fmt: skip
    """The file, with its lifespan from the time 0 on; None where there was nothing to write."""
    first = await anext(data, None)
    if first is None:
        return None
    file_id, size_bytes = _file_id(job.id, what), len(first)
    async with blobs.writing(file_blob(file_id)) as writer:
        await writer.write(first)
        async for more in data:
            size_bytes += len(more)
            await writer.write(more)
    name, lifespan_s = f"{job.id}_{what}.jsonl", job.order.output_expires_after_s or keep_s
    return StoredFile(file_id, job.order.tenant, "batch_output", name, size_bytes, 0, lifespan_s)


def _file_id(job_id: str, what: str) -> str:
    number = int.from_bytes(blake2b(f"{job_id} {what}".encode(), digest_size=_ID_LENGTH).digest())
    chars = []
    for _ in range(_ID_LENGTH):
        number, at = divmod(number, len(_ID_CHARS))
        chars.append(_ID_CHARS[at])
    return "file-" + "".join(chars)
