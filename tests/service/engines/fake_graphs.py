"""A device without a GPU; its graphs repeat the captured computation on what their input holds at the replay."""

from collections.abc import Callable

import torch
from torch import Tensor

from service.engines.cuda_graphs import Graph


class FakeGraphDevice:
    """Counts captures and replays; every capture fails while `error` is set."""

    held_bytes = 10

    def __init__(self, total_bytes: int = 1000) -> None:
        self.total_bytes = total_bytes
        self.num_captures = self.num_replays = 0
        self.buffer_sizes: list[int] = []
        self.error: RuntimeError | None = None

    def buffers(self, batch_size: int, image_side: int) -> tuple[Tensor, Tensor]:
        self.buffer_sizes.append(batch_size)
        shape = batch_size, 3, image_side, image_side
        return torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8)

    def capture(self, forward: Callable[[], Tensor]) -> Graph:
        logits = forward().clone()
        if self.error:
            raise self.error
        self.num_captures += 1

        def replay() -> None:
            self.num_replays += 1
            logits.copy_(forward())

        return Graph(logits, self.held_bytes, replay)
