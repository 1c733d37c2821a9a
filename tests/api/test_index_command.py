"""The commands that make a source tree searchable and ask it: what they find, what was bought, and what they say."""

import asyncio
import io
import json
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from app.corpus.tree.tables import locked
from app.tokens import Cl100k
from tests.api.conftest import KEY, SMALL, running
from tests.api.test_embed_command import CONFIGURATION, MODELS, Said, one_line
from tests.emulators import faults
from tests.emulators.openai import OpenAIEmulator

SOURCES = {
    "shop/cart.py": '''
class Cart:
    """What somebody wants to buy."""

    def add_item(self, product, quantity):
        """Puts a product into the cart."""
        self.items[product] = self.items.get(product, 0) + quantity

    def total_price(self):
        """The sum over all products, with taxes."""
        return sum(product.price * quantity for product, quantity in self.items.items()) * TAX_FACTOR
''',
    "shop/payment.py": '''
def charge_credit_card(card, amount):
    """Takes the money, and tries again when the bank does not answer."""
    for attempt in range(3):
        if bank.withdraw(card, amount):
            return True
    return False
''',
    "shop/mail.py": '''
def send_confirmation_email(customer, order):
    """Tells the customer by mail that the order has arrived."""
    smtp.send(customer.address, f"Thank you for your order {order.number}")
''',
    "web/session.js": """
// Keeps users signed in.
export function signIn(username, password) {
  if (!checkPassword(username, password)) throw new Error("wrong password");
  return createSessionCookie(username);
}
""",
    "web/upload.go": """
package web

// ResizePicture makes a thumbnail of an uploaded photo.
func ResizePicture(photo Image, width int) Image {
	return photo.Scale(width, photo.Height*width/photo.Width)
}
""",
    "docs/weather.md": """
# Weather

It will rain tomorrow in the mountains, and the wind blows from the west.
""",
}
GUESSED = """
[models.dense]
deployments = ["guessed"]
dimensions = 16
max_input_tokens = 256
[deployments.guessed]
dialect = "openai"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "tiny"
usd_per_million_tokens = 20
[models.sure]
deployments = ["sure"]
[deployments.sure]
dialect = "openai"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "text-embedding-3-small"
"""
"""A model whose tokens nobody can count, and one of whom everybody can."""
QUESTIONS = {
    "How much does everything in my basket cost together?": "shop/cart.py",
    "What happens when the bank is unreachable while paying?": "shop/payment.py",
    "notify the buyer that we received the purchase": "shop/mail.py",
    "Where is the login of a user verified?": "web/session.js",
    "shrink images that people send": "web/upload.go",
    "Do I need an umbrella?": "docs/weather.md",
}
"""What a person might ask, and the file that answers it."""


@dataclass
class Site:
    """A tree, a configuration, and the provider that stands in it; without one, the model on this machine."""

    folder: Path
    upstream: OpenAIEmulator | None = None
    runs: int = 0

    async def index(self, *arguments: str) -> Said:
        """`embedgate index TREE --db INDEX …`."""
        return await self.command("index", self.path("tree"), "--db", self.path("index"), *arguments)

    async def search(self, *arguments: str) -> Said:
        """`embedgate search INDEX …`."""
        return await self.command("search", self.path("index"), *arguments)

    async def hits(self, *arguments: str) -> list[dict[str, Any]]:
        """What was found."""
        said = await self.search(*arguments, "--json")
        assert said.code == 0, said
        return [json.loads(line) for line in said.out.split("\n")[:-1]]

    async def command(self, *arguments: str, environ: dict[str, str] | None = None) -> Said:
        """To its end, with nothing that an earlier one could have remembered but files."""
        self.runs += 1
        config = ["--config", self.path("embedgate.toml")] if self.upstream else []
        data = {"EMBEDGATE_STORES__DATA_DIR": self.path(f"data{self.runs}")}
        return await asyncio.to_thread(called, [*arguments, *config], data | (environ or {}))

    def path(self, name: str) -> str:
        """Of a file here."""
        return str(self.folder / name)

    def write(self, name: str, text: str) -> None:
        """A file of the tree."""
        file = self.folder / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.lstrip())

    def bought(self) -> list[str]:
        """Every text that was asked for since the last time."""
        assert self.upstream is not None
        inputs = [arrival.body["input"] for arrival in self.upstream.arrivals]
        self.upstream.arrivals.clear()
        return [text for given in inputs for text in ([given] if isinstance(given, str) else given)]


