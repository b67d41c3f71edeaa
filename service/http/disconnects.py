"""Clients that leave before their answer: the compute of a request that nothing waits for is better spent elsewhere."""

import asyncio
from types import TracebackType

from fastapi import Request

from service.errors import ClientGoneError

PATIENCE_S = 0.02  # a quick answer is not worth watching over its client


class ClientWatch:
    """Cancels the blocks that it stands around once the client has gone, which then raise a ClientGoneError.

    There is one block for each image of a request, each in a task of its own.
    """

    def __init__(self, request: Request, patience_s: float = PATIENCE_S) -> None:
        """Take the request; nothing is watched before `start`, nor for so long after it."""
        self._request, self._patience_s = request, patience_s
        self._tasks: set[asyncio.Task[object]] = set()
        self._patience: asyncio.TimerHandle | None = None
        self._watching: asyncio.Task[None] | None = None
        self._is_gone = False

    def __enter__(self) -> "ClientWatch":
        """Take note of a task that answers."""
        if task := asyncio.current_task():
            self._tasks.add(task)
        return self

    def start(self) -> None:
        """Watch from in a moment on: the body has been read, which notices a client that leaves by itself."""
        if self._patience is None:
            self._patience = asyncio.get_running_loop().call_later(self._patience_s, self._start_task)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Watch over one task less, and at last no longer.

        Raises:
            ClientGoneError: it was this that cancelled the block, and nothing else that wants the task to end.
        """
        task = asyncio.current_task()
        if task:
            self._tasks.discard(task)
        if not self._tasks:
            self._end()
        if isinstance(error, asyncio.CancelledError) and self._is_gone and task and not task.uncancel():
            raise ClientGoneError("the client left before its answer") from None

    def _end(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
        if self._watching is not None:
            self._watching.cancel()
        self._patience = self._watching = None

    def _start_task(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass  # what it still sends is thrown away
        self._is_gone = True
        for task in self._tasks:
            task.cancel()
