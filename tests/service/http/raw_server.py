"""A server with an app behind BoundedProtocol on a real socket, and clients that can send any bytes."""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import uvicorn

from service.http.connections import Connections
from service.http.protocol import ARRIVED_AT, BoundedProtocol

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]
KEEP_ALIVE_S = 75
SETTLE_S = 0.001  # of virtual time, which advances when nothing else is ready
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def answer(send: Send, content: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def measure(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """An app that answers with the length of the body and the number of the headers."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await answer(send, f"{size} {len(scope['headers'])}".encode())


class Held:
    """An app that records each request and answers it with its path once `go_on` is set."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.asked: list[str] = []
        self.arrived_at: list[float] = []
        self.unanswered: list[str] = []

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        self.asked.append(scope["path"])
        self.arrived_at.append(scope[ARRIVED_AT])
        while (await receive()).get("more_body"):
            pass
        leaving = asyncio.ensure_future(receive())
        going = asyncio.ensure_future(self.go_on.wait())
        await asyncio.wait((leaving, going), return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            self.unanswered.append(scope["path"])
        leaving.cancel()
        await answer(send, scope["path"].encode())


class Server:
    """A server with an app behind the protocol, on a socket of its own."""

    def __init__(
        self, app: App = measure, max_connections: int = 9, protocol: Callable[..., BoundedProtocol] = BoundedProtocol
    ) -> None:
        self.app, self.protocol = app, protocol
        self.closed: list[str] = []
        self.connections = Connections(max_connections, 99, observe=self.closed.append)

    async def __aenter__(self) -> "Server":
        loop = asyncio.get_running_loop()
        protocol = partial(self.protocol, connections=self.connections, observe=self.closed.append, clock=loop.time)
        config = uvicorn.Config(
            self.app,
            port=0,
            http=protocol,  # type: ignore[arg-type] # the partial is called like the class
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._server = uvicorn.Server(config)
        config.load()
        self._server.lifespan = config.lifespan_class(config)
        await self._server.startup()
        self._server.server_state.default_headers = [(b"date", b"today")]  # uvicorn updates it once a second
        self._clients: list[Client] = []
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            client.writer.close()
        self._server.servers[0].close()
        await asyncio.sleep(SETTLE_S)

    async def connect(self) -> "Client":
        port = self._server.servers[0].sockets[0].getsockname()[1]
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        self._clients.append(client)
        await asyncio.sleep(SETTLE_S)
        return client


class Client:
    """A connection on which a test can send any bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> bytes:
        """Read an answer and return its body."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        return await self.reader.readexactly(length)

    async def rest(self) -> bytes:
        """Read until the server closes the connection."""
        return await self.reader.read()

    def reset(self) -> None:
        """Reset the connection, as a killed client does: the server notices it at once."""
        opened: socket.socket = self.writer.get_extra_info("socket")
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.close()


def post(length: int, path: str = "/") -> bytes:
    return b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (path.encode(), length)


def now() -> float:
    return asyncio.get_running_loop().time()
