"""Hides what a request's budgets pay for: set aside at the door, handed to the calls that buy it, given back after."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from app.domain import NO_BOUND, EmbeddingRequest
from app.engine.gate import Gate
from app.engine.workitem import WorkItem
from app.errors import EmbedgateError
from app.ports import Bounds, Budgets


@dataclass(slots=True, eq=False)
class _Stay:
    """What is set aside for a request that is in here, and not handed to a call."""

    bounds: Bounds
    left: int
    open: bool = True


Fare: TypeAlias = Mapping[WorkItem, tuple[_Stay, int]]
"""What a call may cost: of which stay how much, for the texts whose payer has a budget."""


class Budget:
    """Keeps requests within what their tenant, project and key may spend; for most that is nothing, and costs nothing.

    What is set aside belongs to the request until a call leaves that it pays for, and to the call until that is in the
    ledger. A caller who goes away gives back only what is not under way.
    """

    def __init__(self, budgets: Budgets, *, clock: Callable[[], float]) -> None:
        self._budgets = budgets
        self._clock = clock
        self._stays: dict[EmbeddingRequest, _Stay] = {}

    async def enter(self, request: EmbeddingRequest, gates: Sequence[Gate], tokens: Sequence[int]) -> bool:
        """Sets aside what texts of so many `tokens` each cost at the dearest of `gates`, as far as that is known.

        Whether it did, and others had a turn meanwhile. Raises what `Budgets.reserve` does.
        """
        bounds = bounds_of(request)
        if bounds is None:
            return False
        cost = max(sum(map(gate.cost_nano_usd, tokens)) for gate in gates)
        if not cost:
            return False
        await self._budgets.reserve(bounds, cost, within_s=max(0.0, request.deadline - self._clock()))
        self._stays[request] = _Stay(bounds, cost)
        return True

    def leave(self, request: EmbeddingRequest) -> None:
        """Ends what `enter` began, if it did."""
        stay = self._stays.pop(request, None)
        if stay is not None:
            stay.open = False
            self._give_back(stay, stay.left)

    def depart(self, gate: Gate, items: Sequence[WorkItem]) -> Fare:
        """A call for `items` is about to leave."""
        fare: dict[WorkItem, tuple[_Stay, int]] = {}
        for item in items if self._stays else ():
            stay = self._stays.get(item.payer) if item.payer is not None else None
            if stay is not None:
                share = min(stay.left, gate.cost_nano_usd(item.tokens))
                stay.left -= share
                fare[item] = (stay, share)
        return fare

    def arrive(self, fare: Fare, *, spent: bool) -> None:
        """The call is in the ledger; what it did not cost goes back to the requests that are still here."""
        for stay, share in fare.values():
            if not spent and stay.open:
                stay.left += share
            else:
                self._give_back(stay, share)

    async def again(self, fare: Fare, items: Iterable[WorkItem]) -> dict[WorkItem, EmbedgateError]:
        """Sets aside once more what a lost call has cost, for those `items` that shall have another; for which not."""
        lost = {item: fare[item] for item in items if item in fare}
        wanted: Counter[_Stay] = Counter()
        for stay, share in lost.values():
            wanted[stay] += share if stay.open else 0
        refused: dict[_Stay, EmbedgateError] = {}
        for stay, cost in wanted.items():
            try:
                if cost:
                    await self._budgets.reserve(stay.bounds, cost, within_s=0.0)
            except EmbedgateError as error:
                refused[stay] = error
            else:
                if stay.open:
                    stay.left += cost
                else:
                    self._give_back(stay, cost)
        return {item: refused[stay] for item, (stay, _) in lost.items() if stay in refused}

    def _give_back(self, stay: _Stay, nano_usd: int) -> None:
        if nano_usd:
            self._budgets.release(stay.bounds, nano_usd)


def bounds_of(request: EmbeddingRequest) -> Bounds | None:
    """Which allowances a request has to stay within; None: there are none."""
    tenant, allowances = request.tenant, request.spender.allowances
    if tenant.allowance != NO_BOUND:
        allowances = ((tenant.account, tenant.allowance), *allowances)
    return Bounds(tenant.name, allowances) if allowances else None
