import logging
import math
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from models.latency_estimate import Cell
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork
from service.engines.growing_profile import GrowingProfile, Prediction
from service.engines.profiler import MIN_RUNS, Figures
from service.execution.idle_profiling import PUBLISH_S, SAVE_INTERVAL_S, WARM_UP_S, IdleProfiler
from service.execution.idle_turns import MAX_OTHERS_LOAD, RECHECK_S, IdleTurns
from service.scheduling.catalog import VariantCatalog
from service.scheduling.level_policy import choose_level
from service.scheduling.scheduler import Scheduler
from tests.service.execution.looks import IMAGE, looks_of

CHEAPEST, MIDDLE, COSTLIEST = SubNetwork(2, 0.5), SubNetwork(4, 0.5), SubNetwork(4, 1.0)
SIZES = (1, 2, 4)
BUDGET_S = 1.0
BEGAN_AT = datetime(2026, 1, 2, tzinfo=UTC)


class Folder:
    """Keeps a profile that another process may hold, and may have changed."""

    def __init__(self) -> None:
        self.is_free = True
        self.is_held = False
        self.written: list[Figures] = []
        self.by_others: Figures | None = None

    def claim(self) -> bool:
        self.is_held = self.is_free
        return self.is_held

    def release(self) -> None:
        assert self.is_held
        self.is_held = False

    def read_if_changed(self) -> Figures | None:
        found, self.by_others = self.by_others, None
        return found

    def write(self, figures: Figures) -> None:
        assert self.is_held
        self.written.append(figures)


class Idle:
    """An engine with nothing to do, in virtual time: an image takes half a microsecond for each operation."""

    def __init__(self, profiles: ProfileTable, shapes: tuple[Cell, ...] = (), slowness: float = 1.0) -> None:
        self.now, self.slowness = 100.0, slowness
        self.macs = {row.subnetwork: row.macs for row in profiles.rows}
        self.ran: list[Cell] = []
        self.published: list[Prediction] = []
        self.folder = Folder()
        self.num_tried = 0
        self.error: Exception | None = None
        self.profile = GrowingProfile(profiles, SIZES)
        for row in (profiles.rows[0], profiles.rows[-1]):
            for _ in range(MIN_RUNS + 1):
                self.profile.record((row.subnetwork, 1), self.seconds((row.subnetwork, 1)))
        catalog = VariantCatalog.of(profiles, self.profile.predict().likely)
        self.scheduler = Scheduler(catalog, choose_level, SIZES[-1])
        self.others = 0.0
        self.most: int | None = None
        clock = lambda: self.now  # noqa: E731 - shared by both
        self.profiler = IdleProfiler(
            self.profile, self.folder, self.time_once, self.published.append, shapes, clock=clock
        )
        self.turns = IdleTurns(
            [self.profiler], self.scheduler, BUDGET_S, observe_machine=self.observe_machine, clock=clock
        )

    def observe_machine(self) -> float:
        self.scheduler.machine_observed(1.0, self.most)
        return self.others

    def seconds(self, cell: Cell) -> float:
        return 5e-7 * self.slowness * self.macs[cell[0]] * cell[1]

    def time_once(self, cell: Cell) -> float:
        self.num_tried += 1
        if self.error:
            raise self.error
        self.ran.append(cell)
        self.now += self.seconds(cell)
        return self.seconds(cell)

    def serve(self, subnetwork: SubNetwork, size: int, seconds: float) -> None:
        """Let a batch of requests end now."""
        variant = next(one for one in self.scheduler.catalog.variants if one.profile.subnetwork == subnetwork)
        self.turns.batch_ran([IMAGE] * size, looks_of(variant, [0] * size, seconds, self.now))

    def wait(self) -> bool:
        """Let the engine's thread wait for a request and take its turn; return False once it would wait for ever."""
        wait_s = self.turns.wait_s(is_expecting=False)
        if wait_s is None:
            return False
        self.now += wait_s
        self.turns.take_turn()
        return True

    def wait_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            assert self.wait()
            assert self.now < 10_000

    def finish(self) -> None:
        while self.wait():
            assert self.now < 10_000


@pytest.fixture
def idle(profiles: ProfileTable) -> Idle:
    return Idle(profiles)


def test_an_idle_engine_completes_the_profile_and_then_has_no_work_left(idle: Idle) -> None:
    assert 0 < idle.profiler.measured_share < 0.5
    idle.finish()
    assert idle.profiler.measured_share == 1
    for cell, seconds in idle.profile.figures.seconds.items():
        assert seconds == pytest.approx(idle.seconds(cell))
    assert idle.published[-1].cautious == idle.published[-1].likely
    assert idle.folder.written[-1] == idle.profile.figures
    assert not idle.folder.is_held
    assert idle.turns.wait_s(is_expecting=False) is None


def test_nothing_is_measured_while_other_processes_load_the_machine(idle: Idle) -> None:
    idle.others = MAX_OTHERS_LOAD + 0.01
    for _ in range(20):
        idle.wait()
    assert not idle.ran
    assert idle.now == pytest.approx(100 + 20 * RECHECK_S, abs=RECHECK_S)
    idle.others = MAX_OTHERS_LOAD
    idle.wait()
    assert idle.ran


