"""Hides the command that asks an index: its options, and how places in a tree are shown."""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.cli.running import Config, api_key, run, with_examples
from app.errors import ConfigurationError, TryAgainLater
from app.settings import Settings, find, load

if TYPE_CHECKING:
    from app.corpus.tree.search import Hit
    from app.corpus.tree.stored import Made

_SEARCH = """
Ask an index that `embedgate index` has made: places by meaning and by words together, the best first, with the lines
that say most:

    embedgate search src.index "where is the retry delay computed?"
    embedgate search src.index "half-open socket" --language python --path 'net/' --limit 3
    embedgate search src.index BudgetExhausted --mode text
    embedgate search src.index "billing" --files --json | jq -r .path

The question is embedded with the model that the index was made with; it must still be the same. What was made with
--server is asked with --server, what with a configuration with this one:

    embedgate search src.index "billing" --server http://gateway:8080
    embedgate search src.index "billing" --config embedgate.toml
"""

HELP = with_examples(_SEARCH)
_INERT = {
    **{code: 0x2400 + code for code in range(0x20) if code != ord("\t")},  # ␛ for ESC
    **dict.fromkeys((*range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
}


def search(
    db: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the index.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="A question, or words.")],
    limit: Annotated[int, typer.Option("--limit", "-k", min=1, max=1000, help="So many places.")] = 10,
    mode: Annotated[
        Literal["hybrid", "vector", "text"], typer.Option(help="By both, by meaning, by words: that asks no model.")
    ] = "hybrid",
    language: Annotated[str, typer.Option(help="Only files in it: python, go, c++, markdown, …")] = "",
    path: Annotated[str, typer.Option(metavar="GLOB", help="Only such files, as in a .gitignore: 'src/*.py'.")] = "",
    files: Annotated[bool, typer.Option("--files", help="Whole files, each with its best place.")] = False,
    config: Config = None,
    server: Annotated[
        str, typer.Option(metavar="URL", help="Ask a running embedgate, with your $EMBEDGATE_API_KEY.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """See `_SEARCH`."""
    from app.corpus.rows import DataError

    settings = load(find(config, os.environ), os.environ)
    try:
        if not db.is_dir() or not query.strip():
            raise DataError(f"{db}: there is no such folder" if query.strip() else "the question is empty")
        from app.corpus.tree.languages import LANGUAGES
        from app.corpus.tree.search import search as search_in
        from app.corpus.tree.tables import Only, Tables

        only = Only(language.lower(), path)
        if language and only.language not in LANGUAGES:
            raise DataError(f"--language {language}: is not known, but {', '.join(LANGUAGES)}")
        tables = Tables(db)
        made = tables.open()
        if made is None:
            raise DataError(f"{db}: there is no index; embedgate index makes one")
        vector = None if mode == "text" else run(lambda: _vector(settings, made, db, query, server))
        hits = search_in(tables, query, vector, mode=mode, limit=limit, only=only, files=files)
    except (DataError, TryAgainLater) as error:
        raise ConfigurationError(str(error)) from error
    if not hits:
        print("embedgate: nothing was found", file=sys.stderr)
    elif as_json:
        for hit in hits:
            print(json.dumps(hit._asdict(), ensure_ascii=False))
    else:
        _show(hits)


async def _vector(settings: Settings, made: "Made", db: Path, query: str, server: str) -> bytes:
    """Of the question, in the space of the index."""
    from app.corpus.rows import DataError
    from app.embed_desk import Asking, desk
    from app.errors import EmbedgateError

    asking = Asking(made.model, input_type="document", insists=False)
    async with desk(settings, asking, server=server, api_key=api_key()) as at:
        if at.plan.space.id != made.space:
            told = f"{db}: was made with another {made.model} ({made.space}) than there is now ({at.plan.space.id})"
            raise DataError(f"{told}; embedgate index --force makes it anew")
        deadline = asyncio.get_running_loop().time() + settings.server.deadline_s
        asked = replace(at.asking, input_type="query" if at.asking.input_type else None)
        request = asked.request([query], deadline=deadline)
        try:
            result = await at.runtime.gateway.embed(request)
        except EmbedgateError as error:
            raise DataError(f"the question cannot be embedded: {error}") from error
    return result.vectors[0]


def _show(hits: "Sequence[Hit]") -> None:
    """In colours on a terminal, plain in a pipe."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.syntax import Syntax
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for hit in hits:
        place = f"{hit.path}:{hit.start_line}-{hit.end_line}" if hit.start_line else hit.path
        parts = ((_shown(place), "bold cyan"), (_shown(hit.symbol), "green"), (f"{hit.score:.3f}", "dim"))
        console.print(Text("  ").join(Text(*part) for part in parts if part[0]))
        if console.is_terminal:
            snippet = "\n".join(map(_shown, hit.snippet.split("\n")))
            code = Syntax(snippet, Syntax.guess_lexer(hit.path), line_numbers=True, start_line=hit.snippet_line)
            console.print(Padding(code, (0, 0, 1, 4)))
            continue
        for number, line in enumerate(hit.snippet.split("\n"), hit.snippet_line):
            print(f"{number:>8}  {_shown(line)}")


def _shown(text: str) -> str:
    """Of one line, without anything that a terminal would obey, or that would end it."""
    return text.translate(_INERT)
