import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanContext, SpanKind, StatusCode

from service.telemetry.stages import Outcome, Stage
from service.telemetry.tracing import RequestTracer, open_tracer

CALLER = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
IGNORED = CALLER[:-1] + b"0"
NOW, WALL_NS = 200.0, 1_700_000_000_000_000_000
OK = Outcome("POST /classify 200", "POST /classify", {"http.response.status_code": 200})


class Traces:
    """A tracer at a time of the test's, and what it makes."""

    def __init__(self, ratio: float = 1.0) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracer = RequestTracer(
            [SimpleSpanProcessor(self.exporter)],
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            clock=lambda: NOW,
            wall_clock_ns=lambda: WALL_NS,
        )

    def spans(self) -> Sequence[ReadableSpan]:
        return self.exporter.get_finished_spans()


@pytest.fixture
def traces() -> Traces:
    return Traces()


def context_of(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def wall_ns(at: float) -> int:
    return WALL_NS + round((at - NOW) * 1e9)


def test_a_request_is_a_span_of_the_time_that_it_took_on_the_wall_clock(traces: Traces) -> None:
    traces.tracer.begin("POST", [], 198.5).end(199.5, OK, (), {"gflops": 0.5})
    (span,) = traces.spans()
    assert (span.name, span.kind, span.parent) == ("POST /classify", SpanKind.SERVER, None)
    assert (span.start_time, span.end_time) == (wall_ns(198.5), wall_ns(199.5))
    assert span.attributes == {"http.response.status_code": 200, "supervit.gflops": 0.5}
    assert span.status.status_code is StatusCode.UNSET


def test_stages_are_spans_within_it_and_parts_are_within_those(traces: Traces) -> None:
    part = Stage("decode", 198.6, 198.7, {"confidence": 0.5})
    traces.tracer.begin("POST", [], 198.5).end(199.5, OK, [Stage("image", 198.5, 199.0, {}, (part,))], {})
    decode, image, request = traces.spans()
    assert [decode.name, image.name] == ["decode", "image"]
    assert decode.parent is not None
    assert image.parent is not None
    assert decode.parent.span_id == context_of(image).span_id
    assert image.parent.span_id == context_of(request).span_id
    assert (decode.start_time, decode.end_time) == (wall_ns(198.6), wall_ns(198.7))
    assert decode.attributes == {"supervit.confidence": 0.5}


@pytest.mark.parametrize(("is_failure", "status"), [(True, StatusCode.ERROR), (False, StatusCode.UNSET)])
def test_what_went_wrong_is_named_and_an_error_where_it_is_the_servers(
    traces: Traces, is_failure: bool, status: StatusCode
) -> None:
    outcome = Outcome("", "POST", {}, "model_error", is_failure)
    traces.tracer.begin("POST", [], 198.5).end(199.5, outcome, (), {})
    (span,) = traces.spans()
    assert span.attributes == {"error.type": "model_error"}
    assert span.status.status_code is status


def test_a_request_goes_on_with_the_trace_of_its_caller(traces: Traces) -> None:
    headers = [(b"host", b"x"), (b"traceparent", CALLER), (b"tracestate", b"a=1"), (b"tracestate", b"b=2")]
    trace = traces.tracer.begin("POST", headers, 198.5)
    trace.end(199.5, OK, (), {})
    (span,) = traces.spans()
    context = context_of(span)
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert dict(context.trace_state) == {"a": "1", "b": "2"}
    assert trace.response == f"00-4bf92f3577b34da6a3ce929d0e0e4736-{context.span_id:016x}-01"


@pytest.mark.parametrize("value", [b"", b"00-0-0-01", b"\xff", CALLER[:40]])
def test_a_name_that_is_none_begins_a_trace(traces: Traces, value: bytes) -> None:
    trace = traces.tracer.begin("POST", [(b"traceparent", value)], 198.5)
    assert trace.is_recorded
    assert trace.trace_id


def test_a_caller_decides_whether_its_requests_are_recorded() -> None:
    traces = Traces(ratio=0.0)
    assert not traces.tracer.begin("POST", [(b"traceparent", IGNORED)], 198.5).is_recorded
    assert traces.tracer.begin("POST", [(b"traceparent", CALLER)], 198.5).is_recorded
    alone = traces.tracer.begin("POST", [], 198.5)
    assert not alone.is_recorded
    assert alone.trace_id, "the log names it all the same"
    assert traces.spans() == ()


def test_the_service_has_a_name_of_its_own_unless_a_variable_says_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = []
    for variables in ({}, {"OTEL_RESOURCE_ATTRIBUTES": "service.name=a"}, {"OTEL_SERVICE_NAME": "b"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        traces = Traces()
        traces.tracer.begin("POST", [], 198.5).end(199.5, OK, (), {})
        names.append(traces.spans()[0].resource.attributes["service.name"])
    assert names == ["supervit-serve", "a", "b"]


def test_what_is_left_is_sent_at_the_end() -> None:
    exporter = InMemorySpanExporter()
    tracer = RequestTracer([BatchSpanProcessor(exporter, schedule_delay_millis=1e6)])
    tracer.begin("POST", [], 198.5).end(199.5, OK, (), {})
    assert exporter.get_finished_spans() == ()
    tracer.close(within_s=10.0)
    assert len(exporter.get_finished_spans()) == 1


def test_a_collector_that_does_not_answer_is_not_waited_for() -> None:
    class Silent(SpanExporter):
        """Takes until the test is over."""

        over = threading.Event()

        def export(self, _: object) -> SpanExportResult:
            self.over.wait(10)
            return SpanExportResult.FAILURE

    tracer = RequestTracer([BatchSpanProcessor(Silent(), schedule_delay_millis=1e6)])
    tracer.begin("POST", [], 198.5).end(199.5, OK, (), {})
    tracer.close(within_s=0.01)
    assert any(thread.name == "last spans" and thread.daemon for thread in threading.enumerate())
    Silent.over.set()


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"OTEL_TRACES_EXPORTER": "carrier_pigeon"}, "'carrier_pigeon'"),
        ({"OTEL_TRACES_EXPORTER": "console, carrier_pigeon"}, "'carrier_pigeon'"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "avian"}, "'avian'"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "avian"}, "'avian'"),
    ],
)
def test_an_exporter_that_is_not_installed_is_named(variables: dict[str, str], name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=name):
        open_tracer(variables)
