import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from PIL import Image

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.engines.profile_store import extended_profile
from service.rpc import open_inference_pb2 as pb
from service.rpc.inference_service import STREAM_AHEAD
from service.runtime import ServerRuntime
from service.settings import Settings
from service.telemetry.logs import TextFormatter
from tests.service.http.scripted_server import ScriptedEngine
from tests.service.rpc.conftest import BOUNDS, CALLS, Served, failure_of, request_for, serving_in_process, until

pytestmark = pytest.mark.anyio

UNHURRIED = 60_000.0


def parameters_of(response: pb.ModelInferResponse) -> dict[str, object]:
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in response.parameters.items()}


async def test_list_contents_are_answered_with_lists_and_raw_contents_with_bytes(served: Served, photo: bytes) -> None:
    listed = await served.infer(request_for(photo))
    raw = await served.infer(request_for(photo, raw=True))
    assert [tensor.name for tensor in listed.outputs] == ["probabilities", "labels"]
    probabilities = np.frombuffer(raw.raw_output_contents[0], "<f4")
    assert list(listed.outputs[0].contents.fp32_contents) == pytest.approx(probabilities.tolist(), abs=1e-6)
    assert sum(probabilities) == pytest.approx(1)
    assert listed.outputs[1].contents.bytes_contents[0] == f"thing {probabilities.argmax()}".encode()
    assert not listed.raw_output_contents
    assert not raw.outputs[0].contents.fp32_contents


async def test_an_answer_names_its_model_its_request_and_its_reason(served: Served, photo: bytes) -> None:
    response = await served.infer(request_for(photo))
    assert (response.model_name, response.model_version, response.id) == ("tiny", "1", "7")
    parameters = parameters_of(response)
    assert parameters["patch_grid"] == 4
    assert parameters["deadline_met"] is True
    assert parameters["reason"] == "no other request is waiting: grid 4 at keep rate 1 is the most accurate sub-network"


async def test_pixels_may_be_sent_as_lists_or_as_bytes(served: Served, checkpoint: Checkpoint) -> None:
    side = checkpoint.config.image_side
    pixels = np.arange(3 * side * side, dtype=np.uint8).reshape(1, 3, side, side)
    answers = []
    for datatype, values in (("UINT8", pixels), ("FP32", (pixels / 255).astype("<f4"))):
        for is_raw in (True, False):
            request = pb.ModelInferRequest(model_name="tiny")
            tensor = request.inputs.add(name="image", datatype=datatype, shape=pixels.shape)
            if is_raw:
                request.raw_input_contents.append(values.tobytes())
            elif datatype == "UINT8":
                tensor.contents.uint_contents.extend(values.ravel().tolist())
            else:
                tensor.contents.fp32_contents.extend(values.ravel().tolist())
            request.outputs.add(name="labels")
            response = await served.infer(request)
            answers.append(response.raw_output_contents or response.outputs[0].contents.bytes_contents)
    assert answers[0] == answers[2]
    assert answers[1] == answers[3]


async def test_all_images_of_a_request_are_answered_in_order(
    served: Served, photo: bytes, encode: Callable[..., bytes]
) -> None:
    other = encode(Image.linear_gradient("L").resize((50, 50)))
    first, second = [
        list((await served.infer(request_for(image))).outputs[0].contents.fp32_contents) for image in (photo, other)
    ]
    assert first != pytest.approx(second, abs=1e-3)
    probabilities = (await served.infer(request_for(photo, other, photo))).outputs[0]
    assert list(probabilities.shape) == [3, 7]
    # A batch rounds its sums differently.
    assert list(probabilities.contents.fp32_contents) == pytest.approx([*first, *second, *first], abs=1e-6)
    assert served.count("ok") == 2 + 3


async def test_budgets_may_be_given_as_parameters_or_as_metadata(
    served: Served, checkpoint: Checkpoint, photo: bytes
) -> None:
    cheap = min(profile.gflops for profile in checkpoint.profile.by_subnetwork.values())
    by_parameter = await served.infer(request_for(photo, budget_gflops=cheap))
    by_metadata = await served.infer(request_for(photo), metadata=(("x-budget-gflops", str(cheap)),))
    assert parameters_of(by_parameter)["gflops"] == parameters_of(by_metadata)["gflops"] == cheap


