"""OpenTelemetry traces: a span for each request, and child spans for its stages, made once their times are known.

The only module that imports opentelemetry; itself imported only where traces are asked for. The standard OTEL_
variables set the sampling, the name of the service and the exporters.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import entry_points, version
from uuid import uuid4

from opentelemetry.context import Context
from opentelemetry.propagate import get_global_textmap
from opentelemetry.sdk.resources import (
    SERVICE_INSTANCE_ID,
    SERVICE_NAME,
    SERVICE_VERSION,
    OTELResourceDetector,
    Resource,
)
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, get_current_span, set_span_in_context

from service.telemetry.logs import TRACE_ID, Fields
from service.telemetry.stages import Outcome, Stage

PREFIX = "supervit."  # of attributes outside the conventions
DEFAULT_SERVICE_NAME = "supervit-serve"
EXPORTERS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}  # entry points, by protocol
ROOT = Context()
UNSAMPLED = re.compile(rb"00-((?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f][02468ace]")  # W3C Trace Context

Headers = Iterable[tuple[bytes, bytes]]


class RequestTrace:
    """The span of one recorded request, open until `end`."""

    def __init__(self, span: Span, tracer: Tracer, offset_ns: int) -> None:
        """Wrap a span that `RequestTracer.begin` has started."""
        self._span, self._tracer, self._offset_ns = span, tracer, offset_ns
        self._context = span.get_span_context()
        self.trace_id = f"{self._context.trace_id:032x}"

    @property
    def response(self) -> str:
        """The value of the `traceresponse` header, with which the client finds the span."""
        return f"00-{self.trace_id}-{self._context.span_id:016x}-{self._context.trace_flags & 3:02x}"

    def end(self, ended_at: float, outcome: Outcome, stages: Sequence[Stage], fields: Fields) -> None:
        """Complete and end the span; the exporter sends it from its own thread.

        Args:
            ended_at: instant of the end, on the monotonic clock, in seconds.
            outcome: outcome of the request.
            stages: stages of the request, each of which becomes a span.
            fields: further attributes, outside the conventions.
        """
        self._span.update_name(outcome.name)
        self._span.set_attributes({**outcome.attributes, **_prefixed(fields)})
        if outcome.error is not None:
            self._span.set_attribute("error.type", outcome.error)
        if outcome.is_failure:
            self._span.set_status(Status(StatusCode.ERROR))
        self._add(stages, self._span)
        self._span.end(self._ns(ended_at))

    def _add(self, stages: Sequence[Stage], parent: Span) -> None:
        context = set_span_in_context(parent, ROOT)
        for name, began_at, ended_at, fields, parts in stages:
            span = self._tracer.start_span(name, context, attributes=_prefixed(fields), start_time=self._ns(began_at))
            if parts:
                self._add(parts, span)
            span.end(self._ns(ended_at))

    def _ns(self, at: float) -> int:
        return round(1e9 * at) + self._offset_ns


class RequestTracer:
    """Begins a trace for each request, or continues the one that the request is part of."""

    def __init__(
        self,
        processors: Sequence[SpanProcessor],
        *,
        share: float | None = 1.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Create a tracer.

        Args:
            processors: receive each span once it has ended.
            share: recorded share, 0..1, of the requests that are part of no trace; for others, their callers decide.
                None leaves all decisions to the sampler that OTEL_TRACES_SAMPLER names, at some 10 us per request.
            clock: monotonic, in seconds; the clock of arrival times.
            wall_clock_ns: nanoseconds since 1970.
        """
        identity = {
            SERVICE_NAME: DEFAULT_SERVICE_NAME,
            SERVICE_VERSION: version("supervit-serve"),
            SERVICE_INSTANCE_ID: str(uuid4()),
        }
        self._provider = TracerProvider(
            None if share is None else ParentBased(ALWAYS_ON),  # `begin` starts no span that is not recorded
            Resource.create(identity).merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
        )
        for processor in processors:
            self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("supervit", version("supervit-serve"))
        self._propagator = get_global_textmap()
        self._names = frozenset(name.encode() for name in self._propagator.fields)
        self._share, self._clock, self._wall_clock_ns = share, clock, wall_clock_ns

    def begin(self, name: str, headers: Headers, arrived_at: float) -> RequestTrace | None:
        """Start the span of a request if it is recorded, and set the trace ID of the log.

        Args:
            name: name for the sampler; `end` may set a more exact one.
            headers: headers of the request, or metadata of a gRPC call, names in lower case; `traceparent` is read.
            arrived_at: instant of arrival, on the monotonic clock, in seconds.

        Returns:
            The trace; None if the request is not recorded.
        """
        brought = [header for header in headers if header[0] in self._names]
        if self._share is not None and (unsampled := _unsampled_trace(brought)):
            TRACE_ID.set(unsampled)
            return None
        parent = self._propagator.extract(_by_name(brought), ROOT) if brought else ROOT
        is_first = not (brought and get_current_span(parent).get_span_context().is_valid)
        if self._share is not None and is_first and random.random() >= self._share:
            return None
        # Computed for each request: the wall clock may be set while the server runs.
        offset_ns = self._wall_clock_ns() - round(1e9 * self._clock())
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, start_time=round(1e9 * arrived_at) + offset_ns)
        trace = RequestTrace(span, self._tracer, offset_ns)
        TRACE_ID.set(trace.trace_id)
        return trace if span.is_recording() else None

    def close(self, within_s: float) -> None:
        """Send the remaining spans; drop those that cannot be sent in time."""
        # A daemon thread: a collector that does not answer must not keep the process alive.
        flushing = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        flushing.start()
        flushing.join(within_s)


