"""How a tree gets into its index: what is bought, what is kept, and what a run that dies in the middle leaves."""

import asyncio
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from app.corpus.rows import DataError
from app.corpus.stream import GaveUp, Manner
from app.corpus.tree.changes import Changes, Cut
from app.corpus.tree.index import FAILED, Indexing, Tally, Wish
from app.corpus.tree.pieces import passage
from app.corpus.tree.stored import Made
from app.corpus.tree.tables import Tables
from app.domain import ANONYMOUS, EmbeddingRequest, EmbeddingResult, Priority, Space
from app.errors import BudgetExhausted, ProviderUnavailable, RejectedInput
from tests.identity import identifying_vector, identifying_vectors

MODEL, WIDTH = "tiny", 8
MANNER = Manner(batch_rows=10, rows_at_once=40)
MADE = Made(MODEL, "s1-tiny", WIDTH, 120, 0, root="/tree")


@dataclass
class Vendor:
    """An Engine that answers a request after so many turns of the loop as chance will have it; see what it `sold`."""

    poison: set[str] = field(default_factory=set)
    sold: list[str] = field(default_factory=list)
    waiting: int = 0
    open: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    chance: random.Random = field(default_factory=lambda: random.Random(5))

    async def embed(self, request: EmbeddingRequest, bought: Any = None) -> EmbeddingResult:
        """See `Engine`."""
        texts = [str(text) for text in request.texts]
        self.waiting += len(texts)
        await self.open.wait()
        for _ in range(self.chance.randrange(30)):
            await asyncio.sleep(0)
        self.waiting -= len(texts)
        if self.error is not None:
            raise self.error
        if any(word in text for word in self.poison for text in texts):
            raise RejectedInput
        self.sold += texts
        vectors = [identifying_vector(text, MODEL, WIDTH).tobytes() for text in texts]
        return EmbeddingResult(vectors, sum(map(count, texts)), Space(MODEL, WIDTH), 0, calls=1, cost_nano_usd=7)


class Mortal(Tables):
    """Tables that die before their `life`-th change."""

    life = -1

    def _lives(self) -> None:
        self.life -= 1
        if self.life == 0:
            raise DataError("dead")

    def write(self, chunks: Any) -> None:
        """See `Tables`."""
        self._lives()
        super().write(chunks)

    def conclude(self, files: Any) -> None:
        """See `Tables`."""
        self._lives()
        super().conclude(files)

    def doubt(self, paths: Any) -> None:
        """See `Tables`."""
        self._lives()
        super().doubt(paths)

    def drop(self, ids: Any) -> None:
        """See `Tables`."""
        self._lives()
        super().drop(ids)


