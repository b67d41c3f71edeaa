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
    """The estimate after a batch each millisecond, up to 0."""
    slowdown = Slowdown()
    for index, factor in enumerate(observed):
        slowdown = slowdown.updated(factor, (index + 1 - len(observed)) / 1000)
    return slowdown


def test_before_the_first_batch_the_machines_load_alone_counts() -> None:
    assert Slowdown().predict(5.0, prior=1.5) == 1.5


def test_batches_as_profiled_are_predicted_as_profiled() -> None:
    assert after(1.0, 1.0, 1.0).predict(0.0, prior=3.0) == pytest.approx(1.0)


@pytest.mark.parametrize("neighbour", [1.5, 2.0, 3.0])
def test_a_noisy_neighbour_is_followed_within_three_batches_and_forgotten_within_five(neighbour: float) -> None:
    there = after(1.0, *[neighbour] * 3)
    assert there.factor == pytest.approx(neighbour, rel=0.12)
    assert there.predict(0.0, prior=1.0) > 0.9 * neighbour
    gone = after(1.0, *[neighbour] * 3, *[1.0] * 5)
    assert gone.factor == pytest.approx(1.0, rel=0.05)
    settled = after(1.0, *[neighbour] * 3, *[1.0] * 30)
    assert settled.predict(0.0, prior=9.0) == pytest.approx(1.0, rel=0.02)


def test_one_hiccup_of_ten_times_is_no_neighbour() -> None:
    assert after(1.0, 10.0).factor < 2
    assert after(1.0, 10.0, 1.0, 1.0, 1.0).factor < 1.1


def test_the_more_batches_vary_the_more_is_allowed_for() -> None:
    steady, wavering, wild = (after(*(1 + spread * (-1) ** turn for turn in range(40))) for spread in (0.0, 0.1, 0.3))
    margins = [slowdown.predict(0.0, prior=1.0, spreads=1.0) - slowdown.factor for slowdown in (steady, wavering, wild)]
    assert margins[0] == pytest.approx(0.0)
    assert margins[0] < margins[1] < margins[2] < 0.5


def test_the_factor_never_turns_negative() -> None:
    assert after(*[5.0] * 9, *[1e-6] * 50).factor > 0


def test_without_news_the_estimate_turns_to_what_the_machines_load_lets_expect() -> None:
    slowdown = after(*[3.0] * 60)
    at_once, stale, old = (slowdown.predict(age_s, prior=1.0) for age_s in (0.0, STALE_AFTER_S, 60.0))
    assert at_once == pytest.approx(3.0, rel=0.01)
    assert stale == pytest.approx(1 + (at_once - 1) / math.e)
    assert old == pytest.approx(1.0)
    assert slowdown.predict(-1.0, prior=1.0) == at_once  # a clock read before the batch's end makes it no truer


def test_misses_raise_the_safety_factor_and_answers_in_time_let_it_fade() -> None:
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


def test_the_safety_factor_fades_with_time_alone() -> None:
    safety_factor = SafetyFactor()
    safety_factor.observe(0, 10, now=0.0)
    factor = safety_factor.read(0.0)
    assert safety_factor.read(SAFETY_FACTOR_DECAY_S) == pytest.approx(1 + (factor - 1) / math.e)
    assert safety_factor.read(100 * SAFETY_FACTOR_DECAY_S) == pytest.approx(1.0)


def test_a_delay_leaves_room_for_its_spread_and_fades_without_news() -> None:
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


def test_the_rate_of_arrivals_is_right_from_the_first_moments_and_follows() -> None:
    rate = ArrivalRate(0.5)
    for number in range(50):
        rate.count(number / 100)
    assert rate.read(0.5) == pytest.approx(100, rel=0.03)
    for number in range(50, 300):
        rate.count(number / 100)
    assert rate.read(3.0) == pytest.approx(100, rel=0.03)
    assert rate.read(3.5) == pytest.approx(100 / math.e, rel=0.03)
    assert rate.read(60.0) == pytest.approx(0.0, abs=1e-9)


def test_a_budget_counts_as_long_as_it_is_recent() -> None:
    traffic = TrafficEstimator()
    budgets_s = [0.5] * REMEMBERED_REQUESTS + [9.0] * REMEMBERED_REQUESTS
    for place, budget_s in enumerate(budgets_s, start=1):
        traffic.remember(constraints_for(budget_s, 0))
        recent = sorted(budgets_s[:place][-REMEMBERED_REQUESTS:])
        assert traffic.tight_budget_s == recent[int(TIGHT_QUANTILE * len(recent))]
    assert traffic.tight_budget_s == 9.0
