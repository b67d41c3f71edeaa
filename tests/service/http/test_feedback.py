"""Feedback on answers, and audits, in a whole server: requests are sent, then the metrics are read."""

import base64
import threading
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from torch import Tensor

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from models.subnetwork import SubNetwork
from service.domain import InferenceRequest
from service.http.request_ids import HEADER
from service.http.uploads import MAX_MESSAGE_BYTES
from service.machine.monitor import Monitor
from service.runtime import ServerRuntime
from service.settings import Settings
from tests.service.http.scripted_server import ScriptedEngine, error_code, sample, serving
from tests.service.inference_protocol.answers import NAMES, answer

CHEAPEST = '{keep_rate="0.5",patch_grid="2"}'


def classify(client: TestClient, photo: bytes, name: str = "mine", **query: float) -> str:
    """Classify an image and return its label; the cheapest sub-network runs unless `query` names another."""
    query = {"patch_grid": 2, "keep_rate": 0.5, **query}
    response = client.post("/classify", content=photo, params=query, headers={HEADER: name})
    return str(response.json()["predictions"][0]["label"])


def wrong(label: str) -> str:
    return "thing 1" if label != "thing 1" else "thing 2"


def test_feedback_counts_answers_correct_answers_and_the_promised_number_of_correct_answers(
    client: TestClient, photo: bytes
) -> None:
    label = classify(client, photo, "one")
    classify(client, photo, "two")
    right = client.post("/feedback", json={"request_id": "one", "label": label})
    assert right.json() == {"correct": True, "counted": True}
    index = int(label.removeprefix("thing "))
    other = client.post("/feedback", json={"request_id": "two", "index": (index + 1) % 7})
    assert other.json() == {"correct": False, "counted": True}
    assert sample(client, f"supervit_feedback_total{CHEAPEST}") == 2
    assert sample(client, f"supervit_feedback_correct_total{CHEAPEST}") == 1
    assert sample(client, f"supervit_feedback_promised_correct_total{CHEAPEST}") == pytest.approx(2 * 0.5)


def test_feedback_accepts_a_request_id_generated_by_the_server(client: TestClient, photo: bytes) -> None:
    response = client.post("/classify", content=photo)
    feedback = {"request_id": response.headers[HEADER], "label": response.json()["predictions"][0]["label"]}
    assert client.post("/feedback", json=feedback).json()["correct"]


def test_only_the_first_feedback_on_an_answer_counts(client: TestClient, photo: bytes) -> None:
    label = classify(client, photo)
    first, again, other = (
        client.post("/feedback", json={"request_id": "mine", "label": said}).json()
        for said in (label, label, wrong(label))
    )
    assert first == {"correct": True, "counted": True}
    assert again == {"correct": True, "counted": False}
    assert other == {"correct": False, "counted": False}
    assert sample(client, f"supervit_feedback_total{CHEAPEST}") == 1


def test_feedback_names_an_image_of_a_form_by_its_position(client: TestClient, photo: bytes) -> None:
    files = [("file", photo), ("file", b"broken"), ("file", photo)]
    results = client.post("/classify", files=files, headers={HEADER: "form"}).json()["results"]
    for image in (0, 2):
        label = results[image]["predictions"][0]["label"]
        feedback = {"request_id": "form", "image": image, "label": label}
        assert client.post("/feedback", json=feedback).json() == {"correct": True, "counted": True}
    unanswered = client.post("/feedback", json={"request_id": "form", "image": 1, "label": "thing 1"})
    assert error_code(unanswered, 404) == "unknown_request"


def test_feedback_is_accepted_for_answers_of_other_routes(client: TestClient, photo: bytes) -> None:
    text = base64.b64encode(photo).decode()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [2], "data": [text, text]}
    client.post("/explain", content=photo, headers={HEADER: "explain"})
    client.post("/predictions/tiny", content=photo, headers={HEADER: "torchserve"})
    client.post("/v1/models/tiny:predict", json={"instances": [text]}, headers={HEADER: "v1"})
    client.post("/v2/models/tiny/infer", json={"inputs": [tensor]}, headers={HEADER: "v2"})
    for name, image in (("explain", 0), ("torchserve", 0), ("v1", 0), ("v2", 0), ("v2", 1)):
        assert client.post("/feedback", json={"request_id": name, "image": image, "index": 0}).json()["counted"]


