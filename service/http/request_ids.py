"""The request id in the headers of requests and of their answers."""

from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.request_names import request_id_of
from service.telemetry.logs import REQUEST_ID

HEADER = "X-Request-ID"
RAW_HEADER = HEADER.lower().encode()
KEY = "supervit.request_id"  # scope key, set where the answer is to carry the id


def _brought(scope: MutableMapping[str, Any]) -> bytes:
    return next((value for name, value in scope["headers"] if name == RAW_HEADER), b"")


class RequestIds:
    """Middleware that keeps the id in a request's header, or creates one, for the log and the answer."""

    def __init__(self, app: ASGIApp, *, sends_back: bool = True) -> None:
        """Create the middleware; `sends_back` is false where a proxy adds the id to the answers itself."""
        self._app, self._sends_back = app, sends_back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the request its id and pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = request_id_of(_brought(scope))
        REQUEST_ID.set(name.decode())
        if not self._sends_back:
            await self._app(scope, receive, send)
            return
        scope[KEY] = name.decode()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (RAW_HEADER, name)]
            await send(message)

        await self._app(scope, receive, send_named)
