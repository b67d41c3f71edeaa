"""The walk of one request: admit, choose, read, decode, wait, infer, answer. HTTP is above, every stage below."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor

import torch
from torch import Tensor

from models.profiles import ProfileTable
from service.batcher import Batcher
from service.domain import DEFAULT_TOP_K, Classification, InferenceRequest, Prediction, Timing
from service.errors import (
    ClientGoneError,
    InvalidParameterError,
    ModelError,
    NotReadyError,
    OverloadedError,
    ServiceError,
)
from service.metrics import Metrics
from service.policy import choose

logger = logging.getLogger(__name__)


class Pipeline:
    """Takes requests to answers, and counts both."""

    def __init__(
        self,
        *,
        profiles: ProfileTable,
        class_names: tuple[str, ...],
        decode: Callable[[bytes], Tensor],
        decode_threads: Executor,
        batcher: Batcher,
        metrics: Metrics,
        max_waiting: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the collaborators.

        Args:
            profiles: what the policy chooses from.
            class_names: one per logit.
            decode: bytes to a (3, S, S) uint8 image; runs on `decode_threads`.
            decode_threads: keep the event loop free.
            batcher: runs the model.
            metrics: count and time.
            max_waiting: requests that may be in the pipeline at once.
            clock: monotonic, in seconds; the one that stamped `arrived_at`.
        """
        self.is_ready = False
        self._profiles = profiles
        self._class_names = class_names
        self._decode = decode
        self._decode_threads = decode_threads
        self._batcher = batcher
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._clock = clock
        self._in_flight = 0

    async def warm_up(self, warm_up: Callable[[], None]) -> None:
        """Run `warm_up` where batches run; from then on requests are answered."""
        await self._batcher.call(warm_up)
        self.is_ready = True
        self._metrics.ready()

    async def classify(self, read: Callable[[], Awaitable[bytes]], request: InferenceRequest) -> Classification:
        """Answer one request.

        Args:
            read: yields the image's bytes; called once the request is admitted.
            request: what the client asks for.

        Raises:
            ServiceError: the request is refused, or fails.

        Cancelling it, because nobody waits any more, takes the request out of whatever line it stands in.
        """
        self._in_flight += 1
        self._metrics.request_started()
        outcome = ServiceError.code  # of a bug, unless something better is known
        try:
            answer = await self._answer(read, request)
            outcome = "ok"
        except ServiceError as error:
            outcome = error.code
            raise
        except asyncio.CancelledError:
            outcome = ClientGoneError.code
            raise
        finally:
            self._in_flight -= 1
            self._metrics.request_finished(outcome)
        self._metrics.answered(answer)
        return answer

    async def _answer(self, read: Callable[[], Awaitable[bytes]], request: InferenceRequest) -> Classification:
        self._admit()
        top_k = self._checked_top_k(request.top_k)
        decision = choose(request, self._profiles)
        data = await read()
        read_at = self._clock()
        decoding = asyncio.get_running_loop().run_in_executor(self._decode_threads, self._timed_decode, data)
        image, decode_started_at, decoded_at = await decoding
        result = await self._batcher.submit(image, decision.profile.subnetwork)
        predictions = self._predict(result.logits, top_k)
        timing = Timing(
            decode_s=decoded_at - decode_started_at,
            queue_s=decode_started_at - read_at + result.queue_s,
            inference_s=result.inference_s,
            total_s=self._clock() - request.arrived_at,
        )
        return Classification(predictions, decision, timing)

    def _timed_decode(self, data: bytes) -> tuple[Tensor, float, float]:
        started_at = self._clock()
        return self._decode(data), started_at, self._clock()

    def _admit(self) -> None:
        if not self.is_ready:
            raise NotReadyError("the model is not ready yet; try again in a moment")
        if self._in_flight > self._max_waiting:
            raise OverloadedError(f"{self._max_waiting} requests are waiting already; try again later")

    def _checked_top_k(self, top_k: int | None) -> int:
        num_classes = len(self._class_names)
        if top_k is None:
            return min(DEFAULT_TOP_K, num_classes)
        if top_k > num_classes:
            message = f"top_k: this model has {num_classes} classes, fewer than {top_k}"
            raise InvalidParameterError(message, parameter="top_k")
        return top_k

    def _predict(self, logits: Tensor, top_k: int) -> tuple[Prediction, ...]:
        probabilities = logits.softmax(dim=0)
        if not torch.isfinite(probabilities).all():
            logger.error("the model answered an image with %s", logits.tolist()[:top_k])
            raise ModelError("the model's answer to this image is not a number")
        best = probabilities.topk(top_k)
        return tuple(
            Prediction(index, self._class_names[index], probability)
            for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
