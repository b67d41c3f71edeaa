import pytest

from service.errors import CommandError
from service.hosting.grpc_port import require_grpc
from service.settings import Settings


def test_a_grpc_port_without_the_grpc_libraries_raises_an_error_that_says_what_to_install() -> None:
    with pytest.raises(CommandError, match=r"pip install '\.\[grpc\]'"):
        require_grpc(Settings(grpc_port=0), ["nowhere"])


def test_grpc_libraries_are_not_required_without_a_grpc_port() -> None:
    require_grpc(Settings(), ["nowhere"])
