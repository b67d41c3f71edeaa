import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from itertools import count

import pytest
from fastapi.testclient import TestClient
from starlette.requests import ClientDisconnect
from starlette.types import Message

from service.domain import ServerState
from service.errors import OverloadedError
from service.http.events import MAX_LISTENERS, SAMPLES_KEPT, EventStream, LiveFeed, is_stopping
from service.telemetry.live import MetricsSample
from tests.service.http.raw_server import now

pytestmark = pytest.mark.anyio


class Server:
    """A feed of made-up metrics, and how often they were read."""

    def __init__(self) -> None:
        self.numbers: Iterator[int] = count(1)
        self.reads = 0
        self.is_over = False
        self.feed = LiveFeed(self.read, lambda: self.is_over)

    def read(self) -> MetricsSample:
        self.reads += 1
        return MetricsSample(at=float(next(self.numbers)), requests={"ok": 3.0})


def heard_by(feed: LiveFeed) -> AsyncIterator[bytes]:
    """Join a feed, as a response does, and return its events."""
    feed.join()
    return feed.events()


def times(events: bytes) -> list[float]:
    lines = events.decode().split("\n\n")
    assert lines.pop() == ""
    return [json.loads(line.removeprefix("data: "))["at"] for line in lines]


async def test_a_listener_gets_the_metrics_once_a_second() -> None:
    server, started_at = Server(), now()
    events = heard_by(server.feed)
    heard = [times(await anext(events)) for _ in range(4)]
    assert heard == [[1], [2], [3], [4]]
    assert now() - started_at == pytest.approx(3, abs=0.01)


async def test_an_event_holds_the_whole_sample() -> None:
    event = await anext(heard_by(Server().feed))
    sent = json.loads(event.removeprefix(b"data: "))
    assert MetricsSample(**sent) == MetricsSample(at=1.0, requests={"ok": 3.0})


async def test_a_second_listener_gets_the_history_and_shares_the_reads_of_the_first() -> None:
    server = Server()
    first = heard_by(server.feed)
    for _ in range(3):
        await anext(first)
    second = heard_by(server.feed)
    assert times(await anext(second)) == [1, 2, 3]
    await asyncio.gather(anext(first), anext(second))
    assert server.reads == 4


async def test_only_the_samples_of_the_last_minutes_are_kept() -> None:
    server = Server()
    events = heard_by(server.feed)
    for _ in range(SAMPLES_KEPT + 5):
        await anext(events)
    heard = times(await anext(heard_by(server.feed)))
    assert (len(heard), heard[0], heard[-1]) == (SAMPLES_KEPT, 6, SAMPLES_KEPT + 5)


async def test_the_metrics_are_not_read_without_listeners() -> None:
    server = Server()
    await asyncio.sleep(10)
    assert server.reads == 0


async def test_the_number_of_listeners_is_bounded_and_one_that_leaves_makes_room() -> None:
    server = Server()
    streams = [EventStream.of(server.feed) for _ in range(MAX_LISTENERS)]  # none of which has sent anything
    with pytest.raises(OverloadedError, match="32 clients listen already"):
        EventStream.of(server.feed)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        raise OSError("the client has left")

    with pytest.raises(ClientDisconnect):
        await streams[0]({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
    assert times(await anext(heard_by(server.feed))) == [1]


async def test_events_end_when_the_server_stops() -> None:
    server = Server()
    events = heard_by(server.feed)
    await anext(events)
    server.is_over = True
    with pytest.raises(StopAsyncIteration):
        await anext(events)


def test_only_draining_and_hung_servers_are_stopping() -> None:
    assert [state for state in ServerState if is_stopping(state)] == [ServerState.DRAINING, ServerState.HUNG]


def test_the_documentation_describes_the_stream(client: TestClient) -> None:
    responses = client.get("/openapi.json").json()["paths"]["/events"]["get"]["responses"]
    assert set(responses) == {"200", "429"}
    schema = responses["200"]["content"]["text/event-stream"]["schema"]
    assert {"at", "requests", "subnetworks", "met", "missed", "queued", "own_cpu"} <= set(schema["properties"])
