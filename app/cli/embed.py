"""Hides the command that turns a dataset into vectors: its options, what is shown meanwhile, and what it came to."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from app import money
from app.cli.running import Config, api_key, desk_at, explained, overridden, priced, run, span_s, with_examples
from app.settings import Settings, find, json_lines, load, table

if TYPE_CHECKING:
    from app.cli.sharing import Sharing
    from app.corpus.rows import Source
    from app.corpus.run import Outcome, Wish
    from app.corpus.trail import Checkpoint
    from app.embed_desk import Asking, Desk

_EMBED = """
Turn a dataset into vectors: CSV, TSV, JSONL, Parquet, Arrow, lines or files of text, in this order into an array or a
table, with your own model or one of a running embedgate (--server):

    embedgate embed train.csv --text description --out train.npy
    embedgate embed 'data/*.jsonl' --text '{title}\\n{body}' --id url --model text-embedding-3-small --out data.parquet
    cat questions.txt | embedgate embed - --format lines --out questions.npy --input-type query

Or into the table news of the LanceDB database data, or a table of Postgres with pgvector (a password is better kept in
~/.pgpass or $PGPASSWORD); what is told here to lie beside OUT lies for Postgres in the current directory:

    embedgate embed train.csv --text description --out data/news.lance
    embedgate embed train.csv --text description --out 'postgresql://me@db.example.com/shop#articles'

Look first what it costs with every model that is configured (or --model, or that of a --server), before a cent is
spent; try it with a thousand random rows, the same each time:

    embedgate embed train.csv --text description --dry-run
    embedgate embed train.csv --text description --out some.npy --limit 1000 --seed 7 --json
    embedgate embed train.csv --text description --out some.npy --model text-embedding-3-small --dimensions 256

At the vendor's batch price, within a day (with --force another run calls these batches off); or beside others who use
the same quota:

    embedgate embed train.csv --text description --out train.npy --tier vendor_batch --dataset ag_news --split train
    embedgate embed train.csv --text description --out train.npy --batch 100 --pool 3 --tokens-per-minute 500000 \
        --safety-buffer 0.1 --give-up-after 30m --config quiet.toml

Whatever stops it, the same command goes on where it stopped: what is done is noted at once, in OUT.progress. An
output that is there and fits is left as it is, and nothing is called; if the input has changed, --force does it again
and buys only texts that are new:

    embedgate embed train.csv --text description --out train.npy --force

Rows that fail are listed in OUT.failed.jsonl and are NaN in an array, or left out; buy those again:

    embedgate embed train.csv --text description --out train.npy --failed omit
    embedgate embed train.csv --text description --out train.npy --retry-failed

On many machines, each does a part of the same input, and one of them joins these, without a call; or workers of a Ray
cluster do it, at one running embedgate, wherever they all see the same files:

    embedgate embed train.csv --text description --out train.npy --part 2/4
    embedgate embed train.csv --text description --out train.npy --join 4
    embedgate embed train.csv --text description --out train.npy --model m --server http://gateway:8080 --on ray
    embedgate embed train.csv --text description --out train.npy --model m --server http://gateway:8080 --on ray \
        --ray-address head:6379 --workers 8 --partitions 64

