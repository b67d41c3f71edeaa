"""Three levels and one dominated variant, small enough to work out every decision by hand; times in milliseconds."""

import math
import random
from dataclasses import replace

import pytest

from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.errors import InvalidParameterError
from service.scheduling.baseline_policies import granted
from service.scheduling.catalog import VariantCatalog
from service.scheduling.level_policy import choose_level
from service.scheduling.policies import POLICIES, find_policy, policy_names
from service.scheduling.state import BatchDecision, QueuedRequest, SchedulerState, target
from tests.service.granting import constraints_for

# Milliseconds of batches of 1 to 4, MACs and top-1. The second is dominated: it is available by name only.
ROWS = {
    SubNetwork(8, 0.5): ((10, 12, 14, 16), 1_000_000_000, 0.70),
    SubNetwork(8, 1.0): ((15, 20, 25, 30), 1_500_000_000, 0.69),
    SubNetwork(10, 0.5): ((20, 26, 32, 38), 2_000_000_000, 0.75),
    SubNetwork(14, 1.0): ((40, 55, 70, 85), 4_000_000_000, 0.80),
}
CATALOG = VariantCatalog.of(
    ProfileTable(tuple(SubNetworkProfile(sub, macs, top1) for sub, (_, macs, top1) in ROWS.items())),
    LatencyTable((1, 2, 3, 4), {sub: tuple(ms / 1000 for ms in figures) for sub, (figures, _, _) in ROWS.items()}),
)
CHEAP, MIDDLE, BEST, NAMED = range(4)
NAMES = policy_names(CATALOG)


def index(decision: BatchDecision) -> int | None:
    return None if decision.variant is None else decision.variant.index


def request(deadline_ms: float, highest_level: int = BEST, pinned: int | None = None) -> QueuedRequest:
    named = None if pinned is None else CATALOG.variants[pinned]
    return QueuedRequest(
        deadline_ms / 1000, constraints_for(0.1, highest_level, named, CATALOG.variants[highest_level])
    )


def moment(
    *queue: QueuedRequest, slowdown: float = 1.0, rate: float = 30.0, now: float = 0.0, tight_budget_ms: float = 200
) -> SchedulerState:
    return SchedulerState(
        now=now,
        queue=sorted(queue, key=lambda one: one.deadline_at),
        catalog=CATALOG,
        latencies_s=[variant.latency_by_batch_s for variant in CATALOG.variants],
        slowdown=slowdown,
        tail_factor=1.0,
        overhead_factor=1.0,
        max_batch_size=4,
        arrival_rate=rate,
        recent=[one.constraints for one in queue],
        tight_budget_s=tight_budget_ms / 1000,
    )


def choose(name: str, state: SchedulerState, max_batch_size: int = 4) -> BatchDecision:
    return find_policy(name, CATALOG).make(CATALOG, max_batch_size)(state)


@pytest.mark.parametrize(
    ("name", "variant", "served"),
    [
        ("max-accuracy", MIDDLE, 2),  # 40 is too long for the head, 20 is not; two of the middle take 26
        ("max-batch", CHEAP, 3),  # three fit; three of the middle would take 32
        ("slackfit", CHEAP, 3),  # the bucket under 30 ends at 28.75: four of the cheapest are the most that fit
        ("slackfit-capped", CHEAP, 3),  # three of the cheapest; three of the middle would take 32
        ("slackfit-estimate", CHEAP, 3),
        ("infaas", CHEAP, 3),
        ("proteus", MIDDLE, 2),  # in half of 80 ms the best answers one, so 25 a second, too few for 30
        ("step-down", CHEAP, 3),  # one step for three waiting; three of the middle take 32; another step
        ("step-down-drop", CHEAP, 3),
        ("fixed-8-0.5", CHEAP, 3),
    ],
)
def test_each_policy_decides_as_worked_out_for_three_requests_with_30_60_and_100_ms_left(
    name: str, variant: int, served: int
) -> None:
    state = moment(request(30), request(60), request(100), tight_budget_ms=80)
    decision = choose(name, state)
    assert (index(decision), len(decision.batch)) == (variant, served)
    assert decision.batch == tuple(state.queue[:served])
    assert not decision.expired
    assert not decision.shed


def test_slackfit_chooses_the_level_for_its_largest_batch_and_slackfit_capped_for_the_queue() -> None:
    """The bucket under 40.5 ms ends at 10 + 13 * 75 / 32 = 40.47: four of the middle take 38, one of the best 40."""
    state = moment(request(40.5))
    assert index(choose("slackfit", state)) == MIDDLE
    assert index(choose("slackfit-capped", state)) == BEST


