"""Whatever goes wrong at vendors, callers and stores, the ledger's sum is the sum of the vendors' bills."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path

import pytest

from app.domain import EmbeddingRequest
from app.errors import EmbedgateError
from app.runtime import Runtime
from app.settings import load
from app.tokens import Estimate
from tests.bench.prose import passages
from tests.books import Balance, Vendor, balance
from tests.emulators import faults
from tests.emulators.cohere import CohereEmulator
from tests.emulators.faults import Fault, Wire
from tests.emulators.gemini import GeminiEmulator
from tests.emulators.openai import OpenAIEmulator
from tests.emulators.server import Damage, Emulator, not_a_number, one_short, vocabulary
from tests.emulators.tei import TEIEmulator
from tests.emulators.vllm import VLLMEmulator
from tests.emulators.voyage import VoyageEmulator
from tests.servers import PostgresProcess, ValkeyProcess

USD = {"first": "0.1337", "second": "0.4021"}
"""For a million tokens: no whole number of nano-USD for one."""

IN_FLIGHT = 4
PATIENT_S, HASTY_S = 10.0, 0.5

HEAD = """
[server]
log_file = "{folder}/log.jsonl"
secret = "nothing-but-tests-know-it"
[stores]
data_dir = "{folder}/data"
redis_url = "{redis_url}"
database_url = "{database_url}"
[tenants.one]
api_key = "one"
[tenants.two]
api_key = "two"
[tenants.three]
api_key = "three"
[models.m]
deployments = ['first', 'second']
canary_interval_s = 0
{facts}
"""
DEPLOYMENT = """
[deployments.{name}]
{dialect}
base_url = "{emulator.base_url}"
api_key = "{emulator.api_key}"
usd_per_million_tokens = {usd}
max_in_flight = {in_flight}
max_batch_items = 4
timeout_s = {timeout_s}
backoff_base_s = 0.01
cooldown_s = 0.01
cooldown_cap_s = 0.05
breaker_failures_in_a_row = 1000
breaker_ratio_min_calls = 1000
breaker_stall_least_s = 60
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """A vendor to buy from: its stand-in, and how it is configured."""

    emulator: type[Emulator]
    dialect: str
    facts: str = ""
    exact: bool = False


OPENAI = Kind(OpenAIEmulator, "dialect = 'openai'\nmodel = 'text-embedding-3-small'", exact=True)
TELLING = {
    "openai": OPENAI,
    "gemini": Kind(GeminiEmulator, "dialect = 'gemini'\nmodel = 'gemini-embedding-2'"),
    "voyage": Kind(VoyageEmulator, "dialect = 'voyage'\nmodel = 'voyage-3.5-lite'"),
    "cohere": Kind(CohereEmulator, "dialect = 'cohere'\nmodel = 'embed-v4.0'"),
}
"""Those who say what they bill."""

_SERVED = "model = 'Alibaba-NLP/gte-Qwen2-1.5B-instruct'"
_FACTS = "dimensions = 1536\nmax_input_tokens = 512"
TEI = Kind(TEIEmulator, f"dialect = 'openai'\nserver = 'tei'\n{_SERVED}", _FACTS)
VLLM = Kind(VLLMEmulator, f"dialect = 'openai'\nserver = 'vllm'\n{_SERVED}", _FACTS)


class Shop:
    """A service that buys the model `m` from two vendors of a kind, and the callers who load it.

    `books` are there once it is closed.
    """

    books: Balance

    def __init__(self, runtime: Runtime, first: Emulator, second: Emulator) -> None:
        self.runtime = runtime
        self.first = first
        self.second = second
        self._rng = random.Random(37)
        self._numbers = count()

    def texts(self, many: int) -> list[str]:
        """Some that nobody asked for before, of 3 to 60 tokens."""
        return [f"text {next(self._numbers)}" + " and so on" * self._rng.randrange(20) for _ in range(many)]

    async def sell(self, texts: Sequence[str], *, leave_within_s: float | None = None) -> int:
        """Asks for all of them at once, in requests of three tenants; how many requests were answered.

        With `leave_within_s` each caller leaves at some moment before that.
        """
        asked = []
        for number, tenant in zip(range(0, len(texts), 3), cycle(self.runtime.tenants.values())):
            deadline = asyncio.get_running_loop().time() + 20.0
            request = EmbeddingRequest(tenant, "m", tuple(texts[number : number + 3]), deadline)
            stays_s = None if leave_within_s is None else self._rng.uniform(0.0, leave_within_s)
            asked.append(self._ask(request, stays_s))
        return sum(await asyncio.gather(*asked))

    async def _ask(self, request: EmbeddingRequest, stays_s: float | None) -> bool:
        try:
            async with asyncio.timeout(stays_s):
                await self.runtime.gateway.embed(request)
        except (EmbedgateError, TimeoutError):
            return False
        return True


