"""Whether a server that runs can answer at all: one that fails every request is better left alone for a while."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import OutOfMemoryError, ServiceError

FAILURES_IN_A_ROW = 8
# Then it is worth another try: without requests nothing would tell that it can answer again.
PAUSE_S = 10.0


class OwnFailures:
    """Counts the requests in a row that failed for reasons of the server's own, such as a lack of memory."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with none; the clock is monotonic, in seconds."""
        self._clock = clock
        self._in_a_row = 0
        self._last_at = 0.0

    @property
    def are_all(self) -> bool:
        """Whether nothing but failures has come of late."""
        return self._in_a_row >= FAILURES_IN_A_ROW and self._clock() - self._last_at < PAUSE_S

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count a request by how the block ends; what is the client's fault, or the load's, tells nothing.

        Nor does a model that fails on an image: one that fails on all ends the server.
        """
        try:
            yield
        except Exception as error:  # a bug raises anything, and is what is to be counted; it goes on
            if not isinstance(error, ServiceError) or isinstance(error, OutOfMemoryError):
                self._in_a_row += 1
                self._last_at = self._clock()
            raise
        self._in_a_row = 0
