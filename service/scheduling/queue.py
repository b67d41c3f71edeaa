"""The requests that have been admitted and not yet been answered, and those of them that wait for the engine."""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter

from service.scheduling.state import QueuedRequest

_deadline = attrgetter("deadline_at")


class RequestQueue:
    """Admitted requests; those that are ready for the engine stand in order of deadline."""

    def __init__(self) -> None:
        self._queued: list[QueuedRequest] = []
        self._admitted: set[QueuedRequest] = set()
        self._reserved: dict[QueuedRequest, float] = {}  # until when, ascending; in _admitted as well
        self._again: dict[QueuedRequest, QueuedRequest] = {}  # by what was admitted, what waits for another look
        self._deadlines: dict[float, list[float]] = {}  # of all that are admitted, by priority, ascending

    def __len__(self) -> int:
        """Count what waits for the engine."""
        return len(self._queued)

    @property
    def queued(self) -> Sequence[QueuedRequest]:
        """What waits for the engine, earliest deadline first, equals in order of arrival."""
        return self._queued

    @property
    def num_admitted(self) -> int:
        """How many requests are admitted, whether ready for the engine or not."""
        return len(self._admitted)

    @property
    def priorities(self) -> frozenset[float]:
        """The priorities of the admitted requests."""
        return frozenset(self._deadlines)

    @property
    def num_reserved(self) -> int:
        """How many of them have only reserved their place."""
        return len(self._reserved)

    def reserve(self, request: QueuedRequest, until: float) -> None:
        """Count a request in for a while; one that is not admitted by then has lost its place."""
        self.admit(request)
        self._reserved[request] = until

    def claim(self, request: QueuedRequest, at_least_until: float) -> bool:
        """Keep a place for good that is reserved until then or longer; tells whether there is one."""
        if self._reserved.get(request, -math.inf) < at_least_until:
            return False
        del self._reserved[request]
        return True

    def expire_reserved(self, now: float) -> None:
        """Forget those whose while is over."""
        while self._reserved:
            request, until = next(iter(self._reserved.items()))
            if until > now:
                return
            self.remove(request)

    def admit(self, request: QueuedRequest) -> None:
        """Count a request in."""
        self._admitted.add(request)
        insort(self._deadlines.setdefault(request.priority, []), request.deadline_at)

    def enqueue(self, request: QueuedRequest) -> bool:
        """Let an admitted request wait for the engine; one that has left meanwhile stays out, which is told."""
        if request not in self._admitted:
            return False
        insort(self._queued, request, key=_deadline)
        return True

    def enqueue_again(self, again: QueuedRequest) -> None:
        """Let a request that has an answer wait for another look; no other has to wait for it, so it is not counted."""
        self._again[again.admitted] = again
        insort(self._queued, again, key=_deadline)

    def remove(self, request: QueuedRequest) -> None:
        """Forget a request, wherever it or its other look waits; one that is gone already is no error."""
        again = self._again.pop(request.admitted, None)
        if again is not None:
            self._take_out(again)
        if request not in self._admitted:
            return
        self._admitted.remove(request)
        self._reserved.pop(request, None)
        deadlines = self._deadlines[request.priority]
        del deadlines[bisect_left(deadlines, request.deadline_at)]
        if not deadlines:
            del self._deadlines[request.priority]
        self._take_out(request)

    def deadlines_before(self, request: QueuedRequest) -> list[float]:
        """Return the deadlines of the admitted requests that are served before another, ascending."""
        before = [deadlines[:count] for deadlines, count in self._before(request)]
        return before[0] if len(before) == 1 else sorted(chain.from_iterable(before))

    def count_before(self, request: QueuedRequest) -> int:
        """Count the admitted requests that are served before another."""
        return sum(count for _, count in self._before(request))

    def with_request(self, request: QueuedRequest) -> list[QueuedRequest]:
        """Return what would wait for the engine if another request did as well."""
        return sorted([*self._queued, request], key=_deadline)

    def _before(self, request: QueuedRequest) -> Iterator[tuple[list[float], int]]:
        """Yield the deadlines of each priority that is not lower, and how many of them are served before."""
        for priority, deadlines in self._deadlines.items():
            if priority >= request.priority:
                yield deadlines, bisect_right(deadlines, request.deadline_at)

    def _take_out(self, request: QueuedRequest) -> None:
        start = bisect_left(self._queued, request.deadline_at, key=_deadline)
        for index in range(start, len(self._queued)):
            if self._queued[index] is request:
                del self._queued[index]
                return
            if self._queued[index].deadline_at != request.deadline_at:
                return
