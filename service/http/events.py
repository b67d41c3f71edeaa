"""GET /events: the metrics once a second, as server-sent events, for a live page."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic import TypeAdapter
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.domain import ServerState
from service.errors import OverloadedError
from service.telemetry.live import MetricsSample

INTERVAL_S = 1.0
SAMPLES_KEPT = 180  # the history that a new listener gets first
MAX_LISTENERS = 32
RETRY_AFTER_S = 5.0
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter, or nginx would buffer the events

_SAMPLE = TypeAdapter(MetricsSample)


class LiveFeed:
    """Reads the metrics once a second for all listeners together, and not at all without listeners."""

    def __init__(self, read: Callable[[], MetricsSample], is_over: Callable[[], bool]) -> None:
        """Create a feed without listeners.

        Args:
            read: reads the metrics; called on a thread, for it takes some milliseconds.
            is_over: returns whether the server is stopping, which would otherwise wait for the listeners to leave.
        """
        self._read, self._is_over = read, is_over
        self._samples: deque[MetricsSample] = deque(maxlen=SAMPLES_KEPT)
        self._lock = asyncio.Lock()
        self._listeners = 0
        self._number = 0  # samples taken so far

    def join(self) -> None:
        """Count a listener, until `leave`.

        Raises:
            OverloadedError: there are MAX_LISTENERS already.
        """
        if self._listeners >= MAX_LISTENERS:
            raise OverloadedError(f"{MAX_LISTENERS} clients listen already; try again later", "full", RETRY_AFTER_S)
        if not self._listeners:  # without listeners no samples were taken
            self._forget_old()
        self._listeners += 1

    def leave(self) -> None:
        """Count a listener no longer."""
        self._listeners -= 1

    async def events(self) -> AsyncIterator[bytes]:
        """Iterate over the events until the server stops: first those of the last minutes, then one a second."""
        sent = self._number - len(self._samples)
        while not self._is_over():
            if sent == self._number:
                await self._take_sample(sent)
            missed = min(self._number - sent, len(self._samples))
            yield b"".join(map(_event, list(self._samples)[len(self._samples) - missed :]))
            sent = self._number
            await asyncio.sleep(INTERVAL_S)

    def _forget_old(self) -> None:
        since = time.time() - SAMPLES_KEPT * INTERVAL_S
        while self._samples and self._samples[0].at < since:
            self._samples.popleft()

    async def _take_sample(self, number: int) -> None:
        """Take the next sample, unless another listener has taken it in the meantime."""
        async with self._lock:
            if self._number == number:
                self._samples.append(await asyncio.to_thread(self._read))
                self._number += 1


def is_stopping(state: ServerState) -> bool:
    """Return whether a server in this state is stopping and admits no more requests."""
    return state in (ServerState.DRAINING, ServerState.HUNG)


class EventStream(StreamingResponse):
    """Response that streams events to a page's EventSource."""

    media_type = "text/event-stream"

    leave: Callable[[], None]

    @classmethod
    def of(cls, feed: LiveFeed) -> "EventStream":
        """Join a feed, and return a response that leaves it at its end.

        Raises:
            OverloadedError: the feed has too many listeners.
        """
        feed.join()
        stream = cls(feed.events(), headers=HEADERS)
        stream.leave = feed.leave
        return stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the client leaves or the server stops."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()


def describe_events() -> dict[str, Any]:
    """Return the OpenAPI description of the stream."""
    return {
        "description": "one event a second, with JSON data; the events of the last minutes come first",
        "content": {EventStream.media_type: {"schema": {**_SAMPLE.json_schema(), "title": "MetricsSample"}}},
    }


def _event(sample: MetricsSample) -> bytes:
    return b"data: %b\n\n" % _SAMPLE.dump_json(sample)
