import asyncio
import logging
from typing import Any

import pytest

from service.http.heads import MAX_HEAD_BYTES
from service.http.protocol import (
    HEAD_TIMEOUT_S,
    PROBE_DELAY_S,
    REFUSED_BODY_TIMEOUT_S,
    UNREAD_TIMEOUT_S,
)
from tests.service.http.raw_server import (
    GET,
    KEEP_ALIVE_S,
    SETTLE_S,
    Held,
    Receive,
    Send,
    Server,
    answer,
    now,
    post,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def only_warnings(caplog: pytest.LogCaptureFixture) -> None:
    """Capture warnings only: at a level that another test's server has set, uvicorn might log the port."""
    caplog.set_level(logging.WARNING, "uvicorn.error")


@pytest.mark.parametrize(
    ("beginning", "more"),
    [
        (b"GET / HTTP/1.1\r\n", b"a:\r\n"),
        (b"GET / HTTP/1.1\r\na: ", b"long"),
        (b"GET /", b"long"),
        (b"", b"\r\n\r\n"),
    ],
    ids=["headers", "one header", "address", "nothing"],
)
async def test_an_endless_head_is_refused_with_400(beginning: bytes, more: bytes) -> None:
    async with Server() as server:
        client = await server.connect()
        await client.send(beginning + more * (3 * MAX_HEAD_BYTES // len(more)))
        assert (await client.rest()).startswith(b"HTTP/1.1 400")
        assert server.closed == ["bad_request"]


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_head_just_above_the_size_limit_is_refused(pieces: int) -> None:
    async with Server() as server:
        client = await server.connect()
        filler = b"a: %s\r\n" % (b"x" * (MAX_HEAD_BYTES - 20))
        head = b"GET / HTTP/1.1\r\nhost: x\r\n" + filler + b"\r\n"
        size = -(-len(head) // pieces)
        for start in range(0, len(head), size):
            await client.send(head[start : start + size])
            await asyncio.sleep(SETTLE_S)
        assert (await client.rest()).startswith(b"HTTP/1.1 400")


async def test_a_head_just_below_the_size_limit_is_accepted() -> None:
    async with Server() as server:
        client = await server.connect()
        filler = b"a: %s\r\n" % (b"x" * (MAX_HEAD_BYTES - 200))
        await client.send(b"GET / HTTP/1.1\r\nhost: x\r\n" + filler + b"\r\n")
        assert await client.answer() == b"0 2"


async def test_body_bytes_do_not_count_towards_the_head_limit_on_a_keep_alive_connection() -> None:
    """Send the end of a request and the beginning of the next in one piece, with bodies below and above the limit."""
    async with Server() as server:
        client = await server.connect()
        for size in (MAX_HEAD_BYTES - 500, 10 * MAX_HEAD_BYTES, 1000):
            head, body = post(size), bytes(size)
            await client.send(head[:20])
            await asyncio.sleep(SETTLE_S)
            await client.send(head[20:] + body + head[:30])
            assert await client.answer() == b"%d 2" % size
            await client.send(head[30:] + body)
            assert await client.answer() == b"%d 2" % size


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"POST / HTTP/1.1\r\nhost: x\r\n", post(1) + b"x" + b"GET / HT"])
async def test_a_connection_whose_head_does_not_arrive_in_time_is_closed(sent: bytes) -> None:
    async with Server() as server:
        client, started_at = await server.connect(), now()
        await client.send(sent)
        await client.rest()
        assert now() - started_at == pytest.approx(HEAD_TIMEOUT_S, abs=0.1)
        assert server.closed == ["slow"]


async def test_a_head_that_arrives_too_slowly_is_cut_off() -> None:
    async with Server() as server:
        client, started_at = await server.connect(), now()
        await client.send(b"GET / HTTP/1.1\r\n")
        while not client.reader.at_eof():
            await client.send(b"a: b\r\n")
            await asyncio.sleep(1)
        assert now() - started_at == pytest.approx(HEAD_TIMEOUT_S, abs=1.1)


async def test_a_keep_alive_connection_may_be_silent_for_longer_than_the_head_timeout() -> None:
    async with Server() as server:
        client = await server.connect()
        for _ in range(3):
            await client.send(GET)
            assert await client.answer() == b"0 1"
            await asyncio.sleep(KEEP_ALIVE_S - 1)
        await asyncio.wait_for(client.rest(), 1.1)
        assert server.closed == []


async def test_a_body_may_take_longer_than_the_head_timeout() -> None:
    async with Server() as server:
        client = await server.connect()
        await client.send(post(3))
        for _ in range(3):
            await asyncio.sleep(0.9 * HEAD_TIMEOUT_S)
            await client.send(b"x")
        assert await client.answer() == b"3 2"


async def test_trailers_of_a_chunked_body_are_dropped() -> None:
    async with Server() as server:
        client = await server.connect()
        chunked = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nx: y\r\n\r\n"
        await client.send(2 * chunked)
        assert [await client.answer(), await client.answer()] == [b"2 2", b"2 2"]


async def test_an_upgrade_is_ignored_and_the_connection_stays_usable(caplog: pytest.LogCaptureFixture) -> None:
    async with Server() as server:
        client = await server.connect()
        for length in (0, 3):
            head = post(length)[:-2] + b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n\r\n"
            await client.send(head + bytes(length))
            assert await client.answer() == b"%d 3" % length
        await client.send(GET)
        assert await client.answer() == b"0 1"
    assert caplog.text == ""


async def test_a_head_may_be_split_anywhere_even_within_an_upgrade() -> None:
    first, rest = post(3)[:-2].split(b"\r\n", 1)
    head = first + b"\r\nUpgrade: h2c\r\n" + rest + b"connection: Upgrade\r\nUpgrade: websocket\r\na: b\r\n\r\n"
    async with Server() as server:
        for place in range(1, len(head)):
            client = await server.connect()
            await client.send(head[:place])
            await asyncio.sleep(SETTLE_S)
            await client.send(head[place:] + b"xyz")
            assert await client.answer() == b"3 4", head[:place]
            client.writer.close()


async def test_a_head_that_drips_after_an_empty_line_is_timed_like_any_other() -> None:
    async with Server() as server:
        client, started_at = await server.connect(), now()
        await client.send(b"\r\nG")
        await asyncio.sleep(0.9 * HEAD_TIMEOUT_S)
        await client.send(b"x")
        assert await client.rest() == b""
        assert now() - started_at == pytest.approx(HEAD_TIMEOUT_S, abs=0.1)
        assert server.closed == ["slow"]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", b"400"),
        (b"GET / HTTP/1.0\r\nhost: a\r\nhost: b\r\n\r\n", b"400"),
        (b"GET / HTTP/1.0\r\n\r\n", b"200"),
    ],
)
async def test_a_request_must_name_one_host(head: bytes, status: bytes) -> None:
    async with Server() as server:
        client = await server.connect()
        await client.send(head)
        assert (await client.reader.readline()).split()[1] == status


