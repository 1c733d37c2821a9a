"""Hides where the first accepted vectors of each Space are kept, by which later ones are judged: files, for now."""

import asyncio
import io
import os
import time
from pathlib import Path

import numpy as np

from app.vectors import Matrix


class FileLandmarks:
    """The `Landmarks` of a lone process, a file for each place in `directory`.

    Where nothing can be written they last as long as the process.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kept: dict[str, Matrix] = {}
        self._claimed: dict[str, float] = {}

    async def vectors(self, place: str) -> Matrix | None:
        """See `ports.Landmarks`; a file that does not read back counts as none."""
        if place not in self._kept:
            found = await asyncio.to_thread(self._read, place)
            if found is None:
                return None
            self._kept[place] = found
        return self._kept[place]

    async def accept(self, place: str, vectors: Matrix) -> None:
        """See `ports.Landmarks`."""
        self._kept[place] = vectors
        content = io.BytesIO()
        np.save(content, vectors.astype("<f4"), allow_pickle=False)
        await asyncio.to_thread(self._write, f"{place}.npy", content.getvalue())

    async def claim(self, place: str, interval_s: float) -> bool:
        """See `ports.Landmarks`; by the clock of this machine, since it must outlive the process."""
        now = time.time()
        last = max(self._claimed.get(place, 0.0), await asyncio.to_thread(self._time_of, place))
        if now - interval_s < last <= now:
            return False
        self._claimed[place] = now
        await asyncio.to_thread(self._write, f"{place}.probed", b"")
        return True

    async def release(self, place: str) -> None:
        """See `ports.Landmarks`."""
        self._claimed.pop(place, None)
        await asyncio.to_thread((self._directory / f"{place}.probed").unlink, missing_ok=True)

    def _read(self, place: str) -> Matrix | None:
        try:
            found = np.load(self._directory / f"{place}.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return found if found.dtype == np.float32 and found.ndim == 2 else None

    def _time_of(self, place: str) -> float:
        try:
            return (self._directory / f"{place}.probed").stat().st_mtime
        except OSError:
            return 0.0

    def _write(self, name: str, content: bytes) -> None:
        """Whole or not at all."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            written = self._directory / f"{name}.{os.getpid()}"
            written.write_bytes(content)
            written.replace(self._directory / name)
        except OSError:
            return
