"""What becomes of a text that is too long: refused, cut, or the mean of its windows; in virtual time."""

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import tokens, vectors
from app.domain import ANONYMOUS, Deployment, EmbeddingRequest, EmbeddingResult, Limits, Route, Space
from app.engine.intake import Intake
from app.errors import InputRefused, InvalidRequest, RejectedInput
from app.tokens import Cl100k
from tests.identity import identifying_vector
from tests.rig import MODEL, WIDTH, Rig, ScriptedProvider, Words, engine

LONG = " ".join(f"w{number}" for number in range(23))


async def embed(rig: Rig, *texts: str | tuple[int, ...], truncation: str | None = None) -> EmbeddingResult:
    """Like `Rig.ask`, for texts whose vectors are not their own."""
    deadline = asyncio.get_running_loop().time() + 30
    request = EmbeddingRequest(ANONYMOUS, MODEL, texts, deadline, truncation=truncation)  # type: ignore[arg-type]
    return await rig.gateway.embed(request)


def mean_of(*windows: str) -> np.ndarray:
    """The mean of the windows' own vectors, each weighing its words, at unit length."""
    weights = np.array([len(window.split()) for window in windows], np.float64)
    weighed: np.ndarray = weights @ np.stack([identifying_vector(w, MODEL, WIDTH).astype(np.float64) for w in windows])
    return weighed / np.float64(np.linalg.norm(weighed))


def vector(result: EmbeddingResult, at: int = 0) -> np.ndarray:
    """The vector at a place."""
    return np.frombuffer(result.vectors[at], "<f4")


@pytest.mark.looptime
async def test_a_long_text_is_the_mean_of_its_overlapping_windows() -> None:
    """Windows of ten words that share two, weighed by their words, brought back to unit length."""
    windows = [" ".join(f"w{n}" for n in span) for span in (range(10), range(8, 18), range(16, 23))]
    async with engine(ScriptedProvider(), max_input_tokens=10, long_input="mean", overlap_tokens=2) as rig:
        result = await embed(rig, "short one", LONG)
        assert sorted(str(text).strip() for text in rig.provider.texts) == sorted([*windows, "short one"])
        sent = [str(text) for text in rig.provider.texts if "w" in str(text)]
        np.testing.assert_allclose(vector(result, 1), mean_of(*sorted(sent, key=LONG.index)), atol=1e-6)
        np.testing.assert_array_equal(vector(result, 0), identifying_vector("short one", MODEL, WIDTH))
        assert np.linalg.norm(vector(result, 1)) == pytest.approx(1)
        assert result.tokens == 2 + 10 + 10 + 7
        assert (result.cache_hits, result.joined) == (0, 0)


@pytest.mark.looptime
async def test_a_mean_is_kept_and_its_windows_are_bought_once() -> None:
    """The same text again costs nothing; a text that begins alike buys only the windows that differ."""
    async with engine(ScriptedProvider(), max_input_tokens=10, long_input="mean", overlap_tokens=0) as rig:
        await embed(rig, LONG)
        calls = len(rig.provider.calls)
        again = await embed(rig, LONG)
        assert (again.cache_hits, len(rig.provider.calls)) == (1, calls)
        await embed(rig, LONG + " and more")
        assert [str(text).split()[0] for text in rig.provider.texts[3:]] == ["w20"]


@pytest.mark.looptime
async def test_token_arrays_have_windows_too() -> None:
    """Ids that a deployment understands are cut into windows of ids."""
    ids = tuple(range(1, 24))
    async with engine(ScriptedProvider(), max_input_tokens=10, long_input="mean", overlap_tokens=2) as rig:
        result = await embed(rig, ids)
        assert len(result.vectors) == 1
        assert np.linalg.norm(vector(result)) == pytest.approx(1)


