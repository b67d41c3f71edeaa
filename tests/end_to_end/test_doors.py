"""The real command with a key file, an admin port and TLS on every port."""

import hashlib
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
import trustme

from service.rpc import open_inference_pb2 as pb
from tests.end_to_end.test_serving import (
    SMALL_CHECKPOINT,
    free_port,
    one_measurement_for_all,
    picture,
    start,
    wait_until_ready,
)

__all__ = ["one_measurement_for_all"]
KEY = {"Authorization": "Bearer my-secret"}


@dataclass(frozen=True, slots=True)
class Doors:
    """The addresses of a server, and the certificate authority that its clients trust."""

    public: str
    operators: str
    grpc_port: int
    trust: Path
    log: Path
    process: "subprocess.Popen[bytes]"
    renew: Callable[[], bytes]  # writes a new certificate and its key, and returns the certificate

    def client(self, url: str) -> httpx.Client:
        return httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=str(self.trust)))


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    folder, authority = tmp_path_factory.mktemp("doors"), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")

    def issue() -> bytes:
        issued = authority.issue_cert("localhost")
        issued.private_key_pem.write_to_path(folder / "tls.key")
        (folder / "tls.crt").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        return issued.cert_chain_pems[0].bytes()

    issue()
    digest = hashlib.sha256(b"my-secret").hexdigest()
    (folder / "keys.toml").write_text(f'[[key]]\nname = "mine"\nsha256 = "{digest}"\n')
    port, admin_port, grpc_port, log = free_port(), free_port(), free_port(), folder / "log"
    ports = ["--admin-port", str(admin_port), "--grpc-port", str(grpc_port), "--keys", str(folder / "keys.toml")]
    tls = ["--tls-certificate", str(folder / "tls.crt"), "--tls-key", str(folder / "tls.key")]
    process = start(port, log, "--checkpoint", SMALL_CHECKPOINT, *ports, *tls)
    public, operators = (f"https://localhost:{number}" for number in (port, admin_port))
    served = Doors(public, operators, grpc_port, folder / "ca.pem", log, process, issue)
    try:
        with served.client(served.public) as client:
            wait_until_ready(process, served.public, log, client.get)
        yield served
    finally:
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM, log.read_text()
    assert "Traceback" not in log.read_text()


def test_operator_routes_are_on_the_admin_port_only_and_classify_needs_a_key_on_both(doors: Doors) -> None:
    with doors.client(doors.public) as public, doors.client(doors.operators) as operators:
        for path in ("/metrics", "/resources", "/events", "/docs", "/openapi.json", "/"):
            assert public.get(path).status_code == 404, path
        for path in ("/metrics", "/resources", "/docs", "/openapi.json", "/", "/subnetworks", "/health/ready"):
            assert operators.get(path).status_code == 200, path
        for client in (public, operators):
            assert client.post("/classify", content=picture(1)).status_code == 401
            assert client.post("/classify", content=picture(1), headers=KEY).status_code == 200
        assert 'supervit_key_requests_total{key="mine",outcome="ok"} 2.0' in operators.get("/metrics").text


def test_every_response_forbids_content_sniffing_and_sending_a_referrer(doors: Doors) -> None:
    with doors.client(doors.operators) as client:
        for path in ("/health/ready", "/docs", "/nothing"):
            headers = client.get(path).headers
            assert headers.get_list("X-Content-Type-Options") == ["nosniff"]
            assert headers.get_list("Referrer-Policy") == ["no-referrer"]


def test_every_port_speaks_tls_and_nothing_else(doors: Doors) -> None:
    for url in (doors.public, doors.operators):
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http"))
    place, trusted = f"localhost:{doors.grpc_port}", grpc.ssl_channel_credentials(doors.trust.read_bytes())
    with grpc.secure_channel(place, trusted) as channel:
        assert is_ready(channel)
    with grpc.insecure_channel(place) as channel, pytest.raises(grpc.RpcError):
        is_ready(channel)


def test_a_renewed_certificate_is_served_on_every_port(doors: Doors) -> None:
    renewed = ssl.PEM_cert_to_DER_cert(doors.renew().decode())
    places = [*(int(url.rpartition(":")[2]) for url in (doors.public, doors.operators)), doors.grpc_port]
    deadline = time.monotonic() + 20
    while left := [port for port in places if served_certificate(port) != renewed]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def served_certificate(port: int) -> bytes:
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", port), timeout=10))


def is_ready(channel: grpc.Channel) -> bool:
    ask = channel.unary_unary(
        "/inference.GRPCInferenceService/ServerReady",
        request_serializer=pb.ServerReadyRequest.SerializeToString,
        response_deserializer=pb.ServerReadyResponse.FromString,
    )
    return bool(ask(pb.ServerReadyRequest(), timeout=10).ready)


def test_the_log_states_the_listening_addresses_and_contains_no_api_key(doors: Doors) -> None:
    with doors.client(doors.public) as client:
        assert client.post("/classify", content=picture(1), headers=KEY).status_code == 200
    log = doors.log.read_text()
    assert f"listening on {doors.public.replace('localhost', '127.0.0.1')}" in log
    assert "listening for operators on 127.0.0.1 port" in log
    assert "my-secret" not in log