def test_slackfit_plans_no_batch_above_the_size_limit() -> None:
    """With at most two, the bucket under 30 ms ends at 10 + 14 * 45 / 32 = 29.7, where two of the middle fit."""
    state = replace(moment(request(30), request(60), request(100)), max_batch_size=2)
    decision = choose("slackfit", state, max_batch_size=2)
    assert (index(decision), len(decision.batch)) == (MIDDLE, 2)


def test_only_slackfit_estimate_accounts_for_a_slowdown() -> None:
    """At a slowdown of 4, the cheapest takes 40 ms: the head expires, and the next has room for two, 48 ms."""
    queue = [request(30), request(60), request(100)]
    state = moment(*queue, slowdown=4)
    published, estimate = choose("slackfit", state), choose("slackfit-estimate", state)
    assert (published.expired, published.batch) == ((), tuple(queue))
    assert (estimate.expired, estimate.batch, index(estimate)) == ((queue[0],), tuple(queue[1:]), CHEAP)


@pytest.mark.parametrize(("waiting", "variant"), [(1, BEST), (2, MIDDLE), (3, MIDDLE), (4, CHEAP), (9, CHEAP)])
def test_step_down_lowers_the_level_by_one_per_two_waiting_requests(waiting: int, variant: int) -> None:
    assert index(choose("step-down", moment(*(request(1000) for _ in range(waiting))))) == variant


def test_step_down_accounts_for_the_slowdown() -> None:
    """With 70 ms left: the best takes 40 ms, or 80 ms at a slowdown of 2, where the middle takes 40 ms."""
    assert index(choose("step-down", moment(request(70)))) == BEST
    assert index(choose("step-down", moment(request(70), slowdown=2))) == MIDDLE


def test_a_fixed_sub_network_lets_requests_expire_that_it_cannot_answer_in_time() -> None:
    """The best takes 40 ms, too long for the first request; the other two together take 55 ms."""
    queue = [request(30), request(60), request(100)]
    decision = choose("fixed-14-1", moment(*queue))
    assert (decision.expired, decision.shed, decision.batch) == ((queue[0],), (), tuple(queue[1:]))


def test_a_fixed_sub_network_sheds_a_request_that_only_a_small_batch_would_answer() -> None:
    """Three of the best take 70 ms, so the first would have to run alone; the other two together take 55 ms."""
    queue = [request(45), request(100), request(100)]
    decision = choose("fixed-14-1", moment(*queue))
    assert (decision.expired, decision.shed, decision.batch) == ((), (queue[0],), tuple(queue[1:]))


def test_early_drop_plans_with_batches_of_at_most_half_a_tight_budget() -> None:
    """In half of 90 ms the best answers one at a time, so nothing is shed for a larger batch."""
    queue = [request(45), request(100), request(100)]
    decision = choose("fixed-14-1", moment(*queue, tight_budget_ms=90))
    assert (decision.shed, decision.batch) == ((), (queue[0],))


def test_early_drop_never_sheds_the_last_request() -> None:
    alone = request(41)
    assert choose("fixed-14-1", moment(alone, tight_budget_ms=1)).batch == (alone,)


def test_a_proteus_plan_holds_for_its_period_whatever_arrives() -> None:
    policy = find_policy("proteus", CATALOG).make(CATALOG, 4)
    assert index(policy(moment(request(1000), rate=1))) == BEST
    assert index(policy(moment(request(5900), rate=200, now=4.9))) == BEST
    assert index(policy(moment(request(6000), rate=200, now=5.0))) == CHEAP  # four in 16 ms, 250/s
    assert index(find_policy("proteus", CATALOG).make(CATALOG, 4)(moment(request(1000), rate=40))) == BEST, (
        "each policy has its own plan"
    )


@pytest.mark.parametrize(("rate", "variant"), [(44.8, BEST), (45, MIDDLE), (100, MIDDLE), (101, CHEAP), (999, CHEAP)])
def test_a_proteus_plan_is_the_most_accurate_level_that_carries_the_demand_plus_a_twentieth(
    rate: float, variant: int
) -> None:
    """Four of the best take 85 of 100 ms: 47.06/s; four of the middle take 38 ms: 105.26/s."""
    assert index(choose("proteus", moment(request(1000), rate=rate))) == variant


def test_a_request_limited_below_the_wanted_level_runs_at_its_limit_with_requests_like_it() -> None:
    queue = [request(500), request(600, highest_level=MIDDLE), request(700), request(800, pinned=NAMED)]
    assert choose("max-accuracy", moment(*queue)).batch == (queue[0], queue[2])
    limited = choose("max-accuracy", moment(*queue[1:]))
    assert (index(limited), limited.batch) == (MIDDLE, (queue[1],))
    assert index(choose("max-accuracy", moment(queue[3]))) == NAMED


