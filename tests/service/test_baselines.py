"""A menu of three levels and one option by name, small enough to work every choice by hand; times in milliseconds."""

import math
import random
from dataclasses import replace

import pytest

from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.baselines import granted, make_policy, policy_names, refuses_early
from service.errors import InvalidParameterError
from service.menu import Menu
from service.policy import choose_level
from service.situation import Choice, Entry, Situation, Wish, target

# Milliseconds of batches of 1 to 4, MACs and top-1. The second is dominated: it can be had by name only.
ROWS = {
    SubNetwork(8, 0.5): ((10, 12, 14, 16), 1_000_000_000, 0.70),
    SubNetwork(8, 1.0): ((15, 20, 25, 30), 1_500_000_000, 0.69),
    SubNetwork(10, 0.5): ((20, 26, 32, 38), 2_000_000_000, 0.75),
    SubNetwork(14, 1.0): ((40, 55, 70, 85), 4_000_000_000, 0.80),
}
MENU = Menu.of(
    ProfileTable(tuple(SubNetworkProfile(sub, macs, top1) for sub, (_, macs, top1) in ROWS.items())),
    LatencyTable((1, 2, 3, 4), {sub: tuple(ms / 1000 for ms in figures) for sub, (figures, _, _) in ROWS.items()}),
)
CHEAP, MIDDLE, BEST, NAMED = range(4)
NAMES = policy_names(MENU)


def entry(deadline_ms: float, limit: int = BEST, only: int | None = None) -> Entry:
    return Entry(deadline_ms / 1000, Wish(0.1, limit, only))


def moment(
    *line: Entry, slowdown: float = 1.0, rate: float = 30.0, now: float = 0.0, tight_budget_ms: float = 200
) -> Situation:
    return Situation(
        now=now,
        line=sorted(line, key=lambda one: one.deadline_at),
        menu=MENU,
        rows=[option.seconds for option in MENU.options],
        slowdown=slowdown,
        caution=1.0,
        stretch=1.0,
        max_batch_size=4,
        arrival_rate=rate,
        recent=[one.wish for one in line],
        tight_budget_s=tight_budget_ms / 1000,
    )


def choose(name: str, situation: Situation, max_batch_size: int = 4) -> Choice:
    return make_policy(name, MENU, max_batch_size)(situation)


