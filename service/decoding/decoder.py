"""Images are decoded here, on threads of their own, the most urgent first; how long one takes is learned.

The queue is by priority and then by deadline: images of lower priority stand behind all others.
"""

import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from threading import Lock

from torch import Tensor

from service.errors import DeadlineError
from service.scheduling.estimators import Delay

FADES_S = 5.0


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A (3, S, S) uint8 image, and the seconds that it took to decode."""

    image: Tensor
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    data: bytes
    deadline_at: float
    urgency: tuple[int, float]  # the least first
    future: "Future[DecodedImage]" = field(default_factory=Future)


_urgency = attrgetter("urgency")


class Decoder:
    """Decodes what is submitted, and foretells from what is over and what is not."""

    def __init__(
        self, decode: Callable[[bytes], Tensor], threads: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the threads.

        Args:
            decode: bytes to a (3, S, S) uint8 image; called on one of the threads.
            threads: how many there are.
            clock: monotonic, in seconds; the one that deadlines are on.
        """
        self._decode, self._threads, self._clock = decode, threads, clock
        self._pool = ThreadPoolExecutor(threads, "decode")
        self._queue: list[_Job] = []  # in order of urgency
        self._started_at: dict[Future[DecodedImage], float] = {}  # of those that a thread is at
        self._delay = Delay(FADES_S)  # of one image
        self._lock = Lock()

    def submit(self, data: bytes, deadline_at: float, priority: int = 0) -> "Future[DecodedImage]":
        """Decode an image as soon as a thread is free of more urgent ones.

        Args:
            data: its bytes.
            deadline_at: when its answer is due; after it, decoding would be in vain.
            priority: 0 is normal; lower ones stand behind.

        Returns:
            The image, or a DeadlineError, or the ServiceError with which it cannot be decoded. Cancelling it takes the
            image out of the queue.
        """
        job = _Job(data, deadline_at, (-priority, deadline_at))
        job.future.add_done_callback(partial(self._forget, job))
        with self._lock:
            insort(self._queue, job, key=_urgency)
        self._pool.submit(self._work)  # at whatever is the most urgent then
        return job.future

    def release(self, future: "Future[DecodedImage]") -> None:
        """Take note that nothing waits for an image any more; one that is still being decoded is learned from."""
        if future.cancel():
            return
        with self._lock:
            if future in self._started_at:  # it takes longer than its client would wait, it is not known how much
                now = self._clock()
                held_s = now - self._started_at[future]
                self._delay.observe(max(held_s, self._delay.expected_s(now)), now)

    def expected_s(self, now: float) -> float:
        """How long an image will take."""
        return self._delay.expected_s(now)

    def queue_s(self, now: float, deadline_at: float, priority: int = 0) -> float:
        """How long an image would wait for a thread, were it submitted now.

        Images that hold every thread for longer than images take are expected to hold them for as long again.
        """
        with self._lock:
            before = bisect_right(self._queue, (-priority, deadline_at), key=_urgency)
            ahead = max(0, before + len(self._started_at) + 1 - self._threads)
            expected_s = self._delay.expected_s(now)
            all_held = bool(ahead) and len(self._started_at) == self._threads
            held_s = now - max(self._started_at.values()) if all_held else 0.0
        return ahead / self._threads * expected_s + max(0.0, held_s - expected_s)

    def close(self) -> None:
        """Decode what was submitted, and end the threads."""
        self._pool.shutdown()

    def _work(self) -> None:
        """Decode the most urgent image, if any is left: those that were cancelled are gone from the queue."""
        with self._lock:
            if not self._queue:
                return
            job = self._queue.pop(0)
            if not job.future.set_running_or_notify_cancel():
                return
            started_at = self._started_at[job.future] = self._clock()
        try:
            if started_at > job.deadline_at:
                raise DeadlineError("the deadline passed before the image could be decoded")
            image = self._decode(job.data)
        except Exception as error:  # whatever it is, the request that waits must hear of it
            with self._lock:
                del self._started_at[job.future]
            job.future.set_exception(error)
            return
        now = self._clock()
        with self._lock:
            del self._started_at[job.future]
            self._delay.observe(now - started_at, now)
        job.future.set_result(DecodedImage(image, now - started_at))

    def _forget(self, job: _Job, future: "Future[DecodedImage]") -> None:
        if not future.cancelled():
            return
        with self._lock:
            for place in range(bisect_left(self._queue, job.urgency, key=_urgency), len(self._queue)):
                if self._queue[place] is job:
                    del self._queue[place]
                    return
