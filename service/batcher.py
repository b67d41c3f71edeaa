"""The dispatch loop: whenever the engine is free, asks the line what to run, runs it, and releases those who waited."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.subnetwork import SubNetwork
from service.errors import DeadlineError, ModelError, NotReadyError, OverloadedError, ServiceError
from service.line import Line
from service.menu import Option
from service.pacer import Pacer
from service.situation import Choice, Entry

logger = logging.getLogger(__name__)

DELAY_GAIN = 0.1
DELAY_FADES_S = 0.25

Run = Callable[[Tensor, SubNetwork], Tensor]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Result:
    """What the engine answered to one request.

    Attributes:
        logits: (classes,).
        option: what ran.
        choice: the whole decision, its reason included.
        batch_size: images that ran together.
        queue_s: waiting for the engine.
        predicted_s: what the batch was expected to take.
        inference_s: what it took.
        ended_at: when, on the monotonic clock.
    """

    logits: Logits
    option: Option
    choice: Choice
    batch_size: int
    queue_s: float
    predicted_s: float
    inference_s: float
    ended_at: float


@dataclass(slots=True)
class Delay:
    """A delay that varies: its mean and its mean deviation, of late.

    Without news what is expected fades, or a server that refuses everybody for its sake would never learn better.
    """

    fades_s: float = DELAY_FADES_S
    mean_s: float = 0.0
    _deviation_s: float = 0.0
    _seen_at: float = 0.0

    def observe(self, seconds: float, now: float) -> None:
        """Learn from one."""
        surprise = seconds - self.mean_s
        self.mean_s += DELAY_GAIN * surprise
        self._deviation_s += DELAY_GAIN * (abs(surprise) - self._deviation_s)
        self._seen_at = now

    def expected_s(self, now: float) -> float:
        """How long it will probably be."""
        return self.mean_s * self._freshness(now)

    def margin_s(self, now: float) -> float:
        """Time to allow for it, its spread included."""
        return (self.mean_s + 2 * self._deviation_s) * self._freshness(now)

    def _freshness(self, now: float) -> float:
        return math.exp(min(0.0, self._seen_at - now) / self.fades_s)


@dataclass(frozen=True, slots=True)
class _Waiting:
    entry: Entry
    image: Tensor
    entered_at: float
    result: "asyncio.Future[Result]"


class Batcher:
    """Runs what the line decides, a batch at a time."""

    def __init__(
        self,
        run: Run,
        line: Line,
        thread: Executor,
        *,
        pacer: Pacer | None = None,
        observe_machine: Callable[[], None] = lambda: None,
        observe_batch: Callable[[int, float, float], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the collaborators.

        Args:
            run: the engine's.
            line: decides whom to run, and how.
            thread: the engine's own; `run` is called there.
            pacer: holds batches back for the sake of a ceiling.
            observe_machine: called before each decision, to tell the line of the machine's state.
            observe_batch: told of each batch that ran: its size, its predicted and its real seconds.
            clock: monotonic, in seconds; the one that deadlines are on.
        """
        self._run = run
        self._line = line
        self._pacer = pacer or Pacer(None, None)
        self._observe_machine = observe_machine
        self._observe_batch = observe_batch
        self._clock = clock
        self.lag = Delay()  # of the event loop: from the end of a batch until the loop turns to it
        self._waiting: dict[Entry, _Waiting] = {}
        self._arrival = asyncio.Event()
        self._thread = thread
        self._stopping = False

    async def submit(self, image: Tensor, entry: Entry) -> Result:
        """Wait in line with a (3, S, S) uint8 image, for an entry that the line has admitted, and return its result.

        Cancelling it takes the request out of the line.

        Raises:
            DeadlineError: it can no longer be answered in time.
            OverloadedError: it was given up for the sake of others.
            ModelError: the model failed on this image.
            NotReadyError: the batcher is stopping.
        """
        if self._stopping:
            raise NotReadyError("the server is stopping")
        waiting = _Waiting(entry, image, self._clock(), asyncio.get_running_loop().create_future())
        self._waiting[entry] = waiting
        self._line.enter(entry)
        self._arrival.set()
        try:
            return await waiting.result
        finally:
            self._waiting.pop(entry, None)
            self._line.leave(entry)

    async def serve(self) -> None:
        """Run batches until `stop` is called and the line is empty."""
        while len(self._line) or not self._stopping:
            if not len(self._line):
                self._arrival.clear()
                await self._arrival.wait()
            elif pause_s := self._pacer.pause_s(self._clock()):
                await asyncio.sleep(pause_s)
            else:
                await self._serve_batch()

    def stop(self) -> None:
        """Admit nobody any more; those in line are still answered."""
        self._stopping = True
        self._arrival.set()

    async def _serve_batch(self) -> None:
        self._observe_machine()
        self._line.stretch = self._pacer.stretch
        choice = self._line.next_batch(self._clock())
        for entry in choice.late:
            self._settle(entry, DeadlineError("the deadline cannot be met any more"))
        for entry in choice.shed:
            message = "given up so that others can be answered in time; try again later"
            self._settle(entry, OverloadedError(message, retry_after_s=round(self._line.backlog_s(self._clock()), 3)))
        if choice.option is not None:
            await self._run_batch(choice, choice.option, [self._waiting[entry] for entry in choice.batch])

    async def _run_batch(self, choice: Choice, index: int, batch: Sequence[_Waiting]) -> None:
        option = self._line.menu.options[index]
        predicted_s = self._line.predict(index, len(batch), self._clock())
        started_at = self._clock()
        try:
            images = torch.stack([waiting.image for waiting in batch])
            loop = asyncio.get_running_loop()
            logits, inference_s, ended_at = await loop.run_in_executor(
                self._thread, self._timed_run, images, option.row.subnetwork
            )
            answered = list(zip(batch, logits.numpy(), strict=True))
        except Exception:  # whatever the model raises, its requests must be released and the next batch run
            self._line.failed(self._clock())
            await self._run_apart(choice, index, batch)
            return
        self._line.finished(index, len(batch), inference_s, self._clock())
        self.lag.observe(self._clock() - ended_at, self._clock())
        self._pacer.batch_ran(inference_s)
        self._observe_batch(len(batch), predicted_s, inference_s)
        for waiting, row in answered:
            queue_s = started_at - waiting.entered_at
            result = Result(row, option, choice, len(batch), queue_s, predicted_s, inference_s, ended_at)
            self._settle(waiting.entry, result)

    def _timed_run(self, images: Tensor, subnetwork: SubNetwork) -> tuple[Tensor, float, float]:
        """Run a batch; returns its logits, its seconds and when it ended, before the event loop hears of it."""
        started_at = self._clock()
        logits = self._run(images, subnetwork)
        ended_at = self._clock()
        return logits, ended_at - started_at, ended_at

    async def _run_apart(self, choice: Choice, index: int, batch: Sequence[_Waiting]) -> None:
        """Run the halves of a batch that failed, until the request that poisons it stands alone."""
        if len(batch) == 1:
            logger.exception("the model failed on an image at %s", self._line.menu.options[index].row.subnetwork)
            self._settle(batch[0].entry, ModelError("the model failed on this image; the server's log says why"))
            return
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            still_here = [waiting for waiting in half if waiting.entry in self._waiting]
            if still_here:
                await self._run_batch(choice, index, still_here)

    def _settle(self, entry: Entry, outcome: Result | ServiceError) -> None:
        waiting = self._waiting.get(entry)
        if waiting is None:
            return  # its client has left meanwhile
        with contextlib.suppress(asyncio.InvalidStateError):
            if isinstance(outcome, ServiceError):
                waiting.result.set_exception(outcome)
            else:
                waiting.result.set_result(outcome)
