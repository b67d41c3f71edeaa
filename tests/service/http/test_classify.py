import base64
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.domain import MAX_IMAGES
from service.runtime import ServerRuntime
from service.settings import Settings
from tests.service.http.scripted_server import BODY_LIMIT, ScriptedEngine, error_code, sample, serving

JSON = {"Content-Type": "application/json"}


def part(content: bytes, disposition: str, content_type: str | None = None) -> bytes:
    named = f"Content-Type: {content_type}\r\n" if content_type else ""
    return f"--x\r\nContent-Disposition: form-data; {disposition}\r\n{named}\r\n".encode() + content + b"\r\n"


def post_form(client: TestClient, *parts: bytes, query: str = "") -> Any:  # noqa: ANN401 - from httpx or its successor
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    return client.post(f"/classify{query}", content=b"".join(parts) + b"--x--\r\n", headers=headers)


@pytest.fixture
def large(encode: Callable[..., bytes]) -> bytes:
    """A picture of more than a megabyte."""
    return encode(Image.effect_noise((1200, 1000), 50), "PNG")


def test_form_fields_besides_the_file_are_parameters(client: TestClient, checkpoint: Checkpoint, photo: bytes) -> None:
    cheapest = checkpoint.profile.cheapest.gflops
    fields = {"budget_gflops": str(cheapest), "top_k": "1"}
    answer = client.post("/classify", files={"file": ("a.jpg", photo)}, data=fields).json()
    assert answer["subnetwork"]["gflops"] == cheapest
    assert len(answer["predictions"]) == 1


@pytest.mark.parametrize(
    ("fields", "query", "parameter"),
    [
        ({"budget": "1"}, "", "budget"),
        ({"top_k": "0"}, "", "top_k"),
        ({"budget_ms": "soon"}, "", "budget_ms"),
        ({"top_k": "1"}, "?top_k=1", "top_k"),
        ({"top_k": ["1", "2"]}, "", "top_k"),
        ({}, "?top_k=1&top_k=2", "top_k"),
        ({"budget_ms": "1" * 300}, "", "budget_ms"),
    ],
)
def test_unknown_invalid_and_repeated_parameters_of_a_form_are_refused(
    client: TestClient, photo: bytes, fields: dict[str, Any], query: str, parameter: str
) -> None:
    response = client.post(f"/classify{query}", files={"file": ("a.jpg", photo)}, data=fields)
    assert error_code(response, 422) == "invalid_parameter"
    assert response.json()["error"]["details"]["parameter"] == parameter
    assert sample(client, 'supervit_requests_total{outcome="invalid_parameter"}') == 1


def test_the_parameters_of_query_and_form_are_combined(client: TestClient, photo: bytes) -> None:
    def ask(query: str) -> Any:  # noqa: ANN401 - from httpx or its successor
        return client.post(f"/classify?{query}", files={"file": ("a.jpg", photo)}, data={"keep_rate": "0.5"})

    assert "go together" in ask("top_k=2").json()["error"]["message"]
    assert ask("patch_grid=2").json()["subnetwork"]["patch_grid"] == 2


@pytest.mark.parametrize(
    ("disposition", "content_type"),
    [
        ('name="file"', "image/jpeg"),
        ('name="file"', None),
        ('name="image"; filename="a.jpg"', "image/jpeg"),
        ('name="image"; filename="a.jpg"', None),
        ('name="upload"; filename="a"', "application/octet-stream"),
        ('name="upload"', "image/png"),
        ('name="Bild 7"; filename="Größe.jpg"', "image/jpeg"),
    ],
)
def test_the_only_image_part_of_a_form_is_classified_whatever_its_name(
    client: TestClient, photo: bytes, disposition: str, content_type: str | None
) -> None:
    response = post_form(client, part(b"3", 'name="top_k"'), part(photo, disposition, content_type))
    assert response.status_code == 200, response.text
    assert len(response.json()["predictions"]) == 3


@pytest.mark.parametrize("disposition", ['name="file"', 'name="file"; filename="a.png"'])
def test_a_large_file_in_a_form_needs_no_filename(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: ScriptedEngine,
    latencies: LatencyTable,
    large: bytes,
    disposition: str,
) -> None:
    assert len(large) > 1_000_000
    settings = settings.model_copy(update={"max_body_bytes": 2_000_000, "max_image_pixels": 2_000_000})
    with serving(ServerRuntime(settings, checkpoint, engine, latencies)) as client:
        assert post_form(client, part(large, disposition, "image/png")).status_code == 200


