"""Reports each finished request: as a line of the log, where that is enabled, and as spans of a trace.

Independent of the protocol: HTTP and gRPC each supply the name of a request and its outcome.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.domain import Classification
from service.errors import InvalidParameterError, OverloadedError
from service.telemetry.logs import TRACE_ID
from service.telemetry.rate_limited_log import RateLimitedLog
from service.telemetry.stages import Outcome, fields_of, stages_of

if TYPE_CHECKING:  # it imports opentelemetry, which is needed only where traces are asked for
    from service.telemetry.tracing import RequestTrace, RequestTracer

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


@dataclass(slots=True)
class RequestReport:
    """The course of a request, recorded while the request runs.

    Attributes:
        arrived_at: instant of arrival, on the monotonic clock, in seconds.
        trace: trace of the request; None where it is not recorded.
        answers: answers to the images of the request.
        error_code: code of the last error; None without an error.
    """

    arrived_at: float
    trace: "RequestTrace | None" = None
    answers: list[Classification] = field(default_factory=list)
    error_code: str | None = None

    @property
    def exemplar(self) -> dict[str, str] | None:
        """Labels that link a metric to the trace of this request; None without a trace."""
        return None if self.trace is None else {"trace_id": self.trace.trace_id}


# The report on the request of the running task and of the tasks that it has started.
_CURRENT: ContextVar[RequestReport | None] = ContextVar("report", default=None)


def current_report() -> RequestReport | None:
    """Return the report on the request of the running task; None if there is none."""
    return _CURRENT.get()


def note_error(code: str) -> None:
    """Record the error code of the current request; the last one counts."""
    report = _CURRENT.get()
    if report is not None:
        report.error_code = code


class Reporter:
    """Begins a report on each request, and writes it when the request ends."""

    def __init__(
        self,
        tracer: "RequestTracer | None" = None,
        *,
        logs_requests: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a reporter from its outputs.

        Args:
            tracer: tracer of requests; None if requests are not traced.
            logs_requests: whether each request gets a line of the log.
            clock: monotonic, in seconds; the clock of arrival times.
        """
        self._tracer, self._logs_requests, self._clock = tracer, logs_requests, clock
        self._rate_limited = RateLimitedLog(logger, clock=clock)

    def begin(
        self, name: str, headers: Iterable[tuple[bytes, bytes]], arrived_at: float | None, *, is_traced: bool = True
    ) -> RequestReport:
        """Begin the report on the request of the running task.

        Args:
            name: name of the span, until `end` sets a more exact one.
            headers: headers or gRPC metadata, names in lower case, which may name the trace of the request.
            arrived_at: instant of arrival, on the monotonic clock, in seconds; None for now.
            is_traced: whether the request is worth a span.
        """
        arrived_at = self._clock() if arrived_at is None else arrived_at
        TRACE_ID.set(None)
        trace = self._tracer.begin(name, headers, arrived_at) if is_traced and self._tracer is not None else None
        report = RequestReport(arrived_at, trace)
        _CURRENT.set(report)
        return report

    def end(self, report: RequestReport, describe: Callable[[], Outcome]) -> None:
        """End the report and write it; `describe` returns the outcome, and is called only if something is written."""
        _CURRENT.set(None)
        trace = report.trace
        if trace is None and not self._logs_requests:
            return
        ended_at, outcome, fields = self._clock(), describe(), fields_of(report.answers)
        if trace is not None:
            trace.end(ended_at, outcome, stages_of(report.answers, report.arrived_at), fields)
        if outcome.error == OverloadedError.code:
            self.rejected()
        elif self._logs_requests:
            failed = {} if outcome.error is None else {"error": outcome.error}
            took_ms = round(1000 * (ended_at - report.arrived_at), 3)
            logger.info("%s", outcome.line, extra={"fields": {"duration_ms": took_ms, **fields, **failed}})

    def rejected(self) -> None:
        """Log that a request was rejected for overload; rate-limited, because thousands may be rejected."""
        if self._logs_requests:
            self._rate_limited.warning("a request was rejected for overload")


def find_tracer(environment: Mapping[str, str]) -> "RequestTracer | None":
    """Create a tracer of requests if the standard OTEL_ variables ask for traces and the extra `otel` is installed.

    Raises:
        InvalidParameterError: one of the variables has a value that OpenTelemetry does not accept.
    """
    if not _asks_for_traces(environment):
        return None
    try:
        from service.telemetry.tracing import open_tracer

        return open_tracer(environment)
    except ModuleNotFoundError as error:
        logger.warning("OTEL_ variables enable traces; install the extra otel, pip install '.[otel]': %s", error)
    except ValueError as error:
        raise InvalidParameterError("an OTEL_ variable has a value that OpenTelemetry does not accept") from error
    return None


def _asks_for_traces(environment: Mapping[str, str]) -> bool:
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if exporter := environment.get("OTEL_TRACES_EXPORTER"):
        return exporter != "none"
    return any(environment.get(name) for name in ENDPOINTS)
