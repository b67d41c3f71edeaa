import asyncio

import pytest
from prometheus_client import CollectorRegistry

from service.telemetry.instruments import Instruments
from service.telemetry.loop_delay import INTERVAL_S, LoopDelay
from tests.service.http.conftest import VirtualTimeLoop

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": VirtualTimeLoop}


async def test_a_slow_callback_is_recorded_as_event_loop_delay() -> None:
    loop, registry = asyncio.get_running_loop(), CollectorRegistry()
    assert isinstance(loop, VirtualTimeLoop)
    watching = asyncio.create_task(LoopDelay(Instruments(registry), loop.time).watch())
    await asyncio.sleep(2.5 * INTERVAL_S)
    loop.pass_time(INTERVAL_S)  # half of this time is after the timer was due
    await asyncio.sleep(INTERVAL_S / 4)
    watching.cancel()
    counts = [
        registry.get_sample_value("supervit_event_loop_delay_seconds_bucket", {"le": le}) for le in ("0.1", "0.2")
    ]
    assert counts == [2, 3]
    assert registry.get_sample_value("supervit_event_loop_delay_seconds_sum") == pytest.approx(INTERVAL_S / 2)
