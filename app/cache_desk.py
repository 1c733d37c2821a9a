"""Hides what operators do with the cache: see how full it is, fill it in advance, say what is no longer wanted."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from threading import Thread
from typing import Final

import msgspec
from aiolimiter import AsyncLimiter

from app.domain import EmbeddingRequest, InputType, Priority, Tenant, Truncation
from app.engine.intake import space_for
from app.errors import InvalidRequest, RejectedInput, UnknownModel
from app.runtime import Runtime
from app.storage.level import LevelStats, epoch_of_model

MOST_TEXTS: Final = 256
"""In one request of a warming: one look at each level of the cache."""

_WARM_DEADLINE_S = 600.0
_SPACE_ID = re.compile(r"s[0-9]+-[0-9a-f]{24}").fullmatch
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
        made_before_s = None if wanted.older_than_s is None else max(0, int(time.time()) - wanted.older_than_s)
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
        if model not in self._runtime.gateway.routes:
            raise UnknownModel(model)
        while chunk := await _first(rest):
            deadline = time.monotonic() + _WARM_DEADLINE_S
            request = EmbeddingRequest(
                tenant, model, chunk, deadline, Priority.BULK, input_type=input_type, cause="warm"
            )
            try:
                async with pace:
                    await self._embed(request, done)
            except (InvalidRequest, RejectedInput):
                for text in chunk:
                    try:
                        await self._embed(msgspec.structs.replace(request, texts=(text,)), done)
                    except (InvalidRequest, RejectedInput):
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
            if not _SPACE_ID(wanted.space):
                text = "'space' must be as the header x-embedgate-space has it."
                raise InvalidRequest(text, param="space", code="invalid_value")
            return wanted.space, [wanted.space]
        if not wanted.model:
            return "*", None
        route = self._runtime.gateway.routes.get(wanted.model)
        if route is None:
            raise UnknownModel(wanted.model)
        ways = product(_INPUT_TYPES, _TRUNCATIONS)
        spaces = sorted({space_for(route, kind, cut).id for kind, cut in ways})
        return epoch_of_model(route.space.model), spaces


async def _first(texts: Iterator[str]) -> tuple[str, ...]:
    """The next of them; should they come from a pipe, only the caller waits for it, and not even the program's end."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[tuple[str, ...]] = loop.create_future()

    def read() -> None:
        try:
            tell = partial(found.set_result, tuple(islice(texts, MOST_TEXTS)))
        except Exception as error:
            tell = partial(found.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed already
            loop.call_soon_threadsafe(lambda: found.done() or tell())

    Thread(target=read, daemon=True).start()
    return await found
