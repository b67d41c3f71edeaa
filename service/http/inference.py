"""The HTTP side of the inference protocol: reads a request's body within bounds, and its query and headers."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from fastapi import Request

from service.http.callers import Caller, caller_of
from service.http.context import RouteContext
from service.http.disconnects import ClientWatch
from service.http.queries import read_query
from service.http.uploads import read_body
from service.http.v2_bodies import undo_encoding
from service.inference_protocol.messages import InferReply, InferRequest
from service.inference_protocol.protocol import InferenceProtocol
from service.telemetry.outcomes import counting_failures


class InferenceOverHttp:
    """Reads requests, whatever the format of their bodies, and has the inference protocol answer them."""

    def __init__(self, context: RouteContext, protocol: InferenceProtocol) -> None:
        """Create the reader from the collaborators of the routes and the protocol that answers."""
        self._context, self._protocol = context, protocol

    async def answer(
        self, request: Request, model: tuple[str, str], parse: Callable[[bytes], Awaitable[InferRequest]]
    ) -> tuple[InferRequest, InferReply]:
        """Answer a request.

        Args:
            request: the request, its body not yet read.
            model: the name and the version of the model, from the path.
            parse: parses the body into a message.

        Raises:
            ServiceError: the request is rejected, or fails.
        """
        context, watch = self._context, ClientWatch(request)
        caller = caller_of(request, context.clock)
        with counting_failures(context.metrics, caller.key):
            self._protocol.require_model(*model)
            query = read_query(request.scope["query_string"])
            message = await parse(await self._read(request, caller, query))
        watch.start()
        reply = await self._protocol.infer(
            message,
            caller.arrived_at,
            query=query,
            headers=request.headers,
            address=caller.address,
            key=caller.key,
            watch=watch,
        )
        return message, reply

    async def _read(self, request: Request, caller: Caller, query: Mapping[str, str]) -> bytes:
        """Check what can be checked without the body, then read the body and undo its content encoding."""
        headers, limits = request.headers, self._context.bodies
        within_s = self._protocol.check_before_body(caller.arrived_at, query, headers, limits.max_s, caller.key)
        body = await read_body(request, limits, within_s)
        encoding = headers.get("content-encoding", "").strip().lower()
        # On a thread: a few bytes may become as many as the limit allows.
        return await asyncio.to_thread(undo_encoding, body, encoding, limits.max_bytes) if encoding else body
