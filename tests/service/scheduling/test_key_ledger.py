import asyncio
from collections import Counter, deque
from contextlib import ExitStack, suppress
from dataclasses import replace

import pytest

from models.latency import LatencyTable
from service.domain import ApiKey
from service.errors import OverloadedError
from service.scheduling.catalog import VariantCatalog
from service.scheduling.key_ledger import ACTIVE_S, CREDIT_ANSWERS, Charge, KeyLedger
from service.scheduling.level_policy import choose_level
from service.scheduling.scheduler import Scheduler
from service.scheduling.state import BatchDecision, QueuedRequest, RequestConstraints
from tests.service.conftest import SECONDS

RATED = ApiKey("rated", gflops_per_s=10.0, burst_gflops=30.0)
SMALL, LARGE = ApiKey("small"), ApiKey("large")


def spend(ledger: KeyLedger, key: ApiKey, gflops: float, now: float) -> None:
    with ledger.charging(key, gflops, now) as charge:
        charge.spent_gflops = gflops


def break_off(ledger: KeyLedger, key: ApiKey, *, has_begun: bool) -> None:
    with suppress(asyncio.CancelledError), ledger.charging(key, 20.0, 0.0) as charge:
        charge.may_have_spent = has_begun
        raise asyncio.CancelledError


def test_a_key_without_a_rate_is_not_limited() -> None:
    ledger = KeyLedger(1.0)
    spend(ledger, SMALL, 1e9, 0.0)
    assert (ledger.left_gflops(SMALL, 0.0), ledger.wait_s(SMALL, 1e9, 0.0)) == (float("inf"), 0.0)


def test_a_rate_allows_a_burst_and_then_what_has_been_refilled() -> None:
    ledger = KeyLedger(1.0)
    assert ledger.left_gflops(RATED, 5.0) == 30.0
    spend(ledger, RATED, 28.0, 5.0)
    assert ledger.left_gflops(RATED, 5.0) == 2.0
    assert ledger.wait_s(RATED, 7.0, 5.0) == 0.5
    assert ledger.left_gflops(RATED, 5.5) == 7.0
    assert ledger.left_gflops(RATED, 60.0) == 30.0, "tokens are capped at the burst"


def test_a_request_that_costs_more_than_the_burst_is_never_allowed() -> None:
    assert KeyLedger(1.0).wait_s(RATED, 30.1, 0.0) == float("inf")


def test_the_most_a_request_may_cost_is_held_until_it_ends_and_the_rest_is_refunded() -> None:
    ledger = KeyLedger(1.0)
    with ledger.charging(RATED, 20.0, 0.0) as charge:
        assert ledger.left_gflops(RATED, 0.0) == 10.0
        charge.spent_gflops = 4.0
    assert ledger.left_gflops(RATED, 0.0) == 26.0


def test_failures_are_free_and_cancellations_after_work_has_begun_cost_the_cheapest_answer() -> None:
    ledger = KeyLedger(1.5)
    with pytest.raises(ValueError, match="failed"), ledger.charging(RATED, 20.0, 0.0):
        raise ValueError("failed")
    assert ledger.left_gflops(RATED, 0.0) == 30.0
    break_off(ledger, RATED, has_begun=False)
    assert ledger.left_gflops(RATED, 0.0) == 30.0
    break_off(ledger, RATED, has_begun=True)
    assert ledger.left_gflops(RATED, 0.0) == 28.5


def test_the_charge_is_observed_once_a_request_is_answered_or_cancelled() -> None:
    told: list[tuple[str, float]] = []
    ledger = KeyLedger(1.5, observe=lambda *charged: told.append(charged))
    with ledger.charging(RATED, 20.0, 0.0) as charge:
        charge.spent_gflops = 4.0
        assert not told
    break_off(ledger, SMALL, has_begun=True)
    assert told == [("rated", 4.0), ("small", 1.5)]


def test_work_besides_the_answer_is_charged_as_well() -> None:
    ledger = KeyLedger(1.0)
    for key in (RATED, SMALL):
        ledger.asked(key, 0.0)
    ledger.charge(RATED, 16.0, 0.0)
    assert ledger.left_gflops(RATED, 0.0) == 14.0
    assert ledger.demotion(RATED, 0.0) == 3 / 12


