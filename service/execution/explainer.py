"""Traces which patches of an image a sub-network keeps: one image at a time, on a thread of low priority.

It runs the model in PyTorch, whatever the engine. The weights are the same, but where the engine computes in lower
precision, two patches of nearly the same score may change places.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from models.data.images import normalise
from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork
from models.supervit import SuperViT
from models.tokens import FUSED
from service.decoding.decoder import Decoder
from service.domain import InferenceRequest
from service.engines.priority import give_way
from service.errors import ModelError, OverloadedError
from service.scheduling.key_ledger import KeyLedger

NICENESS = 10
LAST_PRIORITY = -100  # lower than any priority that a request may ask for
RETRY_AFTER_S = 1.0
LONGEST_WAIT_S = 10.0  # for the image to be decoded; no other image can be explained during that time

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeptPatches:
    """The patches of an image that a prune block keeps.

    Attributes:
        block: index of the block.
        patches: numbers of the kept patches, row by row from 0, ascending.
        scores: for each kept patch, the attention that the class token pays to it, 0..1.
        keeps_fused: whether the block keeps the token into which earlier blocks fused the tokens that they pruned.
    """

    block: int
    patches: tuple[int, ...]
    scores: tuple[float, ...]
    keeps_fused: bool


class Explainer:
    """Explains one image at a time, and rejects others while it is busy."""

    def __init__(
        self, model: SuperViT, decoder: Decoder, ledger: KeyLedger, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Create an explainer from its collaborators.

        Args:
            model: the model to trace, in eval mode, on any device.
            decoder: decodes the images.
            ledger: charges API keys for their work.
            clock: monotonic, in seconds; the clock of the ledger.
        """
        self._model, self._decoder, self._ledger, self._clock = model, decoder, ledger, clock
        self._thread = ThreadPoolExecutor(1, "explain", initializer=give_way, initargs=(NICENESS,))
        self._is_taken = False

    @property
    def is_taken(self) -> bool:
        """Whether an image is being explained."""
        return self._is_taken

    def check_room(self) -> None:
        """Check that no image is being explained.

        Raises:
            OverloadedError: another image is being explained.
        """
        if self._is_taken:
            raise OverloadedError("another image is being explained; try again in a moment", "full", RETRY_AFTER_S)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the explainer while the `with` block runs; raises what `check_room` raises."""
        self.check_room()
        self._is_taken = True
        try:
            yield
        finally:
            self._is_taken = False

    async def explain(
        self, data: bytes, profile: SubNetworkProfile, request: InferenceRequest
    ) -> tuple[KeptPatches, ...]:
        """Return which patches each prune block keeps, and charge the request's key for the run.

        At a keep rate of 1 no block prunes, and the result is empty.

        Args:
            data: the encoded bytes of an image that was classified.
            profile: profile of the sub-network that ran.
            request: the request that brought the image.

        Raises:
            ServiceError: the image cannot be decoded now, or the model fails on it.
        """
        decoding = asyncio.wrap_future(self._decoder.submit(data, math.inf, LAST_PRIORITY, request.address))
        try:
            decoded = await asyncio.wait_for(decoding, LONGEST_WAIT_S)
        except TimeoutError:
            message = "images of other requests leave no time to decode this one again; try again in a moment"
            raise OverloadedError(message, "full", RETRY_AFTER_S) from None
        loop, subnetwork = asyncio.get_running_loop(), profile.subnetwork
        if request.key is not None:  # before the run, which continues to its end even if the client leaves
            self._ledger.charge(request.key, profile.gflops, self._clock())
        try:
            return await loop.run_in_executor(self._thread, self._trace, decoded.image, subnetwork)
        except RuntimeError as error:  # such as a GPU out of memory
            logger.exception("the model failed on an image at %s", subnetwork)
            raise ModelError("the model failed on this image; see the server's log") from error

    def close(self) -> None:
        """Let the thread end once its image is done; do not wait for it, because the event loop must not block."""
        self._thread.shutdown(wait=False)

    @torch.inference_mode()
    def _trace(self, image: Tensor, subnetwork: SubNetwork) -> tuple[KeptPatches, ...]:
        weight = self._model.head.weight
        pixels = normalise(image[None].to(weight.device), self._model.config).to(weight.dtype)
        _, traces = self._model.trace(pixels, subnetwork)
        return tuple(_kept(trace.block, trace.kept[0].tolist(), trace.scores[0].tolist()) for trace in traces)


def _kept(block: int, numbers: list[int], scores: list[float]) -> KeptPatches:
    ranked = sorted((number, score) for number, score in zip(numbers, scores, strict=True) if number != FUSED)
    return KeptPatches(block, tuple(n for n, _ in ranked), tuple(s for _, s in ranked), FUSED in numbers)
