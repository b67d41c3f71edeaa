from typing import Any

import pytest
from fastapi.testclient import TestClient

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.http.origins import OriginPolicy
from service.runtime import ServerRuntime
from service.settings import Settings
from tests.service.http.raw_server import Server, measure, post
from tests.service.http.scripted_server import ScriptedEngine, error_code, serving

pytestmark = pytest.mark.anyio

LONG = 15_000_000  # bytes; more than the socket buffers hold


async def ask(policy: dict[str, Any], method: str, **headers: str) -> int:
    """Return the status of a request; an app that answers with 204 is behind the policy."""
    statuses = []

    async def welcome(_: Any, __: Any, send: Any) -> None:  # noqa: ANN401 - an ASGI app
        await send({"type": "http.response.start", "status": 204})

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    policy = {"origins": (), "hosts": None} | policy
    scope = {"type": "http", "method": method, "path": "/classify", "headers": raw}
    await OriginPolicy(welcome, **policy)(scope, receive, send)  # type: ignore[arg-type] # looser types than ASGI's
    return int(statuses[0])


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        (None, "127.0.0.1:8000", 204),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", 204),
        ("https://Example.org", "example.org", 204),
        ("http://evil.example", "127.0.0.1:8000", 403),
        ("http://127.0.0.1:3000", "127.0.0.1:8000", 403),
        ("null", "127.0.0.1:8000", 403),
        ("", "", 403),
    ],
)
async def test_posts_from_pages_of_other_origins_are_refused_and_gets_are_not(
    origin: str | None, host: str, status: int
) -> None:
    headers = {"host": host} | ({} if origin is None else {"origin": origin})
    assert await ask({}, "POST", **headers) == status
    assert await ask({}, "GET", **headers) == 204


async def test_posts_from_pages_of_configured_origins_are_accepted() -> None:
    there = {"host": "server", "origin": "https://app.example"}
    assert await ask({"origins": ("https://app.example",)}, "POST", **there) == 204
    assert await ask({"origins": ("*",)}, "POST", **there) == 204
    assert await ask({"origins": ("https://other.example",)}, "POST", **there) == 403


async def test_a_page_of_another_origin_that_sends_a_long_body_receives_the_403() -> None:
    policy = OriginPolicy(measure, (), None)  # type: ignore[arg-type] # an ASGI app of looser types
    async with Server(policy) as server:  # type: ignore[arg-type] # as above
        client = await server.connect()
        head = post(LONG).replace(b"\r\n\r\n", b"\r\norigin: http://evil.example\r\n\r\n")
        await client.send(head + bytes(LONG))
        assert (await client.rest()).startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("server.example", 204),
        ("Server.example:8000", 204),
        ("127.0.0.1:8000", 204),
        ("[::1]:8000", 204),
        ("evil.example", 421),
        ("server.example.evil", 421),
        ("[", 421),
        ("", 421),
    ],
)
async def test_requests_to_host_names_other_than_the_servers_own_are_refused(host: str, status: int) -> None:
    assert await ask({"hosts": ("server.example",)}, "GET", host=host) == status
    assert await ask({}, "GET", host=host) == 204


def test_cors_allows_pages_of_the_configured_origins_and_no_others(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable, photo: bytes
) -> None:
    app, evil = {"Origin": "https://app.example"}, {"Origin": "https://evil.example"}
    preflight = {"Access-Control-Request-Method": "POST"}
    settings = settings.model_copy(update={"cors_origins": "https://app.example, https://two.example"})
    with serving(ServerRuntime(settings, checkpoint, engine, latencies)) as client:
        asked = client.options("/classify", headers=app | preflight)
        assert asked.status_code == 200
        assert asked.headers["Access-Control-Allow-Origin"] == "https://app.example"
        answered = client.post("/classify", content=photo, headers=app)
        assert answered.status_code == 200
        assert answered.headers["Access-Control-Allow-Origin"] == "https://app.example"
        failed = client.post("/classify", content=b"", headers=app)
        assert error_code(failed, 422) == "invalid_image"
        assert failed.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert error_code(client.post("/classify", content=photo, headers=evil), 403) == "foreign_origin"
        assert client.options("/classify", headers=evil | preflight).status_code == 400


def test_requests_from_pages_of_other_origins_are_refused_by_default(client: TestClient, photo: bytes) -> None:
    page = {"Origin": "https://app.example"}
    asked = client.options("/classify", headers=page | {"Access-Control-Request-Method": "POST"})
    assert asked.status_code == 405
    assert "Access-Control-Allow-Origin" not in asked.headers
    refused = client.post("/classify", content=photo, headers=page)
    assert error_code(refused, 403) == "foreign_origin"
    assert "x-request-id" in refused.headers
