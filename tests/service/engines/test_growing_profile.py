from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from models.latency_estimate import MIN_ERROR, Cell
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork
from service.engines.growing_profile import SERVED_RUN_WEIGHT, GrowingProfile, first_cells, untimed_shapes
from service.engines.profiler import MIN_RUNS, MIN_SLOW_RUNS, SLOW_S, Figures

CHEAPEST, MIDDLE, COSTLIEST = SubNetwork(2, 0.5), SubNetwork(4, 0.5), SubNetwork(4, 1.0)
SIZES = (1, 2, 4)
NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture
def profile(profiles: ProfileTable) -> GrowingProfile:
    return GrowingProfile(profiles, SIZES)


def measure(profile: GrowingProfile, cell: Cell, seconds: float) -> None:
    """Record as many runs of a cell as its measurement takes, the first one included."""
    for _ in range(MIN_RUNS + 1):
        profile.record(cell, seconds)


def test_a_cell_is_measured_after_enough_runs_without_the_first(profile: GrowingProfile) -> None:
    for place, seconds in enumerate((0.09, 0.010, 0.030, 0.012)):
        assert profile.seconds((CHEAPEST, 1)) is None, place
        profile.record((CHEAPEST, 1), seconds)
    assert profile.seconds((CHEAPEST, 1)) == 0.012
    profile.record((CHEAPEST, 1), 0.5)
    assert profile.figures.seconds == {(CHEAPEST, 1): 0.012}
    assert profile.figures.spread == {(CHEAPEST, 1): pytest.approx(1 / 6)}


def test_a_slow_cell_needs_fewer_runs_and_its_first_run_counts(profile: GrowingProfile) -> None:
    for _ in range(MIN_SLOW_RUNS):
        assert profile.seconds((COSTLIEST, 4)) is None
        profile.record((COSTLIEST, 4), 2 * SLOW_S)
    assert profile.seconds((COSTLIEST, 4)) == 2 * SLOW_S


def test_a_batch_of_requests_counts_less_than_a_run_of_an_idle_engine(profile: GrowingProfile) -> None:
    for _ in range(round(MIN_RUNS / SERVED_RUN_WEIGHT)):
        profile.record((CHEAPEST, 1), 0.01, SERVED_RUN_WEIGHT)
    assert profile.seconds((CHEAPEST, 1)) is None  # the first run of a shape does not count
    profile.record((CHEAPEST, 1), 0.01, SERVED_RUN_WEIGHT)
    assert profile.seconds((CHEAPEST, 1)) == 0.01


def test_runs_of_unknown_cells_are_ignored(profile: GrowingProfile) -> None:
    profile.record((CHEAPEST, 3), 0.01)
    profile.record((SubNetwork(9, 1.0), 1), 0.01)
    assert profile.seconds((CHEAPEST, 3)) is None
    assert profile.measured_share == 0


def test_the_measured_share_grows_with_every_run_that_counts(profile: GrowingProfile, profiles: ProfileTable) -> None:
    shares = [profile.measured_share]
    for row in profiles.rows:
        for size in SIZES:
            profile.record((row.subnetwork, size), 0.01)
            assert profile.measured_share == shares[-1], "the first run of a shape does not count"
            for _ in range(MIN_RUNS):
                profile.record((row.subnetwork, size), 0.01)
                shares.append(profile.measured_share)
    num_runs = 12 * MIN_RUNS
    assert shares == pytest.approx([count / num_runs for count in range(num_runs + 1)])
    assert profile.is_complete
    assert profile.due(lambda *_: True) is None


def test_cells_that_are_not_measured_are_estimated_cautiously(profile: GrowingProfile, profiles: ProfileTable) -> None:
    for row in (profiles.rows[0], profiles.rows[-1]):
        for size in (1, 4):
            measure(profile, (row.subnetwork, size), 1e-7 * row.macs * size)
    found = profile.predict()
    assert found.error == MIN_ERROR
    for row in profiles.rows:
        likely = [1e-7 * row.macs * size for size in SIZES]
        assert found.likely.seconds[row.subnetwork] == pytest.approx(likely, rel=1e-6)
        is_measured = row in (profiles.rows[0], profiles.rows[-1])
        cautions = (1, 1.1, 1) if is_measured else (1.1, 1.1, 1.1)
        cautious = [seconds * factor for seconds, factor in zip(likely, cautions, strict=True)]
        assert found.cautious.seconds[row.subnetwork] == pytest.approx(cautious, rel=1e-6)


def test_nothing_can_be_estimated_before_any_cell_is_measured(profile: GrowingProfile) -> None:
    with pytest.raises(ValueError, match="no cell is measured"):
        profile.predict()


