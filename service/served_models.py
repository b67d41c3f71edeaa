"""The served model and, for a while, the candidate that is to replace it: which of them answers a request."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from service.assembly import ServedModel
from service.errors import NotReadyError

POLL_S = 0.02  # between two checks whether a model has finished its requests

logger = logging.getLogger(__name__)


class ServedModels:
    """One model, or two of which the second gets a share of the requests; all methods are for the event loop."""

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        """Start with no model; `draw` returns a number from 0 to less than 1 for each request."""
        self._draw = draw
        self._current: ServedModel | None = None
        self._candidate: ServedModel | None = None
        self._share = 0.0  # of the requests, for the candidate
        self._serving: dict[ServedModel, asyncio.Task[None]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no model is served yet."""
        return self._current is None

    @property
    def main(self) -> ServedModel:
        """The model that answers most requests.

        Raises:
            NotReadyError: no model is served yet.
        """
        return self.all[0]

    @property
    def all(self) -> tuple[ServedModel, ...]:
        """The models that answer requests, the one that answers most of them first; errors as `main`."""
        return self._in_order(0.5)

    def drawn(self) -> tuple[ServedModel, ...]:
        """Return the models that may answer a new request, the one drawn for it first; errors as `main`."""
        return self._in_order(0.0 if self._candidate is None else self._draw())

    def _in_order(self, drawn: float) -> tuple[ServedModel, ...]:
        """Return the models that may answer a request, in the order that its number `drawn` gives; errors as `main`."""
        if self._current is None:
            raise NotReadyError("the server is warming up or measuring its latencies; try again in a moment")
        if self._candidate is None or not self._share:
            return (self._current,)
        first, second = self._candidate, self._current
        both = (first, second) if drawn < self._share else (second, first)
        return tuple(model for model in both if not self.has_ended(model)) or both

    def begin(self, model: ServedModel) -> None:
        """Start a model: it takes turns on the engine's thread from now on."""
        self._serving[model] = asyncio.create_task(model.serve())

    def start(self, first: ServedModel) -> None:
        """Begin to serve the first model."""
        self._current = first
        self.begin(first)

    async def run(self) -> None:
        """Serve until `stop`, through any change of the model, and until all requests received are answered.

        If the served model fails while the candidate answers all requests, the candidate replaces it.

        Raises:
            Exception: the error that ended the served model.
        """
        try:
            while (model := self._current) is not None:
                serving = self._serving[model]
                await asyncio.wait([serving])
                if model is not self._current:
                    continue
                if self._candidate is None or self._share < 1.0 or self.has_ended(self._candidate):
                    return serving.result()
                self.accept(self._candidate)  # it answers all requests, and there is nothing left to go back to
        finally:
            self.stop()
            await asyncio.gather(*self._serving.values(), return_exceptions=True)

    def try_out(self, model: ServedModel, share: float) -> None:
        """Let a model that has begun answer a share of the requests, 0..1; at 0 it gets no more.

        It takes over what the served model has learned; otherwise it would plan for a server without traffic.
        """
        if model is self._current:  # the old model has failed meanwhile, and this one has replaced it
            return
        if self._current is not None:
            model.take_over(self._current)
        self._candidate, self._share = model, share

    def has_ended(self, model: ServedModel) -> bool:
        """Return whether a model takes no more turns, such as one that fails on every image."""
        return self._serving[model].done()

    def accept(self, model: ServedModel) -> None:
        """Serve the candidate instead of the current model, unless it is served already."""
        if model not in (self._candidate, self._current):
            raise ValueError("the model is not being tried out")
        self._current, self._candidate, self._share = model, None, 0.0

    def is_accepted(self, model: ServedModel) -> bool:
        """Return whether a model is the served one and no longer the candidate."""
        return model is self._current

    def drop(self, model: ServedModel) -> None:
        """Give the candidate no more requests; does nothing for any other model."""
        if self._candidate is model:
            if self._current is not None and self._share == 1.0:  # the served model has seen no request for a while
                self._current.take_over(model)
            self._candidate, self._share = None, 0.0

    async def retire(self, model: ServedModel, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Let a model that gets no more requests answer those that it has, then release it."""
        serving = self._serving[model]
        while not model.is_unused and not serving.done():
            await sleep(POLL_S)
        model.batcher.stop()
        await asyncio.wait([serving])
        del self._serving[model]
        if error := serving.exception():
            logger.error("%s %s: %s", model.checkpoint.name, model.checkpoint.version, error, exc_info=error)

    def stop(self) -> None:
        """Take no new requests; those received are still answered."""
        for model in self._serving:
            model.batcher.stop()

    def abandon(self) -> None:
        """Answer all requests with an error, because the engine never will."""
        for model in self._serving:
            model.batcher.abandon()
