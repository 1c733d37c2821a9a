"""The Python face: texts in, float32 arrays out, by a model in this process or by a running embedgate.

    from app.client import embed_text, embed_texts, embed_batch, generate_embeddings

    embed_text("hello")                                        # shape (384,): the model on this machine
    embed_texts(["one", "two"], model="text-embedding-3-small")     # shape (2, 1536), as embedgate.toml says
    embed_texts(["one"], model="…", base_url="http://127.0.0.1:8080/v1", api_key="…")
    generate_embeddings(lines, on_progress=print)              # any number of texts, however long it takes

Each has a twin for asyncio: `aembed_text`, `aembed_texts`, `aembed_batch`, `agenerate_embeddings`. What embeds is made
at the first call and kept until the process ends.
"""

import asyncio
import operator
import os
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from app.corpus.stream import embed_each, reason_of
from app.domain import EmbeddingResult, InputType
from app.embed_desk import Asking, Away, Desk, patiently
from app.errors import (
    ConfigurationError,
    DeadlineExceeded,
    EmbedgateError,
    InvalidRequest,
    RejectedInput,
    TryAgainLater,
    UpstreamFailed,
)
from app.homes import EmbeddingError, Home, Place, home_at, waiting_room
from app.jobs.patience import Patient
from app.settings import find, server_url

__all__ = [
    "BatchResult",
    "ConfigurationError",
    "EmbeddingError",
    "EmbeddingGenerationError",
    "EmbeddingPoolExhausted",
    "EmbeddingRateLimitError",
    "aembed_batch",
    "aembed_text",
    "aembed_texts",
    "agenerate_embeddings",
    "embed_batch",
    "embed_text",
    "embed_texts",
    "generate_embeddings",
]

Vectors = npt.NDArray[np.float32]
_T = TypeVar("_T")

TIMEOUT_S: Final = 60.0
_BATCH_TEXTS, _AT_ONCE = 100, 16
_QUOTA_S = 60.0  # what quotas are counted over
_NO_TEXT = "Half a surrogate pair is no text."


# ── what can go wrong ───────────────────────────────────────────────────────────────────────────────────────────────


class EmbeddingRateLimitError(EmbeddingError):
    """A provider or a server says that its limit is reached: ask again after about `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float = _QUOTA_S) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EmbeddingPoolExhausted(EmbeddingError):
    """All providers are out, or they or their queue were taken for as long as the call may last."""


class EmbeddingGenerationError(EmbeddingError):
    """Texts were refused or could not be embedded; the others can be: leave out `rows`, or see `failed="nan"`."""


class Usage(NamedTuple):
    """What texts took; `cost_usd` None: no price is known."""

    tokens: int
    cost_usd: float | None
    cached_texts: int


class BatchResult(NamedTuple):
    """Vectors, float32, shape (n, d), and how they came: provider calls (a shared one counts in parts) and retries."""

    embeddings: Vectors
    calls: float
    retries: int
    latency_ms: float
    usage: Usage


# ── asyncio ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _meant(
    model: str | None, dimensions: int | None, input_type: InputType | None, config: str | os.PathLike[str] | None,
    base_url: str | None, api_key: str | None,
) -> tuple[Place, Asking]:  # fmt: skip
    """Where is embedded, and what is wanted there."""
    if input_type not in (None, *get_args(InputType)):
        raise ValueError(f"input_type is one of {', '.join(get_args(InputType))}, or None")
    path = find(Path(config) if config else None, os.environ)
    asking, path = Asking(model or "", operator.index(dimensions or 0), input_type), path and path.absolute()
    if not base_url:
        return Place(path), asking
    key = api_key or os.environ.get("EMBEDGATE_API_KEY", "")
    return Place(path, server_url(base_url), key, asking.model), asking


async def _opened(place: Place, asking: Asking) -> tuple[Home, Desk]:
    """Raises ConfigurationError, EmbeddingError, and Away."""
    home = await asyncio.to_thread(home_at, place)
    return home, (await asyncio.wrap_future(home.ready)).asked(asking)


async def _opened_in_time(place: Place, asking: Asking, timeout_s: float) -> tuple[Home, Desk]:
    """Raises ConfigurationError and EmbeddingErrors."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _opened(place, asking)
    except Away as away:
        if away.throttles:
            raise EmbeddingRateLimitError(str(away), away.retry_after_s or _QUOTA_S) from None
        raise EmbeddingPoolExhausted(str(away)) from None
    except TimeoutError:
        text = f"The first call takes longer than {timeout_s:g} s. Ask again, or allow more time."
        if place.base_url:
            text = f"{place.base_url} has not answered in {timeout_s:g} s. See whether it runs, or allow more time."
        raise EmbeddingPoolExhausted(text) from None


def _several(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, str | bytes):
        raise TypeError("texts is one string: give a list of strings")
    return iter(texts)


