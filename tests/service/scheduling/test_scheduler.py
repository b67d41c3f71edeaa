"""The latencies of batches of 1, 2, 3 and 4 are those of conftest's fast_catalog.

level 0: 20 30 40 50 ms
level 1: 40 60 80 100 ms
level 2: 80 120 160 200 ms
"""

import math
import random
from dataclasses import replace
from typing import get_args

import pytest

from models.latency import LatencyTable
from models.profiles import CascadeProfile, ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.domain import LookCode
from service.errors import OverloadedError, OverloadReason
from service.scheduling.catalog import VariantCatalog
from service.scheduling.estimators import REMEMBERED_REQUESTS, SUSTAINED_TIME_S
from service.scheduling.level_policy import choose_level
from service.scheduling.policies import find_policy
from service.scheduling.scheduler import RESERVATION_TIMEOUT_S, RESERVATION_VALID_S, Scheduler
from service.scheduling.second_look import Looked
from service.scheduling.state import (
    NO_DELAY,
    BatchDecision,
    PreprocessingDelay,
    QueuedRequest,
    SchedulerState,
)
from service.scheduling.variants import Variant
from tests.service.conftest import SECONDS
from tests.service.granting import constraints_for

LONG_S = 1000.0  # after which earlier arrivals no longer count


def stand_in(index: int | None) -> Variant | None:
    """Return a stand-in for the variant of the catalog at an index."""
    return None if index is None else Variant(index, SubNetworkProfile(SubNetwork(2, 0.5), 1), (), index)


def index(decision: BatchDecision) -> int | None:
    return None if decision.variant is None else decision.variant.index


def completed(
    scheduler: Scheduler, level: int, size: int, seconds: float, now: float, turnaround_s: float = 0.0
) -> None:
    scheduler.batch_completed(scheduler.catalog.variants[level], size, seconds, now, turnaround_s)


def predicted(scheduler: Scheduler, level: int, size: int, now: float) -> float:
    return scheduler.predict(scheduler.catalog.variants[level], size, now)


def waits(deadline_at: float, *, budget_s: float = 9.0, pinned: int | None = None, priority: int = 0) -> QueuedRequest:
    constraints = constraints_for(budget_s, 2 if pinned is None else 0, stand_in(pinned))
    return QueuedRequest(deadline_at, constraints, priority)


@pytest.fixture
def scheduler(fast_catalog: VariantCatalog) -> Scheduler:
    return Scheduler(fast_catalog, choose_level, 4)


def fill(scheduler: Scheduler, *requests: QueuedRequest, now: float = 0.0) -> tuple[QueuedRequest, ...]:
    for request in requests:
        scheduler.admit(request, now)
        scheduler.enqueue(request)
    return requests


def test_the_queue_is_in_order_of_deadline_and_then_of_arrival(scheduler: Scheduler) -> None:
    last, first, early, expired = fill(scheduler, waits(4.0), waits(1.0), waits(2.0), waits(2.0))
    assert list(scheduler.state(0.0).queue) == [first, early, expired, last]
    assert len(scheduler) == 4


def test_an_empty_queue_yields_an_empty_decision(scheduler: Scheduler) -> None:
    assert scheduler.next_batch(0.0) == BatchDecision(None)


def test_requests_that_run_expire_or_are_shed_leave_the_queue(fast_catalog: VariantCatalog) -> None:
    def one_of_each(state: SchedulerState) -> BatchDecision:
        first, second, third, *_ = state.queue
        return BatchDecision(state.catalog.variants[0], batch=(first,), expired=(second,), shed=(third,))

    scheduler = Scheduler(fast_catalog, one_of_each, 4)
    *_, left = fill(scheduler, *(waits(1.0 + number) for number in range(4)))
    scheduler.next_batch(0.0)
    assert list(scheduler.state(0.0).queue) == [left]
    assert scheduler.backlog_s(0.0) == pytest.approx(0.05 / 4)


def test_a_request_counts_in_the_backlog_from_its_admission_until_it_leaves(scheduler: Scheduler) -> None:
    request = waits(1.0)
    scheduler.admit(request, 0.0)
    assert len(scheduler) == 0
    assert scheduler.backlog_s(0.0) == pytest.approx(0.05 / 4)
    scheduler.enqueue(request)
    assert len(scheduler) == 1
    scheduler.withdraw(request)
    assert len(scheduler) == 0
    assert scheduler.backlog_s(0.0) == 0.0


def test_withdrawing_a_request_twice_removes_no_other(scheduler: Scheduler) -> None:
    gone, twin = fill(scheduler, waits(1.0), waits(1.0))
    scheduler.withdraw(gone)
    scheduler.withdraw(gone)
    assert list(scheduler.state(0.0).queue) == [twin]
    assert scheduler.backlog_s(0.0) == pytest.approx(0.05 / 4)
    scheduler.withdraw(twin)
    assert scheduler.backlog_s(0.0) == 0.0


