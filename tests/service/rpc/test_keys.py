import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.rpc import open_inference_pb2 as pb
from service.runtime import ServerRuntime
from service.settings import Settings
from tests.service.http.scripted_server import ScriptedEngine
from tests.service.rpc.conftest import Served, failure_of, request_for, serving_in_process

pytestmark = pytest.mark.anyio
METADATA = (("authorization", "Bearer my-secret"),)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(
        f'[[key]]\nname = "mine"\nsha256 = "{hashlib.sha256(b"my-secret").hexdigest()}"\nmax_in_flight = 1\n'
    )
    return path


@pytest.fixture
async def asked(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable, keys: Path
) -> AsyncIterator[Served]:
    runtime = ServerRuntime(settings.model_copy(update={"keys": keys}), checkpoint, engine, latencies)
    async with serving_in_process(runtime, engine) as served:
        yield served


async def test_a_request_needs_a_key_in_its_metadata(asked: Served, photo: bytes) -> None:
    for metadata in (None, (("x-api-key", "another"),)):
        status, message, _ = await failure_of(asked.infer(request_for(photo), metadata=metadata))
        assert status is grpc.StatusCode.UNAUTHENTICATED
        assert "key" in message
    assert (await asked.infer(request_for(photo), metadata=METADATA)).id == "7"
    registry = asked.runtime.metrics.registry()
    assert registry.get_sample_value("supervit_key_requests_total", {"key": "mine", "outcome": "ok"}) == 1
    assert asked.count("unauthorized") == 2


async def test_a_stream_without_a_key_is_refused_before_its_first_request(asked: Served) -> None:
    stream = asked.stream()
    assert await stream.code() is grpc.StatusCode.UNAUTHENTICATED
    assert dict(await stream.trailing_metadata())["error-code"] == "unauthorized"
    assert asked.count("unauthorized") == 1


async def test_a_stream_with_a_key_is_answered(asked: Served, photo: bytes) -> None:
    stream = asked.stream(iter([request_for(photo).SerializeToString()]), metadata=METADATA)
    assert [answer.infer_response.id async for answer in stream] == ["7"]


async def test_a_stream_counts_as_being_received_for_its_key_and_a_probe_for_its_address(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: ScriptedEngine,
    latencies: LatencyTable,
    keys: Path,
    photo: bytes,
) -> None:
    bounded = settings.model_copy(update={"keys": keys, "max_in_flight_per_address": 1})
    async with serving_in_process(ServerRuntime(bounded, checkpoint, engine, latencies), engine) as served:
        stream = served.stream(metadata=METADATA)
        await stream.write(request_for(photo).SerializeToString())
        await stream.read()
        status, message, _ = await failure_of(served.infer(request_for(photo), metadata=METADATA))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert message.startswith("1 requests with this key are being received already")
        assert (await served.call("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)).live
        stream.cancel()


async def test_requests_that_cannot_be_parsed_are_counted_for_their_key(asked: Served) -> None:
    await failure_of(asked.infer(b"\xff\xff", metadata=METADATA))
    assert [answer.error_message async for answer in asked.stream(iter([b"\xff\xff"]), metadata=METADATA)]
    registry, labels = asked.runtime.metrics.registry(), {"key": "mine", "outcome": "invalid_parameter"}
    assert registry.get_sample_value("supervit_key_requests_total", labels) == 2


async def test_a_probe_needs_no_key(asked: Served) -> None:
    assert (await asked.call("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)).ready


async def test_the_images_of_a_request_count_towards_the_in_flight_limit_of_its_key(
    asked: Served, photo: bytes
) -> None:
    status, message, metadata = await failure_of(asked.infer(request_for(photo, photo), metadata=METADATA))
    assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert message.startswith("1 requests with this key")
    assert metadata["error-code"] == "overloaded"
