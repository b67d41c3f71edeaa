"""An event loop in virtual time, which advances when nothing is ready, and a server of a tiny checkpoint."""

import asyncio
import selectors
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.engines.profile_store import extended_profile
from service.runtime import ServerRuntime
from service.settings import Settings
from tests.service.http.scripted_server import BODY_LIMIT, ScriptedEngine, serving

STUCK_S = 10  # of real time, after which a loop with nothing ready and no timer is stuck


class _Selector(selectors.DefaultSelector):
    """Returns the files that are ready now; if none is, advances the loop's time to its next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> Any:  # noqa: ANN401 - typeshed's type
        ready = super().select(STUCK_S if timeout is None else 0)
        assert ready or timeout is not None, "stuck: nothing is ready, and no timer is set"
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time: it waits for a timer without using real time.

    Sockets are real: the data that one end of a connection in this process sends is at once readable at the other end.
    """

    def __init__(self) -> None:
        self._selector_of_time = _Selector()
        super().__init__(self._selector_of_time)

    def pass_time(self, seconds: float) -> None:
        """Advance the time, as a callback that blocks the loop does."""
        self._selector_of_time.now += seconds

    def time(self) -> float:
        return self._selector_of_time.now


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualTimeLoop}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        checkpoint=str(tmp_path),
        profile_folder=tmp_path / "profiles",
        audit=False,
        default_budget_ms=60_000,  # no test should depend on the speed of the machine
        max_body_bytes=BODY_LIMIT,
        max_image_pixels=10_000,
    )


@pytest.fixture
def engine(checkpoint: Checkpoint) -> ScriptedEngine:
    return ScriptedEngine(checkpoint)


@pytest.fixture
def latencies(checkpoint: Checkpoint) -> LatencyTable:
    """Return latencies so short that they fit the latency budgets of the tests."""
    return LatencyTable((1, 4), dict.fromkeys(extended_profile(checkpoint).by_subnetwork, (1e-06, 2e-06)))


@pytest.fixture
def client(
    settings: Settings, checkpoint: Checkpoint, engine: ScriptedEngine, latencies: LatencyTable
) -> Iterator[TestClient]:
    with serving(ServerRuntime(settings, checkpoint, engine, latencies)) as client:
        yield client
