"""GRPCInferenceService: calls to the protocol's core, its answers to messages, and whatever fails to a status."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from grpc.aio import ServicerContext

from service.access.key_file import KeyFile
from service.classifier import RequestsByAddress
from service.domain import ApiKey
from service.errors import ClientGoneError, ServiceError
from service.inference_protocol.messages import InferRequest
from service.inference_protocol.protocol import InferenceProtocol
from service.request_names import name_request
from service.rpc import open_inference_pb2 as pb
from service.rpc.calls import REQUEST_ID, Call, CallsInFlight, CancellationWatch, parse_message, read_message
from service.rpc.messages import read_request, write_reply
from service.rpc.statuses import BUG, Failure, describe_failure
from service.telemetry.metrics import Metrics
from service.telemetry.outcomes import counted

logger = logging.getLogger(__name__)

SERVICE_NAME = "inference.GRPCInferenceService"
STREAM_AHEAD = 64  # requests of a stream that are answered at once; what it sends beyond waits on its way

Messages = AsyncIterator[bytes]
Context = ServicerContext[bytes, bytes]
Answer = Callable[[Messages, Call], Awaitable[Message]]


class InferenceService:
    """Answers the calls of the service.

    Attributes:
        in_flight: counts what is being answered.
    """

    def __init__(
        self,
        protocol: InferenceProtocol,
        metrics: Metrics,
        max_upload_s: float,
        max_calls_per_address: int,
        keys: KeyFile | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the core.

        Args:
            protocol: that.
            metrics: what is counted.
            max_upload_s: longest time that a message may take to arrive.
            max_calls_per_address: at once, those included whose message is still to come.
            keys: that requests must come with one of; None for no such thing.
            clock: monotonic, in seconds.
        """
        self._protocol, self._metrics, self._max_upload_s, self._clock = protocol, metrics, max_upload_s, clock
        self._by_address, self._keys = RequestsByAddress(max_calls_per_address), keys
        self.in_flight = CallsInFlight()

    def is_ready(self) -> bool:
        """Tell whether requests are taken."""
        return self._protocol.is_ready()

    def handler(self) -> grpc.GenericRpcHandler:
        """Make what a server of gRPC calls upon.

        A call of one message is taken as a stream of one: it can then be refused before its message has come, which is
        waited for no longer than it may take, and what is wrong with it is said in our own words.
        """
        answers: dict[str, Answer] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "ModelInfer": self._model_infer,
        }
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            method: grpc.stream_unary_rpc_method_handler(partial(self._answer, method, answer))
            for method, answer in answers.items()
        }
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._answer_stream)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    async def _answer(self, method: str, answer: Answer, messages: Messages, context: Context) -> bytes:
        call = Call.of(context, self._clock())
        named = ((REQUEST_ID, call.request_id),)
        with self.in_flight.counting():
            try:
                with self._by_address.counting(call.address) as enter:
                    enter()
                    response = await answer(messages, call)
            except Exception as error:  # a bug raises anything, of which gRPC would tell the client
                failure = _failure_of(error, call)
                logger.debug("%s %s %s", call.address, method, failure.status.name)
                await context.abort(failure.status, failure.message, (*named, *failure.metadata))
            logger.debug("%s %s OK", call.address, method)
            context.set_trailing_metadata(named)
            return response.SerializeToString()

    async def _answer_stream(self, messages: Messages, context: Context) -> None:
        """Answer each request of a stream as soon as it is done; one that fails ends no other."""
        call = Call.of(context, self._clock())
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        slots, writing = asyncio.Semaphore(STREAM_AHEAD), asyncio.Lock()

        async def answer(data: bytes) -> None:
            with self.in_flight.counting():
                response = await self._stream_response(data, call)
                async with writing:
                    await context.write(response.SerializeToString())
            slots.release()

        async with asyncio.TaskGroup() as answering:
            async for data in messages:
                await slots.acquire()
                answering.create_task(answer(data))

    async def _stream_response(self, data: bytes, call: Call) -> pb.ModelStreamInferResponse:
        now, name = self._clock(), ""
        left_s = None if call.time_left_s is None else call.arrived_at + call.time_left_s - now
        try:
            with self._counting_failures():
                key = self._key_of(call)
                message = parse_message(data, pb.ModelInferRequest)
                name = message.id
                request = read_request(message)
            request_id = name_request(name.encode()).decode() if name else call.request_id
            asked = replace(call, request_id=request_id, arrived_at=now, time_left_s=left_s)
            answer = await self._infer(request, asked, key, is_raw=bool(message.raw_input_contents))
        except Exception as error:  # as above
            failure = _failure_of(error, call)
            return pb.ModelStreamInferResponse(
                error_message=failure.message, infer_response=pb.ModelInferResponse(id=name)
            )
        return pb.ModelStreamInferResponse(infer_response=answer)

    async def _model_infer(self, messages: Messages, call: Call) -> pb.ModelInferResponse:
        with self._counting_failures(), CancellationWatch():
            key = self._key_of(call)
            within_s = self._protocol.time_for_body_s(call.arrived_at, {}, call.metadata, self._max_upload_s, key)
            message = await read_message(messages, pb.ModelInferRequest, within_s)
            request = read_request(message)
        return await self._infer(request, call, key, is_raw=bool(message.raw_input_contents))

    def _key_of(self, call: Call) -> ApiKey | None:
        """Find the key that a call came with, in its metadata.

        Raises:
            UnauthorizedError: there is none that is known.
        """
        if self._keys is None:
            return None
        return self._keys.find({name.encode(): value.encode() for name, value in call.metadata.items()})

    @contextmanager
    def _counting_failures(self) -> Iterator[None]:
        """Count a request that fails before the protocol's core knows of it."""
        try:
            yield
        except ServiceError:
            with counted(self._metrics):
                raise

    async def _infer(
        self, request: InferRequest, call: Call, key: ApiKey | None, *, is_raw: bool
    ) -> pb.ModelInferResponse:
        reply = await self._protocol.infer(
            request,
            call.arrived_at,
            query={},
            headers=call.metadata,
            address=call.address,
            key=key,
            client_waits_s=call.time_left_s,
            watch=CancellationWatch(),
            request_id=call.request_id,
        )
        return write_reply(reply, is_raw=is_raw)

    async def _server_live(self, messages: Messages, _: Call) -> pb.ServerLiveResponse:
        await read_message(messages, pb.ServerLiveRequest, self._max_upload_s)
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, messages: Messages, _: Call) -> pb.ServerReadyResponse:
        await read_message(messages, pb.ServerReadyRequest, self._max_upload_s)
        return pb.ServerReadyResponse(ready=self._protocol.is_ready())

    async def _model_ready(self, messages: Messages, _: Call) -> pb.ModelReadyResponse:
        asked = await read_message(messages, pb.ModelReadyRequest, self._max_upload_s)
        self._protocol.require_model(asked.name, asked.version)
        return pb.ModelReadyResponse(ready=self._protocol.is_ready())

    async def _server_metadata(self, messages: Messages, _: Call) -> pb.ServerMetadataResponse:
        await read_message(messages, pb.ServerMetadataRequest, self._max_upload_s)
        return ParseDict(self._protocol.server_metadata(), pb.ServerMetadataResponse())

    async def _model_metadata(self, messages: Messages, _: Call) -> pb.ModelMetadataResponse:
        asked = await read_message(messages, pb.ModelMetadataRequest, self._max_upload_s)
        return ParseDict(self._protocol.model_metadata(asked.name, asked.version), pb.ModelMetadataResponse())

    async def _model_config(self, messages: Messages, _: Call) -> pb.ModelConfigResponse:
        asked = await read_message(messages, pb.ModelConfigRequest, self._max_upload_s)
        return ParseDict({"config": self._protocol.model_config(asked.name, asked.version)}, pb.ModelConfigResponse())

    async def _model_statistics(self, messages: Messages, _: Call) -> pb.ModelStatisticsResponse:
        asked = await read_message(messages, pb.ModelStatisticsRequest, self._max_upload_s)
        statistics = await asyncio.to_thread(self._protocol.statistics, asked.name, asked.version)
        return ParseDict(statistics, pb.ModelStatisticsResponse())

    async def _repository_index(self, messages: Messages, _: Call) -> pb.RepositoryIndexResponse:
        asked = await read_message(messages, pb.RepositoryIndexRequest, self._max_upload_s)
        models = [] if asked.ready and not self._protocol.is_ready() else self._protocol.repository_index()
        return ParseDict({"models": models}, pb.RepositoryIndexResponse())


def _failure_of(error: Exception, call: Call) -> Failure:
    """Say how a call ends; the log says by which one the server failed.

    Raises:
        CancelledError: its client has gone, and is told nothing.
    """
    if isinstance(error, ClientGoneError):
        raise asyncio.CancelledError from None
    if not isinstance(error, ServiceError):
        logger.error("request %s: %r", call.request_id, error, exc_info=error)
        return BUG
    failure = describe_failure(error)
    if failure.status is grpc.StatusCode.INTERNAL:
        logger.error("request %s: %s", call.request_id, error.message)
    return failure
