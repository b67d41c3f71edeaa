"""Decodes images on its own threads, the most urgent first, and learns how long each kind of image takes.

The queue is sorted by priority, then by deadline: images of lower priority are decoded after all others. Where there
are several threads, one is always kept for images of ordinary cost. Expensive images share a memory budget.
"""

import math
import time
from bisect import bisect_right, insort
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from copy import copy, deepcopy
from dataclasses import dataclass, field
from operator import attrgetter
from threading import Lock

from torch import Tensor

from service.decoding.images import OpenedImage
from service.decoding.times import DecodeTimes
from service.errors import DeadlineError, NotReadyError, OverloadedError, ServiceError
from service.scheduling.estimators import DelayEstimator

DECAY_S = 5.0
# Images above either limit are expensive. A photograph of 2 megapixels takes 30 ms, one of 12 from a telephone 80 ms.
ORDINARY_COST_S = 0.05
ORDINARY_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A (3, S, S) uint8 image, the seconds it waited for a thread, and the seconds its decoding took."""

    image: Tensor
    waited_s: float
    seconds: float


@dataclass(slots=True, eq=False)
class _Job:
    data: bytes | OpenedImage
    deadline_at: float
    urgency: tuple[float, float]  # smallest first
    submitted_at: float
    address: str | None
    future: "Future[DecodedImage]" = field(default_factory=Future)
    opened: OpenedImage | None = None
    expected_s: float = 0.0
    started_at: float = 0.0
    is_learned: bool = False

    @property
    def is_expensive(self) -> bool:
        """Whether the image is expensive; such images may not hold every thread."""
        opened = self.opened
        return opened is not None and (opened.cost_s > ORDINARY_COST_S or opened.memory_bytes > ORDINARY_BYTES)


_urgency = attrgetter("urgency")


class Decoder:
    """Decodes submitted images, and predicts waiting and decode times from finished and pending ones."""

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
            open_image: reads the header; called on one of the threads, as is the decoding.
            threads: number of threads.
            max_memory_bytes: most memory that expensive images may take together; an image that needs more is decoded
                while no other expensive one is.
            max_s_per_address: most seconds of decoding that the expensive images of one address may need together
                while other addresses have expensive images, too.
            clock: monotonic, in seconds; the clock of the deadlines.
        """
        self._open_image, self._threads, self._clock = open_image, threads, clock
        self._max_memory_bytes, self._max_s_per_address = max_memory_bytes, max_s_per_address
        self._pool = ThreadPoolExecutor(threads, "decode")
        self._unopened: list[_Job] = []  # this and the next two are sorted by urgency
        self._ordinary: list[_Job] = []
        self._expensive: list[_Job] = []
        self._running: list[_Job] = []
        self._times = DecodeTimes()
        self._delay = DelayEstimator(DECAY_S)  # of an ordinary image
        self._lock = Lock()

    def submit(
        self, data: bytes | OpenedImage, deadline_at: float, priority: float = 0, address: str | None = None
    ) -> "Future[DecodedImage]":
        """Queue an image, to be decoded once a thread is free and no more urgent image waits.

        Args:
            data: bytes of the image, or an opened image that needs no codec.
            deadline_at: when the answer is due; after it, the image is not decoded.
            priority: 0 is normal; images of lower priority are decoded later.
            address: address that sent the image; None for no bound by address.

        Returns:
            A future of the image. It fails with a DeadlineError, with an OverloadedError if the address has too much to
            be decoded already, or with the ServiceError of opening or decoding. Cancelling it takes the image out of
            the queue.

        Raises:
            NotReadyError: the decoder is closed.
        """
        now = self._clock()
        job = _Job(data, deadline_at, (-priority, deadline_at), now, address)
        with self._lock:
            job.expected_s = self._delay.expected_s(now)
            insort(self._unopened, job, key=_urgency)
        job.future.add_done_callback(self._forget)
        try:
            self._pool.submit(self._work)
        except RuntimeError:  # it is closed, because its model has ended
            job.future.cancel()
            raise NotReadyError("the server is stopping") from None
        return job.future

    def release(self, future: "Future[DecodedImage]") -> None:
        """Cancel an image that nothing waits for; a running one counts as its expected time, or longer."""
        if future.cancel():
            return
        with self._lock:
            job = next((job for job in self._running if job.future is future), None)
            if job is not None:  # the request ended first: the full time is not known
                now = self._clock()
                self._learn(job, max(now - job.started_at, job.expected_s), now)
                job.is_learned = True

    def expected_s(self, now: float) -> float:
        """Return the expected decode time of an image of ordinary cost: the estimate for one that has not arrived."""
        with self._lock:
            return self._delay.expected_s(now)

    def queue_s(self, now: float, deadline_at: float, priority: float = 0) -> float:
        """Return how long an image of ordinary cost would wait for a thread if it were submitted now.

        A running image that has exceeded its expected time by some seconds is expected to need as many more.
        """
        urgency = (-priority, deadline_at)
        with self._lock:
            unopened, ordinary, expensive = (
                jobs[: bisect_right(jobs, urgency, key=_urgency)]
                for jobs in (self._unopened, self._ordinary, self._expensive)
            )
            running_s = [abs(job.expected_s - (now - job.started_at)) for job in self._running]
            expensive_s = sum(job.expected_s for job in expensive)
            cheap_s = sum(job.expected_s for job in (*unopened, *ordinary))
            num_cheap = len(unopened) + len(ordinary)
        idle = self._threads - len(running_s)
        if self._threads == 1:
            return sum(running_s) + cheap_s + expensive_s
        if idle > num_cheap:  # expensive images never take the last thread
            return 0.0
        return (0.0 if idle else min(running_s)) + min((cheap_s + expensive_s) / self._threads, cheap_s)

    def take_over(self, other: "Decoder") -> None:
        """Adopt the decode times that another decoder has learned."""
        with other._lock:
            times, delay = deepcopy(other._times), copy(other._delay)
        with self._lock:
            self._times, self._delay = times, delay

    def close(self) -> None:
        """Let the threads end once all submitted images are decoded; do not wait, as the event loop must not."""
        self._pool.shutdown(wait=False)

    def _work(self) -> None:
        """Read the headers of new images, then decode the most urgent image, until no image may run."""
        while True:
            with self._lock:
                unopened, self._unopened = self._unopened, []
            for number, job in enumerate(unopened, 1):
                self._open(job)
                if number < len(unopened):  # another thread may decode it meanwhile
                    self._help()
            with self._lock:
                next_job = self._next_job()
            if next_job is None:
                return
            self._run(next_job)

    def _help(self) -> None:
        with suppress(RuntimeError):  # the decoder closes: this thread does the work alone
            self._pool.submit(self._work)

    def _open(self, job: _Job) -> None:
        if job.future.cancelled():
            return
        try:
            job.opened = job.data if isinstance(job.data, OpenedImage) else self._open_image(job.data)
            job.data = b""
            with self._lock:
                job.expected_s = self._times.expected_s(job.opened.kind, job.opened.cost_s, self._clock())
                if job.is_expensive:
                    self._require_share(job)
                if not job.future.cancelled():  # if it is cancelled later, `_forget` removes it from the queue
                    insort(self._expensive if job.is_expensive else self._ordinary, job, key=_urgency)
        except Exception as error:  # any error must reach the request that waits for the image
            if job.future.set_running_or_notify_cancel():
                _fail(job, error)

    def _require_share(self, job: _Job) -> None:
        """Bound the decode time that expensive images of one address take from those of others.

        Raises:
            OverloadedError: the address has too much to be decoded already.
        """
        if job.address is None:
            return
        expensive = [other for other in (*self._expensive, *self._running) if other.is_expensive]
        own_s = [other.expected_s for other in expensive if other.address == job.address]
        over_s = sum(own_s) + job.expected_s - self._max_s_per_address
        if 0 < len(own_s) < len(expensive) and over_s > 0:  # an only image is bounded by its deadline
            message = f"the pending images of this address already take {sum(own_s):.3g} s to decode; try again later"
            raise OverloadedError(message, "address", over_s / max(1, self._threads - 1))

    def _next_job(self) -> _Job | None:
        queues = [self._ordinary, self._expensive] if self._may_run_expensive() else [self._ordinary]
        queue = min((jobs for jobs in queues if jobs), key=lambda jobs: jobs[0].urgency, default=None)
        if queue is None:
            return None
        job = queue.pop(0)
        job.started_at = self._clock()
        self._running.append(job)
        return job

    def _may_run_expensive(self) -> bool:
        running = [job.opened.memory_bytes for job in self._running if job.opened and job.is_expensive]
        if not self._expensive or not running:
            return bool(self._expensive)
        opened = self._expensive[0].opened
        fits = opened is not None and sum(running) + opened.memory_bytes <= self._max_memory_bytes
        return fits and len(running) < self._threads - 1

    def _run(self, job: _Job) -> None:
        image, failure = None, None
        if job.opened is not None and job.future.set_running_or_notify_cancel():
            try:
                self._require_time(job)
                image = job.opened.decode()
            except Exception as error:  # any error must reach the request that waits for the image
                failure = error
        now = self._clock()
        with self._lock:
            self._running.remove(job)
            if image is not None and not job.is_learned:
                self._learn(job, now - job.started_at, now)
        if image is not None:
            waited_s = job.started_at - job.submitted_at
            job.future.set_result(DecodedImage(image, waited_s, now - job.started_at))
        elif failure is not None:
            _fail(job, failure)

    def _require_time(self, job: _Job) -> None:
        """Check that the image can be decoded before its deadline.

        Raises:
            DeadlineError: the deadline has passed, or an expensive image would miss it even at half its expected time.
        """
        if job.started_at > job.deadline_at:
            raise DeadlineError("the deadline passed before the image could be decoded")
        if job.is_expensive and job.started_at + job.expected_s / 2 > job.deadline_at:
            raise DeadlineError("decoding the image would take longer than its deadline allows")

    def _learn(self, job: _Job, seconds: float, now: float) -> None:
        if job.opened is not None:
            self._times.observe(job.opened.kind, job.opened.cost_s, seconds, now)
        if not job.is_expensive:
            self._delay.observe(seconds, now)

    def _forget(self, future: "Future[DecodedImage]") -> None:
        # A callback that held the job would keep the image until the next garbage collection: the job has the future.
        if future.cancelled():
            with self._lock:
                for jobs in (self._unopened, self._ordinary, self._expensive):
                    jobs[:] = (job for job in jobs if job.future is not future)


def _fail(job: _Job, error: Exception) -> None:
    if isinstance(error, ServiceError):  # an answer, not a bug: without the frames that raised it, which hold the image
        error.__traceback__ = error.__context__ = None
    job.future.set_exception(error)
