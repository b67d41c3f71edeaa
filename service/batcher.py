"""The waiting line before the engine: first come, first served, together with all who want the same sub-network."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from models.subnetwork import SubNetwork
from service.errors import ModelError, NotReadyError

logger = logging.getLogger(__name__)

Run = Callable[[Tensor, SubNetwork], Tensor]


@dataclass(frozen=True, slots=True)
class Result:
    """What the engine answered to one request: (classes,) logits, and how it came about."""

    logits: Tensor
    queue_s: float
    inference_s: float


@dataclass(frozen=True, slots=True)
class _Waiting:
    image: Tensor
    subnetwork: SubNetwork
    entered_at: float
    result: "asyncio.Future[Result]"


class Batcher:
    """Runs whatever waits, a batch at a time, on one thread of its own."""

    def __init__(
        self,
        run: Run,
        max_batch_size: int,
        observe_size: Callable[[int], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the collaborators.

        Args:
            run: the engine's; called on the batcher's own thread.
            max_batch_size: most images that it is given at once.
            observe_size: told the number of images of each batch that ran.
            clock: monotonic, in seconds.
        """
        self._run = run
        self._max_batch_size = max_batch_size
        self._observe_size = observe_size
        self._clock = clock
        self._line: deque[_Waiting] = deque()
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "engine")
        self._stopping = False

    async def submit(self, image: Tensor, subnetwork: SubNetwork) -> Result:
        """Wait in line with a (3, S, S) uint8 image and return its result.

        Raises:
            ModelError: the model failed on the batch.
            NotReadyError: the batcher is stopping.
        """
        if self._stopping:
            raise NotReadyError("the server is stopping")
        waiting = _Waiting(image, subnetwork, self._clock(), asyncio.get_running_loop().create_future())
        self._line.append(waiting)
        self._arrival.set()
        return await waiting.result

    async def serve(self) -> None:
        """Run batches until `stop` is called and the line is empty."""
        while self._line or not self._stopping:
            batch = self._take_batch()
            if batch:
                await self._run_batch(batch)
            elif not self._stopping:
                self._arrival.clear()
                await self._arrival.wait()
        self._thread.shutdown()

    def stop(self) -> None:
        """Admit nobody any more; those in line are still answered."""
        self._stopping = True
        self._arrival.set()

    async def call(self, function: Callable[[], None]) -> None:
        """Call `function` on the engine's thread."""
        await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _take_batch(self) -> list[_Waiting]:
        """Take the head of the line and, from behind it, who wants the same sub-network; forget who has left."""
        line = [waiting for waiting in self._line if not waiting.result.done()]
        batch = [waiting for waiting in line if waiting.subnetwork == line[0].subnetwork][: self._max_batch_size]
        taken = set(map(id, batch))
        self._line = deque(waiting for waiting in line if id(waiting) not in taken)
        return batch

    async def _run_batch(self, batch: list[_Waiting]) -> None:
        started_at = self._clock()
        subnetwork = batch[0].subnetwork
        try:
            images = torch.stack([waiting.image for waiting in batch])
            logits = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, images, subnetwork)
            answered = list(zip(batch, logits.unbind(0), strict=True))
        except Exception:  # whatever the model raises, its requests must be released and the next batch run
            logger.exception("a batch of %d failed at %s", len(batch), subnetwork)
            for waiting in batch:
                _settle(waiting, ModelError("the model failed on this batch; the server's log says why"))
            return
        inference_s = self._clock() - started_at
        self._observe_size(len(batch))
        for waiting, row in answered:
            _settle(waiting, Result(row, started_at - waiting.entered_at, inference_s))


def _settle(waiting: _Waiting, outcome: Result | ModelError) -> None:
    with contextlib.suppress(asyncio.InvalidStateError):  # its client has left meanwhile
        if isinstance(outcome, Result):
            waiting.result.set_result(outcome)
        else:
            waiting.result.set_exception(outcome)
