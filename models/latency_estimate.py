"""Estimate the latency of batches that were not measured from a few that were. Runs without torch; measures nothing.

A batch of B images takes about a + b B + c B m seconds: a constant per batch, a constant per image, and the arithmetic,
where m is the work of an image, its multiply-accumulates weighted by slowness. Where measured cells deviate from this
fit, cells near them in the logarithms of m and B deviate as well: each estimate is corrected by the deviations of its
neighbours. An estimate is never below the measured time of a cell with no more work and no more images, nor above that
of a cell with no less of either.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from models.subnetwork import SubNetwork

Cell = tuple[SubNetwork, int]  # sub-network and batch size
Floats = npt.NDArray[np.float64]

# Relative errors: a lower bound, and what is assumed where the fit passes through all cells. Few cells may agree by
# chance: on two virtual cores a tenth of all estimates were off by more than 18 %.
MIN_ERROR, UNKNOWN_ERROR = 0.1, 0.3
KERNEL_WIDTH = 0.5  # of a neighbour's correction, in natural logarithms of the work and of the batch size
UNCORRECTED_WEIGHT = 0.1  # weight of the uncorrected fit, where a neighbour at distance 0 weighs 1


class LatencyEstimate:
    """A fit to the measured cells.

    Attributes:
        error: relative error of the estimates: the root mean square over the measured cells, each corrected by the
            others alone, and at least MIN_ERROR; UNKNOWN_ERROR where there are too few cells to tell.
    """

    def __init__(self, measured_s: Mapping[Cell, float], work: Mapping[SubNetwork, float]) -> None:
        """Fit the measured cells.

        Args:
            measured_s: seconds by cell, of at least one cell.
            work: of one image, by sub-network, as its profile counts it.
        """
        self._work = work
        self._costs = self._costs_of(list(measured_s))
        self._seconds = np.array(list(measured_s.values()))
        self._factors = _fit(_terms(self._costs), self._seconds)
        self._log_residuals = np.log(self._seconds / (_terms(self._costs) @ self._factors))
        near = _nearness(self._costs, self._costs)
        np.fill_diagonal(near, 0.0)
        errors = self._log_residuals - self._correction(near)
        is_overfitted = len(errors) <= len(self._factors)  # it passes through every cell, however poor it is
        self.error = UNKNOWN_ERROR if is_overfitted else max(MIN_ERROR, float(np.sqrt(np.mean(errors**2))))

    def seconds(self, cells: Sequence[Cell]) -> list[float]:
        """Estimate the seconds of each of the given cells."""
        costs = self._costs_of(cells)
        likely = (_terms(costs) @ self._factors) * np.exp(self._correction(_nearness(costs, self._costs)))
        cheaper, costlier = _dominated(self._costs, costs), _dominated(-self._costs, -costs)
        lowest = np.where(cheaper, self._seconds, 0.0).max(axis=1)
        highest = np.where(costlier, self._seconds, np.inf).min(axis=1)
        bounded: list[float] = np.minimum(np.maximum(likely, lowest), np.maximum(lowest, highest)).tolist()
        return bounded

    def _costs_of(self, cells: Sequence[Cell]) -> Floats:
        """Return the work and the batch size of each cell as a (cells, 2) array."""
        return np.array([(self._work[subnetwork], batch_size) for subnetwork, batch_size in cells], dtype=np.float64)

    def _correction(self, near: Floats) -> Floats:
        """Average the logarithmic deviations of the measured cells, weighted by nearness."""
        correction: Floats = near @ self._log_residuals / (near.sum(axis=1) + UNCORRECTED_WEIGHT)
        return correction


def _terms(costs: Floats) -> Floats:
    work, batch_size = costs.T
    return np.stack([np.ones_like(work), batch_size, work * batch_size], axis=1)


def _dominated(measured: Floats, costs: Floats) -> npt.NDArray[np.bool_]:
    """Return for each of (n, 2) costs which of (m, 2) measured ones exceed it in neither column; (n, m)."""
    work, batch_size = (measured[:, of] <= costs[:, of, None] for of in (0, 1))
    return work & batch_size


def _nearness(costs: Floats, measured: Floats) -> Floats:
    """Weight the (m, 2) measured costs by their distance to each of (n, 2) costs, 1 at distance 0; (n, m)."""
    of_cells, of_measured = np.log(costs) / KERNEL_WIDTH, np.log(measured) / KERNEL_WIDTH
    work, batch_size = (of_cells[:, of, None] - of_measured[:, of] for of in (0, 1))
    near: Floats = np.exp((work * work + batch_size * batch_size) / -2)
    return near


def _fit(terms: Floats, seconds: Floats) -> Floats:
    """Fit factors of at least 0 by least squares of relative errors, trying every subset of the three terms."""
    relative, best, least = terms / seconds[:, None], np.zeros(terms.shape[1]), np.inf
    for count in range(1, terms.shape[1] + 1):
        for chosen in map(list, combinations(range(terms.shape[1]), count)):
            factors = np.zeros(terms.shape[1])
            factors[chosen] = np.linalg.lstsq(relative[:, chosen], np.ones(len(seconds)), rcond=None)[0]
            misfit = float(((relative @ factors - 1) ** 2).sum())
            if (factors >= 0).all() and misfit < least and (terms @ factors > 0).all():
                best, least = factors, misfit
    return best
