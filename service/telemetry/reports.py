"""What is told of each request once it has its answer: a line of the log, where that is wanted, and spans of a trace.

Knows no wire: HTTP and gRPC each say how a request is called and how it ended.
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
from service.telemetry.sparing_log import SparingLog
from service.telemetry.stages import Outcome, fields_of, stages_of

if TYPE_CHECKING:  # it imports opentelemetry, which is needed only where traces are asked for
    from service.telemetry.tracing import RequestTrace, RequestTracer

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


@dataclass(slots=True)
class RequestReport:
    """What becomes of a request, noted while it does.

    Attributes:
        arrived_at: on the monotonic clock, in seconds.
        trace: its own; None where it is not recorded.
        answers: to its images.
        error_code: of what went wrong last; None where nothing did.
    """

    arrived_at: float
    trace: "RequestTrace | None" = None
    answers: list[Classification] = field(default_factory=list)
    error_code: str | None = None

    @property
    def exemplar(self) -> dict[str, str] | None:
        """What leads from a count to the trace of this request, where there is one."""
        return None if self.trace is None else {"trace_id": self.trace.trace_id}


# On the request that the task at work is about, and the tasks that it has begun.
_CURRENT: ContextVar[RequestReport | None] = ContextVar("report", default=None)


def current_report() -> RequestReport | None:
    """Return the report on the request that this task is about; None where none is wanted."""
    return _CURRENT.get()


def note_error(code: str) -> None:
    """Note what the request at hand fails of; the last word counts."""
    report = _CURRENT.get()
    if report is not None:
        report.error_code = code


class Reporter:
    """Begins a report for each request, and tells it when it ends."""

    def __init__(
        self,
        tracer: "RequestTracer | None" = None,
        *,
        logs_requests: bool = False,
        log: logging.Logger = logger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take where it is told.

        Args:
            tracer: of requests; None where they are not traced.
            logs_requests: whether each gets a line of the log.
            log: that gets it.
            clock: monotonic, in seconds; the one that requests are stamped by.
        """
        self._tracer, self._logs_requests, self._log = tracer, logs_requests, log
        self._sparing, self._clock = SparingLog(log, clock=clock), clock

    def begin(
        self, name: str, headers: Iterable[tuple[bytes, bytes]], arrived_at: float | None, *, is_traced: bool = True
    ) -> RequestReport:
        """Begin to report on the request that the running task is about.

        Args:
            name: of its kind.
            headers: or metadata, names in lower case, in which the trace is named that it is part of.
            arrived_at: on the monotonic clock, in seconds; None for now.
            is_traced: whether it is worth a span.
        """
        arrived_at = self._clock() if arrived_at is None else arrived_at
        TRACE_ID.set(None)
        trace = self._tracer.begin(name, headers, arrived_at) if is_traced and self._tracer is not None else None
        report = RequestReport(arrived_at, trace)
        _CURRENT.set(report)
        return report

    def end(self, report: RequestReport, describe: Callable[[], Outcome]) -> None:
        """Tell what became of a request, as its wire describes it where that is wanted."""
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
            self._log.info("%s", outcome.line, extra={"fields": {"duration_ms": took_ms, **fields, **failed}})

    def rejected(self) -> None:
        """Tell of a request that was rejected for overload; sparingly, for those come by the thousand."""
        if self._logs_requests:
            self._sparing.warning("a request was rejected for overload")


def find_tracer(environment: Mapping[str, str]) -> "RequestTracer | None":
    """Make what traces requests, if the standard OTEL_ variables ask for it.

    Raises:
        InvalidParameterError: one of them holds what OpenTelemetry does not take.
    """
    if not _asks_for_traces(environment):
        return None
    try:
        from service.telemetry.tracing import open_tracer

        return open_tracer(environment)
    except ModuleNotFoundError as error:
        logger.warning("OTEL_ variables ask for traces; install the extra otel, pip install '.[otel]': %s", error)
    except ValueError as error:
        raise InvalidParameterError("an OTEL_ variable holds what OpenTelemetry does not take") from error
    return None


def _asks_for_traces(environment: Mapping[str, str]) -> bool:
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if exporter := environment.get("OTEL_TRACES_EXPORTER"):
        return exporter != "none"
    return any(environment.get(name) for name in ENDPOINTS)
