"""An engine that tells how long a batch takes, since when one runs, and whether it can run anything at all."""

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
        running: when the batch that runs began, and the seconds that it should take; None where none runs.
    """

    def __init__(self, run: Run, clock: Callable[[], float]) -> None:
        """Take the engine's `run`, and the clock to time it by."""
        self._run, self._clock = run, clock
        self.running: tuple[float, float] | None = None

    def run(
        self, images: Sequence[Tensor], profile: SubNetworkProfile, predicted_s: float
    ) -> tuple[list[Ranked], float, float]:
        """Run a batch; returns (logits, probabilities, ranking) of each image, and when the model started and ended."""
        # NumPy, because PyTorch would give the GIL away for a microsecond's work and wait long to get it back.
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
        """Tell images on which the model fails from a model that fails, as a GPU does after an error that stays.

        Raises:
            RuntimeError: the latter; no request would be answered any more, and it is for a new process to do better.
        """
        try:
            self.run([blank], profile, 0.0)
        except Exception as error:  # whatever the model raises, that it raises is what counts
            raise RuntimeError("the model fails whatever the image") from error
