"""The name of a request in HTTP's headers, both ways."""

from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.request_names import name_request

HEADER = "X-Request-ID"
RAW_HEADER = HEADER.lower().encode()
KEY = "supervit.request_id"


def request_id(scope: MutableMapping[str, Any]) -> str:
    """Return the name of a request; one that came through a proxy which names them itself has it in its header."""
    return str(scope[KEY]) if KEY in scope else name_request(_brought(scope)).decode()


def _brought(scope: MutableMapping[str, Any]) -> bytes:
    return next((value for name, value in scope["headers"] if name == RAW_HEADER), b"")


class RequestIds:
    """Middleware that keeps the name a request brings in its header, or gives it one, and sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        """Take what every request goes to."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Name the request and hand it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = name_request(_brought(scope))
        scope[KEY] = name.decode()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (RAW_HEADER, name)]
            await send(message)

        await self._app(scope, receive, send_named)
