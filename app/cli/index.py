"""Hides the command that makes a source tree searchable: its options, what is shown meanwhile, and what it came to."""

import ctypes
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app import money
from app.cli.running import Config, desk_at, explained, overridden, priced, run, with_examples
from app.settings import Settings, find, json_lines, load, table

if TYPE_CHECKING:
    from app.corpus.stream import Manner
    from app.corpus.tree.changes import Cut
    from app.corpus.tree.index import Tally
    from app.domain import Space
    from app.embed_desk import Asking, Desk
    from app.ports import TokenCounter

_INDEX = """
Make a source tree searchable: files are cut at their definitions and headings, embedded with your own model or one of a
running embedgate (--server), and kept in two LanceDB tables, chunks and files, in the folder DIR:

    embedgate index src --db src.index
    embedgate index . --db /var/lib/index --model text-embedding-3-small --exclude 'tests/' --exclude '*.sql'
    embedgate index src --db src.index --include '*.py' --max-file-size 200000 --json
    embedgate index src --db src.index --model m --server http://gateway:8080
    embedgate search src.index "where is the retry delay computed?"

Look first what all of the tree costs with every model that is configured (or --model, or that of a --server), before a
cent is spent:

    embedgate index src --dry-run --config prices.toml

What Git ignores is left out, and so are binary files and large ones (--max-file-size). The same command again embeds
only what has changed, removes what is gone, and goes on where it was stopped. An index is of one tree, one model and
one way to cut; --force makes it anew:

    embedgate index src --db src.index --chunk-tokens 512 --overlap-tokens 64 --force

What cannot be read or embedded is listed in DIR/failed.jsonl; the next run tries it again. Exit code 3: more files have
failed than may, 4: it gave up for now and can go on, 2: something is wrong with what was given:

    embedgate index src --db src.index --max-failed 0.2
"""

HELP = with_examples(_INDEX)
_LINE_CHUNKS = 1000
_BATCH_CHUNKS, _LEAST_AT_ONCE, _MOST_AT_ONCE = 100, 256, 8192
_SURE_PART = 0.3  # of what a model takes, where tokens are guessed: of code full of numbers there are 3.3 times as many
_BYTES, _TOKEN_BYTES = 48 * 2**20, 8  # of chunks under way, about; a text is there as such and in its passage
_M_ARENA_MAX, _ARENAS = -8, 2  # of glibc's malloc.h


def index(  # noqa: PLR0913 — a command has its options
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The tree, or a file.")],
    db: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder of the index; it is made.")] = None,
    model: Annotated[str, typer.Option(help="One that is configured; default: the first.")] = "",
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Of a chunk at most; default: [index] chunk_tokens, or what the model takes.")
    ] = None,
    overlap_tokens: Annotated[
        int | None, typer.Option(help="Of the piece before, where one definition is cut; default: [index].")
    ] = None,
    max_file_size: Annotated[
        int | None, typer.Option(metavar="BYTES", help="Larger files are left out; default: [index] max_file_bytes.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only such files, as in a .gitignore: '*.py'.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="No such files: 'docs/'; '!build/' has it back.")
    ] = None,
    max_failed: Annotated[
        float | None, typer.Option(help="The part of all files that may fail; default: [index], 0.05.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Forget the index that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost.")] = False,
    config: Config = None,
    server: Annotated[
        str, typer.Option(metavar="URL", help="Ask a running embedgate, with your $EMBEDGATE_API_KEY.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The report as a JSON object.")] = False,
) -> None:
    """See `_INDEX`."""
    from app.corpus.rows import DataError
    from app.embed_desk import Asking

    options = {
        "--chunk-tokens": ("chunk_tokens", chunk_tokens), "--overlap-tokens": ("overlap_tokens", overlap_tokens),
        "--max-file-size": ("max_file_bytes", max_file_size), "--max-failed": ("max_failed", max_failed),
    }  # fmt: skip
    settings = load(find(config, os.environ), os.environ)
    settings = settings.model_copy(update={"index": overridden(settings.index, options)})
    with explained():
        if not path.exists():
            raise DataError(f"{path}: there is no such file or folder")
        tree = _Tree(path.resolve(), include or [], exclude or [], settings)
        if dry_run:
            rows = _estimates(replace(tree, settings=priced(settings, model, server)))
            print(json_lines(rows) if as_json else table(list(map(_roughly, rows))))
            return
        if db is None:
            raise DataError("--db: in which folder shall the index be?")
        asking = Asking(model, input_type="document", insists=False)
        tally = _indexed(tree, db, asking, server, force=force, quiet=as_json)
    _end(tally, db, settings.index.max_failed, as_json=as_json)