def test_measured_batches_are_no_larger_than_the_memory_allows(idle: Idle) -> None:
    idle.most = 2
    for _ in range(200):
        idle.wait()
    assert {size for _, size in idle.ran} == {1, 2}
    idle.most = None
    idle.finish()
    assert idle.profile.is_complete


def test_new_latencies_are_published_at_intervals(idle: Idle) -> None:
    assert len(idle.published) == 1  # at the start
    until = idle.now + 5 * PUBLISH_S
    while idle.now < until and idle.wait():
        pass
    assert 3 <= len(idle.published) <= 6


def test_the_profile_is_stored_at_intervals_and_on_close(profiles: ProfileTable) -> None:
    idle = Idle(profiles, slowness=20)
    while idle.now < 100 + 2.5 * SAVE_INTERVAL_S:
        assert idle.wait()
    kept = len(idle.folder.written)
    assert kept == 2
    idle.profiler.close()
    assert len(idle.folder.written) == kept + 1
    assert not idle.folder.is_held
    assert idle.turns.wait_s(is_expecting=False) is None


def test_figures_are_taken_over_from_another_process_that_measures(idle: Idle) -> None:
    idle.folder.is_free = False
    for _ in range(4):
        idle.wait()
    assert not idle.ran
    shares = [idle.profiler.measured_share]
    idle.folder.by_others = Figures({(COSTLIEST, 4): 0.123}, {(COSTLIEST, 4): 0.0}, BEGAN_AT)
    for _ in range(math.ceil(PUBLISH_S / RECHECK_S) + 1):
        idle.wait()
    assert idle.profiler.measured_share > shares[0]
    assert idle.published[-1].likely.seconds[COSTLIEST][-1] == 0.123
    idle.profiler.close()
    assert not idle.folder.written  # only the process that measures writes


def test_figures_that_a_command_measured_meanwhile_are_not_overwritten(idle: Idle) -> None:
    idle.wait_until(lambda: bool(idle.ran))
    idle.folder.by_others = Figures({(COSTLIEST, 4): 0.123}, {(COSTLIEST, 4): 0.0}, BEGAN_AT)
    idle.profiler.close()
    assert idle.folder.written[-1].seconds[COSTLIEST, 4] == 0.123


def test_another_process_continues_once_the_one_that_measured_has_ended(idle: Idle) -> None:
    idle.folder.is_free = False
    for _ in range(4):
        idle.wait()
    idle.folder.is_free = True
    idle.wait_until(lambda: bool(idle.ran))
    assert idle.folder.is_held


def test_an_engine_that_fails_is_no_longer_measured(idle: Idle, caplog: pytest.LogCaptureFixture) -> None:
    idle.error = RuntimeError("out of memory")
    with caplog.at_level(logging.ERROR):
        idle.wait_until(lambda: bool(idle.num_tried))
    assert "the rest of the profile stays an estimate" in caplog.text
    assert idle.turns.wait_s(is_expecting=False) is None
    assert idle.profiler.measured_share < 1


def test_request_batches_measure_their_cells_if_measured_cells_ran_just_before(idle: Idle) -> None:
    """The machine is half as fast as before, as the batches of measured cells show."""
    cell = (CHEAPEST, 2)
    for _ in range(40):
        idle.now += 0.1
        idle.serve(CHEAPEST, 1, 2 * idle.seconds((CHEAPEST, 1)))
        idle.now += 0.1
        idle.serve(*cell, 2 * idle.seconds(cell))
    assert idle.profile.seconds(cell) == pytest.approx(idle.seconds(cell), rel=0.05)
    assert not idle.ran


def test_request_batches_measure_nothing_if_no_measured_cell_ran_just_before(idle: Idle) -> None:
    cell, share = (CHEAPEST, 2), idle.profiler.measured_share
    idle.serve(CHEAPEST, 1, 2 * idle.seconds((CHEAPEST, 1)))
    for _ in range(40):
        idle.now += 2.0
        idle.serve(*cell, 2 * idle.seconds(cell))
    assert idle.profiler.measured_share == share


def test_warm_up_shapes_run_after_the_profile_for_a_limited_time(profiles: ProfileTable) -> None:
    shapes = ((CHEAPEST, 3), (COSTLIEST, 3)) * 200
    idle = Idle(profiles, shapes)
    idle.finish()
    first = idle.ran.index((CHEAPEST, 3))
    assert idle.profile.is_complete
    assert set(idle.ran[first:]) == {(CHEAPEST, 3), (COSTLIEST, 3)}
    spent_s = sum(idle.seconds(cell) for cell in idle.ran[first:])
    assert WARM_UP_S <= spent_s < WARM_UP_S + idle.seconds((COSTLIEST, 3)) * 1.1


def test_a_batch_without_new_information_is_not_published(profiles: ProfileTable) -> None:
    """Such as a batch of a size between the measured ones, while there are shapes left to warm up."""
    idle = Idle(profiles, shapes=((CHEAPEST, 3),))
    for cell in [(row.subnetwork, size) for row in profiles.rows for size in SIZES]:
        for _ in range(MIN_RUNS + 1):
            idle.profile.record(cell, idle.seconds(cell))
    assert idle.profiler.measured_share == 1
    idle.serve(CHEAPEST, 2, idle.seconds((CHEAPEST, 2)))
    num_published = len(idle.published)
    for _ in range(3):
        idle.serve(CHEAPEST, 3, idle.seconds((CHEAPEST, 3)))
    assert len(idle.published) == num_published
