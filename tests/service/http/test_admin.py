"""The /admin/model routes over a real runtime, whose engines a test can block or make fail."""

import gc
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from models.checkpoint import Checkpoint, save_checkpoint
from models.header import Header
from models.latency import LatencyTable
from models.supervit import SuperViT
from service.http.uploads import MAX_MESSAGE_BYTES
from service.model_changer import WATCHED_ANSWERS
from service.runtime import ServerRuntime
from service.settings import Settings
from tests.service.conftest import CONFIG
from tests.service.http.scripted_server import ScriptedEngine, error_code, sample, serving

LIMIT_S = 20


class Server:
    """A server of the model `tiny` that can change to `other`, whose engine a test can script beforehand."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint, latencies: LatencyTable, folder: Path) -> None:
        torch.manual_seed(0)  # the same weights as `tiny`
        model = SuperViT(CONFIG).eval()
        self.path = folder / "other.safetensors"
        save_checkpoint(self.path, model, Header("other", CONFIG, checkpoint.class_names, checkpoint.profile))
        self.old, self.new = ScriptedEngine(checkpoint), ScriptedEngine(replace(checkpoint, model=model))
        self.runtime = ServerRuntime(settings, checkpoint, self.old, latencies, open_candidate=self.open_candidate)
        self.client: TestClient

    def open_candidate(self, checkpoint: Checkpoint, *_: object) -> tuple[ScriptedEngine, Checkpoint]:
        return self.new, checkpoint

    def put(self, **members: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        response = self.client.put("/admin/model", json={"checkpoint": str(self.path)} | members)
        assert response.status_code == 202, response.text
        return dict(response.json())

    def report(self) -> dict[str, Any]:
        return dict(self.client.get("/admin/model").json())

    def until(self, step: str) -> None:
        """Wait for a step that only the test can end."""
        self._wait(lambda change: change["step"] == step or change["outcome"] is not None)
        assert self.report()["change"]["outcome"] is None, self.report()

    def outcome(self) -> dict[str, Any]:
        self._wait(lambda change: change["outcome"] is not None)
        return dict(self.report()["change"])

    def _wait(self, is_so: Any) -> None:  # noqa: ANN401 - a condition
        deadline = time.monotonic() + LIMIT_S
        while not is_so(self.report()["change"]):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def ask(self, photo: bytes) -> str:
        response = self.client.post("/classify?budget_ms=20000", content=photo)
        assert response.status_code == 200, response.text
        return str(response.json()["model"]["name"])


@pytest.fixture
def server(settings: Settings, checkpoint: Checkpoint, latencies: LatencyTable, tmp_path: Path) -> Iterator[Server]:
    server = Server(settings, checkpoint, latencies, tmp_path)
    with serving(server.runtime) as server.client:
        yield server


def test_the_report_holds_no_change_before_the_first_one(server: Server) -> None:
    assert server.report() == {"model": {"name": "tiny", "version": "0123456789ab"}, "change": None}


def test_every_route_serves_the_new_model_after_a_change(server: Server, photo: bytes) -> None:
    assert server.ask(photo) == "tiny"
    answer = server.put()
    assert (answer["change"]["step"], answer["change"]["outcome"]) == ("load", None)
    server.until("watch")
    assert [server.ask(photo) for _ in range(WATCHED_ANSWERS)] == ["other"] * WATCHED_ANSWERS
    change = server.outcome()
    assert (change["outcome"], change["num_compared"], change["agreement"]) == ("done", 1, 1.0)
    client = server.client
    assert server.report()["model"] == {"name": "other", "version": change["version"]}
    assert client.get("/subnetworks").json()["model"]["name"] == "other"
    assert client.get("/health/ready").status_code == 200
    assert client.post("/explain", content=photo).json()["model"]["name"] == "other"
    assert (
        client.post("/v2/models/other/infer", json=infer_body()).json()["parameters"]["checkpoint"] == change["version"]
    )
    assert client.post("/v2/models/tiny/infer", json=infer_body()).status_code == 404
    assert client.get("/v2/models/other").json()["name"] == "other"
    assert client.post("/predictions/other", content=photo).status_code == 200
    assert client.post("/v2/repository/index").json()[0]["name"] == "other"
    assert sample(client, 'supervit_model_info{name="other"') == 1
    assert sample(client, 'supervit_model_info{name="tiny"') == 0
    assert sample(client, 'supervit_model_changes_total{outcome="done"}') == 1


def infer_body() -> dict[str, Any]:
    pixels = [0.5] * (3 * CONFIG.image_side**2)
    shape = [1, 3, CONFIG.image_side, CONFIG.image_side]
    return {"inputs": [{"name": "image", "datatype": "FP32", "shape": shape, "data": pixels}]}


def test_the_old_and_the_new_model_can_both_be_named_while_the_new_one_is_watched(server: Server) -> None:
    server.put()
    server.until("watch")
    for name in ("tiny", "other"):
        answer = server.client.post(f"/v2/models/{name}/infer", json=infer_body())
        assert (answer.status_code, answer.json()["model_name"]) == (200, name)


def test_a_broken_checkpoint_leaves_the_old_model_serving(server: Server, photo: bytes) -> None:
    server.path.write_bytes(server.path.read_bytes()[:-100])
    server.put()
    change = server.outcome()
    assert (change["outcome"], change["step"]) == ("refused", "load")
    assert str(server.path) in change["message"]
    assert server.ask(photo) == "tiny"


def test_an_engine_that_fails_in_its_first_run_leaves_the_old_model_serving(server: Server, photo: bytes) -> None:
    server.new.error = RuntimeError("no instructions")
    server.put()
    change = server.outcome()
    assert (change["outcome"], change["step"]) == ("failed", "prepare")
    assert "instructions" not in change["message"]
    assert server.ask(photo) == "tiny"


def test_a_new_model_that_fails_on_a_request_is_rolled_back(server: Server, photo: bytes) -> None:
    server.put()
    server.until("watch")
    server.new.error = RuntimeError("broken")
    failed = server.client.post("/classify", content=photo)
    assert error_code(failed, 500) == "model_error"
    change = server.outcome()
    assert (change["outcome"], change["message"]) == (
        "went_back",
        "the new model failed on a request; the old one serves again",
    )
    assert server.ask(photo) == "tiny"
    assert server.client.get("/health/ready").status_code == 200


def test_a_second_change_is_refused_while_the_first_one_runs(server: Server) -> None:
    server.new.may_run.clear()
    server.put()
    server.until("prepare")
    answer = server.client.put("/admin/model", json={"checkpoint": "x"})
    assert error_code(answer, 409) == "model_change_refused"
    server.new.may_run.set()


def test_the_old_model_is_freed_once_the_change_is_done(
    settings: Settings, checkpoint: Checkpoint, latencies: LatencyTable, tmp_path: Path, photo: bytes
) -> None:
    """Check it without the garbage collector, which runs seldom in a server."""
    server = Server(settings, checkpoint, latencies, tmp_path)
    copy = replace(checkpoint, model=SuperViT(CONFIG).eval())
    engine = ScriptedEngine(copy)
    server.runtime = ServerRuntime(settings, copy, engine, latencies, open_candidate=server.open_candidate)
    model, held = weakref.ref(copy.model), weakref.ref(engine)
    del copy, engine
    with serving(server.runtime) as server.client:
        gc.collect()
        gc.disable()
        try:
            server.put(force=True)
            server.until("watch")
            for _ in range(WATCHED_ANSWERS):
                server.ask(photo)
            assert server.outcome()["outcome"] == "done"
            deadline = time.monotonic() + 10  # the thread that closed the engine may hold it for a moment
            while (model() or held()) is not None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            gc.enable()


@pytest.mark.parametrize(
    "members",
    [
        {"checkpoint": ""},
        {"least_agreement": 1.1},
        {"most_slowdown": 0},
        {"canary": {"share": 2, "seconds": 1}},
        {"shadow": {"share": 0.5}},
        {"other": 1},
    ],
)
def test_an_invalid_body_is_refused(server: Server, members: dict[str, Any]) -> None:
    answer = server.client.put("/admin/model", json={"checkpoint": "x"} | members)
    assert error_code(answer, 422) == "invalid_parameter"
    assert server.report()["change"] is None


def test_a_body_that_is_too_long_is_refused(server: Server) -> None:
    answer = server.client.put("/admin/model", content=b" " * (MAX_MESSAGE_BYTES + 1))
    assert error_code(answer, 413) == "body_too_large"


def test_the_documentation_describes_the_body(server: Server) -> None:
    operation = server.client.get("/openapi.json").json()["paths"]["/admin/model"]["put"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["checkpoint"]
    problem = {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}
    for status in ("401", "408", "409", "413", "421", "422", "429", "503"):
        assert operation["responses"][status]["content"] == {"application/problem+json": problem}
    assert set(schema["properties"]["shadow"]["anyOf"][0]["properties"]) == {"share", "seconds"}
    assert "$ref" not in str(schema)


def test_a_server_that_allows_no_changes_refuses_them_with_its_reason(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable
) -> None:
    with serving(ServerRuntime(settings, checkpoint, engine, latencies, changes_refused="not here")) as client:
        answer = client.put("/admin/model", json={"checkpoint": "x"})
        assert error_code(answer, 409) == "model_change_refused"
        assert answer.json()["error"]["message"] == "not here"


def test_a_server_can_be_stopped_during_a_change(server: Server, photo: bytes) -> None:
    server.put()
    server.until("watch")
    assert server.ask(photo) == "other"  # the fixture now stops the server


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("evil.example", "http://evil.example", 403),
        ("localhost:8000", "http://localhost:8000", 202),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", 202),
        ("supervit.internal", None, 202),
    ],
)
def test_a_page_cannot_change_the_model_by_dns_rebinding(
    server: Server, host: str, origin: str | None, status: int
) -> None:
    headers = {"host": host} | ({} if origin is None else {"origin": origin})
    answer = server.client.put("/admin/model", json={"checkpoint": str(server.path)}, headers=headers)
    assert answer.status_code == status, answer.text


def test_a_page_on_an_allowed_host_may_change_the_model(
    settings: Settings, checkpoint: Checkpoint, latencies: LatencyTable, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"allowed_hosts": "vit.example"})
    server = Server(settings, checkpoint, latencies, tmp_path)
    with serving(server.runtime) as server.client:
        headers = {"host": "vit.example", "origin": "https://vit.example"}
        server.client.headers = headers
        server.put()
