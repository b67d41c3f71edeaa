"""One machine with two levels, to work out by hand: 10 and 40 ms for a request, 5 and 15 ms for each further one."""

from dataclasses import replace

import pytest

from models.latency import LatencyTable
from models.profiles import CascadeProfile, ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.errors import BudgetTooSmallError
from service.scheduling.catalog import VariantCatalog
from service.scheduling.policies import Policy
from service.scheduling.state import BatchDecision, SchedulerState
from service.simulation.arrivals import Arrival, SlowdownScript
from service.simulation.simulator import Figures, Machine, Replay, replay, throughput

CHEAP, BEST = SubNetwork(8, 0.5), SubNetwork(14, 1.0)
PROFILES = ProfileTable((SubNetworkProfile(CHEAP, 1_000_000_000, 0.7), SubNetworkProfile(BEST, 4_000_000_000, 0.8)))
LATENCIES = LatencyTable((1, 4), {CHEAP: (0.010, 0.025), BEST: (0.040, 0.085)})
CATALOG = VariantCatalog.of(PROFILES, LATENCIES)
UNMEASURED = ProfileTable(tuple(SubNetworkProfile(row.subnetwork, row.macs) for row in PROFILES.rows))

THREE = [Arrival(0.0, 0.1), Arrival(0.010, 0.1), Arrival(0.020, 0.1)]


def request_outcomes(replayed: Replay) -> list[tuple[int, int, str]]:
    """Return when each request arrived and ended, in milliseconds, and its outcome."""
    return [
        (round(1000 * each.arrived_at), round(1000 * each.ended_at), each.outcome) for each in replayed.request_outcomes
    ]


def batches(replayed: Replay) -> list[tuple[int, int, int, int]]:
    """Return when each batch started and how long it took, in milliseconds, with its level and size."""
    return [
        (round(1000 * batch.started_at), round(1000 * batch.seconds), batch.variant.index, batch.size)
        for batch in replayed.batches
    ]


def flow(rate: float, seconds: float, budget_s: float = 0.1) -> list[Arrival]:
    return [Arrival(index / rate, budget_s) for index in range(int(rate * seconds))]


def test_requests_that_arrive_during_a_batch_form_the_next_batch() -> None:
    """The first request runs alone; when it ends, the second is due in 70 ms, and two take 55 ms."""
    replayed = replay(THREE, Machine(CATALOG), "fixed-14-1")
    assert batches(replayed) == [(0, 40, 1, 1), (40, 55, 1, 2)]
    assert request_outcomes(replayed) == [(0, 40, "in_time"), (10, 95, "in_time"), (20, 95, "in_time")]


def test_a_batch_is_as_slow_as_the_machine_when_it_starts() -> None:
    replayed = replay(THREE, Machine(CATALOG, slowdown=SlowdownScript.parse("0.03:2")), "fixed-14-1")
    assert batches(replayed) == [(0, 40, 1, 1), (40, 110, 1, 2)]
    assert request_outcomes(replayed) == [(0, 40, "in_time"), (10, 150, "overdue"), (20, 150, "overdue")]


def test_an_overhead_delays_every_batch() -> None:
    assert batches(replay(THREE, Machine(CATALOG, overhead_s=0.005), "fixed-14-1")) == [(0, 45, 1, 1), (45, 60, 1, 2)]


