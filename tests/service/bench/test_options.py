from typing import Any

import pytest
from pydantic import ValidationError

from service.bench.options import Bench


def test_v2_requires_a_model_and_the_default_protocol_rejects_one() -> None:
    assert Bench(url="http://server", protocol="v2", model="m").model == "m"
    for options in ({"protocol": "v2"}, {"model": "m"}):
        with pytest.raises(ValidationError, match="give both or none"):
            Bench.model_validate({"url": "http://server"} | options)


def test_the_default_rate_is_10_requests_per_second() -> None:
    assert Bench(url="http://server").rates == (10,)
    assert Bench(url="http://server", rate=(5, 50)).rates == (5, 50)


@pytest.mark.parametrize("options", [{"rate": (0,)}, {"priority": (1,)}, {"priority": ()}, {"budget_ms": ()}])
def test_options_out_of_range_are_rejected(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Bench.model_validate({"url": "http://server"} | options)
