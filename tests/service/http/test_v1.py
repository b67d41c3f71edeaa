import base64
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.decoding.images import decode_image
from service.http.large_json import LARGE_BYTES
from service.runtime import ServerRuntime
from service.settings import Settings
from tests.service.http.scripted_server import ScriptedEngine, serving

MODEL = "/v1/models/tiny"
PREDICT = f"{MODEL}:predict"


def error_of(response: object, status: int) -> str:
    assert response.status_code == status, response.text  # type: ignore[attr-defined] # from httpx or its successor
    body = response.json()  # type: ignore[attr-defined] # as above
    assert list(body) == ["error"]
    return str(body["error"])


@pytest.fixture
def text(photo: bytes) -> str:
    return base64.b64encode(photo).decode()


@pytest.fixture
def expected(client: TestClient, photo: bytes) -> dict[str, Any]:
    """Return the expected row of an answer for the photo."""
    predictions = client.post("/classify?top_k=7", content=photo).json()["predictions"]
    by_index = sorted(predictions, key=lambda prediction: prediction["index"])
    probabilities = [prediction["probability"] for prediction in by_index]
    return {"probabilities": probabilities, "labels": [prediction["label"] for prediction in predictions[:5]]}


def test_a_request_in_row_format_is_answered_in_row_format(
    client: TestClient, text: str, expected: dict[str, Any]
) -> None:
    instances = [text, {"b64": text}, {"image": {"b64": text}}]
    for instance in instances:
        assert client.post(PREDICT, json={"instances": [instance]}).json() == {"predictions": [expected]}
    assert len(client.post(PREDICT, json={"instances": instances}).json()["predictions"]) == 3


def test_a_request_in_column_format_is_answered_in_column_format(
    client: TestClient, text: str, expected: dict[str, Any]
) -> None:
    columns = {name: [value] for name, value in expected.items()}
    for inputs in ({"image": [{"b64": text}]}, {"image": {"b64": text}}, [text], {"b64": text}):
        assert client.post(PREDICT, json={"inputs": inputs}).json() == {"outputs": columns}


def test_numbers_are_read_as_pixels_scaled_to_one(
    client: TestClient, checkpoint: Checkpoint, photo: bytes, expected: dict[str, Any]
) -> None:
    pixels = (decode_image(photo, checkpoint.config, 10_000).numpy() / np.float32(255)).tolist()
    assert client.post(PREDICT, json={"instances": [pixels]}).json() == {"predictions": [expected]}


def test_large_json_gets_the_same_answers_as_small_json(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable
) -> None:
    settings = settings.model_copy(update={"max_body_bytes": 10_000_000})
    pixels = np.random.default_rng(0).random((16, 3, 16, 16), np.float32).astype(np.float64).tolist()
    with serving(ServerRuntime(settings, checkpoint, engine, latencies)) as client:
        small = [client.post(PREDICT, json={"inputs": [image]}).json()["outputs"] for image in pixels]
        for inputs in (pixels, {"image": pixels}):
            body = {"inputs": inputs, "signature_name": "x" * LARGE_BYTES}
            outputs = client.post(PREDICT, json=body).json()["outputs"]
            for row, alone in zip(outputs["probabilities"], small, strict=True):
                assert row == pytest.approx(alone["probabilities"][0], abs=1e-5)
        for number in (16, 7):
            instances = [{"image": image} for image in pixels[:number]]
            body = {"instances": instances, "signature_name": "x" * LARGE_BYTES}
            rows = client.post(PREDICT, json=body).json()["predictions"]
            for answer, alone in zip(rows, small[:number], strict=True):
                assert answer["probabilities"] == pytest.approx(alone["probabilities"][0], abs=1e-5)
        mixed = {"inputs": pixels, "instances": [{"image": pixels[0]}], "signature_name": "x" * LARGE_BYTES}
        assert "must hold images" in error_of(client.post(PREDICT, json=mixed), 422)


def test_top_k_and_budgets_are_read_from_the_query(client: TestClient, text: str) -> None:
    body = {"instances": [text]}
    assert len(client.post(f"{PREDICT}?top_k=2", json=body).json()["predictions"][0]["labels"]) == 2
    assert "too small" in error_of(client.post(f"{PREDICT}?budget_gflops=1e-9", json=body), 422)


@pytest.mark.parametrize("version", ["0", "1", "0123456789ab"])
def test_the_version_may_be_zero_or_one_or_the_checkpoints(client: TestClient, text: str, version: str) -> None:
    path = f"{MODEL}/versions/{version}"
    assert client.post(f"{path}:predict", json={"instances": [text]}).status_code == 200
    for suffix in ("", "/metadata"):
        assert client.get(path + suffix).json() == client.get(MODEL + suffix).json()


def test_the_status_and_the_signature_have_the_format_of_tensorflow_serving(client: TestClient) -> None:
    status = client.get(MODEL).json()
    assert (status["name"], status["ready"]) == ("tiny", True)
    assert status["model_version_status"] == [
        {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    ]
    described = client.get(f"{MODEL}/metadata").json()
    assert described["modelSpec"]["version"] == "1"
    signature = described["metadata"]["signature_def"]["signatureDef"]["serving_default"]
    assert signature["inputs"]["image"]["dtype"] == "DT_STRING"
    assert [size["size"] for size in signature["outputs"]["probabilities"]["tensorShape"]["dim"]] == ["-1", "7"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "must hold images"),
        ({"instances": []}, "must hold images"),
        ({"instances": [None]}, "must hold images"),
        ({"instances": "x"}, "instances: must be a list"),
        ({"instances": ["???"]}, "must be base64 or a data URL"),
        ({"instances": [{"b64": "aGk=", "more": 1}]}, "image: "),
        ({"instances": ["aGk=", 1]}, "elements of BYTES must be base64 strings"),
        ({"instances": [1, 2]}, r"(N, 3, 16, 16)"),
        ({"instances": [[[[0.5]]]]}, r"(N, 3, 16, 16)"),
    ],
)
def test_invalid_instances_get_a_message_that_names_the_fault(client: TestClient, body: object, sentence: str) -> None:
    assert sentence in error_of(client.post(PREDICT, json=body), 422)


def test_an_unknown_model_or_version_gets_404(client: TestClient, text: str) -> None:
    for path in ("/v1/models/huge", f"{MODEL}/versions/2"):
        assert "is served" in error_of(client.post(f"{path}:predict", json={"instances": [text]}), 404)
        assert "is served" in error_of(client.get(path), 404)
