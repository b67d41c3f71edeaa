import asyncio
import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop

from service.http.connections import Connections
from service.http.protocol import HEAD_TIMEOUT_S
from service.http.tls import TlsGate

pytestmark = pytest.mark.anyio


class Echo(asyncio.Protocol):
    """Echoes the data that it receives."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # always TCP
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


class Served:
    """A server behind a TLS gate, and its count of connections."""

    def __init__(self, most: int = 2) -> None:
        authority = trustme.CA()
        self.context, self.trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
        authority.issue_cert("localhost").configure_cert(self.context)
        authority.configure_trust(self.trust)
        self.closed: list[str] = []
        self.connections = Connections(most, most, observe=self.closed.append)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        def gate() -> TlsGate:
            return TlsGate(protocol=Echo, context=self.context, connections=self.connections)

        server = await asyncio.get_running_loop().create_server(gate, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]


@pytest.fixture
def served() -> Served:
    return Served()


async def until_counted(connections: Connections, number: int) -> None:
    while len(connections) != number:  # noqa: ASYNC110 - polling takes no real time in a virtual-time loop
        await asyncio.sleep(0.01)


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(port: int, trust: ssl.SSLContext | None = None) -> AsyncIterator[Streams]:
    name = None if trust is None else "localhost"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust, server_hostname=name)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def test_a_tls_connection_is_passed_to_the_next_protocol(served: Served) -> None:
    async with served.serving() as port, connected(port, served.trust) as (reader, writer):
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        assert len(served.connections) == 0, "the next protocol counts it"


async def test_a_silent_connection_is_counted_and_closed_after_the_handshake_timeout(served: Served) -> None:
    loop = asyncio.get_running_loop()
    async with served.serving() as port, connected(port) as (reader, _):
        await until_counted(served.connections, 1)
        began_at = loop.time()
        assert await reader.read() == b""
        assert loop.time() - began_at == pytest.approx(HEAD_TIMEOUT_S, abs=1)
        await until_counted(served.connections, 0)


async def test_the_oldest_silent_connection_is_closed_for_a_new_one(served: Served) -> None:
    async with served.serving() as port, connected(port) as (first, _), connected(port):
        await until_counted(served.connections, 2)
        async with connected(port):
            with suppress(ConnectionError):
                assert await first.read() == b""
            assert served.closed == ["gave_way"]
            assert len(served.connections) == 2


async def test_a_connection_that_does_not_speak_tls_is_closed(served: Served) -> None:
    async with served.serving() as port, connected(port) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with suppress(ConnectionError):
            assert b"HTTP" not in await reader.read()
        await until_counted(served.connections, 0)


@pytest.mark.parametrize("run", [uvloop.run, asyncio.run])
def test_a_client_hello_that_arrives_before_the_handshake_begins_is_not_lost(
    served: Served, run: Callable[[Coroutine[Any, Any, None]], None]
) -> None:
    async def say_hello_at_once() -> None:
        loop, hello = asyncio.get_running_loop(), ssl.MemoryBIO()
        with suppress(ssl.SSLWantReadError):
            served.trust.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost").do_handshake()
        async with served.serving() as port:
            with socket.create_connection(("127.0.0.1", port)) as early:  # connect() blocks the loop
                early.sendall(hello.read())
                early.setblocking(False)
                async with asyncio.timeout(HEAD_TIMEOUT_S / 2):
                    assert await loop.sock_recv(early, 1)

    run(say_hello_at_once())


async def test_a_connection_evicted_before_its_handshake_begins_leaks_no_file_descriptor() -> None:
    served = Served(most=1)
    async with served.serving() as port:
        before = open_descriptors()
        with socket.create_connection(("127.0.0.1", port)) as first, socket.create_connection(("127.0.0.1", port)):
            await until_counted(served.connections, 1)  # both connected while the loop was blocked
            while not served.closed:  # noqa: ASYNC110 - polling takes no real time in a virtual-time loop
                await asyncio.sleep(0.01)
            first.setblocking(False)
            async with asyncio.timeout(HEAD_TIMEOUT_S / 2):
                with suppress(ConnectionError):
                    assert await asyncio.get_running_loop().sock_recv(first, 1) == b""
            assert open_descriptors() == before + 3, "two of the clients and one of the server"
        await until_counted(served.connections, 0)
        assert open_descriptors() == before


async def test_a_connection_without_a_free_file_descriptor_is_closed_and_not_counted(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "dup", fail)
    async with served.serving() as port, connected(port) as (reader, _):
        with suppress(ConnectionError):
            assert await reader.read() == b""
        assert len(served.connections) == 0
