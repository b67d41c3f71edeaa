import threading
from collections.abc import Sequence
from contextvars import Context

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, SpanKind, StatusCode

from service.telemetry.logs import TRACE_ID
from service.telemetry.stages import Outcome, Stage
from service.telemetry.tracing import RequestTrace, RequestTracer, open_tracer

CALLER = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
IGNORED = CALLER[:-1] + b"0"
NOW, WALL_NS = 200.0, 1_700_000_000_000_000_000
OK = Outcome("POST /classify 200", "POST /classify", {"http.response.status_code": 200})


class Traces:
    """A tracer with a fixed clock, and the spans that it exports."""

    def __init__(self, share: float | None = 1.0) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracer = RequestTracer(
            [SimpleSpanProcessor(self.exporter)],
            share=share,
            clock=lambda: NOW,
            wall_clock_ns=lambda: WALL_NS,
        )

    def begin(self, *headers: tuple[bytes, bytes]) -> RequestTrace:
        trace = self.tracer.begin("POST", headers, 198.5)
        assert trace is not None
        return trace

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


def test_a_request_is_a_span_with_its_start_and_end_on_the_wall_clock(traces: Traces) -> None:
    traces.begin().end(199.5, OK, (), {"gflops": 0.5})
    (span,) = traces.spans()
    assert (span.name, span.kind, span.parent) == ("POST /classify", SpanKind.SERVER, None)
    assert (span.start_time, span.end_time) == (wall_ns(198.5), wall_ns(199.5))
    assert span.attributes == {"http.response.status_code": 200, "supervit.gflops": 0.5}
    assert span.status.status_code is StatusCode.UNSET


def test_stages_are_child_spans_of_the_request_and_parts_are_children_of_stages(traces: Traces) -> None:
    part = Stage("decode", 198.6, 198.7, {"confidence": 0.5})
    traces.begin().end(199.5, OK, [Stage("image", 198.5, 199.0, {}, (part,))], {})
    decode, image, request = traces.spans()
    assert [decode.name, image.name] == ["decode", "image"]
    assert decode.parent is not None
    assert image.parent is not None
    assert decode.parent.span_id == context_of(image).span_id
    assert image.parent.span_id == context_of(request).span_id
    assert (decode.start_time, decode.end_time) == (wall_ns(198.6), wall_ns(198.7))
    assert decode.attributes == {"supervit.confidence": 0.5}


@pytest.mark.parametrize(("is_failure", "status"), [(True, StatusCode.ERROR), (False, StatusCode.UNSET)])
def test_a_span_names_the_error_and_has_error_status_only_if_the_server_failed(
    traces: Traces, is_failure: bool, status: StatusCode
) -> None:
    outcome = Outcome("", "POST", {}, "model_error", is_failure)
    traces.begin().end(199.5, outcome, (), {})
    (span,) = traces.spans()
    assert span.attributes == {"error.type": "model_error"}
    assert span.status.status_code is status


def test_a_request_continues_the_trace_of_its_caller(traces: Traces) -> None:
    headers = [(b"host", b"x"), (b"traceparent", CALLER), (b"tracestate", b"a=1"), (b"tracestate", b"b=2")]
    trace = traces.begin(*headers)
    trace.end(199.5, OK, (), {})
    (span,) = traces.spans()
    context = context_of(span)
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert dict(context.trace_state) == {"a": "1", "b": "2"}
    assert trace.response == f"00-4bf92f3577b34da6a3ce929d0e0e4736-{context.span_id:016x}-01"


@pytest.mark.parametrize(
    "value", [b"", b"00-0-0-01", b"\xff", CALLER[:40], b"00-" + b"0" * 32 + b"-00f067aa0ba902b7-00"]
)
def test_an_invalid_trace_header_begins_a_new_trace_that_is_sampled_like_any_other(
    traces: Traces, value: bytes
) -> None:
    traces.begin((b"traceparent", value)).end(199.5, OK, (), {})
    assert traces.spans()[0].parent is None
    for header in (b"traceparent", b"tracestate", b"baggage"):
        assert Traces(share=0.0).tracer.begin("POST", [(header, value)], 198.5) is None


@pytest.mark.parametrize("share", [0.0, 1.0, None])
def test_the_sampling_decision_of_the_caller_is_followed(share: float | None) -> None:
    def ask() -> None:
        traces = Traces(share)
        assert traces.tracer.begin("POST", [(b"traceparent", IGNORED)], 198.5) is None
        assert TRACE_ID.get() == "4bf92f3577b34da6a3ce929d0e0e4736", "the log names unrecorded traces, too"
        assert traces.tracer.begin("POST", [(b"traceparent", CALLER)], 198.5) is not None

    Context().run(ask)


def test_a_share_of_requests_without_a_trace_is_recorded_and_the_log_names_only_recorded_traces() -> None:
    def ask() -> None:
        none, every, some = Traces(0.0), Traces(1.0), Traces(0.5)
        assert [none.tracer.begin("POST", [], 198.5), TRACE_ID.get()] == [None, None]
        assert every.begin().trace_id == TRACE_ID.get()
        recorded = sum(some.tracer.begin("POST", [], 198.5) is not None for _ in range(1000))
        assert 400 < recorded < 600

    Context().run(ask)


@pytest.mark.parametrize(
    ("variables", "recorded"),
    [
        ({}, True),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "1"}, True),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, False),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, False),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, False),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, True),
    ],
)
def test_the_standard_sampler_variables_decide_which_requests_are_recorded(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], recorded: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tracer = open_tracer(variables | {"OTEL_TRACES_EXPORTER": "console"})
    assert (tracer.begin("POST", [], 198.5) is not None) == recorded
    tracer.close(within_s=5.0)


@pytest.mark.parametrize("value", ["some", "1.5", "nan"])
def test_an_invalid_sampler_share_raises_a_value_error(value: str) -> None:
    with pytest.raises(ValueError, match=r"SAMPLER_ARG|float"):
        open_tracer({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": value})


def test_the_service_name_has_a_default_that_variables_override(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = []
    for variables in ({}, {"OTEL_RESOURCE_ATTRIBUTES": "service.name=a"}, {"OTEL_SERVICE_NAME": "b"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        traces = Traces()
        traces.begin().end(199.5, OK, (), {})
        names.append(traces.spans()[0].resource.attributes["service.name"])
    assert names == ["supervit-serve", "a", "b"]


def test_closing_sends_the_remaining_spans() -> None:
    exporter = InMemorySpanExporter()
    tracer = RequestTracer([BatchSpanProcessor(exporter, schedule_delay_millis=1e6)])
    trace = tracer.begin("POST", [], 198.5)
    assert trace is not None
    trace.end(199.5, OK, (), {})
    assert exporter.get_finished_spans() == ()
    tracer.close(within_s=10.0)
    assert len(exporter.get_finished_spans()) == 1


def test_closing_does_not_wait_for_a_collector_that_does_not_answer() -> None:
    class Silent(SpanExporter):
        """An exporter that blocks until the test is over."""

        over = threading.Event()

        def export(self, _: object) -> SpanExportResult:
            self.over.wait(10)
            return SpanExportResult.FAILURE

    tracer = RequestTracer([BatchSpanProcessor(Silent(), schedule_delay_millis=1e6)])
    trace = tracer.begin("POST", [], 198.5)
    assert trace is not None
    trace.end(199.5, OK, (), {})
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
def test_the_error_for_an_exporter_that_is_not_installed_names_it(variables: dict[str, str], name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=name):
        open_tracer(variables)