def test_cells_that_fit_are_due_round_by_round_with_cheap_ones_first(profiles: ProfileTable) -> None:
    profile = GrowingProfile(profiles, (1, 2))
    for row in profiles.rows:
        measure(profile, (row.subnetwork, 1), 1e-7 * row.macs)
    costs = profile.predict().likely.seconds
    order = []
    while (due := profile.due(lambda _, seconds: seconds < costs[COSTLIEST][1])) is not None:
        cell, seconds = due
        assert seconds == costs[cell[0]][1]
        order.append(cell)
        profile.record(cell, seconds)
    in_turn = [(row.subnetwork, 2) for row in profiles.rows[:-1]]
    # The first run, which does not count, another one at once, and two more rounds.
    assert order == [cell for cell in in_turn for _ in range(2)] + 2 * in_turn
    assert profile.due(lambda *_: True) == ((COSTLIEST, 2), costs[COSTLIEST][1])


def test_an_untrained_keep_rate_stays_an_estimate_unless_batches_measure_it(profiles: ProfileTable) -> None:
    lowest, middle, *others = profiles.rows
    profiles = ProfileTable((lowest, replace(middle, is_trained=False), *others))
    profile = GrowingProfile(profiles, (1,))
    for row in (lowest, *others):
        assert not profile.is_complete
        measure(profile, (row.subnetwork, 1), 1e-9 * row.macs)
    assert (profile.is_complete, profile.measured_share) == (True, 1.0)
    assert profile.due(lambda *_: True) is None
    prediction = profile.predict()
    estimated_s = prediction.likely.row(middle.subnetwork)[0]
    assert estimated_s == pytest.approx(1e-9 * middle.macs, rel=0.1)
    assert prediction.cautious.row(middle.subnetwork)[0] > estimated_s
    measure(profile, (middle.subnetwork, 1), 1.5 * estimated_s)
    assert profile.seconds((middle.subnetwork, 1)) == 1.5 * estimated_s
    assert profile.figures.seconds.keys() == {(row.subnetwork, 1) for row in profiles.rows}
    again = GrowingProfile(profiles, (1,), profile.figures)
    assert again.predict().cautious.row(middle.subnetwork)[0] == 1.5 * estimated_s


def test_figures_from_a_file_or_another_process_are_taken_over_and_never_replaced(profiles: ProfileTable) -> None:
    kept = Figures({(CHEAPEST, 1): 0.01, (COSTLIEST, 1): 0.05}, {(CHEAPEST, 1): 0.2, (COSTLIEST, 1): 0.1}, NOW)
    profile = GrowingProfile(profiles, SIZES, kept)
    assert profile.measured_share == pytest.approx(2 / 12)
    assert profile.figures == kept
    profile.merge(Figures({(CHEAPEST, 1): 9.0, (MIDDLE, 1): 0.02}, {(CHEAPEST, 1): 0.0, (MIDDLE, 1): 0.0}, NOW))
    assert profile.figures.seconds == {(CHEAPEST, 1): 0.01, (COSTLIEST, 1): 0.05, (MIDDLE, 1): 0.02}
    assert profile.figures.spread[CHEAPEST, 1] == 0.2


def test_a_profile_is_as_old_as_the_oldest_figures_that_it_took_over(profiles: ProfileTable) -> None:
    profile = GrowingProfile(profiles, SIZES)
    assert profile.began_at > NOW
    profile.merge(Figures({(CHEAPEST, 1): 0.01}, {(CHEAPEST, 1): 0.0}, NOW))
    assert profile.began_at == profile.figures.measured_at == NOW
    profile.merge(Figures({(COSTLIEST, 1): 0.05}, {(COSTLIEST, 1): 0.0}, NOW + timedelta(days=1)))
    assert profile.began_at == NOW


def test_the_first_cells_span_costs_and_sizes_with_the_most_informative_first(profiles: ProfileTable) -> None:
    cells = first_cells(profiles, (1, 2, 4, 8, 16))
    assert [size for _, size in cells] == [1, 1, 1, 4, 4, 4, 16, 16, 16]
    assert cells[:2] == [(CHEAPEST, 1), (COSTLIEST, 1)]
    assert len(set(cells)) == 9
    assert [size for _, size in first_cells(profiles, (1,))] == [1, 1, 1]


def test_a_slow_sub_network_counts_as_more_work(profiles: ProfileTable) -> None:
    slow = ProfileTable(tuple(replace(row, slowness=1 + (row.subnetwork == CHEAPEST)) for row in profiles.rows))
    (least, _), (most, _), *_ = first_cells(slow, (1,))
    assert (least == CHEAPEST, most) == (False, COSTLIEST)
    growing = GrowingProfile(slow, (1,))
    for cell in first_cells(slow, (1,)):
        measure(growing, cell, slow.by_subnetwork[cell[0]].work)
    expected = slow.by_subnetwork[CHEAPEST].work
    assert growing.predict().likely.row(CHEAPEST)[0] == pytest.approx(expected, rel=0.05)


def test_batch_sizes_between_the_measured_ones_are_untimed_shapes() -> None:
    assert untimed_shapes([CHEAPEST, COSTLIEST], (1, 2, 4)) == [(CHEAPEST, 3), (COSTLIEST, 3)]
    assert untimed_shapes([CHEAPEST], (1, 2, 4, 7)) == [(CHEAPEST, 3), (CHEAPEST, 5), (CHEAPEST, 6)]