def test_a_form_without_an_image_or_with_images_under_several_names_is_refused(
    client: TestClient, photo: bytes
) -> None:
    text = post_form(client, part(b"3", 'name="top_k"'))
    assert error_code(text, 422) == "invalid_image"
    assert "'file'" in text.json()["error"]["message"]
    names = [part(photo, f'name="{name}"; filename="a.jpg"', "image/jpeg") for name in ("left", "right")]
    assert error_code(post_form(client, *names), 422) == "invalid_image"
    notes = post_form(client, names[0], part(b"notes", 'name="notes"; filename="a.txt"', "text/plain"))
    assert error_code(notes, 422) == "invalid_parameter"


def test_each_image_of_a_form_gets_its_own_answer_or_error_in_order(
    client: TestClient, photo: bytes, encode: Callable[..., bytes]
) -> None:
    other = encode(Image.linear_gradient("L").resize((50, 50)))
    alone = [client.post("/classify?top_k=2", content=image).json()["predictions"] for image in (photo, other)]
    images = [part(image, 'name="file"; filename="a"') for image in (photo, b"no image", other)]
    response = post_form(client, *images, part(b"2", 'name="top_k"'))
    assert response.status_code == 200
    first, second, third = response.json()["results"]
    assert [first["status"], second["status"], third["status"]] == [200, 422, 200]
    for answer, expected in zip((first, third), alone, strict=True):
        for found, wanted in zip(answer["predictions"], expected, strict=True):  # a batch rounds its sums differently
            assert found == wanted | {"probability": pytest.approx(wanted["probability"], abs=1e-6)}
    assert second["error"]["code"] == "invalid_image"
    assert set(second) == {"type", "title", "status", "detail", "error"}
    assert set(first) == {"status", *client.post("/classify", content=photo).json()}
    assert sample(client, 'supervit_requests_total{outcome="ok"}') == 5
    assert sample(client, 'supervit_requests_total{outcome="invalid_image"}') == 1


def test_the_images_of_a_form_are_in_flight_together_as_separate_requests(
    client: TestClient, engine: ScriptedEngine, photo: bytes
) -> None:
    engine.may_run.clear()
    engine.running.clear()
    with ThreadPoolExecutor(1) as other:
        images = [part(photo, 'name="file"; filename="a.jpg"')] * 5
        asked = other.submit(post_form, client, *images, part(b"60000", 'name="budget_ms"'))
        assert engine.running.wait(10)
        assert sample(client, "supervit_requests_in_flight") == 5
        engine.may_run.set()
        assert [result["status"] for result in asked.result().json()["results"]] == [200] * 5


def test_a_form_with_too_many_images_or_fields_is_refused(client: TestClient, photo: bytes) -> None:
    image = part(photo[:100], 'name="file"; filename="a.jpg"')
    assert len(post_form(client, *[image] * MAX_IMAGES).json()["results"]) == MAX_IMAGES
    assert error_code(post_form(client, *[image] * (MAX_IMAGES + 1)), 422) == "invalid_image"
    fields = [part(b"1", f'name="field-{index}"') for index in range(99)]
    assert error_code(post_form(client, image, *fields), 422) == "invalid_parameter"


@pytest.mark.parametrize("prefix", ["", "data:image/jpeg;base64,", "data:;base64,"])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_json_body_may_hold_a_base64_image_and_parameters(
    client: TestClient, photo: bytes, prefix: str, is_wrapped: bool
) -> None:
    encoded = (base64.encodebytes if is_wrapped else base64.b64encode)(photo).decode()
    response = client.post("/classify", json={"image": prefix + encoded, "top_k": 2, "budget_ms": None})
    expected = client.post("/classify?top_k=2", content=photo).json()["predictions"]
    assert response.json()["predictions"] == expected


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 422, "invalid_parameter"),
        (b"[]", 422, "invalid_parameter"),
        (b"{}", 422, "invalid_parameter"),
        (b'{"image": 5}', 422, "invalid_parameter"),
        (b'{"image": "A", "top_k": true}', 422, "invalid_parameter"),
        (b'{"image": "AAAA", "top_k": "2"}', 422, "invalid_parameter"),
        (b'{"image": "AAAA", "top_k": 0}', 422, "invalid_parameter"),
        (b'{"image": "AAAA", "budget_ms": NaN}', 422, "invalid_parameter"),
        (b'{"image": "AAAA", "more": 1}', 422, "invalid_parameter"),
        (b'{"image": "%s"}' % (b"[" * 100), 422, "invalid_parameter"),
        (b'{"image": "no base64!"}', 422, "invalid_image"),
        (b'{"image": "AAA"}', 422, "invalid_image"),
        (b'{"image": "AAAA"}', 422, "invalid_image"),
        (b'{"image": "http://example.org/a.jpg"}', 422, "invalid_image"),
        (b'{"image": "data:image/jpeg,AAAA"}', 422, "invalid_image"),
        (b'{"image": "data:text/plain;base64,AAAA"}', 415, "unsupported_media_type"),
        (b'{"image": "%s"}' % (b"A" * BODY_LIMIT), 413, "body_too_large"),
    ],
)
def test_invalid_json_bodies_are_refused(client: TestClient, body: bytes, status: int, code: str) -> None:
    assert error_code(client.post("/classify", content=body, headers=JSON), status) == code


