"""The Python face: arrays in order, how they came, what is told when there are none, and how a process ends."""

import asyncio
import itertools
import pickle
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import client, homes
from tests.api.conftest import ADA, KEY, SMALL, expected, running
from tests.emulators import faults
from tests.emulators.openai import OpenAIEmulator

CONFIGURATION = """
[stores]
data_dir = "{folder}/data"
[embed]
batch = 100
backoff_base_s = 0.05
backoff_cap_s = 0.1
give_up_after_s = {patience_s}
[queue]
max_items = {queue}
[deployments.main]
dialect = "openai"
base_url = "{url}"
api_key = "sk-emulator-key"
model = "text-embedding-3-small"
max_in_flight = 4
[models.text-embedding-3-small]
deployments = ["main"]
{model}
"""

TENANTS = """
[tenants.search]
api_key = "key-of-search"
[tenants.small]
api_key = "key-of-small"
tokens_per_minute = 10
[tenants.poor]
api_key = "key-of-poor"
budget_usd_per_day = 0.00000008
"""


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    """What a test has opened does not outlive its servers for long."""
    yield
    homes.close_all()


def written(folder: Path, url: str, *, model: str = "", queue: int = 1000, patience_s: float = 60.0) -> Path:
    """A configuration whose one provider is at `url`."""
    path = folder / "embedgate.toml"
    path.write_text(CONFIGURATION.format(folder=folder, url=url, model=model, queue=queue, patience_s=patience_s))
    return path


def same(found: np.ndarray, texts: list[str], dimensions: int = 1536) -> bool:
    """Whether these are the vectors of these texts, as float32, in this order."""
    whole = expected(texts)[:, :dimensions]
    wanted = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    return found.dtype == np.float32 and found.shape == wanted.shape and np.allclose(found, wanted, atol=1e-6)


# ── shapes, order, threads ──────────────────────────────────────────────────────────────────────────────────────────


async def test_vectors_come_as_float32_in_order_and_as_wide_as_asked(tmp_path: Path) -> None:
    """One text is (d,), n are (n, d), none are (0, d); duplicates and "" have their places; a cut is of unit length."""
    texts = ["one", "two", "", "one", "drei"]
    async with OpenAIEmulator() as upstream:
        config = written(tmp_path, upstream.base_url)
        assert same((await client.aembed_text("one", config=config))[None], ["one"])
        assert same(await client.aembed_texts(texts, config=config), texts)
        assert same(await client.aembed_texts(texts, dimensions=256, config=config), texts, 256)
        assert same(await client.agenerate_embeddings(texts, dimensions=256, config=config), texts, 256)
        for ask in (client.aembed_texts, client.agenerate_embeddings):
            nothing = await ask([], dimensions=256, config=str(config))
            assert nothing.shape == (0, 256)
            assert nothing.dtype == np.float32


async def test_input_type_gives_the_models_prompt(tmp_path: Path) -> None:
    """A query is embedded with what the model wants in front of queries, a document without."""
    async with OpenAIEmulator() as upstream:
        config = written(tmp_path, upstream.base_url, model='query_prompt = "query: "')
        assert same(await client.aembed_texts(["a"], input_type="query", config=config), ["query: a"])
        assert same(await client.aembed_texts(["a"], input_type="document", config=config), ["a"])
        with pytest.raises(ValueError, match="input_type is one of query, document"):
            await client.aembed_texts(["a"], input_type="question", config=config)


async def test_one_home_serves_every_wish(tmp_path: Path) -> None:
    """Each width and input type at once, in process and at a server: each its own, by one engine with its quotas."""
    prompt = 'query_prompt = "query: "'
    typed = f'[models.mine]\ndeployments = ["main"]\n{prompt}\n{TENANTS}'
    pairs = [(width, kind) for width in (0, 8, 64) for kind in (None, "query")]
    wishes: list[dict[str, Any]] = [{"dimensions": width, "input_type": kind} for width, kind in pairs]
    async with running(tmp_path, tenants=typed) as edge, OpenAIEmulator(api_key=KEY) as plain:
        local = {"config": written(tmp_path, edge.upstream.base_url, model=prompt)}
        (tmp_path / "there").mkdir()
        there = {"config": written(tmp_path / "there", "http://x.test"), "api_key": KEY}
        for how in (local, {**there, "base_url": edge.url, "model": "mine"}):
            found = await asyncio.gather(*(client.aembed_texts(["a", "b"], **wish, **how) for wish in wishes))
            for wish, vectors in zip(wishes, found, strict=True):
                texts = ["query: a", "query: b"] if wish["input_type"] else ["a", "b"]
                assert same(vectors, texts, wish["dimensions"] or 1536)
        for width in (1536, 8, 64):
            how = {**there, "base_url": plain.base_url, "model": SMALL}
            assert same(await client.aembed_texts(["a"], dimensions=width, **how), ["a"], width)
        assert plain.bill.items == 2  # to see what it has, and what was wanted
        assert [thread.name for thread in threading.enumerate()].count("embedgate") == 3


