import base64
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.access.key_file import KeyFile
from service.http.early_rejection import RESERVED, EarlyRejection
from service.http.keys import KeyCheck
from service.http.protocol import ARRIVED_AT
from service.runtime import ServerRuntime
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.service.http.raw_server import Server, measure, post
from tests.service.http.scripted_server import ScriptedEngine, error_code, sample, serving

HEADERS = {"Authorization": "Bearer secret-of-a"}
LIMIT_S = 30.0
LONG = 15_000_000  # bytes; more than the socket buffers hold


def entry(name: str, **limits: float) -> str:
    digest = hashlib.sha256(f"secret-of-{name}".encode()).hexdigest()
    lines = [f"{limit} = {value}" for limit, value in limits.items()]
    return "\n".join(["[[key]]", f'name = "{name}"', f'sha256 = "{digest}"', *lines, ""])


@pytest.fixture
def keys(tmp_path: Path, checkpoint: Checkpoint) -> Path:
    path = tmp_path / "keys.toml"
    once = checkpoint.profile.rows[-1].gflops
    path.write_text(
        entry("a")
        + entry("slow", gflops_per_s=1e-9, burst_gflops=1.5 * once)
        + entry("several", gflops_per_s=1e-9, burst_gflops=16.5 * checkpoint.profile.cheapest.gflops)
        + entry("few", gflops_per_s=1e-9, burst_gflops=15.5 * checkpoint.profile.cheapest.gflops)
        + entry("tiny", gflops_per_s=1e-12)
        + entry("low", highest_priority=-2, shortest_budget_ms=500)
        + entry("high", highest_priority=3)
    )
    return path


@pytest.fixture
def runtime(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable, keys: Path
) -> ServerRuntime:
    return ServerRuntime(settings.model_copy(update={"keys": keys}), checkpoint, engine, latencies)


@pytest.fixture
def asked(runtime: ServerRuntime) -> Iterator[TestClient]:
    with serving(runtime) as client:
        yield client


def key(name: str) -> dict[str, str]:
    return {"X-API-Key": f"secret-of-{name}"}


@pytest.mark.parametrize("route", ["/classify", "/explain", "/decide"])
def test_posts_require_a_key(asked: TestClient, photo: bytes, route: str) -> None:
    for headers in ({}, {"Authorization": "Bearer another"}):
        response = asked.post(route, content=photo if route != "/decide" else None, headers=headers)
        assert error_code(response, 401) == "unauthorized"
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert asked.post(route, content=photo if route != "/decide" else None, headers=HEADERS).status_code == 200


def test_posts_without_a_key_are_counted_and_gets_are_not(asked: TestClient, photo: bytes) -> None:
    asked.post("/classify", content=photo)
    asked.get("/subnetworks")
    assert sample(asked, 'supervit_requests_total{outcome="unauthorized"}') == 1


@pytest.mark.anyio
async def test_a_client_that_sends_a_long_body_without_a_key_receives_the_401(keys: Path) -> None:
    check = KeyCheck(measure, KeyFile(keys), Metrics(CollectorRegistry()))  # type: ignore[arg-type] # an ASGI app of looser types
    async with Server(check) as server:  # type: ignore[arg-type] # as above
        client = await server.connect()
        await client.send(post(LONG) + bytes(LONG))
        assert (await client.rest()).startswith(b"HTTP/1.1 401")


def test_a_key_file_that_breaks_is_reported_although_no_request_comes(
    asked: TestClient, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert asked.get("/health/live").status_code == 200
    keys.write_text("[[key")
    deadline = time.monotonic() + LIMIT_S
    while "keeping the previous keys" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("route", ["/health/ready", "/subnetworks", "/metrics", "/", "/openapi.json"])
def test_gets_require_no_key(asked: TestClient, route: str) -> None:
    assert asked.get(route).status_code == 200


def test_a_server_without_a_key_file_requires_no_key(client: TestClient, photo: bytes) -> None:
    assert client.post("/classify", content=photo).status_code == 200
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]
    assert "supervit_key_requests_total{" not in client.get("/metrics").text


def test_the_openapi_schema_describes_how_to_send_a_key(asked: TestClient) -> None:
    schema = asked.get("/openapi.json").json()
    assert {
        (each["type"], each.get("scheme"), each.get("name"))
        for each in schema["components"]["securitySchemes"].values()
    } == {
        ("http", "bearer", None),
        ("apiKey", None, "X-API-Key"),
    }
    for path in ("/classify", "/v2/models/{name}/infer", "/predictions/{name}"):
        assert len(schema["paths"][path]["post"]["security"]) == 2, "one of the two suffices"
    assert "security" not in schema["paths"]["/subnetworks"]["get"]


