"""What the ledger is told: who pays for which part of a call, why it was made, and how it ended."""

import asyncio
from collections import deque
from dataclasses import replace

import pytest

from app.domain import ANONYMOUS, Deployment, Limits, Priority, Spender, Tenant
from app.errors import (
    BrokenOff,
    CallTimeout,
    InputRefused,
    ProviderError,
    Throttled,
    Transient,
    TryAgainLater,
    Unreachable,
)
from app.ports import Part, Purchase, Reply
from tests.rig import MODEL, Notebook, ScriptedProvider, bend, engine

pytestmark = pytest.mark.looptime(start=1000.0)

PRICED = Deployment("", MODEL, limits=Limits(max_in_flight=1, window_s=0.0), price=20_000)


def part(tenant: str, tokens: int, *, texts: int = 1, cause: str = "miss", spender: Spender | None = None) -> Part:
    """What one payer's part of a call should be."""
    of = spender or Spender()
    return Part(tenant, of.project, of.key, of.user, cause, texts, tokens)  # type: ignore[arg-type]


async def test_a_shared_call_is_split_between_those_who_wanted_its_texts() -> None:
    """One line before it leaves, with a part for each tenant, project, key and user; one when it has ended."""
    notes, mine = Notebook(), Spender("project", "key", "user")
    async with engine(ScriptedProvider(), deployment=PRICED, ledger=notes) as rig, asyncio.TaskGroup() as group:
        group.create_task(rig.ask("first"))
        await asyncio.sleep(0.01)
        group.create_task(rig.ask("a b", "c d e", tenant=Tenant("one"), spender=mine))
        group.create_task(rig.ask("f", tenant=Tenant("two")))
    (_, (purchase, tokens, how)) = notes.ended
    assert set(purchase.parts) == {part("one", 5, texts=2, spender=mine), part("two", 1)}
    assert (purchase.deployment, purchase.model, purchase.price) == ("d0", MODEL, 20_000)
    assert (tokens, how) == (6, "billed")
    assert len({each.id for each, _, _ in notes.ended}) == 2


async def test_the_first_who_still_wants_a_text_when_it_leaves_pays() -> None:
    """Whoever joined is spared; where the first has left, the next one pays."""
    notes = Notebook()
    async with engine(ScriptedProvider(), deployment=PRICED, ledger=notes) as rig:
        busy = asyncio.create_task(rig.ask("first"))
        await asyncio.sleep(0.01)
        gone = asyncio.create_task(rig.ask("wanted twice", tenant=Tenant("gone")))
        await asyncio.sleep(0)
        stays = asyncio.create_task(rig.ask("wanted twice", tenant=Tenant("stays")))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.gather(busy, gone, stays, return_exceptions=True)
    assert notes.ended[1][0].parts == (part("stays", 2),)
    assert (notes.joined, notes.tokens, notes.nano_usd) == (1, 2, 40)


@pytest.mark.parametrize(
    ("priority", "cause", "told"),
    [(Priority.DEFAULT, "miss", "miss"), (Priority.BULK, "miss", "bulk"), (Priority.BULK, "warm", "warm")],
)
async def test_a_purchase_says_why_it_is_made(priority: Priority, cause: str, told: str) -> None:
    """Because somebody missed it, for bulk work, or to warm the cache."""
    notes = Notebook()
    async with engine(ScriptedProvider(), deployment=PRICED, ledger=notes) as rig:
        await rig.ask("a", priority=priority, cause=cause)  # type: ignore[arg-type]
    assert notes.ended[0][0].parts == (part("anonymous", 1, cause=told),)


async def test_another_try_is_a_retry_and_elsewhere_a_fallback() -> None:
    """What failed at a deployment is paid again there, or at the next one, and the line says which."""
    failing: deque[object] = deque([Transient("500")])
    for providers, told in (
        ((ScriptedProvider(script=deque(failing)),), "retry"),  # type: ignore[arg-type]
        ((ScriptedProvider(script=deque(failing)), ScriptedProvider()), "fallback"),  # type: ignore[arg-type]
    ):
        notes = Notebook()
        async with engine(*providers, deployment=PRICED, ledger=notes) as rig:
            await rig.ask("a")
        (first, _, how), (second, _, _) = notes.ended
        assert (first.parts[0].cause, how, second.parts[0].cause) == ("miss", "failed", told)


