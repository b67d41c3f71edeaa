import pytest

from service.scheduling.catalog import VariantCatalog
from service.scheduling.state import QueuedRequest, RequestConstraints, SchedulerState, target
from tests.service.granting import constraints_for, stand_in


@pytest.mark.parametrize(
    ("constraints", "expected"),
    [
        (constraints_for(1.0, 2), [0, 1, 2]),
        (constraints_for(1.0, 1), [0, 1, 1]),
        (constraints_for(1.0, 0), [0, 0, 0]),
        (constraints_for(1.0, 1, over_limit=stand_in(5)), [0, 1, 5]),
        (constraints_for(1.0, 0, pinned=stand_in(7)), [7, 7, 7]),
    ],
)
def test_the_target_is_the_level_up_to_the_limit_the_best_grant_above_it_or_the_pinned_variant(
    constraints: RequestConstraints, expected: list[int]
) -> None:
    assert [target(constraints, level) for level in range(3)] == expected


def test_requests_with_equal_constraints_are_distinct() -> None:
    first, second = QueuedRequest(1.0, constraints_for(1.0, 2)), QueuedRequest(1.0, constraints_for(1.0, 2))
    assert first != second
    assert len({first, second}) == 2


def test_the_largest_batch_is_bounded_by_the_room_the_queue_and_the_size_limit(
    catalog: VariantCatalog,
) -> None:
    latencies_s = [variant.latency_by_batch_s for variant in catalog.variants]
    state = SchedulerState(0.0, (), catalog, latencies_s, 2.0, 1.0, 1.0, 3, 0.0, (), 1.0)
    # At twice the profiled latency, level 0 takes 4, 6, 8 and 10 s.
    assert state.latency_s(0, 2) == 6.0
    rooms = (-1.0, 3.9, 4.0, 7.9, 8.0, 100.0, float("inf"))
    assert [state.fitting(0, room_s, queued=9) for room_s in rooms] == [0, 0, 1, 2, 3, 3, 3]
    assert state.fitting(0, 100.0, queued=2) == 2


def test_slowed_multiplies_every_latency(catalog: VariantCatalog) -> None:
    latencies_s = [variant.latency_by_batch_s for variant in catalog.variants]
    state = SchedulerState(0.0, (), catalog, latencies_s, 2.0, 1.0, 1.0, 3, 0.0, (), 1.0)
    assert state.slowed(1.5).latency_s(0, 2) == 9.0
    assert state.slowed(1.0) is state, "making a copy takes time"
