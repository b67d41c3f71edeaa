import base64
import gzip
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.app import create_app
from service.decoding.images import decode_image
from service.http.large_json import LARGE_BYTES
from service.runtime import ServerRuntime
from service.settings import Settings
from tests.service.http.scripted_server import BODY_LIMIT, ScriptedEngine, sample, serving

INFER = "/v2/models/tiny/infer"


def tensor(datatype: str, shape: Sequence[object], **members: object) -> dict[str, Any]:
    return {"name": "image", "datatype": datatype, "shape": shape, **members}


def post(client: TestClient, body: object, raw: bytes = b"", path: str = INFER, **headers: str) -> Any:  # noqa: ANN401 - from httpx or its successor
    """Send JSON, followed by the raw bytes of tensors."""
    head = json.dumps(body).encode()
    length = {"Inference-Header-Content-Length": str(len(head))} if raw else {}
    return client.post(path, content=head + raw, headers={**length, **headers})


def post_files(client: TestClient, *files: bytes, path: str = INFER, **members: object) -> Any:  # noqa: ANN401 - as above
    raw = b"".join(struct.pack("<I", len(file)) + file for file in files)
    image = tensor("BYTES", [len(files), 1], parameters={"binary_data_size": len(raw)})
    return post(client, {"inputs": [image], **members}, raw, path)


def error_of(response: object, status: int) -> str:
    assert response.status_code == status, response.text  # type: ignore[attr-defined] # as above
    body = response.json()  # type: ignore[attr-defined] # as above
    assert list(body) == ["error"]
    return str(body["error"])


def outputs_of(response: object) -> dict[str, Any]:
    assert response.status_code == 200, response.text  # type: ignore[attr-defined] # as above
    return {output["name"]: output for output in response.json()["outputs"]}  # type: ignore[attr-defined] # as above


def test_an_image_file_gets_the_same_answer_as_from_classify(client: TestClient, photo: bytes) -> None:
    response = post_files(client, photo, id="7", parameters={"top_k": 2})
    classified = client.post("/classify?top_k=7", content=photo).json()
    by_index = sorted(classified["predictions"], key=lambda prediction: prediction["index"])
    outputs = outputs_of(response)
    assert outputs["probabilities"]["shape"] == [1, 7]
    assert outputs["probabilities"]["data"] == [prediction["probability"] for prediction in by_index]
    assert outputs["labels"]["data"] == [prediction["label"] for prediction in classified["predictions"][:2]]
    answer = response.json()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("tiny", "1", "7")
    assert answer["parameters"]["patch_grid"] == classified["subnetwork"]["patch_grid"]
    assert answer["parameters"]["reason"] == classified["decision"]["reason"]
    assert "inference;dur=" in response.headers["Server-Timing"]
    assert response.headers["X-Request-ID"]


def test_pixels_get_the_same_answer_as_the_file_that_they_were_decoded_from(
    client: TestClient, checkpoint: Checkpoint, photo: bytes
) -> None:
    expected = outputs_of(post_files(client, photo))["probabilities"]["data"]
    pixels = decode_image(photo, checkpoint.config, 10_000).numpy()[None]
    scaled = pixels / np.float32(255)
    for datatype, values in (("UINT8", pixels), ("FP32", scaled)):
        raw, shape = values.tobytes(), list(values.shape)
        binary = post(client, {"inputs": [tensor(datatype, shape, parameters={"binary_data_size": len(raw)})]}, raw)
        assert outputs_of(binary)["probabilities"]["data"] == expected
        for data in (values.ravel().tolist(), values.tolist()):
            listed = post(client, {"inputs": [tensor(datatype, shape, data=data)]})
            assert outputs_of(listed)["probabilities"]["data"] == expected


@pytest.fixture
def roomy(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable
) -> Iterator[TestClient]:
    settings = settings.model_copy(update={"max_body_bytes": 10_000_000})
    with serving(ServerRuntime(settings, checkpoint, engine, latencies)) as client:
        yield client


def test_large_json_gets_the_same_answers_as_small_json(roomy: TestClient) -> None:
    pixels = np.random.default_rng(0).random((16, 3, 16, 16), np.float32)
    shape = [1, 3, 16, 16]
    alone = [post(roomy, {"inputs": [tensor("FP32", shape, data=[each.tolist()])]}) for each in pixels]
    expected = [value for response in alone for value in outputs_of(response)["probabilities"]["data"]]
    for data in (pixels.ravel().tolist(), pixels.tolist()):
        body = {"inputs": [tensor("FP32", [16, 3, 16, 16], data=data)]}
        assert len(json.dumps(body)) > LARGE_BYTES / 2
        padded = {**body, "id": "x" * LARGE_BYTES}
        assert outputs_of(post(roomy, padded))["probabilities"]["data"] == pytest.approx(expected, abs=1e-5)
        elsewhere = {**padded, "parameters": {"data": [1, 2]}}
        assert "only in the inputs" in error_of(post(roomy, elsewhere), 422)


