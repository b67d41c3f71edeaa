"""What each process of a peer holds: our decoder, and the largest sub-network in eager PyTorch on one thread."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from models.checkpoint import load_checkpoint
from service.decoding.images import decode_image
from service.engines.torch_engine import TorchEngine

MAX_BATCH_SIZE = 16
MAX_WAIT_S = 0.01


class Model:
    """Classifies batches of encoded images with the checkpoint that PEER_CHECKPOINT names."""

    def __init__(self) -> None:
        checkpoint = load_checkpoint(Path(os.environ["PEER_CHECKPOINT"]))
        self._decode = partial(decode_image, config=checkpoint.config, max_pixels=50_000_000)
        self._engine, self._largest = TorchEngine(checkpoint.model, "cpu", 1), checkpoint.config.largest
        self._engine.warm_up()

    def __call__(self, bodies: Sequence[bytes]) -> list[int]:
        images = torch.stack([self._decode(body) for body in bodies])
        classes: list[int] = self._engine.run(images, self._largest).argmax(1).tolist()
        return classes
