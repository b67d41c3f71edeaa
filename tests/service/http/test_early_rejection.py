import asyncio
import gc
import json
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.domain import InferenceRequest, ServerState
from service.engines.profile_store import extended_profile
from service.errors import OverloadedError, OverloadReason
from service.http.context import ReadyServer, RouteContext
from service.http.early_rejection import (
    BURST_S,
    MAX_PAUSE_S,
    REJECTION_SHARE,
    REPEATED_S,
    RESERVED,
    EarlyRejection,
    RejectingProtocol,
)
from service.http.protocol import ARRIVED_AT, UNREAD_TIMEOUT_S
from service.pipeline import Pipeline
from service.runtime import ServerRuntime
from service.settings import Settings
from service.telemetry.reports import Reporter
from tests.service.http.raw_server import KEEP_ALIVE_S, Held, Receive, Send, Server, measure, now, post
from tests.service.http.scripted_server import BODY_LIMIT, ScriptedEngine, sample, serving

HEADERS = [(b"content-type", b"image/png"), (b"content-length", b"9")]
REJECTION = b"content-length: 2\r\nx-request-id: 1\r\n\r\nno"


@pytest.fixture
def overloaded(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, photo: bytes
) -> Iterator[tuple[TestClient, RouteContext]]:
    """Yield a client and the context of a server that is too busy to answer within half a second."""
    slow = LatencyTable((1, 4), dict.fromkeys(extended_profile(checkpoint).by_subnetwork, (0.4, 0.5)))
    runtime = ServerRuntime(settings, checkpoint, engine, slow)
    with serving(runtime) as client, ThreadPoolExecutor(1) as other:
        engine.running.clear()
        engine.may_run.clear()
        first = other.submit(client.post, "/classify?budget_ms=9000", content=photo)
        assert engine.running.wait(10)
        yield client, runtime.context
        engine.may_run.set()
        assert first.result().status_code == 200


class ScriptedPipeline:
    """Rejects every request, and records those that it was asked to admit."""

    def __init__(self) -> None:
        self.asked: list[InferenceRequest] = []
        self.rejected_again = 0
        self.reason: OverloadReason = "backlog"

    def reserve(self, request: InferenceRequest) -> None:
        self.asked.append(request)
        raise OverloadedError("100 % of it is taken", self.reason, 0.2)

    def reject_again(self, reason: str) -> None:
        assert reason == "backlog"
        self.rejected_again += 1


def server_of(pipeline: ScriptedPipeline) -> ReadyServer:
    return ReadyServer(cast(Pipeline, pipeline), *(cast(Any, None),) * 4)


class Rejecting:
    """An early rejection over a scripted pipeline, with a clock that the test sets."""

    def __init__(self, context: RouteContext) -> None:
        self.pipeline, self.now = ScriptedPipeline(), 1000.0
        self.server = server_of(self.pipeline)
        context = replace(
            context, servers=lambda: [self.server], state=lambda: ServerState.READY, clock=lambda: self.now
        )
        self.context, self.rejection = context, EarlyRejection(context)

    def answer(self, query: bytes = b"", arrived_at: float = 1000.0) -> bytes | None:
        return self.rejection.answer(b"/classify" + query, HEADERS, {ARRIVED_AT: arrived_at})


@pytest.fixture
def rejecting(settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine) -> Rejecting:
    return Rejecting(ServerRuntime(settings, checkpoint, engine).context)


class Keeping:
    """A pipeline and its scheduler that reserve a place for every request."""

    def __init__(self) -> None:
        self.given_up: list[object] = []

    def reserve(self, request: InferenceRequest) -> InferenceRequest:
        return request

    def withdraw(self, place: object) -> None:
        self.given_up.append(place)


def test_a_reservation_is_released_at_the_server_that_made_it_even_after_a_change_of_model(
    rejecting: Rejecting,
) -> None:
    kept = [Keeping(), Keeping()]
    servers = [ReadyServer(cast(Pipeline, each), cast(Any, each), *(cast(Any, None),) * 3) for each in kept]
    context = replace(rejecting.context, servers=lambda: servers)
    rejection, scope = EarlyRejection(context), {ARRIVED_AT: 1000.0}
    assert rejection.answer(b"/classify", HEADERS, scope) is None
    servers.reverse()  # the other server answers from now on
    rejection.forget(scope)
    assert [len(each.given_up) for each in kept] == [1, 0]


