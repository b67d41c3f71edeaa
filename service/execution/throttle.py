"""Keeps the server below a utilization ceiling: a budget of compute per second, and a pause once it is spent."""

import time
from collections.abc import Callable

BURST_S = 0.25
GAIN = 0.2
NEGLIGIBLE_S = 1e-4
LONGEST_NAP_S = 0.1  # of a pause, after which other models have a turn


class UtilizationLimiter:
    """A token bucket of compute seconds that fills at the ceiling's rate; batches wait while it is overdrawn."""

    def __init__(
        self, ceiling: float | None, cores: float | None, process_time: Callable[[], float] = time.process_time
    ) -> None:
        """Create a limiter with a full bucket.

        Args:
            ceiling: fraction of the machine that this process may use, 0..1; None for no ceiling.
            cores: number of cores; None where a GPU does the work: its busy time counts then.
            process_time: returns the CPU seconds that all threads of this process have used so far.
        """
        self.throttle_factor = 1.0
        self._batches_s = 0.0
        self._used_s = process_time if cores is not None else lambda: self._batches_s
        self._cores = 1.0 if cores is None else cores
        self._per_s = None if ceiling is None else ceiling * self._cores
        self._credit_s = 0.0 if self._per_s is None else self._per_s * BURST_S
        self._filled_at: float | None = None
        self._seen_s = self._used_s()
        self._wanted_s: float | None = None  # compute seconds used when the next batch was first wanted
        self._intensity: float | None = None
        self._last_used_s = 0.0  # at most: compute seconds of the last batch
        self._pause_ends_at: float | None = None

    def pause_s(self, now: float) -> float:
        """Return how long the next batch must wait to keep below the ceiling."""
        if self._per_s is None:
            return 0.0
        if self._pause_ends_at is not None:  # fixed once: what other threads use meanwhile does not extend it
            if (left_s := self._pause_ends_at - now) > NEGLIGIBLE_S:
                return left_s
            self._pause_ends_at = None
            return 0.0
        used_s = self._used_s()
        if self._filled_at is None:
            self._filled_at, self._seen_s = now, used_s  # compute before the first batch does not count
        passed_s = now - self._filled_at
        balance = self._credit_s + passed_s * self._per_s - (used_s - self._seen_s)
        # No batch pays for more than the one before it, and a burst: what other threads use beyond the ceiling, such as
        # HTTP, would otherwise keep the engine from working at all.
        burst_s = self._per_s * BURST_S
        self._credit_s = max(min(balance, burst_s), -burst_s - self._last_used_s)
        self._filled_at, self._seen_s = now, used_s
        if self._wanted_s is None:
            self._wanted_s = used_s
        pause_s = -self._credit_s / self._per_s
        if pause_s <= NEGLIGIBLE_S:
            return 0.0
        self._pause_ends_at = now + pause_s
        return pause_s

    def idle(self) -> None:
        """Record that nothing waits: compute used until a batch is wanted again belongs to no batch."""
        self._wanted_s = None

    def batch_ran(self, seconds: float) -> None:
        """Learn how much compute a second of inference takes, counting all of it since the batch was first wanted."""
        self._batches_s += seconds
        if self._per_s is None or self._wanted_s is None:
            return
        used_s = self._used_s() - self._wanted_s
        self._last_used_s = min(used_s, seconds * self._cores)
        intensity = used_s / max(seconds, 1e-6)
        self._wanted_s = None
        self._intensity = (
            intensity if self._intensity is None else self._intensity + GAIN * (intensity - self._intensity)
        )
        self.throttle_factor = max(1.0, self._intensity / self._per_s)
