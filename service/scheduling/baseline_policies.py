"""Published and simple policies with the signature of our own, to serve with and to compare with.

What a published policy does not know, it ignores here as well: the slowdown, the corrected latencies, the forecast. The
constraints of a request, its limit of cost or its sub-network by name, bind every policy.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile

from service.domain import ReasonCode
from service.scheduling.catalog import VariantCatalog
from service.scheduling.state import BatchDecision, QueuedRequest, Reason, RequestConstraints, SchedulerState, target
from service.scheduling.variants import Latencies, Variant

NUM_BUCKETS = 32
PLAN_PERIOD_S = 5.0
PLAN_HEADROOM = 1.05
WAITING_PER_STEP = 2
MAX_LOOKED = 256  # requests at the head of the queue; bounds the time of a decision


# From the state, the slack of the head and the length of the queue to the index of a variant and the largest batch.
Pick = Callable[[SchedulerState, float, int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Baseline:
    """A rule for the head of the queue: requests that can no longer be answered expire, the most urgent run first.

    Attributes:
        name: the name in the reasons of its decisions.
        pick: the rule by which it differs from the others; sees latencies as profiled unless `estimates`.
        lowest: index of the variant that it would run in the worst case; requests that not even that variant answers in
            time expire.
        drops_early: whether requests that would make the batch small are shed, as in Nexus (Shen et al., SOSP 2019).
        estimates: whether it uses the slowdown and the corrected latencies.
    """

    name: str
    pick: Pick
    lowest: int = 0
    drops_early: bool = False
    estimates: bool = False

    def __call__(self, state: SchedulerState) -> BatchDecision:
        """Choose a variant and the largest batch of it that ends before the head's deadline."""
        catalog = state.catalog
        seen = state if self.estimates else replace(state, latencies_s=profiled_latencies(catalog), slowdown=1.0)
        expired = self._expired(seen)
        gone = set(expired)
        queue = [request for request in state.queue if request not in gone] if gone else state.queue
        if not queue:
            return BatchDecision(None, expired=expired)
        shed = tuple(queue[: _first_worth(seen, queue, self.lowest)]) if self.drops_early else ()
        queue = queue[len(shed) :]
        head = queue[0]
        room_s = head.deadline_at - state.now
        wanted, most = self.pick(seen, room_s, len(queue))
        index = granted(catalog, head.constraints, wanted)
        size = max(1, min(most, seen.fitting(index, room_s, len(queue))))
        together = (request for request in queue if granted(catalog, request.constraints, wanted) == index)
        reason = Reason(ReasonCode.BASELINE, len(queue), room_s, policy=self.name)
        return BatchDecision(catalog.variants[index], tuple(islice(together, size)), expired, shed, reason)

    def _expired(self, seen: SchedulerState) -> tuple[QueuedRequest, ...]:
        own_s = [by_batch_s[0] * seen.slowdown for by_batch_s in seen.latencies_s]
        latest = seen.now + max(own_s)
        urgent = takewhile(lambda request: request.deadline_at < latest, seen.queue)
        lowest = ((request, granted(seen.catalog, request.constraints, self.lowest)) for request in urgent)
        return tuple(request for request, index in lowest if request.deadline_at < seen.now + own_s[index])


def _first_worth(seen: SchedulerState, queue: Sequence[QueuedRequest], wanted: int) -> int:
    """Return the place from which on a batch of the planned size, up to half a tight budget long, ends in time."""
    counts: Counter[int] = Counter()
    first = min(len(queue), MAX_LOOKED) - 1
    for place in range(first, -1, -1):
        index = granted(seen.catalog, queue[place].constraints, wanted)
        counts[index] += 1
        planned = max(1, seen.fitting(index, seen.tight_budget_s / 2, counts[index]))
        if queue[place].deadline_at >= seen.now + seen.latency_s(index, planned):
            first = place
    return first


def profiled_latencies(catalog: VariantCatalog) -> Latencies:
    """Return the latencies of the variants, in seconds, as profiled."""
    return [variant.latency_by_batch_s for variant in catalog.variants]


def granted(catalog: VariantCatalog, constraints: RequestConstraints, wanted: int) -> int:
    """Return the index of the variant that a request gets where a rule wants `wanted`, which need not be a level.

    A variant that may cost more than the request admits is replaced by the best that it grants: no policy ever exceeds
    a budget.
    """
    grant = constraints.grant
    if wanted < catalog.num_levels:
        return target(constraints, wanted)
    is_within = catalog.variants[wanted].most_gflops <= grant.best.most_gflops
    return wanted if is_within and not grant.is_pinned else grant.best.index


def largest_batch(latencies_s: Latencies, num_levels: int, room_s: float, most: int) -> tuple[int, int]:
    """Find the largest batch, at most `most`, that some level runs within `room_s`, then the best level that does.

    Returns:
        The level and the size; the lowest level and 1 where nothing fits.
    """
    size = max(1, min(bisect_right(latencies_s[0], room_s), most))
    fitting = [level for level in range(num_levels) if latencies_s[level][size - 1] <= room_s]
    return (fitting[-1] if fitting else 0), size