def test_queue_and_backlog_stay_consistent_through_random_events_and_end_empty(fast_catalog: VariantCatalog) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        scheduler, now = Scheduler(fast_catalog, choose_level, 4), 0.0
        decoding: list[QueuedRequest] = []
        waiting: list[QueuedRequest] = []
        gone: list[QueuedRequest] = []
        for _ in range(150):
            now += rng.choice((0.0, 0.001, 0.03))
            match rng.choice(("come", "come", "decoded", "leave", "again", "run")):
                case "come":
                    request = waits(now + rng.choice((0.01, 0.1, 0.1, 0.6)), priority=-rng.randrange(2))
                    try:
                        scheduler.admit(request, now)
                        decoding.append(request)
                    except OverloadedError:
                        gone.append(request)
                case "decoded" if decoding:
                    waiting.append(decoding.pop(rng.randrange(len(decoding))))
                    scheduler.enqueue(waiting[-1])
                case "leave" if decoding or waiting:
                    gone.append(rng.choice(decoding + waiting))
                    scheduler.withdraw(gone[-1])
                case "again" if gone:
                    scheduler.withdraw(rng.choice(gone))
                case "run":
                    decision = scheduler.next_batch(now)
                    taken = [*decision.batch, *decision.expired, *decision.shed]
                    assert bool(taken) == bool(waiting)
                    assert set(taken) <= set(waiting)
                    gone += taken
            decoding = [request for request in decoding if request not in gone]
            waiting = [request for request in waiting if request not in gone]
            assert set(scheduler.state(now).queue) == set(waiting)
            admitted = len(decoding) + len(waiting)
            assert scheduler.backlog_s(now) == pytest.approx(admitted / 4 * predicted(scheduler, 0, 4, now))
        for request in (*decoding, *waiting):
            scheduler.withdraw(request)
        assert len(scheduler) == 0
        assert scheduler.backlog_s(now) == 0.0


# Admission


def refusal_s(
    scheduler: Scheduler, request: QueuedRequest, now: float, delay: PreprocessingDelay = NO_DELAY
) -> float | None:
    """Return the seconds after which to retry; None if the request is admitted."""
    try:
        scheduler.admit(request, now, delay)
    except OverloadedError as error:
        return float(error.details["retry_after_s"])
    return None


@pytest.mark.parametrize(
    ("due", "retry_after_s"), [(0.019, 0.001), (0.021, None), (1e-12, 0.02), (-9.0, 9.02), (1e6, None)]
)
def test_a_request_that_not_even_the_cheapest_level_answers_in_time_is_rejected(
    scheduler: Scheduler, due: float, retry_after_s: float | None
) -> None:
    assert refusal_s(scheduler, waits(due), 0.0) == retry_after_s


def test_admission_counts_requests_due_earlier_at_the_cheapest_level_in_full_batches(scheduler: Scheduler) -> None:
    fill(scheduler, *(waits(0.101) for _ in range(8)))  # the last of the eight end at 100 ms, one more at 120 ms
    assert refusal_s(scheduler, waits(0.115), 0.0) == pytest.approx(0.005)
    assert refusal_s(scheduler, waits(0.121), 0.0) is None
    assert refusal_s(scheduler, waits(0.1), 0.0) is None  # it is due before the eight


def test_a_new_request_joins_a_batch_that_is_not_full(scheduler: Scheduler) -> None:
    fill(scheduler, *(waits(0.051) for _ in range(3)))  # alone after the three, it would end at 60 ms
    assert refusal_s(scheduler, waits(0.055), 0.0) is None
    assert refusal_s(scheduler, waits(0.055), 0.0) == pytest.approx(0.015)  # the fifth has a batch of its own


def test_a_new_request_does_not_join_a_batch_that_it_would_make_late(scheduler: Scheduler) -> None:
    fill(scheduler, *(waits(0.041) for _ in range(3)))
    assert refusal_s(scheduler, waits(0.055), 0.0) == pytest.approx(0.005)


@pytest.mark.parametrize("how", ["ended", "failed"])
def test_the_running_batch_delays_a_new_request_until_it_ends(scheduler: Scheduler, how: str) -> None:
    fill(scheduler, *(waits(0.06) for _ in range(4)))
    scheduler.state(LONG_S)  # so that no arrivals are forecast
    assert index(scheduler.next_batch(0.0)) == 0  # until 50 ms
    assert refusal_s(scheduler, waits(0.069), 0.01) == pytest.approx(0.001)
    if how == "ended":
        completed(scheduler, 0, 4, 0.05, 0.03)
    else:
        scheduler.engine_taken(0.03)
    assert refusal_s(scheduler, waits(0.069), 0.03) is None


def test_the_preprocessing_delay_delays_a_new_request(scheduler: Scheduler) -> None:
    assert refusal_s(scheduler, waits(0.069), 0.01, PreprocessingDelay(0.04)) == pytest.approx(0.001)
    assert refusal_s(scheduler, waits(0.069), 0.01, PreprocessingDelay(0.03)) is None


