from contextlib import ExitStack
from dataclasses import replace

import pytest

from models.latency import LatencyTable
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork
from service.domain import ApiKey, InferenceRequest
from service.errors import BudgetTooSmallError, InvalidParameterError, OverloadedError
from service.grants import allow, allow_priority, allow_time_ms, most_gflops_of
from service.scheduling.catalog import VariantCatalog
from service.scheduling.key_ledger import KeyLedger

ANY = InferenceRequest(0.0)
GRANTED_S = 0.25


def rated(catalog: VariantCatalog, answers: float) -> InferenceRequest:
    """Make a request whose key may spend, at once, the cost of `answers` answers at the cheapest variant."""
    burst = answers * catalog.lowest.gflops
    return replace(ANY, key=ApiKey("a", gflops_per_s=burst, burst_gflops=burst))


def test_without_a_key_only_the_budget_bounds_the_cost(catalog: VariantCatalog) -> None:
    allowed = allow(ANY, catalog, KeyLedger(1.0), 0.0, GRANTED_S)
    assert (allowed.grant.best, allowed.max_gflops, allowed.is_rated) == (catalog.best, float("inf"), False)
    assert allowed.budget_s == GRANTED_S
    budget = catalog.variants[1].gflops
    capped = allow(replace(ANY, budget_gflops=budget), catalog, KeyLedger(1.0), 0.0, GRANTED_S)
    assert (capped.grant.best, capped.max_gflops, capped.is_rated) == (catalog.variants[1], budget, False)


def test_a_rate_with_enough_left_does_not_bound_the_cost(catalog: VariantCatalog) -> None:
    allowed = allow(rated(catalog, 1000.0), catalog, KeyLedger(1.0), 0.0, GRANTED_S)
    assert (allowed.grant.best, allowed.is_rated) == (catalog.best, False)


@pytest.mark.parametrize(
    ("budget_gflops", "most", "is_rated"), [(None, 1.5, True), (1.25, 1.25, False), (9, 1.5, True)]
)
def test_a_rate_bounds_the_further_looks_of_a_request_that_wants_to_be_sure(
    catalog: VariantCatalog, budget_gflops: float | None, most: float, is_rated: bool
) -> None:
    best = catalog.best.gflops
    key = ApiKey("a", gflops_per_s=1.5 * best, burst_gflops=1.5 * best)
    request = replace(ANY, key=key, budget_gflops=budget_gflops and budget_gflops * best, min_confidence=0.9)
    allowed = allow(request, catalog, KeyLedger(1.0), 0.0, GRANTED_S)
    assert (allowed.grant.best, allowed.is_rated) == (catalog.best, is_rated)
    assert allowed.max_gflops == pytest.approx(most * best)
    assert most_gflops_of(allowed, catalog) == allowed.max_gflops
    assert most_gflops_of(replace(allowed, max_gflops=float("inf")), catalog) == 2 * best
    assert most_gflops_of(replace(allowed, min_confidence=0.0), catalog) == best


def test_a_rate_with_too_little_left_bounds_the_cost_by_what_is_left(catalog: VariantCatalog) -> None:
    request = rated(catalog, 1.5)
    allowed = allow(request, catalog, KeyLedger(1.0), 0.0, GRANTED_S)
    assert allowed.is_rated
    assert allowed.grant.best.most_gflops <= allowed.max_gflops == 1.5 * catalog.lowest.gflops


def test_a_rate_below_the_lowest_level_grants_a_cheaper_but_slower_sub_network(profiles: ProfileTable) -> None:
    cheapest, *others = profiles.rows
    slow = ProfileTable((replace(cheapest, slowness=1000.0), *others))
    catalog = VariantCatalog.of(slow, LatencyTable((1,), {row.subnetwork: (row.work,) for row in slow.rows}))
    assert catalog.least_gflops == cheapest.gflops < catalog.lowest.gflops
    key = ApiKey("a", gflops_per_s=1.0, burst_gflops=cheapest.gflops)
    allowed = allow(replace(ANY, key=key), catalog, KeyLedger(1.0), 0.0, GRANTED_S)
    assert allowed.grant.best.profile.subnetwork == cheapest.subnetwork


