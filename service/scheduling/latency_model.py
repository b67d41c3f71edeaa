"""What a batch takes: the profile, corrected by what was observed and by what others do on the machine."""

from collections.abc import Collection

from service.scheduling.catalog import VariantCatalog
from service.scheduling.estimators import Slowdown
from service.scheduling.variants import Latencies, with_second_look

TURNAROUND_GAIN = 0.1
MAX_TURNAROUND = 2.0
NO_TIME_S = 1e-6  # a coarse clock may see none go by
DRIFT_GAIN = 0.1
MAX_DRIFT = 0.2


class LatencyModel:
    """Predicts latencies, and learns from batches: the machine's slowdown, and how far off each profile is.

    Attributes:
        prior_slowdown: what others' load lets expect before a batch has told.
        throttle_factor: how much longer than its batches a ceiling of utilization occupies the engine.
    """

    def __init__(self, catalog: VariantCatalog) -> None:
        """Begin with the profile."""
        self.prior_slowdown = 1.0
        self.throttle_factor = 1.0
        self._catalog = self._cautious = catalog
        self._slowdown = Slowdown()
        self._latencies_s = [variant.latency_by_batch_s for variant in catalog.variants]
        self._drift = [1.0] * len(catalog.variants)
        self._turnaround = 1.0  # what the engine is occupied for a batch, over the batch itself

    @property
    def latencies_s(self) -> Latencies:
        """Of the variants by batch size, corrected, before the slowdown."""
        return self._latencies_s

    @property
    def overhead_factor(self) -> float:
        """How much longer than its batches the engine is occupied."""
        return max(self.throttle_factor, self._turnaround)  # what lies between batches goes by within a pause

    def refine(self, catalog: VariantCatalog, cautious: VariantCatalog) -> None:
        """Take over a better profile of the same variants.

        Args:
            catalog: what batches are now said to take; what was learned against another figure is forgotten.
            cautious: the same, with the error of those that are estimates: what to plan with.
        """
        pairs = zip(catalog.variants, self._catalog.variants, strict=True)
        is_kept = [new.latency_by_batch_s == old.latency_by_batch_s for new, old in pairs]
        self._drift = [drift if kept else 1.0 for drift, kept in zip(self._drift, is_kept, strict=True)]
        self._catalog, self._cautious = catalog, cautious
        self._latencies_s = [self._corrected(index) for index in range(len(self._drift))]
        self._correct_cascades(range(len(self._drift)))

    def take_over(self, other: "LatencyModel") -> None:
        """Go on from the slowdown of another model's batches: what slows them slows those of this one as well."""
        self.prior_slowdown, self.throttle_factor = other.prior_slowdown, other.throttle_factor
        self._slowdown, self._turnaround = other._slowdown, other._turnaround

    def slowdown(self, now: float, spreads: float = 0.0) -> float:
        """Return the factor on the latencies at `now`, with an allowance of so many standard deviations."""
        return self._slowdown.predict(now, self.prior_slowdown, spreads)

    def predict(self, index: int, size: int, now: float) -> float:
        """Return the seconds that a batch of a variant will probably take."""
        return self._latencies_s[index][size - 1] * self.slowdown(now)

    def observe(self, index: int, size: int, seconds: float, now: float, turnaround_s: float) -> None:
        """Learn from a batch.

        Args:
            index: of the variant that ran, alone.
            size: of the batch.
            seconds: that it took.
            now: when it ended.
            turnaround_s: from when the engine was free, and a request waited, until the batch began.
        """
        taken = min(1 + turnaround_s / max(seconds, NO_TIME_S), MAX_TURNAROUND)
        self._turnaround += TURNAROUND_GAIN * (taken - self._turnaround)
        # Against the estimate, not against the caution on top of it, which would look like a machine that is faster.
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
        """Expect of cascades what is now expected of their looks."""
        for variant in self._catalog.levels:
            second = variant.second_look
            if second is not None and (variant.first_index in changed or second.index in changed):
                first_s, second_s = self._latencies_s[variant.first_index], self._latencies_s[second.index]
                expected_s = with_second_look(first_s, second_s, second.share)
                lower_s = self._latencies_s[max(0, variant.index - 1)]
                self._latencies_s[variant.index] = tuple(map(max, expected_s, lower_s))
