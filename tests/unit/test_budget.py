"""What the engine asks of budgets: for what is missing only, once, handed from the request to the calls that buy it."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable

import pytest

from app.domain import Allowance, Deployment, Limits, Spender, Tenant
from app.errors import BrokenOff, BudgetExhausted, CallTimeout, Transient, TryAgainLater, UpstreamFailed
from app.ports import Bounds, End, Purchase
from tests.rig import MODEL, Notebook, Rig, ScriptedProvider, bend, engine

pytestmark = pytest.mark.looptime(start=1000.0)

PRICE = 20  # nano-USD for a word
PRICED = Deployment("", MODEL, limits=Limits(max_in_flight=1, window_s=0.0), price=1000 * PRICE)


def tenant(words: int | None, name: str = "search") -> Tenant:
    """One that may buy so many words a day."""
    return Tenant(name, allowance=Allowance(None if words is None else PRICE * words))


class Money(Notebook):
    """A ledger and budgets in one: what is left is what is neither spent nor set aside; never below nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.aside: Counter[str] = Counter()
        self.spent: Counter[str] = Counter()
        self.asked: list[tuple[str, int, float]] = []
        self.on_ask: Callable[[], None] = lambda: None
        self.unknown = False

    def end(self, purchase: Purchase, tokens: int, how: End) -> None:
        """See `ports.Ledger`."""
        super().end(purchase, tokens, how)
        assert len({part.tenant for part in purchase.parts}) in (1, 2)
        for part in purchase.parts:
            weight = sum(each.tokens for each in purchase.parts)
            self.spent[f"tenant {part.tenant}"] += PRICE * tokens * part.tokens // weight
            if part.project:
                self.spent[f"project {part.tenant}/{part.project}"] += PRICE * tokens * part.tokens // weight

    async def reserve(self, bounds: Bounds, nano_usd: int, *, within_s: float) -> None:
        """See `ports.Budgets`."""
        self.on_ask()
        await asyncio.sleep(0)
        if self.unknown:
            raise TryAgainLater("nobody knows", 1.0)
        for account, allowance in bounds.allowances:
            self.asked.append((account, nano_usd, round(within_s, 3)))
            if self.spent[account] + self.aside[account] + nano_usd > (allowance.per_day or 0):
                raise BudgetExhausted(account, "2026-11-21")
        for account, _ in bounds.allowances:
            self.aside[account] += nano_usd

    def release(self, bounds: Bounds, nano_usd: int) -> None:
        """See `ports.Budgets`."""
        for account, _ in bounds.allowances:
            self.aside[account] -= nano_usd
            assert self.aside[account] >= 0


@pytest.fixture
async def money() -> Money:
    """Nothing is spent yet."""
    return Money()


def done(money: Money) -> bool:
    """Whether nothing is set aside any more."""
    return not any(money.aside.values())


async def test_only_what_is_missing_is_asked_for(money: Money) -> None:
    """What is in the cache costs nothing, also when nothing is left."""
    poor = tenant(3)
    async with engine(ScriptedProvider(), deployment=PRICED, ledger=money, budgets=money) as rig:
        await rig.ask("a b", tenant=poor)
        await rig.ask("a b", "c", tenant=poor, within_s=20.0)
        await rig.ask("c", "a b", tenant=poor)
        with pytest.raises(BudgetExhausted):
            await rig.ask("d", "a b", tenant=poor)
        await rig.ask("a b", tenant=poor)
    assert money.asked == [("tenant search", 40, 30.0), ("tenant search", 20, 20.0), ("tenant search", 20, 30.0)]
    assert done(money)


async def test_who_has_no_budget_asks_nobody(money: Money) -> None:
    """Nor does who buys what nobody knows the price of."""
    unpriced = Deployment("", MODEL, limits=Limits(max_in_flight=1))
    async with engine(ScriptedProvider(), deployment=PRICED, ledger=money, budgets=money) as rig:
        await rig.ask("a", tenant=tenant(None))
    async with engine(ScriptedProvider(), deployment=unpriced, budgets=money) as rig:
        await rig.ask("a", tenant=tenant(0))
    assert not money.asked


