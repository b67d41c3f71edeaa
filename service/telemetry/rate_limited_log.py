"""Rate-limited warnings about what clients do, possibly without end: a line per message and interval, with a count."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

INTERVAL_S = 10.0


@dataclass(slots=True)
class _Kind:
    next_at: float
    suppressed: int = 0


class RateLimitedLog:
    """Logs a message at once, and then at most once per interval. Messages must be few and constant."""

    def __init__(
        self, logger: logging.Logger, interval_s: float = INTERVAL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Create a rate-limited log that writes to `logger`."""
        self._logger, self._interval_s, self._clock = logger, interval_s, clock
        self._kinds: dict[str, _Kind] = {}

    def warning(self, message: str) -> None:
        """Log the message, or count it if the interval has not passed."""
        now = self._clock()
        kind = self._kinds.setdefault(message, _Kind(now))
        if now < kind.next_at:
            kind.suppressed += 1
            return
        more = f" ({kind.suppressed} more since the last such line)" if kind.suppressed else ""
        self._logger.warning("%s%s", message, more)
        kind.next_at, kind.suppressed = now + self._interval_s, 0
