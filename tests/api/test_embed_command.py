"""The command that turns a dataset into vectors: what lies there afterwards, what was bought, and what it says."""

import asyncio
import csv
import io
import json
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest

from app.cli import main
from tests.api.conftest import ADA_KEY, KEY, SMALL, running
from tests.emulators import faults
from tests.emulators.openai import ModelCard, OpenAIEmulator
from tests.identity import identifying_vectors

MODEL, WIDTH = "tiny", 16
MODELS = {MODEL: ModelCard(WIDTH, cuts=True), "other": ModelCard(WIDTH)}
CONFIGURATION = """
[cache]
memory_bytes = 0
[embed]
backoff_base_s = 0.01
backoff_cap_s = 0.01
[deployments.main]
dialect = "openai"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "tiny"
usd_per_million_tokens = 20
batch_usd_per_million_tokens = 10
max_in_flight = 4
tokens_per_minute = 1000000
[deployments.other]
dialect = "openai"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "other"
[models.tiny]
deployments = ["main"]
dimensions = 16
cuts_dimensions = true
query_prompt = "query: "
[models.other]
deployments = ["other"]
dimensions = 16
"""


class Said(NamedTuple):
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


@dataclass
class Site:
    """A folder with a configuration, and the provider that stands in it."""

    folder: Path
    upstream: OpenAIEmulator
    runs: int = 0

    async def embed(self, *arguments: str) -> Said:
        """`embedgate embed …` to its end, with nothing that an earlier one could have remembered but files."""
        self.runs += 1
        data = {"EMBEDGATE_STORES__DATA_DIR": str(self.folder / f"data{self.runs}")}
        return await command(*arguments, "--config", str(self.folder / "embedgate.toml"), environ=data)

    def path(self, name: str) -> str:
        """Of a file here."""
        return str(self.folder / name)

    def write(self, name: str, texts: Iterable[str], *, first: int = 0) -> str:
        """A CSV of them, with an id each, from this number on."""
        with (self.folder / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text"])
            writer.writerows((f"id{number}", text) for number, text in enumerate(texts, first))
        return self.path(name)

    def bought(self) -> list[str]:
        """Every text that was asked for since the last time."""
        inputs = [arrival.body["input"] for arrival in self.upstream.arrivals]
        self.upstream.arrivals.clear()
        return [text for given in inputs for text in ([given] if isinstance(given, str) else given)]

    def failed(self, out: str) -> list[tuple[int, str, str]]:
        """The rows that are listed as such."""
        lines = map(json.loads, Path(f"{out}.failed.jsonl").read_text().splitlines())
        return [(line["row"], line["id"], line["reason"]) for line in lines]


async def command(*arguments: str, environ: dict[str, str] | None = None) -> Said:
    """The console command `embedgate embed` in a thread of this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))

    def called() -> int:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["embedgate", "embed", *arguments])
            for name, value in (environ or {}).items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main()
        code = ended.value.code
        return code if isinstance(code, int) else 0

    code = await asyncio.to_thread(called)
    return Said(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


@asynccontextmanager
async def site(folder: Path, **how: Any) -> AsyncIterator[Site]:
    """See `Site`."""
    async with OpenAIEmulator(models=MODELS, **how) as upstream:
        (folder / "embedgate.toml").write_text(CONFIGURATION.format(upstream=upstream.base_url))
        yield Site(folder, upstream)


def some(count: int, first: int = 0) -> list[str]:
    """So many texts, each another."""
    return [f"text {number}" for number in range(first, first + count)]


def vectors(texts: Sequence[str], model: str = MODEL) -> npt.NDArray[np.float32]:
    """Which they must have."""
    return identifying_vectors(texts, model, WIDTH)


def same(out: str, texts: Sequence[str], *, without: Sequence[int] = ()) -> None:
    """Asserts that the array at `out` holds the vectors of the texts, and NaN in rows that are `without`."""
    expected = vectors(texts)
    expected[list(without)] = np.nan
    found = np.load(out)
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    np.testing.assert_array_equal(found, expected)


def content(path: str) -> bytes:
    """Of a file."""
    return Path(path).read_bytes()


def lines_of(out: str) -> list[dict[str, Any]]:
    """The objects in a file of lines."""
    return [json.loads(line) for line in content(out).splitlines()]


def meta_of(out: str) -> dict[str, Any]:
    """What its sidecar says."""
    found: dict[str, Any] = json.loads(content(f"{out}.meta.json"))
    return found


def names(folder: Path, pattern: str) -> list[str]:
    """Of the files that match."""
    return sorted(path.name for path in folder.glob(pattern))


def one_line(said: Said, *told: str, code: int = 2) -> None:
    """Asserts that it ended so, with a single line of complaint that tells all this."""
    assert (said.code, said.out, said.err.count("\n")) == (code, "", 1), said
    for each in told:
        assert each in said.err


# ── every row once, in order, with its own vector ───────────────────────────────────────────────────────────────────


async def test_every_row_has_its_own_vector_in_an_array(tmp_path: Path) -> None:
    """In order, and bought once; what it was made of lies beside it, and nothing else."""
    texts = some(1234)
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", texts), here.path("out.npy")
        said = await here.embed(source, "--out", out)
        assert said.code == 0, said
        same(out, texts)
        assert sorted(here.bought()) == sorted(texts)
        beside = names(tmp_path, "out*")
        assert beside == ["out.npy", "out.npy.hashes", "out.npy.meta.json"]


async def test_every_row_has_its_own_vector_in_lines(tmp_path: Path) -> None:
    """With its id and its other columns."""
    texts = some(1234)
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", texts), here.path("out.jsonl")
        assert (await here.embed(source, "--out", out, "--id", "id")).code == 0
        lines = lines_of(out)
        assert [(line["id"], line["text"]) for line in lines] == [(f"id{at}", text) for at, text in enumerate(texts)]
        np.testing.assert_array_equal(np.array([line["embedding"] for line in lines], np.float32), vectors(texts))


async def test_every_row_has_its_own_vector_in_a_table(tmp_path: Path) -> None:
    """With its number for an id where there is none."""
    texts = some(1234)
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in texts))
    async with site(tmp_path) as here:
        out = here.path("out.parquet")
        assert (await here.embed(here.path("in.txt"), "--out", out)).code == 0
        read = pq.read_table(out).to_pydict()
        assert (read["id"], read["text"]) == ([*map(str, range(1234))], texts)
        np.testing.assert_array_equal(np.array(read["embedding"], np.float32), vectors(texts))


async def test_vectors_can_be_narrower(tmp_path: Path) -> None:
    """Heads of the model's own at unit length; a width that it has not is told in a line."""
    texts = some(100)
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", texts), here.path("out.npy")
        assert (await here.embed(source, "--out", out, "--dimensions", "4")).code == 0
        heads = vectors(texts)[:, :4]
        np.testing.assert_allclose(np.load(out), heads / np.linalg.norm(heads, axis=1, keepdims=True), rtol=1e-6)
        one_line(await here.embed(source, "--out", here.path("wide.npy"), "--dimensions", "17"), "'dimensions' = 17")
        assert names(tmp_path, "wide*") == []


async def test_several_inputs_are_one_dataset(tmp_path: Path) -> None:
    """Globs in the order of names, and files as they are named."""
    async with site(tmp_path) as here:
        for number, name in enumerate(("b.csv", "a.csv", "z.csv")):
            here.write(name, some(70, 100 * number), first=100 * number)
        out = here.path("out.npy")
        assert (await here.embed(here.path("z.csv"), here.path("[ab].csv"), "--out", out, "--id", "id")).code == 0
        same(out, some(70, 200) + some(70, 100) + some(70))


async def test_a_sample_is_the_same_each_time(tmp_path: Path) -> None:
    """`--limit` takes the first rows, with a `--seed` random ones in their order."""
    texts = some(500)
    async with site(tmp_path) as here:
        source = here.write("in.csv", texts)
        assert (await here.embed(source, "--out", here.path("first.npy"), "--limit", "20")).code == 0
        same(here.path("first.npy"), texts[:20])
        for name in ("one.jsonl", "two.jsonl"):
            sample = ("--limit", "20", "--seed", "7")
            assert (await here.embed(source, "--out", here.path(name), *sample)).code == 0
        assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
        lines = lines_of(here.path("one.jsonl"))
        numbers = [int(line["id"].removeprefix("id")) for line in lines]
        assert numbers == sorted(set(numbers))
        assert numbers != [*range(20)]
        np.testing.assert_array_equal(array_of(here.path("one.jsonl")), vectors([texts[at] for at in numbers]))


async def test_a_template_and_the_kind_of_input_are_what_is_embedded(tmp_path: Path) -> None:
    """Columns in a text, and the model's words for a query in front of it."""
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", some(10)), here.path("out.npy")
        wish = ("--text", "{id}: {text}", "--input-type", "query")
        assert (await here.embed(source, "--out", out, *wish)).code == 0
        same(out, [f"query: id{at}: text {at}" for at in range(10)])


# ── what is there already ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", ["npy", "jsonl", "parquet"])
async def test_who_asks_again_hears_that_it_is_there(tmp_path: Path, form: str) -> None:
    """Nothing is called, and nothing touched."""
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", some(50)), here.path(f"out.{form}")
        await here.embed(source, "--out", out)
        here.bought()
        before = touched(tmp_path)
        said = await here.embed(source, "--out", out)
        assert (said.code, said.err) == (0, "")
        assert "is there and fits: 50 rows" in said.out
        assert (here.bought(), touched(tmp_path)) == ([], before)
        assert json.loads((await here.embed(source, "--out", out, "--json")).out)["was_there"] is True


def touched(folder: Path) -> dict[str, tuple[int, int]]:
    """The outputs in the folder, as they are."""
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.glob("out*")}


