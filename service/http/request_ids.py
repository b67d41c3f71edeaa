"""The name of a request in HTTP's headers, both ways."""

from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.request_names import name_request
from service.telemetry.logs import REQUEST_ID

HEADER = "X-Request-ID"
RAW_HEADER = HEADER.lower().encode()
KEY = "supervit.request_id"  # of the scope, where the answer is to say it


def _brought(scope: MutableMapping[str, Any]) -> bytes:
    return next((value for name, value in scope["headers"] if name == RAW_HEADER), b"")


class RequestIds:
    """Middleware that keeps the name a request brings in its header, or gives it one, and tells log and client."""

    def __init__(self, app: ASGIApp, *, sends_back: bool = True) -> None:
        """Take what every request goes to, and whether its name is sent back, which a proxy may do itself."""
        self._app, self._sends_back = app, sends_back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Name the request and hand it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = name_request(_brought(scope))
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