def count(text: str) -> int:
    """A token is four characters, or begun."""
    return -(-len(text) // 4)


def function(name: str, lines: int = 12) -> str:
    """The source of one that fills a chunk."""
    return f"def {name}():\n" + "".join(f"    {name}_{line} = call({line})\n" for line in range(lines))


@dataclass
class Bench:
    """A tree and its index."""

    folder: Path
    vendor: Vendor = field(default_factory=Vendor)

    def __post_init__(self) -> None:
        self.vendor.open.set()
        self.tables = Tables(self.folder / "index")

    def write(self, path: str, *functions: str) -> None:
        """A file of the tree, anew."""
        file = self.folder / "tree" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n\n".join(map(function, functions)))

    def remove(self, path: str) -> None:
        """A file of the tree."""
        (self.folder / "tree" / path).unlink()

    def indexing(self, *, manner: Manner = MANNER, tables: Tables | None = None, **how: Any) -> Indexing:
        """A run over it all, of small requests."""
        cut = Cut(self.folder / "tree", 10_000, 120, 0, count)
        return Indexing(
            Wish(cut, how.pop("made", MADE), manner, **how), tables or self.tables, self.vendor, ask,
            told=lambda tally: None, complaint=lambda: "", rng=random.Random(7),
        )  # fmt: skip

    async def run(self, **how: Any) -> Tally:
        """To its end."""
        indexing = self.indexing(**how)
        await indexing.run()
        return indexing.tally

    def bought(self) -> list[str]:
        """The first lines of all chunks that were sold since the last time."""
        sold, self.vendor.sold = self.vendor.sold, []
        return sorted(text.splitlines()[1] for text in sold)

    def content(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All rows of both tables by id, each chunk with its own vector, each file with the mean of its chunks'."""
        tables = Tables(self.folder / "index")
        tables.open()
        chunks, files = (
            {row.pop("id"): row for row in table.to_arrow().to_pylist()} for table in (tables._chunks, tables._files)
        )
        for chunk in chunks.values():
            said = passage(chunk["path"], chunk["symbol"], chunk["text"])
            assert np.float32(chunk.pop("vector")).tobytes() == identifying_vector(said, MODEL, WIDTH).tobytes()
            assert chunk["tokens"] == count(said) <= 120
        for path, file in files.items():
            parts = [chunk for chunk in chunks.values() if chunk["path"] == path]
            passages = [passage(path, chunk["symbol"], chunk["text"]) for chunk in parts]
            weights = [chunk["tokens"] for chunk in parts]
            mean = weights @ identifying_vectors(passages, MODEL, WIDTH)
            np.testing.assert_allclose(file.pop("vector"), mean / np.linalg.norm(mean), rtol=1e-4)
            assert (file["chunks"], file["tokens"]) == (len(parts), sum(weights))
        return chunks, files


def ask(texts: Sequence[str]) -> EmbeddingRequest:
    """At the lowest priority."""
    return EmbeddingRequest(ANONYMOUS, MODEL, tuple(texts), 0.0, Priority.BULK, cause="bulk")


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    """With a tree of twenty files, some of them of many chunks."""
    bench = Bench(tmp_path)
    for number in range(20):
        bench.write(f"lib{number % 3}/part{number}.py", *(f"f{number}x{at}" for at in range(1 + number % 7 * 3)))
    return bench


async def test_every_chunk_is_there_with_its_own_vector(bench: Bench) -> None:
    """Bought once, whatever the order of answers; and every file with the mean of its chunks."""
    tally = await bench.run()
    chunks, files = bench.content()
    assert len(files) == tally.changes.files == 20
    assert len(bench.bought()) == len(chunks) == tally.spent.rows > 150
    assert (tally.failed, tally.gone, tally.spent.kept) == (0, 0, 0)
    assert tally.spent.tokens == sum(chunk["tokens"] for chunk in chunks.values())
    assert not (bench.folder / "index" / FAILED).exists()


async def test_the_same_tree_buys_nothing(bench: Bench) -> None:
    """And leaves everything as it is; what that saved is told."""
    first = await bench.run()
    before = bench.content()
    bench.bought()
    again = await bench.run()
    assert (bench.bought(), bench.content()) == ([], before)
    changes = again.changes
    assert (changes.unchanged_files, changes.unchanged_chunks) == (20, first.spent.rows)
    assert (changes.unchanged_tokens, again.spent.rows) == (first.spent.tokens, 0)


async def test_only_what_changed_is_bought(bench: Bench) -> None:
    """A chunk that only moved keeps its vector, and has its new lines; what is gone is gone."""
    await bench.run()
    bench.bought()
    bench.write("lib1/part4.py", "fresh", *(f"f4x{at}" for at in range(12)))
    bench.write("lib0/new.py", "young")
    bench.remove("lib2/part5.py")
    bench.write("lib0/part6.py")
    tally = await bench.run()
    assert bench.bought() == ["def fresh():", "def young():"]
    assert (tally.changes.files, tally.changes.unchanged_files, tally.gone) == (19, 17, 2)
    assert tally.spent.kept == 12
    after = bench.content()
    assert (await bench.run(anew=True)).spent.kept == 0
    assert bench.content() == after


async def test_a_part_that_has_gone_leaves_its_file(bench: Bench) -> None:
    """Chunks that are no more in a file are no more in the table."""
    await bench.run()
    before, _ = bench.content()
    bench.write("lib1/part4.py", "f4x0")
    await bench.run()
    after, files = bench.content()
    assert files["lib1/part4.py"]["chunks"] == 1
    assert len(after) == len(before) - 12


async def test_an_index_is_of_one_kind(bench: Bench) -> None:
    """Another tree, model, space or cut is refused by what differs, and nothing is touched; unless it is made anew."""
    await bench.run()
    before = bench.content()
    bench.bought()
    kinds = {"root": "/other", "space": "s1-other", "model": "large", "chunk_tokens": 64, "overlap_tokens": 8}
    for name, now in kinds.items():
        other = msgspec.structs.replace(MADE, **{name: now})
        with pytest.raises(DataError, match=f"{name} was {getattr(MADE, name)}, now it is {now}.*--force"):
            await bench.run(made=other)
    assert (bench.bought(), bench.content()) == ([], before)
    await bench.run(made=other, anew=True)
    assert bench.tables.open() == other


async def test_nothing_to_index_changes_nothing(bench: Bench) -> None:
    """A tree that is empty, or not there, is a mistake and no wish, even where all was to be made anew."""
    await bench.run()
    before = bench.content()
    for file in (bench.folder / "tree").rglob("*.py"):
        file.unlink()
    for anew in (False, True):
        with pytest.raises(DataError, match="no file with words"):
            await bench.run(anew=anew)
        assert bench.content() == before
    with pytest.raises(DataError, match="no file with words"):
        await bench.run(tables=Tables(bench.folder / "new"))
    assert not (bench.folder / "new" / "chunks.lance").exists()


async def test_a_damaged_index_is_made_anew_only_if_that_is_wished(bench: Bench) -> None:
    """Else a line says how; whatever of it is damaged."""
    await bench.run()
    before = bench.content()
    for damaged in ("chunks.lance/_versions", "files.lance/data"):
        shutil.rmtree(bench.folder / "index" / damaged)
        with pytest.raises(DataError, match="if it is damaged, embedgate index --force makes it anew"):
            await bench.run(tables=Tables(bench.folder / "index"))
        await bench.run(tables=Tables(bench.folder / "index"), anew=True)
        assert bench.content() == before


async def test_an_index_in_its_tree_is_no_part_of_it(bench: Bench) -> None:
    """Neither its tables nor what it lists, whatever its name has, and even if the tree is its folder."""
    tables = Tables(bench.folder / "tree" / "my [index]!")
    bench.vendor.poison.add("f4x3_1")
    for files in (20, 20):
        assert (await bench.run(tables=tables)).changes.files == files
    shutil.rmtree(tables.folder)
    tables = Tables(bench.folder / "tree")
    for files in (20, 20):
        assert (await bench.run(tables=tables)).changes.files == files
    assert (tables.folder / FAILED).exists()


# ── what fails ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_chunk_that_is_refused_fails_alone(bench: Bench) -> None:
    """It is listed with its lines; its neighbours are there, and only it is bought when it can be had."""
    bench.vendor.poison.add("f4x3_1")
    tally = await bench.run()
    assert (tally.failed, tally.spent.failed) == (1, 1)
    [listed] = map(json.loads, (bench.folder / "index" / FAILED).read_text().splitlines())
    assert listed.items() >= {"path": "lib1/part4.py", "reason": "The provider rejected this input."}.items()
    lines = (bench.folder / "tree" / "lib1/part4.py").read_text().splitlines()
    assert lines[listed["start_line"] - 1] == "def f4x3():"
    chunks, files = bench.content()
    assert len(bench.bought()) == len(chunks)
    assert len(files) == 19
    bench.vendor.poison.clear()
    tally = await bench.run()
    assert bench.bought() == ["def f4x3():"]
    assert (tally.failed, tally.spent.kept) == (0, 12)
    assert len(bench.content()[1]) == 20
    assert not (bench.folder / "index" / FAILED).exists()


async def test_a_file_that_cannot_be_cut_stops_nobody(bench: Bench) -> None:
    """A path so long that no words fit beside it is listed; what was indexed before stays."""
    long = "/".join(["deep"] * 100) + "/file.py"
    bench.write(long, "unreachable")
    tally = await bench.run()
    assert (tally.changes.files, tally.failed) == (21, 1)
    assert [(failure.path, failure.start_line) for failure in tally.failures] == [(long, 0)]
    assert len(bench.content()[1]) == 20


@pytest.mark.parametrize("life", range(1, 6))
async def test_who_dies_at_any_moment_leaves_what_can_be_gone_on_with(bench: Bench, life: int) -> None:
    """The next run makes the index that one without a death would have made, and buys no chunk that is there."""
    await bench.run()
    for number in (4, 6, 9):
        bench.write(f"lib{number % 3}/part{number}.py", f"fresh{number}", *(f"f{number}x{at}" for at in range(2)))
    bench.remove("lib2/part5.py")
    mortal = Mortal(bench.folder / "index")
    mortal.life = life
    with pytest.raises(DataError, match="dead"):
        await bench.run(tables=mortal)
    chunks, _ = bench.content()
    bench.bought()
    await bench.run()
    there = {chunk["text"].splitlines()[0] for chunk in chunks.values()}
    assert there.isdisjoint(bench.bought())
    after = bench.content()
    await bench.run(anew=True)
    assert bench.content() == after


async def test_who_dies_while_a_file_changes_back_is_not_fooled(bench: Bench) -> None:
    """A file whose chunks were about to be replaced is not taken for whole, though it has its old words again."""
    await bench.run()
    before = bench.content()
    bench.write("lib1/part4.py", "other")
    mortal = Mortal(bench.folder / "index")
    mortal.life = 4  # doubted, written, dropped: dead before it is concluded
    with pytest.raises(DataError, match="dead"):
        await bench.run(tables=mortal)
    bench.write("lib1/part4.py", *(f"f4x{at}" for at in range(13)))
    await bench.run()
    assert bench.content() == before


# ── flow ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_no_more_is_read_than_there_is_room_for(bench: Bench) -> None:
    """While nobody is answered, the walker stands still."""
    bench.vendor.open.clear()
    running = asyncio.create_task(bench.run())
    while bench.vendor.waiting < 40:  # noqa: ASYNC110 — threads have to come that far
        await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert bench.vendor.waiting == 40
    bench.vendor.open.set()
    await running
    assert len(bench.content()[1]) == 20


@pytest.mark.looptime(start=1000.0)
async def test_who_is_not_answered_gives_up(bench: Bench) -> None:
    """After the time that was given, and says for how long; what was there is there, and the next run goes on."""
    bench.vendor.error = ProviderUnavailable(1.0)
    with pytest.raises(GaveUp, match=r"no chunk was done for \d+ s"):
        await bench.run(manner=Manner(10, 40, give_up_after_s=60.0))
    bench.vendor.error = None
    await bench.run()
    assert len(bench.content()[1]) == 20


async def test_a_budget_that_is_spent_ends_the_run(bench: Bench) -> None:
    """At once: to wait would not help."""
    bench.vendor.error = BudgetExhausted("all", "day")
    with pytest.raises(GaveUp, match="the budget is spent"):
        await bench.run()


def test_what_lies_in_a_folder_that_cannot_be_read_is_not_gone(tmp_path: Path) -> None:
    """Nobody knows whether it is; a file that cannot be read is there itself."""
    changes = Changes(Cut(tmp_path, 1024, 256, 32, len), {})
    changes._failed("sub/", "Permission denied")
    changes._failed("b.py", "Input/output error")
    assert changes.gone({"sub/a.py", "b.py", "subway.py"}) == {"subway.py"}
    changes._failed("/", "Permission denied")
    assert changes.gone({"subway.py"}) == set()
