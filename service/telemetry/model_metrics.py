"""Metrics of the served model: its changes, and the latency profile and accuracy that the policy uses."""

from datetime import datetime
from typing import get_args

from service.model_change import ChangeOutcome
from service.telemetry.instruments import Instruments


class ModelMetrics:
    """Records the served model, and counts its changes."""

    def __init__(self, instruments: Instruments) -> None:
        """Declare the metrics, and start every count at zero."""
        self._info = instruments.gauge(
            "supervit_model_info",
            "1 for the served checkpoint, 0 for previous ones.",
            "livemax",
            ["name", "version"],
        )
        self._changes = instruments.counter(
            "supervit_model_changes", "Requested changes of the model, by outcome.", ["outcome"]
        )
        self._served: tuple[str, str] | None = None
        for outcome in get_args(ChangeOutcome):
            self._changes.labels(outcome)

    def serves(self, name: str, version: str) -> None:
        """Record the model that is served from now on."""
        if self._served is not None:
            self._info.labels(*self._served).set(0)  # labels cannot be removed with several workers
        self._served = name, version
        self._info.labels(name, version).set(1)

    def change_ended(self, outcome: ChangeOutcome) -> None:
        """Count a model change by its outcome."""
        self._changes.labels(outcome).inc()


class ProfileMetrics:
    """Gauges of the profile in use."""

    def __init__(self, instruments: Instruments) -> None:
        """Declare the metrics."""
        self._measured_at = instruments.gauge(
            "supervit_profile_timestamp_seconds",
            "When the latencies that the policy uses were measured on this machine, in Unix time.",
            "livemostrecent",
            ["model"],
        )
        self._measured_share = instruments.gauge(
            "supervit_profile_measured_ratio",
            "Measured share of the latencies of the profile, 0..1; the rest is estimated until the engine is idle.",
            "livemin",
            ["model"],
        )
        self._best_accuracy = instruments.gauge(
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