@pytest.mark.parametrize(
    ("delay", "reason"),
    [
        (PreprocessingDelay(base_s=0.981), "no_time"),
        (PreprocessingDelay(base_s=0.9, contention_s=0.081), "preprocessing"),
        (PreprocessingDelay(base_s=0.9, queue_s=0.081), "preprocessing"),
        (PreprocessingDelay(base_s=0.9, contention_s=0.04, queue_s=0.039), None),
    ],
)
def test_rejections_caused_before_the_queue_have_their_own_reasons(
    scheduler: Scheduler, delay: PreprocessingDelay, reason: str | None
) -> None:
    reasons = []
    for ask in (scheduler.admit, scheduler.preview):  # the preview gives the same reason
        try:
            ask(waits(1.0), 0.0, delay)
        except OverloadedError as error:
            reasons.append(error.reason)
    assert reasons == [reason] * 2 if reason else not reasons
    assert scheduler.state(0.0).safety_factor == 1.0  # no cheaper level would have helped


def test_the_engine_works_off_the_queue_while_a_request_waits_for_decoding(scheduler: Scheduler) -> None:
    fill(scheduler, *(waits(0.3) for _ in range(8)))  # 100 ms at level 0, while other images are decoded
    assert refusal_s(scheduler, waits(0.3), 0.0, PreprocessingDelay(0.01, queue_s=0.26)) is None
    assert refusal_s(scheduler, waits(0.3), 0.0, PreprocessingDelay(0.01, queue_s=0.28)) == pytest.approx(0.01)


def test_a_request_for_a_slow_sub_network_by_name_is_rejected_sooner(scheduler: Scheduler) -> None:
    assert refusal_s(scheduler, waits(0.079, pinned=2), 0.0) == pytest.approx(0.001)
    assert refusal_s(scheduler, waits(0.079), 0.0) is None


def test_the_lowest_priority_is_rejected_first(fast_catalog: VariantCatalog) -> None:
    scheduler = Scheduler(fast_catalog, choose_level, 4)
    fill(scheduler, *(waits(0.101) for _ in range(8)))
    assert refusal_s(scheduler, waits(0.101, priority=-1), 0.0) == pytest.approx(0.019)
    low = Scheduler(fast_catalog, choose_level, 4)
    fill(low, *(waits(0.101, priority=-1) for _ in range(8)))
    assert refusal_s(low, waits(0.101), 0.0) is None  # it is served before all of them


def test_requests_that_will_be_late_anyway_keep_no_other_out(scheduler: Scheduler) -> None:
    fill(scheduler, *(waits(0.2) for _ in range(12)))  # they take until 150 ms
    assert refusal_s(scheduler, waits(0.24), 0.185) is None  # too late for any of the twelve


def test_a_retry_after_the_named_time_is_admitted(fast_catalog: VariantCatalog) -> None:
    scheduler = Scheduler(
        fast_catalog, lambda state: BatchDecision(state.catalog.variants[0], tuple(state.queue[:4])), 4
    )
    fill(scheduler, *(waits(0.109) for _ in range(8)))
    assert refusal_s(scheduler, waits(0.109), 0.0) == pytest.approx(0.011)  # the eight end at 100 ms, this one at 120
    scheduler.next_batch(0.0)
    assert refusal_s(scheduler, waits(0.109 + 0.010), 0.010) is not None
    assert refusal_s(scheduler, waits(0.109 + 0.0111), 0.0111) is None


def overloaded(scheduler: Scheduler) -> float:
    """Let 100 requests/s arrive for long, of which level 0 answers 80; return the instant at the end."""
    at = 0.0
    while at < 4 * SUSTAINED_TIME_S:
        scheduler.admit(waits(at + 1e6), at)
        at += 0.01
    return at


def test_sustained_overload_rejects_a_request_that_a_full_batch_would_make_late(scheduler: Scheduler) -> None:
    at = overloaded(scheduler)
    scheduler.admit(waits(at + 0.05), at)
    scheduler.throttled(3.0)  # a pause delays only later batches
    # The request ahead and this one take 30 ms together; a full batch takes 50 ms more.
    assert refusal_s(scheduler, waits(at + 0.079), at) == pytest.approx(0.001)
    assert refusal_s(scheduler, waits(at + 0.081), at) is None


@pytest.mark.parametrize(("budget_s", "end_s"), [(0.07, 0.06), (0.05, 0.04)])
def test_sustained_overload_keeps_at_most_three_tenths_of_a_tight_budget_for_others(
    scheduler: Scheduler, budget_s: float, end_s: float
) -> None:
    at = overloaded(scheduler)
    scheduler.admit(waits(at + 0.025), at)
    # One after the other, two take 40 ms. Three tenths of 70 ms hold one more, of 20 ms; those of 50 ms hold none.
    assert refusal_s(scheduler, waits(at + end_s - 0.001, budget_s=budget_s), at) == pytest.approx(0.001)
    assert refusal_s(scheduler, waits(at + end_s + 0.001, budget_s=budget_s), at) is None


@pytest.mark.parametrize("budget_s", [0.021, 0.039, 0.1, 9.0])
def test_a_request_with_none_before_it_is_admitted_even_under_sustained_overload(
    scheduler: Scheduler, budget_s: float
) -> None:
    at = overloaded(scheduler)
    assert refusal_s(scheduler, waits(at + budget_s, budget_s=budget_s), at) is None


def test_once_an_overload_is_over_requests_are_admitted_as_before(scheduler: Scheduler) -> None:
    at = overloaded(scheduler) + 2.0  # the sustained rate still contains part of the overload
    scheduler.admit(waits(at + 0.05), at)
    assert refusal_s(scheduler, waits(at + 0.0501), at) is None


