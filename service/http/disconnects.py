"""Cancellation of requests whose client has left: nothing waits for the answers, and others need the compute."""

import asyncio
from types import TracebackType

from fastapi import Request

from service.errors import ClientGoneError

WATCH_DELAY_S = 0.02  # a faster answer is not worth watching its client


class ClientWatch:
    """Context manager that cancels its blocks once the client has left; they then raise a ClientGoneError.

    There is one block for each image of a request, each in a task of its own.
    """

    def __init__(self, request: Request, delay_s: float = WATCH_DELAY_S) -> None:
        """Create the watch of a request, which begins `delay_s` after `start`."""
        self._request, self._delay_s = request, delay_s
        self._tasks: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._watching: asyncio.Task[None] | None = None
        self._is_gone = False

    def __enter__(self) -> "ClientWatch":
        """Add the current task to those that are cancelled when the client leaves."""
        if task := asyncio.current_task():
            self._tasks.add(task)
        return self

    def start(self) -> None:
        """Begin to watch after `delay_s`. Call it once the body is read: reading detects a client that leaves."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._delay_s, self._start_task)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the current task, and stop watching after the last one.

        Raises:
            ClientGoneError: the block was cancelled because the client left, and for no other reason.
        """
        task = asyncio.current_task()
        if task:
            self._tasks.discard(task)
        if not self._tasks:
            self._end()
        if isinstance(error, asyncio.CancelledError) and self._is_gone and task and not task.uncancel():
            raise ClientGoneError("the client disconnected before the answer") from None

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._watching is not None:
            self._watching.cancel()
        self._timer = self._watching = None

    def _start_task(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass  # what the client still sends is discarded
        self._is_gone = True
        for task in self._tasks:
            task.cancel()
