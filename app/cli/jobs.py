"""Hides the commands about jobs: files handed to a running embedgate, watched, and fetched when they are done."""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from app.cli.running import api_key, with_examples
from app.domain import Tier
from app.errors import ConfigurationError
from app.settings import Row, json_lines, server_url, table

if TYPE_CHECKING:
    import httpx

_JOBS = """
Have a file of requests embedded by a running embedgate, whatever happens meanwhile: OpenAI's Files and Batches API from
the command line. Each line of the file is a request of its own:

    {"custom_id": "a-1", "method": "POST", "url": "/v1/embeddings", "body": {"model": "text-embedding-3-small", "input": "hello"}}

    embedgate jobs submit requests.jsonl --wait
    embedgate jobs list
    embedgate jobs output batch_0123456789abcdefghijklmn > vectors.jsonl

The server is --server or $EMBEDGATE_URL, by default http://127.0.0.1:8080; your key is taken from $EMBEDGATE_API_KEY.
"""  # noqa: E501 - a line to copy
_SUBMIT = """
Upload a file and begin to embed it; with --wait stay until it is done and write what came of it beside the file, to
FILE.output.jsonl and FILE.errors.jsonl, unless --output and --errors say where to:

    embedgate jobs submit requests.jsonl
    embedgate jobs submit requests.jsonl --wait --output vectors.jsonl
    embedgate jobs submit requests.jsonl --metadata team=search --idempotency-key monday
    embedgate jobs submit requests.jsonl --tier vendor_batch

The tier vendor_batch is half the vendor's price (Voyage: two thirds): lines go through the vendor's own batches and are
done within a day. What the vendor is late with goes the ordinary way at the ordinary price, as the tier online does at
once. A job that names no tier has the bulk_tier of your tenant.

Given again with the same --idempotency-key it does not begin again. Exit code 3: some lines failed, 4: it was cancelled
or expired, 2: something is wrong with the file.
"""
_RETRY = """
Make a new job of the lines that failed in another one, as they stood in its input file, with its metadata:

    embedgate jobs retry batch_0123456789abcdefghijklmn --wait
"""

commands = typer.Typer(help=with_examples(_JOBS), no_args_is_help=True, rich_markup_mode=None)

_Job: TypeAlias = dict[str, Any]
_Server = Annotated[
    str, typer.Option("--server", metavar="URL", envvar="EMBEDGATE_URL", help="Where embedgate listens.")
]
_Id = Annotated[str, typer.Argument(metavar="JOB", help="Its id: batch_ and 24 characters.")]
_AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]
_Wait = Annotated[bool, typer.Option("--wait", help="Stay until it is done.")]
_HERE = "http://127.0.0.1:8080"
_LOOK_S = 1.0
_PLAIN_S = 10.0
_ENDED = {"completed": 0, "failed": 2, "expired": 4, "cancelled": 4}