@pytest.mark.parametrize(
    ("name", "option", "served"),
    [
        ("max-accuracy", MIDDLE, 2),  # 40 is too long for the head, 20 is not; of the middle, two take 26
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
def test_three_requests_with_30_60_and_100_ms_left(name: str, option: int, served: int) -> None:
    situation = moment(entry(30), entry(60), entry(100), tight_budget_ms=80)
    choice = choose(name, situation)
    assert (choice.option, len(choice.batch)) == (option, served)
    assert choice.batch == tuple(situation.line[:served])
    assert not choice.late
    assert not choice.shed


def test_slackfit_takes_the_accuracy_that_its_largest_batch_leaves_and_capped_that_of_those_who_wait() -> None:
    """The bucket under 40.5 ms ends at 10 + 13 * 75 / 32 = 40.47: four of the middle take 38, one of the best 40."""
    situation = moment(entry(40.5))
    assert choose("slackfit", situation).option == MIDDLE
    assert choose("slackfit-capped", situation).option == BEST


def test_slackfit_asks_for_no_larger_batch_than_may_run() -> None:
    """With at most two, the bucket under 30 ms ends at 10 + 14 * 45 / 32 = 29.7, where two of the middle fit."""
    situation = replace(moment(entry(30), entry(60), entry(100)), max_batch_size=2)
    choice = choose("slackfit", situation, max_batch_size=2)
    assert (choice.option, len(choice.batch)) == (MIDDLE, 2)


def test_slackfit_knows_of_a_slowdown_only_in_its_variant() -> None:
    """Four times as slow, the head is lost at 40 ms and the next has room for two of the cheapest, 48 ms."""
    line = [entry(30), entry(60), entry(100)]
    situation = moment(*line, slowdown=4)
    published, estimate = choose("slackfit", situation), choose("slackfit-estimate", situation)
    assert (published.late, published.batch) == ((), tuple(line))
    assert (estimate.late, estimate.batch, estimate.option) == ((line[0],), tuple(line[1:]), CHEAP)


@pytest.mark.parametrize(("waiting", "option"), [(1, BEST), (2, MIDDLE), (3, MIDDLE), (4, CHEAP), (9, CHEAP)])
def test_one_step_down_per_two_waiting(waiting: int, option: int) -> None:
    assert choose("step-down", moment(*(entry(1000) for _ in range(waiting)))).option == option


def test_step_down_reckons_with_the_slowdown() -> None:
    """Alone with 70 ms left: the best takes 40, or 80 twice as slow; the middle 40 then."""
    assert choose("step-down", moment(entry(70))).option == BEST
    assert choose("step-down", moment(entry(70), slowdown=2)).option == MIDDLE


def test_a_fixed_sub_network_drops_whom_it_cannot_answer_in_time() -> None:
    """The best takes 40 ms: the first is lost, and two take 55."""
    line = [entry(30), entry(60), entry(100)]
    choice = choose("fixed-14-1", moment(*line))
    assert (choice.late, choice.shed, choice.batch) == ((line[0],), (), tuple(line[1:]))


def test_a_fixed_sub_network_sheds_whom_only_a_small_batch_would_answer() -> None:
    """Three of the best take 70 ms, so the first would have to run alone; the other two together take 55."""
    line = [entry(45), entry(100), entry(100)]
    choice = choose("fixed-14-1", moment(*line))
    assert (choice.late, choice.shed, choice.batch) == ((), (line[0],), tuple(line[1:]))


def test_early_drop_plans_with_batches_of_half_a_budget() -> None:
    """In half of 90 ms the best answers one at a time, so nobody is shed for a larger batch."""
    line = [entry(45), entry(100), entry(100)]
    choice = choose("fixed-14-1", moment(*line, tight_budget_ms=90))
    assert (choice.shed, choice.batch) == ((), (line[0],))


def test_the_last_one_is_never_shed() -> None:
    alone = entry(41)
    assert choose("fixed-14-1", moment(alone, tight_budget_ms=1)).batch == (alone,)


def test_a_plan_holds_for_its_period_whatever_arrives() -> None:
    policy = make_policy("proteus", MENU, 4)
    assert policy(moment(entry(1000), rate=1)).option == BEST
    assert policy(moment(entry(5900), rate=200, now=4.9)).option == BEST
    assert policy(moment(entry(6000), rate=200, now=5.0)).option == CHEAP  # four in 16 ms, 250 a second
    assert make_policy("proteus", MENU, 4)(moment(entry(1000), rate=40)).option == BEST, "each has a plan of its own"


@pytest.mark.parametrize(("rate", "option"), [(44.8, BEST), (45, MIDDLE), (100, MIDDLE), (101, CHEAP), (999, CHEAP)])
def test_the_plan_is_the_most_accurate_level_that_carries_the_demand_and_a_twentieth(rate: float, option: int) -> None:
    """Four of the best take 85 of 100 ms: 47.06 a second; of the middle 38: 105.26."""
    assert choose("proteus", moment(entry(1000), rate=rate)).option == option


def test_who_grants_less_than_is_wanted_gets_its_limit_and_runs_with_its_like() -> None:
    line = [entry(500), entry(600, limit=MIDDLE), entry(700), entry(800, only=NAMED)]
    assert choose("max-accuracy", moment(*line)).batch == (line[0], line[2])
    limited = choose("max-accuracy", moment(*line[1:]))
    assert (limited.option, limited.batch) == (MIDDLE, (line[1],))
    assert choose("max-accuracy", moment(line[3])).option == NAMED


def test_a_fixed_sub_network_that_is_dominated_runs_for_all_who_grant_its_cost() -> None:
    choice = choose("fixed-8-1", moment(entry(500), entry(600, limit=CHEAP), entry(700, limit=MIDDLE)))
    assert (choice.option, len(choice.batch)) == (NAMED, 2)


@pytest.mark.parametrize("level", [CHEAP, MIDDLE, BEST])
def test_what_is_granted_of_a_level_is_what_our_own_policy_would_run(level: int) -> None:
    for limit in (CHEAP, MIDDLE, BEST):
        for only, beyond in ((None, None), (NAMED, None), (None, NAMED)):
            wish = Wish(0.1, limit, only, beyond)
            assert granted(MENU, wish, level) == target(wish, level)


def test_an_option_between_two_levels_is_granted_by_who_admits_it_beyond_its_limit() -> None:
    assert granted(MENU, Wish(0.1, CHEAP, beyond=NAMED), NAMED) == NAMED
    assert granted(MENU, Wish(0.1, CHEAP), NAMED) == CHEAP
    assert granted(MENU, Wish(0.1, BEST, only=CHEAP), NAMED) == CHEAP


def random_moment(rng: random.Random) -> Situation:
    line = [
        entry(
            rng.choice((0, 9, 15, 40, 80, 200, 1000)) * rng.random(), rng.randrange(3), rng.choice((None, None, NAMED))
        )
        for _ in range(rng.randint(1, 30))
    ]
    tight_ms = rng.choice((5, 100, math.inf))
    return moment(*line, slowdown=rng.choice((0.5, 1, 3)), rate=rng.choice((0, 10, 500)), tight_budget_ms=tight_ms)


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_serves_or_gives_up_somebody_and_nobody_twice(name: str) -> None:
    rng = random.Random(0)
    policy = make_policy(name, MENU, 4)
    for _ in range(500):
        situation = random_moment(rng)
        choice = policy(situation)
        dealt_with = [*choice.batch, *choice.late, *choice.shed]
        assert dealt_with
        assert len(set(dealt_with)) == len(dealt_with)
        assert set(dealt_with) <= set(situation.line)
        assert (choice.option is None) == (not choice.batch)
        assert len(choice.batch) <= 4
        assert choice.reason or name == "level"


@pytest.mark.parametrize("name", NAMES)
def test_no_policy_ever_exceeds_what_a_request_grants(name: str) -> None:
    rng = random.Random(1)
    policy = make_policy(name, MENU, 4)
    for _ in range(500):
        choice = policy(random_moment(rng))
        for one in choice.batch:
            assert choice.option is not None
            if one.wish.only is not None:
                assert choice.option == one.wish.only
            else:
                assert MENU.options[choice.option].row.macs <= MENU.options[one.wish.limit].row.macs


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"level"}))
def test_every_baseline_answers_its_head_in_time_as_far_as_it_knows(name: str) -> None:
    rng = random.Random(2)
    policy = make_policy(name, MENU, 4)
    for _ in range(500):
        situation = random_moment(rng)
        choice = policy(situation)
        if choice.option is not None:
            seconds = MENU.options[choice.option].seconds[len(choice.batch) - 1]
            estimates = name.startswith("step-down") or name == "slackfit-estimate"
            factor = situation.slowdown if estimates else 1.0
            assert seconds * factor <= choice.batch[0].deadline_at + 1e-9


def test_every_policy_can_be_had_by_its_name() -> None:
    assert NAMES[0] == "level"
    assert set(NAMES) >= {"slackfit", "infaas", "fixed-8-0.5", "fixed-8-1", "fixed-14-1"}
    assert make_policy("level", MENU, 16) is choose_level
    assert [name for name in NAMES if refuses_early(name)] == ["level"]


def test_an_unknown_policy_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(InvalidParameterError, match=r"fixed-9-1 is no policy; .*slackfit-capped.*fixed-14-1") as caught:
        make_policy("fixed-9-1", MENU, 16)
    assert caught.value.details["parameter"] == "policy"