What it was made of stands in OUT.meta.json. Exit code 3: some rows have no vector, 4: it gave up for now and can go on,
2: something is wrong with what was given.
"""

HELP = with_examples(_EMBED)
_MOST = 2**63 - 1
_LINE_ROWS = 1000
_BATCH_ROWS, _LEAST_ROWS_AT_ONCE, _MOST_ROWS_AT_ONCE = 100, 256, 8192
_WINDOWS = 3  # of what is in flight at most: who waits in the queue, and who waits to be written
_VECTORS_BYTES = 48 * 2**20  # of rows under way, about
_LEAST_SPAN_ROWS, _MOST_SPAN_ROWS, _SPAN_BYTES = 1000, 8192, 6 * 2**20  # of rows that are ordered together


def embed(  # noqa: PLR0913 — a command has its options
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help='Files and globs; "-": the standard input.')],
    out: Annotated[
        str, typer.Option(metavar="OUT", help=".npy, .parquet, .arrow, .jsonl, DB/TABLE.lance, postgresql://…#TABLE")
    ] = "",
    text: Annotated[str, typer.Option(metavar="EXPR", help='A column, or a template: "{title}\\n{body}".')] = "text",
    id_column: Annotated[
        str, typer.Option("--id", metavar="COLUMN", help="Rows' names; default: id, or their number.")
    ] = "",
    form: Annotated[
        str, typer.Option("--format", help="csv, tsv, jsonl, parquet, arrow, lines, files; default: by the suffix.")
    ] = "",
    model: Annotated[str, typer.Option(help="One that is configured; default: the first.")] = "",
    dimensions: Annotated[int, typer.Option(min=0, help="Of the vectors; 0: the model's own.")] = 0,
    input_type: Annotated[
        Literal["query", "document"] | None, typer.Option(help="For models that tell them apart.")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=0, max=_MOST, help="Only so many rows; 0: all. The first, or random ones.")
    ] = 0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=_MOST, help="With --limit: random rows, the same for the same seed.")
    ] = None,
    failed: Annotated[Literal["nan", "omit"], typer.Option(help="What becomes of rows without a vector.")] = "nan",
    force: Annotated[bool, typer.Option("--force", help="Do again what is there and is of something else.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try rows again that have no vector.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost.")] = False,
    give_up_after: Annotated[str, typer.Option(metavar="AGE", help="Without a row done: 30m, 1h.")] = "",
    batch: Annotated[int, typer.Option(min=0, help="Texts in a call at most; default: [embed] batch.")] = 0,
    pool: Annotated[int, typer.Option(min=0, help="Calls at once at most; default: [embed] pool.")] = 0,
    tokens_per_minute: Annotated[int, typer.Option(min=0, help="Used at most; default: the deployment's.")] = 0,
    safety_buffer: Annotated[
        float | None, typer.Option(min=0, max=0.9, help="The part of it that is left free: 0.1.")
    ] = None,
    tier: Annotated[
        Literal["online", "vendor_batch"] | None,
        typer.Option(help="vendor_batch: at the batch price of OpenAI, Gemini or Voyage, within a day."),
    ] = None,
    dataset: Annotated[str, typer.Option(help="For OUT.meta.json; default: the input's name.")] = "",
    split: Annotated[str, typer.Option(help="For OUT.meta.json: train, test, …")] = "",
    config: Config = None,
    server: Annotated[
        str, typer.Option(metavar="URL", help="Ask a running embedgate, with your $EMBEDGATE_API_KEY.")
    ] = "",
    part: Annotated[str, typer.Option(metavar="N/COUNT", help="Only this part, into OUT.part-2-of-4: 2/4.")] = "",
    join: Annotated[int, typer.Option(min=0, metavar="COUNT", help="Make OUT of so many parts, which stay: 4.")] = 0,
    on: Annotated[Literal["ray"] | None, typer.Option(help="Let a cluster's workers ask the --server: ray.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="With --on ray: 8; default: as many as there are CPUs.")] = 0,
    partitions: Annotated[
        int, typer.Option(min=0, help="With --on ray: in so many pieces: 64; default: of 2,000 rows or more.")
    ] = 0,
    ray_address: Annotated[
        str, typer.Option(help="A cluster's: head:6379, auto; default: $RAY_ADDRESS, then this machine alone.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The report as a JSON object.")] = False,
) -> None:
    """See `_EMBED`."""
    from app.cli.sharing import Sharing
    from app.corpus.address import shown
    from app.embed_desk import Asking

    age_s = span_s(give_up_after, "--give-up-after") if give_up_after else None
    settings = _paced(
        load(find(config, os.environ), os.environ),
        {
            "--batch": ("batch", batch or None), "--pool": ("pool", pool or None), "--tier": ("tier", tier),
            "--tokens-per-minute": ("tokens_per_minute", tokens_per_minute or None),
            "--safety-buffer": ("safety_buffer", safety_buffer), "--give-up-after": ("give_up_after_s", age_s),
        },
    )  # fmt: skip
    sharing = Sharing(part, join, on, workers, partitions, ray_address)
    opened = partial(
        _opened, inputs, text=text, id=id_column or None, form=form or None, limit=limit or None, seed=seed, out=out
    )
    with explained(out):
        _refuse_bytes(text=text, id=id_column, model=model, dataset=dataset, split=split, out=out)
        sharing.check(inputs, out, server=server, retry_failed=retry_failed)
        source, out = sharing.mine(opened(), out)
        if dry_run:
            rows = _estimates(priced(settings, model, server), source)
            print(json_lines(rows) if as_json else table(rows))
            return
        facts = {"dataset": dataset or source.name, "split": split or None, "text": text, "id": id_column or None}
        given = _Given(
            _placed(out), Asking(model, dimensions, input_type), facts, server, failed == "omit", force, retry_failed,
            as_json,
        )  # fmt: skip
        if join or on:
            outcome = _shared(sharing, source, opened, settings, given)
        else:
            outcome = run(lambda: _embedded(source, settings, given))
    print(_report(outcome, shown(out), as_json=as_json))
    raise typer.Exit(3 if outcome.spent.failed else 0)


def _paced(settings: Settings, options: Mapping[str, tuple[str, Any]]) -> Settings:
    """With what the options say of `[embed]`."""
    from app.embed_desk import passing

    return passing(settings.model_copy(update={"embed": overridden(settings.embed, options)}))


def _refuse_bytes(**options: str) -> None:
    """Raises DataError for what a shell has passed on that is no text: it could be written nowhere."""
    from app.corpus.rows import DataError

    for name, said in options.items():
        if said.encode(errors="ignore").decode() != said:
            raise DataError(f"--{name} {said!r} is no UTF-8")


def _placed(out: str) -> str:
    from app.corpus.rows import DataError

    if not out:
        forms = "FILE.npy, FILE.parquet, FILE.arrow, FILE.jsonl, DB/TABLE.lance or postgresql://…#TABLE"
        raise DataError(f"--out: where to? {forms}")
    return out


class _Given(NamedTuple):
    """What was asked for, once it was understood."""

    out: str
    asking: "Asking"
    facts: dict[str, Any]
    server: str
    omits: bool
    force: bool
    retry_failed: bool
    quiet: bool


def _opened(inputs: Sequence[str], **how: Any) -> "Source":
    from app.corpus.sources import open_source

    return open_source(inputs, **how)


# ── the run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _embedded(source: "Source", settings: Settings, given: "_Given") -> "Outcome":
    from app.corpus.run import run as run_dataset

    async with desk_at(settings, given.asking, given.server) as at:
        with _Watch(source, quiet=given.quiet) as watch:
            return await run_dataset(
                _wish(at, source, given), at.runtime.gateway, at.asking.request, watch, complaint=at.complaint,
                wholesale=at.runtime.wholesale,
            )  # fmt: skip


def _shared(
    sharing: "Sharing", source: "Source", opened: "Callable[[], Source]", settings: Settings, given: "_Given"
) -> "Outcome":
    """By others, or by what they have left."""
    from app.cli.sharing import Task, by_ray, joined_from

    def task(parts: str, count: int) -> Task:
        given_here = given._replace(out=parts)
        return Task(opened, source.fingerprint, _embedded, given_here, count, settings.embed, api_key())

    with _Watch(source, quiet=given.quiet) as watch:
        if sharing.join:
            return joined_from(sharing.join, source, given, watch.told)
        wish = run(lambda: _wished(source, settings, given))
        return by_ray(sharing, wish, task, watch.told)


async def _wished(source: "Source", settings: Settings, given: "_Given") -> "Wish":
    """What is to be done, as the server has it; so a wrong key is told here, and not by all workers."""
    async with desk_at(settings, given.asking, given.server) as at:
        return _wish(at, source, given)


def _wish(at: "Desk", source: "Source", given: "_Given") -> "Wish":
    """What is to be done: as many rows at once as fill the deployments, within some memory."""
    from app.corpus.run import Wish
    from app.corpus.stream import Manner

    route, width = at.plan.route, at.plan.space.dimensions
    limits = [at.runtime.settings.deployments[each.name].limits() for each in route.deployments]
    texts = sum(_WINDOWS * each.max_in_flight * each.max_batch_items for each in limits)
    most = min(_MOST_ROWS_AT_ONCE, max(_LEAST_ROWS_AT_ONCE, _VECTORS_BYTES // (4 * width)))
    span_rows = min(_MOST_SPAN_ROWS, max(_LEAST_SPAN_ROWS, _SPAN_BYTES // (4 * width))) if at.in_batches else 0
    manner = Manner(
        batch_rows=min(_BATCH_ROWS, *(each.max_batch_items for each in limits)),
        rows_at_once=min(most, max(_LEAST_ROWS_AT_ONCE, texts), span_rows or most),
        span_rows=span_rows,
        give_up_after_s=at.runtime.settings.embed.give_up_after_s,
        omits=given.omits,
    )
    return Wish(
        source, given.out, at.asking.model, at.plan.space.id, at.dimensions, manner, given.facts,
        anew=given.force, failed_only=given.retry_failed,
    )  # fmt: skip


class _Watch:
    """Shows how far a run is: a bar on a terminal, elsewhere a line every thousand rows."""

    def __init__(self, source: "Source", *, quiet: bool) -> None:
        self._source, self._quiet = source, quiet
        self._said_rows = 0

    def __enter__(self) -> "_Watch":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._plain = not console.is_terminal
        self._bar = Progress(
            TextColumn(self._source.name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(), console=console, disable=self._quiet or self._plain, transient=True,
        )  # fmt: skip
        self._bar.start()
        self._shown = self._bar.add_task("", total=self._source.rows, told="")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def ordered(self, batches: int, over: int) -> None:
        """So many of the vendor's batches."""
        self._say(f"{batches} of the vendor's batches ordered, {over} over")

    def calling_off(self) -> None:
        """Those of before."""
        self._say("calling off the vendor's batches that were ordered before")

    def _say(self, told: str) -> None:
        self._bar.update(self._shown, told=told)
        if self._plain and not self._quiet:
            print(told, file=sys.stderr, flush=True)

    def told(self, checkpoint: "Checkpoint") -> None:
        """So much is safe."""
        spent, rows = checkpoint.spent, checkpoint.rows
        speed = rows / max(checkpoint.seconds, 1e-3)
        cost = "" if spent.nano_usd is None else f", ${spent.nano_usd / money.NANO_USD:.4f}"
        failed = f", {spent.failed} failed" if spent.failed else ""
        told = f"{speed:.0f} rows/s, {spent.tokens} tokens{cost}{failed}"
        self._bar.update(self._shown, completed=rows, told=told)
        new = rows // _LINE_ROWS > self._said_rows // _LINE_ROWS or (rows == self._source.rows and self._said_rows)
        if self._plain and not self._quiet and new:
            self._said_rows = rows
            print(f"{rows}/{self._source.rows} rows, {told}", file=sys.stderr, flush=True)