async def test_none_is_the_default_of_everything(tmp_path: Path) -> None:
    """As programs pass on what they were not given."""
    nothing: dict[str, Any] = {"model": None, "dimensions": None, "input_type": None, "base_url": None, "api_key": None}
    async with OpenAIEmulator() as upstream:
        config = written(tmp_path, upstream.base_url)
        assert same(await client.aembed_texts(["a"], config=config, timeout_s=None, **nothing), ["a"])
        assert same(await client.agenerate_embeddings(["a"], config=config, **nothing), ["a"])
        with pytest.raises(TypeError):
            await client.aembed_texts(["a"], config=config, dimensions="64")


async def test_any_number_of_texts_from_what_belongs_to_the_callers_thread(tmp_path: Path) -> None:
    """5,000 rows of a cursor, which only its own thread may read: all in order, progress told there until all are."""
    texts = [f"row {number}" for number in range(5000)]
    told: list[tuple[int, int]] = []

    def ask(config: Path) -> np.ndarray:
        database = sqlite3.connect(":memory:")
        database.execute("create table rows (said text)")
        database.executemany("insert into rows values (?)", [(text,) for text in texts])
        rows = (said for (said,) in database.execute("select said from rows order by rowid"))
        here = threading.get_ident()
        found = client.generate_embeddings(
            rows,
            on_progress=lambda done: told.append((done, threading.get_ident() - here)),
            config=config,
            dimensions=8,
        )
        database.close()
        return found

    async with OpenAIEmulator() as upstream:
        found = await asyncio.to_thread(ask, written(tmp_path, upstream.base_url))
        assert upstream.bill.items == 5000
    assert same(found, texts, 8)
    assert told == [(done, 0) for done in range(100, 5001, 100)]


async def test_plain_calls_from_threads_and_from_a_running_loop(tmp_path: Path) -> None:
    """Eight threads at once, half of them with a loop of their own as notebooks have, share one home."""

    def plain(config: Path, number: int) -> np.ndarray:
        return client.embed_texts([f"text {number}"], config=config)

    def notebook(config: Path, number: int) -> np.ndarray:
        async def cell() -> np.ndarray:
            return plain(config, number)

        return asyncio.run(cell())

    async with OpenAIEmulator() as upstream:
        config = written(tmp_path, upstream.base_url)
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(8) as threads:
            ways = [plain, notebook] * 4
            asked = [loop.run_in_executor(threads, way, config, number) for number, way in enumerate(ways)]
            for number, found in enumerate(await asyncio.gather(*asked)):
                assert same(found, [f"text {number}"])
        assert [thread.name for thread in threading.enumerate()].count("embedgate") == 1


