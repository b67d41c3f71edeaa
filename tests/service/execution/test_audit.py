import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from models.flops import count_macs
from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.execution.audit import KEPT, SHARE, Audit, least_agreement
from service.execution.idle_turns import IdleBatch, IdleTurns, Room
from service.execution.results import Result
from service.scheduling.catalog import VariantCatalog
from service.scheduling.level_policy import choose_level
from service.scheduling.scheduler import Scheduler
from tests.service.conftest import CONFIG
from tests.service.execution.looks import IMAGE, NUM_CLASSES, looks_of

SMALL, MIDDLE, BEST = SubNetwork(2, 0.5), SubNetwork(4, 0.5), SubNetwork(4, 1.0)
BEST_S = 0.08
ROOM = Room(10.0, 4)


class Idle:
    """An engine whose best sub-network answers every image with the value of its first pixel, in virtual time."""

    def __init__(self, catalog: VariantCatalog) -> None:
        self.now, self.catalog = 100.0, catalog
        self.scheduler = Scheduler(catalog, choose_level, 4)
        self.ran: list[tuple[SubNetwork, tuple[int, ...]]] = []
        self.ran_at: list[int] = []  # addresses in memory
        self.counted: list[tuple[SubNetwork, bool]] = []
        self.promised: list[float] = []
        self.audit = Audit(self.run, self.scheduler, self.count, lambda: self.now)
        self.turns = IdleTurns([self.audit], self.scheduler, 1.0, clock=lambda: self.now)

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        self.ran.append((subnetwork, tuple(images.shape)))
        self.ran_at.append(images.data_ptr())
        self.now += BEST_S
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), NUM_CLASSES).float()

    def count(self, subnetwork: SubNetwork, promised: float, *, agrees: bool) -> None:
        self.counted.append((subnetwork, agrees))
        self.promised.append(promised)

    def serve(self, subnetwork: SubNetwork, answer: int, truth: int = 0, *, confidence: float = 0.9) -> Tensor:
        """Report that a sub-network answered an image whose class at the best one is `truth`."""
        variant = self.catalog.grant_named(subnetwork).best
        image = torch.full_like(IMAGE, truth)
        self.turns.batch_ran([image], looks_of(variant, [answer], ended_at=self.now, confidence=confidence))
        return image

    def wait(self) -> bool:
        wait_s = self.turns.wait_s(is_expecting=False)
        if wait_s is None:
            return False
        self.now += wait_s
        self.turns.take_turn()
        return True

    def finish(self) -> None:
        while self.wait():
            assert self.now < 10_000


class EndlessWork:
    """Idle work that always has a batch to run."""

    def __init__(self, idle: Idle) -> None:
        self.idle, self.num_runs = idle, 0

    def starts_at(self) -> float | None:
        return -math.inf

    def due(self, _: float, room: Room) -> IdleBatch | None:
        return IdleBatch(0.01, self.run, "") if room.seconds >= 0.01 else None

    def run(self) -> float:
        self.num_runs += 1
        self.idle.now += 0.01
        return 0.01

    def batch_ran(self, images: Sequence[Tensor], results: Sequence[Result]) -> None:
        """Learn nothing."""

    def close(self) -> None:
        """Continue regardless."""


@pytest.fixture
def idle(fast_catalog: VariantCatalog) -> Idle:
    return Idle(fast_catalog)


def test_an_audit_runs_an_image_at_the_best_sub_network_and_compares_the_answers(idle: Idle) -> None:
    idle.serve(SMALL, 3, truth=3)
    idle.finish()
    assert idle.ran == [(BEST, (1, *IMAGE.shape))]
    assert idle.counted == [(SMALL, True)]
    idle.serve(MIDDLE, 3, truth=4)
    idle.finish()
    assert idle.counted[1:] == [(MIDDLE, False)]
    assert idle.promised == pytest.approx([0.5 + 0.8 - 1, 0.7 + 0.8 - 1])


def test_each_image_is_audited_at_most_once(idle: Idle) -> None:
    for answer in range(2):
        idle.serve(SMALL, answer)
    idle.finish()
    assert len(idle.ran) == len(idle.counted) == 2


def test_answers_of_the_best_sub_network_are_not_audited(idle: Idle) -> None:
    idle.serve(BEST, 3)
    assert idle.turns.wait_s(is_expecting=False) is None


