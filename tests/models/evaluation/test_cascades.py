import pytest
import torch

from models.evaluation.cascades import Cascade, choose_cascades, measure_cascade
from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork

SMALL, MIDDLE, LARGE = SubNetwork(2, 0.5), SubNetwork(2, 1.0), SubNetwork(4, 1.0)
ROWS = [SubNetworkProfile(SMALL, 100), SubNetworkProfile(MIDDLE, 300), SubNetworkProfile(LARGE, 400)]
# The small sub-network is sure of three images in four, on which the large one is no surer; the middle one is unsure.
SURE, UNSURE = [0.98, 0.98, 0.98], [0.42]
CONFIDENCES = {
    SMALL: torch.tensor(SURE + UNSURE),
    MIDDLE: torch.tensor([0.6, 0.6, 0.6, 0.6]),
    LARGE: torch.tensor([0.98, 0.98, 0.98, 0.98]),
}


def test_the_chosen_cascade_runs_the_second_subnetwork_only_where_the_first_is_unsure() -> None:
    chosen = choose_cascades(ROWS, CONFIDENCES)
    assert [(one.first, one.second) for one in chosen] == [(SMALL, LARGE)]
    assert 0.42 < chosen[0].threshold <= 0.98


def test_no_cascade_is_chosen_if_the_first_subnetwork_is_as_confident_as_the_others() -> None:
    alike = dict.fromkeys(CONFIDENCES, torch.tensor([0.3, 0.98]))
    assert choose_cascades(ROWS, alike) == []


def test_the_second_subnetwork_of_a_cascade_is_never_the_cheaper_one() -> None:
    backwards = {SMALL: CONFIDENCES[LARGE], MIDDLE: CONFIDENCES[MIDDLE], LARGE: CONFIDENCES[SMALL]}
    assert choose_cascades(ROWS, backwards) == []


def test_a_cascade_that_a_mixture_of_cheaper_and_costlier_choices_beats_is_left_out() -> None:
    """A threshold of 0.8 loses to an equal mixture of a threshold of 0.5 and the large sub-network alone.

    At 0.5 the large one runs on one image of four: a cost of 200 for a confidence of 0.875. At 0.8 it runs on two: 300
    for 0.8775. Alone it costs 400 for 0.9025, so the mixture costs 300 for 0.889.
    """
    confidences = {SMALL: torch.tensor([0.9, 0.9, 0.75, 0.45]), LARGE: torch.tensor([0.95, 0.95, 0.76, 0.95])}
    rows = [ROWS[0], ROWS[2]]
    thresholds = [one.threshold for one in choose_cascades(rows, confidences)]
    assert len(thresholds) == 1
    assert 0.45 < thresholds[0] <= 0.75


def test_a_cascade_is_measured_by_the_answers_of_both_subnetworks() -> None:
    first = torch.tensor([[1, 1, 0.9], [0, 1, 0.6], [1, 1, 0.59], [0, 0, 0.2]], dtype=torch.float64)
    second = torch.tensor([[0, 1, 0.9], [1, 1, 0.9], [0, 1, 0.9], [1, 1, 0.9]], dtype=torch.float64)
    measured = measure_cascade(Cascade(SMALL, LARGE, 0.6), {SMALL: first, LARGE: second}, first_top1=2 / 4)
    assert (measured.first, measured.second, measured.threshold) == (SMALL, LARGE, 0.6)
    assert measured.share == 2 / 4  # 0.59 and 0.2
    assert measured.top1 == 2 / 4  # the first is right at 0.9 and wrong at 0.6; the second is wrong, then right


def test_images_without_a_label_do_not_count_in_a_measured_cascade() -> None:
    first = torch.tensor([[1, 1, 0.9], [torch.nan] * 3, [0, 0, 0.2]], dtype=torch.float64)
    second = torch.tensor([[1, 1, 0.9], [torch.nan] * 3, [1, 1, 0.9]], dtype=torch.float64)
    measured = measure_cascade(Cascade(SMALL, LARGE, 0.6), {SMALL: first, LARGE: second}, first_top1=1 / 2)
    assert measured.share == pytest.approx(1 / 2)
    assert measured.top1 == 1.0


def test_the_gain_of_the_second_subnetwork_is_added_to_the_profiled_accuracy_of_the_first() -> None:
    """The profiled accuracy of the first may come from more images, on which it is higher."""
    first = torch.tensor([[1, 1, 0.9], [0, 0, 0.2]], dtype=torch.float64)
    second = torch.tensor([[1, 1, 0.9], [1, 1, 0.9]], dtype=torch.float64)
    cascade = Cascade(SMALL, LARGE, 0.6)
    assert measure_cascade(cascade, {SMALL: first, LARGE: second}, first_top1=0.4).top1 == pytest.approx(0.9)
    assert measure_cascade(cascade, {SMALL: first, LARGE: second}, first_top1=0.7).top1 == 1.0
