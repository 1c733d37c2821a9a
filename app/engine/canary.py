"""Hides how it is noticed that a deployment's vectors are no longer those of its Space: three texts, now and then."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from app.domain import Priority, Space
from app.engine.calls import OWN, Calls
from app.engine.gate import Bell, Gate
from app.engine.roster import ASK_AGAIN_S
from app.errors import InputRefused, ProviderError, TryAgainLater
from app.ports import Claim, Grant, Landmarks, Ledger, Limiter, NotYet, Part, Reply, Stated, TokenCounter
from app.telemetry import Telemetry
from app.vectors import Matrix

_SHORT = "The quick brown fox jumps over the lazy dog."
_FOREIGN = "Быстрая лиса 素早い狐 ثعلب سريع तेज़ लोमड़ी"
_SENTENCE = "Every morning the ferry crosses the strait, carrying letters, apples and a few quiet passengers. "
_EXACT_PART, _GUESSED_PART = 0.9, 0.4  # of the longest input: a guess may be wrong by half
_LOOK_AGAIN_S = 60.0
_STRANGE_IN_A_ROW = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """What one deployment of one model answered to the probes.

    `error` is empty, or says in our words why there was no answer (then only `latency_s` may be known). `cosine` is
    the lowest to the accepted vectors of its Space; None: these are the first. `dimensions` is the vectors' width.
    """

    model: str
    deployment: str
    space: str
    error: str = ""
    latency_s: float | None = None
    dimensions: int | None = None
    cosine: float | None = None
    tokens_billed: int | None = None
    stated: Stated | None = None


@dataclass(frozen=True, slots=True)
class Watch:
    """One model that is watched: its deployments, how often, and how near their vectors must be to the accepted ones.

    `probes` are the texts, `tokens` what they count together.
    """

    model: str
    space: Space
    gates: Sequence[Gate]
    probes: tuple[str, ...]
    tokens: int
    interval_s: float
    least_cosine: float

    @property
    def place(self) -> str:
        """Where its accepted vectors are kept: other probes have other ones."""
        digest = hashlib.blake2b("\0".join((self.space.id, *self.probes)).encode(), digest_size=8)
        return f"{self.space.id}-{digest.hexdigest()}"


def probes(counter: TokenCounter, max_input_tokens: int, max_batch_tokens: int) -> tuple[tuple[str, ...], int]:
    """A short text, one in other scripts, and one near the length limit; and what they count together."""
    part = _EXACT_PART if counter.exact else _GUESSED_PART
    most = min(part * max_input_tokens, max_batch_tokens / 2)
    long = counter.cut(_SENTENCE * (int(most) // 8 + 1), int(most))
    texts = (_SHORT, _FOREIGN, long)
    return texts, sum(map(counter.count, texts))


class Canary:
    """Watches models in the background; an async context manager that owns its tasks.

    A deployment whose vectors were too far off twice in a row is strange: its gate says so, and whoever chooses
    deployments leaves it out as long as another one stays. One that cannot be reached is unknown, not strange.
    """

    def __init__(
        self,
        watches: Sequence[Watch],
        landmarks: Landmarks,
        limiter: Limiter,
        ledger: Ledger,
        bell: Bell,
        telemetry: Telemetry,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._watches = watches
        self._landmarks = landmarks
        self._calls = Calls(limiter, ledger, bell, clock=clock)
        self._bell = bell
        self._telemetry = telemetry
        self._clock = clock
        self._off: dict[tuple[str, str], int] = {}  # how often in a row a deployment of a model was too far off
        self._tasks: list[asyncio.Task[None]] = []
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        watched = [watch for watch in self._watches if watch.interval_s]
        self._tasks = [self._group.create_task(self._run(watch), name=f"canary {watch.model}") for watch in watched]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(None, None, None)

    async def probe(self, *, accept: bool = False) -> list[Finding]:
        """Probes every deployment of every model now; with `accept` the first good vectors become the accepted ones."""
        found: list[Finding] = []
        for watch in self._watches:
            found += await self._round(watch, watch.gates, accept=accept)
        return found

    async def _run(self, watch: Watch) -> None:
        while True:
            wait_s = watch.interval_s / 10
            try:
                if await self._landmarks.claim(watch.place, watch.interval_s):
                    wait_s = watch.interval_s
                    await self._round(watch, [gate for gate in watch.gates if gate.breaker.state == "closed"])
                    off = [self._off.get((watch.model, gate.name), 0) for gate in watch.gates]
                    if any(0 < times < _STRANGE_IN_A_ROW for times in off):
                        await self._landmarks.release(watch.place)
                        wait_s = min(_LOOK_AGAIN_S, watch.interval_s)
            except Exception as bug:  # supervision is for the errors that nobody thought of
                self._telemetry.loop_crashed(loop="canary", error=bug)
            await asyncio.sleep(wait_s)

    async def _round(self, watch: Watch, gates: Sequence[Gate], *, accept: bool = False) -> list[Finding]:
        """Probes `gates` one after the other; where nothing was accepted yet, the first that answers is."""
        accepted = None if accept else await self._landmarks.vectors(watch.place)
        found = []
        for gate in gates:
            finding, sung = await self._sing(watch, gate, accepted)
            if sung is not None and accepted is None:
                accepted = sung
                await self._landmarks.accept(watch.place, sung)
            self._judge(watch, gate, finding)
            found.append(finding)
        return found

    async def _sing(self, watch: Watch, gate: Gate, accepted: Matrix | None) -> tuple[Finding, Matrix | None]:
        """One deployment's vectors of the probes, and what there is to say of them."""
        started = self._clock()
        try:
            reply = await self._call(watch, gate)
        except (ProviderError, TryAgainLater) as error:
            told = f"{type(error).__name__}: {error}"
            if isinstance(error, InputRefused):
                told += f", of texts of about {watch.tokens} tokens: is max_input_tokens right?"
            return Finding(watch.model, gate.name, watch.space.id, told, self._clock() - started), None
        finding = Finding(
            watch.model, gate.name, watch.space.id,
            latency_s=self._clock() - started,
            dimensions=reply.vectors.shape[1],
            cosine=None if accepted is None else _nearness(reply.vectors, accepted),
            tokens_billed=reply.tokens_billed,
            stated=reply.stated,
        )  # fmt: skip
        return finding, reply.vectors

    async def _call(self, watch: Watch, gate: Gate) -> Reply:
        """A call like any other of the lowest priority: it takes a slot and quota."""
        requests = len(watch.probes) if gate.deployment.limits.counts_texts else 1
        tokens = gate.weigh(watch.tokens)
        grant = await self._admitted(gate, Claim(gate.name, tokens, tokens, Priority.BULK, requests, requests))
        used = (tokens, requests)
        try:
            passed = gate.breaker.admit() or gate.breaker.unjudged()
            timeout_s = gate.deployment.timeout_s
            part = Part(OWN, "", "", "", "canary", len(watch.probes), watch.tokens)
            reply = await self._calls.embed(gate, passed, watch.probes, watch.space, [part], timeout_s=timeout_s)
            used = (tokens if reply.tokens_billed is None else reply.tokens_billed, requests)
            return reply
        except ProviderError as error:
            if not error.counted:
                used = (0, 0)
            raise
        except TryAgainLater:
            used = (0, 0)
            raise
        finally:
            gate.leave(Priority.BULK)
            self._bell.ring()
            await self._calls.limiter.settle(grant, used[0], requests_used=used[1])

    async def _admitted(self, gate: Gate, claim: Claim) -> Grant:
        """Quota and a slot of `gate`, both at once: neither is held while the other is waited for."""
        while True:
            if not gate.has_room:
                await self._bell.wait(ASK_AGAIN_S)
                continue
            answer = await self._calls.reserve(claim)
            if isinstance(answer, NotYet):
                await asyncio.sleep(min(answer.wait_s, ASK_AGAIN_S))
                continue
            if gate.enter(Priority.BULK, self._clock()):
                return answer
            await self._calls.limiter.settle(answer, 0, requests_used=0)
            await self._bell.wait(ASK_AGAIN_S)

    def _judge(self, watch: Watch, gate: Gate, finding: Finding) -> None:
        self._telemetry.canary_sang(
            model=watch.model, deployment=gate.name, cosine=finding.cosine, tokens=finding.tokens_billed or 0,
            error=finding.error,
        )  # fmt: skip
        if finding.error:
            return
        key, near = (watch.model, gate.name), finding.cosine is None or finding.cosine >= watch.least_cosine
        off = self._off[key] = 0 if near else self._off.get(key, 0) + 1
        if 0 < off < _STRANGE_IN_A_ROW:
            return
        if gate.judge(watch.space, watch.model, strange=not near):
            self._telemetry.space_changed(model=watch.model, deployment=gate.name, strange=not near)


def _nearness(found: Matrix, accepted: Matrix) -> float:
    """The lowest cosine between vectors of the same text; -1 when the widths differ."""
    if found.shape != accepted.shape:
        return -1.0
    one, other = found.astype(np.float64), accepted.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float((np.vecdot(one, other) / np.maximum(lengths, 1e-300)).min())
