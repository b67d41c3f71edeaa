"""What an engine does before the first request: warm-up, graph capture and measuring its batch latencies."""

import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from models.subnetwork import SubNetwork
from service.assembly import ProfileWithFile
from service.engines.base import Engine
from service.engines.profile_store import measured_batch_sizes
from service.errors import NotReadyError


class Preparation:
    """Prepares an engine step by step, so that it can be cancelled and its progress can be watched.

    Attributes:
        running: when the current step began, and the seconds that it should take; None before the first.
    """

    def __init__(
        self,
        begin: Callable[..., ProfileWithFile],
        folder: Path,
        max_batch_size: int,
        step_s: float,
        is_wanted: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a preparation that has not begun.

        Args:
            begin: reads the latencies measured before, and measures those that a start needs.
            folder: folder of the measured latencies.
            max_batch_size: largest batch that will run.
            step_s: seconds that a step should take.
            is_wanted: returns whether to continue.
            clock: monotonic, in seconds.
        """
        self.running: tuple[float, float] | None = None
        self._begin, self._folder, self._max_batch_size = begin, folder, max_batch_size
        self._step_s, self._is_wanted, self._clock = step_s, is_wanted, clock

    def run(
        self, engine: Engine, checkpoint: Checkpoint, latencies: LatencyTable | None
    ) -> ProfileWithFile | LatencyTable:
        """Prepare an engine; return its latencies on this machine, or `latencies` if given.

        Raises:
            NotReadyError: the preparation is no longer wanted.
        """
        self._continues()
        engine.warm_up()
        if latencies is not None:
            return latencies
        for batch_size in measured_batch_sizes(self._max_batch_size):
            # The expensive ones first: the cheap ones find room in the memory that those need.
            for subnetwork in reversed(checkpoint.config.subnetworks):
                self._require_wanted()
                engine.prepare(subnetwork, batch_size)

        def run(images: Tensor, subnetwork: SubNetwork) -> Tensor:
            self._require_wanted()
            return engine.run(images, subnetwork)

        return self._begin(
            checkpoint,
            engine.describe(),
            run,
            folder=self._folder,
            max_batch_size=self._max_batch_size,
            is_padded=engine.pads_batches,
            is_stopping=lambda: not self._continues(),
        )

    def _require_wanted(self) -> None:
        if not self._continues():
            raise NotReadyError("the server is stopping")

    def _continues(self) -> bool:
        """Record progress, if only in waiting for another process, and return whether to continue."""
        self.running = self._clock(), self._step_s
        return self._is_wanted()
