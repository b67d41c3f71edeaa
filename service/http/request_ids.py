"""A name for every request, by which its client, the proxies on its way and the log mean the same one."""

import random
import re
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.telemetry.logs import REQUEST_ID

HEADER = "X-Request-ID"
RAW_HEADER = HEADER.lower().encode()
FIT = re.compile(rb"[!-~]{1,128}")  # what can stand in a log and a header without harm
KEY = "supervit.request_id"  # of the scope, where the answer is to say it


def _brought(scope: MutableMapping[str, Any]) -> bytes:
    return next((value for name, value in scope["headers"] if name == RAW_HEADER), b"")


def name_request(brought: bytes) -> bytes:
    """Return the name that a request brings, or one that is made for it."""
    # Not of uuid4, which asks the system for its randomness and would give the GIL away for that.
    return brought if FIT.fullmatch(brought) else b"%032x" % random.getrandbits(128)


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