@pytest.mark.parametrize("more", [b"x", b"x" * 999], ids=["a part of the body", "all of it"])
async def test_a_refused_client_cannot_keep_its_connection_open_by_sending_its_body(more: bytes) -> None:
    async def refuse(_: dict[str, Any], receive: Receive, send: Send) -> None:
        del receive
        await answer(send, b"")

    async with Server(refuse) as server:
        client, started_at = await server.connect(), now()
        await client.send(post(999))
        assert await client.answer() == b""
        await client.send(more)
        assert await client.rest() == b""
        assert now() - started_at == pytest.approx(
            REFUSED_BODY_TIMEOUT_S if len(more) < 999 else HEAD_TIMEOUT_S, abs=0.1
        )


async def test_a_pipelined_request_is_parsed_only_after_the_answer_to_the_one_before() -> None:
    held = Held()
    async with Server(held) as server:
        client = await server.connect()
        requests = b"".join(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % number for number in range(20_000))
        sending = asyncio.create_task(client.send(requests))
        await asyncio.sleep(HEAD_TIMEOUT_S + 1)  # the waiting requests do not time out
        assert held.asked == ["/0"]
        held.go_on.set()
        for number in range(100):
            assert await client.answer() == b"/%d" % number
        assert held.asked[:100] == [f"/{number}" for number in range(100)]
        sending.cancel()


async def test_pipelined_requests_that_arrive_byte_by_byte_are_answered_one_by_one() -> None:
    held = Held()
    async with Server(held) as server:
        client = await server.connect()
        requests = b"".join(post(2, f"/{number}") + b"xx" for number in range(3)) + GET.replace(b"/", b"/3", 1)
        for byte in range(len(requests)):
            await client.send(requests[byte : byte + 1])
            await asyncio.sleep(SETTLE_S)
        assert held.asked == ["/0"]
        held.go_on.set()
        assert [await client.answer() for _ in range(4)] == [b"/0", b"/1", b"/2", b"/3"]