async def test_project_and_key_are_bound_too(money: Money) -> None:
    """Each by its own allowance; a refusal takes nothing from the others."""
    spender = Spender("web", "k1", allowances=(("project search/web", Allowance(PRICE)),))
    async with engine(ScriptedProvider(), deployment=PRICED, ledger=money, budgets=money) as rig:
        await rig.ask("a", tenant=tenant(5), spender=spender)
        with pytest.raises(BudgetExhausted) as refusal:
            await rig.ask("b", tenant=tenant(5), spender=spender)
        assert refusal.value.account == "project search/web"
        await rig.ask("b c d e", tenant=tenant(5))
    assert done(money)


async def test_the_dearest_deployment_is_reckoned_with(money: Money) -> None:
    """Whoever serves in the end; what it did not cost is there for the next."""
    dear = Deployment("", MODEL, limits=Limits(max_in_flight=1), price=3000 * PRICE)
    async with engine(ScriptedProvider(), deployment=dear, ledger=money, budgets=money) as rig:
        with pytest.raises(BudgetExhausted):
            await rig.ask("a b", tenant=tenant(5))
        await rig.ask("a", tenant=tenant(5))
    assert money.asked[-1][1] == 3 * PRICE
    assert done(money)


async def test_many_at_once_are_admitted_up_to_the_budget(money: Money) -> None:
    """Fifty requests, money for ten; while they wait and while they fly nothing is counted twice."""
    ten = tenant(10)
    async with engine(ScriptedProvider(), deployment=PRICED, ledger=money, budgets=money) as rig:

        async def late(number: int) -> bool:
            await asyncio.sleep(0.005 * number)
            try:
                await rig.ask(f"text{number}", tenant=ten)
            except BudgetExhausted:
                return False
            return True

        answers = await asyncio.gather(*(late(number) for number in range(50)))
    assert sum(answers) == 10
    assert money.spent["tenant search"] == 10 * PRICE
    assert done(money)


@pytest.mark.parametrize("failure", [Transient("500"), BrokenOff("reset"), CallTimeout("late")], ids=str)
@pytest.mark.parametrize("words", [1, 2, 10])
async def test_another_try_is_paid_again_where_the_first_may_have_been(
    money: Money, failure: Transient, words: int
) -> None:
    """Where there is no money for that the text fails as one for which there is none."""
    paid_twice = failure.may_cost
    provider = ScriptedProvider(script=deque([failure]))
    async with engine(provider, deployment=PRICED, ledger=money, budgets=money) as rig:
        asking = rig.ask("a", tenant=tenant(words))
        if paid_twice and words < 2:
            with pytest.raises(BudgetExhausted):
                await asking
        else:
            await asking
    assert len(provider.calls) == (1 if paid_twice and words < 2 else 2)
    assert money.spent["tenant search"] == PRICE * (min(words, 2) if paid_twice else 1)
    assert done(money)


async def test_who_can_pay_again_does_so_though_the_neighbour_cannot(money: Money) -> None:
    """They shared a call that was lost."""
    rich, poor = tenant(10, "rich"), tenant(1, "poor")
    provider = ScriptedProvider(script=deque([None, BrokenOff("reset")]))
    async with engine(provider, deployment=PRICED, ledger=money, budgets=money) as rig:
        first = asyncio.create_task(rig.ask("first"))
        await asyncio.sleep(0.01)
        answers = await asyncio.gather(
            rig.ask("a", tenant=rich), rig.ask("b", tenant=poor), return_exceptions=True
        )  # fmt: skip
        await first
    assert [type(answer) for answer in answers] == [type(first.result()), BudgetExhausted]
    assert provider.texts == ["first", "a", "b", "a"]
    assert (money.spent["tenant rich"], money.spent["tenant poor"]) == (2 * PRICE, PRICE)
    assert done(money)


async def test_an_answer_that_was_billed_and_is_nonsense_is_paid(money: Money) -> None:
    """And once more for the next try."""
    provider = ScriptedProvider(script=deque([bend(lambda vectors: vectors * float("nan"))]))
    async with engine(provider, deployment=PRICED, ledger=money, budgets=money) as rig:
        await rig.ask("a b", tenant=tenant(4))
    assert money.spent["tenant search"] == 4 * PRICE
    assert done(money)