def test_feedback_is_checked_against_the_classes_of_the_model_that_gave_the_answer(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable, photo: bytes
) -> None:
    runtime = ServerRuntime(settings, checkpoint, engine, latencies)
    with serving(runtime) as client:
        classify(client, photo, "ours")
        runtime.context.answers.remember("another's", InferenceRequest(0.0), answer(0.2, 0.7, 0.1), NAMES)
        for said, known in (
            ({"label": "dog"}, True),
            ({"index": len(NAMES) - 1}, True),
            ({"index": len(NAMES)}, False),
        ):
            response = client.post("/feedback", json={"request_id": "another's", **said})
            assert response.status_code == (200 if known else 422), response.text
        for name, unknown in (("another's", "thing 1"), ("ours", "dog")):
            response = client.post("/feedback", json={"request_id": name, "label": unknown})
            assert error_code(response, 422) == "invalid_parameter"


def test_feedback_on_a_request_without_an_answer_gets_404(client: TestClient) -> None:
    client.post("/classify", content=b"no image", headers={HEADER: "failed"})
    for name in ("failed", "never asked"):
        response = client.post("/feedback", json={"request_id": name, "index": 0})
        assert error_code(response, 404) == "unknown_request"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"request_id": "mine", "label": "no such thing"}, "label"),
        ({"request_id": "mine", "index": 7}, "index"),
        ({"request_id": "mine", "index": -1}, "index"),
        ({"request_id": "mine", "index": "1"}, "index"),
        ({"request_id": "mine"}, "label or index"),
        ({"request_id": "mine", "label": "thing 1", "index": 1}, "label or index"),
        ({"request_id": "", "index": 1}, "request_id"),
        ({"index": 1}, "request_id"),
        ({"request_id": "mine", "index": 1, "image": -1}, "image"),
        ({"request_id": "mine", "index": 1, "sure": True}, "sure"),
        ([], "object"),
    ],
)
def test_invalid_feedback_names_the_bad_member_and_is_not_counted(
    client: TestClient, photo: bytes, body: object, named: str
) -> None:
    classify(client, photo)
    response = client.post("/feedback", json=body)
    assert error_code(response, 422) == "invalid_parameter"
    assert named in response.json()["error"]["message"]
    assert sample(client, "supervit_feedback_total{") == 0
    assert client.post("/feedback", json={"request_id": "mine", "index": 1}).json()["counted"]


def test_a_feedback_body_that_is_invalid_json_or_too_long_is_refused(client: TestClient) -> None:
    assert error_code(client.post("/feedback", content=b"{"), 422) == "invalid_parameter"
    assert error_code(client.post("/feedback", content=b" " * (MAX_MESSAGE_BYTES + 1)), 413) == "body_too_large"


def test_the_documentation_describes_feedback(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/feedback"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == {"request_id", "image", "label", "index"}
    assert operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("FeedbackAnswer")
    assert "404" in operation["responses"]


class Watched(ScriptedEngine):
    """Sets `at_best` when it begins to run images at the best sub-network."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.at_best = threading.Event()

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        if subnetwork == SubNetwork(4, 1.0):
            self.at_best.set()
        return super().run(images, subnetwork)


def test_an_idle_server_audits_an_answer_and_counts_the_audit(
    settings: Settings, checkpoint: Checkpoint, latencies: LatencyTable, photo: bytes, tmp_path: Path
) -> None:
    engine, unobserved = Watched(checkpoint), Monitor(root=tmp_path, nvml=None)  # other load would prevent audits
    with_audits = settings.model_copy(update={"audit": True})
    runtime = ServerRuntime(with_audits, checkpoint, engine, latencies, monitor=unobserved)
    with serving(runtime) as client:
        best = classify(client, photo, patch_grid=4, keep_rate=1)
        engine.at_best.clear()
        label = classify(client, photo)
        assert engine.at_best.wait(30)
        classify(client, photo)  # the engine runs this one after the audit
    counts = [
        runtime.metrics.registry().get_sample_value(f"supervit_{name}_total", {"patch_grid": "2", "keep_rate": "0.5"})
        for name in ("audits", "audit_agreements", "audit_promised_agreements")
    ]
    number = counts[0] or 0.0
    assert number >= 1
    assert counts == pytest.approx([number, number * (label == best), number * (0.5 + 0.8 - 1)])