@asynccontextmanager
async def shop(
    folder: Path, kind: Kind, *, hasty: bool = False, redis_url: str = "", database_url: str = ""
) -> AsyncIterator[Shop]:
    """A Shop, open; when it has closed its books are what the vendors' bills say.

    A `hasty` one waits for an answer so short a time that what is in flight may be given up on a busy machine.
    """
    vocabulary()  # it takes a while to load
    async with kind.emulator(latency_s=0.005) as first, kind.emulator(latency_s=0.005) as second:
        vendors = {"first": first, "second": second}
        text = HEAD.format(folder=folder, redis_url=redis_url, database_url=database_url, facts=kind.facts)
        for name, each in vendors.items():
            text += DEPLOYMENT.format(
                name=name, dialect=kind.dialect, emulator=each, usd=USD[name], in_flight=IN_FLIGHT,
                timeout_s=HASTY_S if hasty else PATIENT_S,
            )  # fmt: skip
        path = folder / "embedgate.toml"
        path.write_text(text)
        async with Runtime(load(path, {})) as runtime:
            yield (open_shop := Shop(runtime, first, second))
        open_shop.books = await balance(
            database_url or f"sqlite:///{folder}/data/embedgate.db",
            {name: Vendor(each, USD[name], exact=kind.exact) for name, each in vendors.items()},
            journals=folder / "data" / "journal",
            in_flight=IN_FLIGHT if hasty else 0,
        )
    print(f"\n{kind.emulator.__name__}: {open_shop.books}")


# ── vendors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


FAULTS: Mapping[str, tuple[Fault, str]] = {
    "500": (faults.status(500), "failed"),
    "429": (faults.status(429), "failed"),
    "hang": (faults.hang, "unconfirmed"),
    "reset": (faults.reset, "unconfirmed"),
    "half": (faults.half_body, "unconfirmed"),
    "stalled": (faults.stalled_body, "unconfirmed"),
}
DAMAGES: Mapping[str, tuple[Damage, str]] = {
    "one short": (one_short, "unconfirmed"), "not a number": (not_a_number, "billed")
}  # fmt: skip
"""And how a call ends that meets it."""


@pytest.mark.parametrize("name", [*FAULTS, *DAMAGES])
async def test_a_call_that_fails_is_booked_as_what_the_vendor_makes_of_it(tmp_path: Path, name: str) -> None:
    """Six of them, tried again elsewhere: nothing where it said no, what it billed where that arrived, else perhaps."""
    async with shop(tmp_path, OPENAI, hasty=name in {"hang", "stalled"}) as at:
        if name in FAULTS:
            fault, state = FAULTS[name]
            at.first.inject(fault, calls=6)
        else:
            damage, state = DAMAGES[name]
            at.first.spoil(damage, calls=6)
        for _ in range(4):
            assert await at.sell(at.texts(30)) == 10
    assert {call.state for call in at.books.calls} == {"billed", state}
    assert len(at.books.of(state)) >= 6
    assert {part.cause for call in at.books.calls for part in call.parts} >= {"miss", "fallback"}


def unreliable(rng: random.Random) -> Fault:
    """Every other call is answered as it should be."""
    ways = [faults.status(500), faults.status(429), faults.hang, faults.reset, faults.half_body, faults.stalled_body]

    async def answer(wire: Wire, content: bytes) -> None:
        await (rng.choice(ways)(wire, content) if rng.random() < 0.5 else wire.answer(200, content, {}))

    return answer


