from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service.telemetry.inference_statistics import Duration, StatisticsMetrics, read_statistics
from service.telemetry.instruments import Instruments
from service.telemetry.metrics import Metrics


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_batches_are_counted_and_timed_by_their_size(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry)
    for size, inference_s in ((1, 0.25), (4, 0.5), (4, 0.75)):
        metrics.batch_ran(size, predicted_s=0.1, inference_s=inference_s, taken_s=1.0)
    assert read_statistics(registry).by_batch_size == {1: Duration(1, 0.25), 4: Duration(2, 1.25)}


def test_failed_requests_of_every_outcome_are_counted_and_timed(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry)
    for outcome, took_s in (("ok", 8.0), ("overloaded", 0.5), ("invalid_image", 0.25)):
        metrics.request_started()
        metrics.request_finished(outcome, took_s=took_s)
    assert read_statistics(registry).fail == Duration(2, 0.75)


def test_the_time_of_the_last_answer_is_in_milliseconds_of_unix_time(registry: CollectorRegistry) -> None:
    assert read_statistics(registry).last_inference_ms == 0
    StatisticsMetrics(Instruments(registry), lambda: 1234.5678).answered()
    assert read_statistics(registry).last_inference_ms == 1234568


def test_statistics_can_be_read_before_the_first_answer(registry: CollectorRegistry, tmp_path: Path) -> None:
    Metrics(registry, str(tmp_path))
    assert read_statistics(registry).success == Duration(0, 0.0)
