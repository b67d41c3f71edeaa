"""HTTP/1.1 as uvicorn speaks it, from clients whose requests begin within bounds of size and time.

uvicorn's parser is written in C and has neither bound: a head that never ends would be kept in memory, at some 25 times
its size where its lines are short, and connections that say nothing would stay for good.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 32_768
HEAD_S = 10.0
# Of what is left of a body after its request got an error. Most clients read no answer before they have sent all.
REFUSED_BODY_S = 30.0


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection whose next request's head is larger than MAX_HEAD_BYTES or takes longer than HEAD_S.

    The time is counted from the connection's start or, on one that is kept alive, from the head's first byte; how long
    it may be silent before that is uvicorn's to say. The rest of a body that outlasts the answer has REFUSED_BODY_S.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - uvicorn's to say
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._bytes = 0  # of this request, so far
        self._timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's own
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._start_timeout(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._forget_timeout()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass on what came, in pieces so small that a head cannot grow much larger than it may before it is seen."""
        for start in range(0, len(data), MAX_HEAD_BYTES):
            if self.transport.is_closing():
                return
            piece = data[start : start + MAX_HEAD_BYTES]
            if self._in_head and not self._bytes and self.cycle is not None and self.cycle.response_complete:
                self._forget_timeout()  # of the silence before
            if self._in_head:
                self._start_timeout(HEAD_S)
            self._bytes += len(piece)
            super().data_received(piece)
            if self._in_head and self._bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The request's head is larger than {MAX_HEAD_BYTES} bytes.")
            if not self._in_head and not self._is_answering:
                self._start_timeout(REFUSED_BODY_S)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header; the trailers of a body in chunks are of no use here, and have no bound."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Let the body come."""
        self._in_head = False
        self._forget_timeout()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Look out for the next head."""
        self._in_head, self._bytes = True, 0
        self._forget_timeout()
        super().on_message_complete()
        if not self._is_answering:  # uvicorn began to count the silence when it answered, and stopped at the next byte
            self._start_timeout(HEAD_S)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_timeout(self, seconds: float) -> None:
        if self._timeout is None:
            self._timeout = self.loop.call_later(seconds, self._time_out)

    def _time_out(self) -> None:
        self._timeout = None
        if self._is_answering:  # what came is of the request after that; it can wait
            self._start_timeout(HEAD_S)
        else:
            self.transport.close()

    def _forget_timeout(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None
