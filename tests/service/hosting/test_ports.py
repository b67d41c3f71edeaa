import logging
import socket
import sys

import pytest
import uvicorn
from starlette.applications import Starlette

from service.errors import CommandError
from service.hosting.ports import changes_refused_reason, reserved_ports, serving_beside
from service.hosting.workers import reserved
from service.settings import Settings


def test_no_port_is_reserved_without_an_admin_or_grpc_port() -> None:
    with reserved_ports(Settings()) as settings:
        assert (settings.admin_port, settings.grpc_port) == (None, None)


def test_port_zero_is_replaced_by_a_free_port_that_is_reserved() -> None:
    with reserved_ports(Settings(admin_port=0, grpc_port=0)) as settings:
        assert settings.admin_port
        assert settings.grpc_port
        assert settings.admin_port != settings.grpc_port
        for port in (settings.admin_port, settings.grpc_port):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((settings.host, port))


@pytest.mark.parametrize("name", ["admin_port", "grpc_port"])
def test_a_port_that_another_server_listens_on_is_rejected(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(CommandError, match=f"cannot listen on 127.0.0.1 port {port}"),
            reserved_ports(Settings(**{name: port})),
        ):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names without files")
def test_a_port_that_another_server_has_reserved_is_rejected_although_it_does_not_listen_yet() -> None:
    with (
        reserved("127.0.0.1", 0) as first,
        pytest.raises(CommandError, match="cannot listen on"),
        reserved("127.0.0.1", first.getsockname()[1]),
    ):
        pass


def test_a_worker_uses_the_ports_that_its_supervisor_has_reserved() -> None:
    with reserved_ports(Settings(admin_port=0, grpc_port=0)) as settings:
        of_worker = settings.model_copy(update={"fd": 3})
        with reserved_ports(of_worker) as same:
            assert (same.admin_port, same.grpc_port) == (settings.admin_port, settings.grpc_port)


@pytest.mark.parametrize("given", [{}, {"host": "localhost"}, {"host": "::1"}, {"host": "0.0.0.0", "admin_port": 9000}])
def test_the_model_may_be_changed_on_loopback_or_with_an_admin_port(given: dict[str, object]) -> None:
    assert changes_refused_reason(Settings(**given)) is None  # type: ignore[arg-type] # one of its fields each


@pytest.mark.parametrize(
    "given",
    [
        {"host": "0.0.0.0"},
        {"host": "10.0.0.1"},
        {"host": "example.org"},
        {"fd": 3},
        {"forwarded_allow_ips": "127.0.0.1"},
    ],
)
def test_the_model_may_not_be_changed_where_others_may_reach_the_port(given: dict[str, object]) -> None:
    assert "--admin-port" in str(changes_refused_reason(Settings(**given)))  # type: ignore[arg-type] # one of its fields each


def test_the_model_may_not_be_changed_in_one_of_several_workers() -> None:
    assert "--watch-checkpoint" in str(changes_refused_reason(Settings(workers=2, admin_port=9000)))


@pytest.mark.anyio
@pytest.mark.parametrize(("host", "num_warnings"), [("127.0.0.1", 0), ("0.0.0.0", 1)])
async def test_an_admin_port_that_others_can_reach_is_warned_of(
    host: str, num_warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "service.hosting.ports"):
        async with serving_beside(uvicorn.Config(Starlette(), lifespan="off", log_config=None), host, 0):
            pass
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("keep strangers from it" in message for message in warned) == num_warnings
