import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from models.profiles import CascadeProfile, ProfileTable
from models.subnetwork import SubNetwork
from service.app import create_app
from service.assembly import ProfileWithFile
from service.decoding import images
from service.decoding.images import decode_image
from service.domain import ServerState
from service.engines.profile_store import begin_profile, extended_profile
from service.errors import InvalidParameterError, OutOfMemoryError
from service.execution.watchdog import Watchdog
from service.health import FAILURES_IN_A_ROW
from service.http.descriptions import describe_subnetworks
from service.machine.monitor import Monitor
from service.machine.snapshot import ResourceSnapshot
from service.runtime import ServerRuntime
from service.scheduling.catalog import VariantCatalog
from service.settings import Settings
from service.telemetry.logs import TextFormatter
from tests.service.http.scripted_server import BODY_LIMIT, ScriptedEngine, error_code, sample, serving


class Beats:
    """Receives the heartbeats of a server's watchdog; a test can wait for the next ones."""

    def __init__(self) -> None:
        self.serving = threading.Event()
        self._next = threading.Semaphore(0)

    def __call__(self, is_serving: bool) -> None:
        if is_serving:
            self.serving.set()
        self._next.release()

    def wait(self, number: int) -> None:
        while self._next.acquire(blocking=False):
            pass
        for _ in range(number):
            assert self._next.acquire(timeout=30)


def test_an_answer_holds_the_predictions_the_sub_network_the_decision_the_model_and_the_times(
    client: TestClient, checkpoint: Checkpoint, engine: ScriptedEngine, photo: bytes
) -> None:
    answer = client.post("/classify", content=photo, headers={"Content-Type": "image/jpeg"}).json()
    image = decode_image(photo, checkpoint.config, 10_000)
    best = engine.run(image[None], checkpoint.config.largest)[0].softmax(0).topk(5)
    assert [entry["index"] for entry in answer["predictions"]] == best.indices.tolist()
    assert [entry["probability"] for entry in answer["predictions"]] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert answer["predictions"][0]["label"] == f"thing {best.indices[0]}"
    assert answer["subnetwork"] == {
        "patch_grid": 4,
        "patch_size_px": 4.0,
        "keep_rate": 1.0,
        "num_tokens": 17,
        "gflops": checkpoint.profile.by_subnetwork[SubNetwork(4, 1.0)].gflops,
        "expected_accuracy": 0.8,
    }
    assert answer["decision"]["reason"] == (
        "no other request is waiting: grid 4 at keep rate 1 is the most accurate sub-network"
    )
    assert answer["decision"]["batch_size"] == 1
    assert answer["decision"]["predicted_inference_ms"] >= 0
    assert answer["budget_ms"] == 60_000
    assert answer["deadline_met"] is True
    assert answer["model"] == {"name": "tiny", "version": "0123456789ab"}
    timing = answer["timing_ms"]
    assert set(timing) == {"decode_wait", "decode", "queue", "inference", "total"}
    assert 0 < sum(timing.values()) - timing["total"] <= timing["total"] + 0.01


def test_the_server_timing_header_repeats_the_times_of_the_answer(client: TestClient, photo: bytes) -> None:
    response = client.post("/classify", content=photo)
    expected = [f"{stage};dur={ms}" for stage, ms in response.json()["timing_ms"].items()]
    assert response.headers["Server-Timing"].split(", ") == expected


