"""Decisions worked out by hand; the catalog in seconds for batches of 1, 2, 3 and 4 (see conftest).

level 0:  2  3  4  5
level 1:  4  6  8 10
level 2:  8 12 16 20
variant 3: 6  9 12 15, on no level
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from models.latency import LatencyTable
from models.profiles import CascadeProfile, ProfileTable
from models.subnetwork import SubNetwork
from service.domain import ReasonCode
from service.scheduling.catalog import VariantCatalog
from service.scheduling.level_policy import choose_level
from service.scheduling.plan import MAX_PLANNED
from service.scheduling.state import BatchDecision, QueuedRequest, RequestConstraints, SchedulerState
from service.scheduling.variants import Variant
from tests.service.conftest import SECONDS
from tests.service.granting import constraints_for, stand_in


def named(index: int | None) -> Variant | None:
    return None if index is None else stand_in(index)


def index(decision: BatchDecision) -> int | None:
    return None if decision.variant is None else decision.variant.index


def waits(
    deadline_at: float,
    highest_level: int = 2,
    *,
    pinned: int | None = None,
    over_limit: int | None = None,
    priority: float = 0,
) -> QueuedRequest:
    constraints = constraints_for(deadline_at, highest_level, named(pinned), named(over_limit))
    return QueuedRequest(deadline_at, constraints, priority)


def at_zero(catalog: VariantCatalog, queue: Sequence[QueuedRequest]) -> SchedulerState:
    """Return a state at time 0: no arrivals forecast, no slowdown, and at most four requests per batch."""
    return SchedulerState(
        now=0.0,
        queue=queue,
        catalog=catalog,
        latencies_s=[variant.latency_by_batch_s for variant in catalog.variants],
        slowdown=1.0,
        tail_factor=1.0,
        overhead_factor=1.0,
        max_batch_size=4,
        arrival_rate=0.0,
        recent=(),
        tight_budget_s=math.inf,
    )


def choose(catalog: VariantCatalog, *queue: QueuedRequest) -> BatchDecision:
    return choose_level(at_zero(catalog, queue))


def test_a_single_request_with_a_long_deadline_gets_the_most_accurate_sub_network(catalog: VariantCatalog) -> None:
    decision = choose(catalog, waits(1000.0))
    assert index(decision) == 2
    assert decision.reason.code is ReasonCode.ALONE


def test_a_deadline_lowers_the_level_of_a_single_request(catalog: VariantCatalog) -> None:
    decision = choose(catalog, waits(5.0))  # level 2 takes 8 s, level 1 takes 4
    assert index(decision) == 1
    assert (decision.reason.code, decision.reason.slack_s) == (ReasonCode.DEADLINE, 5.0)


@pytest.mark.parametrize(("due", "level"), [(4.1, 0), (4.3, 1), (8.3, 1), (8.5, 2)])
def test_the_level_is_lowered_where_the_variant_only_just_fits(catalog: VariantCatalog, due: float, level: int) -> None:
    assert index(choose(catalog, waits(due))) == level  # levels 1 and 2 take 4 and 8 s, plus a margin of 5 %


def test_requests_that_fit_together_at_the_best_level_run_in_one_batch(catalog: VariantCatalog) -> None:
    queue = (waits(13.0), waits(13.0))  # a batch of two takes 12 s
    decision = choose(catalog, *queue)
    assert (index(decision), decision.batch) == (2, queue)
    assert (decision.reason.code, decision.reason.queued) == (ReasonCode.ALL_IN_TIME, 2)


def test_requests_behind_the_head_lower_its_level(catalog: VariantCatalog) -> None:
    # At level 2 the head alone ends at 8 s, the other four at 28 s. At level 1 three end at 8 s and the rest at 14 s.
    queue = (waits(9.0), *(waits(14.0) for _ in range(4)))
    decision = choose(catalog, *queue)
    assert (index(decision), decision.batch, decision.shed) == (1, queue[:3], ())
    assert (decision.reason.code, decision.reason.queued) == (ReasonCode.ALL_IN_TIME, 5)


def test_forecast_arrivals_lower_the_level(catalog: VariantCatalog) -> None:
    # 40/s: ten arrivals in the next quarter of a second and three more for chance, due 50 s later. Fourteen requests,
    # in three batches of four and one of two, take 72 s at level 2 and 36 s at level 1.
    state = replace(at_zero(catalog, (waits(50.0),)), arrival_rate=40.0, recent=(constraints_for(50.0, 2),))
    decision = choose_level(state)
    assert (index(decision), len(decision.batch)) == (1, 1)
    assert (decision.reason.code, decision.reason.slack_s) == (ReasonCode.FORECAST, 50.0)
    assert index(choose_level(replace(state, arrival_rate=1.0))) == 2  # one arrival, allowing for chance: both fit


def test_sustained_overload_lowers_the_level_to_the_cheapest(catalog: VariantCatalog) -> None:
    # Level 0 answers four in 5 s, 0.8/s. The waiting request could have level 2, but the time would be missing later.
    crowd = replace(at_zero(catalog, (waits(50.0),)), arrival_rate=0.85)
    assert index(choose_level(crowd)) == 2
    assert index(choose_level(replace(crowd, sustained_rate=0.75))) == 2
    assert index(choose_level(replace(crowd, sustained_rate=0.85))) == 0
    assert index(choose_level(replace(crowd, arrival_rate=0.0, sustained_rate=0.85))) == 2  # the overload is over


def test_forecast_arrivals_have_the_limits_of_recent_requests(catalog: VariantCatalog) -> None:
    # 40/s again, but the forecast arrivals are limited to level 0: all are in time even with one request at level 2.
    state = replace(at_zero(catalog, (waits(50.0),)), arrival_rate=40.0, recent=(constraints_for(50.0, 0),))
    assert index(choose_level(state)) == 2


def test_a_batch_is_no_longer_than_a_new_request_with_a_tight_budget_can_wait(catalog: VariantCatalog) -> None:
    # One request arrives in 4 s and two in 8 s. Of a budget of 9 s, two at the cheapest level leave 6 s: the longest
    # batch. Level 1 is the best level with batches that short.
    queue = [waits(100.0), waits(100.0)]
    busy = replace(at_zero(catalog, queue), arrival_rate=0.25, tight_budget_s=9.0)
    decision = choose_level(busy)
    assert index(decision) == 1
    assert busy.latency_s(1, len(decision.batch)) <= 6.0
    assert index(choose_level(replace(busy, arrival_rate=0.75))) == 0
    overloaded = choose_level(replace(busy, arrival_rate=0.85))  # above level 0's 0.8/s, batches are not limited
    assert len(overloaded.batch) == 2
    assert busy.latency_s(index(overloaded) or 0, 2) > 6.0
    quiet = choose_level(replace(busy, arrival_rate=0.01))  # no arrival is likely during the batch
    assert (index(quiet), len(quiet.batch)) == (2, 2)


def test_slowdown_tail_overhead_and_batch_size_limit_lower_the_level(catalog: VariantCatalog) -> None:
    queue = [waits(41.0) for _ in range(8)]  # two full batches of level 2 end at 40 s
    state = at_zero(catalog, queue)
    assert index(choose_level(state)) == 2
    assert index(choose_level(replace(state, slowdown=1.5))) == 1
    assert index(choose_level(replace(state, tail_factor=1.5))) == 1  # slow at times only
    assert index(choose_level(replace(state, overhead_factor=1.5))) == 1  # 40 s of batches take 60 s
    small = choose_level(replace(state, max_batch_size=1))  # one by one, all eight take 64, 32 or 16 s
    assert (index(small), len(small.batch)) == (1, 1)


def test_deviations_of_consecutive_batches_do_not_add_up_linearly(catalog: VariantCatalog) -> None:
    # Four batches of four at level 1 take 40 s. Deviations of a quarter, 2.5 s each, add up to 5 s over all four.
    def level(due: float) -> int | None:
        queue = [waits(due) for _ in range(16)]
        return index(choose_level(replace(at_zero(catalog, queue), tail_factor=1.25)))

    assert level(50.5) == 1
    assert level(47.0) == 1  # 30 s, a margin of 4.3 s, and 12.5 s for the last batch
    assert level(46.0) == 0
    mixed = [waits(46.5, highest_level=1) for _ in range(8)] + [waits(47.0) for _ in range(8)]
    assert index(choose_level(replace(at_zero(catalog, mixed), tail_factor=1.25))) == 1


def test_the_safety_factor_costs_accuracy_but_no_requests(catalog: VariantCatalog) -> None:
    state = at_zero(catalog, [waits(41.0) for _ in range(8)])  # two full batches of level 2 end at 40 s
    assert index(choose_level(replace(state, safety_factor=1.5))) == 1
    assert index(choose_level(replace(state, safety_factor=3.0))) == 0
    tight = at_zero(catalog, [waits(10.1) for _ in range(8)])  # even level 0 takes 10 s
    decision = choose_level(replace(tight, safety_factor=3.0))
    assert decision.reason.code is ReasonCode.ALL_IN_TIME  # the safety factor does not apply to the cheapest level
    assert (index(decision), len(decision.batch), decision.shed, decision.expired) == (0, 4, (), ())


def test_the_policy_uses_corrected_latencies_instead_of_profiled_ones(catalog: VariantCatalog) -> None:
    corrected = [variant.latency_by_batch_s for variant in catalog.variants]
    corrected[2] = (4.5, 6.0, 7.0, 8.0)
    assert index(choose_level(replace(at_zero(catalog, (waits(5.0),)), latencies_s=corrected))) == 2


def test_requests_that_can_no_longer_be_answered_in_time_expire_and_the_others_run(catalog: VariantCatalog) -> None:
    expired, in_time = waits(1.9), waits(5.0)
    decision = choose(catalog, expired, in_time)
    assert (decision.expired, decision.batch, decision.shed) == ((expired,), (in_time,), ())
    assert decision.reason.slack_s == 5.0  # of the head, not of the expired request
    assert choose(catalog, expired) == BatchDecision(None, expired=(expired,))


def test_a_request_for_a_slow_sub_network_by_name_expires_sooner(catalog: VariantCatalog) -> None:
    named, other = waits(7.9, pinned=2), waits(7.9)
    decision = choose(catalog, other, named)
    assert (decision.expired, decision.batch) == ((named,), (other,))


def test_the_level_is_lowered_before_a_request_is_shed(catalog: VariantCatalog) -> None:
    queue = [waits(8.0) for _ in range(5)]  # only level 0 answers all: four end at 5 s, the last at 7 s
    decision = choose(catalog, *queue)
    assert (index(decision), decision.batch, decision.shed) == (0, tuple(queue[:4]), ())


def test_a_burst_sheds_as_few_requests_as_possible_the_most_urgent_first(catalog: VariantCatalog) -> None:
    # Three end at 4 s, and two more at 7 s, too late. Without the first, three end at 4 s and the last at 6 s. Without
    # the first two, the other three end at 4 s.
    queue = [waits(due) for due in (4.0, 4.1, 4.2, 4.3, 4.4)]
    decision = choose(catalog, *queue)
    assert (index(decision), decision.shed, decision.batch) == (0, tuple(queue[:2]), tuple(queue[2:]))
    assert (decision.reason.code, decision.reason.queued) == (ReasonCode.BURST_OVERLOAD, 5)


def test_the_lowest_priorities_are_shed_before_the_most_urgent_requests(catalog: VariantCatalog) -> None:
    queue = [*(waits(due) for due in (4.0, 4.1, 4.2)), waits(4.3, priority=-2), waits(4.4, priority=-1)]
    decision = choose(catalog, *queue)
    assert (decision.shed, decision.batch) == ((queue[3], queue[4]), tuple(queue[:3]))


def test_a_request_of_low_priority_that_delays_no_other_is_answered(catalog: VariantCatalog) -> None:
    queue = (waits(13.0, priority=-9), waits(13.0))
    assert choose(catalog, *queue).batch == queue


def test_low_priorities_are_not_shed_where_no_other_request_gains(catalog: VariantCatalog) -> None:
    # One takes 2 s and four take 5 s: of the five due first, the first is late, whichever requests are shed.
    urgent, low = [waits(due) for due in (2.5, 5.0, 5.1, 5.2, 5.3)], [waits(99.0, priority=-5) for _ in range(9)]
    decision = choose(catalog, *urgent, *low)
    assert (decision.shed, decision.batch) == ((urgent[0],), tuple(urgent[1:]))
    queue = [*(waits(due) for due in (3.5, 6.0, 6.0, 6.0, 9.0, 9.0)), *low]
    overloaded = replace(at_zero(catalog, queue), arrival_rate=16.0, recent=(constraints_for(9.0, 2),))
    assert choose_level(overloaded).shed == (queue[0],)
    # Where requests of low priority are due before others, each takes a place in a batch.
    queue = [waits(3.5), *(waits(6.0, priority=-5) for _ in range(4)), *(waits(9.0) for _ in range(4))]
    overloaded = replace(
        at_zero(catalog, queue), arrival_rate=16.0, recent=(constraints_for(12.0, 2),), tight_budget_s=12.0
    )
    decision = choose_level(overloaded)
    assert (set(decision.shed), decision.batch) == (set(queue[:5]), tuple(queue[5:]))


def test_no_request_is_shed_for_a_larger_batch_where_keys_have_fair_shares(catalog: VariantCatalog) -> None:
    queue = [waits(3.5), *(waits(due, priority=-0.25) for due in (6.0, 6.0, 6.0, 9.0, 9.0))]
    overloaded = replace(at_zero(catalog, queue), arrival_rate=16.0, recent=(constraints_for(9.0, 2),))
    decision = choose_level(overloaded)
    assert (decision.shed, decision.batch) == ((), tuple(queue[:2]))


def test_overload_makes_the_batch_as_large_as_possible(catalog: VariantCatalog) -> None:
    # 16/s arrive, and level 0 answers four in 5 s. With the head, which has 3.5 s, only two could run together.
    queue = [waits(due) for due in (3.5, 6.0, 6.0, 6.0, 9.0, 9.0)]
    state = at_zero(catalog, queue)
    lasting = choose_level(replace(state, arrival_rate=16.0, recent=(constraints_for(9.0, 2),)))
    assert (index(lasting), lasting.shed, lasting.batch) == (0, (queue[0],), tuple(queue[1:5]))
    for_long = replace(state, arrival_rate=16.0, sustained_rate=16.0, recent=(constraints_for(9.0, 2),))
    assert choose_level(for_long) == lasting  # sustained overload selects level 0, which is too slow as well
    passing = choose_level(state)  # two end at 3 s, two at 6 s, two at 9 s
    assert (index(passing), passing.shed, passing.batch) == (0, (), tuple(queue[:2]))


def test_overload_makes_no_batch_longer_than_tight_budgets_leave_room_for(
    catalog: VariantCatalog,
) -> None:
    # Four fifths of a tight budget of 5 s are 4 s: three at level 0, and the head has time for as many.
    queue = [waits(due) for due in (4.5, 6.0, 6.0, 6.0, 9.0, 9.0)]
    overloaded = replace(
        at_zero(catalog, queue), arrival_rate=16.0, recent=(constraints_for(5.0, 2),), tight_budget_s=5.0
    )
    decision = choose_level(overloaded)
    assert (index(decision), decision.shed, decision.batch) == (0, (), tuple(queue[:3]))


def test_a_batch_after_shedding_is_in_time_even_if_latencies_vary(catalog: VariantCatalog) -> None:
    state = at_zero(catalog, [waits(5.2) for _ in range(8)])  # four at level 0 end at 5 s, the others at 10 s
    assert len(choose_level(state).batch) == 4
    assert len(choose_level(replace(state, tail_factor=1.25)).batch) == 3  # four may take 6.25 s, three 5 s


def test_nothing_is_shed_because_of_the_tail_or_the_safety_factor(catalog: VariantCatalog) -> None:
    state = at_zero(catalog, [waits(5.2) for _ in range(4)])  # four at level 0 end at 5 s, at times at 6.25 s
    assert choose_level(replace(state, tail_factor=1.25)).shed == ()
    assert choose_level(replace(state, tail_factor=1.25, safety_factor=3.0)).shed == ()


def test_shedding_makes_room_for_the_rest_at_likely_latencies(catalog: VariantCatalog) -> None:
    # Three batches of four end at 15 s; with one request fewer, at 14 s. If the likely latencies counted as rare ones,
    # all would fit.
    queue = [waits(14.7) for _ in range(12)]
    assert choose_level(replace(at_zero(catalog, queue), tail_factor=1.25)).shed == (queue[0],)


def test_the_reason_includes_the_safety_factor_and_sustained_overload(catalog: VariantCatalog) -> None:
    queue = [waits(41.0) for _ in range(8)]
    cautious = choose_level(replace(at_zero(catalog, queue), safety_factor=1.5)).reason
    assert (cautious.code, cautious.queued, cautious.safety_factor) == (ReasonCode.ALL_IN_TIME, 8, 1.5)
    overloaded = choose_level(replace(at_zero(catalog, queue), arrival_rate=0.85, sustained_rate=0.85))
    assert index(overloaded) == 0
    assert (overloaded.reason.code, overloaded.reason.queued) == (ReasonCode.SUSTAINED_OVERLOAD, 8)


def test_every_request_of_a_batch_grants_its_sub_network(catalog: VariantCatalog) -> None:
    queue = [waits(100.0, highest_level=0), waits(100.0), waits(101.0), waits(102.0, highest_level=0)]
    first = choose(catalog, *queue)
    assert (index(first), first.batch) == (0, (queue[0], queue[3]))
    second = choose(catalog, queue[1], queue[2])
    assert (index(second), second.batch) == (2, (queue[1], queue[2]))


def test_a_batch_leaves_time_for_the_other_variants_of_its_group(catalog: VariantCatalog) -> None:
    # Two at level 2 take 12 of the head's 16 s, which leaves 4 s for three at level 0. All four would take 5 s.
    cheap = [waits(due, highest_level=0) for due in (16.0, 90.0, 90.0, 90.0)]
    good = [waits(17.0), waits(17.0)]
    first = choose(catalog, cheap[0], *good, *cheap[1:])
    assert (index(first), first.batch) == (0, tuple(cheap[:3]))
    second = choose_level(replace(at_zero(catalog, (*good, cheap[3])), now=4.0))
    assert (index(second), second.batch) == (2, tuple(good))


def test_a_request_by_name_runs_with_requests_that_get_its_sub_network_anyway(catalog: VariantCatalog) -> None:
    queue = (waits(100.0, highest_level=0, pinned=2), waits(100.0))
    decision = choose(catalog, *queue)
    assert (index(decision), decision.batch) == (2, queue)


def test_a_variant_that_is_no_level_runs_by_name(catalog: VariantCatalog) -> None:
    queue = (waits(100.0, highest_level=0, pinned=3), waits(100.0), waits(100.0, highest_level=0, pinned=3))
    decision = choose(catalog, *queue)
    assert (index(decision), decision.batch) == (3, (queue[0], queue[2]))


def test_a_request_by_name_is_not_lowered_with_the_head(catalog: VariantCatalog) -> None:
    # Together at level 2 they take 12 s, within the head's 12.5 s but not with a margin of 5 %: the head is lowered.
    head, named = waits(12.5), waits(13.0, highest_level=0, pinned=2)
    decision = choose(catalog, head, named)
    assert (index(decision), decision.batch) == (1, (head,))


def test_a_budget_between_two_levels_is_used_up_while_a_higher_level_is_feasible(catalog: VariantCatalog) -> None:
    constraints = waits(100.0, highest_level=1, over_limit=3)
    assert index(choose(catalog, constraints)) == 3
    # All eight would take 30 s at variant 3; they take 20 s at level 1.
    assert index(choose(catalog, *(waits(25.0, highest_level=1, over_limit=3) for _ in range(8)))) == 1
    assert (
        index(choose(catalog, waits(6.1, highest_level=1, over_limit=3))) == 1
    )  # 6 s do not fit with a margin of 5 %: its highest level then


def test_a_long_queue_with_one_limited_request_is_planned_to_its_end(catalog: VariantCatalog) -> None:
    # A hundred batches take 500 s at level 0 and 1000 s at level 1; the first 128 requests alone take 640 s at level 2.
    queue = [*(waits(700.0) for _ in range(399)), waits(700.0, highest_level=0)]
    decision = choose(catalog, *queue)
    assert (index(decision), decision.shed) == (0, ())


def test_huge_budgets_and_many_priorities_do_not_affect_the_head(catalog: VariantCatalog) -> None:
    others = [waits(1e6 + number, priority=-number) for number in range(1000)]
    decision = choose(catalog, waits(9.0), *others, waits(math.inf))
    assert (index(decision), len(decision.batch), decision.expired, decision.shed) == (2, 1, (), ())


def random_state(catalog: VariantCatalog, seed: int) -> SchedulerState:
    """Return a random state: long queues, tight and huge budgets, limits, names, priorities, load."""
    rng = random.Random(seed)
    now = rng.uniform(-100, 100)
    longest = rng.choice((10.0, 60.0, 600.0))
    num_priorities = rng.choice((1, 3))

    def constraints() -> RequestConstraints:
        budget_s = rng.uniform(0, longest)
        match rng.choice(("free", "free", "limit", "beyond", "name") if seed % 3 else ("free",)):
            case "limit":
                return constraints_for(budget_s, rng.randrange(3))
            case "beyond":
                return constraints_for(budget_s, 1, over_limit=catalog.variants[3])
            case "name":
                return constraints_for(budget_s, 0, pinned=catalog.variants[rng.randrange(4)])
        return constraints_for(budget_s, 2)

    all_constraints = [constraints() for _ in range(rng.choice((1, 2, 5, 30, 300)))]
    queue = [QueuedRequest(now + each.budget_s, each, -rng.randrange(num_priorities)) for each in all_constraints]
    drifts = [rng.uniform(0.8, 1.2) for _ in catalog.variants]
    return SchedulerState(
        now=now,
        queue=sorted(queue, key=lambda request: request.deadline_at),
        catalog=catalog,
        latencies_s=[
            [drift * seconds for seconds in variant.latency_by_batch_s]
            for drift, variant in zip(drifts, catalog.variants, strict=True)
        ],
        slowdown=rng.choice((0.5, 1.0, 3.0)),
        tail_factor=rng.choice((1.0, 1.4)),
        overhead_factor=rng.choice((1.0, 1.7)),
        max_batch_size=rng.randint(1, 4),
        arrival_rate=rng.choice((0.0, 0.5, 20.0, 5000.0)),
        recent=all_constraints[-128:],
        tight_budget_s=rng.choice((math.inf, min(each.budget_s for each in all_constraints))),
    )


def grants(constraints: RequestConstraints, variant: Variant) -> bool:
    return variant.index in constraints.grant.by_level


def test_decisions_on_random_queues_respect_grants_deadlines_and_shedding_order(catalog: VariantCatalog) -> None:
    seen = set()
    for seed in range(400):
        state = random_state(catalog, seed)
        queue = list(state.queue)
        decision = choose_level(state)
        assert state.queue == queue
        assert choose_level(state) == decision
        taken = (*decision.batch, *decision.expired, *decision.shed)
        assert taken, "something runs or is dropped"
        assert len(taken) == len(set(taken)), "no request twice"
        assert set(taken) <= set(queue)
        assert (decision.variant is None) == (not decision.batch)
        assert len(decision.batch) <= state.max_batch_size
        if decision.variant is not None:
            assert all(grants(request.constraints, decision.variant) for request in decision.batch)
            left = [request for request in queue if request not in {*decision.expired, *decision.shed}]
            assert decision.batch[0] is left[0], "the most urgent remaining request runs"
            assert list(decision.batch) == sorted(decision.batch, key=lambda request: request.deadline_at)
            assert state.now + state.latency_s(decision.variant.index, len(decision.batch)) <= left[0].deadline_at
        if len(queue) <= MAX_PLANNED:
            for dropped in decision.shed:
                lower = [request for request in decision.batch if request.priority < dropped.priority]
                assert all(dropped.deadline_at <= request.deadline_at for request in lower), "lower ones are due later"
        seen.add((index(decision), bool(decision.expired), bool(decision.shed)))
    assert {variant for variant, _, _ in seen} == {None, 0, 1, 2, 3}
    assert {shed for _, _, shed in seen} == {False, True}


def test_a_feasible_plan_answers_the_whole_queue_in_time_if_predictions_hold(catalog: VariantCatalog) -> None:
    """The level is chosen so that no queued request is late; if no others arrive, none is."""
    checked = 0
    for seed in range(0, 300, 3):  # in these states, no request has a limit
        state = replace(random_state(catalog, seed), arrival_rate=0.0, tight_budget_s=math.inf)
        decision = choose_level(state)
        queue, now = list(state.queue), state.now
        if index(decision) in (None, 0) or decision.expired:
            continue  # keep states whose chosen level has one below it, in reserve
        checked += 1
        while queue:
            decision = choose_level(replace(state, queue=queue, now=now))
            assert not decision.expired
            assert not decision.shed
            assert decision.variant is not None
            now += state.latency_s(decision.variant.index, len(decision.batch)) * state.overhead_factor
            queue = [request for request in queue if request not in decision.batch]
    assert checked > 10


def looks_again(deadline_at: float, pinned: int, priority: float = 0) -> QueuedRequest:
    first = waits(deadline_at, priority=priority)
    return replace(waits(deadline_at, pinned=pinned, priority=priority), second_look_of=first)


@pytest.mark.parametrize(("due", "runs"), [(16.5, "new"), (16.3, "again")])
def test_a_further_look_waits_as_long_as_its_deadline_allows(catalog: VariantCatalog, due: float, runs: str) -> None:
    """The new request takes 8 s, and the further look 8 s plus a margin of 5 %."""
    again, new = looks_again(due, pinned=2), waits(60.0)
    decision = choose(catalog, again, new)
    assert decision.batch == ((new,) if runs == "new" else (again,))
    assert decision.reason.code is (ReasonCode.ALONE if runs == "new" else ReasonCode.UNSURE)


def test_further_looks_run_at_once_in_full_batches_or_where_nothing_else_waits(catalog: VariantCatalog) -> None:
    again = tuple(looks_again(100.0 + place, pinned=2) for place in range(5))
    assert choose(catalog, again[0]).batch == again[:1]
    assert choose(catalog, *again[:3], waits(200.0)).batch != again[:3]
    assert choose(catalog, *again, waits(200.0)).batch == again[:4]
    mixed = choose(catalog, looks_again(90.0, pinned=1), *again)
    assert (index(mixed), len(mixed.batch)) == (1, 1), "each variant has its own batch"


def test_a_further_look_makes_no_first_look_late(catalog: VariantCatalog) -> None:
    """Both new requests take 3 s at the cheapest level, due in 3.2 s; the further look takes 8 s and cannot wait."""
    again, new = looks_again(9.0, pinned=2), (waits(3.2), waits(3.2))
    decision = choose(catalog, *new, again)
    assert (index(decision), decision.batch, decision.shed) == (0, new, ())
    later = tuple(waits(13.0) for _ in new)  # at the cheapest level, they are in time even after it
    assert choose(catalog, *later, again).batch == (again,)


def test_further_looks_do_not_delay_arrivals_where_short_budgets_are_usual(catalog: VariantCatalog) -> None:
    """A further look takes 8 s, during which 0.8 requests arrive that are due within 9 s; alone, one takes 2 s."""
    again, new = looks_again(50.0, pinned=2), waits(90.0)
    state = replace(at_zero(catalog, (again,)), arrival_rate=0.1, recent=(constraints_for(60.0, 2),))
    assert choose_level(state).batch == (again,)
    hurried = replace(state, tight_budget_s=9.0)
    assert choose_level(hurried) == BatchDecision(None, shed=(again,)), "there will be no better moment"
    assert choose_level(replace(hurried, queue=(again, new))).batch == (new,)
    assert choose_level(replace(hurried, arrival_rate=0.01)).batch == (again,), "one arrival in twelve looks"


def test_further_looks_are_shed_in_a_burst_that_sheds_requests(catalog: VariantCatalog) -> None:
    again = looks_again(9.0, pinned=2)
    crowd = [waits(3.1), waits(3.1), waits(3.1)]
    decision = choose(catalog, *crowd, again)
    assert again in decision.shed
    assert len(decision.batch) == 2, "as if there were no further look"
    assert decision.batch == choose(catalog, *crowd).batch


def test_sustained_overload_sheds_every_further_look(catalog: VariantCatalog) -> None:
    again = looks_again(500.0, pinned=2)
    state = replace(at_zero(catalog, (again,)), arrival_rate=16.0, sustained_rate=16.0)
    assert choose_level(state) == BatchDecision(None, shed=(again,))
    burst = choose_level(replace(state, sustained_rate=0.0))
    assert burst.batch == (again,)


def test_a_further_look_that_would_be_late_expires(catalog: VariantCatalog) -> None:
    assert choose(catalog, looks_again(7.9, pinned=2)).expired != ()
    assert choose(catalog, looks_again(8.5, pinned=2)).batch != ()


@pytest.fixture
def cascading(profiles: ProfileTable) -> VariantCatalog:
    """Add a cascade as a level: (2, 0.5), then (4, 1) for a quarter of the images; expected: 2 + 8 / 4 = 4 s."""
    cascade = CascadeProfile(SubNetwork(2, 0.5), SubNetwork(4, 1.0), threshold=0.8, share=0.25, top1=0.75)
    return VariantCatalog.of(replace(profiles, cascades=(cascade,)), LatencyTable((1, 2, 3, 4), SECONDS))


def test_a_cascade_runs_for_a_single_request_only_where_both_looks_fit(cascading: VariantCatalog) -> None:
    """Both looks take 10 s; the next level down is (4, 0.5) at 4 s, the one above (4, 1) alone at 8 s."""
    names = [str(variant) for variant in cascading.levels]
    cascade = next(index for index, name in enumerate(names) if "then" in name)

    def chosen(due: float) -> str:
        decision = choose_level(at_zero(cascading, (waits(due, highest_level=cascading.num_levels - 1),)))
        assert decision.variant is not None
        return str(decision.variant)

    within = replace(at_zero(cascading, (waits(9.0, highest_level=cascade),)))
    assert chosen(100.0) == names[-1]
    assert index(choose_level(within)) == cascade - 1
    assert index(choose_level(at_zero(cascading, (waits(11.0, highest_level=cascade),)))) == cascade
