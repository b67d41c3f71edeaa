"""A gRPC server of a tiny checkpoint, in the process of the test."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import grpc.aio
import pytest
from google.protobuf.message import Message

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.engines.profile_store import extended_profile
from service.rpc import open_inference_pb2 as pb
from service.rpc.call_handling import CallHandling
from service.rpc.inference_service import SERVICE_NAME
from service.rpc.server import Bounds, serving
from service.runtime import ServerRuntime
from service.settings import Settings
from tests.service.http.scripted_server import ScriptedEngine

BOUNDS = Bounds(
    max_message_bytes=1_000_000, max_connections=8, max_calls=100, max_calls_per_connection=100, keep_alive_s=60
)
CALLS = 8  # concurrent calls of one address
ENDED_LOOPS = 16
M = TypeVar("M", bound=Message)


class LoopClosedLate(asyncio.SelectorEventLoop):
    """The event loop of a test, which is closed only once ENDED_LOOPS later tests have ended.

    gRPC's own thread notifies a loop of what has ended or is freed some time later. To notify a closed loop raises an
    error, in the loop of another test.
    """

    ended: ClassVar[deque["LoopClosedLate"]] = deque()

    def close(self) -> None:
        self.ended.append(self)
        self.close_all_but(ENDED_LOOPS)

    @classmethod
    def close_all_but(cls, count: int) -> None:
        while len(cls.ended) > count:
            super(LoopClosedLate, cls.ended.popleft()).close()


@dataclass(frozen=True, slots=True)
class Served:
    """A server and its client."""

    runtime: ServerRuntime
    engine: ScriptedEngine
    channel: grpc.aio.Channel
    port: int

    def call(
        self,
        method: str,
        request: Message | bytes,
        response_type: type[M],
        service: str = SERVICE_NAME,
        **options: Any,  # noqa: ANN401 - gRPC's
    ) -> "grpc.aio.UnaryUnaryCall[bytes, M]":
        data = request if isinstance(request, bytes) else request.SerializeToString()
        ask: grpc.aio.UnaryUnaryMultiCallable[bytes, M] = self.channel.unary_unary(
            f"/{service}/{method}", response_deserializer=response_type.FromString
        )
        return ask(data, **options)

    def infer(
        self,
        request: Message | bytes,
        **options: Any,  # noqa: ANN401 - as above
    ) -> "grpc.aio.UnaryUnaryCall[bytes, pb.ModelInferResponse]":
        return self.call("ModelInfer", request, pb.ModelInferResponse, **options)

    def infer_piecewise(self, messages: AsyncIterator[bytes]) -> "grpc.aio.StreamUnaryCall[bytes, bytes]":
        """Call ModelInfer with any number of messages, as no client does."""
        ask: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = self.channel.stream_unary(f"/{SERVICE_NAME}/ModelInfer")
        return ask(messages)

    def stream(
        self,
        requests: Iterator[bytes] | None = None,
        **options: Any,  # noqa: ANN401 - as above
    ) -> "grpc.aio.StreamStreamCall[bytes, pb.ModelStreamInferResponse]":
        ask: grpc.aio.StreamStreamMultiCallable[bytes, pb.ModelStreamInferResponse] = self.channel.stream_stream(
            f"/{SERVICE_NAME}/ModelStreamInfer", response_deserializer=pb.ModelStreamInferResponse.FromString
        )
        return ask(requests, **options)

    @property
    def in_flight(self) -> float:
        return self.runtime.metrics.registry().get_sample_value("supervit_requests_in_flight") or 0.0

    def count(self, outcome: str) -> float:
        registry = self.runtime.metrics.registry()
        return registry.get_sample_value("supervit_requests_total", {"outcome": outcome}) or 0.0


async def failure_of(call: Awaitable[object]) -> tuple[grpc.StatusCode, str, dict[str, str | bytes]]:
    """Wait for a call to fail, and return its status, its message and its metadata."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or "", dict(caught.value.trailing_metadata())


def request_for(*images: bytes, raw: bool = False, **parameters: float | str) -> pb.ModelInferRequest:
    """Return a request to the tiny checkpoint, as a gRPC message."""
    request = pb.ModelInferRequest(model_name="tiny", id="7")
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[len(images)])
    if raw:
        request.raw_input_contents.append(b"".join(len(each).to_bytes(4, "little") + each for each in images))
    else:
        tensor.contents.bytes_contents.extend(images)
    for name, value in parameters.items():
        kind = "string_param" if isinstance(value, str) else "double_param"
        setattr(request.parameters[name], kind, value)
    return request


async def until(is_so: Callable[[], bool]) -> None:
    """Poll a condition for at most 10 s: other threads make it true, and signal nothing."""
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving_in_process(
    runtime: ServerRuntime, engine: ScriptedEngine, bounds: Bounds = BOUNDS, max_upload_s: float = 30
) -> AsyncIterator[Served]:
    context, protocol = runtime.context, runtime.inference_protocol
    answering = CallHandling(
        protocol, runtime.metrics, max_upload_s, CALLS, runtime.coming, context.keys, context.reporter
    )
    async with (
        runtime.running(ready_first=True),
        serving(answering, ("127.0.0.1", 0), bounds, lambda: runtime.drain_left_s) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        engine.sizes.clear()  # of the warm-up
        engine.running.clear()
        yield Served(runtime, engine, channel, port)


@pytest.fixture(scope="session")
def _loops_closed_in_the_end() -> Iterator[None]:
    yield
    LoopClosedLate.close_all_but(0)


@pytest.fixture
def anyio_backend(_loops_closed_in_the_end: None) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": LoopClosedLate}


@pytest.fixture
def engine(checkpoint: Checkpoint) -> ScriptedEngine:
    return ScriptedEngine(checkpoint)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        checkpoint=str(tmp_path), profile_folder=tmp_path / "profiles", drain_s=20, default_budget_ms=60_000
    )


@pytest.fixture
def latencies(checkpoint: Checkpoint) -> LatencyTable:
    """A machine so fast that no budget of a test is too small."""
    return LatencyTable((1, 4), dict.fromkeys(extended_profile(checkpoint).by_subnetwork, (1e-06, 2e-06)))


@pytest.fixture
def runtime(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable
) -> ServerRuntime:
    return ServerRuntime(settings, checkpoint, engine, latencies)


@pytest.fixture
async def served(runtime: ServerRuntime, engine: ScriptedEngine) -> AsyncIterator[Served]:
    async with serving_in_process(runtime, engine) as served:
        yield served


@pytest.fixture
async def one_on_its_way(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable
) -> AsyncIterator[Served]:
    """A server that receives at most one message of each client at a time."""
    one = settings.model_copy(update={"max_in_flight_per_address": 1})
    async with serving_in_process(ServerRuntime(one, checkpoint, engine, latencies), engine) as served:
        yield served