def test_base64_in_json_and_a_body_that_is_a_bare_image_are_read_as_files(client: TestClient, photo: bytes) -> None:
    expected = outputs_of(post_files(client, photo))["labels"]["data"]
    listed = post(client, {"inputs": [tensor("BYTES", [1], data=[base64.b64encode(photo).decode()])]})
    assert outputs_of(listed)["labels"]["data"] == expected
    alone = client.post(INFER, content=photo, headers={"Inference-Header-Content-Length": "0"})
    assert outputs_of(alone)["labels"]["data"] == expected


def test_several_images_are_answered_in_order_and_counted_as_separate_requests(
    client: TestClient, photo: bytes, encode: Callable[..., bytes]
) -> None:
    other = encode(Image.linear_gradient("L").resize((50, 50)))
    alone = [outputs_of(post_files(client, image))["probabilities"]["data"] for image in (photo, other)]
    before = sample(client, 'supervit_requests_total{outcome="ok"}')
    response = post_files(client, photo, other)
    assert outputs_of(response)["probabilities"]["shape"] == [2, 7]
    assert outputs_of(response)["probabilities"]["data"] == pytest.approx([*alone[0], *alone[1]], abs=1e-6)
    assert json.loads(response.json()["parameters"]["deadline_met"]) == [True, True]
    assert sample(client, 'supervit_requests_total{outcome="ok"}') == before + 2


def test_one_failing_image_fails_the_whole_request(client: TestClient, engine: ScriptedEngine, photo: bytes) -> None:
    engine.may_run.clear()
    assert "not an image" in error_of(post_files(client, photo, b"no image"), 422)
    engine.may_run.set()
    assert sample(client, 'supervit_requests_total{outcome="invalid_image"}') == 2


def test_binary_outputs_follow_the_json_in_order(client: TestClient, photo: bytes) -> None:
    listed = outputs_of(post_files(client, photo))
    response = post_files(client, photo, parameters={"binary_data_output": True})
    assert response.headers["Content-Type"] == "application/octet-stream"
    length = int(response.headers["Inference-Header-Content-Length"])
    probabilities, labels = json.loads(response.content[:length])["outputs"]
    sizes = [output["parameters"]["binary_data_size"] for output in (probabilities, labels)]
    assert len(response.content) == length + sum(sizes)
    raw = response.content[length : length + sizes[0]]
    assert np.frombuffer(raw, "<f4").tolist() == pytest.approx(listed["probabilities"]["data"])
    first = listed["labels"]["data"][0].encode()
    assert response.content[length + sizes[0] :].startswith(struct.pack("<I", len(first)) + first)


def test_binary_data_can_be_switched_off_for_a_single_output(client: TestClient, photo: bytes) -> None:
    wanted = [{"name": "labels"}, {"name": "probabilities", "parameters": {"binary_data": False}}]
    response = post_files(client, photo, outputs=wanted, parameters={"binary_data_output": True})
    head = json.loads(response.content[: int(response.headers["Inference-Header-Content-Length"])])
    assert ["data" in output for output in head["outputs"]] == [False, True]


def test_classification_outputs_hold_value_index_and_label(client: TestClient, photo: bytes) -> None:
    wanted = [{"name": "probabilities", "parameters": {"classification": 2}}]
    output = outputs_of(post_files(client, photo, outputs=wanted))["probabilities"]
    best = client.post("/classify?top_k=2", content=photo).json()["predictions"]
    assert output["data"] == [f"{each['probability']:f}:{each['index']}:{each['label']}" for each in best]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1, 2])


def test_a_budget_in_the_body_overrides_the_query_and_that_in_the_query_the_headers(
    client: TestClient, checkpoint: Checkpoint
) -> None:
    rows = client.get("/subnetworks").json()["subnetworks"]
    cheap, middle = (next(row["gflops"] for row in rows if row["patch_grid"] == grid) for grid in (2, 4))
    expensive = checkpoint.profile.by_subnetwork[checkpoint.config.largest].gflops
    pixels = np.zeros((1, 3, checkpoint.config.image_side, checkpoint.config.image_side), np.uint8)
    raw = pixels.tobytes()
    image = tensor("UINT8", list(pixels.shape), parameters={"binary_data_size": len(raw)})

    def spent(query: str = "", **parameters: float) -> float:
        body = {"inputs": [image], "parameters": parameters}
        response = post(client, body, raw, INFER + query, **{"X-Budget-GFLOPs": str(cheap)})
        return float(response.json()["parameters"]["gflops"])

    assert spent() == cheap
    assert spent(f"?budget_gflops={middle}") == middle
    assert spent(f"?budget_gflops={middle}", budget_gflops=expensive) == expensive