def test_each_of_several_processes_grants_its_share_of_the_rate_and_of_the_requests_in_flight() -> None:
    ledger, key = KeyLedger(1.0, 0.5), replace(RATED, max_in_flight=3)
    spend(ledger, key, 15.0, 0.0)
    assert ledger.left_gflops(key, 1.0) == 5.0
    assert ledger.left_gflops(key, 60.0) == 15.0
    assert KeyLedger(9.0, 0.1).left_gflops(key, 0.0) == 9.0, "otherwise no answer would ever fit"
    with ledger.charging(key, 0.0, 0.0), ledger.charging(key, 0.0, 0.0), pytest.raises(OverloadedError):
        ledger.charging(key, 0.0, 0.0).__enter__()


def test_the_requests_in_flight_of_a_key_are_limited() -> None:
    ledger, key = KeyLedger(1.0), ApiKey("few", max_in_flight=1)
    with ledger.charging(key, 1.0, 0.0):
        with pytest.raises(OverloadedError, match="1 requests with this key") as caught:
            ledger.charging(key, 1.0, 0.0).__enter__()
        assert caught.value.reason == "key"
        ledger.charging(SMALL, 1.0, 0.0).__enter__()
    spend(ledger, key, 1.0, 0.0)


def test_a_request_without_a_key_is_accepted_and_charged_to_no_key() -> None:
    charged = list[str]()
    with KeyLedger(1.0, observe=lambda name, _: charged.append(name)).charging(None, 5.0, 0.0) as charge:
        charge.spent_gflops = 5.0
    assert charged == []


def test_the_demotion_of_a_key_grows_with_its_lead_over_other_active_keys() -> None:
    ledger = KeyLedger(1.0)
    ledger.asked(LARGE, 0.0)
    spend(ledger, LARGE, CREDIT_ANSWERS / 4, 0.0)
    assert ledger.demotion(LARGE, 0.0) == 0.0, "it is the only active key"
    ledger.asked(SMALL, 0.0)
    assert ledger.demotion(SMALL, 0.0) == 0.0
    demotions = []
    for answers in (2.0, 2.0, 4.0, 8.0, 48.0):
        spend(ledger, LARGE, answers, 0.1)
        demotions.append(ledger.demotion(LARGE, 0.1))
    assert demotions == [0.0, 1 / 12, 2 / 12, 3 / 12, 5 / 12], "one step from four answers on, one per doubling"
    spend(ledger, LARGE, 10 * CREDIT_ANSWERS, 0.1)
    assert ledger.demotion(LARGE, 0.1) == 0.5, "never as far as the next lower priority"
    assert ledger.demotion(LARGE, 0.2 + ACTIVE_S) == 0.0, "the other key is no longer active"


def test_an_idle_key_earns_no_credit() -> None:
    ledger = KeyLedger(1.0)
    for second in range(100):
        ledger.asked(LARGE, second)
        spend(ledger, LARGE, 1000.0, second)
    ledger.asked(SMALL, 100.0)
    ledger.asked(LARGE, 100.0)
    assert ledger.demotion(LARGE, 100.0) == 0.0


