"""GRPCInferenceService: passes its calls to `InferenceProtocol`, and turns the answers into messages."""

import asyncio
import time
from contextlib import ExitStack
from dataclasses import replace

import grpc
from google.protobuf.json_format import ParseDict

from service.domain import ApiKey
from service.errors import OverloadedError, UnauthorizedError, UnknownModelError, UploadTimeoutError
from service.inference_protocol.messages import InferRequest
from service.rpc import open_inference_pb2 as pb
from service.rpc.call_handling import CallHandling, Context, Messages, failure_of
from service.rpc.calls import Call, parse_message
from service.rpc.messages import read_request, write_reply

SERVICE_NAME = "inference.GRPCInferenceService"
STREAM = f"{SERVICE_NAME}/ModelStreamInfer"
STREAM_AHEAD = 64  # concurrent requests of a stream; further ones wait in the connection, as backpressure on the client


class InferenceService:
    """Answers the calls of the service."""

    def __init__(self, answering: CallHandling, keep_alive_s: float) -> None:
        """Create the service from its collaborators.

        Args:
            answering: what all services share.
            keep_alive_s: how long a stream is kept for its next request, once all others have their answers.
        """
        self._answering, self._protocol = answering, answering.protocol
        self._keep_alive_s = keep_alive_s

    def handler(self) -> grpc.GenericRpcHandler:
        """Make the handler to register with a gRPC server."""
        answers = {
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
        handlers = {
            method: self._answering.method(f"{SERVICE_NAME}/{method}", answer) for method, answer in answers.items()
        }
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._model_stream_infer)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    async def _model_infer(self, messages: Messages, call: Call) -> pb.ModelInferResponse:
        key = self._answering.key_of(call)
        request = await self._answering.read_request(messages, call, key, pb.ModelInferRequest, read_request)
        return await self._infer(request, call, key)

    async def _model_stream_infer(self, messages: Messages, context: Context) -> None:
        """Answer a stream; it is refused if it has no known key, is one too many of its client, or stays idle.

        While the stream is open, a message of it may be on its way, and it counts as one.
        """
        call = self._answering.begin(context)
        try:
            key = self._answering.key_of(call)
            with ExitStack() as open_stream:
                with self._answering.counting_failures(key):
                    open_stream.enter_context(self._answering.waiting_for_messages(call.address, key))
                await self._answer_stream(messages, context, call)
        except (OverloadedError, UnauthorizedError, UploadTimeoutError) as error:
            await self._answering.refuse(STREAM, call, context, error)

    async def _answer_stream(self, messages: Messages, context: Context, call: Call) -> None:
        """Answer each request of a stream as soon as it is done; a failed request ends no other.

        Raises:
            UploadTimeoutError: all requests have their answers, and no further one arrives.
        """
        slots, writing, loop = asyncio.Semaphore(STREAM_AHEAD), asyncio.Lock(), asyncio.get_running_loop()
        unanswered = 0

        async def answer(data: bytes) -> None:
            nonlocal unanswered
            with self._answering.in_flight.counting():
                response = await self._stream_response(data, call)
                async with writing:
                    await context.write(response.SerializeToString())
            slots.release()
            unanswered -= 1
            if not unanswered:
                idle.reschedule(loop.time() + self._keep_alive_s)

        try:
            async with asyncio.timeout(self._keep_alive_s) as idle, asyncio.TaskGroup() as answering:
                async for data in messages:
                    idle.reschedule(None)
                    unanswered += 1
                    await slots.acquire()
                    answering.create_task(answer(data))
        except TimeoutError as error:
            raise UploadTimeoutError(f"no request arrived for {self._keep_alive_s:g} s") from error

    async def _stream_response(self, data: bytes, call: Call) -> pb.ModelStreamInferResponse:
        now, name = time.monotonic(), ""
        left_s = None if call.time_left_s is None else call.arrived_at + call.time_left_s - now
        call = replace(call, arrived_at=now, time_left_s=left_s)
        with self._answering.reports.reporting(STREAM, call) as ending:
            try:
                key = self._answering.key_of(call)  # for each request: the key may have been removed from the file
                with self._answering.counting_failures(key):
                    message = parse_message(data, pb.ModelInferRequest)
                    name = message.id
                    request = read_request(message)
                answer = await self._infer(request, call, key)
            except Exception as error:  # a bug may raise anything, and must end no other request
                ending.failure = failure = failure_of(error)
                return pb.ModelStreamInferResponse(
                    error_message=failure.message, infer_response=pb.ModelInferResponse(id=name)
                )
            ending.failure = None
            return pb.ModelStreamInferResponse(infer_response=answer)

    async def _infer(self, request: InferRequest, call: Call, key: ApiKey | None) -> pb.ModelInferResponse:
        is_raw = any(isinstance(tensor.contents, bytes) for tensor in request.inputs)
        return write_reply(await self._answering.infer(request, call, key), is_raw=is_raw)

    async def _server_live(self, messages: Messages, call: Call) -> pb.ServerLiveResponse:
        await self._answering.read(messages, call, pb.ServerLiveRequest)
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, messages: Messages, call: Call) -> pb.ServerReadyResponse:
        await self._answering.read(messages, call, pb.ServerReadyRequest)
        return pb.ServerReadyResponse(ready=self._protocol.is_ready())

    async def _model_ready(self, messages: Messages, call: Call) -> pb.ModelReadyResponse:
        asked = await self._answering.read(messages, call, pb.ModelReadyRequest)
        try:
            self._protocol.require_model(asked.name, asked.version)
        except UnknownModelError:  # Triton answers ready=False rather than an error
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._protocol.is_ready())

    async def _server_metadata(self, messages: Messages, call: Call) -> pb.ServerMetadataResponse:
        await self._answering.read(messages, call, pb.ServerMetadataRequest)
        return ParseDict(self._protocol.server_metadata(), pb.ServerMetadataResponse())

    async def _model_metadata(self, messages: Messages, call: Call) -> pb.ModelMetadataResponse:
        asked = await self._answering.read(messages, call, pb.ModelMetadataRequest)
        return ParseDict(self._protocol.model_metadata(asked.name, asked.version), pb.ModelMetadataResponse())

    async def _model_config(self, messages: Messages, call: Call) -> pb.ModelConfigResponse:
        asked = await self._answering.read(messages, call, pb.ModelConfigRequest)
        return ParseDict({"config": self._protocol.model_config(asked.name, asked.version)}, pb.ModelConfigResponse())

    async def _model_statistics(self, messages: Messages, call: Call) -> pb.ModelStatisticsResponse:
        asked = await self._answering.read(messages, call, pb.ModelStatisticsRequest)
        statistics = await asyncio.to_thread(self._protocol.statistics, asked.name, asked.version)
        return ParseDict(statistics, pb.ModelStatisticsResponse())

    async def _repository_index(self, messages: Messages, call: Call) -> pb.RepositoryIndexResponse:
        asked = await self._answering.read(messages, call, pb.RepositoryIndexRequest)
        models = [] if asked.ready and not self._protocol.is_ready() else self._protocol.repository_index()
        return ParseDict({"models": models}, pb.RepositoryIndexResponse())