@pytest.mark.parametrize("name", TELLING)
async def test_whatever_goes_wrong_at_once_the_bills_are_in_the_books(tmp_path: Path, name: str) -> None:
    """Vendors that fail in all ways, callers who leave, texts that nobody takes, probes: to the nano-dollar."""
    async with shop(tmp_path, TELLING[name], hasty=True) as at:
        await at.runtime.probe(accept=True)
        await at.sell(at.texts(60))
        for number, vendor in enumerate((at.first, at.second)):
            vendor.inject(unreliable(random.Random(number)))
            vendor.spoil(one_short, calls=2)
        bad = at.texts(2)
        at.first.poison |= {*bad}
        at.second.poison |= {*bad}
        await asyncio.gather(at.sell(at.texts(150) + bad), at.sell(at.texts(150), leave_within_s=0.3))
    books = at.books
    causes = {part.cause for call in books.calls for part in call.parts}
    assert causes == {"miss", "retry", "fallback", "canary"}
    assert {part.tenant for call in books.calls for part in call.parts} == {"", "one", "two", "three"}
    assert any(len({part.tenant for part in call.parts}) == 3 for call in books.of("billed"))
    assert {call.deployment for call in books.of("billed")} == {"first", "second"}
    assert {call.state for call in books.calls} == {"billed", "unconfirmed", "failed"}


# ── callers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_callers_who_leave_leave_nothing_unpaid(tmp_path: Path) -> None:
    """A storm of them: what has left for a vendor is billed, since its answer is awaited, and nothing else."""
    async with shop(tmp_path, OPENAI) as at:
        for _ in range(5):
            assert await at.sell(at.texts(300), leave_within_s=0.2) < 100
    assert {call.state for call in at.books.calls} == {"billed"}
    assert 0 < sum(call.texts for call in at.books.calls) < 1500


# ── stores ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_redis_may_die_meanwhile(tmp_path: Path, own_valkey: ValkeyProcess) -> None:
    """And come back empty: every call is booked, once."""
    async with shop(tmp_path, OPENAI, hasty=True, redis_url=own_valkey.url) as at:
        at.first.inject(unreliable(random.Random(3)), calls=40)
        await at.sell(at.texts(120))
        await asyncio.gather(at.sell(at.texts(120)), asyncio.to_thread(own_valkey.kill))
        await asyncio.gather(at.sell(at.texts(120)), asyncio.to_thread(own_valkey.start))
    assert at.books.of("billed")


async def test_the_database_may_be_away_meanwhile(tmp_path: Path, own_postgres: PostgresProcess) -> None:
    """Frozen under load, and back before the end: every call is booked, once."""
    async with shop(tmp_path, OPENAI, hasty=True, database_url=own_postgres.url) as at:
        at.first.inject(unreliable(random.Random(4)), calls=40)
        await at.sell(at.texts(120))
        await asyncio.gather(at.sell(at.texts(120)), asyncio.to_thread(own_postgres.freeze))
        assert at.runtime.stores.ledger.waiting > 0
        await asyncio.gather(at.sell(at.texts(120)), asyncio.to_thread(own_postgres.thaw))
    assert at.books.of("billed")


# ── vendors that say nothing ────────────────────────────────────────────────────────────────────────────────────────


def gap(books: Balance) -> float:
    """By how much of what is on the bills beside what was stated the estimates are off."""
    untold = books.owed - books.nano_usd("billed")
    return abs(books.nano_usd("estimated") - untold) / untold


async def test_what_a_vendor_never_states_is_estimated(tmp_path: Path) -> None:
    """Where nothing is ever stated nothing can be learned: our own count of English is within 15 % of the bill."""
    async with shop(tmp_path, TEI) as at:
        await at.sell(passages(Estimate(), [20, 50, 100, 200] * 30))
    print(f"{gap(at.books):.1%} off, by our own count alone")
    assert {call.state for call in at.books.calls} == {"estimated"}
    assert gap(at.books) <= 0.15


async def test_an_estimate_is_corrected_by_what_was_learned(tmp_path: Path) -> None:
    """A vendor that states no more what it bills, for texts of which our own count is too high by nearly a fifth."""
    async with shop(tmp_path, VLLM) as at:
        await at.sell([text + " word" * 200 for text in at.texts(300)])
        for vendor in (at.first, at.second):
            vendor.inject(faults.altered(lambda reply: reply.pop("usage")))
        await at.sell([text + " word" * 200 for text in at.texts(300)])
    estimated = at.books.of("estimated")
    counted = sum(part.tokens_estimated for call in estimated for part in call.parts)
    corrected = sum(call.tokens for call in estimated)
    print(f"{gap(at.books):.1%} off, by a count that is lower by {1 - corrected / counted:.0%} than our own")
    assert corrected < 0.87 * counted
    assert gap(at.books) <= 0.15
