"""Runs batches as CUDA graphs: a whole forward pass is launched at once instead of kernel by kernel.

A graph belongs to one sub-network and one batch size; a smaller batch runs in its first rows. Callers decide what is
captured, and when; running a batch captures nothing. Only `CudaDevice` touches CUDA.
"""

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.subnetwork import SubNetwork
from service.engines.base import Captured

logger = logging.getLogger(__name__)

# Maps (B, 3, S, S) uint8 images and the sub-network to run to (B, classes) float32 logits, both on the device.
Forward = Callable[[Tensor, SubNetwork], Tensor]

MEMORY_SHARE = 0.1  # of the GPU's memory, for graphs; the rest is for weights, batches without a graph, and others
WARM_UPS = 3  # as in torch's make_graphed_callables: libraries choose their kernels and allocate their workspaces


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured forward pass.

    Attributes:
        logits: (B, classes) float32 on the device; each replay overwrites them.
        held_bytes: device memory that the graph takes.
        replay: launches the graph, after all work that the device was given before.
    """

    logits: Tensor
    held_bytes: int
    replay: Callable[[], None]


class GraphDevice(Protocol):
    """A device that captures graphs.

    Attributes:
        total_bytes: memory of the device.
    """

    total_bytes: int

    def buffers(self, batch_size: int, image_side: int) -> tuple[Tensor, Tensor]:
        """Allocate (B, 3, S, S) uint8 buffers on the host, from which copies are fast, and on the device."""
        ...

    def capture(self, forward: Callable[[], Tensor]) -> Graph:
        """Capture a forward pass that returns logits.

        Raises:
            RuntimeError: the forward pass cannot be captured, or memory is short.
        """
        ...


class GraphCache:
    """The graphs of a network; a captured graph is never dropped, so that its measured latency stays true."""

    def __init__(self, forward: Forward, image_side: int, device: GraphDevice) -> None:
        """Create an empty cache.

        Args:
            forward: the forward pass to capture; it must neither wait for the device nor make tensors of numbers.
            image_side: S, in pixels.
            device: captures the graphs.
        """
        self._forward, self._image_side, self._device = forward, image_side, device
        self._graphs: defaultdict[SubNetwork, dict[int, Graph]] = defaultdict(dict)
        # Shared by all graphs of a batch size, as no two run at once: each run ends with its logits on the host. That
        # is also why copies need no second buffer and no stream of their own: there is nothing that they could overlap
        # with.
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._captured = Captured(0, 0)
        self._is_closed = False

    @property
    def captured(self) -> Captured:
        """The number of captured graphs and their memory."""
        return self._captured

    def prepare(self, subnetwork: SubNetwork, batch_size: int) -> None:
        """Capture batches of a size, unless they are captured already, a capture has failed or memory is spent."""
        if self._is_closed or batch_size in self._graphs[subnetwork]:
            return
        try:
            if batch_size not in self._buffers:
                self._buffers[batch_size] = self._device.buffers(batch_size, self._image_side)
            _, images = self._buffers[batch_size]
            graph = self._device.capture(lambda: self._forward(images, subnetwork))
        except RuntimeError:  # torch's, for any reason; an allocator that failed in a capture captures no more
            logger.warning("CUDA graph capture failed; batches not captured yet run without CUDA graphs", exc_info=True)
            self._is_closed = True
            return
        self._graphs[subnetwork][batch_size] = graph
        held_bytes = self._captured.held_bytes + graph.held_bytes
        self._captured = Captured(self._captured.num_graphs + 1, held_bytes)
        if held_bytes > MEMORY_SHARE * self._device.total_bytes:
            logger.info("%d CUDA graphs take %d bytes; no more will be captured", self._captured.num_graphs, held_bytes)
            self._is_closed = True

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor | None:
        """Map (B, 3, S, S) uint8 images to (B, classes) float32 logits, both on the host, by the smallest graph.

        Return None where no graph fits of less than twice the number of images: less than half of a batch is wasted.
        """
        count = len(images)
        size = min((size for size in self._graphs[subnetwork] if count <= size < 2 * count), default=None)
        if size is None:
            return None
        staging, static = self._buffers[size]
        staging[:count].copy_(images)  # the other rows hold an earlier batch, whose logits nothing reads
        static.copy_(staging, non_blocking=True)
        graph = self._graphs[subnetwork][size]
        graph.replay()
        return graph.logits[:count].to("cpu", copy=True)  # waits for the replay


class CudaDevice:
    """A GPU that captures graphs; for one thread at a time, while no other thread of this process gives it work."""

    def __init__(self, device: torch.device) -> None:
        """Create for a GPU."""
        self._device = device
        self.total_bytes = torch.cuda.get_device_properties(device).total_memory
        # All graphs share the memory of intermediate values. That is safe in any order of replays, because nothing but
        # the logits outlives a replay, and they are read before the next one.
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all graphs, or they would not share memory.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's

    def buffers(self, batch_size: int, image_side: int) -> tuple[Tensor, Tensor]:
        """Allocate (B, 3, S, S) uint8 buffers in pinned memory and on the GPU."""
        shape = batch_size, 3, image_side, image_side
        with torch.cuda.device(self._device):  # or pinning would create a context on the first GPU
            pinned = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        return pinned, torch.zeros(shape, dtype=torch.uint8, device=self._device)

    def capture(self, forward: Callable[[], Tensor]) -> Graph:
        """Warm up, capture, and replay once, which uploads the graph itself to the GPU.

        Raises:
            RuntimeError: the forward pass cannot be captured, or memory is short.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # Entered here as well as by `torch.cuda.graph`, which leaves its stream set if a capture fails.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                forward()
            graph = torch.cuda.CUDAGraph()
            free_bytes = self._free_bytes()
            # CUDA calls of other threads during the capture must not invalidate it.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                logits = forward()
            graph.replay()
            return Graph(logits, max(0, free_bytes - self._free_bytes()), graph.replay)

    def _free_bytes(self) -> int:
        """Return the GPU memory that is free for all processes: the driver, too, keeps some for each graph."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
