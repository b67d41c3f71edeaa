"""Whether a running server can answer at all: one that fails every request should get none for a while."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import OutOfMemoryError, ServiceError

FAILURES_IN_A_ROW = 8
# After this time it is tried again: without requests nothing would show that it can answer again.
PAUSE_S = 10.0


class ServerFailures:
    """Counts consecutive requests that failed for the server's own reasons, such as a lack of memory."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with no failures; the clock is monotonic, in seconds."""
        self._clock = clock
        self._in_a_row = 0
        self._last_at = 0.0

    @property
    def is_persistent(self) -> bool:
        """Whether the last requests all failed, the latest less than PAUSE_S ago."""
        return self._in_a_row >= FAILURES_IN_A_ROW and self._clock() - self._last_at < PAUSE_S

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count a request by how the block ends; errors caused by the client or by the load are ignored.

        So are failures of the model on an image: a model that fails on all images ends the server.
        """
        try:
            yield
        except Exception as error:  # a bug may raise anything, and must be counted; it is raised again
            if not isinstance(error, ServiceError) or isinstance(error, OutOfMemoryError):
                self._in_a_row += 1
                self._last_at = self._clock()
            raise
        self._in_a_row = 0