def called(arguments: list[str], environ: dict[str, str]) -> Said:
    """The console command, in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["embedgate", *arguments])
        for name, value in environ.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main()
    code = ended.value.code
    return Said(code if isinstance(code, int) else 0, *(each.buffer.getvalue().decode() for each in (out, err)))


@pytest.fixture
def local(tmp_path: Path) -> Site:
    """With the model on this machine."""
    site = Site(tmp_path)
    for name, text in SOURCES.items():
        site.write(name, text)
    return site


@asynccontextmanager
async def site(folder: Path) -> AsyncIterator[Site]:
    """With a provider."""
    async with OpenAIEmulator(models=MODELS) as upstream:
        (folder / "embedgate.toml").write_text(CONFIGURATION.format(upstream=upstream.base_url))
        here = Site(folder, upstream)
        for name, text in SOURCES.items():
            here.write(name, text)
        yield here


# ── finding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_questions_find_the_places_that_answer_them(local: Site) -> None:
    """In other words than those that stand there, with the model on this machine: of six, five come first."""
    assert (await local.index()).code == 0
    first = {question: (await local.hits(question))[0]["path"] for question in QUESTIONS}
    assert sum(first[question] == path for question, path in QUESTIONS.items()) >= 5, first
    for question, path in QUESTIONS.items():
        assert path in [hit["path"] for hit in await local.hits(question, "--files", "-k", "2")]


async def test_a_place_is_shown_with_its_lines(tmp_path: Path) -> None:
    """Plain in a pipe: where, what it defines, how well it fits, and the lines that say most, numbered."""
    async with site(tmp_path) as here:
        await here.index()
        here.bought()
        said = await here.search("resize picture", "--mode", "text", "-k", "1")
        assert here.bought() == []
        head, *lines = said.out.splitlines()
        place, symbol, _ = head.split()
        assert (place.partition(":")[0], symbol) == ("web/upload.go", "ResizePicture")
        assert "       4  func ResizePicture(photo Image, width int) Image {" in lines
        [hit] = await here.hits("resize picture", "--mode", "text", "-k", "1")
        assert place == f"{hit['path']}:{hit['start_line']}-{hit['end_line']}"
        assert (hit["language"], hit["symbol"]) == ("go", "ResizePicture")
        assert all(line in hit["snippet"] for line in (line[10:] for line in lines))
        paths = [hit["path"] for hit in await here.hits("the order", "--language", "Python", "--path", "shop/m*")]
        assert set(paths) == {"shop/mail.py"}
        assert len(here.bought()) == 1
        said = await here.search("(((", "--mode", "text", "--json")
        assert (said.code, said.out, said.err) == (0, "", "embedgate: nothing was found\n")


async def test_what_a_file_says_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    """Nothing of it moves a terminal, nor ends a line; programs get it as it is."""
    async with site(tmp_path) as here:
        text = "one\n\x1b]0;owned\x07 two\x0c\x85\u2028 \u202ethree\r four\n\tyellow\n"
        here.write("a\n\x1b[2J.txt", text)
        await here.index()
        said = await here.search("yellow", "--mode", "text")
        _, *lines = said.out.split("\n")
        assert said.out.startswith("a␊␛[2J.txt:1-4  ")
        assert lines == [
            "       1  one", "       2  ␛]0;owned␇ two␌\ufffd\ufffd \ufffdthree", "       3   four",
            "       4  \tyellow", "",
        ]  # fmt: skip
        [hit] = await here.hits("yellow", "--mode", "text")
        assert (hit["path"], hit["snippet"]) == ("a\n\x1b[2J.txt", text.strip().replace("\r", "\n"))


async def test_documents_and_questions_are_told_apart(tmp_path: Path) -> None:
    """A model that has words for a query gets them for the question only; the index fits both."""
    async with site(tmp_path) as here:
        await here.index()
        assert not any(text.startswith("query: ") for text in here.bought())
        assert (await here.search("rain?")).code == 0
        assert here.bought() == ["query: rain?"]


async def test_another_model_than_the_index_was_made_with_is_refused(tmp_path: Path) -> None:
    """Wrong vectors would be found as well as right ones: a line instead, for both commands."""
    async with site(tmp_path) as here:
        await here.index()
        here.bought()
        one_line(await here.index("--model", "other"), "model was tiny, now it is other", "--force")
        (tmp_path / "embedgate.toml").write_text(
            CONFIGURATION.format(upstream=here.upstream and here.upstream.base_url).replace(
                'query_prompt = "query: "', 'document_prompt = "text: "'
            )
        )
        one_line(await here.search("rain"), "was made with another tiny", "--force")
        one_line(await here.index(), "space was s1-", "--force")
        assert here.bought() == []
        assert len(await here.hits("rain", "--mode", "text")) == 1
        assert (await here.index("--force")).code == 0
        assert (await here.search("rain")).code == 0


# ── the report ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_last_word_tells_what_was_done(tmp_path: Path) -> None:
    """Files, chunks, tokens and money, to the last digit of the bill; the second time, what that saved."""
    async with site(tmp_path) as here:
        here.write("logo.png", "\x00\x01\x02" * 100)
        here.write("dump.txt", "word " * 10_000)
        said = await here.index("--max-file-size", "20000")
        assert here.upstream is not None
        bill = here.upstream.bill
        lines = dict(line.split(maxsplit=1) for line in said.out.splitlines())
        assert said.err == ""
        assert lines["files"] == "6: 6 new or changed, 0 as before, 0 failed; 0 gone"
        assert lines["left"] == "out  1 binary, 1 too large"
        assert lines["chunks"] == f"{bill.items}: {bill.items} new, 0 kept; 0 failed"
        assert lines["tokens"].startswith(f"{bill.tokens}; 0 of kept chunks")
        assert lines["cost"] == f"{bill.tokens * 20 / 1e6:.4f} USD"
        assert lines["time"].endswith("ms a chunk beside the model")
        here.bought()
        here.write("docs/weather.md", "# Weather\n\nThe sun shines.\n")
        (tmp_path / "tree" / "web/upload.go").unlink()
        told = json.loads((await here.index("--max-file-size", "20000", "--json")).out)
        assert len(here.bought()) == 1
        expected = {"files": 5, "unchanged": 4, "changed": 1, "gone": 1, "failed": 0, "new_chunks": 1, "calls": 1}
        assert told.items() >= expected.items()
        assert told["chunks"] == told["kept_chunks"] + 1
        assert told["kept_tokens"] > 100


async def test_what_it_would_cost_is_told_before_a_cent_is_spent(tmp_path: Path) -> None:
    """For every model, as it would be cut for it; nobody is asked, and nothing is left behind."""
    async with site(tmp_path) as here:
        said = await here.command("index", here.path("tree"), "--dry-run", "--json")
        tiny, other = map(json.loads, said.out.splitlines())
        assert (tiny["model"], tiny["files"], other["model"]) == ("tiny", 6, "other")
        assert tiny["usd"] == f"{tiny['tokens'] * 20 / 1e6:.4f}"
        assert (here.bought(), (tmp_path / "index").exists()) == ([], False)
        told = json.loads((await here.index("--json")).out)
        assert told["chunks"] == tiny["chunks"]


async def test_what_is_guessed_is_told_as_such(tmp_path: Path) -> None:
    """About so many tokens, of chunks that the model takes even where code is dense."""
    async with site(tmp_path) as here:
        assert here.upstream is not None
        with (tmp_path / "embedgate.toml").open("a") as config:
            config.write(GUESSED.format(upstream=here.upstream.base_url))
        numbers = "".join(f"    0x{number**7 % 2**32:08x}, 0x{number**9 % 2**32:08x},\n" for number in range(200))
        here.write("shop/table.py", f"TABLE = [\n{numbers}]\n")
        lines = (await here.command("index", here.path("tree"), "--dry-run")).out.splitlines()
        assert {line.split()[0]: line.count("about ") for line in lines}.items() >= {"dense": 2, "sure": 0}.items()
        assert (await here.index("--model", "dense")).code == 0
        counter = Cl100k()
        assert max(map(counter.count, here.bought())) <= 256


# ── what fails ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_few_failures_are_tolerated_and_more_are_not(tmp_path: Path) -> None:
    """Exit code 3 where more files failed than may; else 0 with a hint. Either way the next run needs only those."""
    async with site(tmp_path) as here:
        assert here.upstream is not None
        passages = [text for text in await passages_of(here) if "charge_credit_card" in text]
        here.upstream.poison.update(passages)
        said = await here.index()
        assert said.code == 3
        assert "1 of 6 files failed, more than --max-failed allows" in said.err
        assert "6: 5 new or changed, 0 as before, 1 failed; 0 gone" in said.out
        [listed] = map(json.loads, (tmp_path / "index" / "failed.jsonl").read_text().splitlines())
        assert listed["path"] == "shop/payment.py"
        said = await here.index("--max-failed", "0.2")
        assert (said.code, said.err) == (0, "")
        assert "failed.jsonl; the next run tries these again" in said.out
        here.upstream.heal()
        here.bought()
        assert (await here.index()).code == 0
        assert here.bought() == passages


async def passages_of(here: Site) -> list[str]:
    """Everything that is bought for the tree, by an index of its own."""
    assert (await here.command("index", here.path("tree"), "--db", here.path("other"))).code == 0
    return here.bought()


async def test_who_is_not_answered_gives_up_and_says_how_to_go_on(tmp_path: Path) -> None:
    """Exit code 4, and a line with the command."""
    async with site(tmp_path) as here:
        assert here.upstream is not None
        here.upstream.inject(faults.status(503))
        index = ("index", here.path("tree"), "--db", here.path("index"))
        said = await here.command(*index, environ={"EMBEDGATE_EMBED__GIVE_UP_AFTER_S": "1"})
        one_line(said, "no chunk was done for", f"go on with: embedgate {' '.join(index)}", code=4)
        here.upstream.heal()
        assert (await here.index()).code == 0
        assert len(await here.hits("rain", "--files")) == 6


async def test_what_cannot_be_done_is_one_line(tmp_path: Path) -> None:
    """Exit code 2, and nobody is asked."""
    async with site(tmp_path) as here:
        index, tree, none = here.path("index"), here.path("tree"), here.path("none")
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").touch()
        failures = [
            (("index", none, "--db", index), ("none: there is no such file or folder",)),
            (("index", tree), ("--db",)),
            (("index", here.path("empty"), "--db", index), ("there is no file with words",)),
            (("index", tree, "--db", here.path("file")), ("file: cannot be written",)),
            (("index", tree, "--db", index, "--model", "gpt"), ("gpt is not configured", "tiny, other")),
            (("search", none, "rain"), ("none: there is no such folder",)),
            (("search", here.path("empty"), "rain"), ("there is no index",)),
            (("search", index, " "), ("the question is empty",)),
            (("index", tree, "--db", index, "--chunk-tokens", "1"), ("--chunk-tokens: must be at least 32, not 1",)),
            (("index", tree, "--db", index, "--overlap-tokens", "-1"), ("--overlap-tokens: must be at least 0",)),
            (("index", tree, "--db", index, "--max-file-size", "0"), ("--max-file-size: must be at least 1024",)),
            (("index", tree, "--db", index, "--max-failed", "nan"), ("--max-failed: must be a finite number",)),
            *(
                (("search", here.path("empty"), "rain", "--path", each), (f"--path {each}: is no pattern",))
                for each in "\\![#"
            ),
            (("search", here.path("empty"), "x", "--language", "golang"), ("--language golang: is not known", " go, ")),
        ]
        for arguments, told in failures:
            one_line(await here.command(*arguments), *told)
        assert not (tmp_path / "index").exists()
        with locked(tmp_path / "index"):
            one_line(await here.index(), "another run is writing it")
        assert here.bought() == []


async def test_a_part_of_a_tree_is_not_taken_for_it(tmp_path: Path) -> None:
    """Another path into the same index would remove all the rest: a line with both, and nothing is touched."""
    async with site(tmp_path) as here:
        await here.index()
        part = ("index", here.path("tree/shop/cart.py"), "--db", here.path("index"))
        one_line(await here.command(*part), f"root was {here.path('tree')}, now it is {part[1]}", "--force")
        assert len(await here.hits("rain", "--files")) == 6
        assert (await here.command(*part, "--force")).code == 0
        assert [hit["path"] for hit in await here.hits("rain", "--files")] == ["cart.py"]


async def test_a_damaged_index_says_what_to_do(tmp_path: Path) -> None:
    """To have it made anew, which works, whatever has gone of it."""
    async with site(tmp_path) as here:
        await here.index()
        for part in ("_indices", "data", "_versions"):
            shutil.rmtree(tmp_path / "index" / "chunks.lance" / part)
            one_line(await here.search("rain"), "embedgate index --force makes it anew")
            assert (await here.index("--force")).code == 0
            assert len(await here.hits("rain", "--files")) == 6


# ── by a running embedgate ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_running_embedgate_can_be_asked(tmp_path: Path) -> None:
    """By its tenant's key, for the tree and for the questions; who asks somebody else is told."""
    async with running(tmp_path) as edge:
        here = Site(tmp_path)
        for name, text in SOURCES.items():
            here.write(name, text)
        environ, server = {"EMBEDGATE_API_KEY": KEY}, ("--server", edge.url)
        index = ("index", here.path("tree"), "--db", here.path("index"), "--model", SMALL)
        assert (await here.command(*index, *server, environ=environ)).code == 0
        search = ("search", here.path("index"), "rain", "--json", "-k", "2")
        said = await here.command(*search, *server, environ=environ)
        assert (said.code, len(said.out.splitlines())) == (0, 2)
        one_line(await here.command(*search), f"{SMALL} is not configured")