def test_noise_only_delays_batches_and_follows_its_seed() -> None:
    runs = [replay(flow(20, 20), Machine(CATALOG, noise=0.2, seed=seed), "fixed-14-1").batches for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    factors = [batch.seconds / CATALOG.variants[1].latency_by_batch_s[batch.size - 1] for batch in runs[0]]
    assert min(factors) >= 1
    assert sum(factors) / len(factors) == pytest.approx(1 + 0.2 * 0.8, abs=0.03)  # the mean of |normal| is 0.8


def test_an_idle_machine_waits_for_the_next_request() -> None:
    replayed = replay([Arrival(1.0, 0.1), Arrival(7.0, 0.1)], Machine(CATALOG), "level")
    assert batches(replayed) == [(1000, 40, 1, 1), (7000, 40, 1, 1)]


def test_a_request_that_cannot_be_answered_in_time_expires_at_the_next_decision() -> None:
    """The second request is due at 45 ms, only 5 ms after the engine is free."""
    replayed = replay([Arrival(0.0, 0.1), Arrival(0.005, 0.040)], Machine(CATALOG), "fixed-14-1")
    assert request_outcomes(replayed) == [(0, 40, "in_time"), (5, 40, "expired")]


def test_the_level_policy_rejects_at_admission_what_a_published_policy_drops_later() -> None:
    """The second request is due at 30 ms, before the first ends at 40 ms."""
    arrivals = [Arrival(0.0, 0.1), Arrival(0.005, 0.025)]
    assert request_outcomes(replay(arrivals, Machine(CATALOG), "level"))[0] == (5, 5, "rejected")
    assert (5, 40, "expired") in request_outcomes(replay(arrivals, Machine(CATALOG), "max-accuracy"))


def test_an_answer_exactly_at_its_deadline_is_in_time() -> None:
    assert request_outcomes(replay([Arrival(0.1, 0.040)], Machine(CATALOG), "fixed-14-1")) == [(100, 140, "in_time")]


def test_a_gflops_budget_is_respected_and_one_that_is_too_small_raises() -> None:
    assert batches(replay([Arrival(0.0, 0.1, 3.9)], Machine(CATALOG), "fixed-14-1")) == [(0, 10, 0, 1)]
    with pytest.raises(BudgetTooSmallError, match=r"0\.5 GFLOPs is too small"):
        replay([Arrival(0.0, 0.1, 0.5)], Machine(CATALOG), "level")


def test_no_batch_is_larger_than_allowed() -> None:
    replayed = replay([Arrival(0.0, 9.0)] * 5, Machine(CATALOG, max_batch_size=2), "infaas")
    assert [size for *_, size in batches(replayed)] == [2, 2, 1]


def test_priority_reaches_the_policy() -> None:
    seen: list[float] = []

    def watch(state: SchedulerState) -> BatchDecision:
        seen.extend(request.priority for request in state.queue)
        return BatchDecision(state.catalog.variants[0], tuple(state.queue))

    Replay([Arrival(0.0, 0.1, None, -1)], Machine(CATALOG), Policy("watch", lambda _catalog, _size: watch))
    assert seen == [-1]


def test_a_policy_that_neither_serves_nor_drops_a_request_raises() -> None:
    with pytest.raises(RuntimeError, match="neither serves nor drops"):
        Replay(THREE, Machine(CATALOG), Policy("idle", lambda _catalog, _size: lambda _: BatchDecision(None)))


@pytest.mark.parametrize("policy", ["level", "slackfit", "step-down-drop", "fixed-14-1"])
def test_every_request_has_one_outcome_even_far_beyond_the_capacity(policy: str) -> None:
    arrivals = flow(400, 3, budget_s=0.06)
    replayed = replay(arrivals, Machine(CATALOG, slowdown=SlowdownScript.parse("1:3,2:1")), policy)
    assert sorted(each.arrived_at for each in replayed.request_outcomes) == [arrival.at for arrival in arrivals]
    assert all(
        (each.variant is None) == (each.outcome in ("rejected", "expired", "shed"))
        for each in replayed.request_outcomes
    )
    assert sum(batch.size for batch in replayed.batches) == sum(
        each.variant is not None for each in replayed.request_outcomes
    )
    ends = [batch.started_at + batch.seconds for batch in replayed.batches]
    assert all(end <= batch.started_at + 1e-9 for end, batch in zip(ends, replayed.batches[1:], strict=False))


def test_the_level_policy_learns_a_slowdown_and_max_accuracy_does_not() -> None:
    machine = Machine(CATALOG, slowdown=SlowdownScript.parse("2:2.5"))
    level, blind = (Figures.of([replay(flow(20, 20), machine, name)], CATALOG) for name in ("level", "max-accuracy"))
    assert level.slo_attainment > 0.95 > 0.7 > blind.slo_attainment


def test_the_figures_of_five_requests_are_as_computed_by_hand() -> None:
    """Three in time at the best level and one at the cheapest, one expired; busy 40 + 55 + 10 ms of 200 ms."""
    arrivals = [*THREE, Arrival(0.015, 0.030), Arrival(0.190, 0.1, 1.0)]
    figures = Figures.of([replay(sorted(arrivals, key=lambda one: one.at), Machine(CATALOG), "fixed-14-1")], CATALOG)
    assert figures.outcomes == {"in_time": 4, "overdue": 0, "rejected": 0, "expired": 1, "shed": 0}
    assert figures.slo_attainment == 4 / 5
    assert figures.mean_accuracy == pytest.approx((3 * 0.8 + 0.7) / 4)
    assert figures.effective_accuracy == pytest.approx((3 * 0.8 + 0.7) / 5)
    assert figures.latency_ms == pytest.approx({"p50": 57.5, "p95": 83.5, "p99": 84.7})  # of 10, 40, 75 and 85 ms
    assert figures.mean_batch_size == pytest.approx(4 / 3)
    assert figures.utilization == pytest.approx(105 / 200)
    assert figures.changes_per_s == pytest.approx(1 / 0.2)
    assert figures.mix == {"14-1": 0.75, "8-0.5": 0.25}


def test_overdue_answers_count_for_latency_but_not_for_accuracy() -> None:
    machine = Machine(CATALOG, slowdown=SlowdownScript.parse("0:3"))
    figures = Figures.of([replay(THREE[:1], machine, "fixed-14-1")], CATALOG)
    assert (figures.outcomes["overdue"], figures.mean_accuracy, figures.effective_accuracy) == (1, None, 0.0)
    assert figures.latency_ms["p50"] == pytest.approx(120)


def test_unmeasured_accuracy_is_reported_as_none() -> None:
    catalog = VariantCatalog.of(UNMEASURED, LATENCIES)
    figures = Figures.of([replay(THREE, Machine(catalog), "level")], catalog)
    assert figures.slo_attainment == 1
    assert (figures.mean_accuracy, figures.effective_accuracy) == (None, None)


def test_figures_without_any_answer_are_none_or_zero() -> None:
    figures = Figures.of([replay([Arrival(0.0, 0.001)], Machine(CATALOG), "infaas")], CATALOG)
    assert (figures.outcomes["expired"], figures.slo_attainment, figures.mean_accuracy) == (1, 0, None)
    assert (figures.latency_ms["p50"], figures.mean_batch_size, figures.utilization, figures.mix) == (None, None, 0, {})


def test_throughput_is_that_of_the_best_batch_size_up_to_the_limit() -> None:
    assert throughput(CATALOG.best, 4) == pytest.approx(4 / 0.085)
    assert throughput(CATALOG.best, 2) == pytest.approx(2 / 0.055)


CASCADE = CascadeProfile(CHEAP, BEST, threshold=0.9, share=0.25, top1=0.79)
CASCADING = VariantCatalog.of(replace(PROFILES, cascades=(CASCADE,)), LATENCIES)
PAIR = "fixed-8-0.5+14-1@0.9"


def test_a_replayed_cascade_looks_again_at_its_share_of_the_images_and_has_its_accuracy() -> None:
    """Images run one at a time: 10 ms each, and 40 ms more for a quarter of them."""
    apart = [Arrival(number / 10, 1.0) for number in range(2000)]
    replayed = replay(apart, Machine(CASCADING), PAIR)
    figures = Figures.of([replayed], CASCADING)
    assert figures.looked_again == pytest.approx(0.25, abs=0.03)
    assert len(replayed.batches) == round(2000 * (1 + figures.looked_again))
    assert figures.mean_accuracy == pytest.approx(0.79)
    assert {round(each.ended_at - each.arrived_at, 6) for each in replayed.request_outcomes} == {0.01, 0.05}
    assert figures.mix == {"8-0.5+14-1@0.9": 1.0}


def test_an_unsure_image_without_time_for_a_second_look_keeps_its_answer_and_costs_accuracy() -> None:
    """45 ms are enough for the first look, 10 ms, but not for both; without any second look, the accuracy is 70 %."""
    hurried = [Arrival(number / 10, 0.045) for number in range(2000)]
    figures = Figures.of([replay(hurried, Machine(CASCADING), PAIR)], CASCADING)
    assert (figures.slo_attainment, figures.looked_again) == (1.0, 0.0)
    assert figures.mean_accuracy == pytest.approx(0.7, abs=0.015)


def test_a_second_look_that_ends_too_late_leaves_the_first_answer_at_the_deadline() -> None:
    """The machine becomes four times as slow before the second look, which nothing predicts."""
    machines = [Machine(CASCADING, slowdown=SlowdownScript.parse("0.005:4"), seed=seed) for seed in range(20)]
    request_outcomes = [replay([Arrival(0.0, 0.06)], machine, PAIR).request_outcomes[0] for machine in machines]
    assert {(each.outcome, round(each.ended_at, 6), each.looks) for each in request_outcomes} == {
        ("in_time", 0.01, 1),
        ("in_time", 0.06, 1),
    }


def test_the_level_policy_looks_twice_where_there_is_time_and_once_under_overload() -> None:
    catalog = VariantCatalog.of(replace(PROFILES, cascades=(replace(CASCADE, top1=0.81),)), LATENCIES)
    assert catalog.best.second_look is not None
    calm = Figures.of([replay(flow(5, 40, budget_s=0.2), Machine(catalog), "level")], catalog)
    assert calm.looked_again == pytest.approx(0.25, abs=0.08)
    assert calm.mean_accuracy == pytest.approx(0.81)
    crowded = Figures.of([replay(flow(400, 10), Machine(catalog), "level")], catalog)
    assert crowded.looked_again < 0.01


def test_both_looks_together_never_exceed_a_gflops_budget() -> None:
    capped = [Arrival(number / 10, 1.0, budget_gflops=4.9) for number in range(100)]
    replayed = replay(capped, Machine(CASCADING), PAIR)  # both looks cost 5
    assert {each.looks for each in replayed.request_outcomes} == {1}