async def test_a_call_keeps_its_request_id_or_gets_a_new_one(served: Served, photo: bytes) -> None:
    call = served.infer(request_for(photo), metadata=(("x-request-id", "mine"),))
    await call
    assert dict(await call.trailing_metadata())["x-request-id"] == "mine"
    _, _, metadata = await failure_of(served.infer(request_for(b"no image")))
    assert len(metadata["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT, "invalid_parameter"),
        (request_for(b"no image"), grpc.StatusCode.INVALID_ARGUMENT, "invalid_image"),
        (request_for(b"", budget_gflops=1e-9), grpc.StatusCode.INVALID_ARGUMENT, "budget_too_small"),
        (request_for(b"", budget="1"), grpc.StatusCode.INVALID_ARGUMENT, "invalid_parameter"),
        (pb.ModelInferRequest(model_name="tiny"), grpc.StatusCode.INVALID_ARGUMENT, "invalid_tensor"),
        (pb.ModelInferRequest(model_name="other"), grpc.StatusCode.NOT_FOUND, "unknown_model"),
    ],
)
async def test_a_bad_request_fails_with_a_grpc_status_and_an_error_code(
    served: Served, request_: pb.ModelInferRequest | bytes, status: grpc.StatusCode, code: str
) -> None:
    found, message, metadata = await failure_of(served.infer(request_))
    assert (found, metadata["error-code"]) == (status, code)
    assert message
    assert served.count(code) == 1


