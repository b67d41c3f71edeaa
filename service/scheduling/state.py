"""The nouns of a decision: what a request grants, what a policy may look at, and what it answers. Pure values."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from service.domain import ReasonCode
from service.scheduling.catalog import VariantCatalog
from service.scheduling.variants import Grant, Latencies, Variant


@dataclass(frozen=True, slots=True)
class RequestConstraints:
    """What a request grants, as the forecast remembers it.

    Attributes:
        budget_s: from arrival until its batch must have ended.
        grant: the variants that it may get.
        max_gflops: most that all its looks together may cost.
        min_confidence: probability of its answer, 0..1, under which it wants a more accurate look.
        is_rated: whether it is the rate of its key that bounds what it may cost.
    """

    budget_s: float
    grant: Grant
    max_gflops: float = math.inf
    min_confidence: float = 0.0
    is_rated: bool = False


def target(constraints: RequestConstraints, level: int) -> int:
    """Return the index of the variant that a request gets at `level`."""
    return constraints.grant.by_level[level]


@dataclass(frozen=True, slots=True, eq=False)
class QueuedRequest:
    """A request as the scheduler knows it; two are never the same.

    Attributes:
        deadline_at: when its batch must have ended, in seconds on the monotonic clock.
        constraints: what it grants.
        priority: 0 is normal; lower may be shed first. Fractions of a step are for fair shares among keys.
        looks_again_for: the request as it was admitted, where this is another look at its image: it has an answer
            already, and gets that one where this is not to be.
    """

    deadline_at: float
    constraints: RequestConstraints
    priority: float = 0
    looks_again_for: "QueuedRequest | None" = None

    @property
    def admitted(self) -> "QueuedRequest":
        """The request as it was admitted."""
        return self.looks_again_for or self


@dataclass(frozen=True, slots=True)
class PreprocessingDelay:
    """What lies between the admission of a request and the queue, in seconds.

    Attributes:
        base_s: were nothing else in the server.
        contention_s: more, for an event loop that serves other requests as well.
        queue_s: more, for images that are decoded before it. The engine works off the queue meanwhile.
    """

    base_s: float = 0.0
    contention_s: float = 0.0
    queue_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.base_s + self.contention_s + self.queue_s


NO_DELAY = PreprocessingDelay()


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """All that a policy may look at.

    Attributes:
        now: in seconds on the monotonic clock.
        queue: what waits for the engine, earliest deadline first; never empty.
        catalog: what can be chosen.
        latencies_s: of the variants by batch size, as corrected by what was observed, before `slowdown`.
        slowdown: factor on the latencies at this moment.
        tail_factor: factor on the slowdown that few batches exceed, at least 1.
        overhead_factor: how much longer than its batches the engine is occupied, at least 1: because of what lies
            between them, and because a ceiling makes it pause.
        max_batch_size: most that may run together.
        arrival_rate: requests per second, of late.
        recent: the constraints of the last arrivals.
        tight_budget_s: a budget that few of the recent ones undercut.
        sustained_rate: the arrival rate over a longer time, which leaves out what is only a burst.
        safety_factor: factor on the times of every level but the cheapest, at least 1: deadlines were missed of late.
        last_arrival_at: when the last request came that might have been answered, rejected or not.
    """

    now: float
    queue: Sequence[QueuedRequest]
    catalog: VariantCatalog
    latencies_s: Latencies
    slowdown: float
    tail_factor: float
    overhead_factor: float
    max_batch_size: int
    arrival_rate: float
    recent: Sequence[RequestConstraints]
    tight_budget_s: float
    sustained_rate: float = 0.0
    safety_factor: float = 1.0
    last_arrival_at: float = -math.inf

    def slowed(self, factor: float) -> "SchedulerState":
        """Return this moment on a machine that is slower by a factor."""
        return self if factor == 1 else replace(self, slowdown=self.slowdown * factor)

    def latency_s(self, index: int, size: int) -> float:
        """Predict the time that a batch of the variant at `index` costs, with the second looks that it will want."""
        return self.latencies_s[index][size - 1] * self.slowdown

    def batch_s(self, index: int, size: int) -> float:
        """Predict how long the batch itself takes, a cascade's first look."""
        return self.latency_s(self.catalog.variants[index].first_index, size)

    def longest_s(self, index: int, size: int) -> float:
        """Predict how long it takes until the last of a batch is answered, second looks included."""
        second = self.catalog.variants[index].second_look
        again = 0 if second is None else math.ceil(second.share * size)
        return self.batch_s(index, size) + (self.latency_s(second.index, again) if second and again else 0.0)

    def fitting(self, index: int, room_s: float, queued: int) -> int:
        """Find the largest batch of a variant that ends within the room: at most `queued`, 0 if not even one fits."""
        return min(bisect_right(self.latencies_s[index], room_s / self.slowdown), queued, self.max_batch_size)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a decision was made; `reasons` makes a sentence of it.

    Attributes:
        code: the reason.
        queued: requests that were looked at.
        slack_s: left to the most urgent of them; explains, and is no part of what was decided.
        safety_factor: as in the state.
        policy: name of the policy, where it is not ours.
    """

    code: ReasonCode
    queued: int = 0
    slack_s: float = field(default=0.0, compare=False)
    safety_factor: float = 1.0
    policy: str = ""


NOTHING_TO_RUN = Reason(ReasonCode.NOTHING_TO_RUN)


@dataclass(frozen=True, slots=True)
class BatchDecision:
    """What to do now.

    Attributes:
        variant: what to run; None if nothing is worth running.
        batch: requests to run together, all of which grant the variant.
        expired: requests to fail because they can no longer be answered in time.
        shed: requests to fail because others would miss their deadlines with them.
        reason: why.
    """

    variant: Variant | None
    batch: tuple[QueuedRequest, ...] = ()
    expired: tuple[QueuedRequest, ...] = ()
    shed: tuple[QueuedRequest, ...] = ()
    reason: Reason = NOTHING_TO_RUN

    @property
    def removed(self) -> tuple[QueuedRequest, ...]:
        """Every request that leaves the queue."""
        return (*self.batch, *self.expired, *self.shed)


Decide = Callable[[SchedulerState], BatchDecision]
