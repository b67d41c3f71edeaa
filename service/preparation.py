"""What an engine does before the first request: warm up, capture, and learn how long its batches take here."""

import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from models.subnetwork import SubNetwork
from service.assembly import Profiled
from service.engines.base import Engine
from service.engines.profile_store import measured_batch_sizes
from service.errors import NotReadyError


class Preparation:
    """Prepares step by step, so that it can be given up, and is seen to get on.

    Attributes:
        running: when the step that runs began, and what it may take; None before the first.
    """

    def __init__(
        self,
        begin: Callable[..., Profiled],
        folder: Path,
        max_batch_size: int,
        step_s: float,
        is_wanted: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take what it does.

        Args:
            begin: reads the latencies measured before, and measures what a start needs.
            folder: where they are kept.
            max_batch_size: largest batch that will run.
            step_s: what a step may take.
            is_wanted: tells whether to go on.
            clock: monotonic, in seconds.
        """
        self.running: tuple[float, float] | None = None
        self._begin, self._folder, self._max_batch_size = begin, folder, max_batch_size
        self._step_s, self._is_wanted, self._clock = step_s, is_wanted, clock

    def run(self, engine: Engine, checkpoint: Checkpoint, latencies: LatencyTable | None) -> Profiled | LatencyTable:
        """Prepare an engine; returns the latencies here, those given where there are.

        Raises:
            NotReadyError: it is not wanted any more.
        """
        self._goes_on()
        engine.warm_up()
        if latencies is not None:
            return latencies
        for batch_size in measured_batch_sizes(self._max_batch_size):
            # The dear ones first: in what they need, the cheap ones find room.
            for subnetwork in reversed(checkpoint.config.subnetworks):
                self._require_going_on()
                engine.prepare(subnetwork, batch_size)

        def run(images: Tensor, subnetwork: SubNetwork) -> Tensor:
            self._require_going_on()
            return engine.run(images, subnetwork)

        return self._begin(
            checkpoint,
            engine.describe(),
            run,
            folder=self._folder,
            max_batch_size=self._max_batch_size,
            is_padded=engine.pads_batches,
            is_stopping=lambda: not self._goes_on(),
        )

    def _require_going_on(self) -> None:
        if not self._goes_on():
            raise NotReadyError("the server is stopping")

    def _goes_on(self) -> bool:
        """Note that it gets on, if only with waiting for another process, and tell whether it should."""
        self.running = self._clock(), self._step_s
        return self._is_wanted()
