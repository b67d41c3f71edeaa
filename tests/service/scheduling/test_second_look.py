from dataclasses import replace

import pytest

from models.latency import LatencyTable
from models.profiles import CascadeProfile, ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.domain import LookCode
from service.scheduling.catalog import VariantCatalog
from service.scheduling.second_look import Looked, next_look
from service.scheduling.state import QueuedRequest, RequestConstraints, SchedulerState, target
from tests.service.scheduling.test_level_policy import at_zero

SMALL, MIDDLE, LARGE = SubNetwork(2, 0.5), SubNetwork(3, 1.0), SubNetwork(4, 1.0)
CATALOG = VariantCatalog.of(
    ProfileTable(
        (
            SubNetworkProfile(SMALL, 100_000_000, 0.6),
            SubNetworkProfile(MIDDLE, 300_000_000, 0.7),
            SubNetworkProfile(LARGE, 900_000_000, 0.9),
        ),
        (CascadeProfile(SMALL, MIDDLE, threshold=0.8, share=0.3, top1=0.69),),
    ),
    LatencyTable((1,), {SMALL: (1.0,), MIDDLE: (2.0,), LARGE: (8.0,)}),
)
ALONE, CASCADE = CATALOG.levels[0], CATALOG.levels[1]
BEST = CATALOG.best
assert CASCADE.second_look is not None
assert BEST.profile.subnetwork == LARGE


def looked(
    confidence: float, *, due: float = 100.0, max_gflops: float = 9.0, min_confidence: float = 0.0, spent: float = 0.1
) -> Looked:
    constraints = RequestConstraints(due, CATALOG.grant_within(None), max_gflops, min_confidence)
    return Looked(QueuedRequest(due, constraints), confidence, round(1e9 * spent))


def now(**changes: float) -> SchedulerState:
    state = replace(at_zero(CATALOG, ()), max_batch_size=1)
    return replace(state, **changes)  # type: ignore[arg-type] # the keywords are attribute names


def looks_next(found: QueuedRequest | LookCode) -> SubNetwork | LookCode:
    if isinstance(found, LookCode):
        return found
    return CATALOG.variants[target(found.constraints, 0)].profile.subnetwork


@pytest.mark.parametrize(
    ("confidence", "following"),
    [(0.799, MIDDLE), (0.8, LookCode.SURE), (0.99, LookCode.SURE), (float("nan"), LookCode.SURE)],
)
def test_a_cascade_looks_again_below_its_threshold(confidence: float, following: SubNetwork | LookCode) -> None:
    assert looks_next(next_look(looked(confidence), CASCADE, now())) == following


def test_a_variant_without_a_second_look_looks_once_however_unsure_it_is() -> None:
    assert next_look(looked(0.1), ALONE, now()) is LookCode.SURE


def test_a_further_look_keeps_deadline_priority_and_limits_and_grants_one_variant() -> None:
    first = looked(0.5, due=7.0, min_confidence=0.6)
    again = next_look(first, CASCADE, now())
    assert isinstance(again, QueuedRequest)
    assert (again.deadline_at, again.priority, again.second_look_of) == (7.0, 0, first.request)
    assert again.constraints.min_confidence == 0.6
    assert {target(again.constraints, level) for level in range(CATALOG.num_levels)} == {
        again.constraints.grant.best.index
    }
    third = next_look(Looked(again, 0.5, 400_000_000), CATALOG.grant_named(MIDDLE).best, now(now=-9.0))
    assert isinstance(third, QueuedRequest)
    assert third.second_look_of is first.request, "not the second look"


@pytest.mark.parametrize(
    ("due", "following"), [(100.0, LARGE), (8.0, LARGE), (7.99, MIDDLE), (2.0, MIDDLE), (1.99, LookCode.DEADLINE)]
)
def test_a_minimum_confidence_gets_the_most_accurate_second_look_that_the_deadline_allows(
    due: float, following: SubNetwork | LookCode
) -> None:
    assert looks_next(next_look(looked(0.5, due=due, min_confidence=0.9), ALONE, now())) == following


@pytest.mark.parametrize(
    ("max_gflops", "following"), [(1.0, LARGE), (0.999, MIDDLE), (0.4, MIDDLE), (0.399, LookCode.BUDGET)]
)
def test_both_looks_together_stay_within_the_budget(max_gflops: float, following: SubNetwork | LookCode) -> None:
    found = next_look(looked(0.5, max_gflops=max_gflops, min_confidence=0.9), ALONE, now())
    assert looks_next(found) == following


def test_a_minimum_confidence_applies_besides_the_threshold_of_a_cascade() -> None:
    assert looks_next(next_look(looked(0.85, min_confidence=0.9), CASCADE, now())) == LARGE
    assert looks_next(next_look(looked(0.7, min_confidence=0.6), CASCADE, now())) == MIDDLE


def test_no_look_follows_the_most_accurate_variant() -> None:
    assert next_look(looked(0.5, min_confidence=0.9), BEST, now()) is LookCode.NONE_BETTER


@pytest.mark.parametrize(
    ("slowdown", "tail_factor", "following"),
    [(1.0, 1.0, MIDDLE), (1.3, 1.0, LookCode.DEADLINE), (1.0, 1.3, LookCode.DEADLINE)],
)
def test_a_second_look_must_fit_the_deadline_with_slowdown_and_tail_factor(
    slowdown: float, tail_factor: float, following: SubNetwork | LookCode
) -> None:
    state = now(slowdown=slowdown, tail_factor=tail_factor)
    assert looks_next(next_look(looked(0.5, due=2.5), CASCADE, state)) == following


def test_sustained_overload_prevents_second_looks() -> None:
    """The cheapest level answers one request per second."""
    burst, sustained = now(arrival_rate=1.1), now(arrival_rate=1.1, sustained_rate=1.1)
    assert looks_next(next_look(looked(0.5), CASCADE, burst)) == MIDDLE
    assert next_look(looked(0.5), CASCADE, sustained) is LookCode.OVERLOAD
    assert next_look(looked(0.9), CASCADE, sustained) is LookCode.SURE