@commands.command(help=with_examples(_SUBMIT))
def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Requests, one a line.")],
    server: _Server = _HERE,
    wait: _Wait = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Where good lines go, with --wait.")] = None,
    errors: Annotated[Path | None, typer.Option(metavar="FILE", help="Where failed ones go, with --wait.")] = None,
    tier: Annotated[Tier | None, typer.Option(help="How it is done; default: as your tenant's jobs are.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="May be repeated.")] = None,
    idempotency_key: Annotated[str, typer.Option(metavar="KEY", help="Any name for this wish.")] = "",
    as_json: _AsJson = False,
) -> None:
    """See `_SUBMIT`."""
    noted = _pairs(metadata or []) | ({"embedgate_tier": tier} if tier else {})
    with _client(server) as client:
        job = _create(client, _upload(client, file), noted, idempotency_key)
        if not wait:
            print(json_lines([job]) if as_json else job["id"])
            return
        job = _watch(client, job, quiet=as_json)
        kept = [(job["output_file_id"], output or Path(f"{file}.output.jsonl")),
                (job["error_file_id"], errors or Path(f"{file}.errors.jsonl"))]  # fmt: skip
        for file_id, path in kept:
            if file_id:
                _save(client, file_id, path)
        _report(job, as_json=as_json)
    raise typer.Exit(_verdict(job))


@commands.command("list")
def list_jobs(
    server: _Server = _HERE,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The newest so many.")] = 20,
    as_json: _AsJson = False,
) -> None:
    """List your jobs, the newest first."""
    with _client(server) as client:
        jobs = list(_pages(client, limit))
    print(json_lines(jobs) if as_json else table([_row(job) for job in jobs]))


@commands.command()
def show(job: _Id, server: _Server = _HERE, as_json: _AsJson = False) -> None:
    """Say how a job stands, and what was wrong with its file."""
    with _client(server) as client:
        found = _asked(client, "GET", f"/v1/batches/{job}")
    if as_json:
        print(json_lines([found]))
        return
    print(table([_row(found)]))
    for error in (found.get("errors") or {}).get("data", []):
        where = f"line {error['line']}: " if error.get("line") else ""
        print(f"{where}{error['code']}: {error['message']}")


@commands.command()
def cancel(job: _Id, server: _Server = _HERE, as_json: _AsJson = False) -> None:
    """Stop a job; what is done stays, and can be fetched."""
    with _client(server) as client:
        found = _asked(client, "POST", f"/v1/batches/{job}/cancel")
    print(json_lines([found]) if as_json else f"{found['id']}  {found['status']}")


@commands.command()
def output(
    job: _Id,
    server: _Server = _HERE,
    errors: Annotated[bool, typer.Option("--errors", help="The lines that failed instead.")] = False,
) -> None:
    """Print what came of a job, a line for each request, in the order of its file."""
    with _client(server) as client:
        found = _asked(client, "GET", f"/v1/batches/{job}")
        file_id = found["error_file_id" if errors else "output_file_id"]
        if not file_id:
            what = "error" if errors else "output"
            raise ConfigurationError(f"{job} has no {what} file: it is {found['status']}")
        for data in _content(client, file_id):
            sys.stdout.buffer.write(data)
        sys.stdout.flush()


@commands.command(help=with_examples(_RETRY))
def retry(job: _Id, server: _Server = _HERE, wait: _Wait = False, as_json: _AsJson = False) -> None:
    """See `_RETRY`."""
    with _client(server) as client:
        found = _asked(client, "GET", f"/v1/batches/{job}")
        if not found["error_file_id"]:
            raise ConfigurationError(f"{job} has no lines that failed: it is {found['status']}")
        failed = {json.loads(line)["custom_id"] for line in _lines(client, found["error_file_id"])}
        again = (line for line in _lines(client, found["input_file_id"]) if json.loads(line)["custom_id"] in failed)
        file_id = _upload_lines(client, again)
        new = _create(client, file_id, found.get("metadata") or {}, "")
        if wait:
            new = _watch(client, new, quiet=as_json)
            _report(new, as_json=as_json)
            raise typer.Exit(_verdict(new))
    print(json_lines([new]) if as_json else new["id"])


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────────────


def _row(job: _Job) -> Row:
    (total, ok, failed), told = _counts(job), job.get("embedgate") or {}
    made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(job["created_at"]))
    return {
        "id": job["id"], "status": job["status"], "paused": told.get("paused") or "", "tier": told.get("tier") or "",
        "model": job.get("model") or "", "lines": total, "ok": ok, "failed": failed,
        "tokens": (job.get("usage") or {}).get("total_tokens", 0), "usd": told.get("cost_usd") or "", "created": made,
    }  # fmt: skip


def _report(job: _Job, *, as_json: bool) -> None:
    """The last word on a job: what was done of it, what it cost, how long it took."""
    if as_json:
        print(json_lines([job]))
        return
    (total, ok, failed), told = _counts(job), job.get("embedgate") or {}
    took_s = max(0, _ended_at(job) - job["created_at"])
    calls = told.get("calls", 0)
    print(f"{job['id']}  {job['status']}")
    print(f"lines     {total}: {ok} ok, {failed} failed, {total - ok - failed} skipped")
    print(f"texts     {told.get('texts', 0)}, {told.get('cached_texts', 0)} of them cached, in {calls} calls")
    print(f"tokens    {(job.get('usage') or {}).get('total_tokens', 0)}")
    print(f"cost      {_dollars(told.get('cost_usd'))}")
    average = f", {took_s / calls:.3f} s a call" if calls else ""
    print(f"time      {took_s} s{average}")
    for error in (job.get("errors") or {}).get("data", []):
        where = f"line {error['line']}: " if error.get("line") else ""
        print(f"{where}{error['code']}: {error['message']}", file=sys.stderr)


def _counts(job: _Job) -> tuple[int, int, int]:
    """All lines, those done well, and those that failed."""
    counts = job.get("request_counts") or {}
    return counts.get("total", 0), counts.get("completed", 0), counts.get("failed", 0)


def _dollars(cost: str | None) -> str:
    return "not known" if cost is None else f"{float(cost):.4f} USD"


def _ended_at(job: _Job) -> int:
    names = ("completed_at", "failed_at", "expired_at", "cancelled_at")
    return next((int(job[name]) for name in names if job.get(name)), int(time.time()))


def _verdict(job: _Job) -> int:
    """The exit code."""
    return _ENDED.get(job["status"], 0) or (3 if _counts(job)[2] else 0)