def test_an_early_rejection_equals_the_rejection_of_the_route(overloaded: tuple[TestClient, RouteContext]) -> None:
    client, context = overloaded
    query = b"?budget_ms=500"
    headers = [*HEADERS, (b"x-request-id", b"mine")]
    answer = EarlyRejection(context).answer(b"/classify" + query, headers, {ARRIVED_AT: time.monotonic()})
    assert answer is not None
    head, body = answer.split(b"\r\n\r\n")
    route = client.post("/classify?budget_ms=500", content=b"never read", headers={"X-Request-ID": "mine"})
    assert route.status_code == 429
    early = dict(line.split(": ") for line in head.decode().split("\r\n"))
    assert early | {"content-length": ""} == dict(route.headers) | {"content-length": ""}
    assert int(early["content-length"]) == len(body)
    problem, expected = (json.loads(text) for text in (body, route.content))
    waits = [each["error"]["details"].pop("retry_after_s") for each in (problem, expected)]
    assert waits[0] == pytest.approx(waits[1], abs=0.2)
    assert problem == expected


def test_early_rejections_count_as_overloaded_requests_and_missed_deadlines(
    overloaded: tuple[TestClient, RouteContext],
) -> None:
    client, context = overloaded
    rejection = EarlyRejection(context)
    for _ in range(2):
        assert rejection.answer(b"/classify?budget_ms=500", HEADERS, {ARRIVED_AT: time.monotonic()})
    assert sample(client, 'supervit_requests_total{outcome="overloaded"}') == 2
    assert sample(client, "supervit_requests_in_flight") == 1
    assert sample(client, 'supervit_deadlines_total{result="missed"}') == 2


def test_a_rejection_is_plain_json_for_a_client_that_accepts_nothing_else(rejecting: Rejecting) -> None:
    scope = {ARRIVED_AT: 1000.0}
    plain = rejecting.rejection.answer(b"/classify", [*HEADERS, (b"accept", b"application/json")], scope)
    assert plain is not None
    assert b"\r\ncontent-type: application/json\r\n" in plain
    assert b"\r\ncontent-type: application/problem+json\r\n" in (rejecting.answer() or b"")


def test_rejections_are_logged_at_a_limited_rate_if_requests_are_logged(
    rejecting: Rejecting, caplog: pytest.LogCaptureFixture
) -> None:
    rejecting.answer()
    assert caplog.messages == []
    context = replace(rejecting.context, reporter=Reporter(logs_requests=True))
    rejection = EarlyRejection(context)
    for _ in range(3):
        rejection.answer(b"/classify", HEADERS, {ARRIVED_AT: 1000.0})
    assert caplog.messages == ["a request was rejected for overload"]


def test_a_request_that_can_be_answered_gets_a_reserved_place_in_the_queue(
    overloaded: tuple[TestClient, RouteContext],
) -> None:
    _, context = overloaded
    scope: dict[str, Any] = {ARRIVED_AT: time.monotonic()}
    rejection = EarlyRejection(context)
    assert rejection.answer(b"/classify?budget_ms=9000", HEADERS, scope) is None
    reserved = scope[RESERVED].request
    assert context.server().scheduler.num_before(reserved, time.monotonic())[1] == 1
    rejection.forget(scope)
    assert context.server().scheduler.num_before(reserved, time.monotonic())[1] == 0


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        (b"/classify/", {}),
        (b"/decide", {}),
        (b"/classify?budget_ms=x", {}),
        (b"/classify", {b"content-type": b"multipart/form-data; boundary=x"}),
        (b"/classify", {b"content-type": b"application/json"}),
        (b"/classify", {b"content-type": b"text/plain"}),
        (b"/classify", {b"content-encoding": b"gzip"}),
        (b"/classify", {b"transfer-encoding": b"chunked"}),
        (b"/classify", {b"expect": b"100-continue"}),
        (b"/classify", {b"origin": b"http://example.org"}),
        (b"/classify", {b"content-length": b"%d" % (BODY_LIMIT + 1)}),
    ],
)
def test_requests_that_need_further_checks_are_left_to_the_application(
    rejecting: Rejecting, url: bytes, headers: dict[bytes, bytes]
) -> None:
    scope: dict[str, Any] = {ARRIVED_AT: 1000.0}
    assert rejecting.rejection.answer(url, [*(dict(HEADERS) | headers).items()], scope) is None
    assert RESERVED not in scope
    assert not rejecting.pipeline.asked


