import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import import_module
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import openai
import pytest

from tests.api.test_local_default import MODEL, default_service

MODULES = (
    "bisect", "calendar", "collections", "contextlib", "copy", "csv", "difflib", "fnmatch", "functools", "getpass",
    "glob", "gzip", "heapq", "html", "itertools", "json", "math", "pprint", "random", "secrets", "shlex", "shutil",
    "statistics", "subprocess", "tempfile", "textwrap", "time", "urllib.parse", "uuid", "webbrowser", "zlib",
)  # fmt: skip
"""Well-known modules whose docstrings hardly change between Python versions."""

QUESTIONS = {
    "How can I ask somebody for a password without showing it while they type?": "getpass.getpass",
    "delete a folder and everything inside it": "shutil.rmtree",
    "Which day of the week was some date?": "calendar.weekday",
    "I misspelled a word: which of my known words look most like it?": "difflib.get_close_matches",
    "How do I remember the results of a slow function so that the second call is fast?": "functools.lru_cache",
    "How much room is left on my hard drive?": "shutil.disk_usage",
    "break a long line of text into several shorter ones": "textwrap.wrap",
    "open my default browser at some address": "webbrowser.open",
    "generate an unguessable string for a password reset link": "secrets.token_urlsafe",
    "duplicate a nested object so that changing the clone leaves the original alone": "copy.deepcopy",
}
"""What a person might ask, and the docstring that answers it."""

Matrix: TypeAlias = npt.NDArray[np.float32]
Embed: TypeAlias = Callable[[Sequence[str]], Awaitable[Matrix]]


@pytest.fixture
async def embed() -> AsyncIterator[Embed]:
    """Texts to vectors, one row for each, by the official client of the embedded default; what is too long is cut."""
    async with default_service() as base_url, openai.AsyncOpenAI(base_url=base_url, api_key="any") as client:

        async def vectors(texts: Sequence[str]) -> Matrix:
            answer = await client.embeddings.create(model=MODEL, input=list(texts), extra_body={"truncate": "end"})
            return np.array([item.embedding for item in answer.data], dtype=np.float32)

        yield vectors


def docstrings() -> dict[str, str]:
    """The docstring's first two paragraphs of every public function and class of `MODULES`, by qualified name."""
    found = {}
    for name in MODULES:
        module = import_module(name)
        for member in sorted(getattr(module, "__all__", dir(module))):
            thing = getattr(module, member)
            mine = getattr(thing, "__module__", None) in (name, f"_{name}")
            if mine and not member.startswith("_") and (inspect.isroutine(thing) or inspect.isclass(thing)):
                text = inspect.getdoc(thing) or ""
                found[f"{name}.{member}"] = "\n\n".join(text.split("\n\n")[:2])
    return {name: text for name, text in found.items() if len(text) > 20}


async def test_questions_find_the_docstrings_that_answer_them(embed: Embed) -> None:
    """Of ten questions about Python's standard library at least eight have their answer among the first three."""
    documents = docstrings()
    assert len(documents) > 200
    assert documents.keys() >= set(QUESTIONS.values())
    names = list(documents)
    scores = await embed(list(QUESTIONS)) @ (await embed(list(documents.values()))).T
    ranks = []
    print(f"\n{'rank':>4}  {'expected':32} {'found':32} question")
    for (question, expected), row in zip(QUESTIONS.items(), scores, strict=True):
        order = [names[i] for i in np.argsort(-row)]
        ranks.append(order.index(expected) + 1)
        print(f"{ranks[-1]:>4}  {expected:32} {order[0]:32} {question}")
    assert sum(rank <= 3 for rank in ranks) >= 8