async def test_a_request_is_answered_before_the_garbage_after_it_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Server() as server:
        clients = [await server.connect() for _ in range(3)]
        for client in clients:
            await client.send(GET + b"\x00garbage\r\n\r\n")
            assert await client.answer() == b"0 1"
            assert (await client.rest()).startswith(b"HTTP/1.1 400")
        assert server.closed == ["bad_request"] * 3
    assert len(caplog.records) == 3, "one from the log of each connection"


async def test_a_client_that_does_not_read_its_answers_is_disconnected(caplog: pytest.LogCaptureFixture) -> None:
    async def long(_: dict[str, Any], receive: Receive, send: Send) -> None:
        await receive()
        await answer(send, bytes(20_000_000))

    async with Server(long) as server:
        client = await server.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined] # the transport of a stream can read
        await client.send(GET * 10)
        await asyncio.sleep(UNREAD_TIMEOUT_S - 1)
        assert len(server.connections) == 1
        await asyncio.sleep(2)
        assert server.closed == ["unread"]
    assert caplog.text == ""


async def test_a_client_that_resets_after_many_pipelined_requests_leaves_no_connection_and_no_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    held = Held()
    async with Server(held) as server:
        client = await server.connect()
        await client.send(GET * 1000)
        await asyncio.sleep(SETTLE_S)
        client.reset()
        await asyncio.sleep(SETTLE_S)
        held.go_on.set()
        await asyncio.sleep(SETTLE_S)
        assert held.asked == ["/"]
        assert len(server.connections) == 0
    assert caplog.text == ""


async def test_a_client_that_has_closed_its_sending_half_is_answered() -> None:
    held = Held()
    held.go_on.set()
    async with Server(held) as server:
        client = await server.connect()
        await client.send(post(1, "/first") + b"x" + post(1, "/second") + b"x" + post(9, "/third"))
        client.writer.write_eof()
        assert [await client.answer(), await client.answer()] == [b"/first", b"/second"]
        assert await client.rest() == b""


async def test_a_client_that_waits_with_its_sending_half_closed_is_probed_with_100_continue() -> None:
    held = Held()
    async with Server(held) as server:
        client = await server.connect()
        await client.send(post(1, "/first") + b"x")
        client.writer.write_eof()
        await asyncio.sleep(10 * PROBE_DELAY_S)
        held.go_on.set()
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert await client.answer() == b"/first"
        assert held.unanswered == []


async def test_a_client_that_has_closed_its_connection_is_detected_by_the_probe() -> None:
    held = Held()
    async with Server(held) as server:
        client = await server.connect()
        await client.send(post(1, "/first") + b"x")
        client.writer.close()
        await asyncio.sleep(2 * PROBE_DELAY_S)
        assert held.unanswered == ["/first"]


async def test_a_request_is_stamped_when_its_first_byte_is_read() -> None:
    held = Held()
    held.go_on.set()
    async with Server(held) as server:
        client, started_at = await server.connect(), now()
        for _ in range(2):
            await client.send(b"PO")
            await asyncio.sleep(1)
            await client.send(post(1)[2:])
            await asyncio.sleep(1)
            await client.send(b"x")
            await client.answer()
        await client.send(post(1) + b"x" + GET)
        assert [await client.answer(), await client.answer()] == [b"/", b"/"]
        assert [at - started_at for at in held.arrived_at] == pytest.approx([0, 2, 4, 4], abs=0.01)


async def test_the_connection_that_has_waited_longest_is_closed_for_a_new_one() -> None:
    held = Held()
    async with Server(held, max_connections=3) as server:
        busy, old, young = [await server.connect() for _ in range(3)]
        await busy.send(GET)
        await old.send(b"GET / HT")
        await asyncio.sleep(SETTLE_S)
        await young.send(b"GET / HT")
        await asyncio.sleep(SETTLE_S)
        new = await server.connect()
        assert await old.rest() == b""
        held.go_on.set()
        await new.send(GET)
        await young.send(b"TP/1.1\r\nhost: x\r\n\r\n")
        assert [await client.answer() for client in (busy, young, new)] == [b"/"] * 3
        assert server.closed == ["gave_way"]


async def test_a_new_connection_gets_503_while_every_open_connection_is_busy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    held = Held()
    async with Server(held, max_connections=1) as server:
        busy = await server.connect()
        await busy.send(GET)
        await asyncio.sleep(SETTLE_S)
        refused = await server.connect()
        head, _, body = (await refused.rest()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert b"content-length: %d" % len(body) in head
        assert server.closed == ["full"]
        held.go_on.set()
        assert await busy.answer() == b"/"
    assert "too many" in caplog.text
