"""The command that turns a dataset into a table of LanceDB or Postgres: bought once, gone on with, no secret told."""

import asyncio
import json
from pathlib import Path
from typing import Any

import asyncpg
import lancedb
import numpy as np
import pytest

from tests.api.test_embed_command import HURRIED, Said, honest, one_line, site, some, vectors
from tests.emulators import faults


async def sql(url: str, statement: str) -> list[Any]:
    """What it answers."""
    connection = await asyncpg.connect(url)
    try:
        return list(await connection.fetch(statement))
    finally:
        await connection.close()


class Table:
    """An output of each kind, and how others see and change it."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._url = url
        self.out = f"{url.replace('user@', 'user:hush@')}#articles" if url else str(folder / "news.lance")
        self.name = f"{url}#articles" if url else self.out

    async def seen(self) -> dict[str, Any]:
        """The vectors by text, as others read them."""
        if self._url:
            found = await sql(self._url, "SELECT text, embedding::real[] FROM articles")
            return {row["text"]: row["embedding"] for row in found}
        table = await asyncio.to_thread(lancedb.connect(str(self._folder)).open_table, "news")
        return {row["text"]: row["vector"] for row in table.to_arrow().to_pylist()}

    async def empty(self) -> None:
        """Without rows."""
        if self._url:
            await sql(self._url, "TRUNCATE articles")
        else:
            table = await asyncio.to_thread(lancedb.connect(str(self._folder)).open_table, "news")
            table.delete("true")

    async def drop(self) -> None:
        """Gone."""
        if self._url:
            await sql(self._url, "DROP TABLE articles")
        else:
            lancedb.connect(str(self._folder)).drop_table("news")

    async def same(self, texts: list[str], without: tuple[str, ...] = ()) -> None:
        """Asserts that it holds the vectors of the texts, each its own, and null for those `without`."""
        seen = await self.seen()
        assert sorted(seen) == sorted(texts)
        for text, vector in zip(texts, vectors(texts), strict=True):
            if text in without:
                assert seen[text] is None
            else:
                np.testing.assert_array_equal(np.array(seen[text], np.float32), vector)


@pytest.fixture(params=["lance", "postgres"])
def table(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    """One of each kind, not yet made."""
    monkeypatch.chdir(tmp_path)
    url = str(request.getfixturevalue("postgres_url")) if request.param == "postgres" else ""
    return Table(tmp_path, url)


def written(folder: Path) -> str:
    """The names of all files, and what the small ones say."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lance"]
    return "".join(f"{path} {path.read_text(errors='ignore')}" for path in files)


def beside(folder: Path, end: str) -> Path:
    """The one file of this end that belongs to the output."""
    (found,) = folder.glob(f"*.{end}")
    return found


async def test_rows_are_bought_once(tmp_path: Path, table: Table) -> None:
    """The second run calls nothing; with other rows only those are bought, and only if that is wished."""
    texts = some(700)
    async with site(tmp_path) as here:
        source = here.write("in.csv", texts)
        said = await here.embed(source, "--out", table.out)
        assert said.code == 0, said
        assert said.out.startswith(f"{table.name}  done\n")
        await table.same(texts)
        assert sorted(here.bought()) == sorted(texts)
        said = await here.embed(source, "--out", table.out)
        assert said.code == 0
        assert said.out.startswith(f"{table.name} is there and fits: 700 rows")
        assert here.bought() == []
        other = here.write("in.csv", [*some(5, 1000), *texts[10:]])
        one_line(
            await here.embed(other, "--out", table.out), f"{table.name} is there, and is of something else: the in"
        )
        assert (await here.embed(other, "--out", table.out, "--force")).code == 0
        await table.same([*some(5, 1000), *texts[10:]])
        assert sorted(here.bought()) == sorted(some(5, 1000))


@pytest.mark.parametrize("manner", ["nan", "omit"])
async def test_a_row_that_fails_is_bought_once_more(tmp_path: Path, table: Table, manner: str) -> None:
    """It is null or left out, and listed; only it is asked for again."""
    texts = some(200)
    async with site(tmp_path) as here:
        wish = (here.write("in.csv", texts), "--out", table.out, "--failed", manner)
        here.upstream.poison.update({"text 17", "text 199"})
        said = await here.embed(*wish)
        assert (said.code, "198 ok, 2 failed" in said.out) == (3, True)
        assert len(beside(tmp_path, "failed.jsonl").read_text().splitlines()) == 2
        left = [text for text in texts if manner == "nan" or text not in here.upstream.poison]
        await table.same(left, without=("text 17", "text 199"))
        here.bought()
        assert (await here.embed(*wish)).code == 3
        assert here.bought() == []
        here.upstream.heal()
        assert (await here.embed(*wish, "--retry-failed")).code == 0
        await table.same(texts)
        assert sorted(here.bought()) == ["text 17", "text 199"]


