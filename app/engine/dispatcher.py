"""One Reply for one Batch, from whoever of the Space can: permits, the call, and what its failure means.

A batch is never formed before its deployment has granted it.
"""

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from app import money, vectors
from app.domain import Cause, Priority, Route, Space
from app.engine.breaker import Pass
from app.engine.budget import Budget, Fare
from app.engine.calls import OWN, Calls
from app.engine.gate import Bell, Gate, Slot
from app.engine.roster import Roster
from app.engine.workitem import Batch, Demand, Doubt, Fit, Group, WorkItem
from app.errors import (
    BadCredential,
    EmbedgateError,
    InputRefused,
    InvalidRequest,
    MalformedReply,
    Misconfigured,
    ProviderError,
    QuotaExhausted,
    RejectedInput,
    Throttled,
    Transient,
    TryAgainLater,
    UpstreamFailed,
)
from app.ports import Claim, Grant, Ledger, Limiter, NotYet, Part, Reply, Stated
from app.telemetry import Telemetry

_HARMLESS, _HARMLESS_TOKENS = "hello", 8

_BULK_SLACK = 4  # a batch is packed below what it was granted, by the next text's tokens at most
_BULK_PARTS = 20  # into which a minute's quota falls at least, however few tokens it is

LEAST_ATTEMPT_S = 1.0
"""The shortest time that a call gets for its answer, unless the deployment's own `timeout_s` is shorter."""


@dataclass(frozen=True, slots=True)
class Permit:
    """A slot, a closed breaker (or its one probe) and quota granted for `wish`: what a batch of it needs."""

    slot: Slot
    wish: Demand
    passed: Pass
    grant: Grant
    fit: Fit


@dataclass(frozen=True, slots=True)
class Landed:
    """The batch has its vectors: row i answers item i, and counts `tokens[i]`."""

    rows: list[bytes]
    tokens: list[int]
    deployment: str


@dataclass(frozen=True, slots=True)
class Returned:
    """The batch failed: `groups` of its texts try again; the others `failed`, each with its error."""

    groups: tuple[Group, ...] = ()
    failed: Mapping[WorkItem, EmbedgateError] = field(default_factory=dict)


