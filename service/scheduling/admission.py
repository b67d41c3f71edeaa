"""Whether a request can still be answered in time, before anything is spent on it."""

import math
from bisect import bisect_left, bisect_right

from service.errors import OverloadedError
from service.scheduling.estimators import TAIL_SPREADS, TrafficEstimator
from service.scheduling.latency_model import LatencyModel
from service.scheduling.queue import RequestQueue
from service.scheduling.state import PreprocessingDelay, QueuedRequest, target

ROOM_SHARE = 0.3  # of a budget, at most, that is kept for the batch that a request will be part of under overload


class Admission:
    """Rejects what not even the cheapest level could answer in time, or what sustained overload would have shed."""

    def __init__(self, queue: RequestQueue, latency_model: LatencyModel, traffic: TrafficEstimator) -> None:
        """Take what it looks at, and changes nothing of.

        Args:
            queue: what is admitted already.
            latency_model: of what batches take.
            traffic: what arrives.
        """
        self._queue, self._latency_model, self._traffic = queue, latency_model, traffic

    def rejection(
        self, request: QueuedRequest, now: float, delay: PreprocessingDelay, free_at: float, max_batch_size: int
    ) -> OverloadedError | None:
        """Return why a request cannot be admitted, and when to try again; None if it can.

        Args:
            request: not admitted yet.
            now: the instant.
            delay: what it has before it until it is ready for the engine.
            free_at: when the batch that runs ends.
            max_batch_size: most that may run together.
        """
        ready_at, slowdown = now + delay.base_s + delay.contention_s, self._latency_model.slowdown(now)
        own_s = self._latency_model.latencies_s[target(request.constraints, 0)][0] * slowdown
        engine_at = self._expected_end(request, now, slowdown, max(ready_at, free_at), max_batch_size)
        decoded_at = ready_at + delay.queue_s + own_s
        late_s = max(engine_at, decoded_at) - request.deadline_at
        if late_s <= 0:
            return None
        if now + delay.base_s + own_s > request.deadline_at:
            message = "even if nothing else waited it would be answered too late at this moment; grant it more time"
            return OverloadedError(message, "no_time", late_s)
        if ready_at + own_s > request.deadline_at or engine_at <= request.deadline_at:
            message = "too many are being read and decoded to answer it in time; try again later"
            return OverloadedError(message, "preprocessing", late_s)
        message = "too much is waiting: even the cheapest sub-network would answer too late; try again later"
        return OverloadedError(message, "backlog", late_s)

    def _expected_end(
        self, request: QueuedRequest, now: float, slowdown: float, start_at: float, max_batch_size: int
    ) -> float:
        """When a request would be answered if all before it ran at the cheapest level, in the largest batches.

        Under sustained overload requests that come after this one fill its batch up, which then takes the longer, and
        what waits grows until no batch may take longer than expected. Better rejected now than shed later: so there,
        if anything is before it, this is the end before which it will be in all likelihood.
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
        # What cannot be answered even alone will expire or be shed. Batches deviate independently of each other.
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
        """Whether for long more has come, and still comes, than is answered where a request takes so long at least."""
        return least_s * min(self._traffic.rate(now), self._traffic.sustained_rate(now)) > 1
