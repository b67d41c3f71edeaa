"""PyTorch behind the protocol of an engine."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from models.data.images import normalise
from models.devices import resolve_device
from models.errors import DeviceError
from models.subnetwork import SubNetwork
from models.supervit import SuperViT

BFLOAT16_CAPABILITIES = ("avx512_bf16", "amx_bf16")
USABLE_SHARE = 0.8  # of the GPU memory that is free; allocators round up
BFLOAT16_COMPUTE_CAPABILITY = (8, 0)  # NVIDIA's GPUs from Ampere on; the older ones emulate it


class TorchEngine:
    """Eager PyTorch on a CPU or a GPU, in bfloat16 where the hardware has it; one copy of the weights."""

    def __init__(
        self, model: SuperViT, device: str, threads: int, precision: Literal["float32", "bfloat16"] | None = None
    ) -> None:
        """Move the model to its device and precision; the model that was given is changed.

        Args:
            model: in eval mode.
            device: a torch device, or "auto" for the first GPU where there is one.
            threads: how many compute on the CPU.
            precision: by default the fastest.

        Raises:
            DeviceError: there is no such device here, or it does not compute in that precision.
        """
        self._bytes_per_image = 0  # of a GPU
        self._device = resolve_device(device)
        self.is_on_gpu = self._device.type == "cuda"
        # The weights themselves, rather than autocast: that would convert every one of them anew for every batch.
        self._dtype = serving_dtype(self._device)
        if precision == "bfloat16" and self._dtype != torch.bfloat16:
            raise DeviceError(f"precision bfloat16 cannot be had: {device!r} has no instructions for it")
        if precision == "float32":
            self._dtype = torch.float32
        self._model = model.to(self._device, self._dtype)
        torch.set_num_threads(threads)

    @torch.inference_mode()
    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        """Map (B, 3, S, S) uint8 images to (B, classes) float32 logits.

        Raises:
            ValueError: the patch grid was not trained.
        """
        normalised = normalise(images.to(self._device, non_blocking=True), self._model.config)
        logits: Tensor = self._model(normalised.to(self._dtype), subnetwork)
        return logits.float().cpu()

    def warm_up(self) -> None:
        """Run every trained sub-network once, and on a GPU see how much memory an image takes."""
        for subnetwork in self._model.config.subnetworks:
            self.run(self._blank_images(1), subnetwork)
        if self.is_on_gpu:
            self._bytes_per_image = growth_per_image(self._peak_bytes)

    def fitting_images(self) -> int | None:
        """Tell how many images the memory that is free on this engine's own GPU holds; None on a CPU."""
        if not self._bytes_per_image:
            return None
        free_bytes, _ = torch.cuda.mem_get_info(self._device)
        # What PyTorch keeps for its next batch counts as taken there.
        kept_bytes = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return max(1, int(USABLE_SHARE * (free_bytes + kept_bytes) / self._bytes_per_image))

    def describe(self) -> str:
        """Name library, device, precision and threads."""
        precision = str(self._dtype).removeprefix("torch.")
        where = f"torch {torch.__version__} on {_device_name(self._device)}"
        return f"{where}, {precision}, {torch.get_num_threads()} threads"

    def _blank_images(self, count: int) -> Tensor:
        side = self._model.config.image_side
        return torch.zeros(count, 3, side, side, dtype=torch.uint8)

    def _peak_bytes(self, count: int) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        self.run(self._blank_images(count), self._model.config.largest)
        return torch.cuda.max_memory_allocated(self._device)


def growth_per_image(peak_bytes: Callable[[int], int], few: int = 1, many: int = 9) -> int:
    """Return how many bytes each image beyond `few` adds to the peak that a batch of so many images reaches.

    The difference of two batches leaves out the weights and what a library sets aside once.
    """
    before, after = (peak_bytes(count) for count in (few, many))
    return max(0, after - before) // (many - few)


def serving_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware computes in it, and float32 elsewhere."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= BFLOAT16_COMPUTE_CAPABILITY
    else:
        has_bfloat16 = any(cpu_capabilities().get(name) for name in BFLOAT16_CAPABILITIES)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _device_name(device: torch.device) -> str:
    cpu = cpu_capabilities().get("cpu_name", "CPU")
    return f"{torch.cuda.get_device_name(device)} ({device}) beside {cpu}" if device.type == "cuda" else str(cpu)


def cpu_capabilities() -> dict[str, object]:
    """Ask torch for flags such as "avx512_bf16" and for the CPU's name; an older torch has no answer."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())