async def test_a_home_is_of_the_file_that_is_meant_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words in another folder are another place: no vectors of the first."""
    async with OpenAIEmulator() as first, OpenAIEmulator() as second:
        for folder, upstream in (("first", first), ("second", second)):
            (tmp_path / folder).mkdir()
            written(tmp_path / folder, upstream.base_url)
        for folder in ("first", "second", "first"):
            monkeypatch.chdir(tmp_path / folder)
            assert same(await client.aembed_texts(["a"]), ["a"])
            assert same(await client.aembed_texts(["b"], config="embedgate.toml"), ["b"])
        assert first.bill.items == second.bill.items == 2


async def test_who_gives_up_buys_no_more(tmp_path: Path) -> None:
    """A cancelled call takes no more texts, and of what waits for its turn only those that have left are bought."""
    taken = itertools.count()
    async with OpenAIEmulator(latency_s=0.1) as upstream:
        config = written(tmp_path, upstream.base_url)

        def stop(_: int) -> None:
            work.cancel()

        texts = (f"text {next(taken)}" for _ in itertools.repeat(None))
        work = asyncio.ensure_future(client.agenerate_embeddings(texts, on_progress=stop, config=config))
        with pytest.raises(asyncio.CancelledError):
            await work
        after, left = next(taken), len(upstream.arrivals)
        assert (await client.aembed_batch(["last"], config=config)).calls == 1.0
        assert next(taken) == after + 1
        assert len(upstream.arrivals) <= left + 4 + 1


# ── how they came ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_batch_says_what_it_took(tmp_path: Path) -> None:
    """Calls, tokens and dollars are the provider's bill to the cent's millionth; what is kept costs nothing."""
    texts = [f"some words, number {number}" for number in range(50)]
    async with OpenAIEmulator(latency_s=0.05) as upstream:
        config = written(tmp_path, upstream.base_url)
        first = await client.aembed_batch(texts, config=config)
        assert same(first.embeddings, texts)
        assert first.calls == pytest.approx(upstream.bill.requests)
        assert (first.usage.tokens, first.usage.cached_texts) == (upstream.bill.tokens, 0)
        assert first.usage.cost_usd == pytest.approx(upstream.bill.tokens * 2e-8, abs=1e-9)
        assert first.retries == 0
        assert first.latency_ms >= 50
        again = await client.aembed_batch([*texts, texts[0]], config=config)
        assert (again.calls, again.usage.cost_usd, again.usage.cached_texts) == (0.0, 0.0, 51)
        nothing = await client.aembed_batch([], config=config)
        assert (nothing.calls, nothing.retries, nothing.usage) == (0.0, 0, (0, 0.0, 0))
        assert upstream.bill.items == 50


async def test_a_batch_says_how_often_it_was_tried_again(tmp_path: Path) -> None:
    """Two server errors, then vectors: two retries, one call on the bill."""
    async with OpenAIEmulator() as upstream:
        config = written(tmp_path, upstream.base_url)
        upstream.inject(faults.status(500), 2)
        found = await client.aembed_batch(["a", "b"], config=config)
        assert same(found.embeddings, ["a", "b"])
        assert found.retries == 2
        assert found.calls >= 1
        assert upstream.bill.requests == 1


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_text_that_is_none_is_a_type_error_that_says_where(tmp_path: Path) -> None:
    """In a list, in the middle of a stream, or one string in place of a list."""
    async with OpenAIEmulator() as upstream:
        config = written(tmp_path, upstream.base_url)
        with pytest.raises(TypeError, match=r"texts\[1\] is no string, but NoneType"):
            await client.aembed_texts(["a", None], config=config)  # type: ignore[list-item]
        with pytest.raises(TypeError, match=r"texts\[250\] is no string, but float"):
            await client.agenerate_embeddings([*["a"] * 250, float("nan")], config=config)  # type: ignore[list-item]
        for ask in (client.aembed_texts, client.agenerate_embeddings):
            with pytest.raises(TypeError, match="texts is one string: give a list"):
                await ask("abc", config=config)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("poison", "The provider rejected this input"),
        ("\ud83d", "Half a surrogate pair is no text"),
        ("word " * 9000, "This model's maximum context length is 8192 tokens"),
    ],
)
async def test_texts_that_nobody_embeds_are_named_and_bought_around(tmp_path: Path, bad: str, why: str) -> None:
    """A refused text, half a surrogate pair, one that is too long: all rows are named, or are NaN; others are exact."""
    texts = [f"text {number}" for number in range(300)]
    texts[7] = texts[205] = bad
    good = [row for row in range(300) if row not in (7, 205)]
    async with OpenAIEmulator() as upstream:
        upstream.poison.add("poison")
        config = written(tmp_path, upstream.base_url)
        with pytest.raises(
            client.EmbeddingGenerationError, match=rf"2 of 300 texts cannot be embedded: rows 7, 205\. Row 7: {why}"
        ) as told:
            await client.agenerate_embeddings(texts, config=config)
        assert told.value.rows == (7, 205)
        found = await client.agenerate_embeddings(texts, failed="nan", config=config)
        assert np.isnan(found[[7, 205]]).all()
        assert same(found[good], [texts[row] for row in good])
        asked_if_anything = 5  # a harmless text of the engine's own, when a provider refuses something
        assert upstream.bill.items <= 298 + asked_if_anything
        assert len(upstream.arrivals) < 60  # those of a chunk travel together also when they are asked for one by one
    with pytest.raises(ValueError, match="failed is 'raise' or 'nan'"):
        await client.agenerate_embeddings(texts, failed="omit", config=config)


@pytest.mark.parametrize(
    ("bad", "rows", "said"),
    [
        ("poison", (2,), "The provider rejected this input. Leave that text out."),
        ("\ud83d", (2,), "Half a surrogate pair is no text. Leave that text out."),
        ("word " * 9000, (2,), "maximum context length is 8192.* Leave out row 2"),
    ],
)
async def test_a_batch_names_the_text_that_is_to_blame(
    tmp_path: Path, bad: str, rows: tuple[int, ...], said: str
) -> None:
    """As far as it is known, and what to do; the error passes between processes as it is."""
    async with OpenAIEmulator() as upstream:
        upstream.poison.add("poison")
        config = written(tmp_path, upstream.base_url)
        with pytest.raises(client.EmbeddingGenerationError, match=said) as told:
            await client.aembed_texts(["a", "b", bad, "d"], config=config)
    assert told.value.rows == rows
    copy = pickle.loads(pickle.dumps(told.value))
    assert (type(copy), str(copy), copy.rows) == (type(told.value), str(told.value), rows)


async def test_no_time_no_place_and_no_provider_are_told_apart(tmp_path: Path) -> None:
    """A slow provider, a full queue: EmbeddingPoolExhausted; one that fails: EmbeddingGenerationError, or no end."""
    async with OpenAIEmulator(latency_s=0.5) as upstream:
        config = written(tmp_path, upstream.base_url, queue=5)
        await client.aembed_texts([], config=config)  # the first call takes longer
        with pytest.raises(client.EmbeddingPoolExhausted, match="Ask fewer texts at once, or allow more time"):
            await client.aembed_texts(["a"], timeout_s=0.2, config=config)
        crowd = [client.aembed_texts([f"{n} {m}" for m in range(5)], timeout_s=10.0, config=config) for n in range(8)]
        ends = await asyncio.gather(*crowd, return_exceptions=True)
        refused = [end for end in ends if isinstance(end, Exception)]
        assert {type(end) for end in refused} == {client.EmbeddingPoolExhausted}
        assert any("overloaded" in str(end) for end in refused)
        assert any(isinstance(end, np.ndarray) for end in ends)
    async with OpenAIEmulator() as upstream:
        (tmp_path / "other").mkdir()
        config = written(tmp_path / "other", upstream.base_url, patience_s=0.5)
        upstream.inject(faults.status(500))
        failed = r"^deployments\.main: The upstream provider failed\. Ask again"
        with pytest.raises(client.EmbeddingGenerationError, match=failed):
            await client.aembed_texts(["a"], config=config)
        with pytest.raises(client.EmbeddingError, match=r"nobody has embedded row 0 for 0\.5 s"):
            await client.agenerate_embeddings(["b"], config=config)
        upstream.heal()


async def test_a_provider_that_says_429_is_a_limit(tmp_path: Path) -> None:
    """EmbeddingRateLimitError says when to ask again, as the provider did, also if nobody asked it; then it passes."""
    async with OpenAIEmulator() as upstream:
        config = written(tmp_path, upstream.base_url)
        await client.aembed_texts([], config=config)  # the first call takes longer
        slow_down = faults.status(429, headers={"retry-after": "3"})
        upstream.inject(slow_down, 1)
        for _ in range(2):
            with pytest.raises(client.EmbeddingRateLimitError, match="generate_embeddings waits") as told:
                await client.aembed_texts(["a"], timeout_s=0.5, config=config)
            assert pickle.loads(pickle.dumps(told.value)).retry_after_s == told.value.retry_after_s
            assert 1.0 <= told.value.retry_after_s <= 3.0
        assert same(await client.agenerate_embeddings(["a"], config=config), ["a"])


async def test_the_callers_own_timeout_stays_theirs(tmp_path: Path) -> None:
    """One that comes from their texts, or from where they are told of progress, is not an outage."""

    def texts() -> Iterator[str]:
        yield "a"
        raise TimeoutError("mine")

    def told(_: int) -> None:
        raise TimeoutError("mine")

    async with OpenAIEmulator() as upstream:
        config = written(tmp_path, upstream.base_url)
        with pytest.raises(TimeoutError, match=r"^mine$"):
            await client.agenerate_embeddings(texts(), config=config)
        with pytest.raises(TimeoutError, match=r"^mine$"):
            await client.agenerate_embeddings(["a"], on_progress=told, config=config)


@pytest.mark.parametrize("ask", [client.aembed_texts, client.agenerate_embeddings])
async def test_a_key_that_is_not_accepted_is_told_at_once_and_again(tmp_path: Path, ask: Any) -> None:
    """One line that names the deployment, however patient the call; waiting would not help."""
    async with OpenAIEmulator(api_key="another") as upstream:
        config = written(tmp_path, upstream.base_url)
        for _ in range(2):
            with pytest.raises(client.EmbeddingError, match=r"^deployments\.main does not accept the key$"):
                await asyncio.wait_for(ask(["a"], config=config), 5)


async def test_what_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    """A wrong model, file, width or address: ConfigurationError; the next, right call is answered."""
    async with OpenAIEmulator() as upstream:
        config = written(tmp_path, upstream.base_url)
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"model": "nope"}, "the model nope is not configured; there is text-embedding-3-small"),
            ({"config": tmp_path / "none.toml"}, "none.toml: cannot be read"),
            ({"dimensions": 9999}, "'dimensions' = 9999. Must be less than or equal to 1536"),
            ({"base_url": "nonsense", "model": "m"}, "nonsense cannot be asked: it must be a URL"),
            ({"base_url": "http://127.0.0.1:9"}, "name the model"),
        ]
        for how, said in wrong:
            with pytest.raises(client.ConfigurationError, match=said) as told:
                await client.aembed_texts(["a"], **{"config": config, **how})
            assert "\n" not in str(told.value)
        assert same(await client.aembed_texts(["a"], config=config), ["a"])


# ── against a server ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_running_embedgate_is_asked_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same faces, the key from the environment too; wrong keys and models are told in one line."""
    texts = [f"text {number}" for number in range(250)]
    async with running(tmp_path, tenants=TENANTS) as edge:
        at: dict[str, Any] = {
            "base_url": f"{edge.url}/v1",
            "model": SMALL,
            "config": written(tmp_path, "http://x.test"),
        }
        with pytest.raises(client.ConfigurationError, match="cannot be asked: Incorrect API key provided"):
            await client.aembed_texts(texts, api_key="wrong", **at)
        with pytest.raises(client.ConfigurationError, match="cannot be asked: The model `nope` does not exist"):
            await client.aembed_texts(texts, api_key=KEY, **{**at, "model": "nope"})
        found = await client.aembed_batch(texts, api_key=KEY, **at)
        assert same(found.embeddings, texts)
        assert found.usage.tokens == edge.upstream.bill.tokens  # nothing was tried to find out what is served
        assert found.usage.cost_usd == pytest.approx(found.usage.tokens * 2e-8)
        monkeypatch.setenv("EMBEDGATE_API_KEY", KEY)
        assert same(await client.agenerate_embeddings(texts, dimensions=64, **at), texts, 64)
        assert same(await asyncio.to_thread(client.embed_texts, texts, **at), texts)


