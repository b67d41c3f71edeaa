import socket

import pytest

from service.errors import CommandError
from service.hosting.grpc_port import reserved_port
from service.settings import Settings


def test_without_the_libraries_the_start_says_what_to_install() -> None:
    with (
        pytest.raises(CommandError, match=r"pip install '\.\[grpc\]'"),
        reserved_port(Settings(grpc_port=0), ["nowhere"]),
    ):
        pass


def test_without_a_port_nothing_is_needed() -> None:
    with reserved_port(Settings(), ["nowhere"]) as settings:
        assert settings.grpc_port is None


def test_any_free_port_gets_a_number() -> None:
    with reserved_port(Settings(grpc_port=0)) as settings:
        assert settings.grpc_port
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((settings.host, settings.grpc_port))


def test_a_port_where_another_server_listens_cannot_be_had() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(CommandError, match=f"127.0.0.1 port {port} cannot be listened on"),
            reserved_port(Settings(grpc_port=port)),
        ):
            pass


def test_a_worker_takes_the_port_that_its_supervisor_keeps() -> None:
    with reserved_port(Settings(grpc_port=0)) as settings:
        of_worker = settings.model_copy(update={"fd": 3})
        with reserved_port(of_worker) as same:
            assert same.grpc_port == settings.grpc_port
