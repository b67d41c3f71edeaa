"""Rejection for overload as soon as a request's head is parsed, without the layers of the application.

The event loop is one thread. If a rejection cost it as much as an answer, the server would answer fewer requests the
more arrive.
"""

import asyncio
import time
from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

from service.domain import ApiKey
from service.errors import OverloadedError, OverloadReason, ServiceError
from service.http.context import ReadyServer, RouteContext
from service.http.error_responses import describe_error, make_error_response
from service.http.error_shapes import error_type
from service.http.forms import UNTYPED
from service.http.heads import has_one_host
from service.http.origins import is_known_host
from service.http.protocol import ARRIVED_AT, BoundedProtocol
from service.http.queries import parse_query
from service.http.request_ids import RAW_HEADER
from service.request_names import request_id_of
from service.request_parameters import ClassifyQuery
from service.scheduling.state import QueuedRequest

CLASSIFY_PATH = "/classify"
# Requests with these headers go to the application, which checks how the body is sent and which page asks.
ROUTED = frozenset((b"transfer-encoding", b"expect", b"origin", b"content-encoding"))
PATH = CLASSIFY_PATH.encode()
STATUS_LINE = b"HTTP/1.1 429 Too Many Requests\r\n"
REPEATED_S = 0.005  # for which a rejection is reused for equal requests
REJECTION_SHARE = 0.15  # of the event loop's CPU time, for parsing and rejecting; the cost of the sockets comes on top
BURST_S = 0.05  # CPU time for rejections that may be spent at once
MAX_PAUSE_S = 0.5  # longest delay of a rejection; one to a client that has given up is wasted
RESERVED = "supervit.reserved"  # scope key of a Reservation
PLAIN_TYPES = frozenset(media_type.encode() for media_type in UNTYPED)


Scope = MutableMapping[str, Any]


class Reservation(NamedTuple):
    """A place in the queue that is reserved for a request, and the server whose queue it is."""

    server: ReadyServer
    request: QueuedRequest


class _Rejection(NamedTuple):
    """A rejection that is reused for equal requests that arrive at nearly the same time."""

    server: ReadyServer
    parameters: ClassifyQuery
    key: ApiKey | None
    arrived_at: float
    retry_after_s: float  # a request that arrives so much later may have time enough
    made_at: float  # the queue may soon be shorter
    reason: OverloadReason
    lines: bytes

    def holds_for(
        self, server: ReadyServer, parameters: ClassifyQuery, key: ApiKey | None, arrived_at: float, now: float
    ) -> bool:
        """Return whether another request would be rejected as well; a slot of a full server may be free by now."""
        is_same = server is self.server and parameters is self.parameters and key is self.key
        if not is_same or now > self.made_at + REPEATED_S or self.reason == "full":
            return False
        return -REPEATED_S <= arrived_at - self.arrived_at <= self.retry_after_s


class EarlyRejection:
    """Answers the requests that POST /classify would reject for overload."""

    def __init__(self, context: RouteContext) -> None:
        """Create the early rejection from the collaborators of the routes."""
        self._context = context
        self._last: _Rejection | None = None
        self._spent_s, self._spent_at = 0.0, 0.0

    def answer(self, url: bytes, headers: Sequence[tuple[bytes, bytes]], scope: Scope) -> bytes | None:
        """Return a rejection without its status line, or None for the app, with any reserved place in the scope.

        Args:
            url: path and query of a POST.
            headers: headers of the request, names in lower case.
            scope: scope of the request, as the protocol created it.
        """
        path, _, query = url.partition(b"?")
        named = dict(headers)
        if path != PATH or len(named) < len(headers) or not self._is_plain(named):
            return None
        try:
            parameters, server = parse_query(query), self._context.open_server()
            key = None if self._context.keys is None else self._context.keys.find(named)
            last, arrived_at, now = self._last, scope[ARRIVED_AT], self._context.clock()
            if last is None or not last.holds_for(server, parameters, key, arrived_at, now):
                self._last = None  # it would keep the model of its server in memory
                wanted = parameters.request(arrived_at, key=key)
                if (reserved := server.pipeline.reserve(wanted)) is not None:
                    scope[RESERVED] = Reservation(server, reserved)
                return None
            server.pipeline.reject_again(last.reason)
        except OverloadedError as error:
            retry_after_s = error.details["retry_after_s"]
            last = _Rejection(server, parameters, key, arrived_at, retry_after_s, now, error.reason, _describe(error))
            self._last = last
        except ServiceError:  # the route answers it
            return None
        metrics = self._context.metrics
        metrics.request_started()
        metrics.request_finished(OverloadedError.code, last.reason)
        if last.key is not None:
            metrics.keys.finished(last.key.name, OverloadedError.code)
        if self._context.reporter is not None:
            self._context.reporter.rejected()
        media_type = error_type(named.get(b"accept", b"").decode("latin-1"))
        return last.lines % (media_type.encode(), request_id_of(named.get(RAW_HEADER, b"")))

    def charge(self, took_s: float) -> float:
        """Charge a rejection's CPU time to a leaky bucket; return the seconds to hold the rejection back.

        Clients that retry as soon as they are rejected would otherwise leave no time for answers.
        """
        now = self._context.clock()
        spent_s = max(0.0, self._spent_s - REJECTION_SHARE * (now - self._spent_at)) + took_s
        self._spent_s, self._spent_at = min(spent_s, BURST_S + REJECTION_SHARE * MAX_PAUSE_S), now
        return max(0.0, self._spent_s - BURST_S) / REJECTION_SHARE

    def forget(self, scope: Scope) -> None:
        """Release the place of an answered request: the app may have refused the request before it used the place."""
        if (reserved := scope.pop(RESERVED, None)) is not None:
            reserved.server.scheduler.withdraw(reserved.request)

    def _is_plain(self, headers: dict[bytes, bytes]) -> bool:
        """Return whether the body is a bare image that the route would read; a form may hold a longer budget."""
        media_type = headers.get(b"content-type", b"").lower()
        if not ROUTED.isdisjoint(headers) or not (media_type.startswith(b"image/") or media_type in PLAIN_TYPES):
            return False
        hosts = self._context.allowed_hosts
        if hosts is not None and not is_known_host(headers.get(b"host", b"").decode("latin-1"), hosts):
            return False
        return int(headers.get(b"content-length", b"0")) <= self._context.bodies.max_bytes


