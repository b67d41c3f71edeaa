"""Which patches a sub-network keeps of an image: one image at a time, on a thread that gives way to all others.

It runs the model in PyTorch, whatever the engine: the same weights, though where the engine computes in fewer digits
two patches of nearly the same score may change places.
"""

import asyncio
import logging
import math
import os
import threading
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
from service.errors import ModelError, OverloadedError
from service.scheduling.key_ledger import KeyLedger

NICENESS = 10  # a tenth of a core that others want as well
LAST_PRIORITY = -100  # behind whatever a request may ask for
RETRY_AFTER_S = 1.0
LONGEST_WAIT_S = 10.0  # for a decoder, while none else can be explained

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeptPatches:
    """What a block that prunes keeps of an image.

    Attributes:
        block: its index.
        patches: numbers of patches, row by row from 0, ascending.
        scores: of each, the attention that the class token pays to it, 0..1.
        keeps_fused: whether the token that earlier ones were fused into is among those kept.
    """

    block: int
    patches: tuple[int, ...]
    scores: tuple[float, ...]
    keeps_fused: bool


class Explainer:
    """Explains one image at a time, or says that it is busy."""

    def __init__(
        self, model: SuperViT, decoder: Decoder, ledger: KeyLedger, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take what it works with.

        Args:
            model: in eval mode, wherever it is.
            decoder: makes images of bytes.
            ledger: of what the holders of keys have had.
            clock: monotonic, in seconds; the ledger's.
        """
        self._model, self._decoder, self._ledger, self._clock = model, decoder, ledger, clock
        self._thread = ThreadPoolExecutor(1, "explain", initializer=_give_way)
        self._is_taken = False

    @property
    def is_taken(self) -> bool:
        """Whether an image is being explained."""
        return self._is_taken

    def check_room(self) -> None:
        """See whether an image can be explained.

        Raises:
            OverloadedError: another is.
        """
        if self._is_taken:
            raise OverloadedError("another image is being explained; try again in a moment", "full", RETRY_AFTER_S)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have the explainer for oneself as long as the block lasts; errors as `check_room`."""
        self.check_room()
        self._is_taken = True
        try:
            yield
        finally:
            self._is_taken = False

    async def explain(
        self, data: bytes, profile: SubNetworkProfile, request: InferenceRequest
    ) -> tuple[KeptPatches, ...]:
        """Tell which patches each block that prunes keeps; none do at a keep rate of 1. Its key is charged for that.

        Args:
            data: the bytes of an image that was classified.
            profile: of the sub-network that ran.
            request: whose image it is.

        Raises:
            ServiceError: the image cannot be decoded now, or the model fails on it.
        """
        decoding = asyncio.wrap_future(self._decoder.submit(data, math.inf, LAST_PRIORITY, request.address))
        try:
            decoded = await asyncio.wait_for(decoding, LONGEST_WAIT_S)
        except TimeoutError:
            message = "others' images leave no time to decode this one again; try again in a moment"
            raise OverloadedError(message, "full", RETRY_AFTER_S) from None
        loop, subnetwork = asyncio.get_running_loop(), profile.subnetwork
        if request.key is not None:  # at once: what has begun runs to its end, even if the client leaves
            self._ledger.charge(request.key, profile.gflops, self._clock())
        try:
            return await loop.run_in_executor(self._thread, self._trace, decoded.image, subnetwork)
        except RuntimeError as error:  # as of a GPU whose memory is taken
            logger.exception("the model failed on an image at %s", subnetwork)
            raise ModelError("the model failed on this image; the server's log says why") from error

    def close(self) -> None:
        """Have the thread end once its image is done; waits for nothing, as the event loop must not."""
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


def _give_way() -> None:
    """Let every other thread of the machine go before this one, and those of PyTorch that it starts."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # on Linux, of the thread alone
