"""The types of a decision: the constraints of a request, the state that a policy sees, its decision.

A state holds the scheduler's own queue and latencies: it is for use under the scheduler's lock.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from service.domain import ReasonCode
from service.scheduling.catalog import VariantCatalog
from service.scheduling.variants import Grant, Latencies, Variant


@dataclass(frozen=True, slots=True)
class RequestConstraints:
    """The constraints of a request, as the forecast remembers them.

    Attributes:
        budget_s: from arrival until its batch must have ended.
        grant: the variants that it may get.
        max_gflops: most that all its looks together may cost.
        min_confidence: probability of its answer, 0..1, under which it wants a more accurate look.
        is_rated: whether `max_gflops` comes from the rate of its key.
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
    """A request as the scheduler knows it; compared by identity.

    Attributes:
        deadline_at: when its batch must have ended, in seconds on the monotonic clock.
        constraints: its budget and the variants that it may get.
        priority: 0 is normal; lower may be shed first. Fractions of a step are for fair shares among keys.
        second_look_of: for another look at an image, the request as it was admitted. That one has an answer already,
            which it gets if this look does not take place.
    """

    deadline_at: float
    constraints: RequestConstraints
    priority: float = 0
    second_look_of: "QueuedRequest | None" = None

    @property
    def admitted(self) -> "QueuedRequest":
        """The request as it was admitted."""
        return self.second_look_of or self


@dataclass(frozen=True, slots=True)
class PreprocessingDelay:
    """The delay between the admission of a request and the queue, in seconds.

    Attributes:
        base_s: the delay if nothing else were in the server.
        contention_s: added because the event loop serves other requests as well.
        queue_s: added because other images are decoded first. The engine works off the queue during this time.
    """

    base_s: float = 0.0
    contention_s: float = 0.0
    queue_s: float = 0.0

    @property
    def total_s(self) -> float:
        """The whole delay."""
        return self.base_s + self.contention_s + self.queue_s


NO_DELAY = PreprocessingDelay()


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """All that a policy may look at.

    Attributes:
        now: in seconds on the monotonic clock.
        queue: the requests that wait for the engine, earliest deadline first; never empty when a policy decides.
        catalog: the variants to choose from.
        latencies_s: latencies by variant and batch size, corrected by observed batches, before `slowdown`.
        slowdown: factor on the latencies at this moment.
        tail_factor: factor on the slowdown that few batches exceed, at least 1.
        overhead_factor: how much longer than its batches the engine is occupied, at least 1: because of the turnaround
            between them, and because a utilization ceiling makes it pause.
        max_batch_size: most requests that may run together.
        arrival_rate: recent requests per second.
        recent: the constraints of the last requests.
        tight_budget_s: a latency budget that few of the recent ones undercut.
        sustained_rate: the arrival rate over a longer time, which smooths out bursts.
        safety_factor: factor on the latencies of every level but the cheapest, at least 1; grows with missed requests.
        last_arrival_at: when the last request arrived that might have been answered, rejected or not.
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
        """Return this state on a machine that is slower by a factor."""
        return self if factor == 1 else replace(self, slowdown=self.slowdown * factor)

    def latency_s(self, index: int, size: int) -> float:
        """Predict the seconds that a batch of the variant at `index` costs, its expected second looks included."""
        return self.latencies_s[index][size - 1] * self.slowdown

    def batch_s(self, index: int, size: int) -> float:
        """Predict how long the batch itself takes; for a cascade, its first look."""
        return self.latency_s(self.catalog.variants[index].first_index, size)

    def longest_s(self, index: int, size: int) -> float:
        """Predict how long it takes until the last request of a batch is answered, second looks included."""
        second = self.catalog.variants[index].second_look
        again = 0 if second is None else math.ceil(second.share * size)
        return self.batch_s(index, size) + (self.latency_s(second.index, again) if second and again else 0.0)

    def fitting(self, index: int, room_s: float, queued: int) -> int:
        """Return the size of the largest batch that ends within `room_s`, at most `queued`; 0 if not even one fits."""
        return min(bisect_right(self.latencies_s[index], room_s / self.slowdown), queued, self.max_batch_size)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a decision was made; the module `reasons` turns it into a sentence.

    Attributes:
        code: the reason.
        queued: number of requests considered.
        slack_s: slack of the most urgent of them; an explanation, and no part of the decision.
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
    """What to run now, and which requests to drop.

    Attributes:
        variant: the variant to run; None if nothing is worth running.
        batch: requests to run together, all of which grant the variant.
        expired: requests to fail because they can no longer be answered in time.
        shed: requests to fail because they would make others miss their deadlines.
        reason: why this was decided.
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
