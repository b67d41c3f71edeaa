import math
from dataclasses import replace

import pytest

from models.profiles import CascadeProfile, ProfileTable, SubNetworkProfile
from models.quantization import SLOWNESS, STEPS, Quantization, Range
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


SMALL, LARGE = SubNetwork(2, 1.0), SubNetwork(3, 1.0)


def test_a_loss_is_what_is_less_known_than_before() -> None:
    assert Quantization((), table(0.5, 0.78)).losses(table(0.49, 0.8)) == pytest.approx({SMALL: -0.01, LARGE: 0.02})


def test_a_loss_is_unknown_where_either_accuracy_is() -> None:
    assert Quantization((), table(0.5, None)).losses(table(0.5, 0.8)) == {SMALL: 0.0}
    assert Quantization((), table(0.5, 0.8)).losses(table(None, 0.8)) == {LARGE: 0.0}
    assert Quantization((), table(0.5, 0.8)).losses(table(0.5)) == {SMALL: 0.0}


def test_more_than_three_tenths_of_a_point_or_an_unknown_loss_is_not_tolerated() -> None:
    assert Quantization((), table(0.4975, 0.7965)).too_lossy(table(0.5, 0.8)) == [LARGE]
    assert Quantization((), table(0.6, 0.8)).too_lossy(table(0.5, None)) == [LARGE]
    assert Quantization((), table(0.6, 0.9)).too_lossy(table(0.5, 0.8)) == []


def test_what_is_not_served_in_8_bits_keeps_its_accuracy_and_is_looked_at_no_second_time() -> None:
    cascade = CascadeProfile(SMALL, LARGE, threshold=0.7, share=0.3, top1=0.8)
    int8 = Quantization((), ProfileTable(table(0.5, 0.8).rows, (cascade,)))
    assert int8.profile_with(table(0.6, 0.9), []) == int8.profile
    first, second = table(0.5, 0.9).rows
    assert int8.profile_with(table(0.6, 0.9), [LARGE]) == ProfileTable((first, replace(second, slowness=SLOWNESS)))
