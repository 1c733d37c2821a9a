"""What becomes of budgets when replicas are killed and stores break: never a nano-dollar more than was allowed."""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import func, select

from app.domain import EmbeddingRequest
from app.errors import BudgetExhausted, EmbedgateError, TryAgainLater
from app.runtime import Runtime
from app.settings import load
from app.storage.sql.tables import ledger
from tests.contract.stored import scalars
from tests.emulators.openai import OpenAIEmulator
from tests.servers import PostgresProcess, ValkeyProcess

NANO_USD = 20_000  # a token
STEP = 0.01

CONFIGURATION = """
[server]
secret = "what-all-of-them-share-0123456789"
log_file = "{folder}/log.jsonl"
[stores]
data_dir = "{folder}"
{stores}
[deployments.main]
dialect = "openai"
base_url = "{upstream}"
api_key = "sk-emulator-key"
model = "text-embedding-3-small"
usd_per_million_tokens = 20
max_in_flight = 8
[models.small]
deployments = ["main"]
[tenants.search]
api_key = "key-of-search"
budget_usd_per_month = {budget}
"""

BUYS_UNTIL_KILLED = """
import asyncio, itertools, os, random, signal, sys, time
from pathlib import Path
from app.domain import EmbeddingRequest
from app.errors import BudgetExhausted
from app.runtime import Runtime
from app.serving import Menu
from app.settings import load

settings, kills, at_once = load(Path(sys.argv[1]), {}), int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(41)
Menu(settings).models["small"].counter.count("what takes long to load is loaded once")

async def buy(runtime, numbers):
    tenant = runtime.tenants["key-of-search"]
    for number in numbers:
        text = f"{number} one two three four five"
        request = EmbeddingRequest(tenant, "small", (text,), time.monotonic() + 30)
        try:
            await runtime.gateway.embed(request)
        except BudgetExhausted:
            os.write(ready, b"x")
            return
        if number % 1000 == 20:
            os.write(ready, b".")

async def live(life):
    numbers = itertools.count(1000 * life)
    async with Runtime(settings) as runtime:
        await asyncio.gather(*(buy(runtime, numbers) for _ in range(at_once)))

for life in range(kills):
    heard, ready = os.pipe()
    child = os.fork()
    if child == 0:
        asyncio.run(live(life))
        os._exit(0)
    os.read(heard, 1)
    time.sleep(rng.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(heard), os.close(ready)
"""


def written(folder: Path, upstream: OpenAIEmulator, budget_tokens: int, stores: str = "") -> Path:
    """A configuration whose tenant may buy so many tokens."""
    folder.mkdir(exist_ok=True)
    budget = budget_tokens * NANO_USD / 10**9
    path = folder / "embedgate.toml"
    path.write_text(CONFIGURATION.format(folder=folder, upstream=upstream.base_url, budget=budget, stores=stores))
    return path


@asynccontextmanager
async def replicas(
    folder: Path, upstream: OpenAIEmulator, budget_tokens: int, valkey: ValkeyProcess, postgres: PostgresProcess
) -> AsyncIterator[list[Runtime]]:
    """Three of them."""
    stores = f'redis_url = "{valkey.url}"\ndatabase_url = "{postgres.url}"\nmax_replicas = 3'
    async with AsyncExitStack() as stack:
        paths = [written(folder / f"r{number}", upstream, budget_tokens, stores) for number in range(3)]
        yield [await stack.enter_async_context(Runtime(load(path, {}))) for path in paths]


async def ask(runtime: Runtime, text: str) -> str:
    """What becomes of one request."""
    tenant = runtime.tenants["key-of-search"]
    request = EmbeddingRequest(tenant, "small", (text,), asyncio.get_running_loop().time() + 30)
    try:
        await runtime.gateway.embed(request)
    except BudgetExhausted:
        return "exhausted"
    except TryAgainLater:
        return "later"
    except EmbedgateError as error:
        return type(error).__name__
    return "ok"


async def booked(runtime: Runtime) -> int:
    """All that the ledger says was spent, once it knows."""
    async with asyncio.timeout(20):
        while runtime.stores.ledger.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    (spent,) = await scalars(runtime.stores.database, select(func.coalesce(func.sum(ledger.c.nano_usd), 0)))
    return int(spent)


