"""Decode times of images: the cost estimated from the header, times a factor learned for each kind."""

from dataclasses import dataclass, field

from service.scheduling.estimators import fade, gain_of

GAIN = 0.2
DECAY_S = 5.0
MAX_FACTOR = 100.0


@dataclass(slots=True)
class DecodeTimes:
    """Learns a factor for each kind of image.

    A factor decays to 1 without new observations: otherwise a kind that is never decoded because it seems slow would
    seem slow forever.
    """

    _learned: dict[str, tuple[float, float]] = field(default_factory=dict)  # factor, and when it was learned

    def expected_s(self, kind: str, cost_s: float, now: float) -> float:
        """Return the expected time to decode an image.

        Args:
            kind: kind of the image.
            cost_s: cost estimated from the header.
            now: the current instant.
        """
        return cost_s * self._factor(kind, now)

    def observe(self, kind: str, cost_s: float, seconds: float, now: float) -> None:
        """Learn from the time that an image took; it may be 0 where the clock is coarse."""
        factor, learned_at = self._learned.get(kind, (1.0, now))
        surprise = min(seconds / cost_s, MAX_FACTOR) - factor
        self._learned[kind] = factor + gain_of(surprise, GAIN, now - learned_at, DECAY_S) * surprise, now

    def _factor(self, kind: str, now: float) -> float:
        factor, learned_at = self._learned.get(kind, (1.0, now))
        return 1 + (factor - 1) * fade(now - learned_at, DECAY_S)
