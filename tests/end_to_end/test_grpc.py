"""The real command with a gRPC port, in its own process, and unmodified third-party clients."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2
from PIL import Image

from service.rpc import open_inference_pb2 as pb
from tests.end_to_end.test_open_inference import CLIENTS, PYTHON, needs_clients
from tests.end_to_end.test_serving import (
    PHOTOGRAPH,
    SMALL_CHECKPOINT,
    free_port,
    one_measurement_for_all,
    start,
    wait_until_ready,
)

__all__ = ["one_measurement_for_all"]

Health = health_pb2.HealthCheckResponse
CHECK = health_pb2.HealthCheckRequest().SerializeToString()


@dataclass(frozen=True, slots=True)
class Server:
    process: "subprocess.Popen[bytes]"
    url: str
    address: str
    log: Path

    def metric(self, line: str) -> float:
        found = re.search(rf"^{re.escape(line)} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait_for(self, line: str, value: float) -> None:
        deadline = time.monotonic() + 20
        while self.metric(line) != value:
            assert time.monotonic() < deadline, (line, self.metric(line))
            time.sleep(0.01)


def infer_on(channel: grpc.Channel) -> "grpc.UnaryUnaryMultiCallable[bytes, bytes]":
    return channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")


def start_server(folder: Path, *options: str) -> Server:
    """Start a server on any free gRPC port, and wait until it is ready."""
    port, log = free_port(), folder / "log"
    process = start(port, log, "--grpc-port", "0", *options)
    url = f"http://127.0.0.1:{port}"
    wait_until_ready(process, url, log)
    found = re.search(r"listening for gRPC on 127.0.0.1 port (\d+)", log.read_text())
    assert found, log.read_text()
    return Server(process, url, f"127.0.0.1:{found[1]}", log)


def stop_server(server: Server) -> None:
    server.process.terminate()
    assert server.process.wait(20) == -signal.SIGTERM, server.log.read_text()
    assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("server"))
    yield server
    stop_server(server)


@pytest.fixture(scope="module")
def slow_request() -> bytes:
    """A request with an image that is slow to decode, and a latency budget that suffices."""
    buffer = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(buffer, "PNG", compress_level=1)
    return request_for(buffer.getvalue())


def request_for(image: bytes) -> bytes:
    request = pb.ModelInferRequest(model_name=SMALL_CHECKPOINT)
    request.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(image)
    request.parameters["budget_ms"].int64_param = 60_000
    return request.SerializeToString()


def run_client(python: str, script: str, server: Server) -> None:
    """Run a client in its own process, since one process can hold only one set of messages of these names."""
    command = [python, str(CLIENTS / script), server.address, SMALL_CHECKPOINT, str(PHOTOGRAPH)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_unmodified_triton_grpc_clients_are_answered(server: Server) -> None:
    run_client(sys.executable, "triton_grpc.py", server)


@needs_clients
@pytest.mark.parametrize("script", ["kserve_grpc.py", "ovmsclient_both.py"])
def test_unmodified_kserve_and_ovmsclient_grpc_clients_are_answered(server: Server, script: str) -> None:
    run_client(str(PYTHON), script, server)


def test_a_probe_finds_the_server_healthy(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        check: grpc.UnaryUnaryMultiCallable[bytes, Health] = channel.unary_unary(
            "/grpc.health.v1.Health/Check", response_deserializer=Health.FromString
        )
        assert check(CHECK, timeout=5).status == Health.SERVING


def test_a_cancelled_call_costs_no_inference_and_is_counted_once(server: Server, slow_request: bytes) -> None:
    gone, answered = 'supervit_requests_total{outcome="client_gone"}', 'supervit_requests_total{outcome="ok"}'
    before, images = server.metric(gone), server.metric(answered)
    with grpc.insecure_channel(server.address) as channel:
        calls = [infer_on(channel).future(slow_request) for _ in range(6)]
        server.wait_for("supervit_requests_in_flight", 6)
        for call in calls[1:]:
            call.cancel()
        server.wait_for(gone, before + 5)
        assert calls[0].result(20)
    server.wait_for(answered, images + 1)
    server.wait_for("supervit_requests_in_flight", 0)
    assert server.metric(gone) == before + 5


def test_an_http_client_on_the_grpc_port_does_not_disturb_grpc_clients(server: Server) -> None:
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        while connection.recv(4096):
            pass  # until the server closes, or this times out
    test_a_probe_finds_the_server_healthy(server)


def test_a_stopping_server_answers_admitted_calls_and_rejects_new_ones(tmp_path: Path, slow_request: bytes) -> None:
    server = start_server(tmp_path)
    with grpc.insecure_channel(server.address) as channel:
        watch: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream("/grpc.health.v1.Health/Watch")
        watching = watch(CHECK)
        next(watching)
        calls = [infer_on(channel).future(slow_request) for _ in range(3)]
        server.wait_for("supervit_requests_in_flight", 3)
        server.process.send_signal(signal.SIGTERM)
        assert all(call.result(20) for call in calls)
        with pytest.raises(grpc.RpcError) as refused:
            infer_on(channel)(slow_request, timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.process.wait(10) == -signal.SIGTERM  # long before the 30 s of a drain, despite an open Watch
    assert "Traceback" not in server.log.read_text()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each worker needs a core of its own")
def test_workers_share_the_grpc_port(tmp_path: Path) -> None:
    server = start_server(tmp_path, "--workers", "2", "--max-batch-size", "2")
    try:
        server.wait_for("supervit_ready", 2)
        request = request_for(PHOTOGRAPH.read_bytes())
        for _ in range(20):  # each on a connection of its own
            with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                assert infer_on(channel)(request, timeout=20)
        assert server.metric('supervit_requests_total{outcome="ok"}') == 20
        assert server.log.read_text().count(f"listening for gRPC on 127.0.0.1 port {server.address.split(':')[1]}") == 2
    finally:
        stop_server(server)
