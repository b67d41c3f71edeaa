"""A real server with tracing: its spans as a collector exports them, and the matching lines of its log."""

import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.end_to_end.otlp_receiver import Receiver, attributes, collecting
from tests.end_to_end.test_serving import COMMAND, PHOTOGRAPH, SMALL_CHECKPOINT, free_port, wait_until_ready

NUMBER = int(os.environ.get("TRACED_REQUESTS", "100"))
CONCURRENCY = 8
STAGES = ["read", "decode wait", "decode", "queue", "inference"]
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
UNSAMPLED = "00-4bf92f3577b34da6a3ce929d0e0e4737-00f067aa0ba902b7-00"


@dataclass
class Traced:
    """The answers, metrics, log lines and traces of one run of a server."""

    receiver: Receiver = field(default_factory=Receiver)
    answers: list[httpx.Response] = field(default_factory=list)
    refused: list[httpx.Response] = field(default_factory=list)
    metrics: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)
    traces: dict[str, tuple[Span, list[Span]]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, profile_folder: Path) -> Traced:
    """A run with all its spans; the server exported those of the last seconds when it was told to stop."""
    log, port, run = tmp_path_factory.mktemp("traced") / "log", free_port(), Traced()
    with collecting(run.receiver, free_port()) as collector:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")} | {
            "SUPERVIT_CHECKPOINT": SMALL_CHECKPOINT,
            "SUPERVIT_PROFILE_FOLDER": str(profile_folder),
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector,
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
            "OTEL_BSP_MAX_QUEUE_SIZE": "20000",
        }
        command = [*COMMAND, "serve", "--port", str(port), "--log-format", "json", "--log-requests"]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}", log)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                ask(client, run)
        finally:
            process.terminate()
            assert process.wait(20) == -signal.SIGTERM
        number = len(run.answers) * (1 + len(STAGES)) + 1
        run.receiver.wait_for(lambda spans: len(spans) >= number)
    run.traces = run.receiver.by_trace()
    run.lines = [json.loads(line) for line in log.read_text().splitlines()]
    return run


def ask(client: httpx.Client, run: Traced) -> None:
    photograph = PHOTOGRAPH.read_bytes()
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        asked = [pool.submit(client.post, "/classify?budget_ms=60000", content=photograph) for _ in range(NUMBER)]
        run.answers = [each.result() for each in asked]
    run.refused = [
        client.post("/classify", content=b"no image", headers={"traceparent": parent, "X-Request-ID": "mine"})
        for parent in (CALLER, UNSAMPLED)
    ]
    run.metrics = client.get("/metrics", headers={"Accept": "application/openmetrics-text"}).text


def trace_id(answer: httpx.Response) -> str:
    return str(answer.headers["traceresponse"]).split("-")[1]


def test_every_request_is_exported_as_a_span_with_a_child_for_each_stage(traced: Traced) -> None:
    assert len({trace_id(answer) for answer in traced.answers}) == NUMBER
    for answer in traced.answers:
        request, stages = traced.traces[trace_id(answer)]
        assert answer.status_code == 200
        assert (request.name, request.kind, request.parent_span_id) == ("POST /classify", Span.SPAN_KIND_SERVER, b"")
        assert answer.headers["traceresponse"].split("-")[2] == request.span_id.hex()
        assert sorted(stage.name for stage in stages) == sorted(STAGES)
        assert {stage.parent_span_id for stage in stages} == {request.span_id}


def test_stage_spans_follow_each_other_within_the_span_of_their_request(traced: Traced) -> None:
    for answer in traced.answers:
        request, found = traced.traces[trace_id(answer)]
        stages = {stage.name: stage for stage in found}
        at = request.start_time_unix_nano
        for name in STAGES:
            assert at <= stages[name].start_time_unix_nano <= stages[name].end_time_unix_nano
            at = stages[name].end_time_unix_nano
        assert at <= request.end_time_unix_nano
        took_ms = (stages["inference"].end_time_unix_nano - stages["inference"].start_time_unix_nano) / 1e6
        assert took_ms == pytest.approx(answer.json()["timing_ms"]["inference"], abs=0.002)


def test_the_span_of_a_request_records_the_chosen_sub_network_and_the_reason(traced: Traced) -> None:
    answer = traced.answers[0]
    told = attributes(traced.traces[trace_id(answer)][0].attributes)
    body = answer.json()
    assert told["http.response.status_code"] == 200
    assert told["url.query"] == "budget_ms=60000"
    assert told["supervit.request_id"] == answer.headers["x-request-id"]
    assert told["supervit.patch_grid"] == body["subnetwork"]["patch_grid"]
    assert told["supervit.gflops"] == body["gflops"]
    assert told["supervit.batch_size"] == body["decision"]["batch_size"]
    assert told["supervit.slack_ms"] == pytest.approx(60_000 - body["timing_ms"]["total"], abs=0.01)
    assert told["supervit.reason"]
    assert traced.receiver.resource["service.name"] == "supervit-serve"
    assert traced.receiver.resource["deployment.environment.name"] == "test"


def test_a_request_joins_the_trace_of_its_caller_and_follows_its_sampling_decision(traced: Traced) -> None:
    sampled, unsampled = traced.refused
    assert trace_id(sampled) == CALLER.split("-")[1]
    request, stages = traced.traces[trace_id(sampled)]
    assert request.parent_span_id.hex() == CALLER.split("-")[2]
    assert attributes(request.attributes)["error.type"] == "invalid_image"
    assert request.status.code == Status.STATUS_CODE_UNSET, "by the conventions, a client error is no server error"
    assert stages == []
    assert "traceresponse" not in unsampled.headers
    assert UNSAMPLED.split("-")[1] not in traced.traces


def test_exemplars_of_the_duration_histogram_name_exported_traces(traced: Traced) -> None:
    buckets = [line for line in traced.metrics.splitlines() if line.startswith("supervit_request_duration_seconds_b")]
    named = [line.split('trace_id="')[1][:32] for line in buckets if " # " in line]
    assert named
    assert set(named) <= set(traced.traces)


def test_each_request_is_a_log_line_with_its_request_id_and_trace_id(traced: Traced) -> None:
    asked = {line["request_id"]: line for line in traced.lines if line["message"].startswith("POST /classify 200")}
    assert len(asked) == NUMBER
    answer = traced.answers[0]
    line = asked[answer.headers["x-request-id"]]
    assert line["trace_id"] == trace_id(answer)
    assert (line["level"], line["gflops"], line["deadline_met"]) == ("info", answer.json()["gflops"], True)
    refused = [line for line in traced.lines if line["message"] == "POST /classify 422"]
    assert [line["error"] for line in refused] == ["invalid_image"] * 2
    assert [line["trace_id"] for line in refused] == [CALLER.split("-")[1], UNSAMPLED.split("-")[1]]