def test_the_openapi_schema_of_every_protocol_lists_401_403_and_421(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/classify", "/v1/models/{name}:predict", "/v2/models/{name}/infer", "/predictions/{name}"):
        assert {"401", "403", "421"} <= set(paths[path]["post"]["responses"])


def test_a_key_near_its_rate_gets_cheaper_sub_networks_then_a_rejection_with_retry_after(
    asked: TestClient, photo: bytes, checkpoint: Checkpoint
) -> None:
    spent, answers = 0.0, []
    while (response := asked.post("/classify", content=photo, headers=key("slow"))).status_code == 200:
        answers.append(response.json())
        spent += answers[-1]["gflops"]
    assert answers[0]["subnetwork"]["gflops"] == checkpoint.profile.rows[-1].gflops
    assert answers[1]["gflops"] < answers[0]["gflops"]
    assert "left in the rate of its key" in answers[1]["decision"]["reason"]
    assert spent <= 1.5 * checkpoint.profile.rows[-1].gflops
    assert error_code(response, 429) == "overloaded"
    details = response.json()["error"]["details"]
    assert details["reason"] == "key"
    missing = checkpoint.profile.cheapest.gflops - (1.5 * checkpoint.profile.rows[-1].gflops - spent)
    assert details["retry_after_s"] == pytest.approx(missing / 1e-9, rel=0.01)
    assert asked.post("/classify", content=photo, headers=key("a")).status_code == 200, "each key has its own"


def test_a_request_that_costs_more_than_the_burst_of_its_key_gets_422_and_not_429(
    asked: TestClient, photo: bytes
) -> None:
    response = asked.post("/classify", content=photo, headers=key("tiny"))
    assert error_code(response, 422) == "budget_too_small"


@pytest.mark.parametrize(
    ("name", "priority", "status"),
    [("a", 0, 200), ("a", 1, 422), ("high", 3, 200), ("high", 4, 422), ("low", -1, 422), ("low", -2, 200)],
)
def test_a_priority_is_at_most_what_its_key_allows(
    asked: TestClient, photo: bytes, name: str, priority: int, status: int
) -> None:
    response = asked.post("/classify", params={"priority": priority}, content=photo, headers=key(name))
    assert response.status_code == status
    if status == 422:
        assert response.json()["error"]["details"] == {"parameter": "priority"}


def test_a_priority_above_zero_without_a_key_is_refused(client: TestClient, photo: bytes) -> None:
    response = client.post("/classify", params={"priority": 1}, content=photo)
    assert response.json()["error"]["message"] == "priority: must be at most 0"


def test_a_latency_budget_shorter_than_its_key_allows_is_refused(asked: TestClient, photo: bytes) -> None:
    response = asked.post("/classify", params={"budget_ms": 499}, content=photo, headers=key("low"))
    assert error_code(response, 422) == "budget_too_small"
    assert response.json()["error"]["details"] == {"smallest_budget_ms": 500}
    # Without an image, so that a busy machine has nothing to be late with.
    assert asked.post("/decide", params={"budget_ms": 499}, headers=key("low")).status_code == 422
    assert asked.post("/decide", params={"budget_ms": 500}, headers=key("low")).status_code == 200


def test_requests_and_their_cost_are_counted_by_key_name(asked: TestClient, photo: bytes) -> None:
    gflops = asked.post("/classify", content=photo, headers=key("a")).json()["gflops"]
    asked.post("/classify", content=b"no image", headers=key("a"))
    asked.post("/classify", params={"top_k": 0}, content=photo, headers=key("a"))
    assert sample(asked, 'supervit_key_requests_total{key="a",outcome="ok"}') == 1
    assert sample(asked, 'supervit_key_requests_total{key="a",outcome="invalid_image"}') == 1
    assert sample(asked, 'supervit_key_requests_total{key="a",outcome="invalid_parameter"}') == 1
    assert sample(asked, 'supervit_key_gflops_total{key="a"}') == pytest.approx(gflops)
    assert "secret" not in asked.get("/metrics").text


def test_an_explanation_is_charged_to_its_key_for_both_runs_of_the_model(
    asked: TestClient, photo: bytes, checkpoint: Checkpoint
) -> None:
    answer = asked.post("/explain", content=photo, headers=key("a")).json()
    assert sample(asked, 'supervit_key_gflops_total{key="a"}') == pytest.approx(2 * answer["gflops"])
    bounded = asked.post("/explain", content=photo, headers=key("slow")).json()
    assert 2 * bounded["gflops"] <= 1.5 * checkpoint.profile.rows[-1].gflops < 2 * answer["gflops"]


def early(runtime: ServerRuntime, name: str, scope: dict[str, Any]) -> bytes | None:
    headers = [(b"host", b"here"), (b"content-length", b"4"), (b"x-api-key", f"secret-of-{name}".encode())]
    return EarlyRejection(runtime.context).answer(b"/classify", headers, scope)


def test_a_request_whose_key_has_used_up_its_rate_is_rejected_once_its_head_is_parsed(
    asked: TestClient, runtime: ServerRuntime, photo: bytes
) -> None:
    now = runtime.context.clock()
    assert early(runtime, "slow", {ARRIVED_AT: now}) is None
    while asked.post("/classify", content=photo, headers=key("slow")).status_code == 200:
        pass
    rejected = early(runtime, "slow", {ARRIVED_AT: runtime.context.clock()})
    assert rejected is not None
    assert b'"reason":"key"' in rejected
    assert sample(asked, 'supervit_key_requests_total{key="slow",outcome="overloaded"}') == 2
    assert early(runtime, "a", {ARRIVED_AT: runtime.context.clock()}) is None, "the rejection applies to that key alone"


def test_early_rejection_reserves_no_place_for_keys_with_a_rate_and_unknown_keys(
    asked: TestClient, runtime: ServerRuntime
) -> None:
    assert asked.get("/health/ready").status_code == 200
    for name, is_kept in (("a", True), ("slow", False), ("unknown", False)):
        scope: dict[str, Any] = {ARRIVED_AT: runtime.context.clock()}
        assert early(runtime, name, scope) is None
        assert (scope.get(RESERVED) is not None) is is_kept


@pytest.mark.parametrize("route", ["/v2/models/tiny/infer", "/predictions/tiny"])
def test_other_protocols_require_a_key_and_report_a_missing_one_in_their_own_error_format(
    asked: TestClient, route: str
) -> None:
    response = asked.post(route, content=b"{}")
    assert response.status_code == 401
    assert "an API key is required" in response.text
    assert response.json()["error" if route.startswith("/v2") else "message"].startswith("an API key is required")


def test_the_rate_of_a_key_applies_across_all_protocols(asked: TestClient, photo: bytes) -> None:
    while (response := asked.post("/predictions/tiny", content=photo, headers=key("slow"))).status_code == 200:
        pass
    assert response.status_code == 429
    data = base64.b64encode(photo).decode()
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [data]}
    response = asked.post("/v2/models/tiny/infer", json={"inputs": [image]}, headers=key("slow"))
    assert response.status_code == 429
    assert asked.post("/v2/models/tiny/infer", json={"inputs": [image]}, headers=key("a")).status_code == 200
    assert sample(asked, 'supervit_key_requests_total{key="a",outcome="ok"}') == 1
    assert sample(asked, 'supervit_key_requests_total{key="slow",outcome="overloaded"}') == 2


