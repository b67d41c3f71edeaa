"""The walk of one request: admit, read, decode, wait, infer, answer. HTTP is above, every stage below."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable

from service.batcher import Batcher
from service.decoding import Decoder
from service.domain import DEFAULT_TOP_K, Classification, Decision, Forecast, InferenceRequest, Prediction, Timing
from service.errors import (
    BudgetTooSmallError,
    ClientGoneError,
    InvalidParameterError,
    ModelError,
    NotReadyError,
    OverloadedError,
    ServiceError,
)
from service.estimates import Delay
from service.line import Line
from service.metrics import Metrics
from service.reasons import explain
from service.results import Result
from service.situation import Entry, Preparation, Wish, target

logger = logging.getLogger(__name__)

Read = Callable[[float], Awaitable[bytes]]

GONE = "the client has gone"

# What the sockets and the client take of a budget before the request is stamped and after it is answered.
TRANSPORT_S = 0.003
TRANSPORT_SHARE = 0.1  # at most, of tight budgets
LEARNED_EVERY = 32  # requests; it takes a system call
LEARNING_GAIN = 0.5


class Pipeline:
    """Takes requests to answers, and counts both."""

    def __init__(
        self,
        *,
        line: Line,
        class_names: tuple[str, ...],
        decoder: Decoder,
        batcher: Batcher,
        metrics: Metrics,
        max_in_flight: int,
        default_budget_ms: float,
        clock: Callable[[], float] = time.monotonic,
        loop_time: Callable[[], float] = time.thread_time,
    ) -> None:
        """Take the collaborators.

        Args:
            line: admits, and forecasts.
            class_names: one per logit.
            decoder: makes what the batcher's threads decode images by.
            batcher: runs the model.
            metrics: count and time.
            max_in_flight: requests that may be in the pipeline at once.
            default_budget_ms: granted to a request that names none.
            clock: monotonic, in seconds; the one that stamped `arrived_at`.
            loop_time: CPU seconds of the event loop's thread.
        """
        self.is_ready = False
        self._line = line
        self._class_names = class_names
        self._decoder = decoder
        self._batcher = batcher
        self._metrics = metrics
        self._max_in_flight = max_in_flight
        self._default_budget_ms = default_budget_ms
        self._clock = clock
        self._loop_time = loop_time
        self._in_flight = 0
        self._loop_s = 0.0  # of the event loop's CPU time per request, learned
        self._loop_used_s = self._idle_since_s = loop_time()
        self._unlearned = 0  # requests that have ended since
        self._reply = Delay()  # from the end of a batch to the finished answer

    def ready(self) -> None:
        """From now on requests are answered."""
        self.is_ready = True
        self._metrics.ready(True)

    def drain(self) -> None:
        """Refuse newcomers from now on; those admitted are still answered.

        A signal handler calls it, maybe in the middle of a count that holds the lock of all counts: it counts nothing.
        """
        self.is_ready = False

    async def classify(self, read: Read, request: InferenceRequest) -> Classification:
        """Answer one request.

        Args:
            read: yields the image's bytes, if they arrive within so many seconds; called once the request is admitted.
            request: what the client asks for.

        Raises:
            ServiceError: the request is refused, or fails.

        Cancelling it takes the request out of whatever line it stands in: with the message GONE where its client has
        left.
        """
        if self._in_flight == 0:  # what the loop has used since there was anybody is nobody's
            self._loop_used_s += self._loop_time() - self._idle_since_s
        self._in_flight += 1
        self._metrics.request_started()
        outcome, shed, is_missed = ServiceError.code, None, False  # of a bug, unless something better is known
        try:
            answer = await self._answer(read, request)
            outcome = "ok"
        except OverloadedError as error:
            outcome, shed = error.code, error.reason
            raise
        except ServiceError as error:
            outcome = error.code
            raise
        except asyncio.CancelledError as error:
            if GONE in error.args:  # or the drain is over, and the HTTP server cuts off whoever is left
                outcome = ClientGoneError.code
                now = self._clock()
                is_missed = now - request.arrived_at > self._seen_s(request)
                if is_missed:  # it left because of that, and had not left had it been answered in time
                    self._line.answered_late(now)
            raise
        finally:
            self._in_flight -= 1
            self._learn_loop_cost()
            if self._in_flight == 0:
                self._idle_since_s = self._loop_time()
            self._metrics.request_finished(outcome, shed, is_missed=is_missed)
        self._metrics.answered(answer)
        return answer

    def decide(self, request: InferenceRequest) -> Forecast:
        """Tell what would be chosen for a request that arrived now, without running anything.

        Raises:
            ServiceError: the request would be refused.
        """
        self._require_ready()
        entry = self._entry(request)
        now = self._clock()
        preparation = self._preparation(now)
        option, size, start_s, choice = self._line.preview(entry, now, preparation)
        predicted_s = self._line.predict(option, size, now)
        row = self._line.menu.options[option].row
        reason = explain(self._line.menu, entry.wish, request.budget_gflops, option, choice)
        answered_in_s = start_s + predicted_s + self._reply.mean_s
        return Forecast(Decision(row, size, predicted_s, reason), answered_in_s)

    async def _answer(self, read: Read, request: InferenceRequest) -> Classification:
        self._require_ready()
        if self._in_flight > self._max_in_flight:
            message = f"{self._max_in_flight} requests are in the server already; try again later"
            raise OverloadedError(message, "full", self._line.backlog_s(self._clock()))
        top_k = self._checked_top_k(request.top_k)
        entry = self._entry(request)
        now = self._clock()
        self._line.admit(entry, now, self._preparation(now))
        decoding = self._decoder.prepare(entry.deadline_at)
        try:
            data = await read(entry.deadline_at - now)
            read_at = self._clock()
            result = await self._batcher.submit(decoding.submitted(data), entry)
        finally:
            self._line.leave(entry)
            self._decoder.over(decoding)
        predictions = self._predictions(result, top_k)
        now, decode_s = self._clock(), decoding.seconds or 0.0
        self._reply.observe(now - result.ended_at, now)
        queue_s = result.started_at - read_at - decode_s
        timing = Timing(decode_s, queue_s, result.inference_s, now - request.arrived_at)
        answer = self._classification(predictions, request, entry.wish, result, timing)
        if not answer.deadline_met:
            self._line.answered_late(now)
        return answer

    def _preparation(self, now: float) -> Preparation:
        """Foretell what a newcomer has before it; those in the server have half of their loop time to come."""
        others = max(0, self._in_flight - 1)
        return Preparation(
            self._decoder.expected_s(now) + self._loop_s / 2, others * self._loop_s / 2, self._decoder.queue_s(now)
        )

    def _learn_loop_cost(self) -> None:
        """Learn how much of the event loop's CPU time a request takes.

        Refused ones count as well: were their cost put on those answered, a server that refuses many would soon refuse
        everybody and never learn better.
        """
        self._unlearned += 1
        if self._unlearned < LEARNED_EVERY:
            return
        used_s = self._loop_time()
        self._loop_s += LEARNING_GAIN * ((used_s - self._loop_used_s) / self._unlearned - self._loop_s)
        self._loop_used_s, self._unlearned = used_s, 0

    def _require_ready(self) -> None:
        if not self.is_ready:
            raise NotReadyError("the server is not ready yet, or is stopping; try again in a moment")

    def _entry(self, request: InferenceRequest) -> Entry:
        """Translate what the client asks for into what the policy works with.

        Raises:
            BudgetTooSmallError: no sub-network fits the budget, or none is that fast even on an idle machine.
            InvalidParameterError: the sub-network asked for by name is none of the model's.
        """
        menu, now, seen_s = self._line.menu, self._clock(), self._seen_s(request)
        granted_s = seen_s - self._reply.margin_s(now)
        if request.subnetwork is None:
            limit, beyond = menu.best_within(request.budget_gflops)
            wish = Wish(granted_s, limit, beyond=beyond)
        else:
            wish = Wish(granted_s, 0, menu.index_of(request.subnetwork, request.budget_gflops))
        fastest_s = menu.options[target(wish, 0)].seconds[0]
        if not seen_s >= fastest_s:  # so that no NaN passes
            needed_s = fastest_s + self._preparation(now).alone_s + self._reply.margin_s(now)
            smallest_s = min(needed_s / (1 - TRANSPORT_SHARE), needed_s + TRANSPORT_S)
            raise BudgetTooSmallError(
                f"a budget of {1000 * self._budget_s(request):.6g} ms is too small: even on the idle machine inference "
                f"takes {1000 * fastest_s:.3g} ms, and sockets and images some more",
                smallest_budget_ms=math.ceil(1e6 * smallest_s) / 1000,
            )
        return Entry(request.arrived_at + granted_s, wish, request.priority)

    def _budget_s(self, request: InferenceRequest) -> float:
        return (self._default_budget_ms if request.budget_ms is None else request.budget_ms) / 1000

    def _seen_s(self, request: InferenceRequest) -> float:
        """What of the budget is this server's to use.

        The request had waited for the event loop before it was stamped, and its answer will wait for it once more.
        """
        budget_s = self._budget_s(request)
        return budget_s - min(TRANSPORT_S, TRANSPORT_SHARE * budget_s)

    def _classification(
        self,
        predictions: tuple[Prediction, ...],
        request: InferenceRequest,
        wish: Wish,
        result: Result,
        timing: Timing,
    ) -> Classification:
        menu, row = self._line.menu, result.option.row
        best = menu.best.row
        reason = explain(menu, wish, request.budget_gflops, result.choice.option or 0, result.choice)
        return Classification(
            predictions,
            Decision(row, result.batch_size, result.predicted_s, reason),
            timing,
            budget_s=self._budget_s(request),
            # One between the trained ones that was asked for by name may have measured better.
            given_up=None if best.top1 is None or row.top1 is None else max(0.0, best.top1 - row.top1),
            saved_gflops=max(0.0, best.gflops - row.gflops),
        )

    def _checked_top_k(self, top_k: int | None) -> int:
        num_classes = len(self._class_names)
        if top_k is None:
            return min(DEFAULT_TOP_K, num_classes)
        if top_k > num_classes:
            message = f"top_k: this model has {num_classes} classes, fewer than {top_k}"
            raise InvalidParameterError(message, parameter="top_k")
        return top_k

    def _predictions(self, result: Result, top_k: int) -> tuple[Prediction, ...]:
        best = result.ranking[:top_k]
        probabilities = result.probabilities[best].tolist()
        if not math.isfinite(probabilities[0]):  # one logit that is none makes the sum none, and so all of them
            logger.error("the model answered an image with %s", result.logits.tolist()[:top_k])
            raise ModelError("the model's answer to this image is not a number")
        return tuple(
            Prediction(index, self._class_names[index], probability)
            for index, probability in zip(best.tolist(), probabilities, strict=True)
        )
