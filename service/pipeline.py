"""The path of one request: admit, read, decode, queue, infer, answer. HTTP is above, every stage below."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from models.checkpoint import Checkpoint
from service.answers import classification_of, predictions_of
from service.decoding.decoder import Decoder
from service.decoding.images import OpenedImage
from service.domain import DEFAULT_TOP_K, Classification, Decision, Forecast, InferenceRequest, Timing
from service.errors import (
    BudgetTooSmallError,
    ClientGoneError,
    DeadlineError,
    InvalidParameterError,
    OverloadedError,
    OverloadReason,
)
from service.execution.batcher import Batcher
from service.grants import allow, allow_priority, allow_time_ms, most_gflops_of
from service.scheduling.estimators import DelayEstimator, LoopCostEstimator
from service.scheduling.key_ledger import KeyLedger
from service.scheduling.reasons import explain, reason_of
from service.scheduling.scheduler import Scheduler
from service.scheduling.state import PreprocessingDelay, QueuedRequest, target

Image = bytes | OpenedImage  # encoded, or opened and ready to be turned into pixels
Read = Callable[[float], Awaitable[Image]]

# The part of a budget that sockets and client take before the request is stamped and after it is answered.
TRANSPORT_S = 0.003
TRANSPORT_SHARE = 0.1  # upper bound of that part, for tight budgets


class Pipeline:
    """Answers requests.

    Attributes:
        checkpoint: the checkpoint whose model answers.
        num_at_work: requests in progress.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        checkpoint: Checkpoint,
        decoder: Decoder,
        batcher: Batcher,
        max_in_flight: int,
        default_budget_ms: float,
        ledger: KeyLedger,
        clock: Callable[[], float] = time.monotonic,
        loop_time: Callable[[], float] = time.thread_time,
    ) -> None:
        """Create a pipeline from its collaborators.

        Args:
            scheduler: admits requests and previews decisions.
            checkpoint: the checkpoint that the batcher runs.
            decoder: decodes images.
            batcher: runs the model.
            max_in_flight: requests with complete bodies that may be in the pipeline at once.
            default_budget_ms: latency budget of a request that names none.
            ledger: records the work done for each API key.
            clock: monotonic, in seconds; the one that stamped `arrived_at`.
            loop_time: returns the CPU seconds used by the event loop's thread.
        """
        self.checkpoint, self.num_at_work = checkpoint, 0
        self._slots_taken = 0  # by requests with complete bodies
        self._scheduler, self._decoder, self._batcher = scheduler, decoder, batcher
        self._max_in_flight, self._default_budget_ms = max_in_flight, default_budget_ms
        self._ledger, self._clock = ledger, clock
        # The event loop's CPU time per request, and the time from the end of a batch to the finished answer.
        self._loop_cost, self._reply = LoopCostEstimator(loop_time), DelayEstimator()

    def take_over(self, other: "Pipeline") -> None:
        """Take over what another pipeline has learned; both share the estimates of their common event loop."""
        self._loop_cost, self._reply = other._loop_cost, other._reply
        self._scheduler.take_over(other._scheduler)
        self._decoder.take_over(other._decoder)

    async def classify(
        self,
        read: Read,
        request: InferenceRequest,
        watch: AbstractContextManager[object] | None = None,
        reserved: QueuedRequest | None = None,
    ) -> Classification:
        """Answer one request.

        Args:
            read: returns the image if it arrives within the given seconds; called once the request has a place.
            request: what the client asks for.
            watch: context manager that raises a ClientGoneError from its block once the client has left.
            reserved: the result of `reserve` for the request, if that was called.

        Raises:
            ServiceError: the request is rejected, or fails.

        Cancellation removes the request from every queue.
        """
        self.num_at_work += 1
        try:
            with self._loop_cost.counting(), watch or nullcontext():
                return await self._answer(read, request, reserved)
        except ClientGoneError as error:
            now = self._clock()
            if now - request.arrived_at <= self._usable_budget_s(request):
                raise
            self._scheduler.deadline_missed(now)  # it left because no answer came in time
            raise ClientGoneError(error.message, deadline_passed=True) from None
        finally:
            self.num_at_work -= 1

    def reserve(self, request: InferenceRequest) -> QueuedRequest | None:
        """Reject a request before its body is read, or briefly keep a place for it, which `classify` claims.

        No place is kept for a key with a rate of work: another request may use up the rest of that rate by then.

        Raises:
            ServiceError: the request is rejected, or asks for something that the model does not offer.
        """
        self._checked_top_k(request.top_k)
        try:
            reserved = self._reserve(request)
        except OverloadedError:
            self._loop_cost.rejected()
            raise
        if request.key is None or request.key.gflops_per_s is None:
            return reserved
        self._scheduler.withdraw(reserved)
        return None

    def reject_again(self, reason: OverloadReason) -> None:
        """Record that one more request was rejected for the same reason."""
        self._scheduler.rejected(reason, self._clock())
        self._loop_cost.rejected()

    def check_room(self) -> None:
        """Check that the pipeline has room for one more request.

        Raises:
            OverloadedError: the pipeline is full.
        """
        if self._slots_taken >= self._max_in_flight:
            message = f"{self._max_in_flight} requests are in the server already; try again later"
            raise OverloadedError(message, "full", self._scheduler.backlog_s(self._clock()))

    def check(self, request: InferenceRequest) -> None:
        """Check that the model offers what the request asks for; a latency budget may still follow in the body.

        Raises:
            ServiceError: the request cannot be served, whatever its body contains.
        """
        self._checked_top_k(request.top_k)
        self._queued(request if request.budget_ms is not None else replace(request, budget_ms=math.inf))

    def time_left_s(self, request: InferenceRequest) -> float:
        """Return how many seconds of the request's budget are left for its body to arrive."""
        return request.arrived_at + self._usable_budget_s(request) - self._clock()

    def decide(self, request: InferenceRequest) -> Forecast:
        """Predict the decision and the latency of a request that arrived now, without running anything.

        Raises:
            ServiceError: the request would be rejected.
        """
        queued, now = self._queued(request), self._clock()
        preview = self._scheduler.preview(queued, now, self._delay(now, queued))
        variant, constraints = preview.variant, queued.constraints
        predicted_s = self._scheduler.predict(variant, preview.batch_size, now)
        reason = reason_of(constraints, variant, preview.decision)
        sentence = explain(reason, self._scheduler.catalog, variant, constraints.max_gflops)
        decision = Decision(
            variant.profile, preview.batch_size, predicted_s, reason.code, sentence, variant.second_look
        )
        return Forecast(decision, preview.starts_in_s + predicted_s + self._reply.mean_s)

    async def _answer(self, read: Read, request: InferenceRequest, reserved: QueuedRequest | None) -> Classification:
        top_k = self._checked_top_k(request.top_k)
        queued = reserved or self._reserve(request)
        most_gflops = most_gflops_of(queued.constraints, self._scheduler.catalog)
        try:
            with self._ledger.charging(request.key, most_gflops, self._clock()) as charge:
                image = await read(queued.deadline_at - self._clock())
                self.check_room()
                read_at = self._clock()
                if read_at >= queued.deadline_at:
                    raise DeadlineError("the deadline passed before the body arrived")
                # Only now: bodies that arrive slowly would hold every slot, and be planned with as if complete.
                if not self._scheduler.claim(queued, read_at):
                    self._scheduler.admit(queued, read_at, self._delay(read_at, queued))
                charge.may_have_spent = True
                decoding = self._decoder.submit(image, queued.deadline_at, queued.priority, request.address)
                del image  # as large as a body may be, and not needed once it is decoded
                self._slots_taken += 1
                try:
                    result = await self._batcher.submit(decoding, queued)
                finally:
                    self._slots_taken -= 1
                    self._decoder.release(decoding)
                charge.spent_gflops = result.spent_macs / 1e9
        finally:
            self._scheduler.withdraw(queued)
        predictions = predictions_of(result, self.checkpoint.class_names, top_k)
        now, decoded, inference_s = self._clock(), decoding.result(), sum(look.inference_s for look in result.looks)
        if not result.second_look_cancelled:
            asyncio.get_running_loop().call_soon(self._replied, result.ended_at)
        until = now if result.second_look_cancelled else result.ended_at
        timing = Timing(
            read_s=read_at - request.arrived_at,
            decode_wait_s=decoded.waited_s,
            decode_s=decoded.seconds,
            queue_s=until - read_at - decoded.waited_s - decoded.seconds - inference_s,
            inference_s=inference_s,
            total_s=now - request.arrived_at,
        )
        budget_s, catalog = self._budget_s(request), self._scheduler.catalog
        answer = classification_of(result, queued.constraints, catalog, predictions, timing, budget_s)
        if not answer.deadline_met:
            self._scheduler.deadline_missed(now)
        return answer

    def _replied(self, ended_at: float) -> None:
        """Measure the time of a reply, one turn of the event loop later: uvloop writes at the end of a turn."""
        now = self._clock()
        self._reply.observe(now - ended_at, now)

    def _reserve(self, request: InferenceRequest) -> QueuedRequest:
        self.check_room()
        if request.key is not None:
            self._ledger.asked(request.key, self._clock())
        queued, now = self._queued(request), self._clock()
        self._scheduler.reserve(queued, now, self._delay(now, queued))
        return queued

    def _delay(self, now: float, queued: QueuedRequest) -> PreprocessingDelay:
        """Predict how long a new request takes until it is ready for the engine.

        Each request served before it has half of its event-loop time to come, and each still to be read the other half.
        Requests served later wait for a decoder or the engine meanwhile.
        """
        queue_s = self._decoder.queue_s(now, queued.deadline_at, queued.priority)
        loop_s = sum(self._scheduler.num_before(queued, now)) / 2 * self._loop_cost.mean_s
        return PreprocessingDelay(self._base_s(now), loop_s, queue_s)

    def _base_s(self, now: float) -> float:
        return self._decoder.expected_s(now) + self._loop_cost.mean_s / 2

    def _queued(self, request: InferenceRequest) -> QueuedRequest:
        """Translate what the client asks for into what the policy works with.

        Raises:
            BudgetTooSmallError: no sub-network fits the budget, or none is that fast even on an idle machine.
            DeadlineError: none is that fast even on an idle machine, and the client waits no longer.
            InvalidParameterError: the model lacks the sub-network requested by name, or the priority is too high.
            OverloadedError: its key has used up its rate of work.
        """
        catalog, now, seen_s = self._scheduler.catalog, self._clock(), self._usable_budget_s(request)
        granted_s = seen_s - self._reply.margin_s(now)
        constraints = allow(request, catalog, self._ledger, now, granted_s)
        fastest_s = catalog.variants[target(constraints, 0)].latency_by_batch_s[0]
        if not seen_s >= fastest_s:  # in this form NaN is rejected, too
            needed_s = fastest_s + self._base_s(now) + self._reply.margin_s(now)
            smallest_s = min(needed_s / (1 - TRANSPORT_SHARE), needed_s + TRANSPORT_S)
            budget_s, fastest_ms = self._budget_s(request), 1000 * fastest_s
            message = f"a budget of {1000 * budget_s:.6g} ms is too small: even on an idle machine inference takes "
            message += f"{fastest_ms:.3g} ms, and network and decoding take some more"
            if budget_s == request.client_waits_s:
                raise DeadlineError(message)
            raise BudgetTooSmallError(message, smallest_budget_ms=math.ceil(1e6 * smallest_s) / 1000)
        priority: float = allow_priority(request)
        if request.key is not None:
            priority -= self._ledger.demotion(request.key, now)
        return QueuedRequest(request.arrived_at + granted_s, constraints, priority)

    def _budget_s(self, request: InferenceRequest) -> float:
        budget_s = allow_time_ms(request, self._default_budget_ms) / 1000
        return budget_s if request.client_waits_s is None else min(budget_s, request.client_waits_s)

    def _usable_budget_s(self, request: InferenceRequest) -> float:
        """Return the part of the budget that this server can use, in seconds.

        The client's clock started before the request was stamped, and it stops after the answer has left.
        """
        budget_s = self._budget_s(request)
        return budget_s - min(TRANSPORT_S, TRANSPORT_SHARE * budget_s)

    def _checked_top_k(self, top_k: int | None) -> int:
        num_classes = len(self.checkpoint.class_names)
        if top_k is None:
            return min(DEFAULT_TOP_K, num_classes)
        if top_k > num_classes:
            raise InvalidParameterError(f"top_k: this model has only {num_classes} classes", parameter="top_k")
        return top_k
