import asyncio
import gzip

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from service.rpc import open_inference_pb2 as pb
from service.rpc.inference_service import SERVICE_NAME
from service.rpc.server import Bounds
from service.runtime import ServerRuntime
from tests.service.http.scripted_server import ScriptedEngine
from tests.service.rpc.conftest import BOUNDS, Served, failure_of, request_for, serving_in_process, until

pytestmark = pytest.mark.anyio

Status = health_pb2.HealthCheckResponse


def watch_health(channel: grpc.aio.Channel, service: str = "") -> "grpc.aio.UnaryStreamCall[bytes, Status]":
    watch: grpc.aio.UnaryStreamMultiCallable[bytes, Status] = channel.unary_stream(
        "/grpc.health.v1.Health/Watch", response_deserializer=Status.FromString
    )
    return watch(health_pb2.HealthCheckRequest(service=service).SerializeToString())


async def statuses_of(watching: "grpc.aio.UnaryStreamCall[bytes, Status]", number: int) -> list[int]:
    seen = watching.__aiter__()
    return [(await anext(seen)).status for _ in range(number)]


@pytest.mark.parametrize("service", ["", SERVICE_NAME])
async def test_health_follows_readiness(served: Served, runtime: ServerRuntime, service: str) -> None:
    watching = watch_health(served.channel, service)
    assert await statuses_of(watching, 1) == [Status.SERVING]
    runtime.drain()
    assert await statuses_of(watching, 1) == [Status.NOT_SERVING]
    check: grpc.aio.UnaryUnaryMultiCallable[bytes, Status] = served.channel.unary_unary(
        "/grpc.health.v1.Health/Check", response_deserializer=Status.FromString
    )
    answer = await check(health_pb2.HealthCheckRequest(service=service).SerializeToString())
    assert answer.status == Status.NOT_SERVING


async def test_reflection_describes_the_service(served: Served) -> None:
    ask: grpc.aio.StreamStreamMultiCallable[bytes, reflection_pb2.ServerReflectionResponse]
    ask = served.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME)
    (answer,) = [each async for each in ask(iter([request.SerializeToString()]))]
    described = FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0])
    assert described.service[0].name == "GRPCInferenceService"


async def test_compressed_messages_are_read(served: Served, photo: bytes) -> None:
    response = await served.infer(request_for(photo), compression=grpc.Compression.Gzip)
    assert response.id == "7"


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_a_message_over_the_limit_is_refused_however_small_it_is_when_compressed(
    served: Served, compression: grpc.Compression
) -> None:
    long = request_for(bytes(BOUNDS.max_message_bytes))
    assert len(gzip.compress(long.SerializeToString())) < BOUNDS.max_message_bytes / 100
    status, _, _ = await failure_of(served.infer(long, compression=compression))
    assert status is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_connections_are_bounded(runtime: ServerRuntime, engine: ScriptedEngine) -> None:
    bounds = Bounds(
        max_message_bytes=1000, max_connections=2, max_calls=100, max_calls_per_connection=100, keep_alive_s=60
    )
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with serving_in_process(runtime, engine, bounds) as served:
        address, request = f"127.0.0.1:{served.port}", pb.ServerLiveRequest()
        channels = [grpc.aio.insecure_channel(address, own) for _ in range(3)]
        clients = [Served(runtime, engine, channel, served.port) for channel in channels]
        for client in clients[:2]:
            assert (await client.call("ServerLive", request, pb.ServerLiveResponse)).live
        refused = clients[2].call("ServerLive", request, pb.ServerLiveResponse, timeout=5)
        assert (await failure_of(refused))[0] is grpc.StatusCode.UNAVAILABLE
        for channel in channels:
            await channel.close()


async def test_calls_beyond_the_bound_are_refused(runtime: ServerRuntime, engine: ScriptedEngine, photo: bytes) -> None:
    bounds = Bounds(
        max_message_bytes=10_000, max_connections=8, max_calls=1, max_calls_per_connection=100, keep_alive_s=60
    )
    async with serving_in_process(runtime, engine, bounds) as served:
        engine.may_run.clear()
        first = asyncio.ensure_future(served.infer(request_for(photo, budget_ms=60_000.0)))
        await until(engine.running.is_set)
        assert (await failure_of(served.infer(request_for(photo))))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        engine.may_run.set()
        await first


async def test_shutdown_waits_for_answers_but_not_for_health_watches_or_idle_streams(
    runtime: ServerRuntime, engine: ScriptedEngine, photo: bytes
) -> None:
    loop = asyncio.get_running_loop()
    async with serving_in_process(runtime, engine) as served:
        engine.may_run.clear()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{served.port}")
        client = Served(runtime, engine, channel, served.port)
        first = asyncio.ensure_future(client.infer(request_for(photo, budget_ms=60_000.0)))
        await until(engine.running.is_set)
        watching = watch_health(channel)
        stream = client.stream()
        assert await statuses_of(watching, 1) == [Status.SERVING]
        runtime.drain()
        loop.call_later(0.1, engine.may_run.set)
        told_at = loop.time()
    assert loop.time() - told_at < 15  # of the 20 s for answers, which a watch that is waited for would take whole
    assert (await first).id == "7"
    assert await stream.code() is not grpc.StatusCode.OK
    await channel.close()
