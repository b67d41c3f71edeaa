import asyncio

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha import reflection_pb2 as v1alpha

from service.rpc import open_inference_pb2 as pb
from service.rpc.inference_service import SERVICE_NAME
from service.runtime import ServerRuntime
from tests.service.http.scripted_server import ScriptedEngine
from tests.service.rpc.conftest import CALLS, Served, failure_of, request_for, serving_in_process
from tests.service.rpc.test_server import watch_health

pytestmark = pytest.mark.anyio

REFLECTION = f"{reflection.SERVICE_NAME}/ServerReflectionInfo"


async def fill(served: Served) -> "list[grpc.aio.UnaryStreamCall[bytes, health_pb2.HealthCheckResponse]]":
    """Open as many health watches as an address may have concurrent calls."""
    watching = [watch_health(served.channel) for _ in range(CALLS)]
    for each in watching:
        await anext(each.__aiter__())
    return watching


async def test_health_watches_count_among_the_calls_of_their_address(served: Served, photo: bytes) -> None:
    watching = await fill(served)
    status, _, metadata = await failure_of(served.infer(request_for(photo)))
    assert (status, metadata["error-code"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded")
    assert metadata["grpc-retry-pushback-ms"] == "1000"
    assert len(metadata["x-request-id"]) == 32
    for each in watching:
        each.cancel()


async def test_streams_without_a_request_count_among_the_calls_of_their_address(served: Served) -> None:
    streams = [served.stream() for _ in range(CALLS + 1)]
    codes = [asyncio.ensure_future(stream.code()) for stream in streams]
    (refused,), others = await asyncio.wait(codes, return_when=asyncio.FIRST_COMPLETED)
    assert await refused is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(others) == CALLS
    for stream in streams:
        stream.cancel()


async def test_requests_rejected_for_their_address_are_counted(served: Served, photo: bytes) -> None:
    watching = await fill(served)
    await failure_of(served.infer(request_for(photo)))
    await failure_of(served.call("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse))
    registry = served.runtime.metrics.registry()
    assert served.count("overloaded") == 1  # a probe is not a request
    assert registry.get_sample_value("supervit_dropped_requests_total", {"reason": "address"}) == 1
    for each in watching:
        each.cancel()


async def test_a_call_counts_for_its_address_until_it_ends(served: Served, photo: bytes) -> None:
    for each in await fill(served):
        each.cancel()

    async def is_answered() -> bool:
        try:
            return (await served.infer(request_for(photo))).id == "7"
        except grpc.aio.AioRpcError:
            return False

    async with asyncio.timeout(10):
        while not await is_answered():
            pass


@pytest.mark.parametrize(
    ("service", "method"),
    [(SERVICE_NAME, "ServerLive"), (health.SERVICE_NAME, "Check"), (health.SERVICE_NAME, "Watch")],
)
async def test_probes_count_among_the_messages_being_received_from_their_address(
    one_on_its_way: Served, service: str, method: str
) -> None:
    kept_open: grpc.aio.StreamStreamCall[bytes, bytes] = one_on_its_way.channel.stream_stream(f"/{REFLECTION}")()
    await kept_open.write(v1alpha.ServerReflectionRequest(list_services="*").SerializeToString())
    await kept_open.read()
    looking: grpc.aio.StreamStreamCall[bytes, bytes] = one_on_its_way.channel.stream_stream(f"/{service}/{method}")()
    assert await looking.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "1 requests from this address are being received already" in await looking.details()
    assert one_on_its_way.count("overloaded") == 0  # it is not a request
    kept_open.cancel()


async def test_a_message_that_has_arrived_is_no_longer_being_received(one_on_its_way: Served) -> None:
    watching = watch_health(one_on_its_way.channel)
    await anext(watching.__aiter__())
    assert (await one_on_its_way.call("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)).live
    watching.cancel()


@pytest.mark.parametrize(
    ("service", "method"),
    [(SERVICE_NAME, "ServerLive"), (health.SERVICE_NAME, "Check"), (health.SERVICE_NAME, "Watch")],
)
async def test_a_probe_whose_message_does_not_arrive_is_ended(
    runtime: ServerRuntime, engine: ScriptedEngine, service: str, method: str
) -> None:
    async with serving_in_process(runtime, engine, max_upload_s=0.05) as served:
        looking: grpc.aio.StreamStreamCall[bytes, bytes] = served.channel.stream_stream(f"/{service}/{method}")()
        assert await looking.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("path", [f"{health.SERVICE_NAME}/Check", REFLECTION])
async def test_an_invalid_message_to_health_or_reflection_is_an_invalid_argument(served: Served, path: str) -> None:
    look: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = served.channel.stream_stream(f"/{path}")
    looking = look(iter([b"\xff"]))
    assert await looking.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await looking.details() == "the message cannot be parsed"


async def test_an_unknown_method_is_unimplemented(served: Served) -> None:
    call = served.call("ModelUnload", b"", pb.ServerLiveResponse)
    assert (await failure_of(call))[0] is grpc.StatusCode.UNIMPLEMENTED
