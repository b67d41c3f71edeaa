"""An engine that times its batches, says since when one runs, and can check whether it runs anything at all."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from models.profiles import SubNetworkProfile
from service.engines.base import Run
from service.execution.results import Ranked, rank


class TimedEngine:
    """Runs batches of single images.

    Attributes:
        running: when the current batch began, and its expected seconds; None where none runs.
    """

    def __init__(self, run: Run, clock: Callable[[], float]) -> None:
        """Create from the engine's `run` and the clock that times it."""
        self._run, self._clock = run, clock
        self.running: tuple[float, float] | None = None

    def run(
        self, images: Sequence[Tensor], profile: SubNetworkProfile, predicted_s: float
    ) -> tuple[list[Ranked], float, float]:
        """Run a batch; return the ranked classes of each image, and when the model started and ended."""
        # NumPy, because PyTorch would release the GIL for a microsecond of work and wait long to get it back.
        batch = torch.from_numpy(np.stack([image.numpy() for image in images]))
        started_at = self._clock()
        self.running = started_at, predicted_s
        try:
            logits = self._run(batch, profile.subnetwork).numpy()
        finally:
            self.running = None
        ended_at = self._clock()
        return rank(logits, profile.temperature, profile.entropy_exponent), started_at, ended_at

    def require(self, blank: Tensor, profile: SubNetworkProfile) -> None:
        """Check that the model runs at all: after a persistent error, a GPU fails on every image.

        Raises:
            RuntimeError: the model fails on a blank image. It would answer no request any more, and only a new process
                may help.
        """
        try:
            self.run([blank], profile, 0.0)
        except Exception as error:  # any exception means that the model does not run
            raise RuntimeError("the model fails on every image") from error