async def test_who_gives_up_goes_on_with_the_same_command(tmp_path: Path, table: Table) -> None:
    """What is safe is not bought again; until then nobody sees a table."""
    async with site(tmp_path) as here:
        wish = (here.write("in.csv", some(300)), "--out", table.out, *HURRIED)
        here.upstream.inject(honest, calls=28)
        here.upstream.inject(faults.status(503))
        one_line(await here.embed(*wish), "go on with: embedgate embed", "--out", table.name, code=4)
        safe = json.loads(beside(tmp_path, "progress").read_bytes())["rows"]
        assert 0 < safe < 300
        here.upstream.heal()
        here.bought()
        assert (await here.embed(*wish)).code == 0
        await table.same(some(300))
        assert sorted(here.bought()) == sorted(some(300 - safe, safe))
        assert "partial" not in written(tmp_path)


async def test_a_table_that_is_gone_is_noticed(tmp_path: Path, table: Table) -> None:
    """An emptied one is told, and made again where that is wished; a dropped one is made again."""
    texts = some(120)
    async with site(tmp_path) as here:
        source = here.write("in.csv", texts)
        assert (await here.embed(source, "--out", table.out)).code == 0
        await table.empty()
        one_line(
            await here.embed(source, "--out", table.out), "does not hold the 120 rows that ", ".meta.json tells of"
        )
        assert (await here.embed(source, "--out", table.out, "--force")).code == 0
        await table.same(texts)
        await table.drop()
        here.bought()
        assert (await here.embed(source, "--out", table.out)).code == 0
        await table.same(texts)
        assert sorted(here.bought()) == sorted(texts)


async def test_a_table_of_others_is_told_once_and_for_all(tmp_path: Path, table: Table) -> None:
    """Nobody is told to try --force, which leaves it alone, too."""
    async with site(tmp_path) as here:
        wish = (here.write("in.csv", some(3)), "--out", table.out)
        assert (await here.embed(*wish)).code == 0
        if table.name == table.out:
            await table.drop()
            lancedb.connect(str(tmp_path)).create_table("news", [{"text": "theirs"}])
        else:
            await sql(table.out.partition("#")[0], "COMMENT ON TABLE articles IS 'theirs'")
        here.bought()
        for more in ((), ("--force",)):
            said = await here.embed(*wish, *more)
            one_line(said, f"{table.name} is there, and was not made by embedgate")
            assert "--force" not in said.err
        assert here.bought() == []


async def test_a_password_is_shown_nowhere(tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in what is said, however a run ends, nor in a file's name or words."""
    monkeypatch.chdir(tmp_path)
    table = Table(tmp_path, postgres_url)
    assert "hush" in table.out
    said: list[Said] = []
    async with site(tmp_path) as here:
        wish = (here.write("in.csv", some(300)), "--out", table.out)
        here.upstream.inject(honest, calls=28)
        here.upstream.inject(faults.status(503))
        said.append(await here.embed(*wish, *HURRIED))
        kept = written(tmp_path)
        said.append(await here.embed(*wish, "--dimensions", "4"))
        here.upstream.heal()
        said += [await here.embed(*wish), await here.embed(*wish), await here.embed(*wish, "--json")]
        said += [await here.embed(*wish, "--dimensions", "4"), await here.embed(*wish, "--failed", "omit")]
        said.append(await here.embed(*wish[:2], table.out.replace("/embedgate_", "/none_")))
        said.append(await here.embed(*wish[:2], table.out.partition("#")[0]))
        for shared in (("--part", "1/2"), ("--join", "2"), ("--on", "ray", "--server", "http://127.0.0.1:1")):
            one_line(await here.embed(*wish, *shared), f"{table.name}: parts are joined from files")
        await sql(postgres_url, "COMMENT ON TABLE articles IS NULL")
        said.append(await here.embed(*wish, "--force", "--dimensions", "4"))
    assert [each.code for each in said] == [4, 2, 0, 0, 0, 2, 2, 2, 2, 2]
    for each in said:
        assert "hush" not in each.out + each.err
        assert "user@" in each.out + each.err
    kept += written(tmp_path)
    assert ".pgvector.progress" in kept
    assert ".pgvector.meta.json" in kept
    assert "hush" not in kept
