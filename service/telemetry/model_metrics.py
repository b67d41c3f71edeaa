"""Metrics of the served model, and of the outcomes of model changes."""

from collections.abc import Callable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from service.model_change import ChangeOutcome


class ModelMetrics:
    """Records the served model, and counts its changes."""

    def __init__(self, registry: CollectorRegistry, gauge: Callable[..., Gauge]) -> None:
        """Declare the metrics; `gauge` takes name, text, how the values of workers are merged, and labels."""
        self._info = gauge(
            "supervit_model_info",
            "1 for the served checkpoint, 0 for previous ones.",
            "livemax",
            ["name", "version"],
        )
        self._changes = Counter(
            "supervit_model_changes",
            "Requested changes of the model, by outcome.",
            ["outcome"],
            registry=registry,
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