@pytest.mark.looptime
async def test_the_ways_with_long_texts_are_different_spaces() -> None:
    """What was kept of a mean never answers who wants an error or a cut."""
    async with engine(ScriptedProvider(), max_input_tokens=10, long_input="mean") as rig:
        spaces = [(await embed(rig, "a b", truncation=way)).space.id for way in (None, "none", "end")]
        assert len(set(spaces)) == 3
        with pytest.raises(InvalidRequest, match="maximum context length is 10 tokens"):
            await embed(rig, LONG, truncation="none")
        assert (
            vector(await embed(rig, LONG, truncation="end")).tobytes()
            == identifying_vector(" ".join(f"w{n}" for n in range(10)), MODEL, WIDTH).tobytes()
        )


@pytest.mark.looptime
async def test_the_operator_may_let_long_texts_be_cut() -> None:
    """With `truncate` a caller who says nothing gets the head's vector, and one who wants an error gets it."""
    async with engine(ScriptedProvider(), max_input_tokens=10, long_input="end") as rig:
        await embed(rig, LONG)
        assert rig.provider.texts == [" ".join(f"w{n}" for n in range(10))]
        with pytest.raises(InvalidRequest):
            await embed(rig, LONG, truncation="none")


@pytest.mark.looptime
async def test_what_cannot_be_kept_whole_is_not_promised() -> None:
    """Where a server cuts and nobody can tell, a caller who forbids it is refused."""
    async with engine(ScriptedProvider(), long_input="end", always_cuts=True) as rig:
        await embed(rig, "short")
        with pytest.raises(InvalidRequest, match="can only be 'end'"):
            await embed(rig, "short", truncation="none")


async def test_long_texts_are_counted_beside_the_loop() -> None:
    """Cutting windows and counting them is work for a thread, however many there are."""
    threads: set[int] = set()

    class Noting(Words):
        """Knows which threads have counted something long."""

        def count(self, text: str) -> int:
            """One per word."""
            if len(text) > 100:
                threads.add(threading.get_ident())
            return super().count(text)

    deployment = Deployment("d", MODEL)
    route = Route(MODEL, Space(MODEL, WIDTH, max_input_tokens=500), (deployment,), long_input="mean")
    intake = Intake({MODEL: route}, {MODEL: Noting()}, Words())
    text = "word " * 20_000
    plan = intake.plan(EmbeddingRequest(ANONYMOUS, MODEL, (text,), 1e9))
    [sized], _ = await intake.measure(plan, [text], 0)
    assert len(sized.windows) > 40
    assert max(window.tokens for window in sized.windows) == 500
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.looptime
async def test_a_refused_window_is_its_texts_refusal() -> None:
    """The caller is told the place of the whole text in the input."""
    provider = ScriptedProvider(poison=frozenset({" w20 w21 w22"}), refusal=InputRefused("400"))
    async with engine(
        provider, max_input_tokens=10, long_input="mean", overlap_tokens=0, limits=Limits(max_batch_items=1)
    ) as rig:
        with pytest.raises(RejectedInput) as refused:
            await embed(rig, "first", LONG)
        assert refused.value.position == 1


@given(st.text(max_size=400), st.integers(4, 40), st.integers(0, 3))
def test_windows_cover_their_text(text: str, most: int, overlap: int) -> None:
    """No window counts more than it may, none is empty, each starts within the one before, the last ends the text."""
    vocabulary = Cl100k()
    windows = tokens._windows(vocabulary, text, most, overlap)
    place = 0
    for window in windows:
        assert vocabulary.count(window) <= most or len(window) == 1
        found = text.find(window, max(0, place - len(window)))
        assert found <= place
        place = max(place, found + len(window))
    assert text.endswith(windows[-1])
    assert place == len(text)


def test_a_mean_of_vectors_without_unit_length_keeps_theirs() -> None:
    """Only where the space has unit vectors is the mean brought back to one."""
    rows = [np.array([2, 0], "<f4").tobytes(), np.array([0, 4], "<f4").tobytes()]
    np.testing.assert_allclose(np.frombuffer(vectors.mean(rows, [1, 3], unit=False), "<f4"), [0.5, 3.0])
    np.testing.assert_allclose(np.linalg.norm(np.frombuffer(vectors.mean(rows, [1, 3], unit=True), "<f4")), 1.0)
