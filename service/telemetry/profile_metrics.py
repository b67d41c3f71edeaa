"""Metrics of the latency profile that the policy uses, and the accuracy of the most accurate sub-network."""

from collections.abc import Callable
from datetime import datetime

from prometheus_client import Gauge


class ProfileMetrics:
    """Gauges of the profile in use."""

    def __init__(self, gauge: Callable[..., Gauge]) -> None:
        """Declare the metrics; `gauge` takes name, text, how the values of workers are merged, and labels."""
        self._measured_at = gauge(
            "supervit_profile_timestamp_seconds",
            "When the latencies that the policy uses were measured on this machine, in Unix time.",
            "livemostrecent",
            ["model"],
        )
        self._measured_share = gauge(
            "supervit_profile_measured_ratio",
            "Measured share of the latencies of the profile, 0..1; the rest is estimated until the engine is idle.",
            "livemin",
            ["model"],
        )
        self._best_accuracy = gauge(
            "supervit_best_accuracy_ratio",
            "Top-1 accuracy of the most accurate sub-network, 0..1.",
            "livemostrecent",
            ["model"],
        )

    def began(self, model: str, measured_at: datetime, best_accuracy: float | None) -> None:
        """Record when the latencies in use were measured, and the accuracy of the most accurate sub-network."""
        self._measured_at.labels(model).set(measured_at.timestamp())
        if best_accuracy is not None:
            self._best_accuracy.labels(model).set(best_accuracy)

    def measured(self, model: str, share: float) -> None:
        """Record the share of the latencies that is measured by now."""
        self._measured_share.labels(model).set(share)
