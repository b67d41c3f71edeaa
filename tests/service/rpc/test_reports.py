import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.rpc import open_inference_pb2 as pb
from service.rpc.inference_service import SERVICE_NAME
from service.runtime import ServerRuntime
from service.settings import Settings
from service.telemetry.tracing import RequestTracer
from tests.service.http.scripted_server import ScriptedEngine
from tests.service.rpc.conftest import Served, failure_of, request_for, serving_in_process, until
from tests.service.telemetry.test_tracing import context_of

pytestmark = pytest.mark.anyio
STAGES = ["read", "decode wait", "decode", "queue", "inference"]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def traced(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: ScriptedEngine,
    latencies: LatencyTable,
    exporter: InMemorySpanExporter,
) -> AsyncIterator[Served]:
    tracer = RequestTracer([SimpleSpanProcessor(exporter)])
    settings = settings.model_copy(update={"log_requests": True})
    runtime = ServerRuntime(settings, checkpoint, engine, latencies, tracer=tracer)
    async with serving_in_process(runtime, engine) as served:
        yield served


def request_spans(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name.startswith(SERVICE_NAME)]


async def test_a_request_is_a_span_in_its_callers_trace_with_a_child_span_for_each_stage(
    traced: Served, exporter: InMemorySpanExporter, photo: bytes
) -> None:
    call = traced.infer(request_for(photo), metadata=(("traceparent", f"00-{TRACE}-{SPAN}-01"),))
    await call
    told = dict(await call.trailing_metadata())
    (request,) = request_spans(exporter)
    context = context_of(request)
    assert request.name == "inference.GRPCInferenceService/ModelInfer"
    assert f"{context.trace_id:032x}" == TRACE
    assert str(told["traceresponse"]).startswith(f"00-{TRACE}-{context.span_id:016x}-")
    parts = [span for span in exporter.get_finished_spans() if span.parent and span.parent.span_id == context.span_id]
    assert [span.name for span in parts] == STAGES
    attributes = request.attributes or {}
    assert (attributes["rpc.service"], attributes["rpc.method"]) == (SERVICE_NAME, "ModelInfer")
    assert (attributes["rpc.system"], attributes["rpc.grpc.status_code"]) == ("grpc", 0)
    assert attributes["supervit.reason"] == "alone"


async def test_a_failed_span_names_its_error_and_only_server_failures_have_error_status(
    traced: Served, engine: ScriptedEngine, exporter: InMemorySpanExporter, photo: bytes
) -> None:
    await failure_of(traced.infer(request_for(b"no image")))
    engine.error = RuntimeError("secret")
    await failure_of(traced.infer(request_for(photo)))
    failed = [(span.attributes or {}, span.status.status_code) for span in request_spans(exporter)]
    assert [(told["error.type"], told["rpc.grpc.status_code"], code) for told, code in failed] == [
        ("invalid_image", grpc.StatusCode.INVALID_ARGUMENT.value[0], StatusCode.UNSET),
        ("model_error", grpc.StatusCode.INTERNAL.value[0], StatusCode.ERROR),
    ]


async def test_the_span_of_a_request_whose_client_leaves_has_the_error_type_client_gone(
    traced: Served, engine: ScriptedEngine, exporter: InMemorySpanExporter, photo: bytes
) -> None:
    engine.may_run.clear()
    call = asyncio.ensure_future(traced.infer(request_for(photo)))
    await until(engine.running.is_set)
    call.cancel()
    await until(lambda: bool(request_spans(exporter)))
    engine.may_run.set()
    (request,) = request_spans(exporter)
    assert (request.attributes or {})["error.type"] == "client_gone"


async def test_each_request_of_a_stream_has_its_own_span(
    traced: Served, exporter: InMemorySpanExporter, photo: bytes
) -> None:
    requests = [request_for(photo).SerializeToString(), request_for(b"no image").SerializeToString()]
    answers = [answer async for answer in traced.stream(iter(requests))]
    assert len(answers) == 2
    errors = [(span.attributes or {}).get("error.type") for span in request_spans(exporter)]
    assert sorted(errors, key=str) == [None, "invalid_image"]


async def test_probes_have_no_span_and_each_call_has_a_log_line(
    traced: Served, exporter: InMemorySpanExporter, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.telemetry.reports")
    await traced.call("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)
    assert not exporter.get_finished_spans()
    await traced.infer(request_for(photo))
    await failure_of(traced.infer(request_for(b"no image")))
    told = ["ServerReady OK", "ModelInfer OK", "ModelInfer INVALID_ARGUMENT"]
    await until(lambda: len(caplog.messages) >= len(told))  # a client may have its error before the server logs it
    assert caplog.messages == [f"{SERVICE_NAME}/{line}" for line in told]