def test_the_timeout_parameter_is_a_latency_budget_in_microseconds(client: TestClient, photo: bytes) -> None:
    assert "too small" in error_of(post_files(client, photo, parameters={"timeout": 1}), 422)
    assert post_files(client, photo, parameters={"timeout": 900_000}).status_code == 200


@pytest.mark.parametrize(("encoding", "encode_body"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_compressed_with_gzip_or_deflate_are_read(
    client: TestClient, photo: bytes, encoding: str, encode_body: Callable[[bytes], bytes]
) -> None:
    body = encode_body(photo)
    headers = {"Content-Encoding": encoding, "Inference-Header-Content-Length": "0"}
    assert client.post(INFER, content=body, headers=headers).status_code == 200
    assert "truncated" in error_of(client.post(INFER, content=body[:-9], headers=headers), 422)
    assert f"not valid {encoding}" in error_of(client.post(INFER, content=photo, headers=headers), 422)
    assert "4 bytes follow" in error_of(client.post(INFER, content=body + b"more", headers=headers), 422)
    bomb = encode_body(bytes(BODY_LIMIT + 1))
    assert len(bomb) < BODY_LIMIT
    assert "decoded body is longer than" in error_of(client.post(INFER, content=bomb, headers=headers), 413)


@pytest.mark.parametrize(
    ("body", "raw", "sentence"),
    [
        ("no object", b"", "must be an object"),
        ({}, b"", "inputs: is required"),
        ({"inputs": {}}, b"", "inputs: must be a list"),
        ({"inputs": []}, b"", "must have one input"),
        ({"inputs": [{"name": "image"}]}, b"", "inputs.0.datatype: is required"),
        ({"inputs": [tensor("BYTES", [1])]}, b"", "image: must have data or binary_data_size"),
        ({"inputs": [tensor("BYTES", ["1"])]}, b"", "inputs.0.shape.0: must be an integer"),
        ({"inputs": [tensor("BYTES", [1], data="text")]}, b"", "inputs.0.data: must be a list"),
        ({"inputs": [tensor("BYTES", [1], parameters={"binary_data_size": 9})]}, b"12345678", "number of bytes"),
        ({"inputs": [tensor("BYTES", [1], parameters={"binary_data_size": -1})]}, b"1", "number of bytes"),
        ({"inputs": [tensor("BYTES", [1], parameters={"binary_data_size": "8"})]}, b"12345678", "number of bytes"),
        ({"inputs": [tensor("BYTES", [1], data=["aa=="])]}, b"12345678", "8 bytes follow the tensors"),
        ({"inputs": [tensor("FP32", [1, 3, 4, 4], data=[])]}, b"", "(N, 3, 16, 16)"),
        ({"inputs": [tensor("BYTES", [1], data=["aa=="])], "outputs": [{"name": "x"}]}, b"", "x: unknown output"),
        ({"inputs": [tensor("BYTES", [1], data=["aa=="])], "parameters": {"budget": 1}}, b"", "budget: unknown"),
    ],
)
def test_an_invalid_request_gets_a_message_that_names_the_fault(
    client: TestClient, body: object, raw: bytes, sentence: str
) -> None:
    assert sentence in error_of(post(client, body, raw), 422)
    assert sample(client, "supervit_requests_total") == 1


@pytest.mark.parametrize("length", ["-1", "x", "9999", "1.5", "9" * 5000, ""])
def test_a_wrong_json_length_in_the_header_is_refused(client: TestClient, length: str) -> None:
    response = client.post(INFER, content=b"{}", headers={"Inference-Header-Content-Length": length})
    assert "must be the length of the JSON" in error_of(response, 422)


def test_invalid_json_gets_a_message_of_our_own(client: TestClient) -> None:
    for body in (b"{", b""):
        assert error_of(client.post(INFER, content=body), 422) == "the body is not valid JSON"


def test_a_body_over_the_limit_is_refused(client: TestClient) -> None:
    assert "longer than" in error_of(client.post(INFER, content=bytes(BODY_LIMIT + 1)), 413)


@pytest.mark.parametrize("path", ["/v2/models/huge/infer", "/v2/models/tiny/versions/9/infer"])
def test_an_unknown_model_or_version_gets_404(client: TestClient, photo: bytes, path: str) -> None:
    assert "is served" in error_of(post_files(client, photo, path=path), 404)


@pytest.mark.parametrize("version", ["1", "0123456789ab"])
def test_every_route_of_the_model_accepts_its_version(client: TestClient, photo: bytes, version: str) -> None:
    path = f"/v2/models/tiny/versions/{version}"
    assert post_files(client, photo, path=f"{path}/infer").status_code == 200
    for suffix in ("", "/ready", "/config", "/stats"):
        assert client.get(path + suffix).json() == client.get(f"/v2/models/tiny{suffix}").json()
    assert "is served" in error_of(client.get("/v2/models/tiny/versions/2"), 404)


def test_metadata_configuration_and_repository_index_describe_the_server_and_the_model(client: TestClient) -> None:
    assert client.get("/v2").json()["name"] == "supervit-serve"
    assert client.get("/v2/models/tiny").json()["inputs"][0] == {"name": "image", "datatype": "BYTES", "shape": [-1, 1]}
    assert client.get("/v2/models/tiny/config").json()["max_batch_size"] == 16
    assert client.post("/v2/repository/index").json() == [
        {"name": "tiny", "version": "1", "state": "READY", "reason": ""}
    ]


def test_health_is_reported_by_status_and_json(client: TestClient) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/tiny/ready").json() == {"name": "tiny", "ready": True}
    assert "is served" in error_of(client.get("/v2/models/huge/ready"), 404)


def test_the_statistics_count_requests_of_every_route(client: TestClient, photo: bytes) -> None:
    client.post("/classify", content=photo)
    post_files(client, photo)
    for path in ("/v2/models/stats", "/v2/models/tiny/stats"):
        [statistics] = client.get(path).json()["model_stats"]
        assert statistics["inference_count"] == 2
        assert statistics["inference_stats"]["compute_infer"]["ns"] > 0
        assert sum(batch["compute_infer"]["count"] for batch in statistics["batch_stats"]) == 2


@pytest.mark.parametrize("path", ["/v2/trace/setting", "/v2/logging", "/v2/systemsharedmemory/status", "/v2/nothing"])
def test_unsupported_routes_and_methods_get_errors_in_the_format_of_v2(client: TestClient, path: str) -> None:
    assert error_of(client.get(path), 404)
    assert error_of(client.get(INFER), 405) == f"{INFER} accepts POST, not GET"


def test_a_request_from_a_page_of_another_origin_is_refused(client: TestClient, photo: bytes) -> None:
    headers = {"Origin": "http://evil.example", "Inference-Header-Content-Length": "0"}
    assert "another origin" in error_of(client.post(INFER, content=photo, headers=headers), 403)


def test_a_server_in_warm_up_is_live_but_not_ready(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable, photo: bytes
) -> None:
    engine.may_warm_up.clear()
    runtime = ServerRuntime(settings, checkpoint, engine, latencies)
    with TestClient(create_app(runtime)) as client:
        assert client.get("/v2/health/live").status_code == 200
        for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
            response = client.get(path)
            assert response.status_code == 503
            assert response.json()["ready"] is False
        response = post_files(client, photo)
        assert "warming up" in error_of(response, 503)
        assert response.headers["Retry-After"] == "1"
        engine.may_warm_up.set()


def test_a_full_server_rejects_a_request_before_its_body_is_read(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable, photo: bytes
) -> None:
    settings = settings.model_copy(update={"max_in_flight": 1})
    with serving(ServerRuntime(settings, checkpoint, engine, latencies)) as client, ThreadPoolExecutor(1) as other:
        engine.may_run.clear()
        engine.running.clear()
        first = other.submit(post_files, client, photo, parameters={"budget_ms": 60_000})
        assert engine.running.wait(10)
        response = client.post(INFER, content=bytes(BODY_LIMIT + 1))
        assert "1 requests are in the server already" in error_of(response, 429)
        assert int(response.headers["Retry-After"]) >= 1
        engine.may_run.set()
        assert first.result().status_code == 200


def test_the_documentation_describes_the_routes(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    operation = paths["/v2/models/{name}/infer"]["post"]
    assert set(operation["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
    assert [parameter["name"] for parameter in operation["parameters"]] == ["name"]
    assert {"404", "422", "429"} <= set(operation["responses"])
    for suffix in ("", "/ready", "/config", "/stats"):
        assert f"/v2/models/{{name}}/versions/{{version}}{suffix}" in paths
