"""Bounds how many calls of an address there are at once: of every service, those of health and reflection included."""

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from inspect import isawaitable
from typing import Any

import grpc
import grpc.aio

from service.errors import OverloadedError
from service.rpc.answering import Answering, Context, is_inference
from service.rpc.calls import address_of

KINDS = {False: "unary", True: "stream"}


class AddressBound(grpc.aio.ServerInterceptor):
    """Counts each call from its beginning to its end, and refuses those beyond the bound."""

    def __init__(self, answering: Answering) -> None:
        """Take what counts them, and what those are told that are refused."""
        self._answering = answering

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401 - a handler, or None for a method that there is not, of which the types know nothing
        """Put the bound before what answers a call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = f"{KINDS[handler.request_streaming]}_{KINDS[handler.response_streaming]}"
        bounded = partial(self._answer, handler_call_details.method.lstrip("/"), getattr(handler, kind))
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(bounded, handler.request_deserializer, handler.response_serializer)

    async def _answer(self, name: str, behaviour: Callable[..., Any], asked: object, context: Context) -> object:
        with self._answering.by_address.counting(address_of(context.peer())) as enter:
            try:
                with self._answering.counting_failures() if is_inference(name) else nullcontext():
                    enter()
            except OverloadedError as error:
                await self._answering.refuse(name, self._answering.begin(context), context, error)
            answer = behaviour(asked, context)
            if isawaitable(answer):
                return await answer
            async for response in answer:
                await context.write(response)
            return None