def broken(*_: object) -> Reply:
    """A reply whose vectors are no vectors, though it was billed."""
    return bend(lambda vectors: vectors * float("nan"))(*_)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "tokens", "how"),
    [
        (None, 3, "billed"),
        (Transient("500"), 0, "failed"),
        (Throttled("429"), 0, "failed"),
        (Unreachable("refused"), 0, "failed"),
        (BrokenOff("reset"), 3, "unconfirmed"),
        (CallTimeout("late"), 3, "unconfirmed"),
        (1000.0, 3, "unconfirmed"),
        (broken, 3, "billed"),
        (lambda _, reply: replace(reply, tokens_billed=None), 3, "estimated"),
    ],
    ids=["ok", "500", "429", "refused", "reset", "late", "silent", "nonsense", "no count"],
)
async def test_a_call_ends_as_what_it_may_have_cost(step: ProviderError | float | None, tokens: int, how: str) -> None:
    """Nothing where the provider said no, our count where nobody can tell, its own count wherever it named one."""
    notes = Notebook()
    async with engine(ScriptedProvider(script=deque([step])), deployment=PRICED, ledger=notes) as rig:
        await asyncio.gather(rig.ask("a b c", within_s=40.0), return_exceptions=True)
    assert notes.ended[0][1:] == (tokens, how)


class Full(Notebook):
    """A ledger without room."""

    def begin(self, purchase: Purchase) -> None:
        """See `ports.Ledger`."""
        raise TryAgainLater("full", 1.0)


async def test_what_cannot_be_written_down_is_not_bought() -> None:
    """The caller is told to come again; neither slot nor quota nor a good name is lost."""
    async with engine(ScriptedProvider(), deployment=PRICED, ledger=Full()) as rig:
        for _ in range(20):
            with pytest.raises(TryAgainLater, match="full"):
                await rig.ask("a")
        assert not rig.provider.calls
        assert rig.gates["d0"].breaker.state == "closed"
        assert not any(rig.leftovers().values())


async def test_hits_say_what_they_spared() -> None:
    """At the price of whoever would have been asked; nothing is bought for them."""
    notes = Notebook()
    async with engine(ScriptedProvider(), deployment=PRICED, ledger=notes) as rig:
        await rig.ask("a b c")
        await rig.ask("a b c", "a b c", "d")
    assert len(notes.ended) == 2
    assert (notes.hits, notes.joined, notes.tokens, notes.nano_usd) == (2, 0, 6, 120)


async def test_what_embedgate_asks_for_itself_is_nobodys() -> None:
    """A harmless text that decides whether a deployment refuses everything is paid for by no tenant."""
    notes = Notebook()
    provider = ScriptedProvider(poison=frozenset({"bad"}), refusal=InputRefused("400"))
    async with engine(provider, deployment=PRICED, ledger=notes) as rig:
        await asyncio.gather(rig.ask("bad"), return_exceptions=True)
    assert [each.parts[0].tenant for each, _, _ in notes.ended] == [ANONYMOUS.name, ""]
    assert [each.parts[0].cause for each, _, _ in notes.ended] == ["miss", "canary"]


class Filling(Notebook):
    """A ledger with room for one purchase."""

    def begin(self, purchase: Purchase) -> None:
        """See `ports.Ledger`."""
        if self.ended:
            raise TryAgainLater("full", 1.0)
        super().begin(purchase)


async def test_a_doubt_that_cannot_be_written_down_is_no_bug() -> None:
    """The harmless text that would say who is to blame is not asked: its caller comes again, and nothing is lost."""
    provider = ScriptedProvider(poison=frozenset({"bad"}), refusal=InputRefused("400"))
    async with engine(provider, deployment=PRICED, ledger=Filling()) as rig:
        with pytest.raises(TryAgainLater, match="full"):
            await rig.ask("bad")
        assert len(provider.calls) == 1
        assert 'loop="flight"' not in rig.metrics()
        assert not any(rig.leftovers().values())
