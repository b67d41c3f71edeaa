import asyncio

import pytest
from fastapi import Request
from starlette.types import Message

from service.errors import ClientGoneError
from service.http.disconnects import ClientWatch

pytestmark = pytest.mark.anyio


class Connection:
    """A client that sends the rest of its body, and disconnects once `leaves` is set."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()
        self.listening = asyncio.Event()
        self._sent: list[Message] = [{"type": "http.request", "body": b"more", "more_body": False}]

    async def receive(self) -> Message:
        if self._sent:
            return self._sent.pop()
        self.listening.set()
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def answer(self) -> str:
        with ClientWatch(Request({"type": "http"}, self.receive), delay_s=0.0) as watch:
            watch.start()
            await self.listening.wait()
            await asyncio.Event().wait()
        return "answered"


async def test_a_disconnect_cancels_the_block_but_not_the_task() -> None:
    connection = Connection()

    async def serve() -> str:
        try:
            return await connection.answer()
        except ClientGoneError:
            await asyncio.sleep(0)  # would raise here if the cancellation were still pending
            return "gone"

    task = asyncio.create_task(serve())
    await connection.listening.wait()
    connection.leaves.set()
    assert await task == "gone"


@pytest.mark.parametrize("leaves_too", [False, True])
async def test_a_task_cancelled_for_another_reason_stays_cancelled(leaves_too: bool) -> None:
    connection = Connection()
    task = asyncio.create_task(connection.answer())
    await connection.listening.wait()
    if leaves_too:
        connection.leaves.set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_watching_stops_after_the_block() -> None:
    connection = Connection()
    with ClientWatch(Request({"type": "http"}, connection.receive), delay_s=0.0) as watch:
        watch.start()
        await connection.listening.wait()
    before = asyncio.all_tasks()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) < len(before)


async def test_a_request_answered_within_the_delay_is_not_watched() -> None:
    connection = Connection()
    with ClientWatch(Request({"type": "http"}, connection.receive), delay_s=60.0) as watch:
        watch.start()
        await asyncio.sleep(59.0)
    await asyncio.sleep(2.0)
    assert not connection.listening.is_set()
