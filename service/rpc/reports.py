"""Reports on each request over gRPC, for the log and for traces."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from service.rpc.calls import Call
from service.rpc.statuses import CODE, Failure
from service.telemetry.logs import REQUEST_ID, Fields
from service.telemetry.reports import Reporter
from service.telemetry.stages import Outcome

TRACE_RESPONSE = "traceresponse"  # of W3C's Trace Context, level 2
CANCELLED = Failure(grpc.StatusCode.CANCELLED, "the call was cancelled", ((CODE, "client_gone"),))


@dataclass(slots=True)
class Ending:
    """How a request ends, and trailing metadata for its client.

    Attributes:
        failure: why the request failed; None if it was answered.
        metadata: names the span of the request, if that is traced.
    """

    failure: Failure | None = CANCELLED
    metadata: tuple[tuple[str, str], ...] = ()


class CallReports:
    """Begins a report for a request, and ends it with its answer."""

    def __init__(self, reporter: Reporter | None) -> None:
        """Create the reports; without a reporter, nothing is reported."""
        self._reporter = reporter

    @contextmanager
    def reporting(self, name: str, call: Call, *, is_traced: bool = True) -> Iterator[Ending]:
        """Report on a call until the block ends; unless the ending says otherwise, the client has left.

        Args:
            name: the service and the method, with a slash between them.
            call: the call to report on.
            is_traced: whether the call gets a span.
        """
        REQUEST_ID.set(call.request_id)
        ending = Ending()
        if self._reporter is None:
            yield ending
            return
        headers = [(name.encode(), value.encode()) for name, value in call.metadata.items()]
        report = self._reporter.begin(name, headers, call.arrived_at, is_traced=is_traced)
        if report.trace is not None:
            ending.metadata = ((TRACE_RESPONSE, report.trace.response),)
        try:
            yield ending
        finally:
            self._reporter.end(report, lambda: _describe(name, call, ending.failure))


def _describe(name: str, call: Call, failure: Failure | None) -> Outcome:
    """Describe a request by OpenTelemetry's conventions for gRPC servers."""
    status = grpc.StatusCode.OK if failure is None else failure.status
    service, _, method = name.rpartition("/")
    attributes: Fields = {
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": method,
        "rpc.grpc.status_code": status.value[0],
        "supervit.request_id": call.request_id,
    }
    if call.address is not None:
        attributes["client.address"] = call.address
    error = None if failure is None else dict(failure.metadata)[CODE]
    is_failure = status in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return Outcome(f"{name} {status.name}", name, attributes, error, is_failure)
