"""Hides how `embedgate embed` shares its work: one part of it, all parts joined, or workers of Ray that do them."""

import asyncio
import os
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import typer

from app.cli.running import run
from app.settings import Settings, load

if TYPE_CHECKING:
    from app.corpus.on_ray import Said, Work
    from app.corpus.rows import Source
    from app.corpus.run import Outcome, Wish
    from app.corpus.trail import Checkpoint
    from app.settings.grammar import EmbedSettings

    Told = Callable[[Checkpoint], None]

_PARTITION_ROWS: Final = 2000
_MOST_PARTITIONS: Final = 512
_LOOK_S = 1.0


class Sharing(NamedTuple):
    """What the options say: `part` "2/4", `join` 4, `on` "ray"; nothing: all of it is done here."""

    part: str = ""
    join: int = 0
    on: str | None = None
    workers: int = 0
    partitions: int = 0
    address: str = ""

    def check(self, inputs: Sequence[str], out: str, *, server: str, retry_failed: bool) -> None:
        """Raises DataError for options that do not go together."""
        from app.corpus.address import is_address, shown

        if is_address(out) and (self.part or self.join or self.on):  # whose password must not be part of a file's name
            wrong = f"{shown(out)}: parts are joined from files: use .npy, .parquet, .arrow or .jsonl"
        elif sum(map(bool, (self.part, self.join, self.on))) > 1:
            wrong = "--part, --join and --on are three ways to do it: give one"
        elif not self.on and (self.workers or self.partitions or self.address):
            wrong = "--workers, --partitions and --ray-address belong to --on ray"
        elif self.on and not server:
            wrong = "--on ray needs --server URL: its workers share one running embedgate, its quotas and its cache"
        elif self.on and "-" in inputs:
            wrong = "--on ray: the standard input cannot be read by its workers; name files that all of them see"
        elif self.on and retry_failed:
            wrong = "--retry-failed asks for few rows: give it without --on ray"
        else:
            return
        raise _error(wrong)

    def mine(self, source: "Source", out: str) -> tuple["Source", str]:
        """What is to be embedded here, and where it goes. Raises DataError for what has no parts."""
        from app.corpus.parts import Part, part_of

        part = part_of(self.part) if self.part else Part(1, 1)
        named = part.out(out) if out and (self.part or self.join or self.on) else ""
        return (part.of(source), named) if self.part else (source, out)


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker needs; picklable, and it does not tell the key to who prints it."""

    opened: "Callable[[], Source]"
    fingerprint: str
    embedded: "Callable[[Source, Settings, Any], Coroutine[Any, Any, Outcome]]"
    given: Any
    """What was asked for; each part goes beside its `out`."""
    count: int
    pace: "EmbedSettings"
    """All of the configuration that a worker needs."""
    api_key: str = field(repr=False)
    folder: str = field(default_factory=os.getcwd)

    def __call__(self) -> "Work":
        """Where the worker is: in the folder of who called, if it is there, with the source open."""
        from app.corpus.parts import Part

        with suppress(OSError):
            os.chdir(self.folder)
        os.environ["EMBEDGATE_API_KEY"] = self.api_key
        source = self.opened()
        if source.fingerprint != self.fingerprint:
            raise _error(f"{source.name} is another one where this worker is: all have to see the same files")

        def work(number: int) -> None:
            part = Part(number, self.count)
            given = self.given._replace(out=part.out(self.given.out), quiet=True)
            with tempfile.TemporaryDirectory(prefix="embedgate-") as data_dir:
                settings = load(None, {"EMBEDGATE_STORES__DATA_DIR": data_dir})
                settings = settings.model_copy(update={"embed": self.pace})
                asyncio.run(self.embedded(part.of(source), settings, given))

        return work


def joined_from(count: int, source: "Source", given: Any, told: "Told") -> "Outcome":
    """What was asked for, of so many parts that are finished. Raises DataError."""
    from app.corpus.parts import Joint, joined

    joint = Joint(
        source, given.out, given.out, count, given.asking.model, given.asking.dimensions, given.omits, given.facts,
        given.force, given.retry_failed,
    )  # fmt: skip
    return run(lambda: joined(joint, told))


def by_ray(sharing: Sharing, wish: "Wish", task: Callable[[str, int], Task], told: "Told") -> "Outcome":
    """The output of a `wish`, done in partitions by workers, then joined; `task` is theirs for a folder and a count.

    Partitions lie in OUT.parts until the output is there: who comes again does only those that are not finished.
    Raises DataError, GaveUp.
    """
    from app.corpus.alone import alone
    from app.corpus.run import there

    folder = Path(f"{wish.out}.parts")
    with alone(str(folder)):
        outcome = there(wish) or _joined(sharing, wish, str(folder / Path(wish.out).name), task, told)
        if folder.exists():
            shutil.rmtree(folder)
    return outcome


def _joined(sharing: Sharing, wish: "Wish", parts: str, task: Callable[[str, int], Task], told: "Told") -> "Outcome":
    """Of the partitions that belong to the output `parts`, those that are not finished are done before."""
    from app.corpus.parts import Joint, joined

    count = sharing.partitions or min(_MOST_PARTITIONS, -(-wish.source.rows // _PARTITION_ROWS))
    if left := _left(wish, parts, count):
        _make(Path(parts).parent)
        _spread(sharing, left, task(parts, count), told)
    joint = Joint(
        wish.source, wish.out, parts, count, wish.model, wish.dimensions, wish.manner.omits, wish.facts, wish.anew
    )
    return run(lambda: joined(joint, told))


def _left(wish: "Wish", parts: str, count: int) -> list[int]:
    """The partitions that are not finished."""
    from app.corpus.parts import parts_of
    from app.corpus.run import there

    pieces = [(part.number, part.of(wish.source), part.out(parts)) for part in parts_of(count)]
    return [number for number, source, out in pieces if there(replace(wish, source=source, out=out)) is None]


def _spread(sharing: Sharing, left: Sequence[int], task: Task, told: "Told") -> None:
    """These partitions, done; raises DataError and GaveUp for those that are not, once there is nothing more to do."""
    from app.corpus.on_ray import spread
    from app.corpus.stream import GaveUp

    failed: list[Said] = []
    try:
        with _followed(task.given.out, task.count, told):
            address = sharing.address or os.environ.get("RAY_ADDRESS", "")
            for said in spread(left, task, workers=sharing.workers, address=address):
                failed += [said] if said.why else []
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if any(not said.gave_up for said in failed):
        raise _error("\n".join(_reasons(failed, task.count)))
    if failed:
        raise GaveUp("; ".join(_reasons(failed, task.count)))


def _reasons(failed: "Sequence[Said]", count: int) -> list[str]:
    """A line for each reason, with the partitions that it stopped."""
    numbers = defaultdict[str, list[int]](list)
    for said in failed:
        numbers[said.why].append(said.number)
    return [f"partition {', '.join(map(str, sorted(each)))} of {count}: {why}" for why, each in numbers.items()]


@contextmanager
def _followed(out: str, count: int, told: "Told") -> Iterator[None]:
    """Tells every second how far all are together, as their checkpoints say, at the pace since the first one began."""
    from app.corpus.parts import far
    from app.corpus.rows import DataError
    from app.corpus.trail import Checkpoint

    before, began_s, over = far(out, count).rows, time.monotonic(), threading.Event()

    def look() -> None:
        nonlocal began_s
        spent = far(out, count)
        if spent.rows == before:
            began_s = time.monotonic()
            return
        rows_per_s = (spent.rows - before) / (time.monotonic() - began_s)
        told(Checkpoint({}, "", spent.rows, spent=spent, seconds=spent.rows / rows_per_s))

    def follow() -> None:
        while not over.wait(_LOOK_S):
            with suppress(DataError):
                look()

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()
    look()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise _error(f"{folder}: cannot be made: {error.strerror}") from error


def _error(text: str) -> Exception:
    from app.corpus.rows import DataError

    return DataError(text)
