"""Clients that leave before their answer: the compute of a request that nothing waits for is better spent elsewhere."""

import asyncio
from types import TracebackType

from fastapi import Request

from service.errors import ClientGoneError

PATIENCE_S = 0.02  # a quick answer is not worth watching over its client


class ClientWatch:
    """Cancels the block that it stands around once the client has gone, which then raises a ClientGoneError."""

    def __init__(self, request: Request, patience_s: float = PATIENCE_S) -> None:
        """Take the request; nothing is watched before `start`, nor for so long after it."""
        self._request, self._patience_s = request, patience_s
        self._task: asyncio.Task[object] | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._watching: asyncio.Task[None] | None = None
        self._is_gone = False

    def __enter__(self) -> "ClientWatch":
        """Take note of the task that answers."""
        self._task = asyncio.current_task()
        return self

    def start(self) -> None:
        """Watch from in a moment on: the body has been read, which notices a client that leaves by itself."""
        self._patience = asyncio.get_running_loop().call_later(self._patience_s, self._start_task)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Watch no longer.

        Raises:
            ClientGoneError: it was this that cancelled the block, and nothing else that wants the task to end.
        """
        if self._patience is not None:
            self._patience.cancel()
        if self._watching is not None:
            self._watching.cancel()
        if isinstance(error, asyncio.CancelledError) and self._is_gone and self._task and not self._task.uncancel():
            raise ClientGoneError("the client left before its answer") from None

    def _start_task(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass  # what it still sends is thrown away
        self._is_gone = True
        if self._task is not None:
            self._task.cancel()
