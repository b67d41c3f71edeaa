import math

import pytest

from service.scheduling.estimators import (
    MAX_SAFETY_FACTOR,
    REMEMBERED_REQUESTS,
    SAFETY_FACTOR_DECAY_S,
    STALE_AFTER_S,
    TIGHT_QUANTILE,
    ArrivalRate,
    DelayEstimator,
    SafetyFactor,
    Slowdown,
    TrafficEstimator,
)
from tests.service.granting import constraints_for


def after(*observed: float) -> Slowdown:
    """Return the estimate after one batch per millisecond, the last at 0."""
    slowdown = Slowdown()
    for index, factor in enumerate(observed):
        slowdown = slowdown.updated(factor, (index + 1 - len(observed)) / 1000)
    return slowdown


def test_before_the_first_batch_the_slowdown_is_the_prior() -> None:
    assert Slowdown().predict(5.0, prior=1.5) == 1.5


def test_after_batches_as_profiled_the_slowdown_is_one() -> None:
    assert after(1.0, 1.0, 1.0).predict(0.0, prior=3.0) == pytest.approx(1.0)


@pytest.mark.parametrize("neighbour", [1.5, 2.0, 3.0])
def test_the_slowdown_follows_a_noisy_neighbour_within_three_batches_and_forgets_it_within_five(
    neighbour: float,
) -> None:
    there = after(1.0, *[neighbour] * 3)
    assert there.factor == pytest.approx(neighbour, rel=0.12)
    assert there.predict(0.0, prior=1.0) > 0.9 * neighbour
    gone = after(1.0, *[neighbour] * 3, *[1.0] * 5)
    assert gone.factor == pytest.approx(1.0, rel=0.05)
    settled = after(1.0, *[neighbour] * 3, *[1.0] * 30)
    assert settled.predict(0.0, prior=9.0) == pytest.approx(1.0, rel=0.02)


def test_a_single_batch_that_takes_ten_times_as_long_raises_the_slowdown_only_a_little() -> None:
    assert after(1.0, 10.0).factor < 2
    assert after(1.0, 10.0, 1.0, 1.0, 1.0).factor < 1.1


def test_the_margin_of_the_slowdown_grows_with_the_spread_of_the_batches() -> None:
    steady, wavering, wild = (after(*(1 + spread * (-1) ** turn for turn in range(40))) for spread in (0.0, 0.1, 0.3))
    margins = [slowdown.predict(0.0, prior=1.0, spreads=1.0) - slowdown.factor for slowdown in (steady, wavering, wild)]
    assert margins[0] == pytest.approx(0.0)
    assert margins[0] < margins[1] < margins[2] < 0.5


def test_the_slowdown_never_turns_negative() -> None:
    assert after(*[5.0] * 9, *[1e-6] * 50).factor > 0


def test_without_new_batches_the_slowdown_decays_to_the_prior() -> None:
    slowdown = after(*[3.0] * 60)
    at_once, stale, old = (slowdown.predict(age_s, prior=1.0) for age_s in (0.0, STALE_AFTER_S, 60.0))
    assert at_once == pytest.approx(3.0, rel=0.01)
    assert stale == pytest.approx(1 + (at_once - 1) / math.e)
    assert old == pytest.approx(1.0)
    assert slowdown.predict(-1.0, prior=1.0) == at_once  # a clock read before the batch's end adds no trust


def test_misses_raise_the_safety_factor_and_answers_in_time_lower_it() -> None:
    safety_factor = SafetyFactor()
    safety_factor.observe(100, 0, now=0.0)
    assert safety_factor.read(0.0) == 1.0
    safety_factor.observe(0, 5, now=0.0)
    assert safety_factor.read(0.0) == pytest.approx(2.5, abs=0.02)
    before = safety_factor.read(0.0)
    safety_factor.observe(99, 1, now=0.0)  # one in a hundred is tolerated
    assert safety_factor.read(0.0) == pytest.approx(before)
    safety_factor.observe(100, 0, now=0.0)
    assert safety_factor.read(0.0) == pytest.approx(before - 0.3)
    safety_factor.observe(0, 1000, now=0.0)
    assert safety_factor.read(0.0) == MAX_SAFETY_FACTOR


def test_the_safety_factor_decays_with_time() -> None:
    safety_factor = SafetyFactor()
    safety_factor.observe(0, 10, now=0.0)
    factor = safety_factor.read(0.0)
    assert safety_factor.read(SAFETY_FACTOR_DECAY_S) == pytest.approx(1 + (factor - 1) / math.e)
    assert safety_factor.read(100 * SAFETY_FACTOR_DECAY_S) == pytest.approx(1.0)


def test_a_delay_margin_includes_the_spread_and_fades_without_observations() -> None:
    delay = DelayEstimator()
    for _ in range(100):
        delay.observe(0.01, now=5.0)
    assert delay.margin_s(5.0) == pytest.approx(0.01, rel=0.1)
    for seconds in (0.0, 0.02) * 50:
        delay.observe(seconds, now=6.0)
    assert delay.margin_s(6.0) > 0.025
    assert delay.margin_s(8.0) < 0.001
    assert delay.expected_s(6.0) == pytest.approx(0.01, rel=0.1)
    assert delay.expected_s(8.0) < 0.001


def test_the_arrival_rate_is_right_from_the_start_and_decays_without_arrivals() -> None:
    rate = ArrivalRate(0.5)
    for number in range(50):
        rate.count(number / 100)
    assert rate.read(0.5) == pytest.approx(100, rel=0.03)
    for number in range(50, 300):
        rate.count(number / 100)
    assert rate.read(3.0) == pytest.approx(100, rel=0.03)
    assert rate.read(3.5) == pytest.approx(100 / math.e, rel=0.03)
    assert rate.read(60.0) == pytest.approx(0.0, abs=1e-9)


def test_the_tight_budget_is_a_quantile_of_the_recent_budgets() -> None:
    traffic = TrafficEstimator()
    budgets_s = [0.5] * REMEMBERED_REQUESTS + [9.0] * REMEMBERED_REQUESTS
    for place, budget_s in enumerate(budgets_s, start=1):
        traffic.remember(constraints_for(budget_s, 0))
        recent = sorted(budgets_s[:place][-REMEMBERED_REQUESTS:])
        assert traffic.tight_budget_s == recent[int(TIGHT_QUANTILE * len(recent))]
    assert traffic.tight_budget_s == 9.0


def test_what_was_slow_long_ago_does_not_come_back_with_the_next_observation() -> None:
    slow = Slowdown()
    for _ in range(50):
        slow = slow.updated(8.0, 0.0)
    assert slow.factor > 7
    assert slow.updated(1.0, 60.0).predict(60.0, prior=1.0) == pytest.approx(1.0)
    assert slow.updated(1.0, 0.0).factor > 3  # at once, it is only one of many observations
    delay = DelayEstimator(fades_s=1.0)
    for _ in range(100):
        delay.observe(0.5, 0.0)
    delay.observe(0.001, 60.0)
    assert delay.expected_s(60.0) == pytest.approx(0.001, rel=1e-3)
    assert delay.margin_s(60.0) < 0.02  # of 0.5, without deviations


def test_a_single_slow_observation_counts_no_more_after_a_pause() -> None:
    delay, rested = DelayEstimator(fades_s=1.0), DelayEstimator(fades_s=1.0)
    for each, now in ((delay, 0.0), (rested, 60.0)):
        each.observe(0.01, 0.0)
        each.observe(0.5, now)
    assert rested.mean_s == delay.mean_s
