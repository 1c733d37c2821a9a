"""Hides how bytes that nobody needs any more leave the blobs: of deleted and expired files, and of ended jobs."""

import asyncio
from typing import Final

from app.job import file_blob, parts_prefix
from app.job_ports import Blobs, JobStore
from app.storage.level import LevelDown
from app.telemetry import Telemetry

SWEEP_S: Final = 60.0
_FILES, _JOBS = 1000, 100  # in a turn


async def sweep(store: JobStore, blobs: Blobs, telemetry: Telemetry) -> None:
    """Sweeps for ever; any number of processes may, at once. What cannot be reached waits for the next turn."""
    while True:
        try:
            await _turn(store, blobs)
        except LevelDown:
            pass  # of which others tell
        except OSError as error:
            telemetry.store_warned(store="blobs", warning=f"cannot be swept: {error}")
        except Exception as error:
            telemetry.loop_crashed(loop="sweeper", error=error)
        await asyncio.sleep(SWEEP_S)


async def _turn(store: JobStore, blobs: Blobs) -> None:
    if files := await store.gone_files(_FILES):
        await blobs.delete([file_blob(each) for each in files])
        await store.forget_files(files)
    for job in await store.gone_parts(_JOBS):
        await blobs.delete_under(parts_prefix(job))
        await store.forget_parts([job])
