"""What a batch probably takes that was not measured, from a few that were. Runs without torch; measures nothing.

A batch of B images takes about a + b B + c B m seconds: what a batch costs as such, an image, and the arithmetic, where
m is the work of an image, its multiply-accumulates. Where measured cells lie beside that, so do the cells near them, in
the logarithms of m and B: each estimate is corrected by what its neighbours are off. What is more work is never
estimated to take less than was measured of something that is less, nor the other way round.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from models.subnetwork import SubNetwork

Cell = tuple[SubNetwork, int]  # and how many images
Floats = npt.NDArray[np.float64]

# Few cells may agree by chance: on two virtual cores a tenth of all estimates were off by more than 18 %.
LEAST_ERROR, UNKNOWN_ERROR = 0.1, 0.3
REACH = 0.5  # of a neighbour's correction, in factors of e of the work and of the batch size
PRIOR = 0.1  # how much the fit counts, where a neighbour at no distance counts 1


class LatencyEstimate:
    """A fit to the cells that were measured.

    Attributes:
        error: how far estimates are off, as a fraction of them: the root mean square over the measured cells, each
            corrected by the others alone.
    """

    def __init__(self, measured_s: Mapping[Cell, float], work: Mapping[SubNetwork, float]) -> None:
        """Fit.

        Args:
            measured_s: seconds by cell, at least one.
            work: of one image, of each sub-network, as its profile counts it.
        """
        self._work = work
        self._costs = self._costs_of(list(measured_s))
        self._seconds = np.array(list(measured_s.values()))
        self._factors = _fit(_terms(self._costs), self._seconds)
        self._off = np.log(self._seconds / (_terms(self._costs) @ self._factors))
        near = _nearness(self._costs, self._costs)
        np.fill_diagonal(near, 0.0)
        errors = self._off - self._correction(near)
        is_overfitted = len(errors) <= len(self._factors)  # it goes through all of them, whatever it is worth
        self.error = UNKNOWN_ERROR if is_overfitted else max(LEAST_ERROR, float(np.sqrt(np.mean(errors**2))))

    def seconds(self, cells: Sequence[Cell]) -> list[float]:
        """Estimate some cells."""
        costs = self._costs_of(cells)
        likely = (_terms(costs) @ self._factors) * np.exp(self._correction(_nearness(costs, self._costs)))
        cheaper, dearer = _are_at_most(self._costs, costs), _are_at_most(-self._costs, -costs)
        lowest = np.where(cheaper, self._seconds, 0.0).max(axis=1)
        highest = np.where(dearer, self._seconds, np.inf).min(axis=1)
        bounded: list[float] = np.minimum(np.maximum(likely, lowest), np.maximum(lowest, highest)).tolist()
        return bounded

    def _costs_of(self, cells: Sequence[Cell]) -> Floats:
        """Put (cells, 2) work and batch sizes in an array."""
        return np.array([(self._work[subnetwork], batch_size) for subnetwork, batch_size in cells], dtype=np.float64)

    def _correction(self, near: Floats) -> Floats:
        """Average what the measured cells are off, in logarithms, the nearer ones more."""
        correction: Floats = near @ self._off / (near.sum(axis=1) + PRIOR)
        return correction


def _terms(costs: Floats) -> Floats:
    work, batch_size = costs.T
    return np.stack([np.ones_like(work), batch_size, work * batch_size], axis=1)


def _are_at_most(measured: Floats, costs: Floats) -> npt.NDArray[np.bool_]:
    """Tell for each of (n, 2) costs which of (m, 2) measured ones exceed it in neither; (n, m)."""
    work, batch_size = (measured[:, of] <= costs[:, of, None] for of in (0, 1))
    return work & batch_size


def _nearness(costs: Floats, measured: Floats) -> Floats:
    """Weigh for each of (n, 2) costs the (m, 2) measured ones, 1 at no distance; (n, m)."""
    of_cells, of_measured = np.log(costs) / REACH, np.log(measured) / REACH
    work, batch_size = (of_cells[:, of, None] - of_measured[:, of] for of in (0, 1))
    near: Floats = np.exp((work * work + batch_size * batch_size) / -2)
    return near


def _fit(terms: Floats, seconds: Floats) -> Floats:
    """Find the factors, none below 0, with the least sum of squares of relative errors; of three terms, by trial."""
    relative, best, least = terms / seconds[:, None], np.zeros(terms.shape[1]), np.inf
    for count in range(1, terms.shape[1] + 1):
        for chosen in map(list, combinations(range(terms.shape[1]), count)):
            factors = np.zeros(terms.shape[1])
            factors[chosen] = np.linalg.lstsq(relative[:, chosen], np.ones(len(seconds)), rcond=None)[0]
            misfit = float(((relative @ factors - 1) ** 2).sum())
            if (factors >= 0).all() and misfit < least and (terms @ factors > 0).all():
                best, least = factors, misfit
    return best
