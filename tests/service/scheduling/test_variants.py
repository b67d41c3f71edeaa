from dataclasses import replace

import pytest

from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork
from service.domain import SecondLook
from service.scheduling.variants import Variant, with_second_look

FIRST = SubNetworkProfile(SubNetwork(8, 0.5), 700_000_000, 0.7)
SECOND = SubNetworkProfile(SubNetwork(14, 1.0), 4_000_000_000, 0.9)
ALONE = Variant(0, FIRST, (1.0, 2.0), 0)
CASCADE = Variant(1, FIRST, (2.0, 3.0), 0, SecondLook(2, SECOND, 0.85, 0.25, 0.88))


def test_the_expected_cost_of_a_cascade_weights_its_second_look_by_its_share() -> None:
    assert (ALONE.gflops, ALONE.most_gflops, ALONE.top1) == (0.7, 0.7, 0.7)
    assert CASCADE.gflops == pytest.approx(0.7 + 0.25 * 4)
    assert (CASCADE.most_gflops, CASCADE.top1) == (4.7, 0.88)


def test_an_unsure_image_without_its_second_look_bears_the_whole_loss_of_accuracy() -> None:
    """A gain of 0.18 over all images comes from a quarter of them: 0.72 on each of those."""
    assert CASCADE.top1_without_second_look == pytest.approx(0.88 - 0.72)
    assert 0.75 * 0.88 + 0.25 * (CASCADE.top1_without_second_look or 0) == pytest.approx(0.7)
    assert ALONE.top1_without_second_look == 0.7
    rare = replace(CASCADE, second_look=SecondLook(2, SECOND, 0.5, 0.002, 0.71))
    assert rare.top1_without_second_look == 0.0, "the noise of few images is clipped"


def test_the_name_of_a_cascade_contains_both_looks_and_the_threshold() -> None:
    assert str(ALONE) == "grid 8 at keep rate 0.5"
    assert str(CASCADE) == "grid 8 at keep rate 0.5, then grid 14 at keep rate 1 if less than 85% sure"


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, [1, 2, 3, 4]),
        (0.25, [1 + 0.25 * 8, 2 + 0.5 * 8, 3 + 0.75 * 8, 4 + 8]),  # below one image, that part of a batch of one
        (0.75, [1 + 0.75 * 8, 2 + 10, 3 + 12.75, 4 + 15]),  # 1.5 images take between 8 and 12, 2.25 between 12 and 15
        (1.0, [1 + 8, 2 + 12, 3 + 15, 4 + 17]),
    ],
)
def test_second_looks_take_as_long_as_a_batch_of_their_share_of_the_images(share: float, expected: list[float]) -> None:
    assert with_second_look((1, 2, 3, 4), (8, 12, 15, 17), share) == pytest.approx(expected)
