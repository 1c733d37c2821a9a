"""What a shared store is to the cache that asks several of them in turn: sealed values by key, nothing more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from app.domain import Space


class LevelDown(Exception):
    """The store cannot be asked now, or did not answer in time; without address, key or text."""


@dataclass(frozen=True, slots=True)
class LevelStats:
    """How full a level is: keys, values and what the store needs to hold them, as it counts; 0 is no bound."""

    entries: int
    used_bytes: int
    max_bytes: int = 0


class Level(Protocol):
    """One shared store of sealed values. Every method raises LevelDown, soon, when the store is absent or slow."""

    name: str
    """In metrics: `redis`, `sql`."""

    async def read(
        self, space: Space, keys: Sequence[bytes], *, within_s: float | None = None
    ) -> dict[bytes, bytes]:  # fmt: skip
        """The values kept under `keys`, as far as there are any; one round trip for up to 256 keys.

        Whoever has time says how much, where the level would be down sooner.
        """

    async def write(self, space: Space, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Keeps `entries`, in bulk; what is there under a key already is replaced."""

    async def delete(self, space: Space, keys: Sequence[bytes]) -> None:
        """Forgets what turned out not to be what was put there."""

    async def stats(self) -> LevelStats:
        """How full it is now."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """How often vectors were invalidated, and before which Unix second what was made is no longer wanted."""

    number: int = 0
    not_before_s: int = 0


def epoch_of_model(model: str) -> str:
    """Under which name what was invalidated of a model, as its vendor calls it, is kept."""
    return f"model {model}"


def epochs_of(space: Space) -> tuple[str, str, str]:
    """The names under which something may be kept that concerns the vectors of `space`."""
    return "*", epoch_of_model(space.model), space.id


class Epochs(Protocol):
    """What was invalidated, for all replicas: by space id, by model, or `*` for everything."""

    async def read(self) -> Mapping[str, Epoch]:
        """Those that there are. Raises LevelDown."""
