"""Every Prometheus metric of the server, declared once on an injected registry.

The workers of one server share a folder with the values of each; a worker that is asked for its page answers for all.
"""

from functools import cache
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from models.subnetwork import SubNetwork
from service.domain import Classification
from service.errors import (
    DeadlineError,
    ModelError,
    NotReadyError,
    OutOfMemoryError,
    OverloadedError,
    OverloadReason,
    ServiceError,
)
from service.machine.snapshot import ResourceSnapshot
from service.telemetry.answer_metrics import AuditMetrics, LookMetrics
from service.telemetry.client_metrics import ConnectionMetrics, KeyMetrics
from service.telemetry.inference_statistics import OK, StatisticsMetrics
from service.telemetry.instruments import Instruments
from service.telemetry.loop_delay import LoopDelay
from service.telemetry.machine_metrics import MachineMetrics
from service.telemetry.model_metrics import ModelMetrics, ProfileMetrics
from service.telemetry.multiprocess import make_folder, merged_registry
from service.telemetry.scheduling_metrics import BatchMetrics, SchedulerMetrics

STAGES = ("decode_wait", "decode", "queue", "inference")
# Outcomes that count as missed deadlines. Errors of the client do not; nor do requests to a server that is not ready.
MISSES = {OverloadedError.code, DeadlineError.code, OutOfMemoryError.code, ModelError.code, ServiceError.code}
# Reasons of an OverloadedError that lie with the client: its key or its address has used up its share.
LIMITS_OF_CLIENTS = {"key", "address"}
# Reasons for dropped requests, by outcome; an OverloadedError has a reason of its own.
DROP_REASONS = {DeadlineError.code: "expired", NotReadyError.code: "not_ready"}
# Samples for an autoscaler, by name: missed deadlines and lost accuracy, and the compute and time that requests take.
AUTOSCALER_SAMPLES: dict[str, tuple[str, dict[str, str]]] = {
    "met": ("supervit_deadlines_total", {"result": "met"}),
    "missed": ("supervit_deadlines_total", {"result": "missed"}),
    "accuracy_loss": ("supervit_accuracy_loss_total", {}),
    "spent_gflops": ("supervit_spent_gflops_total", {}),
    "saved_gflops": ("supervit_saved_gflops_total", {}),
    "taken_s": ("supervit_engine_taken_seconds_total", {}),
    "decode_s": ("supervit_stage_duration_seconds_sum", {"stage": "decode"}),
}
OPENMETRICS = "application/openmetrics-text"


def process_registry() -> CollectorRegistry:
    """Create a registry with metrics of the process: memory, CPU time, garbage collection, Python's version."""
    # These are a second series beside each counter, which Prometheus itself does not use.
    disable_created_metrics()  # type: ignore[no-untyped-call] # it has no annotations
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