def test_sustained_overload_allows_for_batches_ahead_that_take_longer_than_expected(scheduler: Scheduler) -> None:
    at = overloaded(scheduler)
    for number in range(8):
        completed(scheduler, 0, 4, 0.04 if number % 2 else 0.06, at)
    state = scheduler.state(at)
    full_s = predicted(scheduler, 0, 4, at)
    fill(scheduler, *(waits(at + 0.19) for _ in range(8)), now=at)  # two batches
    steady_s = predicted(scheduler, 0, 1, at) + 3 * full_s
    spread_s = full_s * (state.tail_factor - 1) * math.sqrt(2)
    assert spread_s > 0.02
    assert refusal_s(scheduler, waits(at + steady_s + spread_s - 0.001), at) is not None
    assert refusal_s(scheduler, waits(at + steady_s + spread_s + 0.001), at) is None


def test_a_scheduler_that_does_not_reject_early_admits_everything(fast_catalog: VariantCatalog) -> None:
    scheduler = Scheduler(fast_catalog, choose_level, 4, rejects_early=False)
    assert refusal_s(scheduler, waits(-5.0), 0.0) is None


def test_rejected_requests_leave_no_backlog(scheduler: Scheduler) -> None:
    for number in range(1000):
        with pytest.raises(OverloadedError):
            scheduler.admit(waits(0.001, priority=-1000 * number), 0.0)
    assert scheduler.backlog_s(0.0) == 0.0


def test_a_place_is_reserved_until_its_request_leaves_or_the_reservation_times_out(
    fast_catalog: VariantCatalog,
) -> None:
    scheduler = Scheduler(fast_catalog, choose_level, 1)
    first, second = waits(0.03), waits(0.031)
    scheduler.reserve(first, 0.0)
    with pytest.raises(OverloadedError):
        scheduler.reserve(second, 0.0)
    scheduler.withdraw(first)
    assert scheduler.num_before(second, 0.0) == (0, 0)
    scheduler.reserve(waits(RESERVATION_TIMEOUT_S + 0.03), 0.0)
    with pytest.raises(OverloadedError):
        scheduler.reserve(waits(RESERVATION_TIMEOUT_S + 0.031), RESERVATION_TIMEOUT_S - 0.001)
    scheduler.reserve(waits(RESERVATION_TIMEOUT_S + 0.031), RESERVATION_TIMEOUT_S)


def test_a_recently_reserved_place_is_claimed_without_another_check(fast_catalog: VariantCatalog) -> None:
    scheduler = Scheduler(fast_catalog, choose_level, 1)
    request = waits(RESERVATION_TIMEOUT_S + 0.03)
    scheduler.reserve(request, 0.0)
    assert scheduler.num_before(waits(9.0), 0.0) == (1, 1)
    assert scheduler.claim(request, RESERVATION_VALID_S - 0.001)
    assert scheduler.num_before(waits(9.0), 0.0) == (1, 0)
    assert scheduler.state(RESERVATION_TIMEOUT_S).arrival_rate > 0
    with pytest.raises(OverloadedError):  # the claimed place is kept
        scheduler.reserve(waits(RESERVATION_TIMEOUT_S + 0.031), RESERVATION_TIMEOUT_S + 0.001)


def test_an_outdated_or_missing_reservation_is_not_claimed(fast_catalog: VariantCatalog) -> None:
    scheduler = Scheduler(fast_catalog, choose_level, 1)
    late, never = waits(9.0), waits(9.0)
    scheduler.reserve(late, 0.0)
    assert not scheduler.claim(late, RESERVATION_VALID_S + 0.001)
    assert not scheduler.claim(never, 0.0)
    assert scheduler.state(RESERVATION_TIMEOUT_S).arrival_rate == 0
    assert scheduler.backlog_s(RESERVATION_TIMEOUT_S) == 0


def test_reservations_do_not_count_as_arrivals(scheduler: Scheduler) -> None:
    for _ in range(10):
        scheduler.reserve(waits(9.0), 1.0)
    assert scheduler.state(1.0).arrival_rate == 0.0


# The state that a policy sees


def test_the_very_first_request_does_not_count_as_a_burst(scheduler: Scheduler) -> None:
    fill(scheduler, waits(0.2, budget_s=0.2))  # at the best level there is time for two of 80 ms, not for five
    assert index(scheduler.next_batch(0.0)) == 2


