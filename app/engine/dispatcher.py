"""One Reply for one Batch, from whoever of the Space can: permits, the call, and what its failure means.

The only file that decides about deployments. A batch is never formed before its deployment has granted it.
"""

import asyncio
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from app import vectors
from app.domain import Priority, Space
from app.engine.breaker import Pass
from app.engine.gate import Bell, Gate, Slot
from app.engine.workitem import Batch, Demand, Doubt, Fit, Group, WorkItem
from app.errors import (
    BadCredential,
    CallTimeout,
    EmbedgateError,
    InputRefused,
    InvalidRequest,
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

_HARMLESS, _HARMLESS_TOKENS = "hello", 8

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
    """The batch failed: `groups` of its texts try again after `delay_s`; `failed` got `error`."""

    groups: tuple[Group, ...] = ()
    failed: tuple[WorkItem, ...] = ()
    error: EmbedgateError | None = None
    delay_s: float = 0.0


class Dispatcher:
    """Serves one Space from its deployments: in order, or all at once with `spread`.

    Whom a wait for quota would keep longer than `spill_s`, or than it can afford, goes to the next deployment; so does,
    at once, who would have to wait because the provider itself said 429.
    """

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
        spread: bool = False,
        spill_s: float = math.inf,
    ) -> None:
        self._space = space
        self._gates = gates
        self._limiter = limiter
        self._bell = bell
        self._telemetry = telemetry
        self._clock = clock
        self._rng = rng
        self._spread = spread
        self._spill_s = 0.0 if spread else spill_s
        self._chosen: Counter[str] = Counter()
        self._without_quota: dict[str, float] = {}  # deployment → when it may have some again

    def outage_s(self) -> float | None:
        """Seconds until the earliest probe when every deployment is out; None while one can be asked."""
        gates = self._sound()
        wait_s = min(gate.breaker.retry_in_s() for gate in gates)
        trusted = any(gate.breaker.state in ("closed", "half_open") for gate in gates)
        return None if trusted or wait_s == 0.0 else wait_s

    # ── before the call ─────────────────────────────────────────────────────────────────────────────────────────────

    async def slot(self, demand: Callable[[], Demand | None]) -> Slot | None:
        """A place at the first deployment that can; None when nothing waits any more."""
        while (wish := demand()) is not None:
            for gate in self._gates:
                gate.breaker.check_stall()
            chosen = self._choose(wish)
            if chosen is not None and chosen.enter(wish.priority, self._clock()):
                self._chosen[chosen.name] += 1
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
                if self._spills(gate, wish, answer.wait_s):
                    return None
                await self._bell.wait(min(answer.wait_s, ASK_AGAIN_S))
                continue
            self._without_quota.pop(gate.name, None)
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

    def _sound(self) -> Sequence[Gate]:
        """Those whose vectors are this Space's; when that is said of none, there is nobody else to ask."""
        return [gate for gate in self._gates if not gate.strange] or self._gates

    def _able(self, avoid: frozenset[str]) -> list[Gate]:
        """Those that may be called now, without those to avoid if others stay."""
        able = [gate for gate in self._sound() if gate.breaker.retry_in_s() == 0.0]
        return [gate for gate in able if gate.name not in avoid] or able

    def _choose(self, wish: Demand) -> Gate | None:
        able, now = self._able(wish.avoid), self._clock()
        if not able:
            return None
        open_again = {gate.name: self._without_quota.get(gate.name, now) for gate in able}
        with_quota = [gate for gate in able if open_again[gate.name] <= now and (gate.has_room or not gate.cooling)]
        if not with_quota:
            return min(able, key=lambda gate: open_again[gate.name])
        with_room = [gate for gate in with_quota if gate.has_room] if self._spill_s == 0.0 else []
        if self._spread and with_room:
            return min(with_room, key=self._load)
        return (with_room or with_quota)[0]

    def _load(self, gate: Gate) -> tuple[float, int]:
        """How busy it is; of equally busy ones, how often it was chosen."""
        return gate.in_flight / gate.deployment.limits.max_in_flight, self._chosen[gate.name]

    def _spills(self, gate: Gate, wish: Demand, wait_s: float) -> bool:
        """Whether somebody else is asked rather than wait so long for quota here."""
        now = self._clock()
        if not gate.cooling and wait_s <= min(self._spill_s, (wish.deadline - now) / 2):
            return False
        self._without_quota[gate.name] = now + wait_s
        return self._choose(wish) is not gate

    def _next_change_s(self) -> float | None:
        """When waiting for a bell would be too long: a probe falls due, or silence becomes a stall."""
        probes = [wait_s for gate in self._gates if (wait_s := gate.breaker.retry_in_s())]
        stalls = [stall_s for gate in self._gates if (stall_s := gate.breaker.stall_in_s()) is not None]
        return min(probes + stalls, default=None)

    def _claim(self, gate: Gate, wish: Demand) -> Claim:
        most = max(wish.head_tokens, min(wish.tokens, gate.most_tokens))
        texts = min(wish.items, gate.most_items) if gate.deployment.limits.counts_texts else 1
        return Claim(gate.name, gate.weigh(wish.head_tokens), gate.weigh(most), wish.priority, 1, texts)

    def _fit(self, gate: Gate, wish: Demand, grant: Grant, *, probing: bool) -> Fit:
        limits = gate.deployment.limits
        items = 1 if probing else min(gate.most_items, grant.requests if limits.counts_texts else gate.most_items)
        tokens = max(wish.head_tokens, min(gate.unweigh(grant.tokens), gate.most_tokens))
        return Fit(items, tokens, limits.max_batch_bytes)

    # ── the call ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def fly(self, permit: Permit, batch: Batch) -> Landed | Returned:
        """Makes the batch's call and ends its permit, whatever happens."""
        gate, started = permit.slot.gate, self._clock()
        outcome, detail, billed = "cancelled", "", None
        requests = len(batch.items) if gate.deployment.limits.counts_texts else 1
        used: tuple[int | None, int] = (gate.weigh(batch.tokens), requests)
        if not batch.items[0].attempts:
            gate.budget.earn()
        try:
            reply = await self._call(gate, batch)
            gate.breaker.succeeded(permit.passed)
            billed = reply.tokens_billed
            gate.landed(batch.tokens, billed, self._clock() - started)
            if batch.doubt is not None:
                batch.doubt.accepted = True
            outcome, used = "ok", (billed if billed is not None else used[0], requests)
            counted = None if gate.counts_exactly else billed
            return Landed(vectors.rows(reply.vectors), _shares(batch.items, counted), gate.name)
        except ProviderError as error:
            outcome, detail = type(error).__name__, str(error)
            if not error.counted:
                used = (0, 0)
            await self._note(gate, permit.passed, error, started)
            if isinstance(error, InputRefused):
                return await self._refused(gate, batch, error)
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

    async def _note(self, gate: Gate, passed: Pass, error: ProviderError, started: float) -> None:
        """What this failure says about the deployment."""
        match error:
            case InputRefused() | Misconfigured():
                gate.breaker.neutral(passed)
            case Throttled():
                gate.breaker.neutral(passed)
                rest_s = gate.throttled(error.retry_after_s, started, self._clock())
                await self._limiter.throttled(gate.name, rest_s)
            case BadCredential():
                gate.breaker.condemn("credential")
            case QuotaExhausted():
                gate.breaker.condemn("quota")
            case _:
                gate.breaker.failed(passed)
        self._bell.ring()

    async def _refused(self, gate: Gate, batch: Batch, error: InputRefused) -> Returned:
        """The bad text fails, alone; where nobody says which it is, the batch is halved until it stands alone.

        Halving costs no attempt. But a deployment that refuses whatever it gets is to blame itself: when it has
        accepted nothing since it last refused something, a harmless text of our own decides.
        """
        doubt = batch.doubt or Doubt()
        doubt.refused(batch.splits)
        if (doubt.unanimous or not gate.proven) and not doubt.blamed:
            accepts = await self._accepts_anything(gate, self._timeout_s(gate, batch.items))
            doubt.blamed = "texts" if accepts else "deployment"
        if doubt.blamed == "deployment":
            return self._after(gate, batch, Misconfigured(f"every text is refused: {error}"))
        items, at = batch.items, error.position
        if len(items) == 1 or (at is not None and 0 <= at < len(items)):
            bad = 0 if at is None or len(items) == 1 else at
            rest = items[:bad] + items[bad + 1 :]
            gate.proven = False
            groups = (Group(rest, batch.avoid, batch.splits, doubt),) if rest else ()
            return Returned(groups, (items[bad],), self._blame(error))
        half = len(items) // 2
        halves = (Group(part, batch.avoid, batch.splits + 1, doubt) for part in (items[:half], items[half:]))
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
        """Whether the deployment embeds a text that nobody could refuse; what goes wrong otherwise proves nothing."""
        grant = await granted(self._limiter, Claim(gate.name, _HARMLESS_TOKENS, _HARMLESS_TOKENS, Priority.DEFAULT))
        billed: int | None = _HARMLESS_TOKENS
        accepts = True
        try:
            billed = (await gate.provider.embed([_HARMLESS], self._space, timeout_s=timeout_s)).tokens_billed
            gate.proven = True
        except (InputRefused, Misconfigured):
            accepts = False
        except ProviderError:
            pass
        finally:
            await self._limiter.settle(grant, billed)
        self._telemetry.deployment_doubted(deployment=gate.name, accepts=accepts, tokens=billed or 0)
        return accepts

    def _after(self, gate: Gate, batch: Batch, error: ProviderError) -> Returned:
        """What happens to the texts: to the next deployment, again later, or failed."""
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
        return Returned((Group(again, avoid),), spent, failure, delay_s)

    def _where_next(self, gate: Gate, batch: Batch, error: ProviderError) -> tuple[float, frozenset[str]] | None:
        """How soon another try makes sense, and where not; None when none does."""
        avoid = batch.avoid | {gate.name}
        if any(other.name not in avoid for other in self._able(avoid)):
            return 0.0, avoid
        if isinstance(error, BadCredential | QuotaExhausted | Misconfigured) or not gate.budget.spend():
            return None
        if isinstance(error, Throttled):
            return 0.0, frozenset()  # the limiter knows how long
        policy = gate.deployment.attempts
        delay_s = min(policy.backoff_cap_s, policy.backoff_base_s * 2.0 ** (batch.items[0].attempts - 1))
        least, most = (0.0, 1.0) if policy.jitter is None else (1.0 - policy.jitter, 1.0 + policy.jitter)
        return delay_s * self._rng.uniform(least, most), frozenset()


async def granted(limiter: Limiter, claim: Claim) -> Grant:
    """The yes to `claim`, however long it takes."""
    while True:
        answer = await limiter.reserve(claim)
        if isinstance(answer, Grant):
            await asyncio.sleep(answer.start_in_s)
            return answer
        await asyncio.sleep(min(answer.wait_s, ASK_AGAIN_S))


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
