from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Never

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.runtime import ServerRuntime
from service.settings import Settings
from service.telemetry.tracing import RequestTracer
from tests.service.http.scripted_server import ScriptedEngine, serving
from tests.service.telemetry.test_tracing import context_of

STAGES = ["read", "decode wait", "decode", "queue", "inference"]


class Server:
    """Serves with traced requests, and returns their spans."""

    def __init__(
        self, settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable
    ) -> None:
        self.settings, self.checkpoint, self.engine, self.latencies = settings, checkpoint, engine, latencies
        self.exporter = InMemorySpanExporter()

    @contextmanager
    def serving(self, tracer: RequestTracer | None = None, *, logs_requests: bool = False) -> Iterator[TestClient]:
        settings = self.settings.model_copy(update={"log_requests": logs_requests})
        tracer = tracer or RequestTracer([SimpleSpanProcessor(self.exporter)])
        with serving(ServerRuntime(settings, self.checkpoint, self.engine, self.latencies, tracer=tracer)) as client:
            yield client

    def requests(self) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.parent is None]

    def parts(self, parent: ReadableSpan) -> list[ReadableSpan]:
        number = context_of(parent).span_id
        return [span for span in self.exporter.get_finished_spans() if span.parent and span.parent.span_id == number]


@pytest.fixture
def server(settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable) -> Server:
    return Server(settings, checkpoint, engine, latencies)


def test_a_classification_is_a_span_with_its_stages_and_the_traceresponse_header_names_it(
    server: Server, photo: bytes
) -> None:
    with server.serving() as client:
        answer = client.post("/classify?top_k=1", content=photo, headers={"X-Request-ID": "mine"})
    (request,) = server.requests()
    context, told = context_of(request), request.attributes
    assert answer.headers["traceresponse"] == f"00-{context.trace_id:032x}-{context.span_id:016x}-03"
    assert [span.name for span in server.parts(request)] == STAGES
    assert told is not None
    assert request.name == "POST /classify"
    assert {name: told[name] for name in told if not name.startswith("supervit.")} == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/classify",
        "url.path": "/classify",
        "url.query": "top_k=1",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "client.address": "testclient",
    }
    assert told["supervit.request_id"] == "mine"
    assert told["supervit.gflops"] == answer.json()["gflops"]


def test_the_images_of_a_request_are_children_of_its_span(server: Server, photo: bytes) -> None:
    with server.serving() as client:
        answer = client.post("/classify", files=[("file", photo), ("file", b"no image"), ("file", photo)])
    (request,) = server.requests()
    images = server.parts(request)
    assert answer.status_code == 200
    assert request.attributes is not None
    assert "error.type" not in request.attributes, "one image failed, but not the request"
    assert [image.name for image in images] == ["image", "image"]
    assert [[span.name for span in server.parts(image)] for image in images] == [STAGES, STAGES]


def test_spans_of_posts_are_named_by_their_route_and_those_of_unknown_paths_by_the_method_alone(
    server: Server, photo: bytes
) -> None:
    with server.serving() as client:
        client.post("/explain", content=photo)
        client.post("/decide")
        client.post(f"/predictions/{server.checkpoint.name}", content=photo)
        client.post("/predictions/another", content=photo)
        client.post("/nowhere/1")
        client.get("/subnetworks")
    names = ["POST /explain", "POST /decide", *["POST /predictions/{name}"] * 2, "POST"]
    assert [span.name for span in server.requests()] == names


class Bug(tuple[str, ...]):
    """Class names that raise an error when one is read."""

    def __getitem__(self, _: object) -> Never:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("query", "breaks", "code", "status"),
    [
        ("?top_k=0", None, "invalid_parameter", StatusCode.UNSET),
        ("", "model", "model_error", StatusCode.ERROR),
        ("", "server", "internal_error", StatusCode.ERROR),
    ],
)
def test_the_span_of_a_failed_request_holds_its_error_code(
    server: Server, photo: bytes, query: str, breaks: str | None, code: str, status: StatusCode
) -> None:
    if breaks == "server":
        server.checkpoint = replace(server.checkpoint, class_names=Bug(server.checkpoint.class_names))
    with server.serving() as client:
        server.engine.error = RuntimeError("no") if breaks == "model" else None
        client.post(f"/classify{query}", content=photo)
    (request,) = server.requests()
    assert request.attributes is not None
    assert (request.attributes["error.type"], request.status.status_code) == (code, status)


def test_a_request_that_is_not_sampled_is_logged_but_leaves_no_span(
    server: Server, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tracer = RequestTracer([SimpleSpanProcessor(server.exporter)], share=0.0)
    with server.serving(tracer, logs_requests=True) as client:
        answer = client.post("/classify", content=photo)
        client.get("/health/live")
    assert "traceresponse" not in answer.headers
    assert server.requests() == []
    lines = [record for record in caplog.records if record.name == "service.telemetry.reports"]
    assert [line.getMessage() for line in lines] == ["POST /classify 200", "GET /health/live 200"]
    assert lines[0].__dict__["fields"]["gflops"] == answer.json()["gflops"]


def test_the_exemplars_of_duration_histograms_hold_the_trace_id_of_a_request(server: Server, photo: bytes) -> None:
    with server.serving() as client:
        answer = client.post("/classify", content=photo)
        page = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert page.headers["Content-Type"].startswith("application/openmetrics-text")
    number = answer.headers["traceresponse"].split("-")[1]
    led = {line.split("{")[0] for line in page.text.splitlines() if f'trace_id="{number}"' in line}
    assert led == {"supervit_request_duration_seconds_bucket", "supervit_stage_duration_seconds_bucket"}


def test_a_server_exports_its_last_spans_when_it_stops(server: Server, photo: bytes) -> None:
    tracer = RequestTracer([BatchSpanProcessor(server.exporter, schedule_delay_millis=1e6)])
    with server.serving(tracer) as client:
        client.post("/classify", content=photo)
        assert server.requests() == []
    assert len(server.requests()) == 1


def test_unknown_query_parameters_are_left_out_of_a_span(server: Server, photo: bytes) -> None:
    with server.serving() as client:
        client.post("/classify?top_k=1&api_key=secret&budget_ms=900", content=photo)
    (request,) = server.requests()
    assert (request.attributes or {})["url.query"] == "top_k=1&budget_ms=900"
