"""The dispatch loop: whenever the engine is free, asks the line what to run, runs it, and releases those who waited.

It lives on the engine's own thread, so that the engine never waits for an event loop that is busy with sockets. The
threads that prepare images put requests in line; the event loop takes out those whose clients leave.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork
from service.errors import DeadlineError, ModelError, NotReadyError, OverloadedError
from service.line import Line
from service.pacer import Pacer
from service.results import Ranked, Result, rank
from service.situation import Choice, Entry

logger = logging.getLogger(__name__)

# Images in a row on which the model failed, none between: then an image of zeros tells whether it is the images' fault.
FAILURES_IN_A_ROW = 8

Run = Callable[[Tensor, SubNetwork], Tensor]
CallOnLoop = Callable[..., object]
Outcomes = Sequence[tuple[Entry, Result | BaseException]]


@dataclass(slots=True)
class _Waiting:
    result: "asyncio.Future[Result]"
    image: Tensor | None = None


class Batcher:
    """Runs what the line decides, a batch at a time."""

    def __init__(
        self,
        run: Run,
        line: Line,
        thread: Executor,
        preparers: Executor,
        *,
        pacer: Pacer | None = None,
        observe_machine: Callable[[], None] = lambda: None,
        observe_batch: Callable[[int, float, float, float], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the collaborators.

        Args:
            run: the engine's.
            line: decides whom to run, and how.
            thread: the engine's own; the loop lives there, and what it calls is called there.
            preparers: threads on which images are prepared.
            pacer: holds batches back for the sake of a ceiling.
            observe_machine: called before each decision, to tell the line of the machine's state.
            observe_batch: told of each batch that ran: its size, its predicted and its real seconds, and those with the
                pause that follows for the ceiling's sake.
            clock: monotonic, in seconds; the one that deadlines are on.
        """
        self._run = run
        self._line = line
        self._pacer = pacer or Pacer(None, None)
        self._observe_machine = observe_machine
        self._observe_batch = observe_batch
        self._clock = clock
        self._waiting: dict[Entry, _Waiting] = {}
        self._arrival = threading.Event()
        self._thread, self._preparers = thread, preparers
        self._stopping = False
        self._failures_in_a_row = 0
        self._free_at = 0.0  # since when the engine could have run a batch
        self.running: tuple[float, float] | None = None  # when the batch that runs began, and what it should take

    async def submit(self, prepare: Callable[[], Tensor], entry: Entry) -> Result:
        """Prepare an image, wait in line with it, and return its result.

        Cancelling it takes the request out of the line, or away from those who wait for a thread.

        Args:
            prepare: makes the (3, S, S) uint8 image; called on one of the threads for that.
            entry: the line has admitted it.

        Raises:
            DeadlineError: it can no longer be answered in time.
            OverloadedError: it was given up for the sake of others.
            ModelError: the model failed on this image.
            NotReadyError: the batcher is stopping.
            Exception: what `prepare` raises.
        """
        if self._stopping:
            raise NotReadyError("the server is stopping")
        loop = asyncio.get_running_loop()
        preparing = self._preparers.submit(prepare)
        waiting = self._waiting[entry] = _Waiting(loop.create_future())
        preparing.add_done_callback(partial(self._enter, entry, waiting, loop.call_soon_threadsafe))
        # Once prepared, it is the line that finds out.
        deadline = loop.call_later(entry.deadline_at - self._clock(), self._expire, entry, waiting)
        try:
            return await waiting.result
        finally:
            deadline.cancel()
            self._waiting.pop(entry, None)
            preparing.cancel()
            self._line.leave(entry)
            if self._stopping:
                self._arrival.set()  # it may have been the last one

    def _expire(self, entry: Entry, waiting: _Waiting) -> None:
        """Release a request whose image was not prepared by its deadline, maybe because others' take so long."""
        if waiting.image is None:
            self._settle([(entry, DeadlineError("the deadline passed before the image was decoded"))])

    def _enter(self, entry: Entry, waiting: _Waiting, call_on_loop: CallOnLoop, preparing: "Future[Tensor]") -> None:
        """Put a prepared request in line, on the thread that prepared it: the event loop need not hear of it."""
        if entry not in self._waiting:
            return  # its client has left
        if error := preparing.exception():
            call_on_loop(self._settle, [(entry, error)])
            return
        waiting.image = preparing.result()
        self._line.enter(entry)
        if entry not in self._waiting:
            self._line.leave(entry)  # its client left, and took it out, just before it got in
        self._arrival.set()

    async def serve(self) -> None:
        """Run batches until `stop` is called and everyone who was submitted has been answered.

        Whoever is left when it ends otherwise, because it is cancelled or a decision fails, is refused.
        """
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._dispatch, loop.call_soon_threadsafe)
        finally:
            self._settle([(entry, NotReadyError("the server is stopping")) for entry in self._waiting])
            self._waiting.clear()
            self.stop()

    def abandon(self) -> None:
        """Release everybody, on the event loop, because the engine never will."""
        error = ModelError("the model does not come back from a batch; the server ends")
        self._settle([(entry, error) for entry in self._waiting])
        self.stop()

    def stop(self) -> None:
        """Admit nobody any more; those in line are still answered."""
        self._stopping = True
        self._arrival.set()

    def _dispatch(self, call_on_loop: CallOnLoop) -> None:
        self._free_at = self._clock()
        while self._waiting or not self._stopping:
            if not len(self._line):
                self._pacer.idle()
                self._await_arrival()
                self._free_at = self._clock()
            elif pause_s := self._pacer.pause_s(self._clock()):
                time.sleep(pause_s)
                self._free_at = self._clock()
            else:
                for outcomes in self._serve_batch():
                    call_on_loop(self._settle, outcomes)

    def _await_arrival(self) -> None:
        self._arrival.clear()
        # Whoever came before the clearing may not have been seen.
        if not len(self._line) and (self._waiting or not self._stopping):
            self._arrival.wait()

    def _serve_batch(self) -> Iterator[Outcomes]:
        """Do what the policy chooses; yields what became of whom, as soon as it is known."""
        self._observe_machine()
        self._line.pause_stretch = self._pacer.stretch
        now = self._clock()
        choice = self._line.next_batch(now)
        if choice.late:
            yield [(entry, DeadlineError("the deadline cannot be met any more")) for entry in choice.late]
        if choice.shed:
            message = "given up so that others can be answered in time; try again later"
            retry_after_s = self._line.backlog_s(now)
            yield [(entry, OverloadedError(message, "given_up", retry_after_s)) for entry in choice.shed]
        if choice.option is not None:
            yield from self._run_batch(choice, choice.option, choice.batch)

    def _run_batch(self, choice: Choice, index: int, batch: Sequence[Entry]) -> Iterator[Outcomes]:
        waiting = ((entry, self._waiting.get(entry)) for entry in batch)
        images = {entry: one.image for entry, one in waiting if one is not None and one.image is not None}
        if not images:
            self._line.failed(self._clock())
            return  # all their clients have left meanwhile
        option = self._line.menu.options[index]
        predicted_s = self._line.predict(index, len(images), self._clock())
        try:
            rows, started_at, ended_at = self._timed_run(list(images.values()), option.row, predicted_s)
            answered = list(zip(images, rows, strict=True))
        except Exception:  # whatever the model raises, its requests must be released and the next batch run
            self._free_at = self._clock()
            self._line.failed(self._free_at)
            yield from self._run_apart(choice, index, images)
            return
        inference_s = ended_at - started_at
        self._line.finished(index, len(answered), inference_s, ended_at, started_at - self._free_at)
        self._free_at = ended_at
        self._failures_in_a_row = 0
        self._pacer.batch_ran(inference_s)
        self._observe_batch(len(answered), predicted_s, inference_s, inference_s * self._pacer.stretch)
        yield [
            (entry, Result(*row, option, choice, len(answered), predicted_s, inference_s, started_at, ended_at))
            for entry, row in answered
        ]

    def _timed_run(
        self, images: Sequence[Tensor], profile: SubNetworkProfile, predicted_s: float
    ) -> tuple[list[Ranked], float, float]:
        """Run a batch; returns (logits, probabilities, ranking) of each image, and when the model started and ended."""
        # NumPy, because PyTorch would give the GIL away for a microsecond's work and wait long to get it back.
        batch = torch.from_numpy(np.stack([image.numpy() for image in images]))
        started_at = self._clock()
        self.running = started_at, predicted_s
        try:
            logits = self._run(batch, profile.subnetwork).numpy()
        finally:
            self.running = None
        ended_at = self._clock()
        return rank(logits, profile.temperature, profile.entropy_exponent), started_at, ended_at

    def _run_apart(self, choice: Choice, index: int, images: dict[Entry, Tensor]) -> Iterator[Outcomes]:
        """Run the halves of a batch that failed, until the request that poisons it stands alone."""
        batch = list(images)
        if len(batch) == 1:
            logger.exception("the model failed on an image at %s", self._line.menu.options[index].row.subnetwork)
            yield [(batch[0], ModelError("the model failed on this image; the server's log says why"))]
            self._failures_in_a_row += 1
            if self._failures_in_a_row == FAILURES_IN_A_ROW:
                self._failures_in_a_row = 0
                self._require_engine(torch.zeros_like(images[batch[0]]), self._line.menu.options[index].row)
            return
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            yield from self._run_batch(choice, index, half)

    def _require_engine(self, blank: Tensor, profile: SubNetworkProfile) -> None:
        """Tell images on which the model fails from a model that fails, as a GPU does after an error that stays.

        Raises:
            RuntimeError: the latter; nobody would be answered any more, and it is for a new process to do better.
        """
        try:
            self._timed_run([blank], profile, 0.0)
        except Exception as error:  # whatever the model raises, that it raises is what counts
            raise RuntimeError("the model fails whatever the image") from error

    def _settle(self, outcomes: Outcomes) -> None:
        """Release those who wait, on the event loop."""
        for entry, outcome in outcomes:
            waiting = self._waiting.get(entry)
            if waiting is None or waiting.result.done():
                continue  # its client has left meanwhile
            if isinstance(outcome, Result):
                waiting.result.set_result(outcome)
            else:
                waiting.result.set_exception(outcome)
