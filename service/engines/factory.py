"""Which engine serves a model on a device, and with how many threads."""

import math
from typing import Literal

from models.checkpoint import Checkpoint
from models.devices import DeviceError, resolve_device
from models.supervit import SuperViT
from service.engines.base import Engine
from service.engines.openvino_engine import OpenVINOEngine
from service.engines.torch_engine import TorchEngine

SMALL_GFLOPS = 0.3


def make_engine(kind: Literal["auto", "torch", "openvino"], model: SuperViT, device: str, threads: int) -> Engine:
    """Build the engine that was asked for: by default OpenVINO on a CPU and PyTorch on a GPU.

    Args:
        kind: which.
        model: in eval mode, on the CPU.
        device: a torch device, or "auto" for the first GPU where there is one.
        threads: of the engine, on a CPU.

    Raises:
        DeviceError: there is no such device here, or the engine cannot use it.
    """
    is_cpu = resolve_device(device).type == "cpu"
    if kind == "openvino" and not is_cpu:
        raise DeviceError(f"device {device!r} cannot be used: the OpenVINO engine runs on the CPU")
    if kind == "openvino" and model.config.fuse_pruned:
        raise DeviceError(
            "the OpenVINO engine cannot run a model that fuses the tokens it prunes; the torch engine can"
        )
    if kind == "openvino" or (kind == "auto" and is_cpu and not model.config.fuse_pruned):
        return OpenVINOEngine(model, threads)
    return TorchEngine(model, device, threads)


def engine_threads(checkpoint: Checkpoint, cores: float) -> int:
    """Choose how many threads the engine gets by default: one for each core that this process may use.

    A model so small that HTTP takes more of a request than inference does leaves one core to HTTP. On two cores the
    small checkpoint then answered 85 % in time at a load at which it had answered 63 %, one run of 6 s each.
    """
    whole = math.ceil(cores)
    largest = checkpoint.profile.by_subnetwork[checkpoint.config.largest]
    return max(1, whole - 1) if largest.gflops < SMALL_GFLOPS else whole
