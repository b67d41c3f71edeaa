"""The walk of one request: admit, read, decode, wait, infer, answer. HTTP is above, every stage below."""

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
from service.domain import DEFAULT_TOP_K, Classification, Decision, Forecast, InferenceRequest, PlannedLook, Timing
from service.errors import (
    BudgetTooSmallError,
    ClientGoneError,
    DeadlineError,
    InvalidParameterError,
    OverloadedError,
    OverloadReason,
)
from service.execution.batcher import Batcher
from service.grants import allow, allow_priority, allow_time_ms
from service.scheduling.estimators import Delay, LoopCost
from service.scheduling.key_ledger import KeyLedger
from service.scheduling.reasons import explain, reason_of
from service.scheduling.scheduler import Scheduler
from service.scheduling.state import PreprocessingDelay, QueuedRequest, target

Image = bytes | OpenedImage  # encoded, or ready to be made pixels of
Read = Callable[[float], Awaitable[Image]]

# What the sockets and the client take of a budget before the request is stamped and after it is answered.
TRANSPORT_S = 0.003
TRANSPORT_SHARE = 0.1  # at most, of tight budgets


class Pipeline:
    """Takes requests to answers.

    Attributes:
        checkpoint: that answers.
        num_at_work: requests that it has not done with.
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
        """Take the collaborators.

        Args:
            scheduler: admits, and previews.
            checkpoint: that the batcher runs.
            decoder: makes images of bytes.
            batcher: runs the model.
            max_in_flight: requests whose bodies are there that may be in the pipeline at once.
            default_budget_ms: granted to a request that names none.
            ledger: of what the holders of keys have had.
            clock: monotonic, in seconds; the one that stamped `arrived_at`.
            loop_time: CPU seconds of the event loop's thread.
        """
        self.checkpoint, self.num_at_work = checkpoint, 0
        self._slots_taken = 0  # by requests whose bodies are there
        self._scheduler, self._decoder, self._batcher = scheduler, decoder, batcher
        self._max_in_flight, self._default_budget_ms = max_in_flight, default_budget_ms
        self._ledger, self._clock = ledger, clock
        # What the event loop takes of a request, and what goes by from the end of a batch to the finished answer.
        self._loop_cost, self._reply = LoopCost(loop_time), Delay()

    def take_over(self, other: "Pipeline") -> None:
        """Go on from what another one has learned, and learn of the event loop together, which is the same."""
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
            read: yields the image, if it arrives within so many seconds; called once it has a place.
            request: what the client asks for.
            watch: raises a ClientGoneError out of its block once the client has left.
            reserved: what `reserve` returned for it, where that was called already.

        Raises:
            ServiceError: the request is rejected, or fails.

        Cancelling it takes the request out of whatever queue it stands in.
        """
        self.num_at_work += 1
        try:
            with self._loop_cost.counting(), watch or nullcontext():
                return await self._answer(read, request, reserved)
        except ClientGoneError as error:
            now = self._clock()
            if now - request.arrived_at <= self._seen_s(request):
                raise
            self._scheduler.deadline_missed(now)  # it left because of that, and had not left had it been answered
            raise ClientGoneError(error.message, deadline_passed=True) from None
        finally:
            self.num_at_work -= 1

    def reserve(self, request: InferenceRequest) -> QueuedRequest | None:
        """Reject a request before its body is read, or keep a place for it for a moment, which `classify` takes.

        No place is kept where its key has a rate of work: what is left of that may be another's by then.

        Raises:
            ServiceError: it is rejected, or asks for what there is not.
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
        """Take note that one more request was rejected for the same reason."""
        self._scheduler.rejected(reason, self._clock())
        self._loop_cost.rejected()

    def check_room(self) -> None:
        """See whether one more request may be in the pipeline.

        Raises:
            OverloadedError: it may not.
        """
        if self._slots_taken >= self._max_in_flight:
            message = f"{self._max_in_flight} requests are in the server already; try again later"
            raise OverloadedError(message, "full", self._scheduler.backlog_s(self._clock()))

    def check(self, request: InferenceRequest) -> None:
        """See whether there is what a request asks for; one that names no time may still be granted any.

        Raises:
            ServiceError: there is not, whatever its body holds.
        """
        self._checked_top_k(request.top_k)
        self._queued(request if request.budget_ms is not None else replace(request, budget_ms=math.inf))

    def time_left_s(self, request: InferenceRequest) -> float:
        """Tell how much of a request's budget is left for its body to arrive."""
        return request.arrived_at + self._seen_s(request) - self._clock()

    def decide(self, request: InferenceRequest) -> Forecast:
        """Tell what would be chosen for a request that arrived now, without running anything.

        Raises:
            ServiceError: the request would be rejected.
        """
        queued, now = self._queued(request), self._clock()
        preview = self._scheduler.preview(queued, now, self._delay(now, queued))
        variant, constraints = preview.variant, queued.constraints
        predicted_s = self._scheduler.predict(variant, preview.batch_size, now)
        reason = reason_of(constraints, variant, preview.decision)
        sentence = explain(reason, self._scheduler.catalog, variant, constraints.max_gflops)
        second = variant.second_look
        planned = None if second is None else PlannedLook(second.profile, second.threshold, second.share)
        decision = Decision(variant.profile, preview.batch_size, predicted_s, reason.code, sentence, planned)
        return Forecast(decision, preview.starts_in_s + predicted_s + self._reply.mean_s)

    async def _answer(self, read: Read, request: InferenceRequest, reserved: QueuedRequest | None) -> Classification:
        top_k = self._checked_top_k(request.top_k)
        queued = reserved or self._reserve(request)
        most_gflops = queued.constraints.grant.best.most_gflops
        try:
            with self._ledger.charging(request.key, most_gflops, self._clock()) as charge:
                image = await read(queued.deadline_at - self._clock())
                self.check_room()
                read_at = self._clock()
                if read_at >= queued.deadline_at:
                    raise DeadlineError("the deadline passed before the body had come")
                # Not before: bodies that drip in would hold every slot, and be reckoned with as if they came.
                if not self._scheduler.claim(queued, read_at):
                    self._scheduler.admit(queued, read_at, self._delay(read_at, queued))
                charge.may_have_spent = True
                decoding = self._decoder.submit(image, queued.deadline_at, queued.priority, request.address)
                del image  # up to the limit of bodies, and of no use once it is decoded
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
        if not result.waited_in_vain:
            asyncio.get_running_loop().call_soon(self._replied, result.ended_at)
        until = now if result.waited_in_vain else result.ended_at
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
        """Learn what a reply takes, a turn of the event loop later: uvloop writes at the end of a turn."""
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
        """Foretell what a new request has before it.

        Of the event loop's time, what is served before it has half to come, and what is still to be read the other
        half; what is served later waits for a decoder or the engine meanwhile.
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
            InvalidParameterError: the sub-network asked for by name is none of the model's, or its priority too high.
            OverloadedError: its key has used up its rate of work.
        """
        catalog, now, seen_s = self._scheduler.catalog, self._clock(), self._seen_s(request)
        granted_s = seen_s - self._reply.margin_s(now)
        constraints = allow(request, catalog, self._ledger, now).constraints(granted_s, request.min_confidence)
        fastest_s = catalog.variants[target(constraints, 0)].latency_by_batch_s[0]
        if not seen_s >= fastest_s:  # so that no NaN passes
            needed_s = fastest_s + self._base_s(now) + self._reply.margin_s(now)
            smallest_s = min(needed_s / (1 - TRANSPORT_SHARE), needed_s + TRANSPORT_S)
            budget_s, fastest_ms = self._budget_s(request), 1000 * fastest_s
            message = f"a budget of {1000 * budget_s:.6g} ms is too small: even on the idle machine inference takes "
            message += f"{fastest_ms:.3g} ms, and sockets and images some more"
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

    def _seen_s(self, request: InferenceRequest) -> float:
        """What of the budget is this server's to use.

        The request had waited for the event loop before it was stamped, and its answer will wait for it once more.
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
