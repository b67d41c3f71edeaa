import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from service.http import protocol as connections
from service.http.protocol import MAX_HEAD_BYTES, BoundedProtocol

pytestmark = pytest.mark.anyio

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]


async def measure(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """An app that answers with the length of the body and the number of the headers."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    answer = f"{size} {len(scope['headers'])}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
    await send({"type": "http.response.body", "body": answer})


class Client:
    """A connection to an app, to send what no HTTP client would."""

    def __init__(self, app: App = measure) -> None:
        self.app = app

    async def __aenter__(self) -> "Client":
        config = uvicorn.Config(
            self.app, port=0, http=BoundedProtocol, ws="none", lifespan="off", log_config=None, timeout_keep_alive=1
        )
        self.server = uvicorn.Server(config)
        config.load()
        self.server.lifespan = config.lifespan_class(config)
        await self.server.startup()
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        self.server.servers[0].close()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> bytes:
        """Read an answer and return its body."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 200"), head
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        return await self.reader.readexactly(length)

    async def rest(self, within_s: float = 5) -> bytes:
        """Read until the server closes the connection."""
        return await asyncio.wait_for(self.reader.read(), within_s)


def post(length: int) -> bytes:
    return b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % length


@pytest.mark.parametrize(
    ("beginning", "more"),
    [
        (b"GET / HTTP/1.1\r\n", b"a:\r\n"),
        (b"GET / HTTP/1.1\r\na: ", b"long"),
        (b"GET /", b"long"),
    ],
    ids=["headers", "one header", "address"],
)
async def test_a_head_that_does_not_end_is_rejected(beginning: bytes, more: bytes) -> None:
    async with Client() as client:
        await client.send(beginning + more * (3 * MAX_HEAD_BYTES // len(more)))
        assert (await client.rest()).startswith(b"HTTP/1.1 400")


async def test_a_head_of_less_than_the_bound_is_taken() -> None:
    async with Client() as client:
        filler = b"a: %s\r\n" % (b"x" * (MAX_HEAD_BYTES - 200))
        await client.send(b"GET / HTTP/1.1\r\nhost: x\r\n" + filler + b"\r\n")
        assert await client.answer() == b"0 2"


async def test_bodies_are_not_counted_as_heads_on_a_connection_that_is_kept() -> None:
    """Requests whose ends and beginnings come in one piece, of bodies smaller and larger than a head may be."""
    async with Client() as client:
        for size in (MAX_HEAD_BYTES - 500, 10 * MAX_HEAD_BYTES, 1000):
            head, body = post(size), bytes(size)
            await client.send(head[:20])
            await asyncio.sleep(0.01)
            await client.send(head[20:] + body + head[:30])
            assert await client.answer() == b"%d 2" % size
            await client.send(head[30:] + body)
            assert await client.answer() == b"%d 2" % size


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"POST / HTTP/1.1\r\nhost: x\r\n", post(1) + b"x" + b"GET / HT"])
async def test_a_connection_whose_head_does_not_come_is_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.2)
    async with Client() as client:
        await client.send(sent)
        await client.rest()


async def test_a_head_that_drips_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.2)
    async with Client() as client:
        dripping = asyncio.create_task(drip(client, b"a: b\r\n"))
        assert await client.rest() == b""
        dripping.cancel()


async def test_a_body_may_take_longer_than_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.2)
    async with Client() as client:
        await client.send(post(3))
        for _ in range(3):
            await asyncio.sleep(0.15)
            await client.send(b"x")
        assert await client.answer() == b"3 2"


async def test_trailers_are_left_out() -> None:
    async with Client() as client:
        await client.send(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nx: y\r\n\r\n")
        assert await client.answer() == b"2 1"


async def drip(client: Client, line: bytes) -> None:
    await client.send(b"GET / HTTP/1.1\r\n")
    while True:
        await client.send(line)
        await asyncio.sleep(0.05)


async def test_what_comes_early_of_the_next_request_does_not_cut_off_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.1)
    go_on = asyncio.Event()

    async def slow(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await go_on.wait()
        await measure(scope, receive, send)

    async with Client(slow) as client:
        await client.send(post(1) + b"x")
        await asyncio.sleep(0.05)
        await client.send(b"\r\n")
        await asyncio.sleep(0.25)
        go_on.set()
        assert await client.answer() == b"1 2"
        await client.rest()  # and then the head is awaited no longer than any other


@pytest.mark.parametrize("more", [b"x", b"x" * 999], ids=["a part of the body", "all of it"])
async def test_a_client_that_was_rejected_cannot_keep_its_connection_by_what_it_sends_of_its_body(
    more: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.2)
    monkeypatch.setattr(connections, "REFUSED_BODY_S", 0.2)

    async def refuse(_: dict[str, Any], receive: Receive, send: Send) -> None:
        del receive
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async with Client(refuse) as client:
        await client.send(post(999))
        assert await client.answer() == b""
        await client.send(more)
        assert await client.rest(3) == b""
