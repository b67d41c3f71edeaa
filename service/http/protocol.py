"""uvicorn's HTTP/1.1 with bounds on the size and the time of a request's head, and one request at a time.

uvicorn has no such bounds: a head that never ends would be kept in memory, at some 25 times its size where its lines
are short, a client that reads no answers would fill the memory, and silent connections would stay for good.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.http.connections import UNAVAILABLE, Connections
from service.http.heads import END_OF_HEAD, MAX_HEAD_BYTES, end_of_lines, has_one_host, without_upgrade
from service.http.sockets import CONTINUE, waited_s, was_reset
from service.telemetry.rate_limited_log import RateLimitedLog

HEAD_TIMEOUT_S = 10.0
# For the rest of a body whose request has got an error. Most clients read no answer before they have sent all.
REFUSED_BODY_TIMEOUT_S = 30.0
UNREAD_TIMEOUT_S = 30.0  # for the client to read an answer that is pending in the socket
# A client that has closed its sending half may have left. Only a write tells: a client that has left resets it.
PROBE_DELAY_S = 0.25
PROBE_INTERVAL_S = 0.05
ARRIVED_AT = "supervit.arrived_at"  # scope key: when the first byte of the request could be read

logger = logging.getLogger(__name__)


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection whose next request's head is larger than MAX_HEAD_BYTES or takes longer than HEAD_TIMEOUT_S.

    That time counts from the head's first byte, for which a new connection has as long. uvicorn bounds the silence of a
    connection that is kept alive. The rest of a body that outlasts the answer has REFUSED_BODY_TIMEOUT_S.
    Pipelined requests are parsed one by one: the next one only after the answer to the one before.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 - uvicorn's signature
        connections: Connections,
        observe: Callable[[str], None] = lambda _: None,
        log: RateLimitedLog | None = None,
        clock: Callable[[], float] = time.monotonic,
        **kwargs: Any,  # noqa: ANN401 - as above
    ) -> None:
        """Create the protocol of one connection.

        Args:
            args: uvicorn's arguments.
            connections: counts and bounds the open connections.
            observe: called with the reason when the server closes a connection that its client would have kept.
            log: rate-limited log of what such clients do.
            clock: monotonic, in seconds; stamps `arrived_at`.
            kwargs: uvicorn's keyword arguments.
        """
        super().__init__(*args, **kwargs)
        self._connections, self._observe, self._clock = connections, observe, clock
        self._log = log or RateLimitedLog(logger)
        self._in_head, self._has_begun, self._bytes = True, False, 0  # the latter: parsed of this request so far
        self._body_left: int | None = None  # bytes; None for a chunked body
        self._tail = b""  # the last bytes parsed, in which an END_OF_HEAD may begin
        self._unparsed, self._start = b"", 0  # received data, and how far it is parsed
        self._received_at = self._arrived_at = 0.0
        self._has_ended = self._was_probed = False  # the former: the client sends no more
        self._timeout: asyncio.TimerHandle | None = None
        self._unread_timeout: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Admit the connection and wait for the first head, or refuse the connection."""
        super().connection_made(transport)
        opened = transport.get_extra_info("socket")
        if self._connections.admit(self, self.client[0] if self.client else None, opened.fileno()):
            self._start_timeout(HEAD_TIMEOUT_S)
        else:
            self._log.warning("a connection was refused: too many are open; see --max-connections and ulimit -n")
            transport.write(UNAVAILABLE)
            self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers and release the connection's place."""
        self._connections.forget(self)
        self._forget_timeout()
        self._forget_probe()
        if self._unread_timeout is not None:
            self._unread_timeout.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves its timer running after a reset
        self._unparsed = b""

    def evict(self) -> None:
        """Close the connection to make room for a new one."""
        self._log.warning("a waiting connection was closed to admit a new one; see --max-connections")
        self._close()

    def data_received(self, data: bytes) -> None:
        """Parse the received data up to the end of one request."""
        self._unset_keepalive_if_required()
        self._received_at = self._clock()
        if self._in_head and not self._has_begun:
            self._received_at -= waited_s(self.transport)
        self._unparsed, self._start = self._unparsed[self._start :] + data, 0
        self._parse()

    def eof_received(self) -> bool:  # type: ignore[override] # asyncio returns a bool, uvicorn does not
        """Keep the connection open for the requests that came whole; close it at once where there is none."""
        self._has_ended = True
        is_due = self._must_wait
        if is_due and self._is_answering:
            self._probe_timer = self.loop.call_later(PROBE_DELAY_S, self._probe)
        return is_due and self.transport.get_extra_info("sslcontext") is None  # TLS cannot be half-closed

    def on_message_begin(self) -> None:
        """Stamp the request with its arrival time."""
        super().on_message_begin()
        self.scope[ARRIVED_AT] = self._arrived_at  # type: ignore[literal-required] # a key of our own

    def on_header(self, name: bytes, value: bytes) -> None:
        """Record a header. The trailers of a chunked body are dropped: nothing uses them, and nothing bounds them."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Prepare for the body; an error makes the parser fail."""
        if not has_one_host(self.headers, self.parser.get_http_version()):
            raise ValueError("a request must name one host")
        self._begin_body()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Prepare for the next head."""
        self._await_head()
        super().on_message_complete()
        if self._is_answering:
            self._connections.mark_answering(self)
        else:  # uvicorn began to time the silence when it answered, and stopped at the next byte
            self._start_timeout(HEAD_TIMEOUT_S)

    def on_response_complete(self) -> None:
        """Parse the data that came while the request was being answered."""
        super().on_response_complete()
        self._forget_probe()
        if self.transport.is_closing():
            self._close()
            return
        self._connections.mark_waiting(self)
        self._resume_parsing()

    def pause_writing(self) -> None:
        """Wait until the client has read the pending data, for at most UNREAD_TIMEOUT_S."""
        super().pause_writing()
        self._start_unread_timeout()

    def resume_writing(self) -> None:
        """Resume after the client has read the pending data."""
        if self._unread_timeout is not None and not self.transport.is_closing():
            self._unread_timeout.cancel()
            self._unread_timeout = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that has been silent for too long."""
        self._close()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _must_wait(self) -> bool:
        """Whether the next data belongs to a request after the one that is being answered."""
        return self._in_head and self._is_answering

    def _resume_parsing(self) -> None:
        """Parse the data that came while a request was being answered."""
        self.flow.resume_reading()
        if self._unparsed:
            self._unset_keepalive_if_required()
            self._parse()
        if self._has_ended and not self._must_wait:
            self._close()

    def _begin_body(self) -> None:
        self._in_head = False
        self._forget_timeout()
        headers = dict(self.headers)
        self._body_left = None if b"transfer-encoding" in headers else int(headers.get(b"content-length", b"0"))

    def _await_head(self) -> None:
        self._in_head, self._has_begun, self._bytes, self._tail = True, False, 0, b""
        self._forget_timeout()

    def _parse(self) -> None:
        """Parse the received data in pieces, none of which reaches beyond the end of a request."""
        data, start = self._unparsed, self._start
        while start < len(data) and not self._must_wait and not self.transport.is_closing():
            if self._in_head:
                if not self._has_begun:
                    self._has_begun = True
                    self._arrived_at = self._received_at
                    self._connections.mark_waiting(self)
                    self._forget_timeout()  # of the silence before, as is uvicorn's own
                    self._unset_keepalive_if_required()
                self._start_timeout(HEAD_TIMEOUT_S)
            end = self._end_of_piece(data, start)
            self._bytes += end - start
            if self._in_head and self._bytes > MAX_HEAD_BYTES:
                self._refuse(f"The request's head is larger than {MAX_HEAD_BYTES} bytes.")
                break
            if end == start:  # a part of a line: the rest is to come
                self._start = start
                return
            piece, start = data[start:end], end
            self._feed(without_upgrade(piece) if self._in_head else piece)
            if not self._in_head and not self._is_answering:
                self._start_timeout(REFUSED_BODY_TIMEOUT_S)
        if start < len(data) and self._must_wait:
            self._start = start
            self.flow.pause_reading()
        else:
            self._unparsed, self._start = b"", 0

    def _end_of_piece(self, data: bytes, start: int) -> int:
        if not self._in_head and self._body_left is not None:
            end = min(len(data), start + self._body_left)
            self._body_left -= end - start
            return end
        before = len(self._tail)
        straddling = (self._tail + data[start : start + 3]).find(END_OF_HEAD)
        if straddling >= 0:
            end = start + straddling + len(END_OF_HEAD) - before
        elif self._in_head:
            end = end_of_lines(data, start)
        else:
            found = data.find(END_OF_HEAD, start)
            end = found + len(END_OF_HEAD) if found >= 0 else len(data)
        self._tail = (self._tail + data[max(start, end - 3) : end])[-3:]
        return end

    def _feed(self, piece: bytes) -> None:
        try:
            self.parser.feed_data(piece)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # the latter for a CONNECT
            self._refuse("Invalid HTTP request received.")

    def _refuse(self, message: str) -> None:
        self._observe("bad_request")
        self._log.warning("an invalid HTTP request was refused")
        self.send_400_response(message)
        self._close()

    def _probe(self) -> None:
        """Check whether a client that has ended its sending still waits: one that has left resets what is written."""
        self._probe_timer = None
        if self.transport.is_closing():
            return
        if was_reset(self.transport):
            self.transport.abort()
            return
        if not self._was_probed and not self.cycle.response_started and self.scope["http_version"] == "1.1":
            self._was_probed = True
            self.transport.write(CONTINUE)
        self._probe_timer = self.loop.call_later(PROBE_INTERVAL_S, self._probe)

    def _close(self) -> None:
        """Close the connection, waiting at most UNREAD_TIMEOUT_S for the client to read the pending data."""
        self.transport.close()
        self._start_unread_timeout()

    def _start_unread_timeout(self) -> None:
        if self._unread_timeout is None:
            self._unread_timeout = self.loop.call_later(UNREAD_TIMEOUT_S, self._abort)

    def _abort(self) -> None:
        self._observe("unread")
        self.transport.abort()

    def _start_timeout(self, seconds: float) -> None:
        if self._timeout is None:
            self._timeout = self.loop.call_later(seconds, self._time_out)

    def _time_out(self) -> None:
        self._timeout = None
        self._observe("slow")
        self._close()

    def _forget_timeout(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None

    def _forget_probe(self) -> None:
        if self._probe_timer is not None:
            self._probe_timer.cancel()
            self._probe_timer = None
