"""Batches of 1 to 4 take 2 3 4 5 s at level 0, 4 6 8 10 s at level 1 and 8 12 16 20 s at level 2 (see conftest)."""

import math
import random
from dataclasses import replace
from typing import SupportsIndex

import pytest

from service.scheduling.catalog import VariantCatalog
from service.scheduling.feasibility import meets_deadlines_mixed
from service.scheduling.level_policy import choose_level
from service.scheduling.plan import MAX_EXPECTED, MAX_PLANNED, Plan
from service.scheduling.state import QueuedRequest, RequestConstraints
from service.scheduling.variants import Grant
from tests.service.granting import constraints_for, stand_in
from tests.service.scheduling.test_level_policy import at_zero


def test_forecast_arrivals_are_evenly_spaced_and_have_the_budgets_of_the_last_requests(catalog: VariantCatalog) -> None:
    """At 16/s, the forecast for 0.25 s is 4 arrivals, and 6 with one standard deviation: one every 1/24 s."""
    recent = (constraints_for(1.0, 2), constraints_for(3.0, 2))
    plan = Plan(replace(at_zero(catalog, ()), arrival_rate=16.0, recent=recent), (), math.inf)
    assert plan.expected == [*recent[::-1], *recent[::-1], *recent[::-1]]
    assert plan.deadlines == pytest.approx([1 + 2 / 24, 1 + 4 / 24, 1 + 6 / 24, 3 + 1 / 24, 3 + 3 / 24, 3 + 5 / 24])


def test_the_number_of_forecast_arrivals_is_capped(catalog: VariantCatalog) -> None:
    state = replace(at_zero(catalog, ()), arrival_rate=1e6, recent=(constraints_for(1.0, 2),))
    assert len(Plan(state, (), math.inf).expected) == MAX_EXPECTED


@pytest.mark.parametrize("length", [1, 5, 20, MAX_PLANNED, MAX_PLANNED + 40])
@pytest.mark.parametrize("guard_s", [math.inf, 9.0, 1.0])
def test_requests_with_a_common_variant_are_planned_as_if_planned_one_by_one(
    catalog: VariantCatalog, length: int, guard_s: float
) -> None:
    rng, constraints, answers = random.Random(length), constraints_for(1.0, 0, over_limit=stand_in(3)), set[bool]()
    for _ in range(40):
        longest_s = rng.choice((4.0, 8.0)) * length
        deadlines = sorted(rng.uniform(6.0, 8.0 + longest_s) for _ in range(length))
        queue = [QueuedRequest(deadline_at, constraints) for deadline_at in deadlines]
        state = replace(at_zero(catalog, queue), slowdown=1.25, tail_factor=1.1, safety_factor=rng.choice((1.0, 1.3)))
        cautious = state.slowed(state.safety_factor)
        plan = Plan(state, queue, guard_s)
        answers.add(plan.meets_deadlines(2))
        assert plan.meets_deadlines(2) is meets_deadlines_mixed(
            cautious, deadlines, [3] * min(length, MAX_PLANNED), guard_s
        )
        late = meets_deadlines_mixed(cautious, deadlines, [3] * min(length, MAX_PLANNED), guard_s, after_s=3.0)
        assert plan.meets_deadlines(2, after_s=3.0) is late
    assert answers == {False, True}, "both answers must occur"


def test_a_level_has_no_common_target_where_grants_differ(catalog: VariantCatalog) -> None:
    queue = [QueuedRequest(9.0, constraints_for(9.0, limit)) for limit in (2, 1)]
    plan = Plan(at_zero(catalog, queue), queue, math.inf)
    assert [plan.common_target(level) for level in range(3)] == [0, 1, None]


class CountedIndices(tuple[int, ...]):
    """Indices by level that count how often one is looked up."""

    looked_up = 0

    def __getitem__(self, level: SupportsIndex | slice) -> int:  # type: ignore[override] # nothing slices it
        type(self).looked_up += 1
        return super().__getitem__(level)  # type: ignore[return-value] # as above


def test_lookups_of_a_shared_grant_do_not_grow_with_the_queue(catalog: VariantCatalog) -> None:
    """Otherwise a decision would take three times as long where most requests share a grant, as is usual."""
    counts = []
    for length in (10, 100):
        CountedIndices.looked_up = 0
        grant = Grant(CountedIndices((0, 3, 3)), 0, stand_in(3))
        queue = [QueuedRequest(1e4 + place, RequestConstraints(1e4, grant)) for place in range(length)]
        decision = choose_level(at_zero(catalog, queue))
        assert (decision.variant, len(decision.batch)) == (catalog.variants[3], 4)
        counts.append(CountedIndices.looked_up)
    assert counts[0] == counts[1] < 20
