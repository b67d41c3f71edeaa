import math

import pytest

from models.profiles import ProfileTable, SubNetworkProfile
from models.quantization import STEPS, Quantization, Range
from models.subnetwork import SubNetwork


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 1.0), (-0.17, 7.3), (-3.0, 4.0), (0.0, 5.0), (-5.0, 1e-3), (2.0, 3.0)]
)
def test_zero_is_one_of_the_values_that_a_range_tells_apart(low: float, high: float) -> None:
    found = Range.of(low, high)
    step = (found.high - found.low) / STEPS
    assert step == pytest.approx((high - min(low, 0)) / STEPS)
    assert -found.low / step == pytest.approx(round(-found.low / step), abs=1e-9)
    assert found.low == pytest.approx(min(low, 0), abs=step)
    assert found.high == pytest.approx(high, abs=step)


def test_activations_that_are_always_zero_have_a_range_too() -> None:
    assert Range.of(0.0, 0.0).low == 0
    assert Range.of(0.0, 0.0).high > 0


@pytest.mark.parametrize(("low", "high"), [(0.1, 1.0), (-1.0, 0.0), (-math.inf, 1.0), (-1.0, math.nan)])
def test_a_range_without_zero_or_an_end_is_none(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="a range must be finite"):
        Range(low, high)


def test_no_channel_is_smoothed_beyond_bounds() -> None:
    assert Range.of(-1.0, 1.0, (80, -80)).smoothing == (80, -80)
    with pytest.raises(ValueError, match="from -80 to 80"):
        Range.of(-1.0, 1.0, (0, 81))


def table(*top1: float | None) -> ProfileTable:
    return ProfileTable(tuple(SubNetworkProfile(SubNetwork(2 + i, 1.0), 10 + i, each) for i, each in enumerate(top1)))


def test_the_largest_loss_is_that_of_the_sub_network_that_loses_most() -> None:
    assert Quantization((), table(0.5, 0.78)).largest_loss(table(0.501, 0.8)) == pytest.approx(0.02)
    assert Quantization((), table(0.6, 0.9)).largest_loss(table(0.5, 0.8)) == pytest.approx(-0.1)


def test_a_loss_is_unknown_where_either_accuracy_is() -> None:
    assert Quantization((), table(0.5, None)).largest_loss(table(0.5, 0.8)) is None
    assert Quantization((), table(0.5, 0.8)).largest_loss(table(0.5, None)) is None
    assert Quantization((), table(0.5, 0.8)).largest_loss(table(0.5)) is None