class Shared:
    """Requests of several keys in virtual time, each with a budget of 0.4 s; the cheapest level answers 80/s."""

    def __init__(self, catalog: VariantCatalog) -> None:
        hundredths = {each: tuple(second / 100 for second in seconds) for each, seconds in SECONDS.items()}
        self.catalog = catalog = catalog.with_latencies(LatencyTable((1, 2, 3, 4), hundredths))
        self.ledger = KeyLedger(catalog.lowest.gflops)
        self.scheduler = Scheduler(catalog, choose_level, 4)
        self.charges: dict[QueuedRequest, tuple[ApiKey, ExitStack, Charge]] = {}
        self.answered, self.asked = Counter[str](), Counter[str]()

    def run(self, requests_per_s: dict[ApiKey, float], seconds: float = 10.0) -> dict[str, float]:
        """Send evenly spaced requests; return the share of the answers that each key got."""
        arrivals = sorted(
            ((n + 0.5) / rate, key.name, key)
            for key, rate in requests_per_s.items()
            for n in range(int(rate * seconds))
        )
        coming = deque((at, key) for at, _, key in arrivals)
        now = 0.0
        while coming:
            while coming and coming[0][0] <= now:
                self.arrive(*coming.popleft())
            decision = self.scheduler.next_batch(now)
            self.end(decision)
            if decision.variant is not None:
                took_s = decision.variant.latency_by_batch_s[len(decision.batch) - 1]
                now += took_s
                self.scheduler.batch_completed(decision.variant, len(decision.batch), took_s, now)
            elif coming:
                now = max(now, coming[0][0])
        return {name: count / self.answered.total() for name, count in self.answered.items()}

    def arrive(self, at: float, key: ApiKey) -> None:
        self.asked[key.name] += 1
        self.ledger.asked(key, at)
        constraints = RequestConstraints(0.4, self.catalog.grant_within(None))
        request = QueuedRequest(at + 0.4, constraints, -self.ledger.demotion(key, at))
        with suppress(OverloadedError):
            self.scheduler.admit(request, at)
            self.scheduler.enqueue(request)
            stack = ExitStack()
            self.charges[request] = key, stack, stack.enter_context(self.ledger.charging(key, 1.0, at))

    def end(self, decision: BatchDecision) -> None:
        for request in decision.removed:
            key, stack, charge = self.charges.pop(request)
            if decision.variant is not None and request in decision.batch:
                self.answered[key.name] += 1
                charge.spent_gflops = decision.variant.gflops
            stack.close()


def test_a_key_that_asks_for_less_than_its_share_gets_all_of_it_at_three_times_the_capacity(
    catalog: VariantCatalog,
) -> None:
    shared = Shared(catalog)
    shared.run({SMALL: 240 / 11, LARGE: 2400 / 11})
    waiting = sum(key is SMALL for key, *_ in shared.charges.values())
    assert shared.answered["small"] + waiting == shared.asked["small"], "none was rejected, expired or shed"
    assert sum(shared.answered.values()) >= 0.95 * 80 * 10, "the other key gets the rest"


@pytest.mark.parametrize(("small", "large"), [(1.0, 1.0), (1.0, 3.0), (0.01, 0.03), (100.0, 300.0)])
@pytest.mark.parametrize("seconds", [2.0, 10.0])
def test_keys_that_exceed_the_capacity_share_it_by_their_weights_whichever_sends_more(
    catalog: VariantCatalog, small: float, large: float, seconds: float
) -> None:
    keys = {replace(SMALL, weight=small): 90.0, replace(LARGE, weight=large): 900.0}
    share = Shared(catalog).run(keys, seconds)
    assert share["small"] == pytest.approx(small / (small + large), rel=0.1)


def test_a_key_that_asks_for_little_does_not_distort_the_shares_of_others(catalog: VariantCatalog) -> None:
    heavy, light, little = (ApiKey(name, weight=weight) for name, weight in (("a", 10.0), ("b", 1.0), ("c", 1.0)))
    share = Shared(catalog).run({heavy: 300.0, light: 300.0, little: 2.0})
    assert share["b"] / (share["a"] + share["b"]) == pytest.approx(1 / 11, rel=0.2)


def test_a_key_of_far_higher_weight_gets_most_of_the_capacity(catalog: VariantCatalog) -> None:
    shared = Shared(catalog)
    share = shared.run({SMALL: 900.0, replace(LARGE, weight=1e9): 90.0})
    assert share["small"] < 0.15


def test_the_burst_of_a_process_allows_an_answer_of_the_model_that_is_served() -> None:
    ledger, key = KeyLedger(0.5, 0.25), ApiKey("expensive", gflops_per_s=10.0, burst_gflops=10.0)
    assert ledger.wait_s(key, 4.0, 0.0) == float("inf")
    ledger.answer_gflops = 4.0
    assert ledger.wait_s(key, 4.0, 0.0) < float("inf")
