"""How long images take to decode: what their headers let expect, and how far off that has been of late, by kind."""

import math
from dataclasses import dataclass, field

GAIN = 0.2
FADES_S = 5.0
MAX_FACTOR = 100.0


@dataclass(slots=True)
class DecodeTimes:
    """Learns a factor for each kind of image. Without news it fades to 1, or what is never tried would never better."""

    _learned: dict[str, tuple[float, float]] = field(default_factory=dict)  # factor, and when it was learned

    def expected_s(self, kind: str, cost_s: float, now: float) -> float:
        """Return how long an image will probably take.

        Args:
            kind: what it is.
            cost_s: what its header lets expect.
            now: the instant.
        """
        return cost_s * self._factor(kind, now)

    def observe(self, kind: str, cost_s: float, seconds: float, now: float) -> None:
        """Learn from an image that took so long; a clock may be too coarse to see any of it."""
        factor, _ = self._learned.get(kind, (1.0, now))
        self._learned[kind] = factor + GAIN * (min(seconds / cost_s, MAX_FACTOR) - factor), now

    def _factor(self, kind: str, now: float) -> float:
        factor, learned_at = self._learned.get(kind, (1.0, now))
        return 1 + (factor - 1) * math.exp(min(0.0, learned_at - now) / FADES_S)
