"""Connections that begin with TLS: they are counted, and bound in time, from their very first moment on.

asyncio's own way would make a protocol of a connection only after the handshake: what never speaks would be no one's to
count, and held for a minute.
"""

import asyncio
import os
import socket
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
        self._handshake: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # of TCP, there is no other
        """Begin the handshake, if there is room; once it is over, hand the connection on."""
        if self._handshake is not None:
            self._all.forget(self)
            transport.set_protocol(self._next)
            self._next.connection_made(transport)
            return
        peer, opened = transport.get_extra_info("peername"), transport.get_extra_info("socket")
        try:
            if self._all.admit(self, peer[0] if peer else None, opened.fileno()):
                same = socket.socket(fileno=os.dup(opened.fileno()))
                self._handshake = asyncio.get_running_loop().create_task(self._shake_hands(same))
        except OSError:  # no descriptor is left for it
            self._all.forget(self)
        finally:
            # Not a byte may be read here, or the handshake would lack it. Pausing is not enough: uvloop reads all the
            # same.
            transport.abort()

    def give_way(self) -> None:
        """Close, so that another connection may be opened."""
        if self._handshake is not None:
            # Not before it has begun, or nothing would close its socket.
            self._handshake.get_loop().call_soon(self._handshake.cancel)

    async def _shake_hands(self, opened: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: self, opened, ssl=self._context, ssl_handshake_timeout=HEAD_S)
        except OSError:  # which what ssl raises is, too, and no one can be told
            pass
        finally:
            self._all.forget(self)
