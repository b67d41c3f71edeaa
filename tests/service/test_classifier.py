import pytest

from service.classifier import RequestsByAddress
from service.errors import OverloadedError


def test_one_address_may_have_so_many_requests_in_flight() -> None:
    requests = RequestsByAddress(1)
    with requests.counting("a") as enter_first, requests.counting("a") as enter_second:
        enter_first()
        with pytest.raises(OverloadedError) as caught:
            enter_second()
        assert caught.value.reason == "address"
        with requests.counting("b") as enter:
            enter()
        with requests.counting(None) as enter:
            enter()
    with requests.counting("a") as enter:
        enter()
