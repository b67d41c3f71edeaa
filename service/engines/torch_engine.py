"""The engine that runs batches in PyTorch, on a GPU or a CPU."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from models.data.images import Normalisation
from models.devices import cpu_capabilities, has_bfloat16, resolve_device
from models.errors import DeviceError
from models.subnetwork import SubNetwork
from models.supervit import SuperViT
from service.engines.base import Captured
from service.engines.cuda_graphs import CudaDevice, GraphCache, GraphDevice

FloatPrecision = Literal["float32", "bfloat16"]

USABLE_SHARE = 0.8  # of the free GPU memory; allocators round up


class TorchEngine:
    """PyTorch, by default in bfloat16 where the hardware has it; on a GPU with CUDA graphs. One copy of the weights."""

    def __init__(
        self,
        model: SuperViT,
        device: str,
        threads: int,
        precision: FloatPrecision | None = None,
        graph_device: GraphDevice | None = None,
    ) -> None:
        """Move the model to its device and precision, in place.

        Args:
            model: in eval mode.
            device: a torch device, or "auto" for the first GPU where there is one.
            threads: number of threads that compute on the CPU.
            precision: by default bfloat16 where the hardware has it, else float32.
            graph_device: captures the prepared batches; by default the GPU, and nothing on a CPU.

        Raises:
            DeviceError: there is no such device here, or it does not compute in that precision.
        """
        self._bytes_per_image = 0  # GPU memory, once `warm_up` has measured it
        self._device = resolve_device(device)
        self.is_on_gpu = self._device.type == "cuda"
        # The weights are converted once, rather than with autocast, which would convert all of them for every batch.
        self._dtype = serving_dtype(self._device)
        if precision == "bfloat16" and self._dtype != torch.bfloat16:
            raise DeviceError(f"precision bfloat16 is not available: {device!r} has no instructions for it")
        if precision == "float32":
            self._dtype = torch.float32
        self._model = model.to(self._device, self._dtype)
        self._normalise = Normalisation(model.config, self._device)
        if graph_device is None and self.is_on_gpu:
            graph_device = CudaDevice(self._device)
        image_side = model.config.image_side
        self._graphs = None if graph_device is None else GraphCache(self._forward, image_side, graph_device)
        self.pads_batches = self._graphs is not None
        torch.set_num_threads(threads)

    @torch.inference_mode()
    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        """Map (B, 3, S, S) uint8 images to (B, classes) float32 logits.

        Raises:
            ValueError: the patch grid was not trained.
        """
        replayed = None if self._graphs is None else self._graphs.run(images, subnetwork)
        return self._forward(images.to(self._device), subnetwork).cpu() if replayed is None else replayed

    def warm_up(self) -> None:
        """Run every trained sub-network once, and measure the memory per image on a GPU; call it before `prepare`."""
        for subnetwork in self._model.config.subnetworks:
            self.run(self._blank_images(1), subnetwork)
        if self.is_on_gpu:
            self._bytes_per_image = growth_per_image(self._peak_bytes)

    @torch.inference_mode()
    def prepare(self, subnetwork: SubNetwork, batch_size: int) -> None:
        """Capture batches of this size as a CUDA graph, where there is room for them."""
        fitting = self.fitting_images()
        if self._graphs is not None and (fitting is None or batch_size <= fitting):
            self._graphs.prepare(subnetwork, batch_size)

    def captured(self) -> Captured | None:
        """Return how many CUDA graphs are held; None on a CPU."""
        return None if self._graphs is None else self._graphs.captured

    def fitting_images(self) -> int | None:
        """Return how many images fit into the free memory of this engine's GPU; None on a CPU and before `warm_up`."""
        if not self._bytes_per_image:
            return None
        free_bytes, _ = torch.cuda.mem_get_info(self._device)
        # Memory that PyTorch keeps for its next batch is not in `free_bytes`; what it keeps for graphs stays theirs.
        kept_bytes = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        for_graphs_bytes = 0 if self._graphs is None else self._graphs.captured.held_bytes
        usable_bytes = free_bytes + max(0, kept_bytes - for_graphs_bytes)
        return max(1, int(USABLE_SHARE * usable_bytes / self._bytes_per_image))

    def describe(self) -> str:
        """Return library, device, precision, threads and whether there are CUDA graphs."""
        precision = str(self._dtype).removeprefix("torch.")
        where = f"torch {torch.__version__} on {_device_name(self._device)}"
        graphs = "" if self._graphs is None else ", CUDA graphs"
        return f"{where}, {precision}, {torch.get_num_threads()} threads{graphs}"

    def close(self) -> None:
        """Free the graphs and the model, unless others have it, too."""
        del self._model, self._normalise
        self._graphs = None

    def _forward(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        """Map (B, 3, S, S) uint8 images to (B, classes) float32 logits, both on the device."""
        logits: Tensor = self._model(self._normalise(images).to(self._dtype), subnetwork)
        return logits.float()

    def _blank_images(self, count: int) -> Tensor:
        side = self._model.config.image_side
        return torch.zeros(count, 3, side, side, dtype=torch.uint8)

    def _peak_bytes(self, count: int) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        self.run(self._blank_images(count), self._model.config.largest)
        return torch.cuda.max_memory_allocated(self._device)


def growth_per_image(peak_bytes: Callable[[int], int], few: int = 1, many: int = 9) -> int:
    """Return how many bytes each image beyond `few` adds to `peak_bytes`, the peak memory of a batch by its size.

    The difference of two batches leaves out the weights and what a library allocates once.
    """
    before, after = (peak_bytes(count) for count in (few, many))
    return max(0, after - before) // (many - few)


def serving_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware computes in it, and float32 elsewhere."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def _device_name(device: torch.device) -> str:
    cpu = cpu_capabilities().get("cpu_name", "CPU")
    return f"{torch.cuda.get_device_name(device)} ({device}) beside {cpu}" if device.type == "cuda" else str(cpu)