@pytest.mark.parametrize(
    "content_type",
    [None, "image/jpeg", "image/png", "IMAGE/X-anything; q=1", "application/octet-stream"],
)
def test_the_body_may_be_the_image_with_any_image_type_octet_stream_or_no_content_type(
    client: TestClient, photo: bytes, content_type: str | None
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    assert client.post("/classify", content=photo, headers=headers).status_code == 200


def test_an_image_in_a_form_gets_the_same_answer_as_in_a_plain_body(client: TestClient, photo: bytes) -> None:
    by_form = client.post("/classify", files={"file": ("a.jpg", photo)}, data={"top_k": "5"}).json()
    assert by_form["predictions"] == client.post("/classify", content=photo).json()["predictions"]


def test_every_budget_is_kept_and_every_sub_network_of_the_frontier_is_reached(
    client: TestClient, checkpoint: Checkpoint, photo: bytes
) -> None:
    reached = set()
    for row in client.get("/subnetworks").json()["subnetworks"]:
        answer = client.post("/classify", params={"budget_gflops": row["gflops"]}, content=photo).json()
        assert answer["subnetwork"]["gflops"] <= row["gflops"]
        reached.add(SubNetwork(answer["subnetwork"]["patch_grid"], answer["subnetwork"]["keep_rate"]))
    assert reached == {row.subnetwork for row in extended_profile(checkpoint).frontier}
    assert len(reached) > len(checkpoint.profile.frontier)


def test_a_dominated_sub_network_answers_if_it_is_requested_by_name(client: TestClient, photo: bytes) -> None:
    answer = client.post("/classify?patch_grid=2&keep_rate=1", content=photo).json()
    assert (answer["subnetwork"]["patch_grid"], answer["subnetwork"]["keep_rate"]) == (2, 1)
    assert "by name" in answer["decision"]["reason"]


def test_a_budget_below_the_cheapest_sub_network_is_refused_with_the_smallest_possible_one(
    client: TestClient, profiles: ProfileTable, photo: bytes
) -> None:
    response = client.post("/classify?budget_gflops=1e-9", content=photo)
    assert error_code(response, 422) == "budget_too_small"
    smallest = response.json()["error"]["details"]["smallest_budget_gflops"]
    assert smallest == profiles.cheapest.gflops
    assert str(smallest) in response.json()["error"]["message"]
    assert client.post("/classify", params={"budget_gflops": smallest}, content=photo).status_code == 200


@pytest.mark.parametrize(
    "query",
    [
        "budget_gflops=0",
        "budget_gflops=-1",
        "budget_gflops=nan",
        "budget_gflops=inf",
        "budget_gflops=cheap",
        "budget_gflops=",
        "budget_ms=0",
        "budget_ms=nan",
        "budget_ms=inf",
        "budget_ms=soon",
        "priority=1",
        "priority=1000000",
        "priority=-11",
        "priority=0.5",
        "top_k=0",
        "top_k=8",
        "top_k=1.5",
        "patch_grid=4",
        "keep_rate=0.5",
        "patch_grid=3&keep_rate=0.5",
        "patch_grid=4&keep_rate=0.61",
        "patch_grid=4&keep_rate=0",
        "patch_grid=4&keep_rate=1.1",
        "budget=2.3",
    ],
)
def test_an_invalid_parameter_is_refused_and_counted(client: TestClient, photo: bytes, query: str) -> None:
    response = client.post(f"/classify?{query}", content=photo)
    assert error_code(response, 422) == "invalid_parameter"
    assert "Value error" not in response.text
    assert sample(client, 'supervit_requests_total{outcome="invalid_parameter"}') == 1


def test_top_k_bounds_the_predictions(client: TestClient, photo: bytes) -> None:
    everything = client.post("/classify?top_k=7", content=photo).json()["predictions"]
    assert len(everything) == 7
    assert sum(entry["probability"] for entry in everything) == pytest.approx(1)
    assert len(client.post("/classify?top_k=1", content=photo).json()["predictions"]) == 1


def test_a_body_that_is_no_image_is_refused_by_its_bytes_or_its_content_type(client: TestClient, photo: bytes) -> None:
    assert error_code(client.post("/classify", content=b"hello"), 422) == "invalid_image"
    assert error_code(client.post("/classify"), 422) == "invalid_image"
    assert error_code(client.post("/classify", content=photo[:200]), 422) == "invalid_image"
    assert error_code(client.post("/classify", json={"image": "..."}), 422) == "invalid_image"
    text = client.post("/classify", content=photo, headers={"Content-Type": "text/plain"})
    assert error_code(text, 415) == "unsupported_media_type"


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("multipart/form-data", b"..."),
        ("multipart/form-data; boundary=x", b"not a form"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n\r\n--x--\r\n"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\ntext\r\n--x--\r\n',
        ),
        ("multipart/form-data; boundary=" + "x" * 300, b"--x"),
    ],
)
def test_a_broken_form_is_refused(client: TestClient, content_type: str, content: bytes) -> None:
    response = client.post("/classify", content=content, headers={"Content-Type": content_type})
    assert error_code(response, 422) == "invalid_image"