def _watch(client: "httpx.Client", job: _Job, *, quiet: bool) -> _Job:
    """Waits until the job has ended: with a bar on a terminal, a line now and then elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[told]}"), TimeRemainingColumn(),
        console=console, disable=quiet or not console.is_terminal, transient=True,
    )  # fmt: skip
    started, said_at = time.monotonic(), 0.0
    with bar:
        shown = bar.add_task(job["status"], total=1, told="")
        while job["status"] not in _ENDED:
            time.sleep(_LOOK_S)
            job = _asked(client, "GET", f"/v1/batches/{job['id']}")
            told = _progress(job, time.monotonic() - started)
            total, ok, failed = _counts(job)
            done = ok + failed
            bar.update(shown, description=job["status"], completed=done, total=max(1, total), told=told)
            if not quiet and not console.is_terminal and time.monotonic() - said_at >= _PLAIN_S:
                said_at = time.monotonic()
                print(f"{job['id']} {job['status']} {done}/{total} {told}", file=sys.stderr, flush=True)
    return job


def _progress(job: _Job, seconds: float) -> str:
    told, tokens = job.get("embedgate") or {}, (job.get("usage") or {}).get("total_tokens", 0)
    speed = told.get("texts", 0) / max(seconds, 1e-3)
    paused = f", waits for {told['paused']}" if told.get("paused") else ""
    spent = f", ${told['cost_usd']}" if told.get("cost_usd") is not None else ""
    return f"{speed:.0f} texts/s, {tokens} tokens{spent}{paused}"


# ── the server ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _client(server: str) -> "Iterator[httpx.Client]":
    """What goes wrong with the server is told in a line."""
    import httpx

    headers = {"authorization": f"Bearer {api_key()}"} if api_key() else {}
    server = server_url(server)
    try:
        with httpx.Client(base_url=server, headers=headers, timeout=60.0) as client:
            yield client
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigurationError(f"{server} cannot be asked: {str(error) or type(error).__name__}") from error


def _asked(client: "httpx.Client", method: str, path: str, **more: Any) -> _Job:
    answer = client.request(method, path, **more)
    found: _Job = answer.json() if "json" in answer.headers.get("content-type", "") else {}
    if answer.is_error or not found:
        said = (found.get("error") or {}).get("message") or f"HTTP {answer.status_code}"
        raise ConfigurationError(f"{path}: {said}")
    return found


def _create(client: "httpx.Client", file_id: str, metadata: dict[str, str], idempotency_key: str) -> _Job:
    body = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h", "metadata": metadata}
    headers = {"idempotency-key": idempotency_key} if idempotency_key else {}
    return _asked(client, "POST", "/v1/batches", json=body, headers=headers)


def _upload(client: "httpx.Client", file: Path) -> str:
    try:
        with file.open("rb") as stream:
            parts = {"file": (file.name, stream, "application/jsonl")}
            return str(_asked(client, "POST", "/v1/files", data={"purpose": "batch"}, files=parts, timeout=None)["id"])
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from error


def _upload_lines(client: "httpx.Client", lines: Iterator[bytes]) -> str:
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as kept:
        for line in lines:
            kept.write(line + b"\n")
        kept.flush()
        return _upload(client, Path(kept.name))


def _pages(client: "httpx.Client", limit: int) -> Iterator[_Job]:
    after = ""
    while limit > 0:
        wanted: dict[str, str] = {"limit": str(min(limit, 100))} | ({"after": after} if after else {})
        page = _asked(client, "GET", "/v1/batches", params=wanted)
        yield from page["data"]
        limit -= len(page["data"])
        if not page["has_more"]:
            return
        after = page["data"][-1]["id"]


def _content(client: "httpx.Client", file_id: str) -> Iterator[bytes]:
    with client.stream("GET", f"/v1/files/{file_id}/content") as answer:
        if answer.is_error:
            raise ConfigurationError(f"{file_id}: HTTP {answer.status_code}")
        yield from answer.iter_bytes()


def _lines(client: "httpx.Client", file_id: str) -> Iterator[bytes]:
    """Ended by line feeds and nothing else, which httpx' own lines are not."""
    rest = b""
    for data in _content(client, file_id):
        *whole, rest = (rest + data).split(b"\n")
        yield from (line for line in whole if line.strip())
    if rest.strip():
        yield rest


def _save(client: "httpx.Client", file_id: str, path: Path) -> None:
    try:
        with path.open("wb") as kept:
            for data in _content(client, file_id):
                kept.write(data)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error


def _pairs(given: list[str]) -> dict[str, str]:
    pairs = [each.partition("=") for each in given]
    if any(not name or not equals for name, equals, _ in pairs):
        raise typer.BadParameter("must be NAME=VALUE", param_hint="--metadata")
    return {name: value for name, _, value in pairs}
