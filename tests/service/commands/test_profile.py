from datetime import UTC, datetime

import pytest

from models.latency import LatencyTable
from models.subnetwork import SubNetwork
from service.commands.profile import warn_if_noisy
from service.engines.profiler import Measurement


@pytest.mark.parametrize(("spread", "is_noisy"), [(0.02, False), (0.38, True)])
def test_latencies_of_a_busy_machine_are_reported_as_such(
    capsys: pytest.CaptureFixture[str], spread: float, is_noisy: bool
) -> None:
    subnetwork = SubNetwork(8, 1.0)
    table = LatencyTable((1, 2, 4), {subnetwork: (0.01, 0.02, 0.04)})
    measured_at = datetime.now(UTC).isoformat()
    warn_if_noisy(Measurement(table, {subnetwork: (0.0, spread, 0.9)}, measured_at))
    shown = capsys.readouterr().err
    assert ("38%" in shown) == is_noisy
    assert bool(shown) == is_noisy