def _end(tally: "Tally", db: Path, max_failed: float, *, as_json: bool) -> None:
    """The last word, and the exit code."""
    tolerated = tally.failed <= max_failed * tally.changes.files
    print(_report(tally, db, as_json=as_json))
    if not tolerated:
        told = f"{tally.failed} of {tally.changes.files} files failed, more than --max-failed allows"
        print(f"embedgate: {told}; see {db / 'failed.jsonl'}, and run the same command again", file=sys.stderr)
    raise typer.Exit(0 if tolerated else 3)


# ── the run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Tree:
    """What shall be indexed, and how."""

    root: Path
    include: Sequence[str]
    exclude: Sequence[str]
    settings: Settings

    def cut(self, space: "Space", counter: "TokenCounter") -> "Cut":
        """How its files are cut for this space: so that chunks fit, with whatever the model puts in front of them."""
        from app.corpus.tree.changes import Cut

        wanted = self.settings.index
        taken = counter.count(space.prompt) if space.prompt else 0
        most_tokens = space.max_input_tokens if counter.exact else int(_SURE_PART * space.max_input_tokens)
        chunk_tokens = min(wanted.chunk_tokens, most_tokens - taken)
        overlap_tokens = min(wanted.overlap_tokens, chunk_tokens // 8)
        return Cut(
            self.root, wanted.max_file_bytes, chunk_tokens, overlap_tokens, counter.count, self.include, self.exclude
        )


def _indexed(tree: _Tree, db: Path, asking: "Asking", server: str, *, force: bool, quiet: bool) -> "Tally":
    """To its end, with nobody else at the same index."""
    from app.corpus.tree.index import Indexing, Wish
    from app.corpus.tree.stored import Made
    from app.corpus.tree.tables import Tables, locked
    from app.embed_desk import passing

    async def work() -> "Tally":
        async with desk_at(passing(tree.settings), asking, server) as at:
            space = at.plan.space
            cut = tree.cut(space, at.runtime.menu.models[at.asking.model].counter)
            root = os.fsencode(tree.root).decode(errors="backslashreplace")
            made = Made(at.asking.model, space.id, at.dimensions, cut.chunk_tokens, cut.overlap_tokens, root=root)
            wish = Wish(cut, made, _manner(at, cut.chunk_tokens), anew=force)
            rng = random.Random()  # noqa: S311 — jitter
            with _Watch(tree.root.name, quiet=quiet) as watch:
                indexing = Indexing(
                    wish, Tables(db), at.runtime.gateway, at.asking.request, told=watch.told, complaint=at.complaint,
                    rng=rng,
                )  # fmt: skip
                await indexing.run()
        return indexing.tally

    _let_memory_go()
    with locked(db):  # until no thread is at work any more, after Ctrl-C, too
        return run(work)


def _let_memory_go() -> None:
    """What threads let go of goes back to the system, or to others, instead of being kept by each for itself.

    Else memory grows with the tree: by a fifth from 1,000 files to 5,000. It needs both: glibc has heaps for many
    threads, and Arrow brings an allocator of its own. Where there is another C library, nothing is changed.
    """
    import pyarrow as pa

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(_M_ARENA_MAX, _ARENAS)
    pa.set_memory_pool(pa.system_memory_pool())


def _manner(at: "Desk", chunk_tokens: int) -> "Manner":
    """As many chunks at once as fill the deployments, within some memory."""
    from app.corpus.stream import Manner

    limits = [at.runtime.settings.deployments[each.name].limits() for each in at.plan.route.deployments]
    texts = sum(2 * each.max_in_flight * each.max_batch_items for each in limits)
    bytes_each = 4 * at.plan.space.dimensions + _TOKEN_BYTES * chunk_tokens
    most = min(_MOST_AT_ONCE, max(_LEAST_AT_ONCE, _BYTES // bytes_each))
    return Manner(
        batch_rows=min(_BATCH_CHUNKS, *(each.max_batch_items for each in limits)),
        rows_at_once=min(most, max(_LEAST_AT_ONCE, texts)),
        give_up_after_s=at.runtime.settings.embed.give_up_after_s,
    )


class _Watch:
    """Shows how far a run is: a line that moves on a terminal, elsewhere one for every thousand chunks."""

    def __init__(self, name: str, *, quiet: bool) -> None:
        self._name, self._quiet = name, quiet
        self._said_chunks = 0

    def __enter__(self) -> "_Watch":
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._plain = not console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(20), TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(), console=console, disable=self._quiet or self._plain, transient=True,
        )  # fmt: skip
        self._bar.start()
        self._shown = self._bar.add_task(self._name, total=None, told="")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def told(self, tally: "Tally") -> None:
        """So much is written."""
        spent, chunks = tally.spent, tally.spent.rows
        cost = "" if spent.nano_usd is None else f", ${spent.nano_usd / money.NANO_USD:.4f}"
        failed = f", {tally.failed} failed" if tally.failed else ""
        speed = chunks / max(tally.seconds, 1e-3)
        told = (
            f"{tally.changes.files} files, {chunks} chunks, {speed:.0f} chunks/s, {spent.tokens} tokens{cost}{failed}"
        )
        self._bar.update(self._shown, told=told)
        if self._plain and not self._quiet and chunks // _LINE_CHUNKS > self._said_chunks // _LINE_CHUNKS:
            self._said_chunks = chunks
            print(told, file=sys.stderr, flush=True)


def _facts(tally: "Tally", db: Path) -> dict[str, Any]:
    """What a run came to; chunks are those that are searched now."""
    spent, changes = tally.spent, tally.changes
    return {
        "db": str(db), "files": changes.files, "unchanged": changes.unchanged_files,
        "changed": changes.files - changes.unchanged_files - tally.failed, "gone": tally.gone, "failed": tally.failed,
        "omitted": dict(changes.omitted), "chunks": changes.unchanged_chunks + spent.rows - spent.failed,
        "new_chunks": spent.rows - spent.kept - spent.failed, "kept_chunks": changes.unchanged_chunks + spent.kept,
        "failed_chunks": spent.failed, "kept_tokens": changes.unchanged_tokens + tally.kept_tokens,
        "tokens": spent.tokens, "cached": spent.cached, "calls": round(spent.calls, 3),
        "cost_usd": None if spent.nano_usd is None else spent.nano_usd / money.NANO_USD,
        "seconds": round(tally.seconds, 3), "outside_ms": round(tally.outside_ms, 3),
    }  # fmt: skip


def _report(tally: "Tally", db: Path, *, as_json: bool) -> str:
    """The last word on a run."""
    facts = _facts(tally, db)
    if as_json:
        return json.dumps(facts)
    omitted = ", ".join(f"{count} {reason}" for reason, count in sorted(tally.changes.omitted.items()))
    cost = "not known" if facts["cost_usd"] is None else f"{facts['cost_usd']:.4f} USD"
    beside = f", {facts['outside_ms']:.2f} ms a chunk beside the model" if tally.spent.rows else ""
    lines = [
        "{db}  done",
        "files     {files}: {changed} new or changed, {unchanged} as before, {failed} failed; {gone} gone",
        *([f"left out  {omitted}"] if omitted else []),
        "chunks    {chunks}: {new_chunks} new, {kept_chunks} kept; {failed_chunks} failed",
        "tokens    {tokens}; {kept_tokens} of kept chunks were not bought again",
        f"calls     {round(tally.spent.calls)}; {{cached}} chunks came from the cache",
        f"cost      {cost}",
        f"time      {tally.seconds:.1f} s{beside}",
        *([f"failed    {db / 'failed.jsonl'}; the next run tries these again"] if tally.failures else []),
    ]
    return "\n".join(line.format_map(facts) for line in lines)


# ── what it would cost ──────────────────────────────────────────────────────────────────────────────────────────────


def _estimates(tree: _Tree) -> list[dict[str, Any]]:
    """A row for each model that is configured: all of the tree, cut for it, in tokens, dollars and minutes."""
    from app.corpus.tree.changes import Changes
    from app.corpus.tree.pieces import Chunk
    from app.engine.intake import space_for
    from app.serving import Menu

    rows = []
    for name, served in Menu(tree.settings).models.items():
        cut = tree.cut(space_for(served.route, "document"), served.counter)
        changes = Changes(cut, {})
        chunks = tokens = 0
        for lot in changes.lots(_BATCH_CHUNKS, sys.maxsize):
            counts = [piece.tokens for piece in lot if isinstance(piece, Chunk)]
            chunks, tokens = chunks + len(counts), tokens + sum(counts)
        first = served.route.deployments[0]
        quota = first.limits.tokens_per_minute
        cost = None if first.price is None else money.cost_nano_usd(tokens, first.price) / money.NANO_USD
        rows.append(
            {
                "model": name, "files": changes.files, "chunks": chunks, "tokens": tokens,
                "exact": served.counter.exact, "usd": "" if cost is None else f"{cost:.4f}",
                "minutes": round(tokens / quota, 1) if quota else "",
            }
        )  # fmt: skip
    return rows


def _roughly(row: dict[str, Any]) -> dict[str, Any]:
    """For people: what is guessed is about that much."""
    return row if row["exact"] else row | {name: f"about {row[name]}" for name in ("tokens", "usd") if row[name] != ""}
