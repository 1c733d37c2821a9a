"""`embedgate embed --part` on several machines and `--join` on one of them: what comes of it, and what is told."""

import json
from pathlib import Path

import pytest

from tests.api.test_embed_command import (
    CONFIGURATION,
    HURRIED,
    Site,
    command,
    content,
    honest,
    lines_of,
    meta_of,
    names,
    one_line,
    same,
    site,
    some,
)
from tests.emulators import faults

POISON = "text 30"


async def parts(here: Site, source: str, out: str, count: int, *options: str, code: int = 0) -> None:
    """All of them, each by a machine of its own."""
    for number in range(1, count + 1):
        said = await here.embed(source, "--out", out, "--part", f"{number}/{count}", *options)
        assert said.code in (0, code), said


@pytest.mark.parametrize("form", ["npy", "jsonl", "parquet"])
async def test_joined_parts_are_what_one_machine_makes(tmp_path: Path, form: str) -> None:
    """To the byte; every text is bought once, joining needs nobody, and the next run says that it is there."""
    async with site(tmp_path) as here:
        source, out, one = here.write("in.csv", some(250)), here.path(f"out.{form}"), here.path(f"one.{form}")
        sample = ("--limit", "203", "--seed", "7")
        assert (await here.embed(source, "--out", one, *sample)).code == 0
        bought = here.bought()
        await parts(here, source, out, 4, *sample)
        assert sorted(here.bought()) == sorted(bought)
        (tmp_path / "embedgate.toml").write_text(CONFIGURATION.format(upstream="http://127.0.0.1:9"))
        said = await here.embed(source, "--out", out, "--join", "4", *sample)
        assert (said.code, said.err) == (0, "")
        assert "203 ok, 0 failed" in said.out
        assert (content(out), content(f"{out}.hashes")) == (content(one), content(f"{one}.hashes"))
        joined, alone = meta_of(out), meta_of(one)
        for name in ("model", "space", "dimensions", "rows", "failed", "dataset", "text", "tokens", "subject"):
            assert joined[name] == alone[name]
        assert float(joined["cost_usd"]) == pytest.approx(float(alone["cost_usd"]), rel=1e-6)
        for option in (("--join", "4"), ()):
            said = await here.embed(source, "--out", out, *sample, *option)
            assert (said.code, "is there and fits" in said.out) == (0, True)
        assert f"out.part-2-of-4.{form}" in names(tmp_path, "out.part*")


async def test_failed_rows_of_parts_are_failed_rows_of_the_whole(tmp_path: Path) -> None:
    """By their numbers in it; they can be bought where they are, or in the whole."""
    texts = some(100)
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", texts), here.path("out.npy")
        here.upstream.poison.add(POISON)
        await parts(here, source, out, 4, code=3)
        assert [row for row, *_ in here.failed(here.path("out.part-2-of-4.npy"))] == [5]
        assert (await here.embed(source, "--out", out, "--join", "4")).code == 3
        same(out, texts, without=[30])
        assert [(row, name) for row, name, _ in here.failed(out)] == [(30, "id30")]
        here.upstream.poison.clear()
        here.bought()
        assert (await here.embed(source, "--out", out, "--part", "2/4", "--retry-failed")).code == 0
        assert (await here.embed(source, "--out", out, "--join", "4")).code == 3
        assert (await here.embed(source, "--out", out, "--join", "4", "--retry-failed")).code == 0
        same(out, texts)
        assert here.bought() == [POISON]


async def test_a_part_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Like any run; it cannot be joined before."""
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", some(600)), here.path("out.jsonl")
        assert (await here.embed(source, "--out", out, "--part", "1/2")).code == 0
        here.upstream.inject(honest, calls=2)
        here.upstream.inject(faults.status(503))
        half = await here.embed(source, "--out", out, "--part", "2/2", *HURRIED)
        assert half.code == 4
        assert "--part 2/2" in half.err
        one_line(await here.embed(source, "--out", out, "--join", "2"), "out.part-2-of-2.jsonl is not finished")
        here.upstream.heal()
        assert (await here.embed(source, "--out", out, "--part", "2/2")).code == 0
        assert (await here.embed(source, "--out", out, "--join", "2")).code == 0
        assert [line["text"] for line in lines_of(out)] == some(600)


async def test_parts_that_do_not_fit_are_told(tmp_path: Path) -> None:
    """Each in a line: of another model, of another input, not there; and what is there of something else stays."""
    async with site(tmp_path) as here:
        source, out = here.write("in.csv", some(40)), here.path("out.npy")
        for part, options in (("1/3", ()), ("2/3", ("--model", "other"))):
            assert (await here.embed(source, "--out", out, "--part", part, *options)).code == 0
        said = await here.embed(source, "--out", out, "--join", "3")
        assert (said.code, said.out) == (2, "")
        first, second = said.err.splitlines()
        assert "out.part-2-of-3.npy is of something else: model was other, now it is tiny" in first
        assert "out.part-3-of-3.npy is not there" in second
        one_line(await here.embed(source, "--out", out, "--part", "2/3"), "out.part-2-of-3.npy", "--force")
        for part in ("2/3", "3/3"):
            assert (await here.embed(source, "--out", out, "--part", part, "--force")).code == 0
        assert (await here.embed(source, "--out", out, "--join", "3")).code == 0
        same(out, some(40))


WRONG = {
    ("--part", "0/4"): "--part 0/4",
    ("--part", "5/4"): "--part 5/4",
    ("--part", "a"): "2/4",
    ("--part", "41/80"): "40 rows",
    ("--join", "80"): "40 rows",
    ("--part", "1/2", "--join", "2"): "give one",
    ("--part", "1/2", "--out", "t.lance"): "joined from files",
    ("--join", "2", "--out", "postgresql://nobody/db#t"): "joined from files",
    ("--on", "ray", "--server", "http://127.0.0.1:9", "--out", "t.lance"): "joined from files",
    ("--workers", "2"): "belong to --on ray",
    ("--on", "ray"): "--on ray needs --server",
    ("--on", "ray", "--server", "http://127.0.0.1:9", "--retry-failed"): "without --on ray",
    ("--on", "ray", "--server", "127.0.0.1:9", "--model", "tiny"): "cannot be asked",
}


@pytest.mark.parametrize("options", WRONG, ids=" ".join)
async def test_what_cannot_be_shared_is_told(tmp_path: Path, options: tuple[str, ...]) -> None:
    """In a line, and nothing is called."""
    async with site(tmp_path) as here:
        source = here.write("in.csv", some(40))
        one_line(await here.embed(source, "--out", here.path("out.npy"), *options), WRONG[options])
        assert (here.bought(), names(tmp_path, "out*")) == ([], [])


async def test_the_standard_input_is_not_for_others(tmp_path: Path) -> None:
    """Workers somewhere else cannot read it."""
    (tmp_path / "embedgate.toml").write_text(json.dumps({})[2:])
    wish = ("-", "--format", "lines", "--out", str(tmp_path / "out.npy"), "--on", "ray", "--server", "http://x")
    one_line(await command(*wish, "--config", str(tmp_path / "embedgate.toml")), "standard input")