def test_a_json_body_without_an_image_is_refused_with_the_name_of_what_is_missing(client: TestClient) -> None:
    response = client.post("/classify", json={"top_k": 1})
    assert (response.status_code, response.json()["error"]["message"]) == (422, "image: is required")


def test_a_budget_that_no_sub_network_meets_is_refused_whatever_the_body_holds(
    client: TestClient, photo: bytes
) -> None:
    for body in (b"{", json.dumps({"image": base64.b64encode(photo).decode()})):
        response = client.post("/classify?budget_ms=5e-324", content=body, headers=JSON)
        assert error_code(response, 422) == "budget_too_small"
    assert error_code(post_form(client, part(photo, 'name="file"'), query="?budget_ms=1e-9"), 422) == "budget_too_small"


@pytest.mark.parametrize("query", ["top_k=99", "patch_grid=3&keep_rate=1", "budget_gflops=1e-9"])
def test_parameters_that_no_image_can_meet_refuse_the_whole_form_with_one_error(
    client: TestClient, photo: bytes, query: str
) -> None:
    images = [part(photo, 'name="file"; filename="a.jpg"')] * 2
    fields = [part(pair.partition("=")[2].encode(), f'name="{pair.partition("=")[0]}"') for pair in query.split("&")]
    for response in (post_form(client, *images, query=f"?{query}"), post_form(client, *images, *fields)):
        assert response.status_code == 422
        assert "results" not in response.json()
    before = client.post(f"/classify?{query}", content=b"no form", headers=JSON)
    assert response.json()["error"] == before.json()["error"], "the error is the same as before the body is read"


def test_a_parameter_in_both_the_json_body_and_the_query_is_refused(client: TestClient, photo: bytes) -> None:
    body = json.dumps({"image": base64.b64encode(photo).decode(), "top_k": 2})
    assert error_code(client.post("/classify?top_k=2", content=body, headers=JSON), 422) == "invalid_parameter"
    assert client.post("/classify?budget_ms=1000", content=body, headers=JSON).status_code == 200


def test_an_unsupported_content_encoding_is_refused_by_name(client: TestClient, photo: bytes) -> None:
    response = client.post("/classify", content=photo, headers={"Content-Encoding": "gzip"})
    assert error_code(response, 415) == "unsupported_media_type"
    assert "gzip" in response.json()["error"]["message"]
    assert client.post("/classify", content=photo, headers={"Content-Encoding": "identity"}).status_code == 200


def test_put_is_refused_with_a_hint_to_use_post(client: TestClient, photo: bytes) -> None:
    response = client.put("/classify", content=photo)
    assert error_code(response, 405) == "method_not_allowed"
    assert response.json()["error"]["message"] == "/classify accepts POST, not PUT"
    assert response.headers["Allow"] == "POST"


def test_a_request_from_an_address_at_its_in_flight_limit_is_rejected(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable, photo: bytes
) -> None:
    settings = settings.model_copy(update={"max_in_flight_per_address": 1})
    with serving(ServerRuntime(settings, checkpoint, engine, latencies)) as client, ThreadPoolExecutor(1) as other:
        engine.may_run.clear()
        engine.running.clear()
        first = other.submit(client.post, "/classify?budget_ms=60000", content=photo)
        assert engine.running.wait(10)
        second = client.post("/classify?budget_ms=60000", content=photo)
        assert error_code(second, 429) == "overloaded"
        assert second.json()["error"]["details"]["reason"] == "address"
        engine.may_run.set()
        assert first.result().status_code == 200
        assert client.post("/classify", content=photo).status_code == 200


def test_the_documentation_describes_forms_json_and_several_answers(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/classify"]["post"]
    names = {entry["name"] for entry in operation["parameters"]}
    content = operation["requestBody"]["content"]
    form, body = (content[kind]["schema"] for kind in ("multipart/form-data", "application/json"))
    assert set(form["properties"]) == {"file", *names}
    assert set(body["properties"]) == {"image", *names}
    assert (form["required"], body["required"]) == (["file"], ["image"])
    assert form["additionalProperties"] is body["additionalProperties"] is False
    answers = operation["responses"]["200"]["content"]["application/json"]["schema"]["anyOf"]
    assert {answer["$ref"].rpartition("/")[2] for answer in answers} == {"ClassifyAnswer", "ResultsAnswer"}
    assert {"403", "415", "421"} <= set(operation["responses"])
