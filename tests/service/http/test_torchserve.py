from dataclasses import replace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.app import create_app
from service.runtime import ServerRuntime
from service.settings import Settings
from tests.service.http.scripted_server import ScriptedEngine, sample, serving

PREDICT = "/predictions/tiny"


def error_of(response: object, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text  # type: ignore[attr-defined] # from httpx or its successor
    body: dict[str, Any] = response.json()  # type: ignore[attr-defined] # as above
    assert list(body) == ["code", "type", "message"]
    assert body["code"] == status
    return body


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("path", [PREDICT, f"{PREDICT}/1", f"{PREDICT}/0123456789ab"])
def test_an_image_gets_its_five_most_probable_labels_by_post_and_put_with_or_without_a_version(
    client: TestClient, photo: bytes, method: str, path: str
) -> None:
    expected = client.post("/classify?top_k=5", content=photo).json()["predictions"]
    response = client.request(method, path, content=photo)
    assert list(response.json().items()) == [(each["label"], each["probability"]) for each in expected]
    assert "inference;dur=" in response.headers["Server-Timing"]


@pytest.mark.parametrize("field", ["data", "body"])
def test_the_image_may_be_sent_in_the_form_field_data_or_body(client: TestClient, photo: bytes, field: str) -> None:
    expected = client.post(PREDICT, content=photo).json()
    assert client.post(PREDICT, files={field: ("kitten.jpg", photo)}).json() == expected
    part = f'--x\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n'.encode() + photo + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client.post(PREDICT, content=part, headers=headers).json() == expected


def test_query_parameters_work_as_on_other_routes(client: TestClient, photo: bytes) -> None:
    assert len(client.post(f"{PREDICT}?top_k=2", content=photo).json()) == 2
    problem = error_of(client.post(f"{PREDICT}?budget=1", content=photo), 422)
    assert problem["type"] == "BadRequestException"
    assert "unknown parameter" in problem["message"]


def test_errors_have_the_types_of_torchserve(client: TestClient, photo: bytes) -> None:
    for path in ("/predictions/huge", f"{PREDICT}/9"):
        assert error_of(client.post(path, content=photo), 404)["type"] == "ModelNotFoundException"
    assert error_of(client.post(PREDICT, content=b"no image"), 422)["type"] == "BadRequestException"
    assert error_of(client.get(PREDICT), 405)["type"] == "MethodNotAllowedException"
    assert error_of(client.get("/predictions/tiny/1/2"), 404)["type"] == "ResourceNotFoundException"
    assert sample(client, 'supervit_requests_total{outcome="unknown_model"}') == 2


def test_a_request_with_two_images_is_refused(client: TestClient, photo: bytes) -> None:
    files = [("data", ("a.jpg", photo)), ("data", ("b.jpg", photo))]
    assert "only one image per request" in error_of(client.post(PREDICT, files=files), 422)["message"]


def test_a_model_failure_is_an_internal_server_exception(
    client: TestClient, engine: ScriptedEngine, photo: bytes
) -> None:
    engine.error = RuntimeError("broken")
    assert error_of(client.post(PREDICT, content=photo), 500)["type"] == "InternalServerException"


def test_ping_is_unhealthy_and_predictions_get_503_during_warm_up(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable, photo: bytes
) -> None:
    engine.may_warm_up.clear()
    with TestClient(create_app(ServerRuntime(settings, checkpoint, engine, latencies))) as client:
        response = client.get("/ping")
        assert (response.status_code, response.json()) == (500, {"status": "Unhealthy"})
        assert error_of(client.post(PREDICT, content=photo), 503)["type"] == "ServiceUnavailableException"
        engine.may_warm_up.set()


def test_ping_is_healthy_once_the_server_is_ready(client: TestClient) -> None:
    response = client.get("/ping")
    assert (response.status_code, response.json()) == (200, {"status": "Healthy"})


def test_of_two_classes_of_one_name_the_more_probable_one_counts(
    settings: Settings, checkpoint: Checkpoint, latencies: LatencyTable, photo: bytes
) -> None:
    named = replace(checkpoint, class_names=("crane",) * 2 + checkpoint.class_names[2:])
    engine = ScriptedEngine(named)
    engine.logits = torch.tensor([[1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0]])
    with serving(ServerRuntime(settings, named, engine, latencies)) as client:
        answer = client.post("/predictions/tiny", content=photo).json()
    assert answer["crane"] == pytest.approx(float(engine.logits.softmax(1)[0, 1]), abs=1e-4)