async def test_input_types_are_told_to_a_server(tmp_path: Path) -> None:
    """A server that tells them apart puts its own words in front of queries."""
    typed = f'[models.mine]\ndeployments = ["main"]\nquery_prompt = "query: "\n{TENANTS}'
    at: dict[str, Any] = {"model": "mine", "api_key": KEY, "config": written(tmp_path, "http://x.test")}
    async with running(tmp_path, tenants=typed) as edge:
        assert same(await client.aembed_texts(["a"], input_type="query", base_url=edge.url, **at), ["query: a"])
        assert same(await client.aembed_texts(["a"], input_type="document", base_url=edge.url, **at), ["a"])


async def test_one_name_at_two_servers_is_two_models(tmp_path: Path) -> None:
    """What a name means each server says for itself: the vectors of one are never kept for the other."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    other = '[models.mine]\ndeployments = ["{}"]\ndimensions = 1536\n' + TENANTS
    at: dict[str, Any] = {"model": "mine", "api_key": KEY, "config": written(tmp_path, "http://x.test")}
    async with (
        running(tmp_path / "one", tenants=other.format("main")) as one,
        running(tmp_path / "two", tenants=other.format("ada")) as two,
    ):
        assert same(await client.aembed_texts(["a"], base_url=one.url, **at), ["a"])
        np.testing.assert_array_equal(await client.aembed_texts(["a"], base_url=two.url, **at), expected(["a"], ADA))


async def test_the_limits_of_a_server_are_limits(tmp_path: Path) -> None:
    """A tenant that is over its rate is told to come again, one without money that it has none."""
    async with running(tmp_path, tenants=TENANTS) as edge:
        at: dict[str, Any] = {"base_url": edge.url, "model": SMALL, "config": written(tmp_path, "http://x.test")}
        await client.aembed_texts(["one two three four five six seven"], api_key="key-of-small", **at)
        with pytest.raises(client.EmbeddingRateLimitError):
            await client.aembed_texts(["and as many words once more"], api_key="key-of-small", timeout_s=1.0, **at)
        with pytest.raises(client.EmbeddingError, match="has no credit left"):
            await client.aembed_texts(["more words than there is money for"], api_key="key-of-poor", **at)


# ── the end of a process ────────────────────────────────────────────────────────────────────────────────────────────

ENDS = {
    "": 0,
    "sys.exit(3)": 3,
    "threading.Thread(target=client.embed_text, args=('late',), kwargs=how, daemon=True).start(); time.sleep(0.1)": 0,
    "os.fork() or (client.embed_text('child', **how), os._exit(0)); assert os.wait()[1] == 0": 0,
}


@pytest.mark.parametrize("end", ENDS)
async def test_a_process_ends_quietly_with_all_of_it_booked(tmp_path: Path, end: str) -> None:
    """However it ends: its own exit code, nothing on stderr, nothing left in the journal."""
    script = "import os, sys, threading, time\nfrom app import client\nhow = {'config': sys.argv[1]}\n"
    script += f"client.embed_texts(['a', 'b'], **how)\n{end}\n"
    async with OpenAIEmulator(latency_s=0.3) as upstream:
        config = written(tmp_path, upstream.base_url)
        code, said = await asyncio.to_thread(run, script, config)
    assert (code, said) == (ENDS[end], "")
    assert journal(tmp_path) == b""


async def test_an_exception_in_the_middle_is_the_callers_own(tmp_path: Path) -> None:
    """What a stream of texts raises comes out as it is, and the process ends with that alone."""
    script = "import sys\nfrom app import client\n"
    script += "def texts():\n    yield from map(str, range(500))\n    raise KeyError('x')\n"
    script += "client.generate_embeddings(texts(), config=sys.argv[1])\n"
    async with OpenAIEmulator() as upstream:
        code, said = await asyncio.to_thread(run, script, written(tmp_path, upstream.base_url))
    assert code == 1
    assert said.endswith("KeyError: 'x'\n")
    assert said.count("Traceback") == 1
    assert "Group" not in said
    assert journal(tmp_path) == b""


def test_the_modules_example_runs_with_nothing_configured(tmp_path: Path) -> None:
    """The model on this machine: (384,), unit length, nearer to what means the same."""
    script = "from app.client import *\nv = embed_text('hello')\nw = embed_texts(['hi there', 'tax law'])\n"
    script += "print(v.shape, round(float(v @ v), 4), w[0] @ v > w[1] @ v)\n"
    script += "print(generate_embeddings(iter(['a', 'b']), on_progress=print).shape)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
        env={"HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "(384,) 1.0 True\n2\n(2, 384)\n"


def run(script: str, config: Path) -> tuple[int, str]:
    """The exit code and stderr of a process of its own."""
    done = subprocess.run([sys.executable, "-c", script, str(config)], capture_output=True, timeout=30, check=False)
    return done.returncode, done.stderr.decode()


def journal(folder: Path) -> bytes:
    """What is not booked yet."""
    return b"".join(path.read_bytes() for path in (folder / "data").rglob("*journal*") if path.is_file())
