"""Triton's inference statistics, read from the metrics, and the metrics that only these statistics need."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry

from service.telemetry.instruments import Instruments
from service.telemetry.samples import samples_by_name, total

OK = "ok"


class StatisticsMetrics:
    """Metrics that only the inference statistics need."""

    def __init__(self, instruments: Instruments, wall_clock: Callable[[], float] = time.time) -> None:
        """Declare the metrics; the clock returns Unix time in seconds."""
        self._wall_clock = wall_clock
        self._batches = instruments.counter("supervit_batches", "Batches that ran, by size.", ["size"])
        self._batch_seconds = instruments.counter(
            "supervit_batch_seconds", "Time that batches spent in the engine, by size.", ["size"]
        )
        self._failed_seconds = instruments.counter(
            "supervit_failed_request_seconds",
            "Duration of the requests without an answer, except those rejected at once, summed.",
        )
        self._answered_at = instruments.gauge(
            "supervit_last_answer_timestamp_seconds",
            "When a request was last answered, in Unix time.",
            "livemax",
        )

    def batch_ran(self, size: int, inference_s: float) -> None:
        """Record a batch and its time in the engine."""
        self._batches.labels(size).inc()
        self._batch_seconds.labels(size).inc(inference_s)

    def answered(self) -> None:
        """Record that a request was answered now."""
        self._answered_at.set(self._wall_clock())

    def failed(self, seconds: float) -> None:
        """Record the duration of a request that got no answer."""
        self._failed_seconds.inc(seconds)


@dataclass(frozen=True, slots=True)
class Duration:
    """A count of events, and their total time."""

    count: int
    seconds: float


@dataclass(frozen=True, slots=True)
class InferenceStatistics:
    """Totals since the start, over all workers.

    Attributes:
        last_inference_ms: Unix time in milliseconds at which a request was last answered; 0 before the first.
        success: answered requests.
        fail: requests without an answer.
        queue: time that answered requests waited for a decoder and for the engine.
        decode: time to decode the images of answered requests.
        inference: time that answered requests spent in the engine; each counts the whole time of its batches.
        by_batch_size: batches that ran, by their number of images.
    """

    last_inference_ms: int
    success: Duration
    fail: Duration
    queue: Duration
    decode: Duration
    inference: Duration
    by_batch_size: dict[int, Duration]


def read_statistics(registry: CollectorRegistry) -> InferenceStatistics:
    """Read the statistics from the metrics."""
    samples = samples_by_name(registry)
    value = partial(total, samples)
    seconds = partial(total, samples, "stage_duration_seconds_sum")
    success = round(value("request_duration_seconds_count"))
    return InferenceStatistics(
        last_inference_ms=round(1000 * value("last_answer_timestamp_seconds")),
        success=Duration(success, value("request_duration_seconds_sum")),
        fail=Duration(
            round(sum(sum(found) for labels, found in samples.get("requests_total", {}).items() if labels != (OK,))),
            value("failed_request_seconds_total"),
        ),
        queue=Duration(success, seconds("queue") + seconds("decode_wait")),
        decode=Duration(success, seconds("decode")),
        inference=Duration(success, seconds("inference")),
        by_batch_size={
            int(size): Duration(round(sum(counts)), value("batch_seconds_total", size))
            for (size,), counts in samples.get("batches_total", {}).items()
        },
    )
