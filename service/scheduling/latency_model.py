"""Predicts how long a batch takes: the profile, corrected by observed batches and by the load of other processes."""

from collections.abc import Collection

from service.scheduling.catalog import VariantCatalog
from service.scheduling.estimators import Slowdown
from service.scheduling.variants import Latencies, with_second_look

TURNAROUND_GAIN = 0.1
MAX_TURNAROUND = 2.0
MIN_BATCH_S = 1e-6  # lower bound on the time of a batch: a coarse clock may measure 0
DRIFT_GAIN = 0.1
MAX_DRIFT = 0.2


class LatencyModel:
    """Predicts latencies, and learns from batches: the machine's slowdown, and how far off each profile is.

    Attributes:
        prior_slowdown: slowdown to expect from the load of other processes while there is no recent batch.
        throttle_factor: how much longer than its batches the engine is occupied because of a utilization ceiling.
    """

    def __init__(self, catalog: VariantCatalog) -> None:
        """Start from the profile."""
        self.prior_slowdown = 1.0
        self.throttle_factor = 1.0
        self._catalog = self._cautious = catalog
        self._slowdown = Slowdown()
        self._latencies_s = [variant.latency_by_batch_s for variant in catalog.variants]
        self._drift = [1.0] * len(catalog.variants)
        self._turnaround = 1.0  # time that a batch occupies the engine, over the time of the batch itself

    @property
    def latencies_s(self) -> Latencies:
        """Corrected latencies by variant and batch size, in seconds, before the slowdown."""
        return self._latencies_s

    @property
    def overhead_factor(self) -> float:
        """How much longer than its batches the engine is occupied."""
        return max(self.throttle_factor, self._turnaround)  # the turnaround falls within a pause

    def refine(self, catalog: VariantCatalog, cautious: VariantCatalog) -> None:
        """Replace the profile by a better one of the same variants.

        Args:
            catalog: the new latencies; the drift that was learned against another figure is reset.
            cautious: the same, plus the error of the latencies that are estimates: the ones to plan with.
        """
        pairs = zip(catalog.variants, self._catalog.variants, strict=True)
        is_kept = [new.latency_by_batch_s == old.latency_by_batch_s for new, old in pairs]
        self._drift = [drift if kept else 1.0 for drift, kept in zip(self._drift, is_kept, strict=True)]
        self._catalog, self._cautious = catalog, cautious
        self._latencies_s = [self._corrected(index) for index in range(len(self._drift))]
        self._correct_cascades(range(len(self._drift)))

    def take_over(self, other: "LatencyModel") -> None:
        """Continue from the slowdown of another model: what slows its batches slows those of this one as well."""
        self.prior_slowdown, self.throttle_factor = other.prior_slowdown, other.throttle_factor
        self._slowdown, self._turnaround = other._slowdown, other._turnaround

    def slowdown(self, now: float, spreads: float = 0.0) -> float:
        """Return the factor on the latencies at `now`, with an allowance of `spreads` standard deviations."""
        return self._slowdown.predict(now, self.prior_slowdown, spreads)

    def predict(self, index: int, size: int, now: float) -> float:
        """Return the seconds that a batch of a variant will probably take."""
        return self._latencies_s[index][size - 1] * self.slowdown(now)

    def observe(self, index: int, size: int, seconds: float, now: float, turnaround_s: float) -> None:
        """Learn from a batch.

        Args:
            index: index of the variant that ran; a single sub-network, not a cascade.
            size: size of the batch.
            seconds: how long the batch took.
            now: when the batch ended.
            turnaround_s: from when the engine was free, and a request waited, until the batch started.
        """
        taken = min(1 + turnaround_s / max(seconds, MIN_BATCH_S), MAX_TURNAROUND)
        self._turnaround += TURNAROUND_GAIN * (taken - self._turnaround)
        # Compare with the estimate, not with the cautious figure above it: the machine would look faster than it is.
        expected = self._drift[index] * self._catalog.variants[index].latency_by_batch_s[size - 1]
        surprise = seconds / (expected * max(self._slowdown.factor, 0.1)) - 1
        self._slowdown = self._slowdown.updated(seconds / expected, now)
        drift = self._drift[index] * (1 + DRIFT_GAIN * max(-MAX_DRIFT, min(MAX_DRIFT, surprise)))
        self._drift[index] = max(1 - MAX_DRIFT, min(1 + MAX_DRIFT, drift))
        self._latencies_s[index] = self._corrected(index)
        self._correct_cascades((index,))

    def _corrected(self, index: int) -> tuple[float, ...]:
        return tuple(self._drift[index] * profiled for profiled in self._cautious.variants[index].latency_by_batch_s)

    def _correct_cascades(self, changed: Collection[int]) -> None:
        """Recompute the latencies of the cascades whose looks are among the changed variants."""
        for variant in self._catalog.levels:
            second = variant.second_look
            if second is not None and (variant.first_index in changed or second.index in changed):
                first_s, second_s = self._latencies_s[variant.first_index], self._latencies_s[second.index]
                expected_s = with_second_look(first_s, second_s, second.share)
                lower_s = self._latencies_s[max(0, variant.index - 1)]
                self._latencies_s[variant.index] = tuple(map(max, expected_s, lower_s))
