"""One Reply for one Batch, from whoever of the Space can: permits, the call, and what its failure means.

The only file that decides about deployments. A batch is never formed before its deployment has granted it.
"""

import asyncio
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from app import vectors
from app.domain import Space
from app.engine.breaker import Pass
from app.engine.gate import Bell, Gate, Slot
from app.engine.workitem import Batch, Demand, Fit, WorkItem
from app.errors import (
    BadCredential,
    CallTimeout,
    EmbedgateError,
    InputRefused,
    MalformedReply,
    Misconfigured,
    ProviderError,
    QuotaExhausted,
    RejectedInput,
    Throttled,
    UpstreamFailed,
)
from app.ports import Claim, Grant, Limiter, NotYet, Reply
from app.telemetry import Telemetry

ASK_AGAIN_S = 1.0
"""A refused claim keeps its place only while it is asked again now and then."""

LEAST_ATTEMPT_S = 1.0
"""The shortest time that a call gets for its answer, unless the deployment's own `timeout_s` is shorter."""


@dataclass(frozen=True, slots=True)
class Permit:
    """A slot, a closed breaker (or its one probe) and granted quota: what a batch needs before it is formed."""

    slot: Slot
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
    """The batch failed: `groups` of its texts try again after `delay_s`, not at `avoid`; `failed` got `error`."""

    groups: tuple[tuple[WorkItem, ...], ...] = ()
    failed: tuple[WorkItem, ...] = ()
    error: EmbedgateError | None = None
    delay_s: float = 0.0
    avoid: frozenset[str] = frozenset()


