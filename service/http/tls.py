"""TLS connections, counted and bounded in time from the moment they are accepted.

asyncio's own TLS creates the protocol of a connection only after the handshake: a silent connection would be counted
nowhere, and held for a minute.
"""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from typing import Any

from service.http.connections import Connections
from service.http.protocol import HEAD_TIMEOUT_S


class TlsGate(asyncio.Protocol):
    """The protocol of a connection during its TLS handshake; another protocol follows it."""

    def __init__(
        self,
        *,
        protocol: Callable[..., asyncio.Protocol],
        context: ssl.SSLContext,
        connections: Connections,
        **kwargs: Any,  # noqa: ANN401 - uvicorn's signature
    ) -> None:
        """Create the gate of one connection, and the protocol behind it.

        Args:
            protocol: creates the protocol behind TLS, from uvicorn's arguments.
            context: the server's TLS context.
            connections: counts and bounds the open connections.
            kwargs: uvicorn's keyword arguments.
        """
        self._next, self._context, self._connections = protocol(**kwargs), context, connections
        self._handshake: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # always TCP
        """Start the handshake, if there is room; called again after it, pass the connection to the next protocol."""
        if self._handshake is not None:
            self._connections.forget(self)
            transport.set_protocol(self._next)
            self._next.connection_made(transport)
            return
        peer, opened = transport.get_extra_info("peername"), transport.get_extra_info("socket")
        try:
            if self._connections.admit(self, peer[0] if peer else None, opened.fileno()):
                same = socket.socket(fileno=os.dup(opened.fileno()))
                self._handshake = asyncio.get_running_loop().create_task(self._shake_hands(same))
        except OSError:  # no file descriptor is left for the duplicate
            self._connections.forget(self)
        finally:
            # A byte that this transport read would be missing from the handshake on the duplicate. Pausing is not
            # enough: uvloop reads all the same.
            transport.abort()

    def evict(self) -> None:
        """Close the connection to make room for a new one."""
        if self._handshake is not None:
            # Not before the task has begun, or nothing would close its socket.
            self._handshake.get_loop().call_soon(self._handshake.cancel)

    async def _shake_hands(self, opened: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                lambda: self, opened, ssl=self._context, ssl_handshake_timeout=HEAD_TIMEOUT_S
            )
        except OSError:  # ssl.SSLError is one, too; it cannot be reported
            pass
        finally:
            self._connections.forget(self)
