"""Every Prometheus metric of the server, declared once on an injected registry."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from models.subnetwork import SubNetwork
from service.domain import Classification

STAGE_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
CONTENT_TYPE = CONTENT_TYPE_LATEST


def process_registry() -> CollectorRegistry:
    """Make a registry that already tells of the process: memory, CPU time, garbage collection, Python's version."""
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


class Metrics:
    """What the server counts and times."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._requests = Counter(
            "supervit_requests",
            "Classification requests by outcome: ok or an error code; client_gone where nobody waited for the answer.",
            ["outcome"],
            registry=registry,
        )
        self._duration = Histogram(
            "supervit_request_duration_seconds",
            "Time from arrival to the finished answer.",
            buckets=STAGE_BUCKETS_S,
            registry=registry,
        )
        self._stages = Histogram(
            "supervit_stage_duration_seconds",
            "Time that an answered request spent in a stage.",
            ["stage"],
            buckets=STAGE_BUCKETS_S,
            registry=registry,
        )
        self._subnetworks = Counter(
            "supervit_subnetwork_requests",
            "Answered requests by the sub-network that ran.",
            ["patch_grid", "keep_rate"],
            registry=registry,
        )
        self._gflops = Counter(
            "supervit_spent_gflops",
            "Compute spent on answered requests, in 1e9 multiply-accumulates.",
            registry=registry,
        )
        self._batch_sizes = Histogram(
            "supervit_batch_size_images",
            "Images in a batch that ran.",
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self._in_flight = Gauge(
            "supervit_requests_in_flight", "Classification requests being worked on.", registry=registry
        )
        self._ready = Gauge("supervit_ready", "1 once the model has answered its first batch.", registry=registry)
        self._model = Gauge(
            "supervit_model_info", "The served checkpoint; always 1.", ["name", "version"], registry=registry
        )

    def describe(self, subnetworks: list[SubNetwork], name: str, version: str) -> None:
        """Name the model and start every sub-network's count at zero, so that rates exist from the start."""
        self._model.labels(name, version).set(1)
        self._requests.labels("ok")
        for subnetwork in subnetworks:
            self._subnetworks.labels(subnetwork.patch_grid, f"{subnetwork.keep_rate:g}")

    def request_started(self) -> None:
        """Count a request in."""
        self._in_flight.inc()

    def request_finished(self, outcome: str) -> None:
        """Count a request out; `outcome` is "ok" or an error code."""
        self._in_flight.dec()
        self._requests.labels(outcome).inc()

    def request_refused(self, outcome: str) -> None:
        """Count a request that was refused before it was counted in."""
        self._requests.labels(outcome).inc()

    def answered(self, answer: Classification) -> None:
        """Record what an answer cost."""
        timing, profile = answer.timing, answer.decision.profile
        self._duration.observe(timing.total_s)
        stages = {"decode": timing.decode_s, "queue": timing.queue_s, "inference": timing.inference_s}
        for stage, seconds in stages.items():
            self._stages.labels(stage).observe(seconds)
        subnetwork = profile.subnetwork
        self._subnetworks.labels(subnetwork.patch_grid, f"{subnetwork.keep_rate:g}").inc()
        self._gflops.inc(profile.gflops)

    def batch_ran(self, num_images: int) -> None:
        """Record the size of a batch."""
        self._batch_sizes.observe(num_images)

    def ready(self) -> None:
        """Record that the model has answered its first batch."""
        self._ready.set(1)

    def page(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self._registry)