def test_a_fixed_dominated_sub_network_runs_for_all_requests_that_grant_its_cost() -> None:
    decision = choose(
        "fixed-8-1", moment(request(500), request(600, highest_level=CHEAP), request(700, highest_level=MIDDLE))
    )
    assert (index(decision), len(decision.batch)) == (NAMED, 2)


@pytest.mark.parametrize("level", [CHEAP, MIDDLE, BEST])
def test_baselines_grant_at_a_level_the_variant_that_the_level_policy_would_run(level: int) -> None:
    named = CATALOG.variants[NAMED]
    for highest_level in (CHEAP, MIDDLE, BEST):
        for pinned, over_limit in ((None, None), (named, None), (None, named)):
            constraints = constraints_for(0.1, highest_level, pinned, over_limit)
            assert granted(CATALOG, constraints, level) == target(constraints, level)


def test_a_variant_that_is_no_level_is_granted_where_the_limit_admits_it() -> None:
    assert granted(CATALOG, constraints_for(0.1, CHEAP, over_limit=CATALOG.variants[NAMED]), NAMED) == NAMED
    assert granted(CATALOG, constraints_for(0.1, CHEAP, over_limit=CATALOG.lowest), NAMED) == CHEAP
    assert granted(CATALOG, constraints_for(0.1, BEST, pinned=CATALOG.lowest), NAMED) == CHEAP


def random_moment(rng: random.Random) -> SchedulerState:
    queue = [
        request(
            rng.choice((0, 9, 15, 40, 80, 200, 1000)) * rng.random(), rng.randrange(3), rng.choice((None, None, NAMED))
        )
        for _ in range(rng.randint(1, 30))
    ]
    tight_ms = rng.choice((5, 100, math.inf))
    return moment(*queue, slowdown=rng.choice((0.5, 1, 3)), rate=rng.choice((0, 10, 500)), tight_budget_ms=tight_ms)


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_serves_or_drops_at_least_one_request_and_none_twice(name: str) -> None:
    rng = random.Random(0)
    policy = find_policy(name, CATALOG).make(CATALOG, 4)
    for _ in range(500):
        state = random_moment(rng)
        decision = policy(state)
        dealt_with = [*decision.batch, *decision.expired, *decision.shed]
        assert dealt_with
        assert len(set(dealt_with)) == len(dealt_with)
        assert set(dealt_with) <= set(state.queue)
        assert (decision.variant is None) == (not decision.batch)
        assert len(decision.batch) <= 4
        assert decision.reason.policy == ("" if name == "level" or not decision.batch else name)


@pytest.mark.parametrize("name", NAMES)
def test_no_policy_ever_exceeds_what_a_request_grants(name: str) -> None:
    rng = random.Random(1)
    policy = find_policy(name, CATALOG).make(CATALOG, 4)
    for _ in range(500):
        decision = policy(random_moment(rng))
        for one in decision.batch:
            assert decision.variant is not None
            grant = one.constraints.grant
            if grant.is_pinned:
                assert decision.variant == grant.best
            else:
                assert decision.variant.most_gflops <= grant.best.most_gflops


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"level"}))
def test_every_baseline_answers_its_head_in_time_by_the_latencies_that_it_knows(name: str) -> None:
    rng = random.Random(2)
    policy = find_policy(name, CATALOG).make(CATALOG, 4)
    for _ in range(500):
        state = random_moment(rng)
        decision = policy(state)
        if decision.variant is not None:
            seconds = decision.variant.latency_by_batch_s[len(decision.batch) - 1]
            estimates = name.startswith("step-down") or name == "slackfit-estimate"
            factor = state.slowdown if estimates else 1.0
            assert seconds * factor <= decision.batch[0].deadline_at + 1e-9


def test_policies_are_listed_and_found_by_name() -> None:
    assert NAMES[0] == "level"
    assert set(NAMES) >= {"slackfit", "infaas", "fixed-8-0.5", "fixed-8-1", "fixed-14-1"}
    assert [find_policy(name, CATALOG).name for name in NAMES] == list(NAMES)
    assert find_policy("level", CATALOG).make(CATALOG, 16) is choose_level
    assert [policy.name for policy in POLICIES if policy.rejects_early] == ["level"]


def test_an_unknown_policy_is_rejected_with_the_known_names() -> None:
    said = r"unknown policy fixed-9-1; .*slackfit-capped.*fixed-14-1"
    with pytest.raises(InvalidParameterError, match=said) as caught:
        find_policy("fixed-9-1", CATALOG)
    assert caught.value.details["parameter"] == "policy"
