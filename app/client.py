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
import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from app.domain import EmbeddingResult, InputType
from app.embed_desk import Asking
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
from app.settings import find

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


def _place(
    model: str, dimensions: int, input_type: InputType | None, config: str | os.PathLike[str], base_url: str,
    api_key: str,
) -> Place:  # fmt: skip
    if input_type not in (None, *get_args(InputType)):
        raise ValueError(f"input_type is one of {', '.join(get_args(InputType))}, or None")
    path = find(Path(config) if config else None, os.environ)
    key = (api_key or os.environ.get("EMBEDGATE_API_KEY", "")) if base_url else ""
    return Place(path and path.absolute(), base_url, key, Asking(model, dimensions, input_type))


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
    texts: Sequence[str], *, model: str = "", dimensions: int = 0, input_type: InputType | None = None,
    config: str | os.PathLike[str] = "", base_url: str = "", api_key: str = "", timeout_s: float = TIMEOUT_S,
) -> BatchResult:  # fmt: skip
    """Vectors of all `texts`, in order, and how they came; or an EmbeddingError for all of them.

    `model` "" is the first that is configured, `dimensions` 0 its own width. Raises ConfigurationError, too.
    """
    texts, started_s = _strings(_several(texts)), time.perf_counter()
    home = await asyncio.to_thread(home_at, _place(model, dimensions, input_type, config, base_url, api_key))
    result = None
    if texts:
        result = await asyncio.wrap_future(home.submit(_asked(home, texts, timeout_s)))
    latency_ms = 1000 * (time.perf_counter() - started_s)
    return _told(home.width, result, latency_ms)


async def aembed_texts(texts: Sequence[str], **how: Any) -> Vectors:
    """The vectors of `texts` alone, float32, shape (n, d); see `aembed_batch`."""
    return (await aembed_batch(texts, **how)).embeddings


async def aembed_text(text: str, **how: Any) -> Vectors:
    """The vector of one text, float32, shape (d,); see `aembed_batch`."""
    found: Vectors = (await aembed_texts([text], **how))[0]
    return found


async def agenerate_embeddings(
    texts: Iterable[str], *, failed: str = "raise", on_progress: Callable[[int], None] | None = None, model: str = "",
    dimensions: int = 0, input_type: InputType | None = None, config: str | os.PathLike[str] = "", base_url: str = "",
    api_key: str = "",
) -> Vectors:  # fmt: skip
    """The vectors of any number of texts, in order, through limits and outages; float32, shape (n, d).

    With `failed="nan"` a text that nobody will embed is a row of NaN; else EmbeddingGenerationError names them all, at
    the end. `on_progress` hears how many are done. For more than memory holds: `embedgate embed`.
    """
    if failed not in {"raise", "nan"}:
        raise ValueError("failed is 'raise' or 'nan'")
    home = await asyncio.to_thread(home_at, _place(model, dimensions, input_type, config, base_url, api_key))
    rows = await _all(home, texts, on_progress)
    lost = [row for row, data in enumerate(rows) if data is None]
    if lost and failed == "raise":
        shown = ", ".join(map(str, lost[:10])) + (", …" if len(lost) > 10 else "")
        message = f"{len(lost)} of {len(rows)} texts cannot be embedded: rows {shown}. Leave them out, or failed='nan'."
        raise EmbeddingGenerationError(message, lost)
    return _stacked(home.width, rows)


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


async def _asked(home: Home, texts: Sequence[str], timeout_s: float) -> EmbeddingResult:
    """On the loop of the home; says what is wrong in the caller's words."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    try:
        return await home.embed(home.desk.asking.request(texts, deadline=deadline))
    except RejectedInput as error:
        rows = [] if error.position is None else [error.position]
        raise EmbeddingGenerationError(f"{error} Leave that text out.", rows) from None
    except UnicodeEncodeError as error:
        rows = [row for row, text in enumerate(texts) if text == error.object]
        raise EmbeddingGenerationError("Half a surrogate pair is no text. Leave that text out.", rows) from None
    except InvalidRequest as error:
        hint = "(generate_embeddings takes any number of texts, and names those that are too long)"
        raise EmbeddingGenerationError(f"{error} {hint}") from None
    except UpstreamFailed as error:
        raise EmbeddingGenerationError(
            f"{error} Ask again; generate_embeddings does, for as long as it takes."
        ) from None
    except (TryAgainLater, DeadlineExceeded) as error:
        if home.is_throttled:
            message = f"The limit is reached. Ask again in {_QUOTA_S:.0f} s; generate_embeddings waits for its turn."
            raise EmbeddingRateLimitError(message) from None
        raise EmbeddingPoolExhausted(f"{error} Ask fewer texts at once, or allow more time.") from None
    except EmbedgateError as error:
        raise EmbeddingGenerationError(str(error)) from None


async def _all(
    home: Home, texts: Iterable[str], on_progress: Callable[[int], None] | None
) -> list[bytes | None]:  # fmt: skip
    """A vector for each text, or None; `_AT_ONCE` requests at a time. What is the caller's is used on their loop."""
    patient = Patient(home.embed, attempts=2, rng=random.Random())  # noqa: S311 — jitter
    patience_s = home.desk.runtime.settings.embed.give_up_after_s
    rows: list[bytes | None] = []
    given, taken = _several(texts), 0
    under_way: deque[asyncio.Future[list[bytes | None]]] = deque()
    try:
        while True:
            while len(under_way) < _AT_ONCE and (chunk := _strings(islice(given, _BATCH_TEXTS), taken)):
                taken += len(chunk)
                under_way.append(asyncio.wrap_future(home.submit(_each(home, patient, chunk))))
            if not under_way:
                return rows
            async with asyncio.timeout(patience_s):
                rows += await under_way[0]
            under_way.popleft()
            if on_progress is not None:
                on_progress(len(rows))
    except TimeoutError:
        message = f"nobody has embedded row {len(rows)} for {patience_s:g} s; what is done is in the cache: ask again"
        raise EmbeddingError(message) from None
    finally:
        for each in under_way:
            each.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _each(home: Home, patient: Patient, texts: Sequence[str]) -> list[bytes | None]:
    """On the loop of the home: together, or where that is not to be had one by one."""
    try:
        result = await patient.ask(home.desk.asking.request(texts, deadline=math.inf))
    except UnicodeEncodeError:  # half a surrogate pair
        result = None
    if isinstance(result, EmbeddingResult):
        return [*result.vectors]
    if len(texts) == 1:
        return [None]
    alone = await asyncio.gather(*(_each(home, patient, [text]) for text in texts))
    return [row for rows in alone for row in rows]


def _told(width: int, result: EmbeddingResult | None, latency_ms: float) -> BatchResult:
    if result is None:
        return BatchResult(_stacked(width, []), 0.0, 0, latency_ms, Usage(0, 0.0, 0))
    cost = None if result.cost_nano_usd is None else result.cost_nano_usd / 1e9
    usage = Usage(result.tokens, cost, result.cache_hits + result.joined)
    return BatchResult(_stacked(width, result.vectors), result.calls, result.retries, latency_ms, usage)


def _stacked(width: int, rows: Sequence[bytes | None]) -> Vectors:
    stacked = np.full((len(rows), width), np.nan, np.float32)
    for row, data in zip(stacked, rows, strict=True):
        if data is not None:
            row[:] = np.frombuffer(data, "<f4")
    return stacked
