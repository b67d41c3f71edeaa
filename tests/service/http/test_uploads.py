import asyncio
import time
from typing import Any

import pytest
from fastapi import Request

from service.errors import BodyTooLargeError, ClientGoneError, DeadlineError, InvalidImageError, UploadTimeoutError
from service.http.uploads import read_image

pytestmark = pytest.mark.anyio

LIMIT = 10


class Client:
    """Sends its chunks one by one, then falls silent or leaves; counts what was taken from it."""

    def __init__(self, *chunks: bytes, then: str = "end", headers: dict[str, str] | None = None) -> None:
        self.chunks = list(chunks)
        self.then = then
        self.taken = 0
        self.headers = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]

    async def receive(self) -> dict[str, Any]:
        if self.taken < len(self.chunks):
            self.taken += 1
            more = self.taken < len(self.chunks) or self.then != "end"
            return {"type": "http.request", "body": self.chunks[self.taken - 1], "more_body": more}
        if self.then == "leave":
            return {"type": "http.disconnect"}
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def upload(self, max_s: float = 10, limit: int = LIMIT, within_s: float = 20) -> bytes:
        request = Request({"type": "http", "headers": self.headers}, self.receive)
        return await read_image(request, limit, max_s, within_s, late_s=5)  # however busy the machine is


async def test_the_chunks_of_a_body_are_put_together() -> None:
    assert await Client(b"ab", b"", b"cd").upload() == b"abcd"


async def test_nothing_is_read_of_a_body_that_announces_too_much() -> None:
    client = Client(b"x", headers={"content-length": str(LIMIT + 1)})
    with pytest.raises(BodyTooLargeError):
        await client.upload()
    assert client.taken == 0


@pytest.mark.parametrize("content_type", ["image/png", "multipart/form-data; boundary=x"])
async def test_reading_stops_at_the_chunk_that_passes_the_limit(content_type: str) -> None:
    client = Client(b"--x\r", b"\nAAA", *[b"AAAA"] * 100, headers={"content-type": content_type})
    with pytest.raises(BodyTooLargeError) as caught:
        await client.upload()
    assert client.taken == 3
    assert caught.value.details == {"max_body_bytes": LIMIT}


async def test_a_declared_length_proves_nothing_of_a_chunked_body() -> None:
    client = Client(*[b"AAAA"] * 100, headers={"content-length": "4", "transfer-encoding": "chunked"})
    with pytest.raises(BodyTooLargeError):
        await client.upload()
    assert client.taken == 3


async def test_a_client_that_falls_silent_is_dropped() -> None:
    with pytest.raises(UploadTimeoutError, match=r"within its budget"):
        await Client(b"ab", then="silence").upload(within_s=0.01)
    with pytest.raises(UploadTimeoutError, match=r"within 0\.01 s"):
        await Client(b"ab", then="silence").upload(max_s=0.01)


async def test_a_client_that_leaves_is_noticed() -> None:
    with pytest.raises(ClientGoneError):
        await Client(b"ab", then="leave").upload()


FORM = {"content-type": "multipart/form-data; boundary=x"}
PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nA\r\n'
END = b"--x--\r\n"


async def test_a_form_with_two_images_is_rejected_rather_than_half_answered() -> None:
    assert await Client(PART + END, headers=FORM).upload(limit=1000) == b"A"
    with pytest.raises(InvalidImageError, match="2 fields 'file'"):
        await Client(PART + PART + END, headers=FORM).upload(limit=1000)


# Starlette leaves the part that it was reading to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_form_that_was_cut_off_is_said_to_be() -> None:
    with pytest.raises(InvalidImageError, match="cut off"):
        await Client(PART[:-2], headers=FORM).upload(limit=1000)


async def test_a_form_in_a_charset_that_does_not_exist_is_rejected() -> None:
    headers = {"content-type": "multipart/form-data; boundary=x; charset=undefined"}
    with pytest.raises(InvalidImageError, match="form is broken"):
        await Client(PART + END, headers=headers).upload(limit=1000)


async def test_a_body_that_a_busy_event_loop_saw_too_late_is_not_its_clients_fault() -> None:
    loop = asyncio.get_running_loop()
    sent = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await sent.wait()
        return {"type": "http.request", "body": b"abcd", "more_body": False}

    uploading = asyncio.create_task(read_image(Request({"type": "http", "headers": []}, receive), LIMIT, 10, 0.05))
    await asyncio.sleep(0)
    loop.call_soon(time.sleep, 0.2)
    loop.call_later(0.04, sent.set)
    with pytest.raises(DeadlineError):
        await uploading
