from typing import get_args

import pytest
from prometheus_client import CollectorRegistry

from service.model_change import ChangeOutcome
from service.telemetry.instruments import Instruments
from service.telemetry.model_metrics import ModelMetrics


class Page:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = ModelMetrics(Instruments(self.registry))

    def read(self, metric: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"supervit_model_{metric}", labels)


@pytest.fixture
def page() -> Page:
    return Page()


def test_the_info_metric_is_one_for_the_served_model_and_zero_for_earlier_ones(page: Page) -> None:
    page.metrics.serves("tiny", "1")
    page.metrics.serves("tiny", "2")
    assert page.read("info", name="tiny", version="1") == 0
    assert page.read("info", name="tiny", version="2") == 1
    page.metrics.serves("tiny", "1")
    assert page.read("info", name="tiny", version="1") == 1
    assert page.read("info", name="tiny", version="2") == 0


def test_model_changes_of_every_outcome_are_counted_from_zero(page: Page) -> None:
    assert [page.read("changes_total", outcome=outcome) for outcome in get_args(ChangeOutcome)] == [0] * 6
    page.metrics.change_ended("refused")
    assert page.read("changes_total", outcome="refused") == 1
