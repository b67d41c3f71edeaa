"""A report on each request that reaches the application: what HTTP knows of it, for the log and for traces."""

from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ServiceError
from service.http.protocol import ARRIVED_AT
from service.telemetry.logs import REQUEST_ID
from service.telemetry.reports import Reporter, RequestReport

HEADER = "traceresponse"  # of W3C's Trace Context, level 2
REPORT = "supervit.report"  # of the scope


class RequestReports:
    """Middleware that begins a report, which those below add to, and ends it with the answer.

    A POST is traced, and its answer names the trace. What only looks at the server, as probes do, is logged alone.
    """

    def __init__(self, app: ASGIApp, reporter: Reporter) -> None:
        """Take what every request goes to, and what is told of it."""
        self._app, self._reporter = app, reporter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, and report."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, headers, arrived_at = scope["method"], scope["headers"], scope.get(ARRIVED_AT)
        report = self._reporter.begin(method, headers, arrived_at, is_traced=method == "POST")
        scope[REPORT] = report
        named = [] if report.trace is None else [(HEADER.encode(), report.trace.response)]
        status = 500  # unless an answer begins

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *named]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception:
            note_error(scope, ServiceError.code)
            raise
        finally:
            self._reporter.end(
                report,
                f"{method} {scope['path']} {status}",
                f"{method} {_route(scope)}".rstrip(),
                lambda: _attributes(scope, status),
                error=report.error_code if status >= 400 else None,
                is_failure=status >= 500,  # by the conventions, what a client did wrong is no failure of a server
            )


def report_of(scope: Scope) -> RequestReport | None:
    """Return the report on a request, where there is one."""
    report: RequestReport | None = scope.get(REPORT)
    return report


def note_error(scope: Mapping[str, Any], code: str) -> None:
    """Note what a request fails of; the last word counts."""
    report: RequestReport | None = scope.get(REPORT)
    if report is not None:
        report.error_code = code


def _route(scope: Scope) -> str:
    """Return the path as the route has it, or nothing: paths that clients make up are without number."""
    return getattr(scope.get("route"), "path", "")


def _attributes(scope: Scope, status: int) -> dict[str, str | int]:
    """Describe a request by OpenTelemetry's conventions for servers of HTTP."""
    described: dict[str, str | int] = {
        "http.request.method": scope["method"],
        "http.response.status_code": status,
        "url.path": scope["path"],
        "url.scheme": scope["scheme"],
        "network.protocol.version": scope["http_version"],
    }
    if route := _route(scope):
        described["http.route"] = route
    if query := scope["query_string"]:
        described["url.query"] = query.decode("latin-1")
    if scope["client"]:
        described["client.address"] = scope["client"][0]
    if request_id := REQUEST_ID.get():
        described["supervit.request_id"] = request_id
    return described
