"""Check of the Origin and Host headers: which sites' pages may send requests, and to which host names.

A browser sends a form of any site's page to any server that it can reach, including one on 127.0.0.1, and names the
site in `Origin`.
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
    """Middleware that refuses requests from pages of foreign sites and requests addressed to foreign host names."""

    def __init__(self, app: ASGIApp, origins: Collection[str], hosts: Collection[str] | None) -> None:
        """Create the middleware.

        Args:
            app: the application behind it.
            origins: sites whose pages are welcome besides the server's own, as `https://example.org`; "*" for all.
            hosts: host names of the server; None for any.
        """
        self._app, self._origins, self._hosts = app, frozenset(origins), hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
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
            raise UnknownHostError("unknown host in the Host header; allow it with --allowed-hosts")
        if origin is not None and scope["method"] not in SAFE_METHODS and not self._is_welcome(origin, host):
            raise ForeignOriginError("a page of another origin sent this request; allow it with --cors-origins")

    def _is_welcome(self, origin: str, host: str | None) -> bool:
        # The scheme is not compared: a proxy may terminate TLS.
        is_own = bool(host) and origin.partition("://")[2].lower() == (host or "").lower()
        return is_own or origin in self._origins or "*" in self._origins


def is_known_host(host: str | None, names: Collection[str]) -> bool:
    """Return whether a Host header names this server; an IP address always passes: it is no foreign name."""
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