def test_images_of_one_request_share_the_rate_of_their_key_and_a_refused_request_costs_nothing(
    asked: TestClient, photo: bytes, checkpoint: Checkpoint
) -> None:
    image = {"name": "image", "datatype": "BYTES", "shape": [16], "data": 16 * [base64.b64encode(photo).decode()]}
    spent = 16 * checkpoint.profile.cheapest.gflops
    for name, statuses, gflops in (("several", (200, 429, 429), spent), ("few", (422, 422), 0)):
        for status in statuses:
            response = asked.post("/v2/models/tiny/infer", json={"inputs": [image]}, headers=key(name))
            assert response.status_code == status, response.text
        assert sample(asked, f'supervit_key_gflops_total{{key="{name}"}}') == pytest.approx(gflops)


def test_feedback_requires_the_key_of_the_request_that_it_is_about(asked: TestClient, photo: bytes) -> None:
    asked.post("/classify", content=photo, headers={**key("a"), "X-Request-ID": "mine"})
    feedback = {"request_id": "mine", "index": 0}
    assert error_code(asked.post("/feedback", json=feedback), 401) == "unauthorized"
    assert error_code(asked.post("/feedback", json=feedback, headers=key("high")), 404) == "unknown_request"
    assert asked.post("/feedback", json=feedback, headers=key("a")).json()["counted"]
