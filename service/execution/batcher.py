"""Whenever the engine is free, asks the scheduler what to run, runs it, and answers the requests.

Its turns run on the engine's own thread, so that the engine never waits for an event loop that is busy with sockets.
The threads that decode images put requests into the queue; the event loop removes those whose clients have left.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from service.decoding.decoder import DecodedImage
from service.domain import LookCode
from service.engines.base import Run
from service.errors import DeadlineError, ModelError, NotReadyError, OverloadedError, ServiceError
from service.execution.engine_thread import EngineThread
from service.execution.idle_turns import IdleTurns
from service.execution.live_sample import LiveSample
from service.execution.paced_handler import PacedHandler
from service.execution.pending import Outcome, Pending, PendingRequests
from service.execution.results import Result
from service.execution.throttle import LONGEST_NAP_S, UtilizationLimiter
from service.execution.timed_engine import TimedEngine
from service.scheduling.scheduler import Scheduler
from service.scheduling.second_look import Looked, may_look_again
from service.scheduling.state import BatchDecision, QueuedRequest
from service.scheduling.variants import Variant

logger = logging.getLogger(__name__)

# Consecutive images on which the model fails before it runs an image of zeros, to tell bad images from a broken model.
FAILURES_IN_A_ROW = 8

CallOnLoop = Callable[..., object]
Outcomes = Sequence[Outcome]


class Batcher:
    """Runs what the scheduler decides, one batch at a time."""

    def __init__(
        self,
        run: Run,
        scheduler: Scheduler,
        thread: EngineThread,
        *,
        limiter: UtilizationLimiter | None = None,
        idle: IdleTurns | None = None,
        sample: LiveSample | None = None,
        observe_machine: Callable[[], object] = lambda: None,
        observe_batch: Callable[[int, float, float, float], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Create a batcher from its collaborators.

        Args:
            run: the engine's `run`.
            scheduler: decides what to run.
            thread: the engine's own thread, on which the batcher gets its turns.
            limiter: delays batches to keep below a utilization ceiling.
            idle: work of the engine while no request waits; it learns from batches as well.
            sample: records the images that were answered, and failures.
            observe_machine: called before each decision, to tell the scheduler the state of the machine.
            observe_batch: called after each batch with its size, its predicted and measured seconds, and the measured
                seconds plus the pause that the ceiling then demands.
            clock: monotonic, in seconds; the clock of the deadlines.
            sleep: sleeps for a pause.
        """
        self._engine, self._scheduler = TimedEngine(run, clock), scheduler
        self._limiter, self._idle = limiter or UtilizationLimiter(None, None), idle
        self._observe_machine, self._observe_batch = observe_machine, observe_batch
        self._pending, self._clock, self._sleep = PendingRequests(), clock, sleep
        self._answers, self._sample = PacedHandler(self._pending.settle), sample or LiveSample()
        self._thread, self._stopping = thread, False
        self._failures_in_a_row, self._free_at = 0, 0.0  # the latter: since when the engine could have run a batch
        self._call_on_loop: CallOnLoop = lambda *_: None  # before `serve`, there is no loop to call

    @property
    def running(self) -> tuple[float, float] | None:
        """When the current batch or measurement began, and its expected seconds; None where nothing runs."""
        return self._engine.running or (None if self._idle is None else self._idle.running)

    @property
    def has_work(self) -> bool:
        """Whether a request waits for the engine."""
        return len(self._scheduler) > 0

    @property
    def is_over(self) -> bool:
        """Whether no request is left, and none will come."""
        return self._stopping and not self._pending

    async def submit(self, decoding: "Future[DecodedImage]", request: QueuedRequest) -> Result:
        """Wait for the image of a request, then for its turn in the queue, and return its result.

        Cancelling this call makes the batcher forget the request; the caller must withdraw it from the scheduler.

        Args:
            decoding: future of the decoded image.
            request: a request that is admitted by the scheduler, and not withdrawn before this call returns.

        Raises:
            DeadlineError: the request can no longer be answered in time.
            OverloadedError: the request was shed so that others can be answered in time.
            ModelError: the model failed on this image.
            NotReadyError: the batcher is stopping.
            Exception: the exception of `decoding`.
        """
        if self._stopping:
            raise NotReadyError("the server is stopping")
        loop = asyncio.get_running_loop()
        pending = self._pending.add(request)
        decoding.add_done_callback(partial(self._enqueue, request, pending, loop.call_soon_threadsafe))
        deadline = loop.call_later(request.deadline_at - self._clock(), self._expire, request, pending)
        try:
            return await pending.future
        finally:
            deadline.cancel()
            self._pending.discard(request)
            if self._stopping:
                self._thread.wake()  # this may have been the last request

    def _expire(self, request: QueuedRequest, pending: Pending) -> None:
        """Answer a request at its deadline: with its last look, or with an error unless it is in a running batch."""
        if not pending.is_running or pending.last_look is not None:
            error = DeadlineError(f"the deadline passed before {pending.awaited}")
            self._pending.settle(self._pending.failed(error, request, LookCode.DEADLINE))
            if pending.image is not None and pending.last_look is None:
                self._scheduler.deadline_missed(self._clock())

    def _enqueue(
        self, request: QueuedRequest, pending: Pending, call_on_loop: CallOnLoop, decoding: "Future[DecodedImage]"
    ) -> None:
        """Put a decoded request into the queue, on the thread that decoded it and without the event loop."""
        if self._pending.find(request) is None:
            return  # its client has left
        if error := decoding.exception():
            call_on_loop(self._pending.settle, (request, error))
            return
        pending.image = decoding.result().image
        self._scheduler.enqueue(request)
        self._thread.wake()

    async def serve(self) -> None:
        """Run batches until `stop` is called and every submitted request is answered.

        If it ends otherwise, because it is cancelled or a decision fails, the remaining requests get a NotReadyError.
        """
        self._call_on_loop = asyncio.get_running_loop().call_soon_threadsafe
        self._free_at = self._clock()
        try:
            await asyncio.wrap_future(self._thread.serve(self))
        finally:
            self._answer_all(NotReadyError("the server is stopping"))
            self.stop()

    def abandon(self) -> None:
        """Answer all requests, on the event loop, because the engine never will: with an error, or their last look."""
        self._answer_all(ModelError("the model hangs on a batch; the server is shutting down"))
        self.stop()

    def stop(self) -> None:
        """Accept no new requests; those submitted are still answered."""
        self._stopping = True
        self._thread.wake()

    def take_turn(self) -> None:
        """Sleep for a part of the pause that the ceiling demands, or else run a batch and send its answers."""
        if pause_s := self._limiter.pause_s(now := self._clock()):
            self._scheduler.engine_taken(now + pause_s)
            self._sleep(min(pause_s, LONGEST_NAP_S))
            self._free_at = self._clock()
            return
        for outcomes in self._serve_batch():
            self._call_on_loop(self._answers.add, outcomes)

    def rest(self) -> float:
        """Record that nothing waits; return the seconds until idle work may be due, possibly infinite."""
        self._limiter.idle()
        wait_s = None if self._idle is None else self._idle.wait_s(is_expecting=bool(self._pending))
        return math.inf if wait_s is None else wait_s

    def take_idle_turn(self) -> None:
        """Run a batch of idle work, unless a request is pending or the batcher is stopping."""
        if self._idle is not None and not (self._pending or self._stopping):
            self._idle.take_turn()

    def engine_freed(self) -> None:
        """Record that the engine was used by others, or had nothing to do, until now."""
        self._free_at = self._clock()

    def close(self) -> None:
        """Stop idle work."""
        if self._idle is not None:
            self._idle.close()

    def _serve_batch(self) -> Iterator[Outcomes]:
        """Run what the policy decides, and yield the outcomes of requests as soon as they are known."""
        self._observe_machine()
        self._scheduler.throttled(self._limiter.throttle_factor)
        now = self._clock()
        decision = self._scheduler.next_batch(now)
        if decision.expired:
            message = "the deadline can no longer be met"
            yield [
                self._pending.failed(DeadlineError(message), request, LookCode.DEADLINE) for request in decision.expired
            ]
        if decision.shed:
            message = "shed to answer other requests in time; try again later"
            retry_after_s = self._scheduler.backlog_s(now)
            yield [
                self._pending.failed(OverloadedError(message, "shed", retry_after_s), request, LookCode.OVERLOAD)
                for request in decision.shed
            ]
        if decision.variant is not None:
            yield from self._run_batch(decision, decision.variant, decision.batch)

    def _run_batch(
        self, decision: BatchDecision, variant: Variant, batch: Sequence[QueuedRequest]
    ) -> Iterator[Outcomes]:
        images = self._pending.start(batch)
        if not images:
            self._scheduler.engine_taken(self._clock())
            return  # all clients have left
        predicted_s = self._scheduler.predict(variant, len(images), self._clock())
        try:
            ranked, started_at, ended_at = self._engine.run(list(images.values()), variant.profile, predicted_s)
            answered = list(zip(images, ranked, strict=True))
        except Exception:  # whatever the model raises, its requests must be released and the next batch run
            self._free_at = self._clock()
            self._scheduler.engine_taken(self._free_at)
            yield from self._run_apart(decision, variant, images)
            return
        inference_s = ended_at - started_at
        self._scheduler.batch_completed(variant, len(answered), inference_s, ended_at, started_at - self._free_at)
        self._free_at = ended_at
        self._failures_in_a_row = 0
        self._limiter.batch_ran(inference_s)
        self._sample.answered(list(images.values()), variant.profile.subnetwork, ranked)
        self._observe_batch(len(answered), predicted_s, inference_s, inference_s * self._limiter.throttle_factor)
        result = partial(
            Result,
            variant=variant,
            decision=decision,
            batch_size=len(answered),
            predicted_s=predicted_s,
            inference_s=inference_s,
            started_at=started_at,
            ended_at=ended_at,
        )
        results = {request: result(*one, before=self._pending.last_look_of(request)) for request, one in answered}
        yield self._final(results, variant, ended_at)
        if self._idle is not None:  # after the answers, which must not wait for it
            self._idle.batch_ran(list(images.values()), list(results.values()))

    def _final(self, results: Mapping[QueuedRequest, Result], variant: Variant, now: float) -> Outcomes:
        """Return the outcomes of a batch, without the requests that now wait for another look."""
        if variant.second_look is None and not any(map(may_look_again, results)):
            return list(results.items())
        looked = [Looked(request, result.confidence, result.spent_macs) for request, result in results.items()]
        followed = zip(results.items(), self._scheduler.look_again(looked, variant, now), strict=True)
        outcomes = []
        for (request, result), following in followed:
            if isinstance(following, LookCode):
                outcomes.append(self._pending.finished(request, result, following))
            elif not self._pending.keep(request, result):
                self._scheduler.withdraw(following)  # its client has left
        return outcomes

    def _run_apart(
        self, decision: BatchDecision, variant: Variant, images: dict[QueuedRequest, Tensor]
    ) -> Iterator[Outcomes]:
        """Bisect a batch that failed, until the request on which the model fails runs alone."""
        batch = list(images)
        if len(batch) == 1:
            logger.exception("the model failed on an image at %s", variant.profile.subnetwork)
            self._sample.failed()
            failure = ModelError("the model failed on this image; see the server's log")
            yield [self._pending.failed(failure, batch[0], LookCode.FAILED)]
            self._failures_in_a_row += 1
            if self._failures_in_a_row == FAILURES_IN_A_ROW:
                self._failures_in_a_row = 0
                self._engine.require(torch.zeros_like(images[batch[0]]), variant.profile)
            return
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            yield from self._run_batch(decision, variant, half)

    def _answer_all(self, error: ServiceError) -> None:
        """Answer every request: with the result of its last look, where there is one, or else with an error."""
        self._answers.finish()
        for request in self._pending:
            self._pending.settle(self._pending.failed(error, request, LookCode.FAILED))
