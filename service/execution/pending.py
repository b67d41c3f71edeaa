"""The requests that wait for their answers: the image of each, what a look said already, and the answer, given once.

Entries come and go on the event loop; the engine's thread looks at them and notes what a look said.
"""

import asyncio
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from service.domain import LookCode
from service.errors import ServiceError
from service.execution.results import Result
from service.scheduling.state import QueuedRequest

Outcome = tuple[QueuedRequest, Result | BaseException]


@dataclass(slots=True)
class Pending:
    """A request that waits.

    Attributes:
        result: its answer to be.
        image: (3, S, S) uint8, once it is decoded.
        answer: what the last look said, where another is wanted.
    """

    result: "asyncio.Future[Result]"
    image: Tensor | None = None
    answer: Result | None = None


class PendingRequests:
    """Those of a batcher, as they were admitted; another look at an image belongs to the request that had the first."""

    def __init__(self) -> None:
        self._pending: dict[QueuedRequest, Pending] = {}

    def __len__(self) -> int:
        """Count them."""
        return len(self._pending)

    def __iter__(self) -> Iterator[QueuedRequest]:
        """Go over them, as they are now."""
        return iter(list(self._pending))

    def add(self, request: QueuedRequest) -> Pending:
        """Let a request wait, on the event loop that runs."""
        pending = self._pending[request] = Pending(asyncio.get_running_loop().create_future())
        return pending

    def discard(self, request: QueuedRequest) -> None:
        """Forget a request."""
        self._pending.pop(request, None)

    def find(self, request: QueuedRequest) -> Pending | None:
        """Return what is kept of a request; None where its client has left."""
        return self._pending.get(request.admitted)

    def keep(self, request: QueuedRequest, answer: Result) -> bool:
        """Note what a request gets if its image is not looked at again; False where its client has left."""
        pending = self.find(request)
        if pending is not None:
            pending.answer = answer
        return pending is not None

    def answer_of(self, request: QueuedRequest) -> Result | None:
        """Return what the last look at its image said, where there was one."""
        pending = self.find(request)
        return None if pending is None else pending.answer

    def finished(self, request: QueuedRequest, result: Result, code: LookCode) -> Outcome:
        """Return what a request gets that is looked at no more; where the last look is no number, the one before."""
        if result.before is not None and not math.isfinite(result.confidence):
            result, code = result.before, LookCode.FAILED
        return request.admitted, replace(result, stopped=code)

    def in_place_of(self, error: ServiceError, request: QueuedRequest, code: LookCode) -> Outcome:
        """Return what a request gets that fails: the answer of its last look, if it only waited for another."""
        answer = self.answer_of(request)
        return request.admitted, error if answer is None else replace(answer, stopped=code, waited_in_vain=True)

    def settle(self, outcome: Outcome) -> None:
        """Answer a request, on the event loop."""
        request, result = outcome
        pending = self._pending.get(request)
        if pending is None or pending.result.done():
            return  # its client has left meanwhile
        if isinstance(result, Result):
            pending.result.set_result(result)
        else:
            pending.result.set_exception(result)
