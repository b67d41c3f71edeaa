import pytest

from models.latency_estimate import MIN_ERROR, UNKNOWN_ERROR, Cell, LatencyEstimate
from models.subnetwork import SubNetwork

SUBNETWORKS = [SubNetwork(grid, 1.0) for grid in (2, 3, 4, 5)]
MACS = dict(zip(SUBNETWORKS, (100, 200, 400, 800), strict=True))
CHEAPEST, SECOND, THIRD, COSTLIEST = SUBNETWORKS
CELLS = [(subnetwork, size) for subnetwork in SUBNETWORKS for size in (1, 2, 4, 8)]


def seconds(cell: Cell) -> float:
    """A batch costs 10 ms, an image 1 ms, and a multiply-accumulate 0.1 ms."""
    subnetwork, size = cell
    return 0.010 + 0.001 * size + 1e-4 * MACS[subnetwork] * size


def measured(*cells: Cell) -> dict[Cell, float]:
    return {cell: seconds(cell) for cell in cells}


def test_latencies_linear_in_batch_images_and_macs_are_estimated_exactly() -> None:
    estimate = LatencyEstimate(measured((CHEAPEST, 1), (CHEAPEST, 8), (COSTLIEST, 1), (COSTLIEST, 4)), MACS)
    assert estimate.seconds(CELLS) == pytest.approx([seconds(cell) for cell in CELLS])
    assert estimate.error == MIN_ERROR


def test_one_measured_cell_gives_the_order_of_magnitude_of_all_others() -> None:
    estimate = LatencyEstimate({(SECOND, 2): 0.04}, MACS)
    assert estimate.seconds([(SECOND, 2)]) == pytest.approx([0.04])
    assert all(0.005 < found < 1 for found in estimate.seconds(CELLS))
    assert estimate.error == UNKNOWN_ERROR


def test_no_factor_of_the_fit_is_negative() -> None:
    """If costlier batches measured faster than cheaper ones, the estimates of the others still do not fall to 0."""
    estimate = LatencyEstimate({(CHEAPEST, 1): 0.03, (THIRD, 1): 0.02, (SECOND, 2): 0.025, (THIRD, 4): 0.02}, MACS)
    assert min(estimate.seconds(CELLS)) >= 0.015


def test_a_cell_that_deviates_from_the_fit_corrects_the_estimates_near_it() -> None:
    known = measured((CHEAPEST, 1), (CHEAPEST, 8), (COSTLIEST, 1), (COSTLIEST, 8))
    plain, odd = LatencyEstimate(known, MACS), LatencyEstimate(known | {(SECOND, 1): 2 * seconds((SECOND, 1))}, MACS)
    near, far = [(SECOND, 2)], [(CHEAPEST, 8)]
    assert odd.seconds(near)[0] > 1.1 * plain.seconds(near)[0]
    assert odd.seconds(far) == pytest.approx(plain.seconds(far), rel=0.05)
    assert odd.error > 2 * MIN_ERROR


def test_estimates_lie_between_the_measurements_of_cheaper_and_costlier_batches() -> None:
    known = measured((CHEAPEST, 1), (CHEAPEST, 8), (COSTLIEST, 1), (COSTLIEST, 8)) | {
        (SECOND, 2): 0.08,
        (THIRD, 2): 0.081,
    }
    estimate = LatencyEstimate(known, MACS)
    between = MACS | {SubNetwork(9, 1.0): 300}
    (found,) = LatencyEstimate(known, between).seconds([(SubNetwork(9, 1.0), 2)])
    assert 0.08 <= found <= 0.081
    assert estimate.seconds([(SECOND, 4)])[0] >= 0.08