def _strings(texts: Iterable[str], first: int = 0) -> list[str]:
    """All of them; TypeError for what is none, counted from `first`."""
    found = list(texts)
    for row, text in enumerate(found, first):
        if not isinstance(text, str):
            raise TypeError(f"texts[{row}] is no string, but {type(text).__name__}")
    return found


async def aembed_batch(
    texts: Sequence[str], *, model: str | None = "", dimensions: int | None = 0, input_type: InputType | None = None,
    config: str | os.PathLike[str] | None = "", base_url: str | None = "", api_key: str | None = "",
    timeout_s: float | None = TIMEOUT_S,
) -> BatchResult:  # fmt: skip
    """Vectors of all `texts`, in order, and how they came; or an EmbeddingError for all of them.

    `model` "" is the first that is configured, `dimensions` 0 its own width, None everywhere the default. Raises
    ConfigurationError, too.
    """
    texts, began_s = _strings(_several(texts)), time.monotonic()
    timeout_s = TIMEOUT_S if timeout_s is None else max(0.0, timeout_s)
    place, asking = _meant(model, dimensions, input_type, config, base_url, api_key)
    home, desk = await _opened_in_time(place, asking, timeout_s)
    result = None
    if texts:
        result = await asyncio.wrap_future(home.submit(_asked(home, desk, texts, began_s + timeout_s)))
    return _told(desk.dimensions, result, 1000 * (time.monotonic() - began_s))


async def aembed_texts(texts: Sequence[str], **how: Any) -> Vectors:
    """The vectors of `texts` alone, float32, shape (n, d); see `aembed_batch`."""
    return (await aembed_batch(texts, **how)).embeddings


async def aembed_text(text: str, **how: Any) -> Vectors:
    """The vector of one text, float32, shape (d,); see `aembed_batch`."""
    found: Vectors = (await aembed_texts([text], **how))[0]
    return found


async def agenerate_embeddings(
    texts: Iterable[str], *, failed: str = "raise", on_progress: Callable[[int], None] | None = None,
    model: str | None = "", dimensions: int | None = 0, input_type: InputType | None = None,
    config: str | os.PathLike[str] | None = "", base_url: str | None = "", api_key: str | None = "",
) -> Vectors:  # fmt: skip
    """The vectors of any number of texts, in order, through limits and outages; float32, shape (n, d).

    With `failed="nan"` a text that nobody will embed is a row of NaN; else EmbeddingGenerationError names them all, at
    the end. `on_progress` hears how many are done. For more than memory holds: `embedgate embed`.
    """
    if failed not in {"raise", "nan"}:
        raise ValueError("failed is 'raise' or 'nan'")
    place, asking = _meant(model, dimensions, input_type, config, base_url, api_key)
    patience_s = (await asyncio.to_thread(home_at, place)).patience_s
    try:
        home, desk = await patiently(partial(_opened, place, asking), patience_s)
    except Away as away:
        raise EmbeddingError(f"{away}; nobody has answered for {patience_s:g} s: ask again") from None
    rows = await _all(home, desk, texts, on_progress)
    lost = {row: why for row, why in enumerate(rows) if isinstance(why, str)}
    if lost and failed == "raise":
        message = f"{len(lost)} of {len(rows)} texts cannot be embedded: {_named([*lost])}. "
        message += "Row {}: {} ".format(*next(iter(lost.items())))
        raise EmbeddingGenerationError(f"{message}Leave them out, or failed='nan'.", [*lost])
    return _stacked(desk.dimensions, rows)


# ── without asyncio ─────────────────────────────────────────────────────────────────────────────────────────────────


def embed_batch(texts: Sequence[str], **how: Any) -> BatchResult:
    """See `aembed_batch`."""
    return _now(aembed_batch(texts, **how))


def embed_texts(texts: Sequence[str], **how: Any) -> Vectors:
    """See `aembed_texts`."""
    return _now(aembed_texts(texts, **how))


def embed_text(text: str, **how: Any) -> Vectors:
    """See `aembed_text`."""
    return _now(aembed_text(text, **how))


def generate_embeddings(texts: Iterable[str], **how: Any) -> Vectors:
    """See `agenerate_embeddings`."""
    return _now(agenerate_embeddings(texts, **how))


def _now(work: Coroutine[Any, Any, _T]) -> _T:
    """Also in a notebook, whose thread has a loop already."""
    try:
        in_a_loop = asyncio.get_running_loop() is not None
    except RuntimeError:
        in_a_loop = False
    if not in_a_loop:
        return asyncio.run(work)
    done = asyncio.run_coroutine_threadsafe(work, waiting_room())
    try:
        return done.result()
    except BaseException:
        done.cancel()  # who interrupts a cell wants no more vectors
        raise


# ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _asked(home: Home, desk: Desk, texts: Sequence[str], ends_s: float) -> EmbeddingResult:
    """On the loop of the home; says what is wrong in the caller's words."""
    try:
        return await home.embed(desk, desk.asking.request(texts, deadline=ends_s))
    except RejectedInput as error:
        rows = [] if error.position is None else [error.position]
        raise EmbeddingGenerationError(f"{error} Leave that text out.", rows) from None
    except UnicodeEncodeError as error:
        rows = [row for row, text in enumerate(texts) if text == error.object]
        raise EmbeddingGenerationError(f"{_NO_TEXT} Leave that text out.", rows) from None
    except InvalidRequest as error:
        rows = await desk.too_long(texts)
        hint = f"Leave out {_named(rows)}." if rows else "(generate_embeddings takes any number of texts)"
        raise EmbeddingGenerationError(f"{error} {hint}", rows) from None
    except UpstreamFailed as error:
        who = f"{desk.unanswered()}: " if desk.unanswered() else ""
        text = f"{who}{error} Ask again; generate_embeddings does, for as long as it takes."
        raise EmbeddingGenerationError(text) from None
    except (TryAgainLater, DeadlineExceeded) as error:
        raise _not_now(desk, error) from None
    except EmbedgateError as error:
        raise EmbeddingGenerationError(str(error)) from None


def _not_now(desk: Desk, error: EmbedgateError) -> EmbeddingError:
    """Why a call has waited in vain."""
    if (wait_s := desk.limited_s()) is not None:
        text = f"The limit is reached. Ask again in {wait_s:.0f} s; generate_embeddings waits for its turn."
        return EmbeddingRateLimitError(text, wait_s)
    if who := desk.unanswered():
        text = "See whether it runs, or allow more time; generate_embeddings waits for it."
        return EmbeddingPoolExhausted(f"{who} has not answered in time. {text}")
    return EmbeddingPoolExhausted(f"{error} Ask fewer texts at once, or allow more time.")


async def _all(
    home: Home, desk: Desk, texts: Iterable[str], on_progress: Callable[[int], None] | None
) -> list[bytes | str]:  # fmt: skip
    """A vector for each text, or why not; `_AT_ONCE` requests at a time. What is the caller's is used on their loop."""
    patient = Patient(partial(home.embed, desk), attempts=2, rng=random.Random())  # noqa: S311 — jitter
    rows: list[bytes | str] = []
    given, taken = _several(texts), 0
    under_way: deque[asyncio.Future[list[bytes | str]]] = deque()
    try:
        while True:
            while len(under_way) < _AT_ONCE and (chunk := _strings(islice(given, _BATCH_TEXTS), taken)):
                taken += len(chunk)
                under_way.append(asyncio.wrap_future(home.submit(_each(desk, patient, chunk))))
            if not under_way:
                return rows
            rows += await _in_time(under_way[0], home.patience_s, len(rows))
            under_way.popleft()
            if on_progress is not None:
                on_progress(len(rows))
    finally:
        for each in under_way:
            each.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _in_time(chunk: asyncio.Future[list[bytes | str]], patience_s: float, row: int) -> list[bytes | str]:
    """What it brings for this row and the next ones; an EmbeddingError if that takes too long."""
    try:
        async with asyncio.timeout(patience_s):
            return await chunk
    except TimeoutError:
        message = f"nobody has embedded row {row} for {patience_s:g} s; what is done is in the cache: ask again"
        raise EmbeddingError(message) from None


async def _each(desk: Desk, patient: Patient, texts: Sequence[str]) -> list[bytes | str]:
    """On the loop of the home: the vector of each, or why there is none."""
    whole = [text for text in texts if _is_text(text)]
    brought = iter((await embed_each(patient, desk.asking.request, whole, {}))[0] if whole else [])
    rows = [next(brought) if _is_text(text) else _NO_TEXT for text in texts]
    return [reason_of(row) if isinstance(row, EmbedgateError) else row for row in rows]


def _is_text(text: str) -> bool:
    """Whether it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _named(rows: Sequence[int]) -> str:
    return ("rows " if len(rows) > 1 else "row ") + ", ".join(map(str, rows[:10])) + (", …" if len(rows) > 10 else "")


def _told(width: int, result: EmbeddingResult | None, latency_ms: float) -> BatchResult:
    if result is None:
        return BatchResult(_stacked(width, []), 0.0, 0, latency_ms, Usage(0, 0.0, 0))
    cost = None if result.cost_nano_usd is None else result.cost_nano_usd / 1e9
    usage = Usage(result.tokens, cost, result.cache_hits + result.joined)
    return BatchResult(_stacked(width, result.vectors), result.calls, result.retries, latency_ms, usage)


def _stacked(width: int, rows: Sequence[bytes | str]) -> Vectors:
    stacked = np.full((len(rows), width), np.nan, np.float32)
    for row, data in zip(stacked, rows, strict=True):
        if isinstance(data, bytes):
            row[:] = np.frombuffer(data, "<f4")
    return stacked
