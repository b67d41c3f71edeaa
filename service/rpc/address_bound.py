"""Bounds the concurrent calls of each address, over all services, health and reflection included."""

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from inspect import isawaitable
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from service.errors import InvalidParameterError, ServiceError
from service.rpc.call_handling import CallHandling, Context, Messages, is_inference
from service.rpc.calls import address_of, read_bytes


class AddressBound(grpc.aio.ServerInterceptor):
    """Counts each call from its beginning to its end, and refuses calls beyond the bound.

    For health and reflection, which are gRPC's own services, it also counts the messages on their way. Like all others,
    their calls are taken as streams, of which gRPC reads nothing before it is told to.
    """

    def __init__(self, answering: CallHandling) -> None:
        """Create the interceptor; `answering` counts calls and ends those that are refused."""
        self._answering = answering

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401 - a handler, or None for an unknown method, which the types do not allow
        """Wrap the handler of a call in the bound."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        bounded = partial(self._answer, handler_call_details.method.lstrip("/"), handler)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(bounded, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(bounded, None, handler.response_serializer)

    async def _answer(
        self, name: str, handler: "grpc.RpcMethodHandler[Any, Any]", messages: Messages, context: Context
    ) -> object:
        address = address_of(context.peer())
        with self._answering.by_address.counting(address) as enter:
            try:
                with self._answering.counting_failures() if is_inference(name) else nullcontext():
                    enter()
                if handler.request_deserializer is not None:
                    return await self._answer_other(handler, address, messages, context)
            except ServiceError as error:
                await self._answering.refuse(name, self._answering.begin(context), context, error)
            return await _respond(_behaviour(handler)(messages, context), context)

    async def _answer_other(
        self, handler: "grpc.RpcMethodHandler[Any, Any]", address: str | None, messages: Messages, context: Context
    ) -> object:
        """Answer a call of one of gRPC's own services; our own services read and count their messages themselves.

        Raises:
            ServiceError: the message does not arrive, cannot be parsed, or is one too many of its client.
        """
        if handler.request_streaming:
            with self._answering.waiting_for_messages(address):
                requests = (_read(handler, data) async for data in messages)
                return await _respond(_behaviour(handler)(requests, context), context)
        with self._answering.waiting_for_messages(address):
            data = await read_bytes(messages, self._answering.max_upload_s)
        return await _respond(_behaviour(handler)(_read(handler, data), context), context)


def _behaviour(handler: "grpc.RpcMethodHandler[Any, Any]") -> Callable[..., Any]:
    kinds = {False: "unary", True: "stream"}
    behaviour: Callable[..., Any] = getattr(
        handler, f"{kinds[handler.request_streaming]}_{kinds[handler.response_streaming]}"
    )
    return behaviour


def _read(handler: "grpc.RpcMethodHandler[Any, Any]", data: bytes) -> object:
    deserializer = cast(Callable[[bytes], object], handler.request_deserializer)
    try:
        return deserializer(data)
    except DecodeError as error:
        raise InvalidParameterError("the message cannot be parsed") from error


async def _respond(answer: Any, context: Context) -> object:  # noqa: ANN401 - gRPC takes both kinds of behaviour
    """Return the answer, or write the answers of a stream one after the other."""
    if isawaitable(answer):
        return await answer
    async for response in answer:
        await context.write(response)
    return None