class Dispatcher:
    """Serves one Space from the deployments of a `route`; see `Roster` for how it chooses."""

    def __init__(
        self,
        space: Space,
        gates: Sequence[Gate],
        limiter: Limiter,
        ledger: Ledger,
        budget: Budget,
        bell: Bell,
        telemetry: Telemetry,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        route: Route,
        several_tenants: Callable[[], bool] = lambda: False,
        bulk_min_tokens: int = 0,
    ) -> None:
        self._space = space
        self._limiter = limiter
        self._budget = budget
        self._calls = Calls(limiter, ledger, bell, clock=clock)
        self._roster = Roster(
            space, gates, clock=clock, spread=route.spread, spill_s=route.spill_s, several_tenants=several_tenants
        )  # fmt: skip
        self._bell = bell
        self._telemetry = telemetry
        self._clock = clock
        self._rng = rng
        self._bulk_min_tokens = bulk_min_tokens

    def bulk_tokens(self, gate: Gate) -> int:
        """How many tokens, as we count, a call for bulk texts should carry at least, if so many wait."""
        per_minute = gate.deployment.limits.tokens_per_minute
        least = min(self._bulk_min_tokens, per_minute // _BULK_PARTS) if per_minute else self._bulk_min_tokens
        return min(gate.unweigh(least), gate.most_tokens)

    def outage_s(self) -> float | None:
        """Seconds until the earliest probe when every deployment is out; None while one can be asked."""
        return self._roster.outage_s()

    # ── before the call ─────────────────────────────────────────────────────────────────────────────────────────────

    async def slot(self, demands: Callable[[], Sequence[Demand]]) -> Slot | None:
        """A place for the first demand that a deployment can serve; None when nothing waits any more."""
        while wishes := demands():
            entered = self._roster.enter(wishes)
            if entered is not None:
                return Slot(*entered, self._bell)
            await self._bell.wait(self._roster.next_change_s(wishes))
        return None

    async def permit(self, slot: Slot, renewed: Callable[[Demand], Demand | None]) -> Permit | None:
        """Quota for what the slot was taken for, as it is now; None when it is better to choose again.

        Never waits for quota, since others may be served meanwhile.
        """
        gate, wish, started = slot.gate, renewed(slot.wish), self._clock()
        if wish is None or gate.breaker.retry_in_s():
            return None
        asked, paced = self._roster.ask(gate, wish)
        answer = await self._calls.reserve(self._claim(gate, asked, paced=paced))
        if isinstance(answer, NotYet):
            self._roster.refused(gate, wish, answer.wait_s)
            return None
        since = self._roster.granted(gate, wish)
        wait_s = self._clock() - (started if since is None else since)
        self._telemetry.limiter_waited(deployment=gate.name, wait_s=wait_s)
        probing = gate.breaker.state != "closed"
        if (passed := gate.breaker.admit()) is None:
            await self._limiter.settle(answer, 0, requests_used=0)
            return None
        return Permit(slot, wish, passed, answer, self._fit(gate, wish, answer, probing=probing))

    async def give_back(self, permit: Permit) -> None:
        """Returns a permit that no batch used."""
        permit.slot.gate.breaker.neutral(permit.passed)
        permit.slot.release()
        await self._limiter.settle(permit.grant, 0, requests_used=0)

    def _claim(self, gate: Gate, wish: Demand, *, paced: bool) -> Claim:
        most = max(wish.head.tokens, min(wish.tokens, gate.most_tokens))
        texts = min(wish.items, gate.most_items) if gate.deployment.limits.counts_texts else 1
        least = wish.head.tokens
        if wish.priority is Priority.BULK:
            least = max(least, min(most, self.bulk_tokens(gate) + _BULK_SLACK * least))
        least, most = gate.weigh(least), gate.weigh(most)
        return Claim(gate.name, least, most, wish.priority, 1, texts, paced=paced, rank=wish.rank)

    def _fit(self, gate: Gate, wish: Demand, grant: Grant, *, probing: bool) -> Fit:
        limits = gate.deployment.limits
        items = 1 if probing else min(gate.most_items, grant.requests if limits.counts_texts else gate.most_items)
        tokens = max(wish.head.tokens, min(gate.unweigh(grant.tokens), gate.most_tokens))
        return Fit(items, tokens, limits.max_batch_bytes)

    # ── the call ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def fly(self, permit: Permit, batch: Batch) -> Landed | Returned:
        """Makes the batch's call and ends its permit, whatever happens."""
        gate = permit.slot.gate
        if not batch.items[0].attempts:
            gate.budget.earn()
        fare = self._budget.depart(gate, batch.items)
        try:
            reply = await self._paid(permit, batch, fare)
            if batch.doubt is not None:
                batch.doubt.accepted = True
            counted = None if gate.counts_exactly else reply.tokens_billed
            return Landed(vectors.rows(reply.vectors), _shares(batch.items, counted), gate.name)
        except InputRefused as error:
            return await self._refused(gate, batch, error)
        except ProviderError as error:
            returned = self._after(gate, batch, error)
            return await self._afford(returned, fare) if error.may_cost else returned
        except TryAgainLater as error:
            return Returned(failed=dict.fromkeys(batch.items, error))
        finally:
            permit.slot.release()

    async def _paid(self, permit: Permit, batch: Batch, fare: Fare) -> Reply:
        """The call, and what it means for the budgets of those who pay for it. Raises as `_bought` does."""
        spent = True
        try:
            return await self._bought(permit, batch)
        except ProviderError as error:
            spent = error.may_cost
            raise
        except TryAgainLater:
            spent = False
            raise
        finally:
            self._budget.arrive(fare, spent=spent)

    async def _bought(self, permit: Permit, batch: Batch) -> Reply:
        """The call itself; settles its grant. Raises ProviderErrors."""
        gate, started = permit.slot.gate, self._clock()
        outcome, detail, billed = "cancelled", "", None
        requests = len(batch.items) if gate.deployment.limits.counts_texts else 1
        used, stated = (gate.weigh(batch.tokens), requests), None
        payloads, timeout_s = [item.payload for item in batch.items], self._timeout_s(gate, batch.items)
        try:
            parts = _parts(batch, gate.name)
            reply = await self._calls.embed(gate, permit.passed, payloads, self._space, parts, timeout_s=timeout_s)
            outcome, billed, stated = "ok", reply.tokens_billed, reply.stated
            gate.landed(batch.tokens, billed, self._clock() - started)
            if billed is not None:
                used = (billed, requests)
            return reply
        except ProviderError as error:
            outcome, detail = type(error).__name__, str(error)
            if not error.counted:
                used = (0, 0)
            raise
        except TryAgainLater:
            outcome, used = "not written down", (0, 0)
            raise
        finally:
            await self._settle(permit, *used, stated=stated)
            self._telemetry.batch_settled(
                deployment=gate.name, space=self._space.id, items=len(batch.items), tokens=billed or batch.tokens,
                duration_s=self._clock() - started, outcome=outcome, detail=detail,
            )  # fmt: skip

    async def _settle(self, permit: Permit, tokens: int, requests: int, *, stated: Stated | None) -> None:
        await self._limiter.settle(permit.grant, tokens, requests_used=requests, stated=stated)
        if tokens < permit.grant.tokens or requests < permit.grant.requests:
            self._roster.refunded(permit.slot.gate)
            self._bell.ring()

    def _timeout_s(self, gate: Gate, items: Iterable[WorkItem]) -> float:
        """Half of what its texts have left, so that another deployment still fits.

        But a call that leaves is paid for, so it gets a fair time whatever its callers' deadlines are: nobody can make
        a deployment look dead by asking for the impossible.
        """
        remaining_s = statistics.median(item.deadline for item in items) - self._clock()
        return min(gate.deployment.timeout_s, max(LEAST_ATTEMPT_S, remaining_s / 2))

    # ── after a failure ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _refused(self, gate: Gate, batch: Batch, error: InputRefused) -> Returned:
        """The bad text fails, alone; where nobody says which it is, the batch is halved until it stands alone.

        Halving costs no attempt. But a deployment that refuses whatever it gets is to blame itself: when it has
        accepted nothing since it last refused something, a harmless text of our own decides.
        """
        doubt = batch.doubt or Doubt()
        doubt.refused(batch.splits)
        if (doubt.unanimous or not gate.proven) and not doubt.blamed:
            try:
                accepts = await self._accepts_anything(gate, self._timeout_s(gate, batch.items))
            except ProviderError as failure:
                return self._after(gate, batch, failure)
            except TryAgainLater as full:
                return Returned(failed=dict.fromkeys(batch.items, full))
            doubt.blamed = "texts" if accepts else "deployment"
        if doubt.blamed == "deployment":
            return self._after(gate, batch, Misconfigured(f"every text is refused: {error}"))
        items, at = batch.items, error.position
        if len(items) == 1 or (at is not None and 0 <= at < len(items)):
            bad = 0 if at is None or len(items) == 1 else at
            rest = items[:bad] + items[bad + 1 :]
            gate.proven = False
            groups = (Group(rest, batch.avoid, splits=batch.splits, doubt=doubt),) if rest else ()
            return Returned(groups, {items[bad]: self._blame(error)})
        half = len(items) // 2
        parts, splits = (items[:half], items[half:]), batch.splits + 1
        halves = (Group(part, batch.avoid, splits=splits, doubt=doubt) for part in parts)
        return Returned(tuple(halves))

    def _blame(self, error: InputRefused) -> EmbedgateError:
        if not error.too_long:
            return RejectedInput()
        most = self._space.max_input_tokens
        return InvalidRequest(
            f"This model's maximum context length is {most} tokens, and the provider counts more in this input. "
            "Please reduce your prompt."
        )

    async def _accepts_anything(self, gate: Gate, timeout_s: float) -> bool:
        """Whether the deployment embeds a text that nobody could refuse.

        Raises the ProviderError that kept it from being found out: such a call proves nothing about texts.
        """
        tokens = gate.weigh(_HARMLESS_TOKENS)
        grant = await self._calls.reserve(Claim(gate.name, tokens, tokens, Priority.DEFAULT, waits=False))
        if isinstance(grant, NotYet):
            raise Throttled("no quota to find out whether it accepts anything")
        used, accepts = (0, 0), False
        try:
            if (passed := gate.breaker.admit()) is None:
                raise Transient("left alone before it was known whether it accepts anything")
            used = (tokens, 1)
            part = Part(OWN, "", "", "", "canary", 1, _HARMLESS_TOKENS)
            await self._calls.embed(gate, passed, [_HARMLESS], self._space, [part], timeout_s=timeout_s)
            accepts = gate.proven = True
        except (InputRefused, Misconfigured):
            pass
        except ProviderError as error:
            if not error.counted:
                used = (0, 0)
            raise
        except TryAgainLater:
            used = (0, 0)
            raise
        finally:
            await self._limiter.settle(grant, used[0], requests_used=used[1])
        self._telemetry.deployment_doubted(deployment=gate.name, accepts=accepts, tokens=used[0])
        return accepts

    def _after(self, gate: Gate, batch: Batch, error: ProviderError) -> Returned:
        """What happens to the texts: to the next deployment, again later, or failed."""
        for item in batch.items:
            item.attempts += 1
        failure = UpstreamFailed("invalid_upstream_response" if isinstance(error, MalformedReply) else "upstream_error")
        most = gate.deployment.attempts.most
        again = tuple(item for item in batch.items if item.attempts < most)
        avoid = (frozenset() if gate.name in batch.avoid else batch.avoid) | {gate.name}
        others = self._roster.can_avoid(avoid)
        lasting = isinstance(error, BadCredential | QuotaExhausted | Misconfigured)
        if not again or not (others or (not lasting and gate.budget.spend())):
            return Returned(failed=dict.fromkeys(batch.items, failure))
        rest_s = math.inf if lasting else self._rest_s(gate, batch, error)
        self._telemetry.texts_retried(
            deployment=gate.name, items=len(again), reason=type(error).__name__, delay_s=0.0 if others else rest_s
        )
        spent = dict.fromkeys((item for item in batch.items if item.attempts >= most), failure)
        return Returned((Group(again, avoid, self._clock() + rest_s),), spent)

    async def _afford(self, returned: Returned, fare: Fare) -> Returned:
        """The same, but texts that may have been paid for only try again if there is money to pay for them again."""
        again = [item for group in returned.groups for item in group.items]
        refused = await self._budget.again(fare, again)
        if not refused:
            return returned
        left = [replace(group, items=tuple(i for i in group.items if i not in refused)) for group in returned.groups]
        return Returned(tuple(group for group in left if group.items), {**returned.failed, **refused})

    def _rest_s(self, gate: Gate, batch: Batch, error: ProviderError) -> float:
        """How soon it makes sense to ask the same deployment again."""
        if isinstance(error, Throttled):
            return 0.0  # the limiter knows how long
        policy = gate.deployment.attempts
        rest_s = min(policy.backoff_cap_s, policy.backoff_base_s * 2.0 ** (batch.items[0].attempts - 1))
        least, most = (0.0, 1.0) if policy.jitter is None else (1.0 - policy.jitter, 1.0 + policy.jitter)
        return rest_s * self._rng.uniform(least, most)


def _shares(items: Sequence[WorkItem], billed: int | None) -> list[int]:
    """Splits what was billed over the texts in proportion to our counts; the parts sum to the bill."""
    counts = [item.tokens for item in items]
    return counts if billed is None or not any(counts) else money.split(billed, counts)


def _parts(batch: Batch, deployment: str) -> list[Part]:
    """Who pays for what of a batch, and why it is bought."""
    elsewhere = bool(batch.avoid) and deployment not in batch.avoid
    texts, tokens = Counter[tuple[str, str, str, str, Cause]](), Counter[tuple[str, str, str, str, Cause]]()
    for item in batch.items:
        request = item.payer
        assert request is not None  # noqa: S101 — it has been one since the batch was taken
        spender, cause = request.spender, request.cause
        if item.attempts:
            cause = "fallback" if elsewhere else "retry"
        elif cause == "miss" and request.priority is Priority.BULK:
            cause = "bulk"
        payer = (request.tenant.name, spender.project, spender.key, spender.user, cause)
        texts[payer] += 1
        tokens[payer] += item.tokens
    return [Part(*payer, texts[payer], tokens[payer]) for payer in texts]
