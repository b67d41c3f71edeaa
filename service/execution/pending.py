"""The requests that wait for their answers: each with its image, the result of its last look, and a future.

The event loop adds and removes entries; the engine's thread reads them and records the results of looks.
"""

import asyncio
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from service.domain import LookCode
from service.errors import ServiceError
from service.execution.results import Result
from service.scheduling.state import QueuedRequest

Outcome = tuple[QueuedRequest, Result | BaseException]


@dataclass(slots=True)
class Pending:
    """The state of a request that waits for its answer.

    Attributes:
        future: gets the answer.
        image: (3, S, S) uint8; None until it is decoded.
        last_look: result of the last look, where another look is wanted.
        is_running: whether the request is in the batch that runs.
    """

    future: "asyncio.Future[Result]"
    image: Tensor | None = None
    last_look: Result | None = None
    is_running: bool = False

    @property
    def awaited(self) -> str:
        """What has to happen before the request can be in a batch, for a message about its deadline."""
        return "the image was decoded" if self.image is None else "the engine was free"


class PendingRequests:
    """The pending requests of a batcher, as admitted; a second look belongs to the request that had the first."""

    def __init__(self) -> None:
        self._pending: dict[QueuedRequest, Pending] = {}

    def __len__(self) -> int:
        """Return the number of pending requests."""
        return len(self._pending)

    def __iter__(self) -> Iterator[QueuedRequest]:
        """Iterate over a snapshot of the pending requests."""
        return iter(list(self._pending))

    def add(self, request: QueuedRequest) -> Pending:
        """Add a request, with a future of the running event loop."""
        pending = self._pending[request] = Pending(asyncio.get_running_loop().create_future())
        return pending

    def discard(self, request: QueuedRequest) -> None:
        """Remove a request, if it is there."""
        self._pending.pop(request, None)

    def find(self, request: QueuedRequest) -> Pending | None:
        """Return the state of a request; None where its client has left."""
        return self._pending.get(request.admitted)

    def start(self, batch: Iterable[QueuedRequest]) -> dict[QueuedRequest, Tensor]:
        """Record which requests are in the batch that runs, and return their images; not where the client has left."""
        images = {}
        for request in batch:
            if (pending := self.find(request)) is not None and pending.image is not None:
                pending.is_running, images[request] = True, pending.image
        return images

    def keep(self, request: QueuedRequest, look: Result) -> bool:
        """Record the look that a request gets if no other follows; return False where its client has left."""
        pending = self.find(request)
        if pending is not None:
            pending.last_look, pending.is_running = look, False
        return pending is not None

    def last_look_of(self, request: QueuedRequest) -> Result | None:
        """Return the result of the last look at the request's image; None where there is none."""
        pending = self.find(request)
        return None if pending is None else pending.last_look

    def finished(self, request: QueuedRequest, result: Result, code: LookCode) -> Outcome:
        """Return the outcome of a request that gets no other look: its last look, or the one before if that is NaN."""
        if result.before is not None and not math.isfinite(result.confidence):
            result, code = result.before, LookCode.FAILED
        return request.admitted, replace(result, stopped=code)

    def failed(self, error: ServiceError, request: QueuedRequest, code: LookCode) -> Outcome:
        """Return the outcome of a request that fails: the result of its last look, if it has one, or else the error."""
        look = self.last_look_of(request)
        return request.admitted, error if look is None else replace(look, stopped=code, second_look_cancelled=True)

    def settle(self, outcome: Outcome) -> None:
        """Set the answer of a request, on the event loop."""
        request, result = outcome
        pending = self._pending.get(request)
        if pending is None or pending.future.done():
            return  # its client has left, or it is answered already
        if isinstance(result, Result):
            pending.future.set_result(result)
        else:
            pending.future.set_exception(result)
