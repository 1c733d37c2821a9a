"""Hides what operators do with the cache: see how full it is, fill it in advance, say what is no longer wanted."""

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Final

import msgspec
from aiolimiter import AsyncLimiter

from app.domain import EmbeddingRequest, InputType, Priority, Tenant, Truncation
from app.engine.intake import space_for
from app.errors import InvalidRequest, UnknownModel
from app.runtime import Runtime
from app.storage.level import LevelStats, epoch_of_model

MOST_TEXTS: Final = 256
"""In one request of a warming: one look at each level of the cache."""

_WARM_DEADLINE_S = 600.0
_INPUT_TYPES: tuple[InputType | None, ...] = (None, "query", "document")
_TRUNCATIONS: tuple[Truncation, ...] = ("none", "end", "mean")


class Invalidation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is no longer wanted: exactly one of a model, a Space, everything; or what is older than some seconds.

    The age may be combined with a model or a Space.
    """

    model: str = ""
    space: str = ""
    everything: bool = msgspec.field(default=False, name="all")
    older_than_s: int | None = None


@dataclass(slots=True)
class Warming:
    """How far a warming has come: texts seen, of these already kept, and refused, with their tokens."""

    texts: int = 0
    kept: int = 0
    failed: int = 0
    tokens: int = 0


class CacheDesk:
    """What the command line and the admin routes do with the cache of `runtime`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def stats(self) -> dict[str, LevelStats | None]:
        """How full each level is, nearest first; None: it cannot say now."""
        return await self._runtime.stores.cache.stats()

    async def invalidate(self, wanted: Invalidation) -> int:
        """Makes it unreachable in every process within 5 s and drops it from the database: how many rows.

        Raises InvalidRequest and UnknownModel; DatabaseDown when nothing could be said for sure.
        """
        name, spaces = self._named(wanted)
        stores = self._runtime.stores
        made_before_s = None if wanted.older_than_s is None else int(time.time()) - wanted.older_than_s
        if made_before_s is None:
            await stores.epochs.raise_epoch([name])
        else:
            await stores.epochs.raise_not_before(name, made_before_s)
        await stores.cache.refresh()
        return await stores.sql.forget(spaces, made_before_s=made_before_s)

    async def warm(
        self,
        model: str,
        texts: Iterable[str],
        *,
        input_type: InputType | None = None,
        cache_group: str = "",
        requests_per_minute: int = 0,
    ) -> AsyncIterator[Warming]:
        """Embeds at bulk priority what is not kept yet, and tells how far it has come.

        A request, of `MOST_TEXTS`, that is refused is tried text by text, so that one bad text does not keep the
        others out. 0 `requests_per_minute`: as fast as the quotas allow.
        """
        tenant = Tenant("cache warm", cache_group=cache_group)
        pace = AsyncLimiter(1, 60 / requests_per_minute) if requests_per_minute else nullcontext()
        done, rest = Warming(), iter(texts)
        while chunk := tuple(islice(rest, MOST_TEXTS)):
            deadline = time.monotonic() + _WARM_DEADLINE_S
            request = EmbeddingRequest(tenant, model, chunk, deadline, Priority.BULK, input_type=input_type)
            try:
                async with pace:
                    await self._embed(request, done)
            except InvalidRequest:
                for text in chunk:
                    try:
                        await self._embed(msgspec.structs.replace(request, texts=(text,)), done)
                    except InvalidRequest:
                        done.failed += 1
            done.texts += len(chunk)
            yield replace(done)

    async def _embed(self, request: EmbeddingRequest, done: Warming) -> None:
        result = await self._runtime.gateway.embed(request)
        done.kept += result.cache_hits
        done.tokens += result.tokens

    def _named(self, wanted: Invalidation) -> tuple[str, Sequence[str] | None]:
        """Under which name it is kept, and the Spaces whose rows can be dropped; None: all."""
        named = [bool(wanted.model), bool(wanted.space), wanted.everything]
        if sum(named) > 1 or not (any(named) or wanted.older_than_s is not None):
            text = "Name one of 'model', 'space', 'all', or an age in 'older_than_s'."
            raise InvalidRequest(text, code="invalid_value")
        if wanted.older_than_s is not None and wanted.older_than_s < 0:
            raise InvalidRequest("'older_than_s' must not be negative.", param="older_than_s", code="invalid_value")
        if wanted.space:
            return wanted.space, [wanted.space]
        if not wanted.model:
            return "*", None
        route = self._runtime.gateway.routes.get(wanted.model)
        if route is None:
            raise UnknownModel(wanted.model)
        ways = product(_INPUT_TYPES, _TRUNCATIONS)
        spaces = sorted({space_for(route, kind, cut).id for kind, cut in ways})
        return epoch_of_model(route.space.model), spaces
