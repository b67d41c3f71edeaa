"""A report on each request that reaches the application, with the facts of HTTP, for the log and for traces."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ServiceError
from service.http.protocol import ARRIVED_AT
from service.request_parameters import ClassifyQuery
from service.telemetry.logs import REQUEST_ID, Fields
from service.telemetry.reports import Reporter
from service.telemetry.stages import Outcome

HEADER = "traceresponse"  # of W3C's Trace Context, level 2


class RequestReports:
    """Middleware that begins a report on a request, to which the layers below add, and ends it with the answer.

    A POST is traced, and the answer to a sampled one names its span. Other methods, such as probes use, are not traced.
    """

    def __init__(self, app: ASGIApp, reporter: Reporter) -> None:
        """Create the middleware."""
        self._app, self._reporter = app, reporter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and report on it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, arrived_at = scope["method"], scope.get(ARRIVED_AT)
        report = self._reporter.begin(method, scope["headers"], arrived_at, is_traced=method == "POST")
        status = 500  # until an answer begins
        error: str | None = None

        async def send_noted(message: Message) -> None:
            nonlocal status, error
            if message["type"] == "http.response.start":
                status, error = message["status"], report.error_code  # errors noted later are another request's
                if report.trace is not None:
                    named = (HEADER.encode(), report.trace.response.encode())
                    message["headers"] = [*message["headers"], named]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception:  # a bug may raise anything; it is recorded and raised again
            error = ServiceError.code
            raise
        finally:
            self._reporter.end(report, lambda: _describe(scope, status, error))


def _is_known(parameter: str) -> bool:
    """Return whether a part of a query is a parameter of this server; any other may be a secret."""
    return parameter.partition("=")[0] in ClassifyQuery.model_fields


def _describe(scope: Scope, status: int, error: str | None) -> Outcome:
    """Describe a request by OpenTelemetry's conventions for HTTP servers."""
    method, path = scope["method"], scope["path"]
    attributes: Fields = {
        "http.request.method": method,
        "http.response.status_code": status,
        "url.path": path,
        "url.scheme": scope["scheme"],
        "network.protocol.version": scope["http_version"],
    }
    # Only of a route that exists: clients can invent any number of paths.
    if route := getattr(scope.get("route"), "path", None):
        attributes["http.route"] = route
    if query := "&".join(filter(_is_known, scope["query_string"].decode("latin-1").split("&"))):
        attributes["url.query"] = query
    if scope["client"]:
        attributes["client.address"] = scope["client"][0]
    if request_id := REQUEST_ID.get():
        attributes["supervit.request_id"] = request_id
    return Outcome(
        f"{method} {path} {status}",
        f"{method} {route}" if route else method,
        attributes,
        error if status >= 400 else None,  # otherwise the error is of one of several images
        is_failure=status >= 500,  # by the conventions, a client's error is no failure of the server
    )
