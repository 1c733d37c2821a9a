"""What can be seen from outside: one method per event, which knows its log line and its metrics.

The floors above say *what happened* and nothing else. Labels come from the configuration only, so the number of series
does not grow with callers; no line and no label ever holds a text, a vector, a key or a user id.
"""

import random
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import BinaryIO

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from app.domain import Priority
from app.telemetry.log import LogWriter
from app.telemetry.series import SECONDS, Gauges, Reading, Requests

_ITEMS = tuple(2**n for n in range(12))
_TOKENS = (8, 32, 128, 512, 2048, 8192, 32_768, 131_072, 300_000)
_RATIOS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_SLOW_S = 5.0
"""A successful request slower than this is logged whatever the sample."""


@lru_cache(maxsize=1024)
def _quoted(name: str | None) -> str:
    """A name of the configuration, or None, in JSON."""
    return orjson.dumps(name).decode()


class Telemetry:
    """The one place that knows log lines and metrics; each instance has its own `registry`.

    `tenants` and `models` are the names of the configuration: any other becomes `other`.
    """

    def __init__(
        self,
        *,
        tenants: Iterable[str] = (),
        models: Iterable[str] = (),
        stream: BinaryIO | None = None,
        log_sample: float = 1.0,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._tenants = frozenset(tenants)
        self._models = frozenset(models)
        self._log = LogWriter(stream or sys.stderr.buffer)
        self._log_sample = log_sample
        self._gauges = Gauges()
        self.registry.register(self._gauges)
        self.requests = Requests()
        self.registry.register(self.requests)
        self._make_engine_metrics()
        self._make_store_metrics()
        self.watch("embedgate_log_lines_dropped", "Log lines lost to a slow stream", (), self._read_dropped)

    def _make_engine_metrics(self) -> None:
        def histogram(name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"embedgate_{name}", text, labels, buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"embedgate_{name}", text, labels, registry=self.registry)

        by_deployment = ("deployment",)
        self.queue_seconds = histogram("queue_seconds", "Wait before a call left", ("deployment", "priority"), SECONDS)
        self.provider_seconds = histogram("provider_seconds", "One call", ("deployment", "outcome"), SECONDS)
        self.batch_items = histogram("batch_items", "Texts in a call", by_deployment, _ITEMS)
        self.batch_tokens = histogram("batch_tokens", "Tokens in a call", by_deployment, _TOKENS)
        self.batch_fill = histogram("batch_fill_ratio", "Fullest dimension of a call", by_deployment, _RATIOS)
        self.limiter_wait_seconds = histogram("limiter_wait_seconds", "Wait for quota", by_deployment, SECONDS)
        self.pool_wait_seconds = histogram("pool_wait_seconds", "Wait for a new connection", by_deployment, SECONDS)
        self.connections_opened = counter("pool_connections_opened", "Connections to providers", "deployment")
        self.flushes = counter("flushes", "Why a batch was closed", "deployment", "reason")
        self.billed_tokens = counter("provider_tokens", "Tokens that providers counted", "deployment")
        self.retries = counter("retries", "Texts sent again", "deployment", "reason")
        self.dropped_texts = counter("dropped_texts", "Waiting texts that nobody wanted any more", "reason")
        self.canary_cosine = Gauge(
            "embedgate_canary_cosine", "Nearness of the probes' vectors to the accepted ones", ("model", "deployment"),
            registry=self.registry,
        )  # fmt: skip
        self.degraded = counter("degraded_answers", "Requests answered by another model on outage", "model", "by")
        self.loop_crashes = counter("loop_crashes", "Bugs that a supervised loop survived", "loop")

    def _make_store_metrics(self) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"embedgate_{name}", text, labels, registry=self.registry)

        self.cache_level_texts = counter("cache_level_texts", "Texts looked for below memory", "level", "outcome")
        self.cache_level_seconds = Histogram(
            "embedgate_cache_level_seconds", "One look at a level", ("level",), buckets=SECONDS, registry=self.registry
        )
        self.cache_rejected = counter("cache_rejected", "Values that were not what was put there", "level")
        self.cache_dropped = counter("cache_writes_dropped", "Vectors that a level did not keep", "level", "reason")
        self.jobs = counter("jobs", "Bulk jobs by what became of them", "tenant", "event")
        self.job_lines = counter("job_lines", "Lines of jobs that are done", "model", "outcome")
        self.job_tokens = counter("job_tokens", "Tokens of lines of jobs that are done", "model")
        self.job_tasks = counter("job_tasks", "Parts of jobs that were worked on", "kind", "outcome")
        self.vendor_batches = counter("vendor_batches", "Vendors' own batches", "deployment", "event")
        self.budget_refusals = counter("budget_refusals", "Requests that a budget did not pay for", "tenant")
        self.budget_alerts = counter("budget_alerts", "Parts of budgets that were spent", "tenant", "percent")
        self.alert_deliveries = counter("alert_deliveries", "Calls of tenants' webhooks", "outcome")
        self.spent_usd = counter("spent_usd", "Money spent, as far as it is known", "tenant", "model", "cause")

    def watch(self, name: str, text: str, labels: tuple[str, ...], read: Callable[[], Reading]) -> None:
        """Adds a gauge whose value is read at each scrape."""
        self._gauges.add(name, text, labels, read)

    def close(self) -> None:
        """Writes the last log lines."""
        self._log.close()

    # ── callers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def request_finished(
        self,
        *,
        request_id: str,
        tenant: str,
        model: str,
        status: int,
        code: str | None,
        duration_s: float,
        items: int,
        tokens: int,
        cache_hits: int,
        joined: int,
        queue_s: float,
        deployment: str,
    ) -> None:
        """A caller got its answer, or left (status 499)."""
        model = model if model in self._models else "other"
        tenant = tenant if tenant in self._tenants else "other"
        answer, answers = (model, tenant, status, code), self.requests.answers
        answers[answer] = answers.get(answer, 0) + 1
        if status < 400:
            series = self.requests.series(model, tenant)
            series.buckets[bisect_left(SECONDS, duration_s)] += 1
            series.seconds += duration_s
            series.tokens += tokens
            series.hits += cache_hits
            series.joined += joined
            series.misses += items - cache_hits - joined
            if duration_s < _SLOW_S and self._log_sample < 1.0 and random.random() >= self._log_sample:  # noqa: S311
                return
        self._log.write_line(
            f'{{"time":{time.time():.3f},"event":"request.finished","request_id":"{request_id}",'
            f'"tenant":{_quoted(tenant)},"model":{_quoted(model)},"status":{status},"code":{_quoted(code)},'
            f'"duration_ms":{duration_s * 1000:.3f},"items":{items},"tokens":{tokens},"cache_hits":{cache_hits},'
            f'"joined":{joined},"queue_ms":{queue_s * 1000:.3f},"deployment":{_quoted(deployment)}}}\n'
        )  # by hand: every request writes one

    # ── batches ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def batch_left(
        self,
        *,
        deployment: str,
        items: int,
        tokens: int,
        fill: float,
        reason: str,
        waits: Iterable[tuple[Priority, float]],
    ) -> None:
        """A batch was closed for `reason` and its call starts; `waits` has each text's wait in seconds."""
        self.batch_items.labels(deployment).observe(items)
        self.batch_tokens.labels(deployment).observe(tokens)
        self.batch_fill.labels(deployment).observe(fill)
        self.flushes.labels(deployment, reason).inc()
        for priority, wait_s in waits:
            self.queue_seconds.labels(deployment, priority.name.lower()).observe(wait_s)

    def batch_settled(
        self, *, deployment: str, space: str, items: int, tokens: int, duration_s: float, outcome: str, detail: str = ""
    ) -> None:
        """A call ended: `outcome` is `ok` or the class of what went wrong; `detail` our own words about it."""
        self.provider_seconds.labels(deployment, outcome).observe(duration_s)
        if outcome == "ok":
            self.billed_tokens.labels(deployment).inc(tokens)
        self._event(
            "batch.settled", deployment=deployment, space=space, items=items, tokens=tokens,
            duration_ms=round(duration_s * 1000, 3), outcome=outcome, detail=detail,
        )  # fmt: skip

    def texts_retried(self, *, deployment: str, items: int, reason: str, delay_s: float) -> None:
        """Texts go back to the head of the queue after `delay_s`."""
        self.retries.labels(deployment, reason).inc(items)
        self._event(
            "texts.retried", deployment=deployment, items=items, reason=reason, delay_ms=round(delay_s * 1000, 3)
        )

    def texts_dropped(self, *, items: int, reason: str) -> None:
        """Waiting texts were skipped: their callers `left`, or their deadline `expired`."""
        if items:
            self.dropped_texts.labels(reason).inc(items)

    def limiter_waited(self, *, deployment: str, wait_s: float) -> None:
        """A permit had to wait for quota."""
        self.limiter_wait_seconds.labels(deployment).observe(wait_s)

    def connection_opened(self, *, deployment: str, wait_s: float) -> None:
        """A call found no idle connection, and got a new one."""
        self.connections_opened.labels(deployment).inc()
        self.pool_wait_seconds.labels(deployment).observe(wait_s)

    def answer_degraded(self, *, model: str, by: str) -> None:
        """Every deployment of `model` was out, and a caller who allowed it was answered `by` another model."""
        self.degraded.labels(model, by).inc()

    def deployment_doubted(self, *, deployment: str, accepts: bool, tokens: int) -> None:
        """A deployment refused so much that a harmless text was sent to see whether it `accepts` any."""
        self.billed_tokens.labels(deployment).inc(tokens)
        self._event("deployment.doubted", deployment=deployment, accepts=accepts, tokens=tokens)

    # ── stores ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def cache_level(self, *, level: str, hits: int, misses: int, seconds: float) -> None:
        """A shared level of the cache was asked for what memory did not have."""
        self.cache_level_texts.labels(level, "hit").inc(hits)
        self.cache_level_texts.labels(level, "miss").inc(misses)
        self.cache_level_seconds.labels(level).observe(seconds)

    def cache_level_changed(self, *, level: str, up: bool, reason: str) -> None:
        """A level of the cache is left alone for a while, or asked again."""
        self._event("cache.level_up" if up else "cache.level_down", level=level, reason=reason)

    def cache_value_rejected(self, *, level: str, items: int) -> None:
        """What a level had was not what was put there; it is deleted."""
        self.cache_rejected.labels(level).inc(items)
        self._event("cache.rejected", level=level, items=items)

    def cache_writes_dropped(self, *, level: str, items: int, reason: str) -> None:
        """Vectors were not kept in a level: too many waited (`full`), or it was `down`."""
        self.cache_dropped.labels(level, reason).inc(items)

    def store_changed(self, *, store: str, up: bool, reason: str) -> None:
        """A store cannot be asked any more, or can be again."""
        self._event("store.up" if up else "store.down", store=store, reason=reason)

    def store_warned(self, *, store: str, warning: str) -> None:
        """A store is not set up as it should be."""
        self._event("store.warned", store=store, warning=warning)

    # ── money ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def money_spent(self, *, tenant: str, model: str, cause: str, nano_usd: int) -> None:
        """So much was booked; less than 0 is what turned out not to be spent, which the metric cannot take back."""
        label = tenant if tenant in self._tenants else "other"
        self.spent_usd.labels(label, model, cause).inc(max(0, nano_usd) / 1e9)

    def purchases_inherited(self, *, purchases: int, unconfirmed: int) -> None:
        """What other processes left was booked; of those `unconfirmed` nobody knows how they ended."""
        self._event("ledger.inherited", purchases=purchases, unconfirmed=unconfirmed)

    def journal_changed(self, *, takes: bool, reason: str) -> None:
        """Nothing can be bought any more since it cannot be written down, or can be again."""
        self._event("journal.open" if takes else "journal.full", reason=reason)

    def budget_refused(self, *, tenant: str) -> None:
        """What is left of a budget does not pay for a request."""
        self.budget_refusals.labels(tenant if tenant in self._tenants else "other").inc()

    def budget_alerted(self, *, tenant: str, account: str, span: str, percent: int, budget: str) -> None:
        """So much of a budget, in dollars, is spent in a day or month; told once, by one replica."""
        self.budget_alerts.labels(tenant if tenant in self._tenants else "other", str(percent)).inc()
        self._event("budget.alert", tenant=tenant, account=account, span=span, percent=percent, budget_usd=budget)

    def alert_delivered(self, *, tenant: str, percent: int, attempts: int, outcome: str) -> None:
        """A tenant's webhook was told of an alert, or did not take it."""
        self.alert_deliveries.labels("ok" if outcome == "ok" else "failed").inc()
        self._event("alert.delivered" if outcome == "ok" else "alert.failed", tenant=tenant, percent=percent,
                    attempts=attempts, outcome=outcome)  # fmt: skip

    def directory_changed(self, event: str, *, tenant: str, key: str) -> None:
        """An operator made, changed or ended a tenant, a project or a key (by its public id)."""
        self._event(event, tenant=tenant, key=key)

    # ── jobs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def job_changed(self, event: str, *, job: str, tenant: str, **fields: str | int) -> None:
        """Of a bulk job: it was `created`, or its caller had it `cancelled`."""
        self.jobs.labels(tenant if tenant in self._tenants else "other", event).inc()
        self._event(f"job.{event}", job=job, tenant=tenant, **fields)

    def lines_committed(self, *, model: str, completed: int, failed: int, tokens: int) -> None:
        """So many lines of a job are done, for good."""
        name = model if model in self._models else "other"
        self.job_lines.labels(name, "completed").inc(completed)
        self.job_lines.labels(name, "failed").inc(failed)
        self.job_tokens.labels(name).inc(tokens)

    def task_finished(self, *, job: str, kind: str, number: int, outcome: str, duration_s: float) -> None:
        """A part of a job was worked on, and ended so."""
        self.job_tasks.labels(kind, outcome if outcome in {"done", "refused", "taken over"} else "put off").inc()
        self._event("job.task", job=job, kind=kind, number=number, outcome=outcome, duration_s=round(duration_s, 3))

    def vendor_batch(self, event: str, *, deployment: str, name: str, texts: int, **fields: str | int) -> None:
        """A vendor's own batch was `ordered` or `received`, `failed` there, or could not be asked for (`troubled`)."""
        self.vendor_batches.labels(deployment, event).inc()
        self._event(f"vendor_batch.{event}", deployment=deployment, name=name, texts=texts, **fields)

    # ── states ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def breaker_changed(self, *, deployment: str, state: str, reason: str) -> None:
        """A deployment was left alone, is being probed, or is trusted again."""
        self._event("breaker.changed", deployment=deployment, state=state, reason=reason)

    def canary_sang(
        self, *, model: str, deployment: str, cosine: float | None, tokens: int, error: str
    ) -> None:  # fmt: skip
        """A deployment was probed; `cosine` is to the accepted vectors of its Space, None where there were none."""
        self.billed_tokens.labels(deployment).inc(tokens)
        if cosine is not None:
            self.canary_cosine.labels(model, deployment).set(cosine)
        self._event(
            "canary.sang", model=model, deployment=deployment, tokens=tokens, error=error,
            cosine=None if cosine is None else round(cosine, 6),
        )  # fmt: skip

    def space_changed(self, *, model: str, deployment: str, strange: bool) -> None:
        """A deployment's vectors are no longer those of its Space, or are again."""
        self._event("space.strange" if strange else "space.sound", model=model, deployment=deployment)

    def model_retires(self, *, deployment: str, model: str, shutdown: str, days: int) -> None:
        """The vendor shuts a deployment's model down on the day `shutdown`, in `days` (after it: fewer than 0)."""
        self._event("model.retires", deployment=deployment, model=model, shutdown=shutdown, days=days)

    def loop_crashed(self, *, loop: str, error: BaseException) -> None:
        """A bug in a supervised loop; what it held has failed and the loop goes on."""
        self.loop_crashes.labels(loop).inc()
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        where = f"{at.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{at.tb_lineno}" if at else ""
        self._event("loop.crashed", loop=loop, error=type(error).__name__, where=where)

    def service_changed(self, state: str, **fields: str | int) -> None:
        """The service started, drains or stopped."""
        self._event(f"service.{state}", **fields)

    def _event(self, event: str, **fields: object) -> None:
        self._log.write({"time": round(time.time(), 3), "event": event, **fields})

    def _read_dropped(self) -> Reading:
        return [((), self._log.dropped_lines)]
