"""A request of the inference protocol over HTTP: its body within bounds, its parameters from wherever they stand."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from fastapi import Request

from service.errors import ServiceError
from service.http.context import RouteContext
from service.http.disconnects import ClientWatch
from service.http.keys import key_of
from service.http.protocol import ARRIVED_AT
from service.http.queries import read_query
from service.http.uploads import read_body
from service.http.v2_bodies import undo_encoding
from service.inference_protocol.messages import InferReply, InferRequest
from service.inference_protocol.protocol import InferenceProtocol
from service.telemetry.outcomes import counted


class InferenceOverHttp:
    """Reads requests and has them answered, whatever their bodies look like."""

    def __init__(self, context: RouteContext, protocol: InferenceProtocol) -> None:
        """Take what the routes call upon, and what answers."""
        self._context, self._protocol = context, protocol

    async def answer(
        self, request: Request, model: tuple[str, str], parse: Callable[[bytes], Awaitable[InferRequest]]
    ) -> tuple[InferRequest, InferReply]:
        """Answer a request.

        Args:
            request: its body not yet read.
            model: its name and its version, of the path.
            parse: makes a message of the body.

        Raises:
            ServiceError: it is rejected, or fails.
        """
        context, watch = self._context, ClientWatch(request)
        arrived_at = request.scope.get(ARRIVED_AT) or context.clock()
        try:
            self._protocol.require_model(*model)
            query = read_query(request.scope["query_string"])
            message = await parse(await self._read(request, arrived_at, query))
        except ServiceError:
            with counted(context.metrics, key_of(request.scope)):
                raise
        watch.start()
        address = request.client.host if request.client else None
        reply = await self._protocol.infer(
            message,
            arrived_at,
            query=query,
            headers=request.headers,
            address=address,
            key=key_of(request.scope),
            watch=watch,
        )
        return message, reply

    async def _read(self, request: Request, arrived_at: float, query: Mapping[str, str]) -> bytes:
        """Read the body of a request that may come, as far as can be told before it has."""
        headers, limits = request.headers, self._context.bodies
        within_s = self._protocol.time_for_body_s(arrived_at, query, headers, limits.max_s, key_of(request.scope))
        body = await read_body(request, limits, within_s)
        encoding = headers.get("content-encoding", "").strip().lower()
        # A few bytes may become as many as are allowed.
        return await asyncio.to_thread(undo_encoding, body, encoding, limits.max_bytes) if encoding else body
