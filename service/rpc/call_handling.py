"""What all calls have in common: they are counted and bounded, and errors become gRPC statuses."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NoReturn, TypeVar

import grpc
from google.protobuf.message import Message
from grpc.aio import ServicerContext

from service.access.key_file import KeyFile
from service.classifier import ClientLimiter
from service.domain import ApiKey
from service.errors import ClientGoneError, ServiceError
from service.inference_protocol.messages import InferReply, InferRequest
from service.inference_protocol.protocol import InferenceProtocol
from service.rpc.calls import REQUEST_ID, Call, CallsInFlight, CancellationWatch, read_message
from service.rpc.reports import CallReports
from service.rpc.statuses import BUG, Failure, describe_failure
from service.telemetry.metrics import Metrics
from service.telemetry.outcomes import counting_failures
from service.telemetry.reports import Reporter

logger = logging.getLogger(__name__)

INFERENCE = ("ModelInfer", "ModelStreamInfer", "Predict")  # other calls, such as probes, are neither counted nor traced

Messages = AsyncIterator[bytes]
Context = ServicerContext[bytes, bytes]
Answer = Callable[[Messages, Call], Awaitable[Message]]
M = TypeVar("M", bound=Message)


class CallHandling:
    """The state and the handling of calls that all services share.

    Attributes:
        protocol: answers the calls of the protocol.
        in_flight: counts the calls that are being answered.
        by_address: counts the calls of each address.
        max_upload_s: longest time that a message may take to arrive.
        reports: reports on each call.
    """

    def __init__(
        self,
        protocol: InferenceProtocol,
        metrics: Metrics,
        max_upload_s: float,
        max_calls_per_address: int,
        coming: ClientLimiter,
        keys: KeyFile | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        """Create the state that all services share.

        Args:
            protocol: answers the calls of the protocol.
            metrics: the server's metrics.
            max_upload_s: longest time that a message may take to arrive.
            max_calls_per_address: concurrent calls, those included whose message has not arrived yet.
            coming: counts the messages on their way by client, together with the bodies on their way over HTTP.
            keys: API keys, one of which each inference request needs; None if none is needed.
            reporter: reports on each call; None for no reports.
        """
        self.protocol = protocol
        self.in_flight = CallsInFlight()
        self.max_upload_s = max_upload_s
        self._metrics = metrics
        self.by_address, self._keys = ClientLimiter(max_calls_per_address), keys
        self.reports, self._coming = CallReports(reporter), coming

    def method(self, name: str, answer: Answer) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """Make the gRPC handler of a method that takes one message.

        The call is taken as a stream of one message: it can then be refused before the message has arrived, the wait
        for the message is bounded, and its errors have our own text.

        Args:
            name: the service and the method, with a slash between them.
            answer: answers a call.
        """
        return grpc.stream_unary_rpc_method_handler(partial(self._answer, name, answer))

    def begin(self, context: Context) -> Call:
        """Make the record of a call, whose request ID is sent in the trailing metadata."""
        call = Call.of(context, time.monotonic())
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        return call

    async def read(self, messages: Messages, call: Call, message_type: type[M]) -> M:
        """Wait for the message of a call without inference; errors as `waiting_for_messages` and `read_message`."""
        with self.waiting_for_messages(call.address):
            return await read_message(messages, message_type, self.max_upload_s)

    @contextmanager
    def waiting_for_messages(self, address: str | None, key: ApiKey | None = None) -> Iterator[None]:
        """Count a message of a client, as `ClientLimiter` knows it, as on its way until the block ends.

        Raises:
            OverloadedError: too many messages of the client are on their way.
        """
        with self._coming.counting(address, key) as enter:
            enter()
            yield

    def key_of(self, call: Call) -> ApiKey | None:
        """Return the API key of an inference request; None if the server asks for none.

        Raises:
            UnauthorizedError: the request has no known key; the failure is counted.
        """
        if self._keys is None:
            return None
        with self.counting_failures():
            return self._keys.find({name.encode(): value.encode() for name, value in call.metadata.items()})

    async def read_request(
        self,
        messages: Messages,
        call: Call,
        key: ApiKey | None,
        message_type: type[M],
        translate: Callable[[M], InferRequest],
    ) -> InferRequest:
        """Wait for an inference request, unless it is refused before its message arrives.

        Raises:
            ServiceError: the request is refused or cannot be read; the failure is counted.
        """
        with self.counting_failures(key), CancellationWatch(), self.waiting_for_messages(call.address, key):
            within_s = self.protocol.check_before_body(call.arrived_at, {}, call.metadata, self.max_upload_s, key)
            return translate(await read_message(messages, message_type, within_s))

    def counting_failures(self, key: ApiKey | None = None) -> AbstractContextManager[None]:
        """Count a request, under its API key, that fails before it reaches `InferenceProtocol.infer`."""
        return counting_failures(self._metrics, key)

    async def infer(self, request: InferRequest, call: Call, key: ApiKey | None) -> InferReply:
        """Answer an inference request; errors as `InferenceProtocol.infer`."""
        return await self.protocol.infer(
            request,
            call.arrived_at,
            query={},
            headers=call.metadata,
            address=call.address,
            key=key,
            client_waits_s=call.time_left_s,
            watch=CancellationWatch(),
        )

    async def refuse(self, name: str, call: Call, context: Context, error: ServiceError) -> NoReturn:
        """End a call with an error and without a span; `name` as in `method`."""
        failure = describe_failure(error)
        with self.reports.reporting(name, call, is_traced=False) as ending:
            ending.failure = failure
            await context.abort(failure.status, failure.message, ((REQUEST_ID, call.request_id), *failure.metadata))

    async def _answer(self, name: str, answer: Answer, messages: Messages, context: Context) -> bytes:
        call = self.begin(context)
        with self.in_flight.counting(), self.reports.reporting(name, call, is_traced=is_inference(name)) as ending:
            named = ((REQUEST_ID, call.request_id), *ending.metadata)
            context.set_trailing_metadata(named)
            try:
                response = await answer(messages, call)
            except Exception as error:  # a bug may raise anything, which gRPC would show to the client
                ending.failure = failure = failure_of(error)
                await context.abort(failure.status, failure.message, (*named, *failure.metadata))
            ending.failure = None
            return response.SerializeToString()


def is_inference(name: str) -> bool:
    """Return whether a method, named as in `CallHandling.method`, asks for inference."""
    return name.rpartition("/")[2] in INFERENCE


def failure_of(error: Exception) -> Failure:
    """Return how a call ends that raised an error; failures of the server are logged.

    Raises:
        CancelledError: the client has left, and gets no answer.
    """
    if isinstance(error, ClientGoneError):
        raise asyncio.CancelledError from None
    if not isinstance(error, ServiceError):
        logger.error("%r", error, exc_info=error)
        return BUG
    failure = describe_failure(error)
    if failure.status is grpc.StatusCode.INTERNAL:
        logger.error("%s", error.message)
    return failure
