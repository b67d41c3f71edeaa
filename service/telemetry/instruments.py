"""Makes the counters, gauges and histograms that a group of metrics records with, all on one registry."""

from collections.abc import Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

OfWorkers = Literal["liveall", "livemax", "livemin", "livemostrecent", "livesum"]
DURATION_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 5, 10, 30)


class Instruments:
    """Declares metrics on a registry, whose page lists them in this order."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """Declare a counter; the page adds `_total` to its name."""
        return Counter(name, text, labels, registry=self._registry)

    def gauge(self, name: str, text: str, of_workers: OfWorkers, labels: Sequence[str] = ()) -> Gauge:
        """Declare a gauge; `of_workers` says how prometheus_client merges the values of several workers."""
        return Gauge(name, text, labels, registry=self._registry, multiprocess_mode=of_workers)

    def histogram(self, name: str, text: str, labels: Sequence[str] = (), *, buckets: Sequence[float]) -> Histogram:
        """Declare a histogram; `buckets` are the upper bounds, ascending, to which one without a bound is added."""
        return Histogram(name, text, labels, registry=self._registry, buckets=buckets)

    def durations(self, name: str, text: str, labels: Sequence[str] = ()) -> Histogram:
        """Declare a histogram of seconds."""
        return self.histogram(name, text, labels, buckets=DURATION_BUCKETS_S)
