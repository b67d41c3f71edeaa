import pytest
import torch

from models.evaluation.cascades import Cascade, choose_cascades, measure_cascade
from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork

SMALL, MIDDLE, LARGE = SubNetwork(2, 0.5), SubNetwork(2, 1.0), SubNetwork(4, 1.0)
ROWS = [SubNetworkProfile(SMALL, 100), SubNetworkProfile(MIDDLE, 300), SubNetworkProfile(LARGE, 400)]
# The small one is sure of three images in four, where the large one is no surer; the middle one knows little.
SURE, UNSURE = [0.98, 0.98, 0.98], [0.42]
CONFIDENCES = {
    SMALL: torch.tensor(SURE + UNSURE),
    MIDDLE: torch.tensor([0.6, 0.6, 0.6, 0.6]),
    LARGE: torch.tensor([0.98, 0.98, 0.98, 0.98]),
}


def test_a_pair_is_chosen_that_asks_the_second_only_where_the_first_is_unsure() -> None:
    chosen = choose_cascades(ROWS, CONFIDENCES)
    assert [(one.first, one.second) for one in chosen] == [(SMALL, LARGE)]
    assert 0.42 < chosen[0].threshold <= 0.98


def test_nothing_is_chosen_where_the_first_is_as_sure_as_the_others() -> None:
    alike = dict.fromkeys(CONFIDENCES, torch.tensor([0.3, 0.98]))
    assert choose_cascades(ROWS, alike) == []


def test_a_cheaper_sub_network_never_looks_second() -> None:
    backwards = {SMALL: CONFIDENCES[LARGE], MIDDLE: CONFIDENCES[MIDDLE], LARGE: CONFIDENCES[SMALL]}
    assert choose_cascades(ROWS, backwards) == []


def test_what_a_mixture_of_cheaper_and_dearer_ones_beats_is_left_out() -> None:
    """At 0.5 one of four images is looked at again, at 0.8 two; the large one alone costs 400 and is worth 0.9025.

    Worth 0.875 for 200 and 0.8775 for 300, where half of each of the others would give 0.889.
    """
    confidences = {SMALL: torch.tensor([0.9, 0.9, 0.75, 0.45]), LARGE: torch.tensor([0.95, 0.95, 0.76, 0.95])}
    rows = [ROWS[0], ROWS[2]]
    thresholds = [one.threshold for one in choose_cascades(rows, confidences)]
    assert len(thresholds) == 1
    assert 0.45 < thresholds[0] <= 0.75


def test_a_cascade_is_measured_by_what_both_looks_answer() -> None:
    first = torch.tensor([[1, 1, 0.9], [0, 1, 0.6], [1, 1, 0.59], [0, 0, 0.2]], dtype=torch.float64)
    second = torch.tensor([[0, 1, 0.9], [1, 1, 0.9], [0, 1, 0.9], [1, 1, 0.9]], dtype=torch.float64)
    measured = measure_cascade(Cascade(SMALL, LARGE, 0.6), {SMALL: first, LARGE: second}, first_top1=2 / 4)
    assert (measured.first, measured.second, measured.threshold) == (SMALL, LARGE, 0.6)
    assert measured.share == 2 / 4  # 0.59 and 0.2
    assert measured.top1 == 2 / 4  # the first right at 0.9, wrong at 0.6; the second wrong, then right


def test_images_without_a_label_are_left_out() -> None:
    first = torch.tensor([[1, 1, 0.9], [torch.nan] * 3, [0, 0, 0.2]], dtype=torch.float64)
    second = torch.tensor([[1, 1, 0.9], [torch.nan] * 3, [1, 1, 0.9]], dtype=torch.float64)
    measured = measure_cascade(Cascade(SMALL, LARGE, 0.6), {SMALL: first, LARGE: second}, first_top1=1 / 2)
    assert measured.share == pytest.approx(1 / 2)
    assert measured.top1 == 1.0


def test_what_the_second_look_adds_counts_beside_the_first_as_the_profile_has_it() -> None:
    """The profile may have the first's accuracy from more images, on which it does better."""
    first = torch.tensor([[1, 1, 0.9], [0, 0, 0.2]], dtype=torch.float64)
    second = torch.tensor([[1, 1, 0.9], [1, 1, 0.9]], dtype=torch.float64)
    cascade = Cascade(SMALL, LARGE, 0.6)
    assert measure_cascade(cascade, {SMALL: first, LARGE: second}, first_top1=0.4).top1 == pytest.approx(0.9)
    assert measure_cascade(cascade, {SMALL: first, LARGE: second}, first_top1=0.7).top1 == 1.0