CHANGES = {
    "model": (("--model", "other"), "model was tiny, now it is other"),
    "dimensions": (("--dimensions", "8"), "dimensions was 16, now it is 8"),
    "rows": (("--limit", "20"), "limit was not given, now it is 20; rows was 50, now it is 20"),
    "text": (("--text", "{id} {text}"), "text was text, now it is {id} {text}"),
    "failed": (("--failed", "omit"), "failed was nan, now it is omit"),
    "input type": (("--input-type", "query"), "space was "),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_an_output_of_something_else_is_left_alone(tmp_path: Path, change: str) -> None:
    """A line says what differs, whether it is finished or not; --force does it again."""
    options, told = CHANGES[change]
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", some(50)), here.path("out.npy")
        await here.embed(source, "--out", out)
        here.bought()
        before = touched(tmp_path)
        one_line(await here.embed(source, "--out", out, *options), told, "is there", "--force")
        assert (here.bought(), touched(tmp_path)) == ([], before)
        assert (await here.embed(source, "--out", out, *options, "--force")).code == 0
        assert meta_of(out)["subject"] != {}
        assert touched(tmp_path)["out.npy"] != before["out.npy"]


async def test_a_file_that_is_not_ours_is_not_overwritten(tmp_path: Path) -> None:
    """An array that nothing is known of stays, unless it may go."""
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", some(50)), here.path("out.npy")
        np.save(out, np.ones(3))
        before = touched(tmp_path)
        one_line(await here.embed(source, "--out", out), "out.npy is there", "out.npy.meta.json", "--force")
        assert (here.bought(), touched(tmp_path)) == ([], before)
        assert (await here.embed(source, "--out", out, "--force")).code == 0
        same(out, some(50))


@pytest.mark.parametrize("form", ["npy", "jsonl", "parquet"])
async def test_an_output_that_has_gone_is_not_there(tmp_path: Path, form: str) -> None:
    """Without it, what is known of it is worth nothing; one that was cut short is told."""
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", some(50)), tmp_path / f"out.{form}"
        await here.embed(source, "--out", str(out))
        whole = out.read_bytes()
        out.unlink()
        assert "done" in (await here.embed(source, "--out", str(out))).out
        assert out.read_bytes() == whole
        out.write_bytes(whole[: len(whole) // 2])
        here.bought()
        one_line(await here.embed(source, "--out", str(out)), "is there", "--force")
        assert here.bought() == []
        assert (await here.embed(source, "--out", str(out), "--force")).code == 0
        assert out.read_bytes() == whole


@pytest.mark.parametrize("form", ["npy", "jsonl", "parquet"])
async def test_only_texts_that_are_new_are_bought(tmp_path: Path, form: str) -> None:
    """Some changed, some added, some gone, all in another order: what was there is taken from there."""
    before = some(1000)
    after = [text if at % 100 else f"new {at}" for at, text in enumerate(before[::-1])][:950] + some(25, 5000)
    async with site(tmp_path) as here:
        out, fresh = here.path(f"out.{form}"), here.path(f"fresh.{form}")
        await here.embed(here.write("in.csv", before), "--out", out)
        here.bought()
        source = here.write("in.csv", after)
        one_line(await here.embed(source, "--out", out), "the input has changed", "rows was 1000, now it is 975")
        said = await here.embed(source, "--out", out, "--force")
        assert said.code == 0
        assert sorted(here.bought()) == sorted(set(after) - set(before))
        assert "975 ok, 0 failed, 940 kept" in said.out
        await here.embed(source, "--out", fresh)
        assert content(out) == content(fresh)


async def test_vectors_of_another_space_are_not_kept(tmp_path: Path) -> None:
    """The same texts for another model, or narrower, are other vectors."""
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", some(50)), here.path("out.npy")
        await here.embed(source, "--out", out)
        await here.embed(source, "--out", out, "--model", "other", "--force")
        np.testing.assert_array_equal(np.load(out), vectors(some(50), "other"))
        await here.embed(source, "--out", out, "--force")
        same(out, some(50))


# ── rows without a vector ───────────────────────────────────────────────────────────────────────────────────────────


POISON = "text 17"


async def test_a_row_that_fails_is_listed_and_its_neighbours_are_whole(tmp_path: Path) -> None:
    """NaN in its place; who asks again hears so, and --retry-failed buys it alone."""
    texts = some(300)
    texts[40] = ""
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", texts), here.path("out.npy")
        here.upstream.poison.add(POISON)
        said = await here.embed(source, "--out", out, "--id", "id")
        assert said.code == 3
        assert "300: 298 ok, 2 failed" in said.out
        same(out, texts, without=[17, 40])
        refused = (17, "id17", "The provider rejected this input.")
        assert here.failed(out) == [refused, (40, "id40", "the text is empty")]
        assert "" not in here.bought()
        again = await here.embed(source, "--out", out, "--id", "id")
        assert (again.code, here.bought()) == (3, [])
        assert "2 of them without a vector" in again.out
        here.upstream.heal()
        said = await here.embed(source, "--out", out, "--id", "id", "--retry-failed")
        assert (said.code, here.bought()) == (3, [POISON])
        same(out, texts, without=[40])
        assert [row for row, *_ in here.failed(out)] == [40]


@pytest.mark.parametrize("form", ["npy", "jsonl", "parquet"])
async def test_rows_that_fail_can_be_left_out(tmp_path: Path, form: str) -> None:
    """The output has as many rows as there are vectors, and is whole again once they can be had."""
    texts = some(300)
    async with site(tmp_path) as here:
        source, out, fresh = here.write("in.csv", texts), here.path(f"out.{form}"), here.path(f"fresh.{form}")
        here.upstream.poison.update({POISON, "text 299"})
        wish = (source, "--failed", "omit", "--out", out)
        assert (await here.embed(*wish)).code == 3
        left = [text for text in texts if text not in here.upstream.poison]
        np.testing.assert_array_equal(array_of(out), vectors(left))
        assert [row for row, *_ in here.failed(out)] == [17, 299]
        assert meta_of(out)["rows"] == 298
        assert (await here.embed(*wish)).code == 3
        here.bought()
        here.upstream.heal()
        assert (await here.embed(*wish, "--retry-failed")).code == 0
        assert sorted(here.bought()) == [POISON, "text 299"]
        assert names(tmp_path, "*.failed.jsonl") == []
        await here.embed(source, "--out", fresh)
        assert content(out) == content(fresh)


def array_of(out: str) -> npt.NDArray[np.float32]:
    """The vectors of an output of any form."""
    path = Path(out)
    if path.suffix == ".npy":
        return np.asarray(np.load(path))
    if path.suffix == ".jsonl":
        found = [json.loads(line)["embedding"] for line in path.read_text().splitlines()]
    else:
        found = pq.read_table(path).to_pydict()["embedding"]
    return np.array(found, np.float32)


async def test_a_call_that_fails_is_tried_again(tmp_path: Path) -> None:
    """What passes leaves no trace."""
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", some(300)), here.path("out.npy")
        here.upstream.inject(faults.status(500), calls=2)
        assert (await here.embed(source, "--out", out)).code == 0
        same(out, some(300))


async def test_who_is_not_answered_gives_up_and_says_how_to_go_on(tmp_path: Path) -> None:
    """Exit code 4, and a line with the command; that one buys what is left."""
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", some(300)), here.path("out.npy")
        wish = (source, "--out", out, *HURRIED)
        here.upstream.inject(honest, calls=28)
        here.upstream.inject(faults.status(503))
        said = await here.embed(*wish)
        one_line(said, "no row was done for", "go on with: embedgate embed", f"--out {out}", code=4)
        assert names(tmp_path, "out.npy") == []
        safe = json.loads(content(f"{out}.progress"))["rows"]
        assert 0 < safe < 300
        here.upstream.heal()
        here.bought()
        assert (await here.embed(*wish)).code == 0
        same(out, some(300))
        assert sorted(here.bought()) == sorted(some(300 - safe, safe))


HURRIED = ("--give-up-after", "1s", "--pool", "1", "--batch", "10")


async def honest(wire: faults.Wire, content: bytes) -> None:
    """No fault at all."""
    await wire.answer(200, content, {})


# ── what it says ────────────────────────────────────────────────────────────────────────────────────────────────────


HEADS = ["MODEL", "ROWS", "TOKENS", "EXACT", "USD", "BATCH", "USD", "MINUTES"]


async def test_what_it_would_cost_is_told_before_a_cent_is_spent(tmp_path: Path) -> None:
    """For every model, at both prices where they are known; nobody is asked."""
    async with site(tmp_path) as here:
        source = here.write("in.csv", ["word " * 100] * 1000)
        said = await here.embed(source, "--dry-run", "--json")
        assert (said.code, said.err) == (0, "")
        tiny, other = map(json.loads, said.out.splitlines())
        tokens = tiny["tokens"]
        assert (tiny["model"], tiny["rows"]) == ("tiny", 1000)
        assert 90_000 < tokens < 130_000
        assert (tiny["usd"], tiny["batch_usd"]) == (f"{tokens * 20 / 1e6:.4f}", f"{tokens * 10 / 1e6:.4f}")
        assert tiny["minutes"] == round(tokens / 1e6, 1)
        assert (other["model"], other["usd"], other["minutes"]) == ("other", "", "")
        shown = await here.embed(source, "--dry-run", "--out", here.path("out.npy"))
        assert shown.out.splitlines()[0].split() == HEADS
        assert (here.bought(), names(tmp_path, "out*")) == ([], [])


async def test_the_last_word_and_the_sidecar_tell_what_was_done(tmp_path: Path) -> None:
    """To the fourth decimal of a dollar, and to the last digit; a line for every thousand rows goes before."""
    texts = some(2500)
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", texts), here.path("out.npy")
        said = await here.embed(source, "--out", out, "--dataset", "numbers", "--split", "train")
        bill = here.upstream.bill
        cost = bill.tokens * 20 / 1e6
        lines = dict(line.split(maxsplit=1) for line in said.out.splitlines()[1:])
        assert lines["rows"] == "2500: 2500 ok, 0 failed, 0 kept"
        assert lines["texts"] == f"2500, 0 of them cached, in {bill.requests} calls"
        assert (lines["tokens"], lines["cost"]) == (str(bill.tokens), f"{cost:.4f} USD")
        shown = said.err.splitlines()[-1]
        assert shown.startswith("2500/2500 rows, ")
        assert shown.endswith(f" rows/s, {bill.tokens} tokens, ${cost:.4f}")
        assert not shown.startswith("2500/2500 rows, 0 rows/s")
        meta = meta_of(out)
        facts = {"model": MODEL, "dimensions": WIDTH, "rows": 2500, "failed": 0, "dtype": "float32", "id": None}
        facts |= {"dataset": "numbers", "split": "train", "text": "text", "tokens": bill.tokens}
        assert meta | facts == meta
        assert float(meta["cost_usd"]) == pytest.approx(cost)
        assert meta["calls"] == bill.requests
        assert meta["started_at"] <= meta["finished_at"]
        assert meta["versions"].keys() == {"embedgate", "numpy", "python"}
        assert meta["subject"]["source"]


async def test_the_last_word_can_be_for_programs(tmp_path: Path) -> None:
    """One JSON object, and nothing else."""
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", some(1200)), here.path("out.npy")
        said = await here.embed(source, "--out", out, "--json")
        told = json.loads(said.out)
        assert said.err == ""
        bill = here.upstream.bill
        assert told.pop("seconds") > 0
        assert told.pop("cost_usd") == pytest.approx(bill.tokens * 20 / 1e6)
        assert told == {
            "out": out, "rows": 1200, "failed": 0, "kept": 0, "cached": 0, "calls": bill.requests,
            "tokens": bill.tokens, "was_there": False,
        }  # fmt: skip


# ── what is wrong ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_cannot_be_done_is_one_line(tmp_path: Path) -> None:
    """Exit code 2, nobody is asked, and nothing is left behind."""
    async with site(tmp_path) as here:
        source, folder = here.write("in.csv", some(10)), here.path("")
        (tmp_path / "broken.parquet").write_bytes(b"PAR1 is no such file")
        failures = [
            ((source, "--out", here.path("out.npy"), "--text", "body"), ("no column 'body'", "id, text")),
            ((source, "--out", here.path("out.npy"), "--id", "key"), ("no column 'key'",)),
            ((here.path("none.csv"), "--out", here.path("out.npy")), ("there is no file",)),
            ((here.path("broken.parquet"), "--out", here.path("out.npy")), ("broken.parquet",)),
            ((source, "--out", here.path("out.tar")), ("out.tar", ".npy, .parquet, .arrow or .jsonl")),
            ((source,), ("--out",)),
            ((source, "--out", here.path("none/out.npy")), ("none/out.npy: there is no folder",)),
            ((source, "--out", folder.rstrip("/")), (folder.rstrip("/"),)),
            ((source, "--out", here.path("out.npy"), "--model", "gpt"), ("gpt is not configured", "tiny, other")),
            ((source, "--out", here.path("out.npy"), "--seed", "7"), ("give a limit",)),
            ((source, "--out", source), ("in.csv is the output: name another",)),
            ((source, "--out", here.path("out.npy"), "--batch", "5000"), ("--batch: must be at most 2048",)),
            ((source, "--out", here.path("out.npy"), "--give-up-after", "0s"), ("--give-up-after: must be more",)),
            *(
                ((source, "--out", here.path("out.npy"), option, "\udcff"), (f"{option} ", "is no UTF-8"))
                for option in ("--text", "--id", "--dataset", "--split", "--model")
            ),
            ((source, "--out", here.path("out\udcff.npy")), ("--out ", "is no UTF-8")),
        ]
        for arguments, told in failures:
            one_line(await here.embed(*arguments), *told)
        assert (here.bought(), names(tmp_path, "out*")) == ([], [])


@pytest.mark.parametrize("option", ["--limit", "--seed"])
async def test_a_number_that_is_none_is_told(tmp_path: Path, option: str) -> None:
    """Beyond 64 bits, or below nothing."""
    async with site(tmp_path) as here:
        wish = (here.write("in.csv", some(10)), "--out", here.path("out.npy"), "--limit", "5")
        for number in (str(2**63), "-1"):
            said = await here.embed(*wish, option, number)
            assert (said.code, option in said.err, "Traceback" in said.err) == (2, True, False)


async def test_what_was_made_is_not_read_again(tmp_path: Path) -> None:
    """A glob that the output's own name matches finds what it has found before."""
    async with site(tmp_path) as here:
        (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ""}\n')
        wish = (here.path("*.jsonl"), "--out", here.path("out.jsonl"))
        assert (await here.embed(*wish)).code == 3
        said = await here.embed(*wish)
        assert (said.code, "is there and fits: 2 rows" in said.out, here.bought()) == (3, True, ["one"])


async def test_an_output_that_others_have_made_anew_is_bought_anew(tmp_path: Path) -> None:
    """A wider one, say: it is no more than was asked for, and a line says so."""
    async with site(tmp_path) as here:
        wish = (here.write("in.csv", some(10)), "--out", here.path("out.npy"))
        assert (await here.embed(*wish)).code == 0
        np.save(tmp_path / "out.npy", np.ones((10, 100), np.float32))
        one_line(await here.embed(*wish), "does not hold the 10 rows")
        assert (await here.embed(*wish, "--force")).code == 0
        same(here.path("out.npy"), some(10))


@pytest.mark.parametrize("content", [b"no json", b"{}", b'{"version": 99, "subject": {}, "started_at": ""}', b""])
async def test_a_checkpoint_that_cannot_be_read_is_told(tmp_path: Path, content: bytes) -> None:
    """It stays as it is until somebody says that it may go."""
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", some(50)), here.path("out.npy")
        progress = tmp_path / "out.npy.progress"
        progress.write_bytes(content)
        one_line(await here.embed(source, "--out", out), "out.npy.progress", "--force")
        assert (progress.read_bytes(), here.bought()) == (content, [])
        assert (await here.embed(source, "--out", out, "--force")).code == 0
        same(out, some(50))
        assert not progress.exists()


@pytest.mark.parametrize("lost", ["partial", "hashes.partial", "failed.jsonl.partial"])
async def test_half_an_output_that_has_gone_is_told(tmp_path: Path, lost: str) -> None:
    """What a checkpoint tells of has to be there; --force begins again."""
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", ["", *some(299, 1)]), here.path("out.jsonl")
        wish = (source, "--out", out, *HURRIED)
        here.upstream.inject(honest, calls=28)
        here.upstream.inject(faults.status(503))
        assert (await here.embed(*wish)).code == 4
        (tmp_path / f"out.jsonl.{lost}").unlink()
        here.upstream.heal()
        for _ in range(2):
            one_line(await here.embed(*wish), f"out.jsonl.{lost}", "--force")
        assert (await here.embed(*wish, "--force")).code == 3
        lines = [line["embedding"] for line in lines_of(out)]
        assert lines[0] is None
        np.testing.assert_array_equal(np.array(lines[1:], np.float32), vectors(some(299, 1)))


# ── by a running embedgate ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_running_embedgate_can_be_asked(tmp_path: Path) -> None:
    """Its vectors, by its tenant's key; what it refuses is a line."""
    async with running(tmp_path) as edge:
        here = Site(tmp_path, edge.upstream)
        source, out = here.write("in.csv", some(250)), here.path("out.npy")
        environ = {"EMBEDGATE_API_KEY": KEY, "EMBEDGATE_STORES__DATA_DIR": here.path("own")}
        wish = (source, "--out", out, "--server", edge.url)
        said = await command(*wish, "--model", SMALL, environ=environ)
        assert said.code == 0, said
        np.testing.assert_array_equal(np.load(out), identifying_vectors(some(250), SMALL, 1536))
        assert meta_of(out)["model"] == SMALL
        narrow = (source, "--out", here.path("narrow.npy"), "--server", edge.url, "--dimensions", "64")
        assert (await command(*narrow, "--model", SMALL, environ=environ)).code == 0
        assert np.load(here.path("narrow.npy")).shape == (250, 64)
        wish = (source, "--out", here.path("none.npy"), "--server", edge.url)
        one_line(await command(*wish, "--model", "gpt", environ=environ), "The model `gpt` does not exist")
        one_line(await command(*wish, environ=environ), "name the model")
        for key, told in (("wrong", "Incorrect API key"), ("", "API key"), (ADA_KEY, "does not exist")):
            said = await command(*wish, "--model", SMALL, environ=environ | {"EMBEDGATE_API_KEY": key})
            one_line(said, told)
        assert names(tmp_path, "none*") == []
