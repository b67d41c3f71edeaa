"""How much slower than its profile the machine is at this moment, learned from every batch. Pure values.

The filter follows ALERT (Wan et al., USENIX ATC 2020): one global factor with its spread, because whatever slows one
sub-network down slows the others as well.
"""

import math
from dataclasses import dataclass, replace

from service.resources import ResourceSnapshot

GAIN = 0.6
SPREAD_GAIN = 0.2
MAX_SQUARED_SURPRISE = 0.1
MAX_SURPRISE = 1.5  # one hiccup of ten times is no neighbour
CAUTIOUS = 2.5  # spreads above the mean: a request lost costs far more accuracy than a level does
STALE_AFTER_S = 0.5


@dataclass(frozen=True, slots=True)
class Slowdown:
    """The estimate.

    Attributes:
        factor: observed over profiled latency; 1 is as profiled.
        variance: of the surprises, so of observed less expected factors.
        updated_at: instant of the last batch, None before the first.
    """

    factor: float = 1.0
    variance: float = 0.0
    updated_at: float | None = None

    def updated(self, observed_over_profiled: float, now: float) -> "Slowdown":
        """Learn from a batch that ended at `now`."""
        surprise = min(observed_over_profiled - self.factor, MAX_SURPRISE)
        variance = self.variance + SPREAD_GAIN * (min(surprise**2, MAX_SQUARED_SURPRISE) - self.variance)
        return replace(self, factor=self.factor + GAIN * surprise, variance=variance, updated_at=now)

    def predict(self, now: float, prior: float, spreads: float = 0.0) -> float:
        """Factor to multiply the profile with at `now`; without news from batches it turns to `prior`.

        Args:
            now: in seconds on the clock of `updated`.
            prior: what to expect before any batch has told better.
            spreads: how many standard deviations to allow for.
        """
        if self.updated_at is None:
            return prior
        trust = math.exp(min(0.0, self.updated_at - now) / STALE_AFTER_S)
        return trust * (self.factor + spreads * math.sqrt(self.variance)) + (1 - trust) * prior


def prior_slowdown(snapshot: ResourceSnapshot | None, threads: int) -> float:
    """Slowdown to expect from what other processes do, before any batch has felt it.

    The scheduler shares the cores evenly: `threads` of ours and as many of others as they keep busy.
    """
    if snapshot is None or snapshot.others_cores is None:
        return 1.0
    cpus = snapshot.cpus or snapshot.cores
    return max(1.0, (min(threads, cpus) + snapshot.others_cores) / cpus)
