"""Metrics of the scheduler's state, and of the batches that it has chosen."""

from service.telemetry.instruments import Instruments

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class BatchMetrics:
    """Records the batches that ran."""

    def __init__(self, instruments: Instruments) -> None:
        """Declare the metrics."""
        self._sizes = instruments.histogram(
            "supervit_batch_size_images", "Images in a batch that ran.", buckets=BATCH_BUCKETS
        )
        self._durations = instruments.durations(
            "supervit_batch_duration_seconds", "Time that a batch spent in the engine."
        )
        self._taken = instruments.counter(
            "supervit_engine_taken_seconds",
            "Time that batches occupied the engine, including the pauses that max_utilization requires.",
        )
        self._predicted = instruments.counter(
            "supervit_predicted_inference_seconds",
            "Predicted time in the engine of the batches that ran, summed.",
        )

    def ran(self, size: int, predicted_s: float, inference_s: float, taken_s: float) -> None:
        """Record a batch; `taken_s` is its time in the engine with the pause that the utilization ceiling adds."""
        self._taken.inc(taken_s)
        self._sizes.observe(size)
        self._durations.observe(inference_s)
        self._predicted.inc(predicted_s)


class SchedulerMetrics:
    """Gauges of the scheduler's state."""

    def __init__(self, instruments: Instruments) -> None:
        """Declare the metrics."""
        self._queued = instruments.gauge("supervit_queued_requests", "Requests that wait for the engine.", "livesum")
        self._slowdown = instruments.gauge(
            "supervit_slowdown_ratio", "Latency of batches relative to the profile.", "liveall"
        )
        self._safety_factor = instruments.gauge(
            "supervit_safety_factor_ratio",
            "Factor on the latencies of all sub-networks but the cheapest, raised by recently missed deadlines.",
            "liveall",
        )

    def observed(self, queued: int, slowdown: float, safety_factor: float) -> None:
        """Record the state."""
        self._queued.set(queued)
        self._slowdown.set(slowdown)
        self._safety_factor.set(safety_factor)