def max_accuracy(state: SchedulerState, room_s: float, _waiting: int) -> tuple[int, int]:
    """MaxAcc (Khare et al., NSDI 2025): first the most accurate level that answers the head in time, then the batch."""
    fitting = [level for level in range(state.catalog.num_levels) if state.latency_s(level, 1) <= room_s]
    return (fitting[-1] if fitting else 0), state.max_batch_size


def max_batch(state: SchedulerState, room_s: float, waiting: int) -> tuple[int, int]:
    """MaxBatch (Khare et al., NSDI 2025): first the largest batch of the queue, then the most accurate level for it."""
    most = min(waiting, state.max_batch_size)
    return largest_batch(state.latencies_s, state.catalog.num_levels, room_s, most)


def step_down(state: SchedulerState, room_s: float, waiting: int) -> tuple[int, int]:
    """Step one level down from the best per two requests waiting, and on until their batch answers the head in time."""
    level = max(0, state.catalog.num_levels - 1 - waiting // WAITING_PER_STEP)
    size = min(waiting, state.max_batch_size)
    while level > 0 and state.latency_s(level, size) > room_s:
        level -= 1
    return level, size


class SlackFit:
    """SlackFit (Khare et al., SuperServe, NSDI 2025): the slack of the head stands for the load.

    Latencies from l(lowest, 1) to l(best, largest batch) are divided into even buckets. Each offers the largest batch
    that fits under it, at the most accurate level that does. The bucket just under the slack of the head is taken.
    """

    def __init__(self, catalog: VariantCatalog, max_batch_size: int, *, capped: bool = False) -> None:
        """Fill the buckets; `capped`, our addition, plans no larger batch than there are requests waiting."""
        max_batch_size = min(max_batch_size, catalog.max_batch_size)
        self._latencies_s, self._num_levels, self._capped = profiled_latencies(catalog), catalog.num_levels, capped
        self._lowest_s = self._latencies_s[0][0]
        self._width_s = (catalog.best.latency_by_batch_s[max_batch_size - 1] - self._lowest_s) / NUM_BUCKETS
        self._buckets = [self._fill(bucket, max_batch_size) for bucket in range(NUM_BUCKETS + 1)]

    def __call__(self, state: SchedulerState, room_s: float, waiting: int) -> tuple[int, int]:
        """Take the bucket under the slack of the head, which the slowdown shortens where the policy estimates it."""
        above_s = room_s / state.slowdown - self._lowest_s
        bucket = int(min(max(above_s / self._width_s, 0), NUM_BUCKETS)) if self._width_s > 0 else NUM_BUCKETS
        return self._fill(bucket, min(waiting, state.max_batch_size)) if self._capped else self._buckets[bucket]

    def _fill(self, bucket: int, most: int) -> tuple[int, int]:
        return largest_batch(self._latencies_s, self._num_levels, self._lowest_s + bucket * self._width_s, most)


class PeriodicPlan:
    """After Proteus (Ahmad et al., ASPLOS 2024): one plan per period, with batches adapted to deadlines in between.

    The plan is the most accurate level that carries the demand with batches of at most half the latency budget. With
    one machine and one model there is nothing to place, so there is no mixed-integer program. Proteus plans every 30 s.
    """

    def __init__(self) -> None:
        self._planned_at: float | None = None
        self._level = 0

    def __call__(self, state: SchedulerState, _room_s: float, _waiting: int) -> tuple[int, int]:
        """Follow the plan, after making a new one if the period is over."""
        if self._planned_at is None or state.now - self._planned_at >= PLAN_PERIOD_S:
            self._planned_at, self._level = state.now, self._plan(state)
        return self._level, state.max_batch_size

    def _plan(self, state: SchedulerState) -> int:
        demand = PLAN_HEADROOM * state.arrival_rate
        for level in range(state.catalog.num_levels - 1, 0, -1):
            size = max(1, state.fitting(level, state.tight_budget_s / 2, state.max_batch_size))
            if size / state.latency_s(level, size) >= demand:
                return level
        return 0


def fixed(name: str, variant: Variant) -> Baseline:
    """Run one variant for all requests that grant it, in the largest batches that deadlines admit, with early drop."""

    def pick(state: SchedulerState, _room_s: float, _waiting: int) -> tuple[int, int]:
        return variant.index, state.max_batch_size

    return Baseline(name, pick, lowest=variant.index, drops_early=True)


def min_cost(state: SchedulerState, _room_s: float, _waiting: int) -> tuple[int, int]:
    """After INFaaS (Romero et al., USENIX ATC 2021): the cheapest variant that meets latency and accuracy asked for.

    Our requests ask for no accuracy, and what is scarce is the engine's time, so this is the lowest level.
    """
    return 0, state.max_batch_size
