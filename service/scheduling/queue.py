"""The queue: requests that are admitted but not answered yet, and those of them that wait for the engine."""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter

from service.scheduling.state import QueuedRequest

_deadline = attrgetter("deadline_at")


class RequestQueue:
    """The admitted requests; those that are ready for the engine are in order of deadline."""

    def __init__(self) -> None:
        self._queued: list[QueuedRequest] = []
        self._admitted: set[QueuedRequest] = set()
        self._reserved: dict[QueuedRequest, float] = {}  # when they expire, ascending; in _admitted as well
        self._again: dict[QueuedRequest, QueuedRequest] = {}  # by admitted request, its further look that waits
        self._deadlines: dict[float, list[float]] = {}  # of all admitted requests, by priority; each list ascending

    def __len__(self) -> int:
        """Return the number of requests that wait for the engine."""
        return len(self._queued)

    @property
    def queued(self) -> Sequence[QueuedRequest]:
        """The requests that wait for the engine, earliest deadline first; equal deadlines in order of enqueueing."""
        return self._queued

    @property
    def num_admitted(self) -> int:
        """Number of admitted requests, whether ready for the engine or not."""
        return len(self._admitted)

    @property
    def priorities(self) -> frozenset[float]:
        """The priorities of the admitted requests."""
        return frozenset(self._deadlines)

    @property
    def num_reserved(self) -> int:
        """Number of admitted requests that have only reserved their place."""
        return len(self._reserved)

    def reserve(self, request: QueuedRequest, until: float) -> None:
        """Admit a request up to an instant; unless it is claimed by then, it loses its place."""
        self.admit(request)
        self._reserved[request] = until

    def claim(self, request: QueuedRequest, at_least_until: float) -> bool:
        """Make a reservation permanent if it lasts until `at_least_until` or longer; return whether there is one."""
        if self._reserved.get(request, -math.inf) < at_least_until:
            return False
        del self._reserved[request]
        return True

    def expire_reserved(self, now: float) -> None:
        """Remove the requests whose reservations have expired."""
        while self._reserved:
            request, until = next(iter(self._reserved.items()))
            if until > now:
                return
            self.remove(request)

    def admit(self, request: QueuedRequest) -> None:
        """Add a request to the admitted ones."""
        self._admitted.add(request)
        insort(self._deadlines.setdefault(request.priority, []), request.deadline_at)

    def enqueue(self, request: QueuedRequest) -> bool:
        """Put an admitted request into the queue for the engine; return False if it has left already."""
        if request not in self._admitted:
            return False
        insort(self._queued, request, key=_deadline)
        return True

    def enqueue_again(self, again: QueuedRequest) -> None:
        """Queue another look for a request that has an answer; no other request waits for it, so it does not count."""
        self._again[again.admitted] = again
        insort(self._queued, again, key=_deadline)

    def remove(self, request: QueuedRequest) -> None:
        """Remove a request and its further look, wherever they wait; no error if the request is gone already."""
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
        """Return the deadlines of the admitted requests that are served before a request, ascending."""
        before = [deadlines[:count] for deadlines, count in self._before(request)]
        return before[0] if len(before) == 1 else sorted(chain.from_iterable(before))

    def count_before(self, request: QueuedRequest) -> int:
        """Count the admitted requests that are served before a request."""
        return sum(count for _, count in self._before(request))

    def with_request(self, request: QueuedRequest) -> list[QueuedRequest]:
        """Return the queue for the engine as it would be with one more request."""
        return sorted([*self._queued, request], key=_deadline)

    def _before(self, request: QueuedRequest) -> Iterator[tuple[list[float], int]]:
        """Yield the deadlines of each priority that is not lower, and how many of these are served before `request`."""
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