def test_a_rejection_is_reused_for_equal_requests_with_no_more_time_left(rejecting: Rejecting) -> None:
    first = rejecting.answer()
    assert first is not None
    again = rejecting.answer(arrived_at=1000.19)
    assert again is not None
    assert b'"100 % of it is taken"' in again
    assert first.split(b"x-request-id: ")[0] == again.split(b"x-request-id: ")[0]
    assert first != again, "each has a request id of its own"
    assert (len(rejecting.pipeline.asked), rejecting.pipeline.rejected_again) == (1, 1)


@pytest.mark.parametrize(
    ("query", "arrived_at", "later_s"),
    [
        (b"?budget_ms=9000", 1000.0, 0.0),
        (b"", 1000.21, 0.0),
        (b"", 999.9, 0.0),
        (b"", 1000.0, REPEATED_S + 0.001),
    ],
    ids=["something else", "later than the other was late", "due before what waits", "some time has passed"],
)
def test_a_rejection_is_not_reused_for_requests_that_the_pipeline_might_admit(
    rejecting: Rejecting, query: bytes, arrived_at: float, later_s: float
) -> None:
    rejecting.answer()
    rejecting.now += later_s
    rejecting.answer(query, arrived_at)
    assert (len(rejecting.pipeline.asked), rejecting.pipeline.rejected_again) == (2, 0)


def test_the_rejection_of_a_full_server_is_not_reused(rejecting: Rejecting) -> None:
    rejecting.pipeline.reason = "full"
    for _ in range(2):
        assert rejecting.answer()
    assert (len(rejecting.pipeline.asked), rejecting.pipeline.rejected_again) == (2, 0)


def test_a_rejection_by_one_model_is_not_reused_for_another(rejecting: Rejecting) -> None:
    rejecting.answer()
    other = ScriptedPipeline()
    rejecting.server = server_of(other)
    rejecting.answer()
    assert [(len(each.asked), each.rejected_again) for each in (rejecting.pipeline, other)] == [(1, 0), (1, 0)]


def test_a_rejection_does_not_keep_a_replaced_model_in_memory(rejecting: Rejecting) -> None:
    rejecting.answer()
    replaced, admitting = weakref.ref(rejecting.pipeline), Keeping()
    rejecting.server = ReadyServer(cast(Pipeline, admitting), cast(Any, admitting), *(cast(Any, None),) * 3)
    rejecting.pipeline = ScriptedPipeline()
    assert rejecting.answer() is None
    assert replaced() is None


def test_requests_with_a_foreign_host_or_a_repeated_header_are_left_to_the_application(rejecting: Rejecting) -> None:
    twice = [*HEADERS, (b"content-type", b"text/plain")]
    assert rejecting.rejection.answer(b"/classify", twice, {ARRIVED_AT: 1000.0}) is None
    known = Rejecting(replace(rejecting.context, allowed_hosts=("here",)))
    for host, is_known in ((b"here:80", True), (b"there", False)):
        answer = known.rejection.answer(b"/classify", [*HEADERS, (b"host", host)], {ARRIVED_AT: 1000.0})
        assert (answer is not None) == is_known


def test_rejections_leave_no_reference_cycles_with_the_stack_that_raised_them(rejecting: Rejecting) -> None:
    gc.collect()
    gc.disable()
    try:
        for number in range(100):
            rejecting.answer(b"?budget_ms=%d" % (number + 1))
        assert gc.collect() < 100
    finally:
        gc.enable()


