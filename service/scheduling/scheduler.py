"""Which requests are admitted, and what runs next: the queue, what is known of traffic and machine, and the policy.

No clock, no waiting and no images here: the server and the simulator run the very same code. In the server the event
loop, the threads that decode and the engine's share it, so each public method holds the lock that it was given.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace

from service.domain import LookCode
from service.errors import OverloadedError, OverloadReason
from service.scheduling.admission import Admission
from service.scheduling.catalog import VariantCatalog
from service.scheduling.estimators import TAIL_SPREADS, SafetyFactor, TrafficEstimator
from service.scheduling.latency_model import LatencyModel
from service.scheduling.locked import locked
from service.scheduling.preview import Preview, preview
from service.scheduling.queue import RequestQueue
from service.scheduling.second_look import Looked, next_look
from service.scheduling.state import (
    NO_DELAY,
    BatchDecision,
    Decide,
    PreprocessingDelay,
    QueuedRequest,
    SchedulerState,
)
from service.scheduling.variants import Variant

RESERVED_S = 0.05  # that it may take the event loop to come back to a request
STILL_TRUE_S = 0.005  # for which what was found when a place was reserved holds


class Scheduler:
    """Admits requests, decides what runs, and learns from what ran.

    Attributes:
        catalog: what can be run.
        lock: that each public method holds.
    """

    def __init__(
        self,
        catalog: VariantCatalog,
        decide: Decide,
        max_batch_size: int,
        *,
        rejects_early: bool = True,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        """Start empty.

        Args:
            catalog: what can be run.
            decide: the policy.
            max_batch_size: most that may run together; no more than the catalog knows the latency of.
            rejects_early: whether `admit` rejects what it sees no way to answer in time.
            lock: reentrant, where several threads call; by default there is one.
        """
        self.catalog = catalog
        self._decide, self._rejects_early = decide, rejects_early
        self._max_batch_size = self._most = min(max_batch_size, catalog.max_batch_size)
        self._queue = RequestQueue()
        self._latency_model = LatencyModel(catalog)
        self._traffic, self._safety_factor = TrafficEstimator(), SafetyFactor()
        self._admission = Admission(self._queue, self._latency_model, self._traffic)
        self._free_at = -math.inf
        self.lock = nullcontext() if lock is None else lock

    def __len__(self) -> int:
        """Count what waits for the engine."""
        return len(self._queue)

    @locked
    def admit(self, request: QueuedRequest, now: float, delay: PreprocessingDelay = NO_DELAY) -> None:
        """Take note of a request whose body is there, before anything is spent on its image.

        Args:
            request: to be admitted.
            now: the instant.
            delay: what it has before it until it is ready for the engine; by default nothing.

        Raises:
            OverloadedError: even the cheapest sub-network could not answer it in time, or probably not, unless requests
                of lower priority and those due later are put behind it; says when to try again.
        """
        self._check(request, now, delay)
        self._traffic.count(now)
        self._queue.admit(request)

    @locked
    def claim(self, request: QueuedRequest, now: float) -> bool:
        """Admit a request by the place that it has just reserved; False where that was longer ago and is given up."""
        if self._queue.claim(request, now + RESERVED_S - STILL_TRUE_S):
            self._traffic.count(now)
            return True
        self._queue.remove(request)
        return False

    @locked
    def reserve(self, request: QueuedRequest, now: float, delay: PreprocessingDelay = NO_DELAY) -> None:
        """Reject what `admit` would; keep a place for the others until they claim it or leave, but not for long.

        Most bodies are there already, and are read once those before them are. Of one that is still to come it is not
        known whether it will be, and it shall keep no other request out.

        Raises:
            OverloadedError: as `admit`.
        """
        self._check(request, now, delay)
        self._queue.reserve(request, now + RESERVED_S)

    @locked
    def rejected(self, reason: OverloadReason, now: float) -> None:
        """Take note of a request that was rejected before it was admitted."""
        if reason != "no_time":  # all others a cheaper level may help, if to be decoded
            self._traffic.count(now)
        if reason == "backlog":  # a cheaper level would have cured nothing else
            self._safety_factor.observe(0, 1, now)

    @locked
    def enqueue(self, request: QueuedRequest) -> None:
        """Put an admitted request where the policy sees it: it is ready for the engine. One that has left stays out."""
        if self._queue.enqueue(request):
            self._traffic.remember(request.constraints)

    @locked
    def withdraw(self, request: QueuedRequest) -> None:
        """Forget an admitted request, wherever it stands; one that is gone already is no error."""
        self._queue.remove(request)

    @locked
    def next_batch(self, now: float) -> BatchDecision:
        """Ask the policy what to do with the queue, and take out what it runs, lets expire or sheds."""
        if not len(self._queue):
            return BatchDecision(None)
        state = self.state(now)
        decision = self._decide(state)
        for request in decision.removed:
            self._queue.remove(request)
        failed = _without_answer(decision.expired) + _without_answer(decision.shed)
        self._safety_factor.observe(_without_answer(decision.batch), failed, now)
        if decision.variant is not None:
            batch_s = state.batch_s(decision.variant.index, len(decision.batch))
            self._free_at = now + batch_s * self._latency_model.overhead_factor
        return decision

    @locked
    def batch_completed(
        self, variant: Variant, size: int, seconds: float, now: float, turnaround_s: float = 0.0
    ) -> None:
        """Learn from a batch: the machine's slowdown, and how far off the profile of its variant is.

        Args:
            variant: that ran; of a cascade the first look.
            size: of the batch.
            seconds: that it took.
            now: when it ended.
            turnaround_s: from when the engine was free, and a request waited, until the batch began.
        """
        self._latency_model.observe(variant.first_index, size, seconds, now, turnaround_s)
        self._free_at = now

    @locked
    def look_again(self, looked: Sequence[Looked], variant: Variant, now: float) -> list[QueuedRequest | LookCode]:
        """Put those of a batch into the queue once more whose answers are not sure enough, as far as there is time.

        Args:
            looked: what came of the batch.
            variant: that ran.
            now: the instant.

        Returns:
            For each what waits now for another look, or why nothing does.
        """
        state = self.state(now)
        found = [next_look(one, variant, state) for one in looked]
        for again in found:
            if isinstance(again, QueuedRequest):
                self._queue.enqueue_again(again)
        return found

    def take_over(self, other: "Scheduler") -> None:
        """Go on from what another one, with the same thread for its batches, has learned of traffic and machine."""
        with other.lock, self.lock:
            self._traffic.take_over(other._traffic, self.catalog.grant_within(None))
            self._safety_factor, self._free_at = copy(other._safety_factor), other._free_at
            self._latency_model.take_over(other._latency_model)

    @locked
    def engine_taken(self, until: float) -> None:
        """Take note that until then the engine is at something of whose time nothing is learned."""
        self._free_at = until

    @locked
    def profile_refined(self, catalog: VariantCatalog, cautious: VariantCatalog) -> None:
        """Take over a better profile: what is likely, and what to plan with. Plans that a policy has made stay."""
        self.catalog = catalog
        self._latency_model.refine(catalog, cautious)

    @locked
    def deadline_missed(self, now: float) -> None:
        """Take note that an answer came after its deadline in spite of all."""
        self._safety_factor.observe(0, 1, now)

    @locked
    def machine_observed(self, prior_slowdown: float, max_batch_size: int | None = None) -> None:
        """Take note of what the machine allows.

        Args:
            prior_slowdown: what others' load lets expect, over the profile.
            max_batch_size: what its memory holds; None where memory is no bound.
        """
        self._latency_model.prior_slowdown = prior_slowdown
        self._max_batch_size = self._most if max_batch_size is None else min(max_batch_size, self._most)

    @locked
    def throttled(self, factor: float) -> None:
        """Take note that a ceiling of utilization occupies the engine for so much longer than its batches."""
        self._latency_model.throttle_factor = factor

    @locked
    def preview(self, request: QueuedRequest, now: float, delay: PreprocessingDelay = NO_DELAY) -> Preview:
        """Tell what would become of a request that arrived now; nothing changes.

        Raises:
            OverloadedError: it would be rejected, or shed.
        """
        if rejection := self._rejection(request, now, delay):
            raise rejection
        state = replace(self.state(now), queue=self._queue.with_request(request))
        return preview(request, state, self._decide, max(now + delay.total_s, self._free_at))

    @locked
    def predict(self, variant: Variant, size: int, now: float) -> float:
        """Return the seconds that a batch will probably take, of a cascade the first look."""
        return self._latency_model.predict(variant.first_index, size, now)

    @locked
    def num_before(self, request: QueuedRequest, now: float) -> tuple[int, int]:
        """Return how many admitted requests are served before another, and how many are still to be read."""
        self._queue.expire_reserved(now)
        return self._queue.count_before(request), self._queue.num_reserved

    @locked
    def backlog_s(self, now: float) -> float:
        """Return the seconds that all admitted requests take at the cheapest level."""
        self._queue.expire_reserved(now)
        full_s = self._latency_model.predict(0, self._max_batch_size, now)
        return self._queue.num_admitted / self._max_batch_size * full_s * self._latency_model.overhead_factor

    @locked
    def state(self, now: float) -> SchedulerState:
        """Describe this moment to a policy."""
        likely, cautious = (self._latency_model.slowdown(now, spreads) for spreads in (0, TAIL_SPREADS))
        return SchedulerState(
            now=now,
            queue=self._queue.queued,
            catalog=self.catalog,
            latencies_s=self._latency_model.latencies_s,
            slowdown=likely,
            tail_factor=cautious / likely,
            overhead_factor=self._latency_model.overhead_factor,
            max_batch_size=self._max_batch_size,
            arrival_rate=self._traffic.rate(now),
            sustained_rate=self._traffic.sustained_rate(now),
            recent=self._traffic.recent,
            tight_budget_s=self._traffic.tight_budget_s,
            safety_factor=self._safety_factor.read(now),
            last_arrival_at=self._traffic.counted_at,
        )

    @property
    def free_at(self) -> float:
        """When the batch that runs will probably have ended, with what follows it."""
        return self._free_at

    @property
    def prior_slowdown(self) -> float:
        """What others' load lets expect, over the profile."""
        return self._latency_model.prior_slowdown

    def _check(self, request: QueuedRequest, now: float, delay: PreprocessingDelay) -> None:
        if rejection := self._rejection(request, now, delay):
            self.rejected(rejection.reason, now)
            raise rejection

    def _rejection(self, request: QueuedRequest, now: float, delay: PreprocessingDelay) -> OverloadedError | None:
        self._queue.expire_reserved(now)
        if not self._rejects_early:
            return None
        return self._admission.rejection(request, now, delay, self._free_at, self._max_batch_size)


def _without_answer(requests: Iterable[QueuedRequest]) -> int:
    """Count those that do not only wait for another look."""
    return sum(request.looks_again_for is None for request in requests)
