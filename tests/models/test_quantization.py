import math

import pytest

from models.profiles import CascadeProfile, ProfileTable, SubNetworkProfile
from models.quantization import QUANTIZATION_STEPS, SLOWNESS, Quantization, Range
from models.subnetwork import SubNetwork, SuperViTConfig


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 1.0), (-0.17, 7.3), (-3.0, 4.0), (0.0, 5.0), (-5.0, 1e-3), (2.0, 3.0)]
)
def test_zero_is_one_of_the_values_that_a_range_represents(low: float, high: float) -> None:
    found = Range.of(low, high)
    step = (found.high - found.low) / QUANTIZATION_STEPS
    assert step == pytest.approx((high - min(low, 0)) / QUANTIZATION_STEPS)
    assert -found.low / step == pytest.approx(round(-found.low / step), abs=1e-9)
    assert found.low == pytest.approx(min(low, 0), abs=step)
    assert found.high == pytest.approx(high, abs=step)


def test_activations_that_are_always_zero_have_a_range() -> None:
    assert Range.of(0.0, 0.0).low == 0
    assert Range.of(0.0, 0.0).high > 0


@pytest.mark.parametrize(("low", "high"), [(0.1, 1.0), (-1.0, 0.0), (-math.inf, 1.0), (-1.0, math.nan)])
def test_a_range_without_zero_or_a_finite_end_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="a range must be finite"):
        Range(low, high)


def test_smoothing_beyond_its_bounds_is_refused() -> None:
    assert Range.of(-1.0, 1.0, (80, -80)).smoothing == (80, -80)
    with pytest.raises(ValueError, match="from -80 to 80"):
        Range.of(-1.0, 1.0, (0, 81))


def table(*top1: float | None) -> ProfileTable:
    return ProfileTable(tuple(SubNetworkProfile(SubNetwork(2 + i, 1.0), 10 + i, each) for i, each in enumerate(top1)))


SMALL, LARGE = SubNetwork(2, 1.0), SubNetwork(3, 1.0)


def test_a_loss_is_the_floating_point_accuracy_less_the_int8_accuracy() -> None:
    assert Quantization((), table(0.5, 0.78)).losses(table(0.49, 0.8)) == pytest.approx({SMALL: -0.01, LARGE: 0.02})


def test_a_loss_is_left_out_if_either_accuracy_is_unknown() -> None:
    assert Quantization((), table(0.5, None)).losses(table(0.5, 0.8)) == {SMALL: 0.0}
    assert Quantization((), table(0.5, 0.8)).losses(table(None, 0.8)) == {LARGE: 0.0}
    assert Quantization((), table(0.5, 0.8)).losses(table(0.5)) == {SMALL: 0.0}


def test_a_loss_above_three_tenths_of_a_point_or_an_unknown_loss_is_too_lossy() -> None:
    assert Quantization((), table(0.4975, 0.7965)).too_lossy(table(0.5, 0.8)) == [LARGE]
    assert Quantization((), table(0.497, 0.797)).too_lossy(table(0.5, 0.8)) == []  # 0.3 points, but for rounding
    assert Quantization((), table(0.6, 0.8)).too_lossy(table(0.5, None)) == [LARGE]
    assert Quantization((), table(0.6, 0.9)).too_lossy(table(0.5, 0.8)) == []


CONFIG = SuperViTConfig(patch_grids=(2, 3), keep_rates=(0.5, 1.0))


def family(top1: float, step: float = 0.0) -> ProfileTable:
    """Both grids at keep rates 0.5, 0.75 and 1, with three cascades: across the grids, and within each of them."""
    subnetworks = [SubNetwork(grid, rate) for grid in (2, 3) for rate in (0.5, 0.75, 1.0)]
    rows = tuple(
        SubNetworkProfile(each, 10 + i, top1 + i * step, is_trained=each.keep_rate != 0.75)
        for i, each in enumerate(subnetworks)
    )
    looks = ((subnetworks[0], subnetworks[5]), (subnetworks[3], subnetworks[5]), (subnetworks[0], subnetworks[2]))
    return ProfileTable(rows, tuple(CascadeProfile(*each, threshold=0.7, share=0.3, top1=0.9) for each in looks))


def test_rates_next_to_a_floating_point_one_run_in_floating_point_and_no_cascade_mixes_both() -> None:
    floats, int8 = family(0.6), Quantization((), family(0.5))
    assert int8.profile_with(floats, [], CONFIG) == int8.profile
    served = int8.profile_with(floats, [SubNetwork(2, 0.5), SubNetwork(2, 1.0)], CONFIG)
    assert {row.subnetwork.patch_grid: (row.top1, row.slowness) for row in served.rows} == {
        2: (0.6, SLOWNESS),
        3: (0.5, 1),
    }
    assert [(each.first.patch_grid, each.second.patch_grid) for each in served.cascades] == [(3, 3), (2, 2)]
    lowest = int8.profile_with(floats, [SubNetwork(2, 0.5)], CONFIG)
    assert [row.top1 for row in lowest.rows] == [0.6, 0.6, 0.5, 0.5, 0.5, 0.5]


def test_a_keep_rate_measured_only_in_int8_is_not_served_in_floating_point() -> None:
    floats = ProfileTable(tuple(row for row in family(0.6).rows if row.is_trained))
    served = Quantization((), family(0.5)).profile_with(floats, [SubNetwork(2, 0.5)], CONFIG)
    assert SubNetwork(2, 0.75) not in served.by_subnetwork
    assert SubNetwork(3, 0.75) in served.by_subnetwork


def test_only_trained_keep_rates_are_listed_as_too_lossy() -> None:
    assert Quantization((), family(0.5)).too_lossy(family(0.6)) == list(CONFIG.subnetworks)
