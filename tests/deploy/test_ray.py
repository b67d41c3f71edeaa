"""The app on a real Ray cluster of one node; skipped where Ray is not installed."""

import asyncio
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from service.errors import InvalidParameterError
from service.settings import Settings
from tests.deploy.ray_cluster import Answer, Cluster, environment, load_and_kill, ray_cluster, serve_config
from tests.end_to_end.otlp_receiver import Receiver, receiving

if not os.environ.get("CI"):  # in CI, a missing Ray is a failure
    pytest.importorskip("ray", reason="Ray is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # Ray's own, once imported
PORT = 18230
BUDGET_MS = 2000
SECONDS, KILL_AT_S, RATE = 9, 3, 40


@pytest.fixture(scope="module")
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, profile_folder: Path, receiver: Receiver) -> Iterator[Cluster]:
    config = serve_config(PORT, replicas=2, profile_folder=str(profile_folder), checkpoint="supervit-micro-cifar10")
    counts = str(tmp_path_factory.mktemp("counts"))
    variables = config["applications"][0]["runtime_env"]["env_vars"]
    variables |= {"PROMETHEUS_MULTIPROC_DIR": counts, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with receiving(receiver) as collector:
        variables["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector
        # At the end, no client is left that would need a longer draining period.
        with ray_cluster(config, environment() | {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1"}) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def picture() -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def answers(cluster: Cluster, picture: bytes) -> list[Answer]:
    """The answers to a load during which a replica is killed."""
    arrivals = [number / RATE for number in range(SECONDS * RATE)]
    return asyncio.run(load_and_kill(cluster, [picture], arrivals, BUDGET_MS, KILL_AT_S))


def test_the_app_on_ray_answers_and_rejects_like_the_server(cluster: Cluster, picture: bytes) -> None:
    answer = httpx.post(f"{cluster.url}/classify?budget_gflops=0.05", content=picture)
    assert answer.status_code == 200
    assert answer.json()["subnetwork"]["gflops"] <= 0.05
    refusal = httpx.post(f"{cluster.url}/classify", content=b"no image")
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (422, "invalid_image")


def test_a_request_joins_the_trace_of_its_caller(cluster: Cluster, picture: bytes, receiver: Receiver) -> None:
    trace, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace}-{caller}-01"}
    answer = httpx.post(f"{cluster.url}/classify", content=picture, headers=headers)
    assert answer.headers["traceresponse"].startswith(f"00-{trace}-")
    receiver.wait_for(lambda spans: any(span.parent_span_id.hex() == caller for span in spans))
    request, stages = receiver.by_trace()[trace]
    assert request.parent_span_id.hex() == caller
    assert "inference" in {stage.name for stage in stages}


def test_every_request_is_answered_once_although_a_replica_is_killed(answers: list[Answer]) -> None:
    assert len(answers) == SECONDS * RATE
    assert [answer.request_ids for answer in answers] == [(f"request-{answer.number}",) for answer in answers]
    assert Counter(answer.status for answer in answers) == {200: len(answers)}


def test_a_replica_reports_the_metrics_of_all_replicas_including_a_killed_one(
    answers: list[Answer], cluster: Cluster
) -> None:
    page = httpx.get(f"{cluster.url}/metrics").text
    (counted,) = re.findall(r'^supervit_requests_total\{outcome="ok"\} (\S+)', page, re.MULTILINE)
    assert float(counted) >= len(answers)


def test_a_killed_replica_is_replaced(answers: list[Answer], cluster: Cluster) -> None:
    assert answers
    for _ in range(120):
        if len(cluster.replicas()) == 2:
            break
        asyncio.run(asyncio.sleep(0.5))
    assert len(cluster.replicas()) == 2
    assert httpx.get(f"{cluster.url}/health/ready").status_code == 200


@pytest.mark.parametrize(("name", "value"), [("host", "0.0.0.0"), ("port", 80), ("fd", 3), ("workers", 2)])
def test_settings_that_ray_decides_are_rejected(name: str, value: object) -> None:
    from service.hosting.ray_app import build

    with pytest.raises(InvalidParameterError, match=f"{name} is not"):
        build(Settings.model_validate({name: value}))


def test_a_host_in_the_environment_is_accepted_since_an_image_may_also_serve_without_ray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from service.hosting.ray_app import build

    monkeypatch.setenv("SUPERVIT_HOST", "0.0.0.0")
    assert build(Settings())


def test_ray_passes_more_requests_than_a_replica_admits_and_waits_for_its_drain() -> None:
    from service.hosting.ray_app import build

    deployment = build(Settings(max_in_flight=100, drain_s=7))._bound_deployment  # it has no public name
    assert deployment.max_ongoing_requests > 100
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 7
