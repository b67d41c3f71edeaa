"""Find the device to compute on by its name, and the precision in which it is fast. Moves no tensors."""

from functools import cache
from pathlib import Path

import torch

from models.errors import DeviceError

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux names them; the last is Arm's
AMPERE = 8  # major compute capability of the first NVIDIA GPUs that compute in bfloat16


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that `name` means, after checking that it can hold a tensor.

    Args:
        name: "cpu", "cuda:1" and the like; "cuda" for the process's own GPU; "auto" for that GPU where there is one and
            the CPU elsewhere.
        local_rank: number of this process on its machine, which is also the number of its own GPU.

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


def native_dtype(device: torch.device, cpuinfo: Path = CPUINFO) -> torch.dtype:
    """Return the dtype in which the device multiplies fastest: bfloat16, float16 on older GPUs, float32 on other CPUs.

    Args:
        device: any device.
        cpuinfo: the file in which Linux describes the CPU.
    """
    if device.type == "cuda":
        has_bfloat16 = torch.version.hip or torch.cuda.get_device_capability(device)[0] >= AMPERE
        return torch.bfloat16 if has_bfloat16 else torch.float16
    # torch emulates bfloat16 on CPUs that lack it, at half the speed of float32. Other kinds of device are unknown.
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bfloat16(cpuinfo) else torch.float32


def training_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Return the dtype of a training step's products: the named one, or for "auto" the device's `native_dtype`."""
    named = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return native_dtype(device) if precision == "auto" else named[precision]


def autocast(device: torch.device, dtype: torch.dtype | None = None) -> torch.autocast:
    """Return an autocast to `dtype`, by default the device's `native_dtype`; it is disabled for float32."""
    dtype = dtype or native_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@cache
def _cpu_has_bfloat16(cpuinfo: Path) -> bool:
    """Return whether Linux lists bfloat16 instructions; False without the file, as on other systems."""
    try:
        return not BFLOAT16_FLAGS.isdisjoint(cpuinfo.read_text().split())
    except OSError:
        return False
