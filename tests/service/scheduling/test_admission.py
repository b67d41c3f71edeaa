"""Level 0 of the catalog takes 2, 3, 4 and 5 s for batches of 1, 2, 3 and 4 (see conftest)."""

import pytest

from service.scheduling.admission import Admission
from service.scheduling.catalog import VariantCatalog
from service.scheduling.estimators import TrafficEstimator
from service.scheduling.latency_model import LatencyModel
from service.scheduling.queue import RequestQueue
from service.scheduling.state import NO_DELAY, QueuedRequest
from tests.service.granting import constraints_for

LENGTH = 500


class CountedInstant(float):
    """A deadline that counts how often it is compared."""

    compared = 0

    def __lt__(self, other: float) -> bool:
        type(self).compared += 1
        return super().__lt__(other)


def rejected_by_s(catalog: VariantCatalog, deadlines: list[float], free_at: float, max_batch_size: int = 4) -> float:
    """Return the seconds after which a request that is due last should be retried; 0 where it is admitted."""
    queue = RequestQueue()
    for deadline_at in deadlines:
        queue.admit(QueuedRequest(deadline_at, constraints_for(9.0, 2)))
    admission = Admission(queue, LatencyModel(catalog), TrafficEstimator())
    CountedInstant.compared = 0
    last = QueuedRequest(deadlines[-1], constraints_for(9.0, 2))
    error = admission.rejection(last, 0.0, NO_DELAY, free_at, max_batch_size)
    return 0.0 if error is None else float(error.details["retry_after_s"])


def test_late_requests_are_skipped_with_few_comparisons(catalog: VariantCatalog) -> None:
    """Under overload, thousands of requests arrive, and each is checked against a long queue."""
    deadlines: list[float] = [CountedInstant(10 + place / LENGTH) for place in range(LENGTH)]
    # All of them are due before the engine is free, so a new one runs alone.
    assert rejected_by_s(catalog, deadlines, free_at=30.0) == pytest.approx(30 + 2 - deadlines[-1], abs=0.1)
    assert CountedInstant.compared < 50


def test_full_batches_run_before_a_request_and_it_joins_the_last_batch_if_there_is_time(
    catalog: VariantCatalog,
) -> None:
    """The first four take 5 s; a request joins the other two, 4 s more, or else runs after them, 3 s and 2 s more."""
    assert rejected_by_s(catalog, [6.0] * 4 + [9.0] * 2, free_at=0.0) == 0.0
    assert rejected_by_s(catalog, [6.0] * 4 + [8.9] * 2, free_at=0.0) == pytest.approx(10.0 - 8.9)
    assert rejected_by_s(catalog, [6.5] * 4, free_at=0.0) == 0.5, "it joins no full batch"


def test_requests_that_will_be_late_do_not_delay_a_new_one(catalog: VariantCatalog) -> None:
    # Once the first four have ended, at 5 s, the next three are late, so the request runs alone.
    assert rejected_by_s(catalog, [5.0] * 4 + [6.0] * 3, free_at=0.0) == 1.0