def test_rejections_are_limited_to_a_share_of_the_event_loops_time(rejecting: Rejecting) -> None:
    rejection = rejecting.rejection
    assert rejection.charge(BURST_S) == 0
    assert rejection.charge(0.001) == pytest.approx(0.001 / REJECTION_SHARE)
    rejecting.now += 0.001 / REJECTION_SHARE
    assert rejection.charge(0.0) == pytest.approx(0)
    rejecting.now += 1000
    assert rejection.charge(BURST_S + 0.001) == pytest.approx(0.001 / REJECTION_SHARE), "at most BURST_S is saved"


def test_no_rejection_is_held_back_longer_than_the_maximum_pause(rejecting: Rejecting) -> None:
    for _ in range(1000):
        assert rejecting.rejection.charge(0.01) <= MAX_PAUSE_S + 1e-9
    rejecting.now += MAX_PAUSE_S
    assert rejecting.rejection.charge(0.0) == pytest.approx(0.0), "time beyond the maximum is not carried over"


# On the wire


class Scripted:
    """Rejects requests for /no, and records the paths of requests whose places were released."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []
        self.pauses_s = 0.0

    def charge(self, took_s: float) -> float:
        assert 0 < took_s < 1
        return self.pauses_s

    def answer(self, url: bytes, *_: object) -> bytes | None:
        return REJECTION if url == b"/no" else None

    def forget(self, scope: dict[str, Any]) -> None:
        self.forgotten.append(scope["path"])


def server(app: Any = measure, early: Scripted | None = None) -> Server:  # noqa: ANN401 - an ASGI app
    return Server(app, protocol=partial(RejectingProtocol, early=early or Scripted()))  # type: ignore[arg-type] # it has the methods that are called


async def rejected(client: Any) -> bytes:  # noqa: ANN401 - a raw client
    head = await client.reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
    assert b"date: " in head
    return bytes(await client.reader.readexactly(2))


@pytest.mark.anyio
async def test_the_body_of_a_rejected_request_is_discarded_and_the_connection_stays_usable() -> None:
    async with server() as running:
        client = await running.connect()
        await client.send(post(5, "/no") + b"gar")
        assert await rejected(client) == b"no"
        await client.send(b"ge" + post(3) + b"abc" + post(2, "/no") + b"xx" + post(4) + b"abcd")
        assert (await client.answer()).startswith(b"3 ")
        assert await rejected(client) == b"no"
        assert (await client.answer()).startswith(b"4 ")


@pytest.mark.anyio
async def test_a_connection_that_is_silent_after_a_rejection_is_closed_after_the_keep_alive_timeout() -> None:
    async with server() as running:
        client = await running.connect()
        await client.send(post(0, "/no"))
        await rejected(client)
        started_at = now()
        assert await client.rest() == b""
        assert now() - started_at == pytest.approx(KEEP_ALIVE_S, abs=0.1)


@pytest.mark.anyio
async def test_a_request_on_a_connection_without_keep_alive_goes_to_the_application() -> None:
    async with server() as running:
        for version, header in ((b"1.1", b"connection: close\r\n"), (b"1.0", b"")):
            client = await running.connect()
            await client.send(b"POST /no HTTP/%b\r\nhost: x\r\n%bcontent-length: 0\r\n\r\n" % (version, header))
            assert (await client.answer()).startswith(b"0 ")


@pytest.mark.anyio
async def test_a_client_that_does_not_read_its_rejections_is_made_to_wait() -> None:
    asked: list[str] = []

    async def note(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        asked.append(scope["path"])
        await Held()(scope, receive, send)

    async with server(note) as running:
        client = await running.connect()
        client.reader._transport.pause_reading()  # type: ignore[attr-defined] # a private attribute of streams
        client.writer.write(post(0, "/no") * 200_000)
        async with asyncio.timeout(60):
            while not asked:  # noqa: ASYNC110 - no event tells when the sockets are full
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert asked == ["/no"], "the others wait until the application has answered this one"


@pytest.mark.anyio
async def test_a_client_that_pipelines_many_requests_takes_turns_with_other_clients() -> None:
    async with server() as running:
        greedy, modest = await running.connect(), await running.connect()
        greedy.writer.write(post(0, "/no") * 1000)
        await modest.send(post(0, "/no"))
        await rejected(modest)
        pending = len(greedy.reader._buffer)  # type: ignore[attr-defined] # the answers to the greedy client so far
        for _ in range(1000):
            await rejected(greedy)
        assert pending < 20 * 150, "only a few of its 1000 answers"


@asynccontextmanager
async def holding_back(pause_s: float) -> AsyncIterator[tuple[Server, Any, list[RejectingProtocol]]]:
    """Yield a server that holds each rejection back for `pause_s`, a client of it, and its protocols."""
    early, protocols = Scripted(), list[RejectingProtocol]()
    early.pauses_s = pause_s

    def make_protocol(*args: Any, **options: Any) -> RejectingProtocol:  # noqa: ANN401 - uvicorn's signature
        protocols.append(RejectingProtocol(*args, early=early, **options))  # type: ignore[arg-type] # as above
        return protocols[-1]

    async with Server(measure, protocol=make_protocol) as running:
        client = await running.connect()
        yield running, client, protocols


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("first", "then"),
    [(post(0, "/no") + post(3) + b"abc", b""), (post(3, "/no"), b"xyz" + post(3) + b"abc")],
    ids=["all of it is there", "its body comes after the answer"],
)
async def test_a_held_back_rejection_is_sent_before_the_answer_to_the_next_request(first: bytes, then: bytes) -> None:
    async with holding_back(0.1) as (_, client, _):
        started_at = now()
        await client.send(first)
        assert await rejected(client) == b"no"
        assert 0.09 < now() - started_at < 1
        await client.send(then)
        assert (await client.answer()).startswith(b"3 ")


@pytest.mark.anyio
async def test_a_body_that_arrives_while_its_rejection_is_held_back_is_discarded() -> None:
    async with holding_back(0.1) as (_, client, _):
        await client.send(post(3, "/no"))
        await client.send(b"xyz" + post(3) + b"abc")
        assert await rejected(client) == b"no"
        assert (await client.answer()).startswith(b"3 ")


@pytest.mark.anyio
async def test_a_held_back_rejection_is_sent_at_once_when_the_client_closes_its_sending_half() -> None:
    async with holding_back(5.0) as (_, client, _):
        started_at = now()
        await client.send(post(0, "/no"))
        client.writer.write_eof()
        assert (await client.rest()).count(b"HTTP/1.1 429") == 1
        assert now() - started_at < 1


@pytest.mark.anyio
async def test_a_held_back_rejection_is_sent_before_the_server_shuts_down() -> None:
    async with holding_back(5.0) as (_, client, protocols):
        await client.send(post(0, "/no"))
        await asyncio.sleep(0.05)
        protocols[0].shutdown()
        assert (await client.rest()).count(b"HTTP/1.1 429") == 1


@pytest.mark.anyio
async def test_a_client_that_resets_while_its_rejection_is_held_back_leaves_no_connection_behind() -> None:
    async with holding_back(0.1) as (running, client, _):
        await client.send(post(0, "/no"))
        await asyncio.sleep(0.02)
        client.reset()
        await asyncio.sleep(0.2)
        assert running.closed == []
        assert len(running.connections) == 0


@pytest.mark.anyio
async def test_a_request_answered_by_the_application_releases_its_place() -> None:
    early = Scripted()
    async with server(early=early) as running:
        client = await running.connect()
        await client.send(post(0, "/yes"))
        await client.answer()
        assert early.forgotten == ["/yes"]


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/no", "/yes"])
async def test_a_client_that_resets_after_its_answer_leaves_no_connection_and_no_timer_behind(path: str) -> None:
    async with server() as running:
        client = await running.connect()
        await client.send(post(0, path))
        await client.reader.readuntil(b"\r\n\r\n")
        client.reset()
        await asyncio.sleep(KEEP_ALIVE_S + UNREAD_TIMEOUT_S + 1)
        assert running.closed == []
        assert len(running.connections) == 0


@pytest.mark.anyio
@pytest.mark.parametrize("count", [1, 3])
async def test_a_client_that_closes_its_sending_half_still_gets_all_its_rejections(count: int) -> None:
    async with server() as running:
        client = await running.connect()
        await client.send(post(0, "/no") * count)
        client.writer.write_eof()
        assert (await client.rest()).count(b"HTTP/1.1 429") == count
