"""Connections that begin with TLS: they are counted, and bound in time, from their very first moment on.

asyncio's own way would make a protocol of a connection only after the handshake: what never speaks would be no one's to
count, and held for a minute.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from service.http.connections import Connections
from service.http.protocol import HEAD_S


class TlsGate(asyncio.Protocol):
    """Stands before the protocol of a connection until the handshake is over."""

    def __init__(
        self,
        *,
        protocol: Callable[..., asyncio.Protocol],
        context: ssl.SSLContext,
        connections: Connections,
        **kwargs: Any,  # noqa: ANN401 - uvicorn's to say
    ) -> None:
        """Take what follows.

        Args:
            protocol: makes what speaks behind TLS, of uvicorn's arguments.
            context: of this side.
            connections: counts them.
            kwargs: uvicorn's.
        """
        self._next, self._context, self._all = protocol(**kwargs), context, connections
        self._shaking: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._early = b""  # what came right behind the handshake
        self._is_lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # of TCP, there is no other
        """Begin the handshake, if there is room."""
        self._transport = transport
        peer, opened = transport.get_extra_info("peername"), transport.get_extra_info("socket")
        if not self._all.admit(self, peer[0] if peer else None, opened.fileno()):
            transport.abort()
            return
        self._shaking = asyncio.get_running_loop().create_task(self._shake_hands(transport))

    def data_received(self, data: bytes) -> None:
        """Keep what comes before the protocol that it is for knows of its connection."""
        self._early += data

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Take note that there is no connection any more."""
        self._is_lost = True

    def give_way(self) -> None:
        """Close, so that another connection may be opened."""
        if self._transport is not None:
            self._transport.abort()

    async def _shake_hands(self, transport: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        try:
            secure = await loop.start_tls(
                transport, self, self._context, server_side=True, ssl_handshake_timeout=HEAD_S
            )
        except OSError:  # which what ssl raises is, too, and no one can be told
            transport.abort()
            return
        finally:
            self._all.forget(self)
        if secure is None or self._is_lost:
            return
        secure.set_protocol(self._next)
        self._next.connection_made(secure)
        if self._early:
            self._next.data_received(self._early)
