"""What is rejected for overload is rejected as soon as its head is parsed, without the application's layers.

The event loop is one thread. A server that spent on a rejection what it spends on an answer would answer the fewer the
more is asked of it.
"""

from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

from service.errors import OverloadedError, ServiceError
from service.http.context import RouteContext
from service.http.error_responses import describe_error, make_error_response
from service.http.forms import UNTYPED
from service.http.protocol import ARRIVED_AT, BoundedProtocol
from service.http.queries import ClassifyQuery, parse_query
from service.http.request_ids import RAW_HEADER, name_request

# With these the route or another layer has a say: in how the body comes, or in which pages may ask.
ROUTED = frozenset((b"transfer-encoding", b"expect", b"origin", b"content-encoding"))
STATUS_LINE = b"HTTP/1.1 429 Too Many Requests\r\n"
REPEATED_S = 0.005  # for which a rejection holds for others
RESERVED = "supervit.reserved"  # of the scope: what the pipeline returned
PLAIN_TYPES = frozenset(media_type.encode() for media_type in UNTYPED)


Headers = dict[bytes, bytes]  # by their names in lower case
Scope = MutableMapping[str, Any]


class _Repeated(NamedTuple):
    """A rejection that holds for every request that asks the same and has no more time left."""

    parameters: ClassifyQuery
    arrived_before: float  # one that came later may have time enough
    until: float  # what waits may be less by then
    error: OverloadedError
    lines: bytes

    def holds_for(self, parameters: ClassifyQuery, arrived_at: float, now: float) -> bool:
        """Tell whether another request would be rejected as well."""
        return parameters is self.parameters and arrived_at <= self.arrived_before and now <= self.until


class EarlyRejection:
    """Answers what POST /classify would reject for overload."""

    def __init__(self, context: RouteContext, path: str) -> None:
        """Take what the route calls upon, and its path."""
        self._context, self._path = context, path.encode()
        self._last: _Repeated | None = None

    def answer(self, url: bytes, headers: Headers, scope: Scope) -> bytes | None:
        """Return what follows the status line of a rejection; None for the app, which finds in the scope its place.

        Args:
            url: path and query, of a POST.
            headers: of it.
            scope: of the request, as the protocol began it.
        """
        path, _, query = url.partition(b"?")
        if path != self._path or not self._is_plain(headers):
            return None
        try:
            parameters, pipeline = parse_query(query), self._context.open_server().pipeline
            last, arrived_at, now = self._last, scope[ARRIVED_AT], self._context.clock()
            if last is None or not last.holds_for(parameters, arrived_at, now):
                scope[RESERVED] = pipeline.reserve(parameters.request(arrived_at, parameters.top_k))
                return None
            pipeline.reject_again(last.error)
        except OverloadedError as error:
            lines = _describe(error)
            last = _Repeated(parameters, arrived_at + error.late_s, now + REPEATED_S, error, lines)
            self._last = last
        except ServiceError:  # the route says so
            return None
        metrics = self._context.metrics
        metrics.request_started()
        metrics.request_finished(last.error.code, last.error.reason)
        return last.lines % name_request(headers.get(RAW_HEADER, b""))

    def _is_plain(self, headers: Headers) -> bool:
        """Tell whether the body is an image by itself that the route would read; a form may grant more time."""
        media_type = headers.get(b"content-type", b"")
        if not ROUTED.isdisjoint(headers) or not (media_type.startswith(b"image/") or media_type in PLAIN_TYPES):
            return False
        return int(headers.get(b"content-length", b"0")) <= self._context.max_body_bytes


def _describe(error: OverloadedError) -> bytes:
    """Put a rejection's headers and body on the wire, with a place for the request's name."""
    response = make_error_response(*describe_error(error, {}))
    head = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
    answer = b"%b%b: %%b\r\n\r\n%b"
    return answer % (head.replace(b"%", b"%%"), RAW_HEADER, bytes(response.body).replace(b"%", b"%%"))


class RejectingProtocol(BoundedProtocol):
    """Rejects by itself what the application need not be asked about."""

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 - uvicorn's to say
        reject: Callable[[bytes, Headers, Scope], bytes | None],
        **kwargs: Any,  # noqa: ANN401 - as above
    ) -> None:
        """Take what is asked before the application is, as EarlyRejection's `answer`; the others as its base."""
        super().__init__(*args, **kwargs)
        self._reject = reject
        self._is_rejected = False  # the request whose body comes

    def on_headers_complete(self) -> None:
        """Reject the request or let it come."""
        answer = self._rejection()
        if answer is None:
            super().on_headers_complete()
            return
        self._begin_body()
        self._is_rejected = True
        defaults = b"".join(b"%b: %b\r\n" % header for header in self.server_state.default_headers)
        self.transport.write(STATUS_LINE + defaults + answer)

    def on_body(self, body: bytes) -> None:
        """Throw away the body of a request that has its answer."""
        if not self._is_rejected:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Look out for the next head."""
        if not self._is_rejected:
            super().on_message_complete()
            return
        self._is_rejected = False
        self._await_head()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _rejection(self) -> bytes | None:
        # The log of accesses is the application's; so is to wait for a client that does not read.
        if self.access_log or self.flow.write_paused or self.parser.get_method() != b"POST":
            return None
        if self.parser.get_http_version() != "1.1" or not self.parser.should_keep_alive():
            return None
        return self._reject(self.url, dict(self.headers), self.scope)  # type: ignore[arg-type] # one
