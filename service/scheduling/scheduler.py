"""Decides which requests are admitted and what runs next, from the queue, the estimates and the policy.

No clock, no waiting and no images here: the server and the simulator run the very same code. In the server the event
loop, the decoding threads and the engine's thread share a scheduler, so each method that changes it holds its lock.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy, deepcopy
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
from service.scheduling.state import NO_DELAY, BatchDecision, Decide, PreprocessingDelay, QueuedRequest, SchedulerState
from service.scheduling.variants import Variant

RESERVATION_TIMEOUT_S = 0.05  # for which a place is kept: the event loop may take that long to return to the request
RESERVATION_VALID_S = 0.005  # for which the admission check of a reservation still holds


class Scheduler:
    """Admits requests, decides what runs, and learns from the batches that ran.

    Attributes:
        catalog: the variants that can run.
        lock: the lock that each method holds that changes the scheduler.
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
        """Start with an empty queue.

        Args:
            catalog: the variants that can run.
            decide: the policy.
            max_batch_size: most requests that may run together; limited to the largest batch of known latency.
            rejects_early: whether `admit` rejects requests that could not be answered in time.
            lock: a reentrant lock, where several threads call; None for a single thread.
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
        """Return the number of requests that wait for the engine."""
        return len(self._queue)

    @locked
    def admit(self, request: QueuedRequest, now: float, delay: PreprocessingDelay = NO_DELAY) -> None:
        """Admit a request whose body has arrived, before any work is spent on its image.

        Args:
            request: the request to admit.
            now: the current instant.
            delay: the delay until the request is ready for the engine; by default none.

        Raises:
            OverloadedError: even the cheapest sub-network could not, or probably not, answer the request in time, with
                those of lower priority and those due later behind it; the error says when to try again.
        """
        self._check(request, now, delay)
        self._traffic.count(now)
        self._queue.admit(request)

    @locked
    def claim(self, request: QueuedRequest, now: float) -> bool:
        """Admit a request by its reserved place; drop it and return False if that is older than RESERVATION_VALID_S."""
        if self._queue.claim(request, now + RESERVATION_TIMEOUT_S - RESERVATION_VALID_S):
            self._traffic.count(now)
            return True
        self._queue.remove(request)
        return False

    @locked
    def reserve(self, request: QueuedRequest, now: float, delay: PreprocessingDelay = NO_DELAY) -> None:
        """Reject a request like `admit`, or reserve a place until it claims it or leaves, for RESERVATION_TIMEOUT_S.

        Most bodies have arrived already, and are read once those before them are. A body that is still to come may
        never arrive, so its request must keep no other out.

        Raises:
            OverloadedError: as for `admit`.
        """
        self._check(request, now, delay)
        self._queue.reserve(request, now + RESERVATION_TIMEOUT_S)

    @locked
    def rejected(self, reason: OverloadReason, now: float) -> None:
        """Record a request that was rejected before it was admitted."""
        if reason not in ("no_time", "key", "address"):  # only load counts: what other requests kept out
            self._traffic.count(now)
        if reason == "backlog":  # a cheaper level would have prevented no other rejection
            self._safety_factor.observe(0, 1, now)

    @locked
    def enqueue(self, request: QueuedRequest) -> None:
        """Put an admitted request that is ready for the engine into the queue of the policy, unless it has left."""
        if self._queue.enqueue(request):
            self._traffic.remember(request.constraints)

    @locked
    def withdraw(self, request: QueuedRequest) -> None:
        """Remove an admitted request, wherever it stands; no error if it is gone already."""
        self._queue.remove(request)

    @locked
    def next_batch(self, now: float) -> BatchDecision:
        """Ask the policy what to do with the queue, and remove the requests that it runs, lets expire or sheds."""
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
            variant: the variant that ran; of a cascade, the first look ran.
            size: size of the batch.
            seconds: how long the batch took.
            now: when the batch ended.
            turnaround_s: from when the engine was free, and a request waited, until the batch started.
        """
        self._latency_model.observe(variant.first_index, size, seconds, now, turnaround_s)
        self._free_at = now

    @locked
    def look_again(self, looked: Sequence[Looked], variant: Variant, now: float) -> list[QueuedRequest | LookCode]:
        """Queue another look for the requests of a batch whose answers are not sure enough, as far as time allows.

        Args:
            looked: the results of the batch.
            variant: the variant that ran.
            now: the current instant.

        Returns:
            For each result, the request that now waits for another look, or why there is none.
        """
        state = self.state(now)
        found = [next_look(one, variant, state) for one in looked]
        for again in found:
            if isinstance(again, QueuedRequest):
                self._queue.enqueue_again(again)
        return found

    def take_over(self, other: "Scheduler") -> None:
        """Copy what another scheduler, whose batches run on the same thread, has learned of traffic and machine."""
        with other.lock, self.lock:
            self._traffic.take_over(other._traffic, self.catalog.grant_within(None))
            self._safety_factor, self._free_at = copy(other._safety_factor), other._free_at
            self._latency_model.take_over(other._latency_model)

    @locked
    def engine_taken(self, until: float) -> None:
        """Record that the engine is busy until then with work whose duration is not learned from."""
        self._free_at = until

    @locked
    def profile_refined(self, catalog: VariantCatalog, cautious: VariantCatalog) -> None:
        """Replace the profile by a better one: likely latencies, and those to plan with. Plans of a policy stay."""
        self.catalog = catalog
        self._latency_model.refine(catalog, cautious)

    @locked
    def deadline_missed(self, now: float) -> None:
        """Record that an answer came after its deadline."""
        self._safety_factor.observe(0, 1, now)

    @locked
    def machine_observed(self, prior_slowdown: float, max_batch_size: int | None = None) -> None:
        """Record what the machine allows.

        Args:
            prior_slowdown: slowdown over the profile to expect from the load of other processes.
            max_batch_size: the largest batch that fits into memory; None where memory is no bound.
        """
        self._latency_model.prior_slowdown = prior_slowdown
        self._max_batch_size = self._most if max_batch_size is None else min(max_batch_size, self._most)

    @locked
    def throttled(self, factor: float) -> None:
        """Record how much longer than its batches a utilization ceiling occupies the engine."""
        self._latency_model.throttle_factor = factor

    @locked
    def preview(self, request: QueuedRequest, now: float, delay: PreprocessingDelay = NO_DELAY) -> Preview:
        """Predict the decision for a request that arrived now, without changing anything.

        Raises:
            OverloadedError: the request would be rejected, shed, or expire.
        """
        if rejection := self._rejection(request, now, delay):
            raise rejection
        state = replace(self.state(now), queue=self._queue.with_request(request))
        decide = deepcopy(self._decide)  # a policy may keep a plan
        return preview(request, state, decide, max(now + delay.total_s, self._free_at))

    @locked
    def predict(self, variant: Variant, size: int, now: float) -> float:
        """Return the seconds that a batch will probably take; for a cascade, its first look."""
        return self._latency_model.predict(variant.first_index, size, now)

    @locked
    def num_before(self, request: QueuedRequest, now: float) -> tuple[int, int]:
        """Return how many admitted requests are served before a request, and how many of all are still to be read."""
        self._queue.expire_reserved(now)
        return self._queue.count_before(request), self._queue.num_reserved

    @locked
    def backlog_s(self, now: float) -> float:
        """Return the seconds that all admitted requests would take at the cheapest level."""
        self._queue.expire_reserved(now)
        full_s = self._latency_model.predict(0, self._max_batch_size, now)
        return self._queue.num_admitted / self._max_batch_size * full_s * self._latency_model.overhead_factor

    @locked
    def state(self, now: float) -> SchedulerState:
        """Return the state that a policy sees at `now`."""
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
        """When the engine will probably be free: the end of the running batch, with the overhead after it."""
        return self._free_at

    @property
    def prior_slowdown(self) -> float:
        """Slowdown over the profile to expect from the load of other processes."""
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
    """Count the requests that have no answer yet, i.e. do not wait for another look."""
    return sum(request.second_look_of is None for request in requests)
