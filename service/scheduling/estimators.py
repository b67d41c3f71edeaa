"""Estimators of what the server learns as it serves: the machine's slowdown, delays, traffic and a safety factor.

The filter of the slowdown follows ALERT (Wan et al., USENIX ATC 2020): one global factor with its spread, because
whatever slows one sub-network down slows the others as well.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace

from service.scheduling.state import RequestConstraints
from service.scheduling.variants import Grant

GAIN = 0.6
SPREAD_GAIN = 0.2
MAX_SQUARED_SURPRISE = 0.1
MAX_SURPRISE = 1.5  # per batch: a single batch that takes ten times as long is a hiccup, not a noisy neighbour
TAIL_SPREADS = 2.5  # standard deviations: a lost request costs far more accuracy than a lower level does
STALE_AFTER_S = 0.5
KEPT_FOR = 4.0  # times as long as an estimate is trusted without observations, it slows down the next one's effect
RATE_TIME_S = 0.5
SUSTAINED_TIME_S = 2.0
REMEMBERED_REQUESTS = 128
TIGHT_QUANTILE = 0.05
DELAY_GAIN = 0.1
DELAY_DECAY_S = 0.25
MISS_STEP = 0.3
TOLERATED_MISSES = 0.01  # fraction of the requests: about what running one level lower costs in accuracy
MAX_SAFETY_FACTOR = 10.0
SAFETY_FACTOR_DECAY_S = 15.0
UPDATE_EVERY = 32  # requests: reading the CPU time of a thread takes a system call
LOOP_GAIN = 0.5
REJECTION_COST = 0.1  # event loop time of a rejection, as a fraction of that of an answer


def fade(passed_s: float, time_s: float) -> float:
    """Return the share that is left of something after `passed_s`, of which 37 % are left after `time_s`."""
    return math.exp(-max(0.0, passed_s) / time_s)


def gain_of(surprise: float, gain: float, passed_s: float, trusted_s: float) -> float:
    """Return the gain of a moving average whose last observation lies `passed_s` back, and is trusted for `trusted_s`.

    The older the average, the faster it falls: that something took long an hour ago says nothing of now, and must not
    come back with the next observation. It never rises faster, as a single observation may be a hiccup.
    """
    return gain if surprise >= 0 else 1 - (1 - gain) * fade(passed_s, KEPT_FOR * trusted_s)


@dataclass(frozen=True, slots=True)
class Slowdown:
    """An estimate of how much slower than its profile the machine is.

    Attributes:
        factor: observed over profiled latency; 1 is as profiled.
        variance: variance of the surprises, i.e. of observed minus expected factors.
        updated_at: when the last batch ended; None before the first.
    """

    factor: float = 1.0
    variance: float = 0.0
    updated_at: float | None = None

    def updated(self, observed_over_profiled: float, now: float) -> "Slowdown":
        """Return the estimate after a batch that ended at `now`."""
        surprise = min(observed_over_profiled - self.factor, MAX_SURPRISE)
        passed_s = 0.0 if self.updated_at is None else now - self.updated_at
        factor = self.factor + gain_of(surprise, GAIN, passed_s, STALE_AFTER_S) * surprise
        variance = self.variance + SPREAD_GAIN * (min(surprise**2, MAX_SQUARED_SURPRISE) - self.variance)
        return replace(self, factor=factor, variance=variance, updated_at=now)

    def predict(self, now: float, prior: float, spreads: float = 0.0) -> float:
        """Return the factor on the profile at `now`; without new batches it decays to `prior`.

        Args:
            now: in seconds on the clock of `updated`.
            prior: the factor to expect without batches.
            spreads: how many standard deviations to allow for.
        """
        if self.updated_at is None:
            return prior
        trust = fade(now - self.updated_at, STALE_AFTER_S)
        return trust * (self.factor + spreads * math.sqrt(self.variance)) + (1 - trust) * prior


@dataclass(slots=True)
class DelayEstimator:
    """A delay that varies: moving averages of its value and of its absolute deviation.

    Without new observations the expected delay fades. Otherwise a server that rejects every request because of it would
    never learn that it has become shorter.
    """

    fades_s: float = DELAY_DECAY_S
    mean_s: float = 0.0
    _deviation_s: float = 0.0
    _seen_at: float = 0.0

    def observe(self, seconds: float, now: float) -> None:
        """Update the averages with one observed delay."""
        surprise, passed_s = seconds - self.mean_s, now - self._seen_at
        gain = gain_of(surprise, DELAY_GAIN, passed_s, self.fades_s)
        self.mean_s += gain * surprise
        # Of the surprise, an average that falls faster leaves out the part that is only its age.
        change = abs(surprise) * DELAY_GAIN / gain - self._deviation_s
        self._deviation_s += gain_of(change, DELAY_GAIN, passed_s, self.fades_s) * change
        self._seen_at = now

    def expected_s(self, now: float) -> float:
        """Return the expected delay."""
        return self.mean_s * self._freshness(now)

    def margin_s(self, now: float) -> float:
        """Return the time to allow for the delay, its spread included."""
        return (self.mean_s + 2 * self._deviation_s) * self._freshness(now)

    def _freshness(self, now: float) -> float:
        return fade(now - self._seen_at, self.fades_s)


@dataclass(slots=True)
class ArrivalRate:
    """Arrivals per second, as an exponential average over `time_s` that is nearly right from the start."""

    time_s: float
    _weight: float = 0.0
    _seconds: float = 0.0
    _at: float | None = None

    def count(self, now: float) -> None:
        """Count an arrival."""
        self._age(now)
        self._weight += 1.0

    def read(self, now: float) -> float:
        """Return the rate at `now`."""
        self._age(now)
        return self._weight / max(self._seconds, 0.5 * self.time_s)  # a floor: the very first request is no burst

    def _age(self, now: float) -> None:
        if self._at is None:
            self._at = now
        if now <= self._at:  # e.g. read and counted at the same instant
            return
        keep = math.exp((self._at - now) / self.time_s)
        self._weight *= keep
        self._seconds = self._seconds * keep + self.time_s * (1 - keep)
        self._at = now


@dataclass(slots=True)
class SafetyFactor:
    """A factor on the latencies that a plan assumes, at least 1: it grows with every missed request.

    It learns by trial what no profile measures, such as how much of a latency budget passes on the way to and from the
    engine while HTTP and the engine contend for the same cores. Requests served in time, and time itself, let it decay.
    """

    factor: float = 1.0
    _at: float = 0.0

    def observe(self, met: int, missed: int, now: float) -> None:
        """Update the factor: `met` requests went into a batch that should be in time, `missed` requests were missed."""
        step = MISS_STEP * (missed - TOLERATED_MISSES * (met + missed))
        self.factor = min(MAX_SAFETY_FACTOR, max(1.0, self.read(now) + step))
        self._at = now

    def read(self, now: float) -> float:
        """Return the factor at `now`."""
        return 1 + (self.factor - 1) * math.exp(min(0.0, self._at - now) / SAFETY_FACTOR_DECAY_S)


class TrafficEstimator:
    """Estimates the traffic: the recent and the sustained arrival rate, and the constraints of the last requests."""

    def __init__(self) -> None:
        self._rate = ArrivalRate(RATE_TIME_S)
        self._sustained_rate = ArrivalRate(SUSTAINED_TIME_S)
        self._recent: deque[RequestConstraints] = deque(maxlen=REMEMBERED_REQUESTS)
        self._budgets_s: list[float] = []  # latency budgets of `_recent`, ascending
        self.counted_at = -math.inf  # when the last request arrived

    @property
    def recent(self) -> Sequence[RequestConstraints]:
        """The constraints of the last requests, the oldest first."""
        return self._recent

    @property
    def tight_budget_s(self) -> float:
        """A latency budget that few of the recent ones undercut; infinite before the first request."""
        return self._budgets_s[int(TIGHT_QUANTILE * len(self._budgets_s))] if self._budgets_s else math.inf

    def count(self, now: float) -> None:
        """Count an arrival."""
        self.counted_at = now
        self._rate.count(now)
        self._sustained_rate.count(now)

    def remember(self, constraints: RequestConstraints) -> None:
        """Remember the constraints of a request."""
        if len(self._recent) == REMEMBERED_REQUESTS:
            oldest = self._recent[0].budget_s
            del self._budgets_s[bisect_left(self._budgets_s, oldest)]
        self._recent.append(constraints)
        insort(self._budgets_s, constraints.budget_s)

    def take_over(self, other: "TrafficEstimator", grant: Grant) -> None:
        """Copy what another estimator has seen, with `grant` for each request: its grants are of another catalog."""
        self._rate, self._sustained_rate = copy(other._rate), copy(other._sustained_rate)
        self.counted_at = other.counted_at
        self._recent.clear()
        self._budgets_s.clear()
        for constraints in other._recent:
            self.remember(replace(constraints, grant=grant))

    def rate(self, now: float) -> float:
        """Return the recent arrivals per second."""
        return self._rate.read(now)

    def sustained_rate(self, now: float) -> float:
        """Return the arrivals per second over a longer time, which smooths out bursts."""
        return self._sustained_rate.read(now)


class LoopCostEstimator:
    """Measures the CPU time that the event loop spends on a request.

    Rejected requests count as well: if their cost were put on the answered ones, a server that rejects many would soon
    reject all of them and never learn better.

    Attributes:
        mean_s: learned seconds per answered request.
    """

    def __init__(self, used_s: Callable[[], float]) -> None:
        """Start without requests; `used_s` returns the CPU seconds that the thread of the event loop has used."""
        self.mean_s = 0.0
        self._used_s = used_s
        self._counted_until_s = self._idle_since_s = used_s()
        self._in_flight = 0
        self._uncounted = 0.0  # requests that have ended since `mean_s` was last updated

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count a request that is in flight while the block runs."""
        if self._in_flight == 0:  # the time used since the last request belongs to none
            self._counted_until_s += self._used_s() - self._idle_since_s
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            self._count(1.0)
            if self._in_flight == 0:
                self._idle_since_s = self._used_s()

    def rejected(self) -> None:
        """Count a request that was rejected before it reached `counting`."""
        if self._in_flight:  # otherwise its time counts as that of an idle loop
            self._count(REJECTION_COST)

    def _count(self, requests: float) -> None:
        self._uncounted += requests
        if self._uncounted < UPDATE_EVERY:
            return
        used_s = self._used_s()
        self.mean_s += LOOP_GAIN * ((used_s - self._counted_until_s) / self._uncounted - self.mean_s)
        self._counted_until_s, self._uncounted = used_s, 0.0
