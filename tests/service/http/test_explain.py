import base64
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from fastapi.testclient import TestClient
from torch import Tensor

from models.checkpoint import Checkpoint
from models.subnetwork import SubNetwork
from service.decoding.images import decode_image
from tests.service.http.scripted_server import error_code, sample

CLASSIFICATION = {"predictions", "subnetwork", "decision", "timing_ms", "budget_ms", "deadline_met", "model"}


def test_an_explanation_is_a_classification_and_the_patches_that_its_sub_network_kept(
    client: TestClient, photo: bytes, checkpoint: Checkpoint
) -> None:
    pinned = {"patch_grid": 4, "keep_rate": 0.5, "top_k": 2}
    answer = client.post("/explain", params=pinned, content=photo).json()
    assert answer.keys() >= CLASSIFICATION | {"explanation"}
    assert answer["predictions"] == client.post("/classify", params=pinned, content=photo).json()["predictions"]
    (pruning,) = answer["explanation"]["prunings"]
    image = decode_image(photo, checkpoint.config, 10_000)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (checkpoint.config.mean, checkpoint.config.std))
    _, (trace,) = checkpoint.model.trace(((image / 255 - mean) / std)[None], SubNetwork(4, 0.5))
    assert pruning["block"] == 1
    assert len(pruning["kept"]) == 9  # ceil(0.5 * 17)
    assert pruning["kept"] == sorted(trace.kept[0].tolist())
    expected = dict(zip(trace.kept[0].tolist(), trace.scores[0].tolist(), strict=True))
    assert pruning["scores"] == pytest.approx([expected[patch] for patch in pruning["kept"]], abs=1e-4)
    assert not pruning["keeps_fused"]
    assert answer["explanation"]["seen_share"] == 1  # crop_fraction


def test_an_explanation_uses_the_sub_network_that_its_budget_selects(client: TestClient, photo: bytes) -> None:
    rows = client.get("/subnetworks").json()["subnetworks"]
    answer = client.post("/explain", params={"budget_gflops": rows[0]["gflops"]}, content=photo).json()
    assert answer["subnetwork"]["gflops"] == rows[0]["gflops"]
    assert [len(pruning["kept"]) for pruning in answer["explanation"]["prunings"]] == [3]  # ceil(0.5 * 5)


def test_a_sub_network_that_keeps_every_patch_has_no_prunings(client: TestClient, photo: bytes) -> None:
    answer = client.post("/explain", params={"patch_grid": 4, "keep_rate": 1}, content=photo).json()
    assert answer["explanation"]["prunings"] == []


def test_an_image_in_a_form_or_in_json_is_explained(client: TestClient, photo: bytes) -> None:
    in_form = client.post("/explain", files={"file": photo}, data={"patch_grid": "4", "keep_rate": "0.5"})
    body = {"image": base64.b64encode(photo).decode(), "patch_grid": 4, "keep_rate": 0.5}
    for response in (in_form, client.post("/explain", json=body)):
        assert len(response.json()["explanation"]["prunings"]) == 1


def test_explain_reports_and_counts_errors_as_classify_does(client: TestClient, photo: bytes) -> None:
    assert error_code(client.post("/explain", content=b"no image"), 422) == "invalid_image"
    assert error_code(client.post("/explain?top_k=99", content=photo), 422) == "invalid_parameter"
    two = [("file", photo), ("file", photo)]
    assert error_code(client.post("/explain", files=two), 422) == "invalid_parameter"
    assert sample(client, 'supervit_requests_total{outcome="invalid_parameter"}') == 2
    assert error_code(client.get("/explain"), 405) == "method_not_allowed"
    assert client.post("/explain", content=photo).status_code == 200  # the errors released the turn


def test_a_second_explanation_is_rejected_during_the_first_while_classifications_continue(
    client: TestClient, photo: bytes, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracing, may_end = Event(), Event()
    trace = checkpoint.model.trace

    def held_trace(images: Tensor, subnetwork: SubNetwork) -> object:
        tracing.set()
        assert may_end.wait(10)
        return trace(images, subnetwork)

    monkeypatch.setattr(checkpoint.model, "trace", held_trace)
    with ThreadPoolExecutor(1) as other:
        first = other.submit(client.post, "/explain", content=photo)
        assert tracing.wait(10)
        refused = client.post("/explain", content=photo)
        classified = client.post("/classify", content=photo)
        may_end.set()
    assert first.result().status_code == 200
    assert error_code(refused, 429) == "overloaded"
    assert int(refused.headers["Retry-After"]) == 1
    assert classified.status_code == 200
    assert sample(client, "supervit_requests_total") == 2  # the refused one was no classification
    assert sample(client, 'supervit_deadlines_total{result="missed"}') == 0


def test_a_model_that_cannot_be_traced_is_a_model_error(
    client: TestClient, photo: bytes, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(checkpoint.model, "trace", fail)
    assert error_code(client.post("/explain", content=photo), 500) == "model_error"


def test_the_documentation_describes_explain(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    explain, classify = paths["/explain"]["post"], paths["/classify"]["post"]
    assert explain["requestBody"] == classify["requestBody"]
    assert explain["parameters"] == classify["parameters"]
    schema = explain["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema["$ref"].endswith("ExplainAnswer")