def _describe(error: OverloadedError) -> bytes:
    """Serialise a rejection's headers and body, with placeholders for the media type and the request id."""
    response = make_error_response(*describe_error(error))
    others = (header for header in response.raw_headers if header[0] != b"content-type")
    head = b"".join(b"%b: %b\r\n" % header for header in others)
    answer = b"%bcontent-type: %%b\r\n%b: %%b\r\n\r\n%b"
    return answer % (head.replace(b"%", b"%%"), RAW_HEADER, bytes(response.body).replace(b"%", b"%%"))


class RejectingProtocol(BoundedProtocol):
    """Protocol that rejects requests for overload without calling the application."""

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 - uvicorn's signature
        early: EarlyRejection,
        **kwargs: Any,  # noqa: ANN401 - as above
    ) -> None:
        """Create the protocol of one connection; `early` is asked before the application, the rest is the base's."""
        super().__init__(*args, **kwargs)
        self._early = early
        self._is_rejected = False  # the request whose body is arriving
        self._rejection_lines = b""
        self._held_back: asyncio.TimerHandle | None = None  # until it fires, they are not written
        self._is_pausing = False  # the next request is not parsed before the connection's turn
        self._parsed_from_s = 0.0

    def on_headers_complete(self) -> None:
        """Reject the request, at once or after a delay, or pass it on."""
        is_sound = has_one_host(self.headers, self.parser.get_http_version())  # otherwise the base refuses it
        answer = self._rejection() if is_sound else None
        if answer is None:
            super().on_headers_complete()
            return
        self._begin_body()
        self._is_rejected = True
        defaults = b"".join(b"%b: %b\r\n" % header for header in self.server_state.default_headers)
        self._rejection_lines = STATUS_LINE + defaults + answer
        if pause_s := self._early.charge(time.thread_time() - self._parsed_from_s):
            self._connections.mark_answering(self)  # not idle while its rejection is held back
            self._held_back = self.loop.call_later(pause_s, self._reject)
        else:
            self._reject()

    def eof_received(self) -> bool:  # type: ignore[override] # as its base
        """Send a held-back rejection at once: the client sends no more requests."""
        self._flush()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop a held-back rejection."""
        if self._held_back is not None:
            self._held_back.cancel()
            self._held_back = None
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Send a held-back rejection, then shut down."""
        self._flush()
        super().shutdown()

    def on_body(self, body: bytes) -> None:
        """Discard the body of a rejected request."""
        if not self._is_rejected:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Prepare for the next head."""
        if not self._is_rejected:
            super().on_message_complete()
            return
        self._is_rejected = False
        self._await_head()
        self._is_pausing = True
        if self._held_back is None:
            self._await_turn()

    def on_response_complete(self) -> None:
        """Release the place of the answered request, if it has one."""
        self._early.forget(self.scope)  # type: ignore[arg-type] # as below
        super().on_response_complete()

    @property
    def _must_wait(self) -> bool:
        return self._is_pausing or super()._must_wait

    def _parse(self) -> None:
        self._parsed_from_s = time.thread_time()
        super()._parse()

    def _flush(self) -> None:
        if self._held_back is not None:
            self._held_back.cancel()
            self._reject()

    def _reject(self) -> None:
        if self._held_back is not None:
            self._held_back = None
            self._connections.mark_waiting(self)
        if self.transport.is_closing():
            return
        self.transport.write(self._rejection_lines)
        if self._is_pausing:
            self._await_turn()

    def _await_turn(self) -> None:
        """Yield to the other connections before the next request: a client may send thousands at once."""
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._is_pausing = False
        if not self.transport.is_closing():
            self._resume_parsing()

    def _rejection(self) -> bytes | None:
        # The application handles a client that does not read its answers.
        if self.flow.write_paused or self.parser.get_method() != b"POST":
            return None
        if self.parser.get_http_version() != "1.1" or not self.parser.should_keep_alive():
            return None
        return self._early.answer(self.url, self.headers, self.scope)  # type: ignore[arg-type] # uvicorn's scope is a dict