async def test_an_address_with_too_many_calls_is_told_when_to_retry(
    served: Served, engine: ScriptedEngine, photo: bytes
) -> None:
    engine.may_run.clear()
    waiting = [asyncio.ensure_future(served.infer(request_for(photo, budget_ms=UNHURRIED))) for _ in range(CALLS)]
    await until(lambda: served.in_flight == CALLS)
    status, _, metadata = await failure_of(served.infer(request_for(photo)))
    assert (status, metadata["error-code"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded")
    assert metadata["grpc-retry-pushback-ms"] == "1000"
    engine.may_run.set()
    await asyncio.gather(*waiting)


async def test_a_model_failure_is_an_internal_error_and_is_logged_with_its_request_id(
    served: Served, engine: ScriptedEngine, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    engine.error = RuntimeError("secret")
    caplog.handler.setFormatter(TextFormatter())
    request = request_for(photo, budget_ms=UNHURRIED)
    status, message, metadata = await failure_of(served.infer(request, metadata=(("x-request-id", "mine"),)))
    assert (status, metadata["error-code"]) == (grpc.StatusCode.INTERNAL, "model_error")
    assert "secret" not in message
    assert "ERROR service.rpc.call_handling: the model failed on this image" in caplog.text
    assert "request_id=mine" in caplog.text


async def test_a_request_that_waits_past_the_clients_deadline_never_runs(
    served: Served, engine: ScriptedEngine, photo: bytes
) -> None:
    engine.may_run.clear()
    first = asyncio.ensure_future(served.infer(request_for(photo, budget_ms=UNHURRIED)))
    await until(engine.running.is_set)
    late = served.infer(request_for(photo, budget_ms=UNHURRIED), timeout=0.1)
    assert (await failure_of(late))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    engine.may_run.set()
    await first
    assert engine.sizes == [1]  # the late one never ran


async def test_a_client_deadline_that_no_sub_network_can_meet_fails_at_once(
    checkpoint: Checkpoint, engine: ScriptedEngine, tmp_path: Path, photo: bytes
) -> None:
    slow = LatencyTable((1, 4), dict.fromkeys(extended_profile(checkpoint).by_subnetwork, (60.0, 240.0)))
    runtime = ServerRuntime(Settings(checkpoint=str(tmp_path)), checkpoint, engine, slow)
    async with serving_in_process(runtime, engine) as served:
        request = request_for(photo, budget_ms=600_000.0)
        status, _, metadata = await failure_of(served.infer(request, timeout=30))
    assert (status, metadata["error-code"]) == (grpc.StatusCode.DEADLINE_EXCEEDED, "deadline_exceeded")


async def test_a_cancelled_call_leaves_the_queue_and_each_of_its_images_is_counted_once(
    served: Served, runtime: ServerRuntime, engine: ScriptedEngine, photo: bytes
) -> None:
    engine.may_run.clear()
    first = asyncio.ensure_future(served.infer(request_for(photo, budget_ms=UNHURRIED)))
    await until(engine.running.is_set)
    waiting = served.infer(request_for(photo, photo, budget_ms=UNHURRIED))
    scheduler = runtime.context.server().scheduler
    await until(lambda: len(scheduler) == 2)
    waiting.cancel()
    await until(lambda: not len(scheduler))
    assert served.count("client_gone") == 2  # one for each image
    engine.may_run.set()
    await first
    assert engine.sizes == [1]
    assert served.count("ok") == 1


async def test_an_invalid_image_does_not_count_as_a_client_that_left(served: Served, photo: bytes) -> None:
    status, _, metadata = await failure_of(served.infer(request_for(photo, b"no image", photo)))
    assert (status, metadata["error-code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_image")
    assert served.count("client_gone") == 0


async def test_a_message_that_does_not_arrive_in_time_is_an_upload_timeout(
    runtime: ServerRuntime, engine: ScriptedEngine
) -> None:
    async with serving_in_process(runtime, engine, max_upload_s=0.05) as served:
        call = served.infer_piecewise(silence())
        status, message, metadata = await failure_of(call)
    assert (status, metadata["error-code"]) == (grpc.StatusCode.DEADLINE_EXCEEDED, "upload_timeout")
    assert served.count("upload_timeout") == 1
    assert message == "the message did not arrive within 0.05 s"


async def test_the_messages_being_received_from_one_client_are_bounded(one_on_its_way: Served) -> None:
    over = asyncio.Event()
    calls = [one_on_its_way.infer_piecewise(silence(over)) for _ in range(2)]
    endings = [asyncio.ensure_future(failure_of(call)) for call in calls]
    (refused,), (other,) = await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
    status, message, metadata = await refused
    assert (status, metadata["error-code"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded")
    assert message.startswith("1 requests from this address are being received already")
    assert one_on_its_way.count("overloaded") == 1
    over.set()
    assert (await other)[1] == "the call ended without a message"


async def test_an_open_stream_counts_as_a_message_being_received(one_on_its_way: Served, photo: bytes) -> None:
    stream = one_on_its_way.stream()
    data = request_for(photo).SerializeToString()
    await stream.write(data)
    assert isinstance(answer := await stream.read(), pb.ModelStreamInferResponse)
    assert answer.error_message == ""
    assert (await failure_of(one_on_its_way.infer(data)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await one_on_its_way.stream(iter([data])).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert one_on_its_way.count("overloaded") == 2
    await stream.done_writing()
    assert await stream.code() is grpc.StatusCode.OK
    assert (await one_on_its_way.infer(data)).id == "7"


async def test_a_call_that_ends_without_a_message_is_an_error(served: Served) -> None:
    call = served.infer_piecewise(nothing())
    assert (await failure_of(call))[1] == "the call ended without a message"


async def test_a_client_that_leaves_before_its_message_arrives_is_counted_as_gone(served: Served) -> None:
    call = served.infer_piecewise(silence())
    await asyncio.sleep(0.05)  # until the call has arrived, which nothing signals
    call.cancel()
    await until(lambda: served.count("client_gone") == 1)


async def silence(over: asyncio.Event | None = None) -> AsyncIterator[bytes]:
    """Send nothing until `over` is set."""
    await (over or asyncio.Event()).wait()
    return
    yield b""


async def nothing() -> AsyncIterator[bytes]:
    return
    yield b""


async def test_a_stream_is_answered_request_by_request_and_a_failed_request_ends_no_other(
    served: Served, photo: bytes
) -> None:
    requests = [request_for(photo), request_for(b"no image"), request_for(photo)]
    for number, request in enumerate(requests):
        request.id = str(number)
    stream = served.stream(request.SerializeToString() for request in requests)
    answers = {answer.infer_response.id: answer async for answer in stream}
    assert {name for name, answer in answers.items() if not answer.error_message} == {"0", "2"}
    assert answers["1"].error_message.startswith("not an image")
    assert answers["0"].infer_response.outputs[0].contents.fp32_contents


async def test_answers_are_remembered_by_their_request_id(served: Served, photo: bytes) -> None:
    await served.infer(request_for(photo, photo), metadata=(("x-request-id", "mine"),))
    for image in (0, 1):
        assert not served.runtime.context.answers.find(None, "mine", image).is_judged


async def test_the_requests_of_a_cancelled_stream_leave_the_queue(
    served: Served, runtime: ServerRuntime, engine: ScriptedEngine, photo: bytes
) -> None:
    engine.may_run.clear()
    first = asyncio.ensure_future(served.infer(request_for(photo, budget_ms=UNHURRIED)))
    await until(engine.running.is_set)
    scheduler = runtime.context.server().scheduler
    stream = served.stream()
    for _ in range(3):
        await stream.write(request_for(photo, budget_ms=UNHURRIED).SerializeToString())
    await until(lambda: len(scheduler) == 3)
    stream.cancel()
    await until(lambda: not len(scheduler))
    assert served.count("client_gone") == 3
    engine.may_run.set()
    await first


async def test_the_requests_read_ahead_from_a_stream_are_bounded(
    served: Served, engine: ScriptedEngine, photo: bytes
) -> None:
    engine.may_run.clear()
    stream = served.stream()
    data = request_for(photo, budget_ms=UNHURRIED).SerializeToString()
    for _ in range(STREAM_AHEAD + 5):
        await stream.write(data)
    await until(lambda: served.in_flight >= STREAM_AHEAD)
    await served.call("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)  # arrives after them
    assert served.in_flight == STREAM_AHEAD
    engine.may_run.set()
    await stream.done_writing()
    answers = [answer async for answer in stream]
    assert len(answers) == STREAM_AHEAD + 5


async def test_a_stream_stays_open_while_a_request_is_answered_and_is_closed_when_idle(
    runtime: ServerRuntime, engine: ScriptedEngine, photo: bytes
) -> None:
    async with serving_in_process(runtime, engine, replace(BOUNDS, keep_alive_s=0.1)) as served:
        engine.may_run.clear()
        busy = served.stream()
        await busy.write(request_for(photo, budget_ms=UNHURRIED).SerializeToString())
        await until(engine.running.is_set)
        idle = served.stream()
        assert await idle.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await idle.details() == "no request arrived for 0.1 s"
        assert dict(await idle.trailing_metadata())["error-code"] == "upload_timeout"
        engine.may_run.set()
        assert (await anext(busy.__aiter__())).infer_response.id == "7"
        assert await busy.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_the_server_and_the_model_describe_themselves(served: Served) -> None:
    assert (await served.call("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)).live
    assert (await served.call("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)).ready
    assert (await served.call("ModelReady", pb.ModelReadyRequest(name="tiny"), pb.ModelReadyResponse)).ready
    server = await served.call("ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse)
    assert server.name == "supervit-serve"
    model = await served.call("ModelMetadata", pb.ModelMetadataRequest(name="tiny"), pb.ModelMetadataResponse)
    assert [tensor.name for tensor in model.inputs] == ["image"]
    answer = await served.call("ModelConfig", pb.ModelConfigRequest(name="tiny"), pb.ModelConfigResponse)
    assert answer.config.max_batch_size > 0
    assert answer.config.input[0].data_type == pb.TYPE_STRING
    assert answer.config.parameters["checkpoint_version"].string_value == "0123456789ab"
    index = await served.call("RepositoryIndex", pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse)
    assert [(model.name, model.state) for model in index.models] == [("tiny", "READY")]


async def test_a_model_that_is_not_served_is_not_ready(served: Served) -> None:
    for asked in (pb.ModelReadyRequest(name="other"), pb.ModelReadyRequest(name="tiny", version="2")):
        assert not (await served.call("ModelReady", asked, pb.ModelReadyResponse)).ready


async def test_statistics_count_the_answered_images(served: Served, photo: bytes) -> None:
    await served.infer(request_for(photo, photo))
    request = pb.ModelStatisticsRequest(name="tiny")
    (statistics,) = (await served.call("ModelStatistics", request, pb.ModelStatisticsResponse)).model_stats
    assert statistics.inference_count == 2
    assert statistics.inference_stats.success.ns > 0


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig", "ModelStatistics"])
async def test_a_model_that_is_not_served_is_not_found(served: Served, method: str) -> None:
    asked = pb.ModelReadyRequest(name="other").SerializeToString()  # the name is the first field of all these requests
    assert (await failure_of(served.call(method, asked, pb.ModelReadyResponse)))[0] is grpc.StatusCode.NOT_FOUND


async def test_a_stopping_server_takes_no_new_request(served: Served, runtime: ServerRuntime, photo: bytes) -> None:
    runtime.drain()
    status, _, metadata = await failure_of(served.infer(request_for(photo)))
    assert (status, metadata["error-code"]) == (grpc.StatusCode.UNAVAILABLE, "not_ready")
    assert not (await served.call("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)).ready
