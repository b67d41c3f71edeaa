"""Traces by OpenTelemetry: a span for each request, and one for each of its stages, made once their times are known.

The one door of opentelemetry, imported only where traces are asked for. What is sampled, how the service is called and
where spans go, the standard OTEL_ variables say.
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

PREFIX = "supervit."  # of attributes that no convention names
DEFAULT_SERVICE_NAME = "supervit-serve"
EXPORTERS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}  # their entry points, by protocol
ROOT = Context()
UNSAMPLED = re.compile(rb"00-((?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f][02468ace]")  # W3C Trace Context

Headers = Iterable[tuple[bytes, bytes]]


class RequestTrace:
    """The span of one request that is recorded, open until `end`."""

    def __init__(self, span: Span, tracer: Tracer, offset_ns: int) -> None:
        """Take what `RequestTracer.begin` has made."""
        self._span, self._tracer, self._offset_ns = span, tracer, offset_ns
        self._context = span.get_span_context()
        self.trace_id = f"{self._context.trace_id:032x}"

    @property
    def response(self) -> str:
        """The value of a `traceresponse` header, by which the client finds the span."""
        return f"00-{self.trace_id}-{self._context.span_id:016x}-{self._context.trace_flags & 3:02x}"

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
        share: float | None = 1.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Take where spans go.

        Args:
            processors: get each span once it has ended.
            share: of the requests that are part of no trace, 0..1, that is recorded; of others, their callers decide.
                None leaves all of it to the sampler that OTEL_TRACES_SAMPLER names, at some 10 us for each request.
            clock: monotonic, in seconds; the one that requests are stamped by.
            wall_clock_ns: nanoseconds since 1970.
        """
        identity = {
            SERVICE_NAME: DEFAULT_SERVICE_NAME,
            SERVICE_VERSION: version("supervit-serve"),
            SERVICE_INSTANCE_ID: str(uuid4()),
        }
        self._provider = TracerProvider(
            None if share is None else ParentBased(ALWAYS_ON),  # what is not recorded does not come so far
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
        """Open the span of a request, if it is to be recorded; tell the log which trace it is part of.

        Args:
            name: for the sampler; `end` may say it more exactly.
            headers: of the request, or a gRPC call's metadata, names in lower case; `traceparent` is looked for.
            arrived_at: on the monotonic clock, in seconds.
        """
        brought = [header for header in headers if header[0] in self._names]
        if self._share is not None and (unsampled := _unsampled_trace(brought)):
            TRACE_ID.set(unsampled)
            return None
        parent = self._propagator.extract(_by_name(brought), ROOT) if brought else ROOT
        is_first = not (brought and get_current_span(parent).get_span_context().is_valid)
        if self._share is not None and is_first and random.random() >= self._share:
            return None
        # Once for each request, not once for all: the wall clock may be set while the server runs.
        offset_ns = self._wall_clock_ns() - round(1e9 * self._clock())
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, start_time=round(1e9 * arrived_at) + offset_ns)
        trace = RequestTrace(span, self._tracer, offset_ns)
        TRACE_ID.set(trace.trace_id)
        return trace if span.is_recording() else None

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
    share = _share(environment)
    names = (environment.get("OTEL_TRACES_EXPORTER") or "otlp").split(",")
    exporters = [_exporter(name.strip(), environment) for name in names]
    return RequestTracer(list(map(BatchSpanProcessor, exporters)), share=share)


def _share(environment: Mapping[str, str]) -> float | None:
    """Read which share the usual samplers record of what is part of no trace; None where the sampler is another one."""
    name = (environment.get("OTEL_TRACES_SAMPLER") or "parentbased_always_on").strip().lower()
    if name != "parentbased_traceidratio":
        return {"parentbased_always_on": 1.0, "parentbased_always_off": 0.0}.get(name)
    share = float(environment.get("OTEL_TRACES_SAMPLER_ARG") or 1)
    if not 0 <= share <= 1:
        raise ValueError("OTEL_TRACES_SAMPLER_ARG is no share")
    return share


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


def _unsampled_trace(headers: Headers) -> str | None:
    """Name the trace that a request is part of, if its caller says that it is not recorded, as most are not."""
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