def test_a_used_up_rate_rejects_the_request_and_says_when_to_retry(catalog: VariantCatalog) -> None:
    request, ledger = rated(catalog, 2.0), KeyLedger(1.0)
    assert request.key is not None
    spent = ledger.charging(request.key, 1.5 * catalog.lowest.gflops, 0.0)
    with spent, pytest.raises(OverloadedError) as caught:
        allow(request, catalog, ledger, 0.0, GRANTED_S)
    assert (caught.value.reason, caught.value.details["retry_after_s"]) == ("key", 0.25)


def test_images_answered_together_each_leave_enough_of_the_rate_for_the_others(catalog: VariantCatalog) -> None:
    request, ledger, least = rated(catalog, 3.5), KeyLedger(1.0), catalog.lowest.gflops
    assert request.key is not None
    with ExitStack() as charges:
        for left in (3, 2, 1):
            allowed = allow(replace(request, num_together=left), catalog, ledger, 0.0, GRANTED_S)
            assert least <= allowed.grant.best.most_gflops <= allowed.max_gflops
            charges.enter_context(ledger.charging(request.key, allowed.grant.best.most_gflops, 0.0))
        assert ledger.left_gflops(request.key, 0.0) >= 0


def test_images_answered_together_are_rejected_until_all_of_them_fit_the_rate(catalog: VariantCatalog) -> None:
    request, ledger = rated(catalog, 4.0), KeyLedger(1.0)
    assert request.key is not None
    with ledger.charging(request.key, 3 * catalog.lowest.gflops, 0.0):
        allow(request, catalog, ledger, 0.0, GRANTED_S)
        with pytest.raises(OverloadedError) as caught:
            allow(replace(request, num_together=3), catalog, ledger, 0.0, GRANTED_S)
    assert caught.value.details["retry_after_s"] == pytest.approx(0.5)
    with pytest.raises(BudgetTooSmallError, match="more than this key may ever spend"):
        allow(replace(request, num_together=5), catalog, ledger, 0.0, GRANTED_S)


def test_a_sub_network_requested_by_name_must_fit_the_rate_at_its_own_cost(catalog: VariantCatalog) -> None:
    request = replace(rated(catalog, 1.1), subnetwork=SubNetwork(4, 1.0))
    with pytest.raises(BudgetTooSmallError, match="more than this key may ever spend"):
        allow(request, catalog, KeyLedger(1.0), 0.0, GRANTED_S)
    assert not allow(replace(request, subnetwork=SubNetwork(2, 0.5)), catalog, KeyLedger(1.0), 0.0, GRANTED_S).is_rated


def test_a_key_sets_the_shortest_latency_budget() -> None:
    request = replace(ANY, key=ApiKey("a", shortest_budget_ms=200.0))
    assert allow_time_ms(replace(request, budget_ms=200.0), 1000.0) == 200.0
    assert (allow_time_ms(request, 1000.0), allow_time_ms(request, 100.0)) == (1000.0, 200.0)
    with pytest.raises(BudgetTooSmallError, match="requires at least 200 ms"):
        allow_time_ms(replace(request, budget_ms=199.0), 1000.0)
    assert allow_time_ms(replace(ANY, budget_ms=1.0), 1000.0) == 1.0


def test_a_priority_defaults_to_0_and_is_at_most_what_the_key_allows() -> None:
    low, high = (replace(ANY, key=ApiKey("a", highest_priority=highest)) for highest in (-2, 5))
    assert [allow_priority(request) for request in (ANY, low, high)] == [0, -2, 0]
    assert allow_priority(replace(high, priority=5)) == 5
    for request in (replace(low, priority=-1), replace(high, priority=6), replace(ANY, priority=1)):
        with pytest.raises(InvalidParameterError, match="priority: must be at most"):
            allow_priority(request)
