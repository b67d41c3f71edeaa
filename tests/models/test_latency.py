import math

import pytest

from models.latency import LatencyTable
from models.subnetwork import SubNetwork

SMALL, LARGE = SubNetwork(2, 0.5), SubNetwork(4, 1.0)


def test_latencies_of_unmeasured_batch_sizes_are_interpolated_linearly() -> None:
    table = LatencyTable((1, 2, 6), {SMALL: (0.010, 0.012, 0.032), LARGE: (1.0, 2.0, 4.0)})
    assert table.max_batch_size == 6
    assert table.row(SMALL) == pytest.approx((0.010, 0.012, 0.017, 0.022, 0.027, 0.032))
    assert table.row(LARGE) == pytest.approx((1.0, 2.0, 2.5, 3.0, 3.5, 4.0))


def test_latency_never_decreases_with_batch_size() -> None:
    table = LatencyTable((1, 2, 4), {SMALL: (0.010, 0.008, 0.012)})
    assert table.row(SMALL) == pytest.approx((0.010, 0.010, 0.010, 0.012))


def test_a_table_may_hold_a_single_batch_size() -> None:
    assert LatencyTable((1,), {SMALL: (0.5,)}).row(SMALL) == (0.5,)


def test_padded_batches_take_as_long_as_the_batch_size_that_they_are_padded_to() -> None:
    table = LatencyTable((1, 2, 4, 7), {SMALL: (0.01, 0.02, 0.04, 0.08)}, is_padded=True)
    assert table.row(SMALL) == (0.01, 0.02, 0.04, 0.04, 0.08, 0.08, 0.08)


def test_an_unmeasured_subnetwork_has_no_row() -> None:
    with pytest.raises(KeyError):
        LatencyTable((1,), {SMALL: (0.5,)}).row(LARGE)


@pytest.mark.parametrize("sizes", [(), (2, 4), (1, 4, 2), (1, 2, 2)])
def test_batch_sizes_must_ascend_from_one(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="batch sizes must ascend from 1"):
        LatencyTable(sizes, {SMALL: (0.5,) * len(sizes)})


def test_a_table_needs_a_sub_network() -> None:
    with pytest.raises(ValueError, match="at least one sub-network"):
        LatencyTable((1,), {})


def test_every_batch_size_needs_a_latency() -> None:
    with pytest.raises(ValueError, match="1 figures for 2 batch sizes at grid 4 at keep rate 1"):
        LatencyTable((1, 2), {SMALL: (0.5, 0.6), LARGE: (0.5,)})


@pytest.mark.parametrize("figure", [0.0, -0.1, math.inf, math.nan])
def test_every_latency_must_be_a_positive_number(figure: float) -> None:
    with pytest.raises(ValueError, match="must be a positive number of seconds"):
        LatencyTable((1, 2), {SMALL: (0.5, figure)})
