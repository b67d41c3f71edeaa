import pytest

from service.classifier import ClientLimiter
from service.domain import ApiKey
from service.errors import OverloadedError


def test_the_requests_in_flight_of_one_address_are_bounded() -> None:
    requests = ClientLimiter(1)
    with requests.counting("a") as enter_first, requests.counting("a") as enter_second:
        enter_first()
        with pytest.raises(OverloadedError) as caught:
            enter_second()
        assert caught.value.reason == "address"
        with requests.counting("b") as enter:
            enter()
        with requests.counting(None) as enter, requests.counting(None) as enter_too:
            enter()
            enter_too()
    with requests.counting("a") as enter:
        enter()


def test_requests_with_a_key_are_counted_by_key_instead_of_by_address() -> None:
    requests = ClientLimiter(1, "being received")
    with requests.counting("a", ApiKey("mine")) as enter_first, requests.counting("b", ApiKey("mine")) as enter_second:
        enter_first()
        with pytest.raises(OverloadedError, match="1 requests with this key are being received already") as caught:
            enter_second()
        assert caught.value.reason == "key"
        with requests.counting("a", ApiKey("yours")) as enter:
            enter()
