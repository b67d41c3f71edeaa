"""Traces by OpenTelemetry: a span for each request, and one for each of its stages, made once their times are known.

The one door of opentelemetry, imported only where traces are asked for. What is sampled, how the service is called and
where spans go, the standard OTEL_ variables say.
"""

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
from opentelemetry.sdk.trace.sampling import Sampler
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from service.telemetry.logs import Fields
from service.telemetry.stages import Outcome, Stage

PREFIX = "supervit."  # of attributes that no convention names
DEFAULT_SERVICE_NAME = "supervit-serve"
EXPORTERS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}  # their entry points, by protocol
ROOT = Context()

Headers = Iterable[tuple[bytes, bytes]]


class RequestTrace:
    """The span of one request, open until `end`.

    Attributes:
        trace_id: a number of 128 bits.
        is_recorded: whether it was sampled; if not, there is nothing to end.
    """

    def __init__(self, span: Span, tracer: Tracer, offset_ns: int) -> None:
        """Take what `RequestTracer.begin` has made."""
        self._span, self._tracer, self._offset_ns = span, tracer, offset_ns
        self._context = span.get_span_context()
        self.trace_id, self.is_recorded = self._context.trace_id, span.is_recording()

    @property
    def response(self) -> str:
        """The value of a `traceresponse` header, by which the client finds the span."""
        return f"00-{self.trace_id:032x}-{self._context.span_id:016x}-{self._context.trace_flags & 3:02x}"

    def end(self, ended_at: float, outcome: Outcome, stages: Sequence[Stage], fields: Fields) -> None:
        """Say all that is known by now, and hand it to the exporter, which sends it from a thread of its own.

        Args:
            ended_at: on the monotonic clock, in seconds.
            outcome: of the request.
            stages: become spans of their own.
            fields: what is told by names of our own.
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
    """Begins a trace for each request, or goes on with the one that the request is part of."""

    def __init__(
        self,
        processors: Sequence[SpanProcessor],
        *,
        sampler: Sampler | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Take where spans go.

        Args:
            processors: get each span once it has ended.
            sampler: decides which requests are recorded; OTEL_TRACES_SAMPLER by default.
            clock: monotonic, in seconds; the one that requests are stamped by.
            wall_clock_ns: nanoseconds since 1970.
        """
        resource = Resource.create(
            {
                SERVICE_NAME: DEFAULT_SERVICE_NAME,
                SERVICE_VERSION: version("supervit-serve"),
                SERVICE_INSTANCE_ID: str(uuid4()),
            }
        ).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        for processor in processors:
            self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("supervit", version("supervit-serve"))
        self._propagator = get_global_textmap()
        self._names = frozenset(name.encode() for name in self._propagator.fields)
        self._clock, self._wall_clock_ns = clock, wall_clock_ns

    def begin(self, name: str, headers: Headers, arrived_at: float) -> RequestTrace:
        """Open the span of a request.

        Args:
            name: for the sampler; `end` may say it more exactly.
            headers: of the request, or a gRPC call's metadata, names in lower case; `traceparent` is looked for.
            arrived_at: on the monotonic clock, in seconds.
        """
        # Once for each request, not once for all: the wall clock may be set while the server runs.
        offset_ns = self._wall_clock_ns() - round(1e9 * self._clock())
        brought: dict[str, list[str]] = {}
        for header, value in headers:
            if header in self._names:
                brought.setdefault(header.decode("latin-1"), []).append(value.decode("latin-1"))
        parent = self._propagator.extract(brought, ROOT) if brought else ROOT
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, start_time=round(1e9 * arrived_at) + offset_ns)
        return RequestTrace(span, self._tracer, offset_ns)

    def close(self, within_s: float) -> None:
        """Send what is left; give up what cannot be sent in time."""
        # A daemon, so that a collector that does not answer keeps no process alive.
        flushing = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        flushing.start()
        flushing.join(within_s)


def open_tracer(environment: Mapping[str, str]) -> RequestTracer:
    """Make what sends spans where the OTEL_ variables say, in batches from a thread of its own.

    Raises:
        ModuleNotFoundError: an exporter that is asked for is not installed.
        ValueError: a variable holds what OpenTelemetry does not take.
    """
    names = (environment.get("OTEL_TRACES_EXPORTER") or "otlp").split(",")
    exporters = [_exporter(name.strip(), environment) for name in names]
    return RequestTracer(list(map(BatchSpanProcessor, exporters)))


def _exporter(name: str, environment: Mapping[str, str]) -> SpanExporter:
    """Make the exporter that a name of OTEL_TRACES_EXPORTER stands for; its own variables tell it the rest."""
    if name == "otlp":
        variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        protocol = next(filter(None, map(environment.get, variables)), "http/protobuf")
        name = EXPORTERS.get(protocol, protocol)
    for found in entry_points(group="opentelemetry_traces_exporter", name=name):
        exporter: SpanExporter = found.load()()
        return exporter
    raise ModuleNotFoundError(f"no exporter {name!r} of OpenTelemetry is installed")


def _prefixed(fields: Fields) -> Fields:
    return {f"{PREFIX}{name}": value for name, value in fields.items()}