async def test_a_budget_for_ten_lets_ten_of_fifty_through(
    tmp_path: Path, own_valkey: ValkeyProcess, own_postgres: PostgresProcess
) -> None:
    """Fifty different texts at one moment at three replicas; later, too, not one more."""
    async with OpenAIEmulator() as upstream:
        one = 6
        async with replicas(tmp_path, upstream, 10 * one, own_valkey, own_postgres) as three:
            texts = [f"{number:02} one two three four five" for number in range(50)]
            answers = await asyncio.gather(*(ask(three[at % 3], text) for at, text in enumerate(texts)))
            assert Counter(answers) == {"ok": 10, "exhausted": 40}
            assert upstream.bill.items == 10
            assert upstream.bill.tokens == 10 * one
            assert [await booked(each) for each in three][-1] == upstream.bill.tokens * NANO_USD
            bought = [at for at, answer in enumerate(answers) if answer == "ok"]  # kept where it was, for a moment
            assert {await ask(three[at % 3], texts[at]) for at in bought} == {"ok"}
            assert await ask(three[1], "one two three four five six seven eight nine ten") == "exhausted"


@pytest.mark.parametrize("fault", ["redis killed", "redis frozen", "postgres frozen", "both killed"])
async def test_whatever_breaks_the_budget_holds(
    tmp_path: Path, own_valkey: ValkeyProcess, own_postgres: PostgresProcess, fault: str
) -> None:
    """Three replicas spend steadily, the stores break and come back; in the end all of it is spent, not more."""
    budget_tokens, answers = 2100, Counter[str]()
    async with OpenAIEmulator() as upstream:
        async with replicas(tmp_path, upstream, budget_tokens, own_valkey, own_postgres) as three:

            async def spend(runtime: Runtime, name: str, count: int) -> None:
                for number in range(count):
                    answers[await ask(runtime, f"{name}{number} one two three four five")] += 1
                    await asyncio.sleep(STEP)

            async def all_spend(name: str, count: int) -> None:
                await asyncio.gather(*(spend(each, f"{name}{at}x", count) for at, each in enumerate(three)))

            await all_spend("before", 20)
            broken = [server for server, name in ((own_valkey, "redis"), (own_postgres, "postgres"))
                      if name in fault or "both" in fault]  # fmt: skip
            for server in broken:
                await asyncio.to_thread(server.kill if "killed" in fault else server.freeze)
            await all_spend("during", 40)
            for server in broken:
                await asyncio.to_thread(server.restart if "killed" in fault else server.thaw)
            await asyncio.sleep(2.0)
            async with asyncio.timeout(30):
                number = 0
                while answers["exhausted"] < 60 and number < 1500:
                    number += 3
                    await asyncio.gather(*(spend(each, f"after{at}x{number}", 1) for at, each in enumerate(three)))
                while await ask(three[0], f"last{number}") == "ok":
                    number += 1
            spent = [await booked(each) for each in three][-1]
        print(f"{fault}: {upstream.bill.tokens} tokens of {budget_tokens}, {dict(answers)}")
        assert upstream.bill.tokens <= budget_tokens
        assert upstream.bill.tokens * NANO_USD <= spent <= budget_tokens * NANO_USD
        assert upstream.bill.tokens >= 0.95 * budget_tokens
        assert answers.keys() <= {"ok", "exhausted", "later"}


async def test_no_kill_lets_a_budget_be_overrun(tmp_path: Path) -> None:
    """Ten at random moments: what nobody knows counts as spent, before anything more is bought."""
    budget_tokens = 4200
    async with OpenAIEmulator(latency_s=0.005) as upstream:
        path = written(tmp_path, upstream, budget_tokens)
        buyer = await asyncio.create_subprocess_exec(sys.executable, "-c", BUYS_UNTIL_KILLED, path, "10", "8")
        assert await buyer.wait() == 0
        async with Runtime(load(path, {})) as runtime:
            number = 0
            while await ask(runtime, f"last{number} one two three four five") == "ok":
                number += 1
            spent = await booked(runtime)
        print(f"{upstream.bill.tokens} tokens on the bill, {spent / NANO_USD:.0f} booked of {budget_tokens}, ten kills")
        assert upstream.bill.tokens * NANO_USD <= spent <= budget_tokens * NANO_USD
        assert spent > (budget_tokens - 12) * NANO_USD
