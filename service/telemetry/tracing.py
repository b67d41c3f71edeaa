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
from service.telemetry.stages import Stage

PREFIX = "supervit."  # of attributes that no convention names
DEFAULT_SERVICE_NAME = "supervit-serve"
EXPORTERS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}  # their entry points, by protocol
ROOT = Context()

Headers = Iterable[tuple[bytes, bytes]]


class RequestTrace:
    """The span of one request, open until `end`.

    Attributes:
        trace_id: 32 hexadecimal digits.
        is_recorded: whether it was sampled.
        response: the value of a `traceresponse` header, by which the client finds it.
    """

    def __init__(self, span: Span, tracer: Tracer, offset_ns: int) -> None:
        """Take what `RequestTracer.begin` has made."""
        self._span, self._tracer, self._offset_ns = span, tracer, offset_ns
        context = span.get_span_context()
        self.trace_id, self.is_recorded = f"{context.trace_id:032x}", span.is_recording()
        self.response = f"00-{self.trace_id}-{context.span_id:016x}-{context.trace_flags & 3:02x}".encode()

    def end(
        self,
        name: str,
        ended_at: float,
        *,
        stages: Sequence[Stage] = (),
        attributes: Mapping[str, str | bool | int | float] | None = None,
        fields: Fields | None = None,
        is_failure: bool = False,
    ) -> None:
        """Say all that is known by now, and hand it to the exporter, which sends it from a thread of its own.

        Args:
            name: of the operation, few different ones.
            ended_at: on the monotonic clock, in seconds; so are the stages' instants.
            stages: become spans of their own.
            attributes: by the names of conventions.
            fields: by names of our own.
            is_failure: whether the server did not do its part.
        """
        self._span.update_name(name)
        self._span.set_attributes({**(attributes or {}), **_prefixed(fields or {})})
        if is_failure:
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
    return RequestTracer([BatchSpanProcessor(_exporter(name.strip(), environment)) for name in names])


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
