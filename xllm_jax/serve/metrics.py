"""What a monitor reads at `/metrics`: requests by route and status, times, and the engine's counts.

Labels are names of ours alone: what a client sends can make no new series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

PREFIX = "xllm_"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
TOTAL = "_total"


class Metrics:
    """The numbers of one server.

    Args:
      engine: what the engine counts, by name, asked anew each time.

    Attributes:
      under_way: requests for the model that are being answered.
    """

    def __init__(self, engine: Callable[[], Mapping[str, float]] = dict):
        self.registry = CollectorRegistry()
        self._engine = engine
        self._answered = Counter(
            f"{PREFIX}http_requests",
            "By route and status.",
            ("route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            f"{PREFIX}http_request_seconds",
            "From the head of a request to the end of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._first = Histogram(
            f"{PREFIX}first_token_seconds",
            "From the head of a chat request to the first piece of its answer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._media = Counter(
            f"{PREFIX}media", "Files by modality.", ("modality",), registry=self.registry
        )
        self._sockets = Gauge(
            f"{PREFIX}realtime_sessions", "Open transcriptions.", registry=self.registry
        )
        self.under_way = 0
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers, for the registry."""
        name = "http_requests_under_way"
        yield GaugeMetricFamily(PREFIX + name, "That ask the model.", value=self.under_way)
        for name, value in self._engine().items():
            if name.endswith(TOTAL):
                yield CounterMetricFamily(PREFIX + name.removesuffix(TOTAL), name, value=value)
            else:
                yield GaugeMetricFamily(PREFIX + name, name, value=value)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Counts a request that has ended."""
        self._answered.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first(self, seconds: float) -> None:
        """Notes the time to the first piece of an answer."""
        self._first.observe(seconds)

    def medium(self, modality: str) -> None:
        """Counts a file that was taken."""
        self._media.labels(modality).inc()

    def session(self, more: int) -> None:
        """Counts a realtime session that opens (1) or closes (-1)."""
        self._sockets.inc(more)

    def text(self) -> bytes:
        """All of it in Prometheus's format."""
        return generate_latest(self.registry)
