import asyncio
from collections.abc import Awaitable, Callable

import pytest

from service.bench.client_protocols import Request
from service.bench.connections import Connections
from service.errors import ConnectionFailedError, ResponseTimeoutError

pytestmark = pytest.mark.anyio
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def asked(answer: Answer, request: Request, timeout_s: float = 5) -> tuple[int, bytes]:
    """Send a request to a server that answers with `answer`; return the status and the body."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with server, Connections(url, timeout_s, "my-key") as connections:
        return await connections.send(request)


async def test_a_body_is_posted_and_the_answer_is_returned_whatever_its_status() -> None:
    heads = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        assert await reader.readexactly(5) == b"image"
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nbusy")
        writer.close()

    assert await asked(answer, Request("/classify?top_k=1", b"image", {"X-Mine": "1"})) == (429, b"busy")
    assert heads[0].startswith(b"POST /classify?top_k=1 HTTP/1.1\r\n")
    assert b"X-Mine: 1\r\n" in heads[0]
    assert b"Authorization: Bearer my-key\r\n" in heads[0]


async def test_a_request_without_a_body_is_sent_with_get() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /v2/models/a%2Fb HTTP/1.1\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    assert await asked(answer, Request("/v2/models/a%2Fb")) == (200, b"")


async def test_a_closed_connection_raises_a_connection_failed_error() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    with pytest.raises(ConnectionFailedError):
        await asked(answer, Request("/"))


async def test_a_server_that_does_not_answer_raises_a_response_timeout_error() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    with pytest.raises(ResponseTimeoutError):
        await asked(answer, Request("/"), timeout_s=0.01)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[::1"])
async def test_unreachable_and_invalid_urls_raise_a_connection_failed_error(url: str) -> None:
    async with Connections(url, 5) as connections:
        with pytest.raises(ConnectionFailedError):
            await connections.send(Request("/"))
