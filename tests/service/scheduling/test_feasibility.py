"""Latencies in seconds for batches of 1, 2, 3 and 4 (see conftest): 2 3 4 5 at level 0, 4 6 8 10 at level 1."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from service.scheduling.catalog import VariantCatalog
from service.scheduling.feasibility import meets_deadlines, meets_deadlines_mixed, take_group
from service.scheduling.state import SchedulerState
from tests.service.scheduling.test_level_policy import at_zero


@pytest.fixture
def state(catalog: VariantCatalog) -> SchedulerState:
    return at_zero(catalog, ())


@pytest.mark.parametrize(("due", "is_in_time"), [(20.0, True), (19.9, False)])
def test_two_full_batches_run_one_after_the_other(state: SchedulerState, due: float, is_in_time: bool) -> None:
    assert meets_deadlines(state, [due] * 8, 1, 4) is is_in_time
    assert meets_deadlines_mixed(state, [due] * 8, [1] * 8, math.inf) is is_in_time


# The second batch needs room for 2.5 s more of the first, and for a quarter more of its own time.
@pytest.mark.parametrize(("due", "is_in_time"), [(25.1, True), (24.9, False)])
def test_the_plan_leaves_a_margin_for_varying_latencies(state: SchedulerState, due: float, is_in_time: bool) -> None:
    varying = replace(state, slowdown=1.25, tail_factor=1.25)
    assert meets_deadlines(varying, [due] * 8, 1, 4) is is_in_time
    assert meets_deadlines_mixed(varying, [due] * 8, [1] * 8, math.inf) is is_in_time


@pytest.mark.parametrize(("due", "is_in_time"), [(18.8, True), (18.7, False)])
def test_the_plan_leaves_a_margin_for_varying_latencies_where_limits_differ(
    state: SchedulerState, due: float, is_in_time: bool
) -> None:
    varying = replace(state, slowdown=1.25, tail_factor=1.25)
    assert meets_deadlines_mixed(varying, [due] * 8, [1] * 4 + [0] * 4, math.inf) is is_in_time


def test_deviations_of_consecutive_batches_add_up_as_the_root_of_the_sum_of_squares(state: SchedulerState) -> None:
    """Three batches of 10 s, each with a deviation of 2.5 s: the last needs 20 + 3.54 s before it, and 12.5 s."""
    varying = replace(state, slowdown=1.25, tail_factor=1.25)
    assert meets_deadlines(varying, [36.1] * 12, 1, 4)
    assert not meets_deadlines(varying, [36.0] * 12, 1, 4)
    assert meets_deadlines_mixed(varying, [36.1] * 12, [1] * 12, math.inf)
    assert not meets_deadlines_mixed(varying, [36.0] * 12, [1] * 12, math.inf)


def test_the_overhead_of_a_batch_delays_the_next_one(state: SchedulerState) -> None:
    busy = replace(state, overhead_factor=1.5)
    assert meets_deadlines(busy, [25.0] * 8, 1, 4)
    assert not meets_deadlines(busy, [24.9] * 8, 1, 4)
    assert meets_deadlines_mixed(busy, [25.0] * 8, [1] * 8, math.inf)
    assert not meets_deadlines_mixed(busy, [24.9] * 8, [1] * 8, math.inf)


def test_the_guard_time_limits_groups_but_never_below_one_request(state: SchedulerState) -> None:
    # Groups of at most 6 s hold two requests: four groups take 24 s. Below 4 s, a group still holds one: 32 s.
    assert meets_deadlines_mixed(state, [24.0] * 8, [1] * 8, 6.0)
    assert not meets_deadlines_mixed(state, [23.9] * 8, [1] * 8, 6.0)
    assert meets_deadlines_mixed(state, [32.0] * 8, [1] * 8, 1.0)
    assert not meets_deadlines_mixed(state, [31.9] * 8, [1] * 8, 1.0)


def test_requests_beyond_the_targets_are_assumed_to_run_at_the_pace_of_those_before_them(state: SchedulerState) -> None:
    # Four requests at level 1 take 10 s, so the next four are assumed to start at 10 s and the last one at 20 s.
    deadlines: Sequence[float] = [10.0] * 4 + [20.0] * 4 + [30.0]
    assert meets_deadlines_mixed(state, deadlines, [1] * 4, math.inf)
    assert not meets_deadlines_mixed(state, [10.0] * 4 + [9.9] * 4 + [30.0], [1] * 4, math.inf)


def test_requests_beyond_the_planned_are_assumed_to_run_at_the_pace_of_those_before_them(state: SchedulerState) -> None:
    # Planned one by one, the ninth request runs after the others, until 24 s. Four take 10 s, so if only four are
    # planned, it is assumed to start at 20 s.
    deadlines: Sequence[float] = [10.0] * 4 + [20.0] * 5
    assert not meets_deadlines(state, deadlines, 1, 4)
    assert meets_deadlines(state, deadlines, 1, 4, planned=4)
    assert not meets_deadlines(state, [10.0] * 4 + [19.9] * 5, 1, 4, planned=4)


@pytest.mark.parametrize(("after_s", "is_in_time"), [(1.0, True), (1.1, False)])
def test_batches_end_later_where_the_engine_is_free_later(
    state: SchedulerState, after_s: float, is_in_time: bool
) -> None:
    assert meets_deadlines(state, [21.0] * 8, 1, 4, after_s=after_s) is is_in_time
    assert meets_deadlines_mixed(state, [21.0] * 8, [1] * 8, math.inf, after_s=after_s) is is_in_time
    # The wait until the engine is free does not count towards the pace.
    assert meets_deadlines(state, [11.0] * 4 + [21.0] * 5, 1, 4, planned=4, after_s=after_s) is is_in_time


def test_a_group_pays_for_one_batch_per_variant(state: SchedulerState) -> None:
    assert take_group(state.latencies_s, [0, 1, 0, 1], 9.0) == ([2, 2, 0, 0], 9.0)
    assert take_group(state.latencies_s, [0, 1, 0, 1], 8.9) == ([2, 1, 0, 0], 7.0)
    assert take_group(state.latencies_s, [1, 0], 3.9) == ([0, 0, 0, 0], 0.0)


def test_a_request_alone_fits_its_guard_whatever_the_slowdown_rounds_to(state: SchedulerState) -> None:
    choice = random.Random(0)
    for _ in range(2000):
        slowed = replace(state, slowdown=choice.uniform(0.5, 3.0))
        assert meets_deadlines_mixed(slowed, [1000.0], [1], choice.uniform(0.0, 0.1))
