"""Which device to compute on, found from its name, and in which precision. Moves nothing."""

import torch


class DeviceError(Exception):
    """A device cannot be used; the message names it and says why."""


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """Find the device that `name` means and prove that it holds a tensor.

    Args:
        name: "cpu", "cuda:1" and the like; "cuda" for the process's own GPU; "auto" for that GPU where there is one and
            the CPU elsewhere.
        local_rank: number of this process on its machine, and so of its own GPU.

    Raises:
        DeviceError: there is no such device, or it cannot be used.
    """
    own_gpu = f"cuda:{local_rank}"
    default = own_gpu if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device({"auto": default, "cuda": own_gpu}.get(name, name))
        torch.zeros(1, device=device).item()  # read back, because the meta device makes tensors that hold nothing
    except (AssertionError, ImportError, RuntimeError, ValueError) as error:  # AssertionError: torch without CUDA
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DeviceError(f"device {name!r} cannot be used: {reason}") from error
    return device


def training_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Find the dtype of a training step's products.

    Args:
        device: where they are computed.
        precision: a dtype's name; or "auto": bfloat16 where the device has instructions for it, float16 on other GPUs,
            float32 elsewhere, where anything shorter would be emulated.
    """
    if precision != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cpu" and has_bfloat16 else torch.float32
