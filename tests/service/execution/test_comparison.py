import pytest
import torch
from torch import Tensor

from models.subnetwork import SubNetwork
from service.errors import ModelChangeError
from service.execution.comparison import TIMED_IMAGES, Comparer, Comparison, Contender, require_finite
from service.execution.live_sample import SampledImage

SMALL, LARGE = SubNetwork(2, 0.5), SubNetwork(4, 1.0)


class Scripted:
    """Answers the class that the first pixel gives, in a set time; the first run of a sub-network takes a minute."""

    def __init__(self, clock: list[float], seconds: float, shift: int = 0) -> None:
        self.clock, self.seconds, self.shift = clock, seconds, shift
        self.ran: list[SubNetwork] = []
        self.logits: Tensor | None = None

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        self.clock[0] += self.seconds if subnetwork in self.ran else 60.0
        self.ran.append(subnetwork)
        if self.logits is not None:
            return self.logits
        wanted = torch.zeros(1, 3)
        wanted[0, (int(images[0, 0, 0, 0]) + self.shift) % 3] = 1
        return wanted


class Both:
    def __init__(self, shift: int = 0, new_names: tuple[str, ...] = ("a", "b", "c")) -> None:
        self.clock = [0.0]
        self.old, self.new = Scripted(self.clock, 2.0), Scripted(self.clock, 3.0, shift)
        self.old.ran += [SMALL, LARGE]  # it has run both before
        old, new = ((each.run, lambda: self.clock[0]) for each in (self.old, self.new))
        self.comparer = Comparer(Contender(*old, ("a", "b", "c")), Contender(*new, new_names))

    def compare(self, *values: int, subnetwork: SubNetwork = SMALL) -> Comparison:
        for value in values:
            self.comparer.compare(SampledImage(torch.full((3, 2, 2), value, dtype=torch.uint8), subnetwork))
        return self.comparer.found


def test_agreement_and_latency_are_unknown_before_the_first_image() -> None:
    found = Both().comparer.found
    assert (found.num_images, found.agreement, found.latency_ratio) == (0, None, None)


def test_equal_answers_agree_and_the_first_run_of_a_shape_is_not_timed() -> None:
    both = Both()
    both.compare(*[0, 1, 2] * 2)
    found = both.compare(1, subnetwork=LARGE)
    assert (found.num_images, found.agreement) == (TIMED_IMAGES - 1, 1.0)
    assert found.latency_ratio is None
    both.compare(1)
    assert found.latency_ratio == pytest.approx(1.5)


def test_different_answers_do_not_agree() -> None:
    assert Both(shift=1).compare(0, 1).agreement == 0.0


def test_classes_are_compared_by_name_whatever_their_index() -> None:
    found = Both(shift=1, new_names=("c", "a", "b")).compare(0, 1, 2)
    assert found.agreement == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_is_rejected(bad: float) -> None:
    both = Both()
    both.new.logits = torch.tensor([[0.0, bad, 0.0]])
    with pytest.raises(ModelChangeError, match="not finite"):
        both.compare(0)


def test_require_finite_runs_each_sub_network_once_and_rejects_nan() -> None:
    scripted = Scripted([0.0], 1.0)
    require_finite(scripted.run, 2, (SMALL, LARGE))
    assert scripted.ran == [SMALL, LARGE]
    scripted.logits = torch.full((1, 3), float("nan"))
    with pytest.raises(ModelChangeError, match="not finite"):
        require_finite(scripted.run, 2, (SMALL,))
