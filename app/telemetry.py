"""What can be seen from outside: one method per event, which knows its log line and its metrics.

The floors above say *what happened* and nothing else. Labels come from the configuration only, so the number of series
does not grow with callers; no line and no label ever holds a text, a vector, a key or a user id.
"""

import asyncio
import random
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from queue import SimpleQueue
from typing import Any, BinaryIO

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from app.domain import Priority

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITEMS = tuple(2**n for n in range(12))
_TOKENS = (8, 32, 128, 512, 2048, 8192, 32_768, 131_072, 300_000)
_RATIOS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_SLOW_S = 5.0
"""A successful request slower than this is logged whatever the sample."""

Reading = Iterable[tuple[tuple[str, ...], float]]
"""Label values and the value now, for one gauge."""


class LogWriter:
    """JSON lines to a stream that may be slow: collected for 0.1 s, written by a thread, dropped, never waited for."""

    _MOST_CHUNKS = 1000

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lines: list[str] = []
        self._chunks: SimpleQueue[bytes | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._scheduled = False
        self.dropped_lines = 0

    def write(self, fields: dict[str, Any]) -> None:
        """Takes one event; returns at once."""
        self.write_line(orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE).decode())

    def write_line(self, line: str) -> None:
        """Takes one event, already written as a line of JSON."""
        self._lines.append(line)
        if self._scheduled:
            return
        try:
            asyncio.get_running_loop().call_later(0.1, self._flush)
            self._scheduled = True
        except RuntimeError:
            self._flush()

    def close(self) -> None:
        """Writes what is left and stops the thread."""
        self._flush()
        if self._thread is not None:
            self._chunks.put(None)
            self._thread.join(timeout=5)
            self._thread = None

    def _flush(self) -> None:
        self._scheduled = False
        lines, self._lines = self._lines, []
        if not lines:
            return
        if self._chunks.qsize() >= self._MOST_CHUNKS:
            self.dropped_lines += len(lines)
            return
        self._chunks.put("".join(lines).encode())
        if self._thread is None:
            self._thread = threading.Thread(target=self._drain, name="log-writer", daemon=True)
            self._thread.start()

    def _drain(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            try:
                self._stream.write(chunk)
                self._stream.flush()
            except (OSError, ValueError):
                self.dropped_lines += chunk.count(b"\n")


@lru_cache(maxsize=1024)
def _quoted(name: str | None) -> str:
    """A name of the configuration, or None, in JSON."""
    return orjson.dumps(name).decode()


class _Gauges(Collector):
    """Gauges that are read when somebody scrapes, so that they cost nothing in between."""

    def __init__(self) -> None:
        self._gauges: list[tuple[str, str, tuple[str, ...], Callable[[], Reading]]] = []

    def add(self, name: str, text: str, labels: tuple[str, ...], read: Callable[[], Reading]) -> None:
        self._gauges.append((name, text, labels, read))

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, text, labels, read in self._gauges:
            family = GaugeMetricFamily(name, text, labels=labels)
            for values, value in read():
                family.add_metric(list(values), value)
            yield family


class _RequestSeries:
    """What one (model, tenant) was answered: plain numbers, since every request counts here."""

    __slots__ = ("buckets", "hits", "joined", "misses", "seconds", "tokens")

    def __init__(self) -> None:
        self.buckets = [0] * (len(_SECONDS) + 1)
        self.seconds = 0.0
        self.tokens = self.hits = self.joined = self.misses = 0


class _Requests(Collector):
    """Counts requests in plain numbers, and makes metrics of them when somebody scrapes."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str, int, str | None], int] = {}
        self._series: dict[tuple[str, str], _RequestSeries] = {}

    def series(self, model: str, tenant: str) -> _RequestSeries:
        """Where the answers to one tenant by one model are counted."""
        series = self._series.get((model, tenant))
        if series is None:
            series = self._series[model, tenant] = _RequestSeries()
        return series

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        answers = CounterMetricFamily(
            "embedgate_requests", "Answers to callers", labels=("model", "tenant", "status", "code")
        )
        for (model, tenant, status, code), count in self.answers.items():
            answers.add_metric([model, tenant, str(status), code or ""], count)
        yield answers
        tokens = CounterMetricFamily("embedgate_tokens", "Tokens answered", labels=("model", "tenant"))
        seconds = HistogramMetricFamily(
            "embedgate_request_seconds", "From the last byte in to the first byte out", labels=("model", "tenant")
        )
        texts = CounterMetricFamily(
            "embedgate_cache_texts", "Texts by how they were answered: hit, miss, joined one in flight",
            labels=("model", "tenant", "outcome"),
        )  # fmt: skip
        for labels, series in self._series.items():
            tokens.add_metric(labels, series.tokens)
            bounds = [*map(str, _SECONDS), "+Inf"]
            seconds.add_metric(labels, list(zip(bounds, accumulate(series.buckets), strict=True)), series.seconds)
            for outcome, count in (("hit", series.hits), ("miss", series.misses), ("joined", series.joined)):
                texts.add_metric([*labels, outcome], count)
        yield from (tokens, seconds, texts)


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
        self._gauges = _Gauges()
        self.registry.register(self._gauges)
        self.requests = _Requests()
        self.registry.register(self.requests)
        self._make_engine_metrics()
        self.watch("embedgate_log_lines_dropped", "Log lines lost to a slow stream", (), self._read_dropped)

    def _make_engine_metrics(self) -> None:
        def histogram(name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"embedgate_{name}", text, labels, buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"embedgate_{name}", text, labels, registry=self.registry)

        by_deployment = ("deployment",)
        self.queue_seconds = histogram("queue_seconds", "Wait before a call left", ("deployment", "priority"), _SECONDS)
        self.provider_seconds = histogram("provider_seconds", "One call", ("deployment", "outcome"), _SECONDS)
        self.batch_items = histogram("batch_items", "Texts in a call", by_deployment, _ITEMS)
        self.batch_tokens = histogram("batch_tokens", "Tokens in a call", by_deployment, _TOKENS)
        self.batch_fill = histogram("batch_fill_ratio", "Fullest dimension of a call", by_deployment, _RATIOS)
        self.limiter_wait_seconds = histogram("limiter_wait_seconds", "Wait for quota", by_deployment, _SECONDS)
        self.pool_wait_seconds = histogram("pool_wait_seconds", "Wait for a new connection", by_deployment, _SECONDS)
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
            series.buckets[bisect_left(_SECONDS, duration_s)] += 1
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