class Dispatcher:
    """Serves one Space from its deployments in order."""

    def __init__(
        self,
        space: Space,
        gates: Sequence[Gate],
        limiter: Limiter,
        bell: Bell,
        telemetry: Telemetry,
        *,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._space = space
        self._gates = gates
        self._limiter = limiter
        self._bell = bell
        self._telemetry = telemetry
        self._clock = clock
        self._rng = rng

    def outage_s(self) -> float | None:
        """Seconds until the earliest probe when every deployment is out; None while one can be asked."""
        wait_s = min(gate.breaker.retry_in_s() for gate in self._gates)
        trusted = any(gate.breaker.state in ("closed", "half_open") for gate in self._gates)
        return None if trusted or wait_s == 0.0 else wait_s

    # ── before the call ─────────────────────────────────────────────────────────────────────────────────────────────

    async def slot(self, demand: Callable[[], Demand | None]) -> Slot | None:
        """A place at the first deployment that can; None when nothing waits any more."""
        while (wish := demand()) is not None:
            for gate in self._gates:
                gate.breaker.check_stall()
            chosen = self._choose(wish)
            if chosen is not None and chosen.enter(wish.priority, self._clock()):
                return Slot(chosen, wish.priority, self._bell)
            await self._bell.wait(self._next_change_s())
        return None

    async def permit(self, slot: Slot, demand: Callable[[], Demand | None]) -> Permit | None:
        """Quota for what now waits, at the slot's deployment; None when it is better to choose again."""
        gate = slot.gate
        started = self._clock()
        while (wish := demand()) is not None and gate.breaker.retry_in_s() == 0.0:
            answer = await self._limiter.reserve(self._claim(gate, wish))
            if isinstance(answer, NotYet):
                await self._bell.wait(min(answer.wait_s, ASK_AGAIN_S))
                continue
            if answer.start_in_s:
                await asyncio.sleep(answer.start_in_s)
            self._telemetry.limiter_waited(deployment=gate.name, wait_s=self._clock() - started)
            probing = gate.breaker.state != "closed"
            if (passed := gate.breaker.admit()) is not None:
                return Permit(slot, passed, answer, self._fit(gate, wish, answer, probing=probing))
            await self._limiter.settle(answer, 0, requests_used=0)
        return None

    async def give_back(self, permit: Permit) -> None:
        """Returns a permit that no batch used."""
        permit.slot.gate.breaker.neutral(permit.passed)
        permit.slot.release()
        await self._limiter.settle(permit.grant, 0, requests_used=0)

    def _choose(self, wish: Demand) -> Gate | None:
        able = [gate for gate in self._gates if gate.breaker.retry_in_s() == 0.0]
        untried = [gate for gate in able if gate.name not in wish.avoid]
        return next(iter(untried or able), None)

    def _next_change_s(self) -> float | None:
        """When waiting for a bell would be too long: a probe falls due, or silence becomes a stall."""
        probes = [wait_s for gate in self._gates if (wait_s := gate.breaker.retry_in_s())]
        stalls = [stall_s for gate in self._gates if (stall_s := gate.breaker.stall_in_s()) is not None]
        return min(probes + stalls, default=None)

    def _claim(self, gate: Gate, wish: Demand) -> Claim:
        most = max(wish.head_tokens, min(wish.tokens, gate.deployment.limits.max_batch_tokens))
        return Claim(gate.name, gate.weigh(wish.head_tokens), gate.weigh(most), wish.priority)

    def _fit(self, gate: Gate, wish: Demand, grant: Grant, *, probing: bool) -> Fit:
        limits = gate.deployment.limits
        items = 1 if probing else min(limits.max_batch_items, gate.provider.max_items)
        tokens = max(wish.head_tokens, min(gate.unweigh(grant.tokens), limits.max_batch_tokens))
        return Fit(items, tokens, limits.max_batch_bytes)

    # ── the call ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def fly(self, permit: Permit, batch: Batch) -> Landed | Returned:
        """Makes the batch's call and ends its permit, whatever happens."""
        gate, started = permit.slot.gate, self._clock()
        outcome, detail, billed = "cancelled", "", None
        used: tuple[int | None, int] = (gate.weigh(batch.tokens), 1)
        if not batch.items[0].attempts:
            gate.budget.earn()
        try:
            reply = await self._call(gate, batch)
            gate.breaker.succeeded(permit.passed)
            gate.learn(batch.tokens, reply.tokens_billed)
            billed = reply.tokens_billed
            outcome, used = "ok", (billed if billed is not None else used[0], 1)
            counted = None if gate.counts_exactly else billed
            return Landed(vectors.rows(reply.vectors), _shares(batch.items, counted), gate.name)
        except ProviderError as error:
            outcome, detail = type(error).__name__, str(error)
            if not error.counted:
                used = (0, 0)
            await self._note(gate, permit.passed, error)
            return self._after(gate, batch, error)
        finally:
            gate.breaker.neutral(permit.passed)  # counts only if nothing else ended the pass
            permit.slot.release()
            await self._limiter.settle(permit.grant, used[0], requests_used=used[1])
            self._telemetry.batch_settled(
                deployment=gate.name, space=self._space.id, items=len(batch.items), tokens=billed or batch.tokens,
                duration_s=self._clock() - started, outcome=outcome, detail=detail,
            )  # fmt: skip

    async def _call(self, gate: Gate, batch: Batch) -> Reply:
        timeout_s = self._timeout_s(gate, batch.items)
        payloads = [item.payload for item in batch.items]
        try:
            async with asyncio.timeout(timeout_s):
                reply = await gate.provider.embed(payloads, self._space, timeout_s=timeout_s)
        except TimeoutError:
            raise CallTimeout(f"no answer within {timeout_s:.1f} s") from None
        vectors.check(reply.vectors, len(payloads), self._space.dimensions, gate.deployment.unit_norm)
        return reply

    def _timeout_s(self, gate: Gate, items: Iterable[WorkItem]) -> float:
        """Half of what its texts have left, so that another deployment still fits.

        But a call that leaves is paid for, so it gets a fair time whatever its callers' deadlines are: nobody can make
        a deployment look dead by asking for the impossible.
        """
        remaining_s = statistics.median(item.deadline for item in items) - self._clock()
        return min(gate.deployment.timeout_s, max(LEAST_ATTEMPT_S, remaining_s / 2))

    # ── after a failure ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _note(self, gate: Gate, passed: Pass, error: ProviderError) -> None:
        """What this failure says about the deployment."""
        match error:
            case InputRefused() | Misconfigured():
                gate.breaker.neutral(passed)
            case Throttled():
                gate.breaker.neutral(passed)
                await self._limiter.throttled(gate.name, error.retry_after_s)
            case BadCredential():
                gate.breaker.condemn("credential")
            case QuotaExhausted():
                gate.breaker.condemn("quota")
            case _:
                gate.breaker.failed(passed)
        self._bell.ring()

    def _after(self, gate: Gate, batch: Batch, error: ProviderError) -> Returned:
        """What happens to the texts: split around a bad one, to the next deployment, again later, or failed."""
        if isinstance(error, InputRefused):
            if len(batch.items) == 1:
                return Returned(failed=batch.items, error=RejectedInput())
            half = len(batch.items) // 2
            return Returned(groups=(batch.items[:half], batch.items[half:]), avoid=batch.avoid)
        for item in batch.items:
            item.attempts += 1
        failure = UpstreamFailed("invalid_upstream_response" if isinstance(error, MalformedReply) else "upstream_error")
        most = gate.deployment.attempts.most
        again = tuple(item for item in batch.items if item.attempts < most)
        if not again or (where := self._where_next(gate, batch, error)) is None:
            return Returned(failed=batch.items, error=failure)
        delay_s, avoid = where
        self._telemetry.texts_retried(
            deployment=gate.name, items=len(again), reason=type(error).__name__, delay_s=delay_s
        )
        spent = tuple(item for item in batch.items if item.attempts >= most)
        return Returned((again,), spent, failure, delay_s, avoid)

    def _where_next(self, gate: Gate, batch: Batch, error: ProviderError) -> tuple[float, frozenset[str]] | None:
        """How soon another try makes sense, and where not; None when none does."""
        avoid = batch.avoid | {gate.name}
        if any(other.name not in avoid and other.breaker.retry_in_s() == 0.0 for other in self._gates):
            return 0.0, avoid
        if isinstance(error, BadCredential | QuotaExhausted | Misconfigured) or not gate.budget.spend():
            return None
        if isinstance(error, Throttled):
            return 0.0, frozenset()  # the limiter knows how long
        policy = gate.deployment.attempts
        longest_s = min(policy.backoff_cap_s, policy.backoff_base_s * 2.0 ** (batch.items[0].attempts - 1))
        return self._rng.uniform(0.0, longest_s), frozenset()


def _shares(items: Sequence[WorkItem], billed: int | None) -> list[int]:
    """Splits what was billed over the texts in proportion to our counts; the parts sum to the bill."""
    counts = [item.tokens for item in items]
    total = sum(counts)
    if billed is None or billed == total or not total:
        return counts
    shares, before, running = [], 0, 0
    for count in counts:
        running += count
        upto = running * billed // total
        shares.append(upto - before)
        before = upto
    return shares
