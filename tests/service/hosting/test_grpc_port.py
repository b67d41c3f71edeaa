import pytest

from service.errors import CommandError
from service.hosting.grpc_port import require_grpc
from service.settings import Settings


def test_without_the_libraries_the_start_says_what_to_install() -> None:
    with pytest.raises(CommandError, match=r"pip install '\.\[grpc\]'"):
        require_grpc(Settings(grpc_port=0), ["nowhere"])


def test_without_a_port_nothing_is_needed() -> None:
    require_grpc(Settings(), ["nowhere"])