def _report(outcome: "Outcome", out: str, *, as_json: bool) -> str:
    """The last word on a run."""
    spent, seconds = outcome.spent, outcome.seconds
    cost = None if spent.nano_usd is None else spent.nano_usd / money.NANO_USD
    if as_json:
        return json.dumps(
            {
                "out": out, "rows": outcome.rows, "failed": spent.failed, "kept": spent.kept, "cached": spent.cached,
                "calls": round(spent.calls, 3), "tokens": spent.tokens, "cost_usd": cost, "seconds": round(seconds, 3),
                "was_there": outcome.was_there,
            }
        )  # fmt: skip
    if outcome.was_there:
        return (
            f"{out} is there and fits: {outcome.rows} rows, {spent.failed} of them without a vector; nothing was called"
        )
    calls = round(spent.calls)
    lines = [
        f"{out}  done",
        f"rows      {outcome.rows}: {outcome.rows - spent.failed} ok, {spent.failed} failed, {spent.kept} kept",
        f"texts     {outcome.rows - spent.kept}, {spent.cached} of them cached, in {calls} calls",
        f"tokens    {spent.tokens}",
        f"cost      {'not known' if cost is None else f'{cost:.4f} USD'}",
        f"time      {seconds:.1f} s" + (f", {seconds / calls:.3f} s a call" if calls else ""),
    ]
    if spent.failed:
        lines.append(f"failed    {outcome.trail.failed_file}; --retry-failed buys those again")
    return "\n".join(lines)


# ── what it would cost ──────────────────────────────────────────────────────────────────────────────────────────────


def _estimates(settings: Settings, source: "Source") -> list[dict[str, Any]]:
    """A row for each model of these: tokens, dollars at both prices, minutes at its quota."""
    from app.serving import Menu

    rows = []
    for name, served in Menu(settings).models.items():
        tokens = sum(served.counter.count(row.text) for row in source.read())
        first = settings.deployments[served.route.deployments[0].name]
        quota = served.route.deployments[0].limits.tokens_per_minute
        rows.append(
            {
                "model": name, "rows": source.rows, "tokens": tokens, "exact": served.counter.exact,
                "usd": _dollars(tokens, first.price), "batch_usd": _dollars(tokens, first.batch_price),
                "minutes": round(tokens / quota, 1) if quota else "",
            }
        )  # fmt: skip
    return rows


def _dollars(tokens: int, price: int | None) -> str:
    return "" if price is None else f"{money.cost_nano_usd(tokens, price) / money.NANO_USD:.4f}"
