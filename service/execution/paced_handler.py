"""Splits work on the event loop into small parts, where doing it at once would keep the loop from its sockets."""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

# Items per turn. Answers that are sent together are followed by requests that arrive together; one by one, both would
# take half as much again of the loop's time.
MIN_PER_TURN = 4
SHARE_PER_TURN = (
    1 / 8
)  # of the waiting items, if that is more: under load a turn takes milliseconds, and the last would be late

T = TypeVar("T")


class PacedHandler(Generic[T]):
    """Handles items in order, a few in each turn of the event loop. All methods are called on the loop."""

    def __init__(self, handle: Callable[[T], None]) -> None:
        """Create from the function that handles an item, which must not raise."""
        self._handle = handle
        self._waiting: deque[T] = deque()

    def add(self, items: Iterable[T]) -> None:
        """Append items; handle the first of them at once, unless earlier ones are waiting."""
        is_at_it = bool(self._waiting)
        self._waiting.extend(items)
        if not is_at_it:
            self._handle_some()

    def finish(self) -> None:
        """Handle all waiting items now."""
        while self._waiting:
            self._handle(self._waiting.popleft())

    def _handle_some(self) -> None:
        for _ in range(min(len(self._waiting), max(MIN_PER_TURN, math.ceil(SHARE_PER_TURN * len(self._waiting))))):
            self._handle(self._waiting.popleft())
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._handle_some)
