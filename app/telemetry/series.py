"""Hides how figures are kept that cost nothing until somebody scrapes them."""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Reading = Iterable[tuple[tuple[str, ...], float]]
"""Label values and the value now, for one gauge."""


class Gauges(Collector):
    """Gauges that are read when somebody scrapes, so that they cost nothing in between."""

    def __init__(self) -> None:
        self._gauges: list[tuple[str, str, tuple[str, ...], Callable[[], Reading]]] = []

    def add(self, name: str, text: str, labels: tuple[str, ...], read: Callable[[], Reading]) -> None:
        """One more, read at each scrape."""
        self._gauges.append((name, text, labels, read))

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges now."""
        for name, text, labels, read in self._gauges:
            family = GaugeMetricFamily(name, text, labels=labels)
            for values, value in read():
                family.add_metric(list(values), value)
            yield family


class RequestSeries:
    """What one (model, tenant) was answered: plain numbers, since every request counts here."""

    __slots__ = ("buckets", "hits", "joined", "misses", "seconds", "tokens")

    def __init__(self) -> None:
        self.buckets = [0] * (len(SECONDS) + 1)
        self.seconds = 0.0
        self.tokens = self.hits = self.joined = self.misses = 0


class Requests(Collector):
    """Counts requests in plain numbers, and makes metrics of them when somebody scrapes."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str, int, str | None], int] = {}
        self._series: dict[tuple[str, str], RequestSeries] = {}

    def series(self, model: str, tenant: str) -> RequestSeries:
        """Where the answers to one tenant by one model are counted."""
        series = self._series.get((model, tenant))
        if series is None:
            series = self._series[model, tenant] = RequestSeries()
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
            bounds = [*map(str, SECONDS), "+Inf"]
            seconds.add_metric(labels, list(zip(bounds, accumulate(series.buckets), strict=True)), series.seconds)
            for outcome, count in (("hit", series.hits), ("miss", series.misses), ("joined", series.joined)):
                texts.add_metric([*labels, outcome], count)
        yield from (tokens, seconds, texts)
