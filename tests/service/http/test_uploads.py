import asyncio
from typing import Any

import pytest
from fastapi import Request

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.app import create_app
from service.classifier import ClientLimiter
from service.errors import BodyTooLargeError, ClientGoneError, DeadlineError, InvalidImageError, UploadTimeoutError
from service.http.forms import Form
from service.http.uploads import MIN_BYTES_PER_S, SLOW_START_S, BodyLimits, read_body, read_form
from service.runtime import ServerRuntime
from service.settings import Settings
from tests.service.http.raw_server import SETTLE_S, Server, post
from tests.service.http.raw_server import Client as RawClient
from tests.service.http.scripted_server import ScriptedEngine

pytestmark = pytest.mark.anyio

LIMIT = 10


def limits(max_bytes: int = LIMIT, max_s: float = 10, most: int = 99) -> BodyLimits:
    return BodyLimits(max_bytes, max_s, ClientLimiter(most, "being received"))


class Client:
    """Sends its chunks one by one, then ends, falls silent or leaves; counts the chunks that were received."""

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
        return await read_body(request, limits(limit, max_s), within_s)

    async def upload_form(self, limit: int = 1000) -> Form:
        return await read_form(Request({"type": "http", "headers": self.headers}, self.receive), limits(limit))


async def test_the_chunks_of_a_body_are_joined() -> None:
    assert await Client(b"ab", b"", b"cd").upload() == b"abcd"


async def test_a_body_whose_declared_length_is_over_the_limit_is_not_read() -> None:
    client = Client(b"x", headers={"content-length": str(LIMIT + 1)})
    with pytest.raises(BodyTooLargeError):
        await client.upload()
    assert client.taken == 0


@pytest.mark.parametrize("is_form", [False, True])
async def test_reading_stops_at_the_chunk_that_exceeds_the_limit(is_form: bool) -> None:
    client = Client(b"--x\r", b"\nAAA", *[b"AAAA"] * 100, headers={"content-type": "multipart/form-data; boundary=x"})
    with pytest.raises(BodyTooLargeError) as caught:
        await (client.upload_form(LIMIT) if is_form else client.upload())
    assert client.taken == 3
    assert caught.value.details == {"max_body_bytes": LIMIT}


async def test_the_declared_length_of_a_chunked_body_is_ignored() -> None:
    client = Client(*[b"AAAA"] * 100, headers={"content-length": "4", "transfer-encoding": "chunked"})
    with pytest.raises(BodyTooLargeError):
        await client.upload()
    assert client.taken == 3


async def test_a_client_that_stops_sending_gets_an_upload_timeout() -> None:
    with pytest.raises(UploadTimeoutError, match=r"within the latency budget"):
        await Client(b"ab", then="silence").upload(within_s=0.01)
    with pytest.raises(UploadTimeoutError, match=r"within 0\.01 s"):
        await Client(b"ab", then="silence").upload(max_s=0.01)


async def test_a_client_that_disconnects_during_an_upload_is_detected() -> None:
    with pytest.raises(ClientGoneError):
        await Client(b"ab", then="leave").upload()


FORM = {"content-type": "multipart/form-data; boundary=x"}
PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nA\r\n'
END = b"--x--\r\n"


async def test_a_form_is_read_from_chunks_of_any_size() -> None:
    whole = PART + PART + END
    for size in (1, 7, len(whole)):
        pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
        assert await Client(*pieces, headers=FORM).upload_form() == Form((b"A", b"A"), ())


async def test_a_truncated_form_is_reported_as_truncated() -> None:
    with pytest.raises(InvalidImageError, match="truncated"):
        await Client(PART[:-2], headers=FORM).upload_form()


async def test_a_form_is_read_whatever_charset_its_content_type_names() -> None:
    headers = {"content-type": "multipart/form-data; boundary=x; charset=undefined"}
    assert (await Client(PART + END, headers=headers).upload_form()).images == (b"A",)


async def test_a_body_read_too_late_by_a_busy_event_loop_is_a_deadline_error_and_no_upload_timeout() -> None:
    uploading = asyncio.create_task(Client(b"ab", then="silence").upload(within_s=0.05))
    await asyncio.sleep(0.04)
    asyncio.get_running_loop().pass_time(1.0)  # type: ignore[attr-defined] # of VirtualTimeLoop
    with pytest.raises(DeadlineError):
        await uploading


async def test_a_body_slower_than_the_minimum_rate_is_cut_off_and_one_just_above_it_is_read() -> None:
    def sending(bytes_per_s: int) -> Client:
        client = Client(headers={})

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(1)
            client.taken += 1
            return {"type": "http.request", "body": bytes(bytes_per_s), "more_body": client.taken < 20}

        client.receive = receive  # type: ignore[method-assign] # paced instead of scripted
        return client

    slow, dripping = sending(MIN_BYTES_PER_S + 1), sending(1)
    assert len(await slow.upload(max_s=60, limit=100_000, within_s=60)) == 20 * (MIN_BYTES_PER_S + 1)
    with pytest.raises(UploadTimeoutError, match="slower than"):
        await dripping.upload(max_s=60, within_s=60)
    assert dripping.taken == SLOW_START_S


async def begin(server: Server, path: str, data: bytes) -> RawClient:
    """Send a request and only the first 10 bytes of its body."""
    client = await server.connect()
    await client.send(post(len(data), path) + data[:10])
    await asyncio.sleep(SETTLE_S)
    return client


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # in real time, like the engine's thread
@pytest.mark.parametrize("path", ["/classify", "/explain", "/v2/models/tiny/infer", "/predictions/tiny", "/feedback"])
async def test_a_client_that_sends_more_bodies_at_once_than_its_limit_gets_429(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: ScriptedEngine,
    latencies: LatencyTable,
    photo: bytes,
    path: str,
) -> None:
    runtime = ServerRuntime(settings.model_copy(update={"max_in_flight_per_address": 2}), checkpoint, engine, latencies)
    app = create_app(runtime)
    async with runtime.running(ready_first=True), Server(app) as server:  # type: ignore[arg-type] # an app
        slow = [await begin(server, "/classify", photo) for _ in range(2)]
        refused = await begin(server, path, photo[:100])
        head = await refused.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429")
        assert b"retry-after: 1" in head.lower()
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        assert b"2 requests from this address are being received already" in await refused.reader.readexactly(length)
        dropped = runtime.metrics.registry().get_sample_value("supervit_dropped_requests_total", {"reason": "address"})
        assert dropped == (0 if path == "/feedback" else 1)  # feedback is no request to classify
        await slow[0].send(photo[10:])
        assert b"predictions" in await slow[0].answer()
        await slow[0].send(post(len(photo), "/classify") + photo)
        assert b"predictions" in await slow[0].answer()