def test_audits_take_at_most_a_hundredth_of_the_engine_time(idle: Idle) -> None:
    began = idle.now
    while idle.now < began + 2000:
        idle.serve(SMALL, 0)
        idle.wait()
    assert 0.5 * SHARE * 2000 < BEST_S * len(idle.ran) <= SHARE * 2000 + 2 * BEST_S


def test_audits_leave_the_rest_of_the_idle_time_to_other_work(idle: Idle) -> None:
    profiler = EndlessWork(idle)
    idle.turns = IdleTurns([idle.audit, profiler], idle.scheduler, 1.0, clock=lambda: idle.now)
    began = idle.now
    while idle.now < began + 100:
        idle.serve(SMALL, 0)
        idle.wait()
        idle.wait()
    assert len(idle.ran) >= 5
    assert profiler.num_runs >= 10 * len(idle.ran)


def test_only_a_few_images_wait_for_their_audit_and_the_rest_are_left_out(idle: Idle) -> None:
    for answer in range(10):
        idle.serve(SMALL, answer % NUM_CLASSES)
    idle.finish()
    assert len(idle.ran) == KEPT


def test_an_image_that_waits_for_its_audit_is_not_copied(idle: Idle) -> None:
    image = idle.serve(SMALL, 3, truth=3)
    idle.finish()
    assert idle.ran_at == [image.data_ptr()]


def test_the_sub_network_with_the_fewest_audits_is_next(idle: Idle) -> None:
    for _ in range(3):
        idle.serve(SMALL, 0)
    idle.wait()
    idle.wait()
    idle.serve(MIDDLE, 0)
    idle.serve(SMALL, 0)
    idle.finish()
    assert [subnetwork for subnetwork, *_ in idle.counted] == [SMALL, SMALL, MIDDLE, SMALL, SMALL]


def test_second_looks_are_not_audited_because_they_see_only_the_hard_images(idle: Idle) -> None:
    first = looks_of(idle.catalog.grant_named(SMALL).best, [0])[0]
    second = looks_of(idle.catalog.grant_named(MIDDLE).best, [1], before=first)
    idle.turns.batch_ran([IMAGE], second)
    assert idle.turns.wait_s(is_expecting=False) is None


def test_an_answer_with_nan_confidence_is_not_audited(idle: Idle) -> None:
    idle.serve(SMALL, 0, confidence=math.nan)
    assert idle.turns.wait_s(is_expecting=False) is None


def test_an_image_waits_for_its_audit_until_there_is_room(idle: Idle) -> None:
    idle.serve(SMALL, 0)
    assert idle.audit.due(idle.now, Room(0.9 * BEST_S, 4)) is None
    assert idle.audit.due(idle.now, Room(1.1 * BEST_S, 4)) is not None


def test_sub_networks_without_measured_accuracy_are_not_audited() -> None:
    rows = tuple(SubNetworkProfile(sub, count_macs(CONFIG, sub)) for sub in (SMALL, BEST))
    idle = Idle(VariantCatalog.of(ProfileTable(rows), LatencyTable((1,), {SMALL: (0.02,), BEST: (0.08,)})))
    idle.serve(SMALL, 0)
    assert idle.turns.wait_s(is_expecting=False) is None


def test_a_closed_audit_keeps_and_runs_nothing(idle: Idle) -> None:
    idle.serve(SMALL, 0)
    idle.turns.close()
    assert idle.audit.due(idle.now, ROOM) is None
    idle.serve(SMALL, 0)
    assert idle.turns.wait_s(is_expecting=False) is None


@pytest.mark.parametrize(("first", "second", "least"), [(0.9, 0.8, 0.7), (0.3, 0.4, 0.0), (1.0, 0.8, 0.8)])
def test_the_least_agreement_is_one_minus_both_error_rates_and_at_least_zero(
    first: float, second: float, least: float
) -> None:
    assert least_agreement(first, second) == pytest.approx(least)


@pytest.mark.parametrize("shift", range(10))
def test_the_least_agreement_is_a_bound_however_the_errors_overlap(shift: int) -> None:
    """Of ten images, one classifier is wrong on three and the other on two, at every offset between them."""
    first = [image not in (0, 1, 2) for image in range(10)]
    second = [(image + shift) % 10 not in (0, 1) for image in range(10)]
    agreement = sum(one and other for one, other in zip(first, second, strict=True)) / 10
    assert agreement >= least_agreement(0.7, 0.8) - 1e-9