async def test_who_leaves_pays_for_what_is_under_way_and_nothing_else(money: Money) -> None:
    """A call in the air is paid for until it has landed; what still waits is given back at once."""
    of = tenant(5)
    async with engine(ScriptedProvider(latency_s=1.0), deployment=PRICED, ledger=money, budgets=money) as rig:
        flies = asyncio.create_task(rig.ask("a b", tenant=of))
        await asyncio.sleep(0.1)
        waits = asyncio.create_task(rig.ask("c d e", tenant=of))
        await asyncio.sleep(0.1)
        assert money.aside["tenant search"] == 5 * PRICE
        waits.cancel()
        flies.cancel()
        await asyncio.sleep(0.1)
        assert money.aside["tenant search"] == 2 * PRICE
        await asyncio.sleep(1.0)
        assert done(money)
        await asyncio.gather(flies, waits, return_exceptions=True)
    assert money.spent["tenant search"] == 2 * PRICE


async def test_the_first_who_still_wants_a_text_pays_from_its_own_budget(money: Money) -> None:
    """Whoever joins sets aside as much for the case that it has to, and gets it back."""
    first, second = tenant(2, "first"), tenant(2, "second")
    async with engine(ScriptedProvider(), deployment=PRICED, ledger=money, budgets=money) as rig:
        busy = asyncio.create_task(rig.ask("busy"))
        await asyncio.sleep(0.01)
        gone = asyncio.create_task(rig.ask("wanted twice", tenant=first))
        await asyncio.sleep(0.01)
        stays = asyncio.create_task(rig.ask("wanted twice", tenant=second))
        await asyncio.sleep(0.01)
        assert money.aside == {"tenant first": 2 * PRICE, "tenant second": 2 * PRICE}
        gone.cancel()
        await asyncio.gather(busy, gone, stays, return_exceptions=True)
    assert (money.spent["tenant first"], money.spent["tenant second"]) == (0, 2 * PRICE)
    assert done(money)


async def test_a_request_that_fails_gives_everything_back(money: Money) -> None:
    """Refused at the queue, past its deadline, or failed upstream."""
    of, provider = tenant(100), ScriptedProvider(always=Transient("500"))
    async with engine(provider, deployment=PRICED, ledger=money, budgets=money) as rig:
        with pytest.raises(UpstreamFailed):
            await rig.ask("a", tenant=of)
        money.on_ask = lambda: None
        await settled(rig)
    assert done(money)
    assert money.spent["tenant search"] == 0


async def settled(rig: Rig) -> None:
    """Nothing is left over."""
    await asyncio.sleep(10.0)
    assert set(rig.leftovers().values()) == {0}


async def test_what_another_bought_meanwhile_is_not_bought_again(money: Money) -> None:
    """Asking takes a moment, in which the same text may come into the cache."""
    of, provider = tenant(100), ScriptedProvider()
    async with engine(provider, deployment=PRICED, ledger=money, budgets=money) as rig, asyncio.TaskGroup() as group:
        gate = asyncio.Event()
        slow = Money.reserve

        async def reserve(bounds: Bounds, nano_usd: int, *, within_s: float) -> None:
            await gate.wait()
            await slow(money, bounds, nano_usd, within_s=within_s)

        money.reserve = reserve  # type: ignore[method-assign]
        group.create_task(rig.ask("same", tenant=of))
        await asyncio.sleep(0.01)
        await rig.ask("same")
        gate.set()
    assert provider.texts == ["same"]
    assert done(money)


async def test_while_nobody_knows_what_is_left_others_go_on(money: Money) -> None:
    """Misses of tenants with a budget are told to come again; hits and tenants without are served."""
    async with engine(ScriptedProvider(), deployment=PRICED, ledger=money, budgets=money) as rig:
        await rig.ask("kept", tenant=tenant(5))
        money.unknown = True
        with pytest.raises(TryAgainLater):
            await rig.ask("new", tenant=tenant(5))
        await rig.ask("kept", tenant=tenant(5))
        await rig.ask("newer", tenant=tenant(None))
    assert done(money)