def test_a_body_over_the_limit_is_refused_whether_declared_streamed_or_in_a_form(client: TestClient) -> None:
    def long_stream() -> Iterator[bytes]:
        for _ in range(BODY_LIMIT // 1000 + 1):
            yield bytes(1000)

    announced = client.post("/classify", content=bytes(BODY_LIMIT + 1))
    streamed = client.post("/classify", content=long_stream())
    form = client.post("/classify", files={"file": bytes(BODY_LIMIT)})
    for response in (announced, streamed, form):
        assert error_code(response, 413) == "body_too_large"
        assert response.headers["Connection"] == "close"
    assert client.post("/classify", content=b"x" * BODY_LIMIT).status_code == 422


@pytest.mark.parametrize("query", ["top_k=0", "top_k=8", "budget_gflops=1e-9"])
def test_an_error_before_the_body_closes_the_connection_unless_the_body_is_known_to_be_short(
    client: TestClient, query: str
) -> None:
    announced = client.post(f"/classify?{query}", content=bytes(BODY_LIMIT + 1))
    streamed = client.post(f"/classify?{query}", content=iter([b"x"]))
    short = client.post(f"/classify?{query}", content=b"x")
    assert [response.headers.get("Connection") for response in (announced, streamed, short)] == ["close", "close", None]
    assert {response.status_code for response in (announced, streamed, short)} == {422}


def test_an_image_bomb_is_refused(client: TestClient, encode: Callable[..., bytes]) -> None:
    bomb = encode(Image.new("1", (101, 100)))
    assert error_code(client.post("/classify", content=bomb), 413) == "image_too_large"


def test_a_failure_of_the_model_is_a_500_whose_cause_is_only_in_the_log(
    client: TestClient, engine: ScriptedEngine, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    engine.error = RuntimeError("secret weights")
    response = client.post("/classify", content=photo)
    assert error_code(response, 500) == "model_error"
    assert "secret" not in response.text
    assert "secret weights" in caplog.text
    engine.error = None
    assert client.post("/classify", content=photo).status_code == 200


@pytest.mark.parametrize("path", ["/classify", "/classify?top_k=0", "/health/live", "/nowhere"])
def test_every_answer_carries_its_request_id(client: TestClient, photo: bytes, path: str) -> None:
    method = "POST" if path.startswith("/classify") else "GET"

    def name(**headers: str) -> str:
        response = client.request(method, path, content=photo, headers=headers)
        return str(response.headers["x-request-id"])

    assert name(**{"X-Request-ID": "order-7/b"}) == "order-7/b"
    made = [name(), name(), name(**{"X-Request-ID": "two words"}), name(**{"X-Request-ID": "x" * 129})]
    assert len(set(made)) == 4
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in made)


class Bug(tuple[str, ...]):
    """Class names that raise an error when one is read."""

    def __getitem__(self, _: object) -> Never:
        raise ZeroDivisionError("secret")


@pytest.fixture
def buggy(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable
) -> Iterator[TestClient]:
    checkpoint = replace(checkpoint, class_names=Bug(checkpoint.class_names))
    with serving(ServerRuntime(settings, checkpoint, engine, latencies)) as client:
        yield client


def test_the_log_holds_the_request_id_of_a_server_error_but_not_of_a_client_error(
    buggy: TestClient, engine: ScriptedEngine, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    client = buggy
    caplog.handler.setFormatter(TextFormatter())
    engine.error = RuntimeError("out of memory")
    client.post("/classify", content=photo, headers={"X-Request-ID": "first"})
    assert "the model failed on this image; see the server's log request_id=first" in caplog.text
    engine.error = None
    response = client.post("/classify", content=photo, headers={"X-Request-ID": "second"})
    assert response.headers["x-request-id"] == "second"
    assert "ZeroDivisionError('secret') request_id=second" in caplog.text
    client.post("/classify?top_k=0", content=photo, headers={"X-Request-ID": "third"})
    assert "third" not in caplog.text


def test_an_answer_of_nan_is_a_model_error(
    client: TestClient, engine: ScriptedEngine, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    engine.logits = torch.full((1, 7), float("nan"))
    assert error_code(client.post("/classify", content=photo), 500) == "model_error"
    assert "nan" in caplog.text


def test_a_bug_in_the_server_is_a_500_in_the_usual_error_format(buggy: TestClient, photo: bytes) -> None:
    response = buggy.post("/classify", content=photo)
    assert error_code(response, 500) == "internal_error"
    assert "secret" not in response.text
    assert sample(buggy, 'supervit_requests_total{outcome="internal_error"}') == 1


def test_the_server_is_ready_only_after_the_warm_up_of_the_model(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable, photo: bytes
) -> None:
    engine.may_warm_up.clear()
    beats, watchdog = Beats(), Watchdog(interval_s=0.001)
    runtime = ServerRuntime(settings, checkpoint, engine, latencies, heartbeat=beats, watchdog=watchdog)
    with TestClient(create_app(runtime)) as client:
        assert client.get("/health/live").json() == {"status": "live"}
        for path in ("/health/ready", "/subnetworks", "/resources"):
            assert error_code(client.get(path), 503) == "not_ready"
        assert error_code(client.post("/decide"), 503) == "not_ready"
        assert sample(client, "supervit_ready ") == 0
        refused = client.post("/classify", content=photo)
        assert error_code(refused, 503) == "not_ready"
        assert sample(client, 'supervit_requests_total{outcome="not_ready"}') == 1
        assert int(refused.headers["Retry-After"]) >= 1
        engine.may_warm_up.set()
        assert beats.serving.wait(10)
        assert sample(client, "supervit_ready ") == 1
        assert client.post("/classify", content=photo).status_code == 200


def test_a_classification_does_not_go_through_fastapis_routing(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable, photo: bytes
) -> None:
    app = create_app(ServerRuntime(settings, checkpoint, engine, latencies), ready_first=True)
    with TestClient(app) as client:
        del app.router.routes[1:]  # the routes that FastAPI handles
        assert client.get("/health/live").status_code == 404
        assert client.post("/classify", content=photo).status_code == 200
        assert error_code(client.post("/classify", content=b""), 422) == "invalid_image"
        assert error_code(client.post("/classify?top_k=0", content=photo), 422) == "invalid_parameter"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/classify", 405), ("PUT", "/classify", 405)])
def test_other_methods_on_the_path_of_classify_get_405(
    client: TestClient, photo: bytes, method: str, path: str, status: int
) -> None:
    assert client.request(method, path, content=photo).status_code == status


@pytest.mark.parametrize("path", ["/classify/", "/classify/more", "/CLASSIFY"])
def test_paths_that_resemble_classify_are_not_classified(client: TestClient, photo: bytes, path: str) -> None:
    assert client.post(path, content=photo, follow_redirects=False).status_code in (307, 404)


def test_part_of_the_profile_is_measured_before_the_server_is_ready_and_the_rest_while_it_idles(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, photo: bytes, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"max_batch_size": 3, "profile_folder": tmp_path})
    with serving(ServerRuntime(settings, checkpoint, engine, monitor=Monitor(root=tmp_path, nvml=None))) as client:
        began = client.get("/health/ready").json()["profile_measured"]
        assert 0 < began <= 1
        assert client.post("/classify", content=photo).status_code == 200
        for _ in range(5000):  # each request takes a millisecond or more
            if (answer := client.get("/health/ready").json())["profile_measured"] == 1.0:
                break
        assert answer == {"status": "ready", "profile_measured": 1.0}
        assert sample(client, "supervit_profile_measured_ratio") == 1.0
        assert sample(client, "supervit_profile_timestamp_seconds") > 1.7e9
        rows = client.get("/subnetworks").json()["subnetworks"]
        assert all(list(row["latency_ms"]) == ["1", "2", "3"] for row in rows)
    assert set(engine.sizes) == {1, 2, 3}
    (kept,) = tmp_path.glob("latency-*.json")
    assert kept.read_text().count("median_ms") == 3 * sum(row["is_trained"] for row in rows)


def test_a_failed_warm_up_ends_the_server(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.warm_up_error = RuntimeError("out of memory")
    failed = threading.Event()
    with TestClient(create_app(ServerRuntime(settings, checkpoint, engine, on_failure=failed.set))) as client:
        assert failed.wait(10)
        assert error_code(client.get("/health/ready"), 503) == "not_ready"
    assert "the server cannot run: out of memory" in caplog.text


def test_the_sub_network_table_lists_every_sub_network_cheapest_first(
    client: TestClient, checkpoint: Checkpoint
) -> None:
    answer = client.get("/subnetworks").json()
    rows = answer["subnetworks"]
    assert [row["gflops"] for row in rows] == sorted(row.gflops for row in extended_profile(checkpoint).rows)
    by_name = {(row["patch_grid"], row["keep_rate"]): row for row in rows}
    assert [by_name[4, rate]["is_interpolated"] for rate in (0.5, 0.75, 1.0)] == [False, True, False]
    assert [by_name[4, rate]["is_trained"] for rate in (0.5, 0.75, 1.0)] == [True, False, True]
    assert by_name[4, 0.75]["expected_accuracy"] == pytest.approx(0.75)
    assert by_name[4, 1.0]["latency_ms"] == {"1": 0.001, "4": 0.002}
    assert by_name[2, 1.0]["on_frontier"] is False
    assert by_name[4, 0.5]["on_frontier"] is True
    assert by_name[4, 1.0]["expected_accuracy"] == 0.8
    assert by_name[4, 1.0]["expected_top5_accuracy"] == pytest.approx(0.9)
    assert (by_name[4, 1.0]["temperature"], by_name[4, 1.0]["entropy_exponent"]) == (1.0, 0.0)
    assert by_name[4, 1.0]["calibration_error"] is None
    assert (answer["image_side_px"], answer["num_classes"]) == (16, 7)


def test_the_sub_network_table_holds_the_temperature_and_the_entropy_exponent(
    checkpoint: Checkpoint, catalog: VariantCatalog
) -> None:
    scaled = [
        replace(variant, profile=replace(variant.profile, temperature=2.0, entropy_exponent=0.3))
        for variant in catalog.variants
    ]
    table = describe_subnetworks(checkpoint, replace(catalog, variants=tuple(scaled)), "fake", "now", (1,))
    assert {(row.temperature, row.entropy_exponent) for row in table.subnetworks} == {(2.0, 0.3)}


def test_metrics_count_outcomes_sub_networks_compute_and_stages(client: TestClient, photo: bytes) -> None:
    answers = [
        client.post("/classify", content=photo).json(),
        client.post("/classify?patch_grid=2&keep_rate=0.5", content=photo).json(),
    ]
    client.post("/classify", content=b"hello")
    assert sample(client, 'supervit_requests_total{outcome="ok"}') == 2
    assert sample(client, 'supervit_requests_total{outcome="invalid_image"}') == 1
    assert sample(client, 'supervit_subnetwork_requests_total{keep_rate="0.5",patch_grid="2"}') == 1
    assert sample(client, 'supervit_subnetwork_requests_total{keep_rate="0.5",patch_grid="4"}') == 0
    spent = sum(answer["subnetwork"]["gflops"] for answer in answers)
    assert sample(client, "supervit_spent_gflops_total") == pytest.approx(spent)
    assert sample(client, "supervit_request_duration_seconds_count") == 2
    total_s = sum(answer["timing_ms"]["total"] for answer in answers) / 1000
    assert sample(client, "supervit_request_duration_seconds_sum") == pytest.approx(total_s, abs=1e-4)
    for stage in ("decode_wait", "decode", "queue", "inference"):
        assert sample(client, f'supervit_stage_duration_seconds_count{{stage="{stage}"}}') == 2
    assert sample(client, "supervit_requests_in_flight") == 0
    assert sample(client, "supervit_model_info") == 1
    assert sample(client, "supervit_batch_size_images_count") == 2


def test_unknown_paths_and_methods_get_errors_in_the_usual_format(client: TestClient) -> None:
    assert error_code(client.get("/nowhere"), 404) == "not_found"
    wrong_method = client.get("/classify")
    assert error_code(wrong_method, 405) == "method_not_allowed"
    assert wrong_method.headers["Allow"] == "POST"
    assert wrong_method.json()["error"]["message"] == "/classify accepts POST, not GET"
    assert client.post("/health/live").headers["Allow"] == "GET, HEAD"
    assert client.post("/admin/model").headers["Allow"] == "GET, PUT"  # two routes
    assert client.delete("/predictions/tiny").headers["Allow"] == "POST, PUT"
    assert client.post("/web/app.js").headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "path", ["/health/live", "/health/ready", "/metrics", "/v2/health/live", "/v2/health/ready", "/ping"]
)
def test_health_and_metrics_routes_answer_head_requests(client: TestClient, path: str) -> None:
    response = client.head(path)
    assert (response.status_code, response.content) == (200, b"")


def test_the_documentation_describes_body_parameters_and_errors(client: TestClient) -> None:
    assert client.get("/docs").status_code == 200
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/classify"]["post"]
    assert set(operation["requestBody"]["content"]) == {
        "multipart/form-data",
        "image/*",
        "application/octet-stream",
        "application/json",
    }
    names = {"budget_ms", "budget_gflops", "min_confidence", "priority", "top_k", "patch_grid", "keep_rate"}
    assert {entry["name"] for entry in operation["parameters"]} == names
    assert {"200", "408", "413", "415", "422", "429", "500", "503", "504"} <= set(operation["responses"])
    problem = operation["responses"]["422"]["content"]["application/problem+json"]["schema"]["$ref"]
    assert problem.endswith("ErrorAnswer")
    assert "ErrorAnswer" in document["components"]["schemas"]


def test_the_documentation_describes_the_parameters_of_every_path(client: TestClient) -> None:
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for operation in operations.values():
            described = {entry["name"] for entry in operation.get("parameters", ()) if entry["in"] == "path"}
            assert described == set(re.findall(r"{(\w+)}", path)), path


def test_the_documentation_lists_the_parameter_values_that_the_model_offers(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    rows = client.get("/subnetworks").json()["subnetworks"]
    for path in ("/classify", "/decide"):
        schemas = {entry["name"]: entry["schema"] for entry in paths[path]["post"]["parameters"]}
        assert schemas["patch_grid"]["enum"] == sorted({row["patch_grid"] for row in rows})
        assert schemas["keep_rate"]["enum"] == sorted({row["keep_rate"] for row in rows})
        assert schemas["budget_gflops"]["minimum"] == min(row["gflops"] for row in rows)
        assert schemas["budget_ms"]["exclusiveMinimum"] == 0
        assert (schemas["priority"]["minimum"], schemas["priority"]["maximum"]) == (-10, 0)
    content = paths["/classify"]["post"]["requestBody"]["content"]
    for kind, name in (("multipart/form-data", "file"), ("application/json", "image")):
        assert set(content[kind]["schema"]["properties"]) == {name, "top_k", "min_confidence", *schemas}


@pytest.mark.parametrize("query", ["budget_ms=1&budget_ms=2", "top_k=1", "budget_ms=soon"])
def test_an_invalid_parameter_of_decide_is_refused_by_name(client: TestClient, query: str) -> None:
    response = client.post(f"/decide?{query}")
    assert error_code(response, 422) == "invalid_parameter"
    assert response.json()["error"]["details"]["parameter"] == query.partition("=")[0]


def test_a_latency_budget_that_no_sub_network_meets_is_refused_with_the_smallest_possible_one(
    client: TestClient, photo: bytes
) -> None:
    response = client.post("/classify?budget_ms=1e-9", content=photo)
    assert error_code(response, 422) == "budget_too_small"
    assert 0.001 <= response.json()["error"]["details"]["smallest_budget_ms"] < 10
    assert client.post("/classify?budget_ms=1e9", content=photo).status_code == 200


def test_decide_returns_the_choice_without_running_the_model(client: TestClient, checkpoint: Checkpoint) -> None:
    free = client.post("/decide").json()
    assert (free["subnetwork"]["patch_grid"], free["subnetwork"]["keep_rate"]) == (4, 1)
    assert free["decision"]["batch_size"] == 1
    assert free["answered_in_ms"] > 0
    cheapest = client.post("/decide", params={"budget_gflops": checkpoint.profile.cheapest.gflops}).json()
    assert (cheapest["subnetwork"]["patch_grid"], cheapest["subnetwork"]["keep_rate"]) == (2, 0.5)
    assert "is the most accurate within" in cheapest["decision"]["reason"]
    assert error_code(client.post("/decide?budget_gflops=1e-9"), 422) == "budget_too_small"
    assert error_code(client.post("/decide?top_k=2"), 422) == "invalid_parameter"
    assert sample(client, "supervit_batch_size_images_count") == 0


def test_decide_reads_parameters_from_json_and_refuses_any_other_body(
    client: TestClient, checkpoint: Checkpoint, photo: bytes
) -> None:
    budget = {"budget_gflops": checkpoint.profile.cheapest.gflops}
    assert client.post("/decide", json=budget | {"priority": None}).json()["subnetwork"]["patch_grid"] == 2
    for body in ({"json": budget, "params": budget}, {"json": {"unknown": 1}}, {"json": {"budget_ms": "soon"}}):
        assert error_code(client.post("/decide", **body), 422) == "invalid_parameter"
    assert error_code(client.post("/decide", content=photo), 422) == "invalid_parameter"
    assert error_code(client.post("/decide", data=budget), 422) == "invalid_parameter"
    assert error_code(client.post("/decide", content=bytes(20_000)), 413) == "body_too_large"


def test_resources_shows_the_machine_and_what_the_policy_would_choose_next(client: TestClient) -> None:
    answer = client.get("/resources").json()
    assert answer["snapshot"]["cores"] > 0
    assert answer["snapshot"]["memory_total_bytes"] > 0
    assert (answer["queued"], answer["overhead_factor"], answer["max_batch_size"]) == (0, 1, 4)
    assert answer["next_without_budget"]["subnetwork"]["patch_grid"] == 4


class Busy(Monitor):
    """A machine on which other processes keep three quarters of the cores busy."""

    @property
    def latest(self) -> ResourceSnapshot:
        return ResourceSnapshot(taken_at=0.0, cores=4.0, cpus=4, others_cores=3.0)


@pytest.mark.parametrize(("is_on_gpu", "fitting", "most"), [(True, 2, 2), (True, 99, 4), (False, None, 4)])
def test_a_gpu_bounds_batches_by_its_memory_and_is_not_slowed_by_busy_cpus(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: ScriptedEngine,
    latencies: LatencyTable,
    photo: bytes,
    is_on_gpu: bool,
    fitting: int | None,
    most: int,
) -> None:
    engine.is_on_gpu, engine.fitting = is_on_gpu, fitting
    settings = settings.model_copy(update={"threads": 4})
    with serving(ServerRuntime(settings, checkpoint, engine, latencies, monitor=Busy())) as client:
        assert client.post("/classify", content=photo).status_code == 200
        answer = client.get("/resources").json()
    assert answer["max_batch_size"] == most
    assert answer["expected_from_others"] == (1.0 if is_on_gpu else 1.75)


def test_a_request_that_cannot_meet_its_deadline_is_rejected_before_its_body_with_retry_after(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, photo: bytes
) -> None:
    slow = LatencyTable((1, 4), dict.fromkeys(extended_profile(checkpoint).by_subnetwork, (0.4, 0.5)))
    with serving(ServerRuntime(settings, checkpoint, engine, slow)) as client:
        engine.running.clear()
        engine.may_run.clear()
        with ThreadPoolExecutor(1) as other:
            first = other.submit(client.post, "/classify?budget_ms=9000", content=photo)
            assert engine.running.wait(10)
            refused = client.post("/classify?budget_ms=500", content=b"never read")
            assert error_code(refused, 429) == "overloaded"
            assert refused.json()["error"]["details"]["retry_after_s"] > 0
            assert int(refused.headers["Retry-After"]) >= 1
            assert error_code(client.post("/decide?budget_ms=500"), 429) == "overloaded"
            engine.may_run.set()
            assert first.result().status_code == 200
        assert sample(client, 'supervit_deadlines_total{result="missed"}') == 1


def test_an_unknown_policy_is_refused_at_start_with_a_list_of_the_known_ones(
    settings: Settings, checkpoint: Checkpoint
) -> None:
    with pytest.raises(InvalidParameterError, match=r"level.*fixed-4-1"):
        ServerRuntime(settings.model_copy(update={"policy": "best"}), checkpoint)


def test_an_engine_that_hangs_ends_the_server_and_fails_the_waiting_requests(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: ScriptedEngine,
    latencies: LatencyTable,
    photo: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    watchdog = Watchdog(interval_s=0.02, hang_s=0.2)
    failed, beats = threading.Event(), Beats()
    runtime = ServerRuntime(
        settings, checkpoint, engine, latencies, on_failure=failed.set, heartbeat=beats, watchdog=watchdog
    )
    with ThreadPoolExecutor(3) as clients, serving(runtime) as client:
        assert client.post("/classify", content=photo).status_code == 200
        beats.wait(20)
        assert not failed.is_set()
        engine.may_run.clear()
        answers = [clients.submit(client.post, "/classify", content=photo) for _ in range(3)]
        assert failed.wait(10)
        assert [error_code(answer.result(), 500) for answer in answers] == ["model_error"] * 3
        assert error_code(client.get("/health/ready"), 503) == "not_ready"
        assert runtime.state is ServerState.HUNG
    assert runtime.state is ServerState.HUNG, "a draining server would wait for its engine"
    engine.may_run.set()  # not earlier: the server must end without it
    assert "hangs; the server exits without waiting for it" in caplog.text
    assert beats.serving.is_set()


@pytest.mark.parametrize("ready_first", [False, True])
def test_an_engine_that_hangs_during_warm_up_ends_the_server(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: ScriptedEngine,
    latencies: LatencyTable,
    ready_first: bool,
) -> None:
    watchdog, failed = Watchdog(interval_s=0.02, hang_s=0.1, preparation_s=0.02), threading.Event()
    engine.may_warm_up.clear()
    runtime = ServerRuntime(settings, checkpoint, engine, latencies, on_failure=failed.set, watchdog=watchdog)
    app = create_app(runtime, ready_first=ready_first)
    with TestClient(app) as client:
        assert client.get("/health/ready").status_code == 503
        assert failed.wait(5)
        assert runtime.state is ServerState.HUNG
    assert runtime.state is ServerState.HUNG, "a draining server would wait for its engine"
    engine.may_warm_up.set()


def test_waiting_for_another_process_to_measure_does_not_count_as_a_hang(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: ScriptedEngine,
) -> None:
    def wait(*arguments: Any, is_stopping: Callable[[], bool], **options: Any) -> ProfileWithFile:  # noqa: ANN401 - passed on unchanged
        for _beat in range(60):  # at 0.02 s each, three times as long as a step may take before it counts as hanging
            assert not is_stopping()
            beats.wait(1)
        return begin_profile(*arguments, is_stopping=is_stopping, budget_s=0.0, **options)

    beats = Beats()
    watchdog = Watchdog(interval_s=0.02, hang_s=0.4, preparation_s=0.01)
    runtime = ServerRuntime(settings, checkpoint, engine, begin=wait, heartbeat=beats, watchdog=watchdog)
    with serving(runtime):
        assert runtime.state is ServerState.READY


def test_a_slow_batch_does_not_count_as_a_hang(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: ScriptedEngine,
    photo: bytes,
) -> None:
    beats, watchdog = Beats(), Watchdog(interval_s=0.02, hang_s=0.1)
    slow = LatencyTable((1, 4), dict.fromkeys(extended_profile(checkpoint).by_subnetwork, (0.5, 0.5)))
    runtime = ServerRuntime(settings, checkpoint, engine, slow, heartbeat=beats, watchdog=watchdog)
    with ThreadPoolExecutor(1) as clients, serving(runtime) as client:
        engine.running.clear()
        engine.may_run.clear()
        answer = clients.submit(client.post, "/classify?budget_ms=9000", content=photo)
        assert engine.running.wait(10)
        beats.wait(20)  # at 0.02 s each, four times as long as a batch that should be fast may take
        engine.may_run.set()
        assert answer.result().status_code == 200
        assert runtime.state is ServerState.READY


def test_a_draining_server_admits_no_new_request(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: ScriptedEngine,
    latencies: LatencyTable,
    photo: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = ServerRuntime(settings, checkpoint, engine, latencies)
    with serving(runtime) as client:
        assert "supervit_ready 1.0" in client.get("/metrics").text
        with monkeypatch.context() as patch:  # a signal may arrive while a metric is being updated
            patch.setattr("prometheus_client.values.MutexValue.set", None)
            runtime.drain()
        assert "supervit_ready 0.0" in client.get("/metrics").text
        assert error_code(client.get("/health/ready"), 503) == "not_ready"
        assert error_code(client.post("/classify", content=photo), 503) == "not_ready"
        assert error_code(client.post("/decide"), 503) == "not_ready"
        assert client.get("/subnetworks").status_code == client.get("/health/live").status_code == 200
        assert client.get("/resources").json()["next_without_budget"] is None
        assert sample(client, 'supervit_requests_total{outcome="not_ready"}') == 1


def test_an_answer_lists_its_looks_and_their_cost(client: TestClient, photo: bytes) -> None:
    answer = client.post("/classify?top_k=1", content=photo).json()
    (look,) = answer["looks"]
    assert (look["patch_grid"], look["keep_rate"], look["gflops"]) == (4, 1.0, answer["subnetwork"]["gflops"])
    assert look["confidence"] == answer["predictions"][0]["probability"]
    assert look["inference_ms"] == answer["timing_ms"]["inference"]
    assert (answer["gflops"], answer["stopped"]) == (look["gflops"], "sure")
    unsure = client.post("/classify?min_confidence=0.999", content=photo).json()
    assert (len(unsure["looks"]), unsure["stopped"]) == (1, "none_better")
    assert "no sub-network is more accurate" in unsure["decision"]["reason"]


@pytest.mark.parametrize(
    "query",
    ["min_confidence=1", "min_confidence=-0.1", "min_confidence=nan", "min_confidence=0.9&patch_grid=2&keep_rate=1"],
)
def test_min_confidence_must_be_a_probability_and_excludes_a_sub_network_by_name(
    client: TestClient, photo: bytes, query: str
) -> None:
    assert error_code(client.post(f"/classify?{query}", content=photo), 422) == "invalid_parameter"


def test_cascades_are_used_only_if_they_are_switched_on(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable, photo: bytes
) -> None:
    first, second = SubNetwork(2, 0.5), SubNetwork(4, 1.0)
    cascade = CascadeProfile(first, second, threshold=0.999, share=0.5, top1=0.85)
    cascading = replace(checkpoint, profile=replace(checkpoint.profile, cascades=(cascade,)))
    on = settings.model_copy(update={"cascades": True})
    with serving(ServerRuntime(on, cascading, engine, latencies)) as client:
        (row,) = client.get("/subnetworks").json()["cascades"]
        assert (row["first"]["patch_grid"], row["second"]["patch_grid"], row["threshold"]) == (2, 4, 0.999)
        assert row["most_gflops"] == pytest.approx(row["first"]["gflops"] + row["second"]["gflops"])
        assert row["gflops"] == pytest.approx(row["first"]["gflops"] + 0.5 * row["second"]["gflops"])
        planned = client.post("/decide").json()
        assert (planned["subnetwork"]["patch_grid"], planned["second_look"]["patch_grid"]) == (2, 4)
        assert len(client.post("/classify", content=photo).json()["looks"]) == 2
    with serving(ServerRuntime(settings, cascading, ScriptedEngine(cascading), latencies)) as client:
        assert client.get("/subnetworks").json()["cascades"] == []
        assert client.post("/decide").json()["second_look"] is None
        assert len(client.post("/classify", content=photo).json()["looks"]) == 1


def test_cascades_that_a_checkpoint_lacks_are_reported_in_the_log(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: ScriptedEngine,
    latencies: LatencyTable,
    caplog: pytest.LogCaptureFixture,
) -> None:
    on = settings.model_copy(update={"cascades": True})
    with serving(ServerRuntime(on, checkpoint, engine, latencies)):
        assert "has no cascades" in caplog.text


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*_: object, **__: object) -> None:
        raise OutOfMemoryError("there is no memory left for this image")

    monkeypatch.setattr(images, "open_image", lack)


@pytest.mark.usefixtures("no_memory")
def test_each_image_of_a_request_that_fails_for_lack_of_memory_counts(client: TestClient, photo: bytes) -> None:
    answer = client.post("/classify", files=[("file", photo)] * FAILURES_IN_A_ROW)
    assert [each["error"]["code"] for each in answer.json()["results"]] == ["out_of_memory"] * FAILURES_IN_A_ROW
    assert error_code(client.get("/health/ready"), 503) == "not_ready"


@pytest.mark.usefixtures("no_memory")
def test_a_server_that_runs_out_of_memory_on_every_request_is_not_ready(client: TestClient, photo: bytes) -> None:
    for _ in range(FAILURES_IN_A_ROW):
        assert client.get("/health/ready").status_code == 200
        assert error_code(client.post("/classify", content=photo), 503) == "out_of_memory"
    answer = client.get("/health/ready")
    assert error_code(answer, 503) == "not_ready"
    assert "failed inside the server; see its log" in answer.json()["error"]["message"]
    assert client.get("/health/live").status_code == 200
    assert "supervit_ready 0.0" in client.get("/metrics").text


def test_a_background_task_that_fails_ends_the_server_with_the_reason_in_its_log(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: ScriptedEngine,
    latencies: LatencyTable,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Monitor):
        async def run(self, interval_s: float) -> None:
            raise RuntimeError(f"broken monitor, read every {interval_s} s")

    failed = threading.Event()
    runtime = ServerRuntime(settings, checkpoint, engine, latencies, on_failure=failed.set, monitor=Broken())
    with TestClient(create_app(runtime)):
        assert failed.wait(10)
    assert "the server cannot run: broken monitor" in caplog.text
