"""Work for the event loop that would keep it from its sockets for long, were it done at once."""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

# Answers that leave together are followed by requests that come together; one by one, both would cost half as much
# again of the loop's time.
AT_ONCE = 4
SHARE = 1 / 8  # of what waits, where that is more: under load a turn takes milliseconds, and the last would be late

T = TypeVar("T")


class InTurns(Generic[T]):
    """Handles items in order, a few in each turn of the event loop. Everything is called there."""

    def __init__(self, handle: Callable[[T], None]) -> None:
        """Take what handles an item; it must not fail."""
        self._handle = handle
        self._waiting: deque[T] = deque()

    def add(self, items: Iterable[T]) -> None:
        """Begin at once, unless others are being handled."""
        is_at_it = bool(self._waiting)
        self._waiting.extend(items)
        if not is_at_it:
            self._handle_some()

    def finish(self) -> None:
        """Handle all that wait, now."""
        while self._waiting:
            self._handle(self._waiting.popleft())

    def _handle_some(self) -> None:
        for _ in range(min(len(self._waiting), max(AT_ONCE, math.ceil(SHARE * len(self._waiting))))):
            self._handle(self._waiting.popleft())
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._handle_some)
