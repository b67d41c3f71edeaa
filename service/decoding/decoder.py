"""Images are decoded here, on threads of their own, the most urgent first; how long one takes is learned by kind.

The queue is by priority and then by deadline: images of lower priority stand behind all others. Whatever comes, a
thread is kept for images of ordinary cost, and those that are dear share a budget of memory.
"""

import math
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from threading import Lock

from torch import Tensor

from service.decoding.images import OpenedImage
from service.decoding.times import DecodeTimes
from service.errors import DeadlineError, OverloadedError
from service.scheduling.estimators import Delay

FADES_S = 5.0
# A photograph of two megapixels takes 30 ms, one of twelve from a telephone 80.
ORDINARY_COST_S = 0.05
ORDINARY_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A (3, S, S) uint8 image, how many seconds it waited for a thread, and how many it took to decode."""

    image: Tensor
    waited_s: float
    seconds: float


@dataclass(slots=True, eq=False)
class _Job:
    data: bytes | OpenedImage
    deadline_at: float
    urgency: tuple[float, float]  # the least first
    submitted_at: float
    address: str | None
    future: "Future[DecodedImage]" = field(default_factory=Future)
    opened: OpenedImage | None = None
    expected_s: float = 0.0
    started_at: float = 0.0

    @property
    def is_dear(self) -> bool:
        """Whether it may not hold every thread."""
        opened = self.opened
        return opened is not None and (opened.cost_s > ORDINARY_COST_S or opened.memory_bytes > ORDINARY_BYTES)


_urgency = attrgetter("urgency")


class Decoder:
    """Decodes what is submitted, and foretells from what is over and what is not."""

    def __init__(
        self,
        open_image: Callable[[bytes], OpenedImage],
        threads: int,
        max_memory_bytes: int,
        max_s_per_address: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the threads.

        Args:
            open_image: reads the header; called on one of the threads, as is what decodes the rest.
            threads: how many there are.
            max_memory_bytes: that dear images may take together; one that needs more is decoded alone.
            max_s_per_address: that the dear images of one address may need together while others have some, too.
            clock: monotonic, in seconds; the one that deadlines are on.
        """
        self._open_image, self._threads, self._clock = open_image, threads, clock
        self._max_memory_bytes, self._max_s_per_address = max_memory_bytes, max_s_per_address
        self._pool = ThreadPoolExecutor(threads, "decode")
        self._unopened: list[_Job] = []
        self._ordinary: list[_Job] = []  # this and the next in order of urgency
        self._dear: list[_Job] = []
        self._running: list[_Job] = []
        self._times = DecodeTimes()
        self._delay = Delay(FADES_S)  # of an ordinary image
        self._lock = Lock()

    def submit(
        self, data: bytes | OpenedImage, deadline_at: float, priority: float = 0, address: str | None = None
    ) -> "Future[DecodedImage]":
        """Decode an image as soon as a thread is free of more urgent ones.

        Args:
            data: its bytes, or what needs no codec.
            deadline_at: when its answer is due; after it, decoding would be in vain.
            priority: 0 is normal; lower ones stand behind.
            address: whose it is; None for no bound.

        Returns:
            The image, or a DeadlineError, or an OverloadedError where too much is to be decoded for that address, or
            the ServiceError with which it cannot be decoded. Cancelling it takes the image out of the queue.
        """
        now = self._clock()
        job = _Job(data, deadline_at, (-priority, deadline_at), now, address)
        with self._lock:
            job.expected_s = self._delay.expected_s(now)
            insort(self._unopened, job, key=_urgency)
        job.future.add_done_callback(partial(self._forget, job))
        self._pool.submit(self._work)
        return job.future

    def release(self, future: "Future[DecodedImage]") -> None:
        """Take note that nothing waits for an image any more; one that is still being decoded is learned from."""
        if future.cancel():
            return
        with self._lock:
            job = next((job for job in self._running if job.future is future), None)
            if job is not None:  # it takes longer than its client would wait, it is not known how much
                now = self._clock()
                self._learn(job, max(now - job.started_at, job.expected_s), now)

    def expected_s(self, now: float) -> float:
        """How long an image of ordinary cost will take: of one that is not here yet, no more is known."""
        with self._lock:
            return self._delay.expected_s(now)

    def queue_s(self, now: float, deadline_at: float, priority: float = 0) -> float:
        """How long an image of ordinary cost would wait for a thread, were it submitted now.

        An image that takes longer than expected is expected to take as long again.
        """
        urgency = (-priority, deadline_at)
        with self._lock:
            unopened, ordinary, dear = (
                jobs[: bisect_right(jobs, urgency, key=_urgency)]
                for jobs in (self._unopened, self._ordinary, self._dear)
            )
            running_s = [abs(job.expected_s - (now - job.started_at)) for job in self._running]
            dear_s = sum(job.expected_s for job in dear)
            cheap_s = sum(job.expected_s for job in (*unopened, *ordinary))
            num_cheap = len(unopened) + len(ordinary)
        idle = self._threads - len(running_s)
        if self._threads == 1:
            return sum(running_s) + cheap_s + dear_s
        if idle > num_cheap:  # dear ones never take the last thread
            return 0.0
        return (0.0 if idle else min(running_s)) + min((cheap_s + dear_s) / self._threads, cheap_s)

    def take_over(self, other: "Decoder") -> None:
        """Go on from what another one has learned of how long images take."""
        with other._lock:
            times, delay = deepcopy(other._times), copy(other._delay)
        with self._lock:
            self._times, self._delay = times, delay

    def close(self) -> None:
        """Have the threads end once what was submitted is decoded; waits for nothing, as the event loop must not."""
        self._pool.shutdown(wait=False)

    def _work(self) -> None:
        """Read the headers that came meanwhile, then decode the most urgent, until there is none that may run."""
        while True:
            with self._lock:
                unopened, self._unopened = self._unopened, []
            for job in unopened:
                self._open(job)
            with self._lock:
                next_job = self._next_job()
            if next_job is None:
                return
            self._run(next_job)

    def _open(self, job: _Job) -> None:
        if job.future.cancelled():
            return
        try:
            job.opened = job.data if isinstance(job.data, OpenedImage) else self._open_image(job.data)
            job.data = b""
            with self._lock:
                job.expected_s = self._times.expected_s(job.opened.kind, job.opened.cost_s, self._clock())
                if job.is_dear:
                    self._require_share(job)
                if not job.future.cancelled():  # where it is later, `_forget` finds it in the queue
                    insort(self._dear if job.is_dear else self._ordinary, job, key=_urgency)
        except Exception as error:  # whatever it is, the request that waits must hear of it
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)

    def _require_share(self, job: _Job) -> None:
        """Let no address have others with dear images wait for more of its own than is its share.

        Raises:
            OverloadedError: too much is to be decoded for it already.
        """
        if job.address is None:
            return
        dear = [other for other in (*self._dear, *self._running) if other.is_dear]
        own_s = [other.expected_s for other in dear if other.address == job.address]
        over_s = sum(own_s) + job.expected_s - self._max_s_per_address
        if 0 < len(own_s) < len(dear) and over_s > 0:  # one alone is for its deadline to stop
            message = f"the images of this address take {sum(own_s):.3g} s to be decoded already; try again later"
            raise OverloadedError(message, "address", over_s / max(1, self._threads - 1))

    def _next_job(self) -> _Job | None:
        queues = [self._ordinary, self._dear] if self._may_run_dear() else [self._ordinary]
        queue = min((jobs for jobs in queues if jobs), key=lambda jobs: jobs[0].urgency, default=None)
        if queue is None:
            return None
        job = queue.pop(0)
        job.started_at = self._clock()
        self._running.append(job)
        return job

    def _may_run_dear(self) -> bool:
        running = [job.opened.memory_bytes for job in self._running if job.opened and job.is_dear]
        if not self._dear or not running:
            return bool(self._dear)
        opened = self._dear[0].opened
        fits = opened is not None and sum(running) + opened.memory_bytes <= self._max_memory_bytes
        return fits and len(running) < self._threads - 1

    def _run(self, job: _Job) -> None:
        image, failure = None, None
        if job.opened is not None and job.future.set_running_or_notify_cancel():
            try:
                self._require_time(job)
                image = job.opened.decode()
            except Exception as error:  # whatever it is, the request that waits must hear of it
                failure = error
        now = self._clock()
        with self._lock:
            self._running.remove(job)
            if image is not None:
                self._learn(job, now - job.started_at, now)
        if image is not None:
            waited_s = job.started_at - job.submitted_at
            job.future.set_result(DecodedImage(image, waited_s, now - job.started_at))
        elif failure is not None:
            job.future.set_exception(failure)

    def _require_time(self, job: _Job) -> None:
        """Let nothing be decoded in vain.

        Raises:
            DeadlineError: the deadline has passed, or will have before a dear image is there were it twice as fast.
        """
        if job.started_at > job.deadline_at:
            raise DeadlineError("the deadline passed before the image could be decoded")
        if job.is_dear and job.started_at + job.expected_s / 2 > job.deadline_at:
            raise DeadlineError("the image takes longer to decode than its deadline leaves")

    def _learn(self, job: _Job, seconds: float, now: float) -> None:
        if job.opened is not None:
            self._times.observe(job.opened.kind, job.opened.cost_s, seconds, now)
        if not job.is_dear:
            self._delay.observe(seconds, now)

    def _forget(self, job: _Job, future: "Future[DecodedImage]") -> None:
        if future.cancelled():
            with self._lock:
                for jobs in (self._unopened, self._ordinary, self._dear):
                    if _remove(jobs, job):
                        return


def _remove(jobs: list[_Job], job: _Job) -> bool:
    first, end = (bisect(jobs, job.urgency, key=_urgency) for bisect in (bisect_left, bisect_right))
    for place in range(first, end):
        if jobs[place] is job:
            del jobs[place]
            return True
    return False