class Metrics:
    """The metrics of the server."""

    def __init__(self, registry: CollectorRegistry, shared_folder: str | None = None) -> None:
        """Declare every metric.

        Args:
            registry: registry for the metrics.
            shared_folder: folder in which the workers of this server keep their values, created if missing; None if
                this process is the only one.

        Raises:
            InvalidParameterError: the folder cannot be created.
        """
        if shared_folder is not None:
            make_folder(shared_folder)
        self._registry, self._shared_folder = registry, shared_folder
        instruments = Instruments(registry)
        self.connections, self.loop_delay = ConnectionMetrics(instruments), LoopDelay(instruments)
        self._looks, self._statistics = LookMetrics(instruments), StatisticsMetrics(instruments)
        self.keys, self.audits = KeyMetrics(instruments), AuditMetrics(instruments)
        self._requests = instruments.counter(
            "supervit_requests",
            "Classification requests by outcome: ok or an error code; client_gone if the client disconnected first.",
            ["outcome"],
        )
        self._dropped = instruments.counter(
            "supervit_dropped_requests", "Requests that were rejected, expired or shed, by reason.", ["reason"]
        )
        self._duration = instruments.durations(
            "supervit_request_duration_seconds", "Time from arrival to the finished answer."
        )
        self._stages = instruments.durations(
            "supervit_stage_duration_seconds", "Time that an answered request spent in a stage.", ["stage"]
        )
        # Bound once: looking up a label takes longer than counting.
        self._decode_wait, self._decode, self._queue, self._inference = map(self._stages.labels, STAGES)
        self._subnetworks = instruments.counter(
            "supervit_subnetwork_requests",
            "Answered requests by the sub-network that ran.",
            ["patch_grid", "keep_rate"],
        )
        self._count_of = cache(
            lambda subnetwork: self._subnetworks.labels(subnetwork.patch_grid, f"{subnetwork.keep_rate:g}")
        )
        self._gflops = instruments.counter(
            "supervit_spent_gflops", "Compute spent on answered requests, in 1e9 multiply-accumulates."
        )
        self._batches = BatchMetrics(instruments)
        self._deadlines = instruments.counter(
            "supervit_deadlines",
            "Requests that were answered in time (met), and those answered late or not at all (missed).",
            ["result"],
        )
        self._met, self._missed = self._deadlines.labels("met"), self._deadlines.labels("missed")
        self._accuracy = instruments.counter(
            "supervit_expected_accuracy", "Expected top-1 accuracy of the answers, 0..1, summed."
        )
        self._accuracy_loss = instruments.counter(
            "supervit_accuracy_loss",
            "Top-1 accuracy, 0..1, that the most accurate variant would have gained, summed over the answers.",
        )
        self._saved = instruments.counter(
            "supervit_saved_gflops",
            "Compute saved compared to the most accurate sub-network, in 1e9 multiply-accumulates.",
        )
        self._in_flight = instruments.gauge(
            "supervit_requests_in_flight", "Classification requests in flight.", "livesum"
        )
        self._scheduler, self._machine = SchedulerMetrics(instruments), MachineMetrics(instruments)
        self.profile = ProfileMetrics(instruments)
        self._ready = instruments.gauge(
            "supervit_ready",
            "Number of engines that are ready for requests; with several workers, of all that share this page.",
            "livesum",
        )
        self._workers = instruments.gauge(
            "supervit_workers", "Number of engines that should share this page.", "livemax"
        )
        self.model = ModelMetrics(instruments)

    def describe(self, subnetworks: list[SubNetwork], name: str, version: str, workers: int = 1) -> None:
        """Record the model and its number of workers; start every count at zero, so that rates exist at once."""
        self.model.serves(name, version)
        self._workers.set(workers)
        for outcome in (OK, *MISSES):
            self._requests.labels(outcome)
        for reason in (*DROP_REASONS.values(), *get_args(OverloadReason)):
            self._dropped.labels(reason)
        for subnetwork in subnetworks:
            self._count_of(subnetwork)

    def request_started(self) -> None:
        """Count a request that starts."""
        self._in_flight.inc()

    def request_finished(
        self, outcome: str, reason: str | None = None, *, is_missed: bool = False, took_s: float = 0.0
    ) -> None:
        """Count a request that has finished.

        Args:
            outcome: "ok" or an error code.
            reason: reason of an OverloadedError.
            is_missed: whether the deadline was missed although the outcome is not in MISSES.
            took_s: time from the start of the request to its end.
        """
        self._in_flight.dec()
        self._requests.labels(outcome).inc()
        if outcome != OK:
            self._statistics.failed(took_s)
        reason = reason or DROP_REASONS.get(outcome)
        if reason is not None:
            self._dropped.labels(reason).inc()
        if is_missed or (outcome in MISSES and reason not in LIMITS_OF_CLIENTS):
            self._missed.inc()

    def answered(self, answer: Classification, exemplar: dict[str, str] | None = None) -> None:
        """Record the durations and costs of an answer; an exemplar links its durations to its trace."""
        timing, profile = answer.timing, answer.decision.profile
        self._duration.observe(timing.total_s, exemplar)
        self._decode_wait.observe(timing.decode_wait_s, exemplar)
        self._decode.observe(timing.decode_s, exemplar)
        self._queue.observe(timing.queue_s, exemplar)
        self._inference.observe(timing.inference_s, exemplar)
        self._count_of(profile.subnetwork).inc()
        self._gflops.inc(answer.gflops)
        self._saved.inc(answer.saved_gflops)
        (self._met if answer.deadline_met else self._missed).inc()
        self._looks.answered(answer)
        self._statistics.answered()
        if answer.expected_top1 is not None and answer.accuracy_loss is not None:
            self._accuracy.inc(answer.expected_top1)
            self.audits.answered(answer)
            self._accuracy_loss.inc(answer.accuracy_loss)

    def batch_ran(self, size: int, predicted_s: float, inference_s: float, taken_s: float) -> None:
        """Record a batch; `taken_s` is its time in the engine with the pause that the utilization ceiling adds."""
        self._batches.ran(size, predicted_s, inference_s, taken_s)
        self._statistics.batch_ran(size, inference_s)

    def machine(self, snapshot: ResourceSnapshot, queued: int, slowdown: float, safety_factor: float) -> None:
        """Record the state of the scheduler and the machine; a gauge without a new value keeps its last."""
        self._scheduler.observed(queued, slowdown, safety_factor)
        self._machine.observed(snapshot)

    def ready(self, is_ready: bool) -> None:
        """Record whether the server is ready for requests."""
        self._ready.set(is_ready)

    def captured(self, num_graphs: int, held_bytes: int) -> None:
        """Record the CUDA graphs that the engine holds, and their memory."""
        self._machine.captured(num_graphs, held_bytes)

    def totals(self) -> dict[str, float]:
        """Return the counters of AUTOSCALER_SAMPLES by name, which an autoscaler needs of this process."""
        return {name: self._registry.get_sample_value(*sample) or 0.0 for name, sample in AUTOSCALER_SAMPLES.items()}

    def page(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics in a format that a client accepts, and its media type; only OpenMetrics has exemplars."""
        if OPENMETRICS in accept:
            page: bytes = openmetrics.generate_latest(self.registry())  # type: ignore[no-untyped-call] # no annotations
            return page, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self.registry()), CONTENT_TYPE_LATEST

    def registry(self) -> CollectorRegistry:
        """Return a registry with all metrics; with a shared folder, the current ones of every worker."""
        return self._registry if self._shared_folder is None else merged_registry(self._shared_folder)
