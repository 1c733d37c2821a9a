"""Hides how two runs that would write the same output are kept apart, on one machine and on shared folders."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.corpus.rows import DataError


@contextmanager
def alone(out: str) -> Iterator[None]:
    """Nobody else is in here with this output meanwhile; a file `.lock` beside it says so, and goes when it is left.

    Raises DataError at once where somebody is. Who dies in it is out.
    """
    path = Path(f"{out}.lock")
    descriptor = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path) -> int:
    try:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:  # else it is the lock of who has just left
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
    except BlockingIOError:
        raise DataError(f"{path.with_suffix('')}: another run is writing it; wait until it has ended") from None
    except FileNotFoundError:
        raise DataError(f"{path.with_suffix('')}: there is no folder {path.parent}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
