"""Admission: whether a request can still be answered in time, before any work is spent on it."""

import math
from bisect import bisect_left, bisect_right

from service.errors import OverloadedError
from service.scheduling.estimators import TAIL_SPREADS, TrafficEstimator
from service.scheduling.latency_model import LatencyModel
from service.scheduling.queue import RequestQueue
from service.scheduling.state import PreprocessingDelay, QueuedRequest, target

ROOM_SHARE = 0.3  # of a latency budget, at most, kept under overload for the batch that the request will be part of


class Admission:
    """Rejects requests that not even the cheapest level could answer in time, or that sustained overload would shed."""

    def __init__(self, queue: RequestQueue, latency_model: LatencyModel, traffic: TrafficEstimator) -> None:
        """Create the admission from collaborators, which it only reads.

        Args:
            queue: the admitted requests.
            latency_model: predicts how long batches take.
            traffic: estimates the arrival rates.
        """
        self._queue, self._latency_model, self._traffic = queue, latency_model, traffic

    def rejection(
        self, request: QueuedRequest, now: float, delay: PreprocessingDelay, free_at: float, max_batch_size: int
    ) -> OverloadedError | None:
        """Return why a request cannot be admitted, and when to try again; None if it can.

        Args:
            request: a request that is not admitted yet.
            now: the current instant.
            delay: the delay until the request is ready for the engine.
            free_at: when the running batch ends.
            max_batch_size: most requests that may run together.
        """
        ready_at, slowdown = now + delay.base_s + delay.contention_s, self._latency_model.slowdown(now)
        own_s = self._latency_model.latencies_s[target(request.constraints, 0)][0] * slowdown
        engine_at = self._expected_end(request, now, slowdown, max(ready_at, free_at), max_batch_size)
        decoded_at = ready_at + delay.queue_s + own_s
        late_s = max(engine_at, decoded_at) - request.deadline_at
        if late_s <= 0:
            return None
        if now + delay.base_s + own_s > request.deadline_at:
            message = "the latency budget is too small at the moment, even for an empty queue; increase it"
            return OverloadedError(message, "no_time", late_s)
        if ready_at + own_s > request.deadline_at or engine_at <= request.deadline_at:
            message = "too many requests are being read and decoded to answer this one in time; try again later"
            return OverloadedError(message, "preprocessing", late_s)
        message = "the queue is too long: even the cheapest sub-network would answer too late; try again later"
        return OverloadedError(message, "backlog", late_s)

    def _expected_end(
        self, request: QueuedRequest, now: float, slowdown: float, start_at: float, max_batch_size: int
    ) -> float:
        """Return when a request would be answered if all before it ran at the cheapest level, in the largest batches.

        Under sustained overload, later requests fill up the batch of this one, which then takes longer, and the queue
        grows until no batch may take longer than expected. It is better to reject now than to shed later. So in that
        case, if any request is before this one, the result is an end that will very probably not be exceeded.
        """
        latencies_s, overhead_factor = self._latency_model.latencies_s, self._latency_model.overhead_factor
        ahead, cheapest_s = self._queue.deadlines_before(request), latencies_s[0]
        alone_s, full_s = cheapest_s[0] * slowdown, cheapest_s[max_batch_size - 1] * slowdown * overhead_factor
        time, index, extra_s, spread, squares = start_at, 0, 0.0, 0.0, 0.0
        if ahead and self._is_overloaded(now, full_s / max_batch_size):
            room_s = ROOM_SHARE * request.constraints.budget_s / slowdown
            fitting = bisect_right(cheapest_s, room_s, 0, max_batch_size)
            extra_s = cheapest_s[fitting - 1] * slowdown if fitting else 0.0
            spread = self._latency_model.slowdown(now, TAIL_SPREADS) - slowdown
        # Requests that are late even if run alone will expire or be shed. Batches deviate independently of each other.
        while (index := bisect_left(ahead, time + alone_s, index)) <= len(ahead) - max_batch_size:
            index += max_batch_size
            time += full_s
            squares += (cheapest_s[max_batch_size - 1] * spread) ** 2
        if rest := len(ahead) - index:
            together = time + cheapest_s[rest] * slowdown
            if together <= ahead[index] and not request.constraints.grant.is_pinned:
                return together + extra_s + math.sqrt(squares)
            time += cheapest_s[rest - 1] * slowdown * overhead_factor
            squares += (cheapest_s[rest - 1] * spread) ** 2
        return time + latencies_s[target(request.constraints, 0)][0] * slowdown + extra_s + math.sqrt(squares)

    def _is_overloaded(self, now: float, least_s: float) -> bool:
        """Return whether arrivals have for long exceeded, and still exceed, what `least_s` per request allows."""
        return least_s * min(self._traffic.rate(now), self._traffic.sustained_rate(now)) > 1
