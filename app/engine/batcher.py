"""One Space's micro-batcher: a slot, company, a permit, then a batch; and the table of texts in flight.

It is supervised: a bug in its loop or in a flight fails what it held, is counted, and the loop goes on.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

from app.domain import EmbeddingRequest, Space, Vector
from app.engine.dispatcher import Dispatcher, Landed, Permit, Returned
from app.engine.gate import LEAST_WAIT_S, Bell, Slot
from app.engine.workitem import Answer, Batch, WorkItem
from app.engine.workqueue import WorkQueue
from app.errors import EmbedgateError, InternalError
from app.ports import Cache
from app.telemetry import Telemetry

_BULK_WINDOW_S, _BULK_LOOK_S = 0.05, 0.005


class CrashLog:
    """Remembers the bugs of the last minute: three of them say that this process is not well."""

    MOST = 3

    def __init__(self, telemetry: Telemetry, *, clock: Callable[[], float]) -> None:
        self._telemetry = telemetry
        self._clock = clock
        self._times: deque[tuple[float, str]] = deque(maxlen=100)

    def record(self, loop: str, error: BaseException) -> None:
        """Counts one bug in `loop`; never fails itself, since nobody would be left to notice."""
        self._times.append((self._clock(), loop))
        with suppress(Exception):
            self._telemetry.loop_crashed(loop=loop, error=error)

    def complaint(self) -> str | None:
        """Why this process should get no requests, if so."""
        recent = [loop for at, loop in self._times if at > self._clock() - 60.0]
        return f"{len(recent)} crashes in the last minute, last in {recent[-1]}" if len(recent) >= self.MOST else None


class Batcher:
    """Turns the waiting texts of one Space into calls.

    Every text that waits or flies is in one table by key, so that nobody buys it twice at one moment.
    """

    def __init__(
        self,
        space: Space,
        queue: WorkQueue,
        dispatcher: Dispatcher,
        cache: Cache,
        bell: Bell,
        crashes: CrashLog,
        telemetry: Telemetry,
        *,
        tasks: asyncio.TaskGroup,
        clock: Callable[[], float],
    ) -> None:
        self.queue = queue
        self.dispatcher = dispatcher
        self._space = space
        self._cache = cache
        self._bell = bell
        self._crashes = crashes
        self._telemetry = telemetry
        self._tasks = tasks
        self._clock = clock
        self._table: dict[bytes, WorkItem] = {}

    def __repr__(self) -> str:
        return f"<Batcher {self._space.model}: {len(self._table)} texts, {self.queue!r}>"

    def __len__(self) -> int:
        return len(self._table)

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    def find(self, key: bytes) -> WorkItem | None:
        """The text in flight or waiting under `key`."""
        item = self._table.get(key)
        return None if item is None or self._is_lost(item) else item

    def join(self, item: WorkItem, request: EmbeddingRequest) -> None:
        """Wants `item` for `request` too; it takes the higher of their priorities."""
        item.waiters.append(request)
        self.queue.promote(item, request)

    def submit(self, request: EmbeddingRequest, items: list[WorkItem]) -> None:
        """Lets new `items` wait, all or none (raises Overloaded)."""
        self.queue.put(request, items)
        for item in items:
            self._table[item.key] = item

    def leave(self, request: EmbeddingRequest, items: Iterable[WorkItem]) -> None:
        """`request` wants none of `items` any more; those that nobody else wants are dropped, unless they fly."""
        for item in items:
            if item.future.done():
                continue
            item.waiters.remove(request)
            if not item.waiters and not item.flying:
                self.queue.forget(item)
                self._remove(item)

    # ── the loop ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Serves until cancelled."""
        while True:
            try:
                await self._serve_one()
            except Exception as bug:  # supervision is for the errors that nobody thought of
                self._fail([item for item in self._table.values() if self._is_lost(item)], InternalError())
                self._crashes.record("batcher", bug)
                await asyncio.sleep(0.01)

    async def _serve_one(self) -> None:
        while not self.queue.holds(1, 1) and not len(self.queue):
            await self._bell.wait(None)
        slot = await self.dispatcher.slot(self.queue.demands)
        if slot is None:
            return
        try:
            reason = await self._gather(slot)
            permit = await self.dispatcher.permit(slot, self.queue.renewed)
        except BaseException:
            slot.release()
            raise
        if permit is None:
            slot.release()
        else:
            await self._use(permit, reason)

    async def _gather(self, slot: Slot) -> str:
        """Waits for company while other calls of the deployment are in flight, and says why no longer.

        An idle deployment never waits, nor do texts that came back: they travel alone.
        """
        if slot.wish.back is not None:
            return "retry"
        await self._gather_bulk(slot)
        gate = slot.gate
        until = slot.wish.head.queued_at + gate.deployment.limits.window_s
        while gate.in_flight > 1 and not self.queue.holds(gate.most_items, gate.most_tokens):
            if (left_s := until - self._clock()) < LEAST_WAIT_S:
                return "window"
            await self._bell.wait(left_s)
        return "idle"

    async def _gather_bulk(self, slot: Slot) -> None:
        """Nobody waits for bulk texts: a call of few tokens waits a moment for more, though nothing is under way."""
        until = slot.wish.head.queued_at + _BULK_WINDOW_S
        while self.queue.has_little(self.dispatcher.bulk_tokens(slot.gate)) and self._clock() < until:
            await self._bell.wait(_BULK_LOOK_S)

    async def _use(self, permit: Permit, reason: str) -> None:
        """Lets a batch fly; a permit that turns out to be of no use is given back."""
        try:
            batch = self._take(permit, reason)
        except BaseException:
            await self.dispatcher.give_back(permit)
            raise
        if batch.items:
            self._tasks.create_task(self._fly(permit, batch))
            return
        await self.dispatcher.give_back(permit)
        await asyncio.sleep(LEAST_WAIT_S)  # whoever comes first by now needs more: never ask twice at one moment

    def _take(self, permit: Permit, reason: str) -> Batch:
        batch = self.queue.take(permit.fit, permit.wish)
        if batch.reason == "drained":  # everything came along, so it left for another reason
            batch = replace(batch, reason=reason)
        for item in batch.items:
            item.flying, item.payer = True, item.waiters[0]
        return batch

    async def _fly(self, permit: Permit, batch: Batch) -> None:
        try:
            self._report(permit, batch)
            outcome = await self.dispatcher.fly(permit, batch)
            if isinstance(outcome, Landed):
                self._land(batch, outcome)
            else:
                self._retry(outcome)
        except Exception as bug:  # as in run
            self._fail((item for item in batch.items if item.flying), InternalError())
            permit.slot.gate.breaker.neutral(permit.passed)
            permit.slot.release()
            self._crashes.record("flight", bug)

    def _report(self, permit: Permit, batch: Batch) -> None:
        fit, now = permit.fit, self._clock()
        self._telemetry.batch_left(
            deployment=permit.slot.gate.name,
            items=len(batch.items),
            tokens=batch.tokens,
            fill=max(len(batch.items) / fit.items, batch.tokens / fit.tokens if fit.tokens else 0.0),
            reason=batch.reason,
            waits=[(item.priority, now - item.queued_at) for item in batch.items],
        )
        for item in batch.items:
            item.left_at = now

    def _land(self, batch: Batch, landed: Landed) -> None:
        """Keeps the vectors first, then answers everybody: whoever asks in between finds one or the other."""
        size = len(batch.items)
        kept = [Vector(row, tokens) for row, tokens in zip(landed.rows, landed.tokens, strict=True)]
        self._cache.put_many(self._space, zip((item.key for item in batch.items), kept, strict=True))
        for item, vector in zip(batch.items, kept, strict=True):
            self._remove(item)
            if not item.future.done():
                wait_s = item.left_at - item.queued_at
                brought = Answer(vector.data, vector.tokens, landed.deployment, size, wait_s, item.attempts)
                item.future.set_result(brought)

    def _retry(self, returned: Returned) -> None:
        for item, error in returned.failed.items():
            self._fail((item,), error)
        for group in returned.groups:
            wanted = tuple(item for item in group.items if item.waiters)
            for item in group.items:
                item.flying = False
                if not item.waiters:
                    self._remove(item)
            self._telemetry.texts_dropped(items=len(group.items) - len(wanted), reason="left")
            if wanted:
                self.queue.put_back(replace(group, items=wanted))

    def _fail(self, items: Iterable[WorkItem], error: EmbedgateError) -> None:
        for item in items:
            self._remove(item)
            if not item.future.done():
                item.future.set_exception(error)
                item.future.exception()  # whoever still waits gets it; nobody else has to

    def _is_lost(self, item: WorkItem) -> bool:
        """Whether an unanswered text is neither waiting nor in flight: it ran out of time, or a bug dropped it."""
        return item.place is None and not item.flying and not item.future.done()

    def _remove(self, item: WorkItem) -> None:
        item.flying = False
        if self._table.get(item.key) is item:
            del self._table[item.key]