def open_tracer(environment: Mapping[str, str]) -> RequestTracer:
    """Create a tracer with the exporters that the OTEL_ variables name; each sends batches from its own thread.

    Raises:
        ModuleNotFoundError: an exporter that the variables name is not installed.
        ValueError: a variable has a value that OpenTelemetry does not accept.
    """
    share = _share(environment)
    names = (environment.get("OTEL_TRACES_EXPORTER") or "otlp").split(",")
    exporters = [_exporter(name.strip(), environment) for name in names]
    return RequestTracer(list(map(BatchSpanProcessor, exporters)), share=share)


def _share(environment: Mapping[str, str]) -> float | None:
    """Return the share of requests without a trace that a standard sampler records; None for other samplers."""
    name = (environment.get("OTEL_TRACES_SAMPLER") or "parentbased_always_on").strip().lower()
    if name != "parentbased_traceidratio":
        return {"parentbased_always_on": 1.0, "parentbased_always_off": 0.0}.get(name)
    share = float(environment.get("OTEL_TRACES_SAMPLER_ARG") or 1)
    if not 0 <= share <= 1:
        raise ValueError("OTEL_TRACES_SAMPLER_ARG must be from 0 to 1")
    return share


def _exporter(name: str, environment: Mapping[str, str]) -> SpanExporter:
    """Create the exporter of a name in OTEL_TRACES_EXPORTER; it reads its settings from its own variables."""
    if name == "otlp":
        variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        protocol = next(filter(None, map(environment.get, variables)), "http/protobuf")
        name = EXPORTERS.get(protocol, protocol)
    for found in entry_points(group="opentelemetry_traces_exporter", name=name):
        exporter: SpanExporter = found.load()()
        return exporter
    raise ModuleNotFoundError(f"the OpenTelemetry exporter {name!r} is not installed")


def _unsampled_trace(headers: Headers) -> str | None:
    """Return the ID of the request's trace if the caller does not record it, as is usual; None otherwise."""
    for name, value in headers:
        if name == b"traceparent" and (found := UNSAMPLED.fullmatch(value)):
            return found[1].decode()
    return None


def _by_name(headers: Headers) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in headers:
        found.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
    return found


def _prefixed(fields: Fields) -> Fields:
    return {f"{PREFIX}{name}": value for name, value in fields.items()}