def test_one_in_twenty_recent_requests_undercuts_the_tight_budget_of_the_state(fast_catalog: VariantCatalog) -> None:
    scheduler = Scheduler(fast_catalog, choose_level, 4, rejects_early=False)
    assert scheduler.state(0.0).tight_budget_s == math.inf
    rng = random.Random(0)
    budgets = [rng.choice((0.5, 1.0, 30.0, 1e9)) + rng.randrange(3) for _ in range(3 * REMEMBERED_REQUESTS)]
    for budget_s in budgets:
        fill(scheduler, waits(budget_s, budget_s=budget_s))
    recent = budgets[-REMEMBERED_REQUESTS:]
    state = scheduler.state(0.0)
    assert [constraints.budget_s for constraints in state.recent] == recent
    assert state.tight_budget_s == sorted(recent)[REMEMBERED_REQUESTS // 20]


def test_the_load_of_other_processes_counts_before_the_first_slow_batch(scheduler: Scheduler) -> None:
    assert predicted(scheduler, 2, 3, 0.0) == 0.16
    scheduler.machine_observed(1.5)
    assert predicted(scheduler, 2, 3, 0.0) == pytest.approx(0.24)
    assert scheduler.state(0.0).slowdown == 1.5
    assert refusal_s(scheduler, waits(0.025), 0.0) == pytest.approx(0.005)


def test_slow_batches_raise_every_prediction_and_fast_ones_lower_it_again(scheduler: Scheduler) -> None:
    for number in range(6):
        completed(scheduler, 0, 4, 0.1, number / 100)  # twice what was profiled
    assert predicted(scheduler, 1, 2, 0.05) > 1.8 * 0.06
    assert refusal_s(scheduler, waits(0.05 + 0.035), 0.05) is not None
    for number in range(6, 30):
        completed(scheduler, 0, 4, 0.05, number / 100)
    assert predicted(scheduler, 1, 2, 0.29) == pytest.approx(0.06, rel=0.15)
    assert refusal_s(scheduler, waits(0.29 + 0.035), 0.29) is None


def test_varying_batches_raise_the_tail_factor_of_the_state(scheduler: Scheduler) -> None:
    for number in range(20):
        completed(scheduler, 0, 4, (0.04, 0.06)[number % 2], number / 100)
    state = scheduler.state(0.19)
    assert state.latency_s(0, 4) == predicted(scheduler, 0, 4, 0.19)
    assert 1.3 < state.tail_factor < 1.7


def test_impossible_requests_do_not_raise_the_safety_factor(scheduler: Scheduler) -> None:
    for _ in range(50):
        with pytest.raises(OverloadedError, match="even for an empty queue"):
            scheduler.admit(waits(0.015), 0.0)  # the cheapest level takes 20 ms
    assert scheduler.state(0.0).safety_factor == 1.0


def test_impossible_requests_do_not_count_as_arrivals(scheduler: Scheduler) -> None:
    for number in range(50):
        with pytest.raises(OverloadedError, match="even for an empty queue"):
            scheduler.admit(waits(0.015 + number), float(number))
    assert (scheduler.state(50.0).arrival_rate, scheduler.state(50.0).sustained_rate) == (0, 0)


def test_requests_rejected_because_of_others_count_as_arrivals(scheduler: Scheduler) -> None:
    fill(scheduler, *(waits(0.06) for _ in range(4)))
    counted = [scheduler.state(0.0).arrival_rate]
    crowd = PreprocessingDelay(queue_s=5.0)
    for due_s, delay, said in ((0.06, NO_DELAY, "the queue is too long"), (1.0, crowd, "being read and decoded")):
        with pytest.raises(OverloadedError, match=said):
            scheduler.admit(waits(due_s), 0.0, delay)
        counted.append(scheduler.state(0.0).arrival_rate)
    assert counted[0] < counted[1] < counted[2]


@pytest.mark.parametrize("reason", get_args(OverloadReason))
def test_requests_rejected_for_limits_of_their_own_client_do_not_count_as_arrivals(
    scheduler: Scheduler, reason: OverloadReason
) -> None:
    for _ in range(100):
        scheduler.rejected(reason, 0.0)
    assert (scheduler.state(0.0).arrival_rate > 0) == (reason not in ("no_time", "key", "address"))


def test_a_throttled_engine_is_occupied_for_longer_than_its_batches(fast_catalog: VariantCatalog) -> None:
    scheduler = Scheduler(
        fast_catalog, lambda state: BatchDecision(state.catalog.variants[2], tuple(state.queue[:4])), 4
    )  # four in 200 ms
    scheduler.throttled(2.0)
    settled(scheduler, *(waits(5.0) for _ in range(8)))
    assert scheduler.preview(waits(6.0), 0.0)[2] == pytest.approx(2 * 0.4)
    assert scheduler.backlog_s(0.0) == pytest.approx(2 * 0.1)
    scheduler.next_batch(0.0)
    scheduler.next_batch(0.4)
    assert scheduler.preview(waits(6.0), 0.4)[2] == pytest.approx(0.4)


def test_admission_accounts_for_the_overhead_between_batches(scheduler: Scheduler) -> None:
    scheduler.throttled(2.0)
    fill(
        scheduler, *(waits(0.06) for _ in range(4))
    )  # at the cheapest level they take 50 ms, and the engine is free at 100 ms
    assert refusal_s(scheduler, waits(0.11), 0.0) == pytest.approx(0.01)
    assert refusal_s(scheduler, waits(0.13), 0.0) is None


def test_the_overhead_factor_is_the_learned_turnaround_or_the_throttle_factor_if_higher(scheduler: Scheduler) -> None:
    for number in range(100):
        completed(scheduler, 0, 4, 0.05, number / 10, turnaround_s=0.01)
    assert scheduler.state(9.9).overhead_factor == pytest.approx(1.2, rel=1e-3)
    assert predicted(scheduler, 0, 4, 9.9) == pytest.approx(0.05)  # the batch itself takes as long as before
    scheduler.throttled(1.1)  # the turnaround falls within the pauses
    assert scheduler.state(9.9).overhead_factor == pytest.approx(1.2, rel=1e-3)
    scheduler.throttled(3.0)
    assert scheduler.state(9.9).overhead_factor == 3.0


def test_a_single_long_turnaround_raises_the_overhead_factor_only_a_little(scheduler: Scheduler) -> None:
    completed(scheduler, 0, 4, 0.05, 0.0, turnaround_s=60.0)
    assert scheduler.state(0.0).overhead_factor == pytest.approx(1.1)


def test_the_drift_of_a_variant_that_always_takes_longer_than_profiled_is_learned(scheduler: Scheduler) -> None:
    for number in range(300):
        completed(scheduler, number % 2, 2, (0.03, 1.15 * 0.06)[number % 2], number / 100)
    first, second = (predicted(scheduler, level, 2, 2.99) for level in (0, 1))
    assert second / first == pytest.approx(2 * 1.15, rel=0.03)


def test_the_correction_of_a_profiled_latency_is_at_most_a_fifth(scheduler: Scheduler) -> None:
    for number in range(500):
        completed(scheduler, number % 2, 2, (0.03, 5 * 0.06)[number % 2], number / 100)
    for row, variant in zip(scheduler.state(5.0).latencies_s, scheduler.catalog.variants, strict=True):
        ratios = [seconds / profiled for seconds, profiled in zip(row, variant.latency_by_batch_s, strict=True)]
        assert all(0.8 - 1e-9 <= ratio <= 1.2 + 1e-9 for ratio in ratios)


def test_the_profile_and_the_memory_bound_the_batch_size(fast_catalog: VariantCatalog) -> None:
    assert Scheduler(fast_catalog, choose_level, 64).state(0.0).max_batch_size == 4
    scheduler = Scheduler(fast_catalog, choose_level, 4)
    scheduler.machine_observed(1.0, 2)
    fill(scheduler, *(waits(9.0) for _ in range(4)))
    assert len(scheduler.next_batch(0.0).batch) == 2


def test_the_pause_of_a_utilization_ceiling_delays_a_new_request(scheduler: Scheduler) -> None:
    scheduler.throttled(2.0)
    fill(scheduler, *(waits(0.06) for _ in range(4)))
    scheduler.state(LONG_S)
    assert index(scheduler.next_batch(0.0)) == 0  # a batch of 50 ms, and a pause of as much
    assert refusal_s(scheduler, waits(0.119), 0.0) == pytest.approx(0.001)


# Preview


def settled(scheduler: Scheduler, *requests: QueuedRequest) -> Scheduler:
    """Enqueue requests so long before 0 that no arrivals are forecast."""
    fill(scheduler, *requests, now=-LONG_S)
    scheduler.state(0.0)
    return scheduler


def everything(scheduler: Scheduler, now: float) -> tuple[object, ...]:
    state = scheduler.state(now)
    return (
        list(state.queue),
        list(state.recent),
        state.tight_budget_s,
        pytest.approx(state.arrival_rate),
        state.slowdown,
        scheduler.backlog_s(now),
        scheduler.free_at,
    )


def test_a_preview_changes_nothing(scheduler: Scheduler) -> None:
    settled(scheduler, *(waits(due) for due in (0.3, 0.4, 0.5)))
    scheduler.admit(waits(0.6), 0.0)
    before = everything(scheduler, 0.0)
    for request in (waits(0.35), waits(0.9, pinned=3), waits(0.9, priority=-3)):
        scheduler.preview(request, 0.0)
        scheduler.preview(request, 0.0, PreprocessingDelay(queue_s=0.1))
    with pytest.raises(OverloadedError):
        scheduler.preview(waits(0.001), 0.0)
    assert everything(scheduler, 0.0) == before


def test_a_preview_leaves_the_plan_of_a_policy_as_it_is(fast_catalog: VariantCatalog) -> None:
    previewing, other = (
        Scheduler(fast_catalog, find_policy("proteus", fast_catalog).make(fast_catalog, 4), 4) for _ in range(2)
    )
    previewing.preview(waits(900.0), 0.0)  # without traffic, the plan would be the best level
    decisions = []
    for scheduler in (previewing, other):
        fill(scheduler, *(waits(900.0) for _ in range(200)))
        decisions.append(index(scheduler.next_batch(0.1)))
    assert decisions == [0, 0]


def test_a_preview_predicts_the_later_decision(fast_catalog: VariantCatalog) -> None:
    previewed = 0
    for seed in range(60):
        rng = random.Random(seed)
        others = [waits(rng.uniform(0.02, 0.9)) for _ in range(rng.randrange(12))]
        request = waits(rng.uniform(0.03, 0.9), priority=-rng.randrange(2))
        foreseeing, scheduler = (Scheduler(fast_catalog, choose_level, 4) for _ in range(2))
        scheduler.admit(request, -LONG_S)  # so early that it raises no forecast
        for one in (foreseeing, scheduler):
            settled(one, *others)
            one.next_batch(0.0)  # so that the engine may be busy
        free_at = max(0.0, scheduler.free_at)
        try:
            variant, size, start_s, foretold = foreseeing.preview(request, 0.0)
        except OverloadedError:
            continue
        scheduler.enqueue(request)
        now, decision = free_at, scheduler.next_batch(free_at)
        while request not in decision.batch:
            now = max(now, scheduler.free_at)
            decision = scheduler.next_batch(now)
        assert decision == foretold
        assert (variant, size) == (decision.variant, len(decision.batch))
        assert start_s == pytest.approx(now)
        previewed += 1
    assert previewed > 30


def test_a_preview_raises_for_a_request_that_would_be_rejected_or_shed(scheduler: Scheduler) -> None:
    settled(scheduler, *(waits(0.044) for _ in range(3)))  # three end at 40 ms
    with pytest.raises(OverloadedError, match="the queue is too long"):
        scheduler.preview(waits(0.05), 0.0)
    with pytest.raises(OverloadedError, match="would be shed"):
        scheduler.preview(waits(0.04), 0.0)  # the most urgent of four, of which three can be answered


def test_a_preview_of_a_long_queue_asks_the_policy_only_a_few_times(fast_catalog: VariantCatalog) -> None:
    asked = 0

    def counting(state: SchedulerState) -> BatchDecision:
        nonlocal asked
        asked += 1
        return choose_level(state)

    scheduler = settled(Scheduler(fast_catalog, counting, 4), *(waits(1e5 + number) for number in range(1000)))
    variant, size, start_s, _ = scheduler.preview(waits(2e5), 0.0)
    assert asked < 10
    assert (variant.index, size) == (2, 4)
    assert start_s == pytest.approx(1000 / 4 * 0.2, rel=0.01)


def test_a_preview_raises_where_the_queue_moves_too_slowly_for_the_deadline(fast_catalog: VariantCatalog) -> None:
    scheduler = Scheduler(
        fast_catalog, lambda state: BatchDecision(state.catalog.variants[2], tuple(state.queue[:1])), 4
    )
    settled(scheduler, *(waits(5.0) for _ in range(100)))  # one by one, each 80 ms
    with pytest.raises(OverloadedError, match="would be shed"):
        scheduler.preview(waits(7.0), 0.0)
    assert scheduler.preview(waits(9.0), 0.0)[2] == pytest.approx(8.0)


def test_rejections_and_missed_deadlines_raise_the_safety_factor(scheduler: Scheduler) -> None:
    assert scheduler.state(0.0).safety_factor == 1.0
    fill(scheduler, *(waits(0.2) for _ in range(12)))  # they take until 150 ms
    assert refusal_s(scheduler, waits(0.03), 0.0) is None
    assert refusal_s(scheduler, waits(0.03), 0.0) is None
    assert refusal_s(scheduler, waits(0.035), 0.0) is not None  # alone it would take 20 ms
    refused = scheduler.state(0.0).safety_factor
    scheduler.deadline_missed(0.0)
    assert scheduler.state(0.0).safety_factor > refused > 1.0


@pytest.fixture
def cascading(profiles: ProfileTable) -> Scheduler:
    """Add a cascade as a level to fast_catalog: (2, 0.5), then (4, 1) for half of the images: 20 ms, and then 80 ms."""
    cascade = CascadeProfile(SubNetwork(2, 0.5), SubNetwork(4, 1.0), threshold=0.8, share=0.5, top1=0.75)
    seconds = {subnetwork: tuple(each / 100 for each in row) for subnetwork, row in SECONDS.items()}
    table = LatencyTable((1, 2, 3, 4), seconds)
    return Scheduler(VariantCatalog.of(replace(profiles, cascades=(cascade,)), table), choose_level, 4)


def cascade_of(scheduler: Scheduler) -> Variant:
    return next(variant for variant in scheduler.catalog.levels if variant.second_look is not None)


def run_first_look(scheduler: Scheduler, confidence: float, deadline_at: float = 5.0) -> QueuedRequest | LookCode:
    cascade = cascade_of(scheduler)
    (request,) = fill(scheduler, waits(deadline_at))
    scheduler.withdraw(request)  # as its batch does when it runs
    (found,) = scheduler.look_again([Looked(request, confidence, cascade.profile.macs)], cascade, 0.0)
    return found


def test_an_unsure_first_look_queues_another_and_a_sure_one_does_not(cascading: Scheduler) -> None:
    assert run_first_look(cascading, 0.9) is LookCode.SURE
    assert len(cascading) == 0
    again = run_first_look(cascading, 0.5)
    assert list(cascading.state(0.0).queue) == [again]
    decision = cascading.next_batch(0.0)
    assert decision.variant is not None
    assert (decision.batch, decision.variant.profile.subnetwork) == ((again,), SubNetwork(4, 1.0))
    assert len(cascading) == 0


def test_withdrawing_a_request_removes_its_second_look(cascading: Scheduler) -> None:
    again = run_first_look(cascading, 0.5)
    assert isinstance(again, QueuedRequest)
    cascading.withdraw(again.admitted)
    assert len(cascading) == 0


def test_expired_second_looks_do_not_raise_the_safety_factor(cascading: Scheduler) -> None:
    run_first_look(cascading, 0.5, deadline_at=0.09)
    for _ in range(50):
        run_first_look(cascading, 0.5, deadline_at=0.09)
        assert cascading.next_batch(0.05).expired != ()
    assert cascading.state(0.05).safety_factor == 1.0


def test_a_batch_of_a_cascade_is_predicted_and_observed_as_its_first_look(cascading: Scheduler) -> None:
    cascade, catalog = cascade_of(cascading), cascading.catalog
    assert cascading.predict(cascade, 4, 0.0) == 0.05
    expected_s = cascading.state(0.0).latencies_s[cascade.index][3]
    assert expected_s == pytest.approx(0.05 + 0.12)  # two of four are looked at again
    cascading.batch_completed(cascade, 4, 0.06, 0.0)
    state = cascading.state(0.0)
    assert state.slowdown > 1
    assert state.latencies_s[0][3] > 0.05
    assert state.latencies_s[cascade.index][3] == pytest.approx(state.latencies_s[0][3] + 0.12)
    assert state.latencies_s[catalog.best.index][3] == 0.2


def test_the_engine_counts_as_free_after_the_first_look_of_a_cascade(cascading: Scheduler) -> None:
    cascade = cascade_of(cascading)
    always = Scheduler(cascading.catalog, lambda state: BatchDecision(cascade, tuple(state.queue)), 4)
    fill(always, waits(5.0))
    always.next_batch(1.0)
    assert always.free_at == pytest.approx(1.02)


def test_other_work_of_the_engine_delays_a_new_request_until_it_ends(scheduler: Scheduler) -> None:
    scheduler.engine_taken(0.1)
    assert refusal_s(scheduler, waits(0.11), now=0.0) == pytest.approx(0.01)
    scheduler.admit(waits(0.13), 0.0)
    scheduler.engine_taken(0.05)
    scheduler.admit(waits(0.11), 0.05)


def test_a_refined_profile_takes_effect_at_once(scheduler: Scheduler, catalog: VariantCatalog) -> None:
    request = waits(1.0)
    scheduler.admit(request, 0.0)
    scheduler.enqueue(request)
    (before, *_), after = scheduler.catalog.variants, catalog.variants[0]
    assert scheduler.preview(waits(2.0), 0.0).variant == scheduler.catalog.best
    scheduler.profile_refined(catalog, catalog)  # a hundred times slower
    assert scheduler.catalog is catalog
    assert scheduler.state(0.0).latency_s(0, 1) == pytest.approx(after.latency_by_batch_s[0])
    assert scheduler.predict(before, 1, 0.0) == pytest.approx(after.latency_by_batch_s[0])
    assert scheduler.next_batch(0.0).expired == (request,)


def test_a_scheduler_that_takes_over_plans_like_its_predecessor(
    scheduler: Scheduler, fast_catalog: VariantCatalog
) -> None:
    """Without that, it would take its first request for the whole traffic, and choose the best level."""
    other = Scheduler(fast_catalog, choose_level, 4)
    for number in range(200):
        now = 0.02 * number
        (request,) = fill(scheduler, waits(now + 0.3, budget_s=0.3), now=now)
        scheduler.withdraw(request)
    completed(scheduler, 0, 1, 0.04, 4.0, turnaround_s=0.02)
    for _ in range(3):
        scheduler.deadline_missed(4.0)
    scheduler.machine_observed(1.7)
    scheduler.engine_taken(4.05)
    fill(other, waits(4.3, budget_s=0.3), now=4.0)
    other.take_over(scheduler)
    before, after = scheduler.state(4.0), other.state(4.0)
    assert after.arrival_rate == pytest.approx(before.arrival_rate)
    assert after.arrival_rate > 40
    assert after.sustained_rate == pytest.approx(before.sustained_rate)
    assert (after.slowdown, after.tail_factor) == (before.slowdown, before.tail_factor)
    assert after.overhead_factor == before.overhead_factor > 1
    assert after.safety_factor == before.safety_factor > 1
    assert (len(after.recent), after.tight_budget_s) == (REMEMBERED_REQUESTS, 0.3)
    assert (other.prior_slowdown, other.free_at) == (1.7, 4.05)
    assert len(other) == 1
    assert not index(other.next_batch(4.0))


def test_take_over_copies_the_estimates(scheduler: Scheduler, fast_catalog: VariantCatalog) -> None:
    other = Scheduler(fast_catalog, choose_level, 4)
    other.take_over(scheduler)
    fill(other, waits(9.0))
    other.deadline_missed(0.0)
    assert scheduler.state(0.0).safety_factor == 1.0
    assert (len(scheduler.state(0.0).recent), scheduler.state(0.0).arrival_rate) == (0, 0.0)


def test_take_over_translates_grants_into_the_levels_of_the_new_catalog(
    scheduler: Scheduler, fast_catalog: VariantCatalog
) -> None:
    """In another catalog the same index is another sub-network, or none."""
    fewer = replace(fast_catalog, num_levels=2)
    other = Scheduler(fewer, choose_level, 4)
    fill(scheduler, waits(9.0, pinned=2), waits(9.0))
    other.take_over(scheduler)
    assert {each.grant for each in other.state(0.0).recent} == {fewer.grant_within(None)}
