"""Which pages and which names may be used to ask this server.

A browser sends a form that a page of any site has made to any server that it can reach, one on 127.0.0.1 among them,
and says in `Origin` whose page it was.
"""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ForeignOriginError, ServiceError, UnknownHostError
from service.http.error_responses import refuse

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class OriginPolicy:
    """Middleware that refuses what a page of a foreign site sends, and what is addressed to a foreign name."""

    def __init__(self, app: ASGIApp, origins: Collection[str], hosts: Collection[str] | None) -> None:
        """Take what every request goes to.

        Args:
            app: that.
            origins: whose pages may ask beside the server's own, as `https://example.org`; "*" for all.
            hosts: names of the server; None for any.
        """
        self._app, self._origins, self._hosts = app, frozenset(origins), hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, or refuse it."""
        try:
            if scope["type"] == "http":
                self._check(scope)
        except ServiceError as error:
            response = await refuse(Request(scope, receive), error)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        origin = host = None
        for name, value in scope["headers"]:
            if name == b"host":
                host = value.decode("latin-1")
            elif name == b"origin":
                origin = value.decode("latin-1")
        if self._hosts is not None and not is_known_host(host, self._hosts):
            raise UnknownHostError("the host that the request is addressed to is none of this server's")
        if origin is not None and scope["method"] not in SAFE_METHODS and not self._is_welcome(origin, host):
            raise ForeignOriginError("a page of another site sent this; --cors-origins says which of them may")

    def _is_welcome(self, origin: str, host: str | None) -> bool:
        # A proxy may have spoken TLS to the client, so that the scheme is not compared.
        is_own = bool(host) and origin.partition("://")[2].lower() == (host or "").lower()
        return is_own or origin in self._origins or "*" in self._origins


def is_known_host(host: str | None, names: Collection[str]) -> bool:
    """Tell whether a Host header names this server; an address always does: no foreign name leads to it."""
    try:
        name = urlsplit(f"//{host or ''}").hostname or ""
    except ValueError:
        return False
    if name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
