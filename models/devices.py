"""Find the device to compute on by its name, and the precision in which it is fast. Moves no tensors."""

from functools import cache
from pathlib import Path

import torch

from models.errors import DeviceError

CPUINFO = Path("/proc/cpuinfo")
X86_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}  # as Linux and torch name them
BFLOAT16_FLAGS = X86_BFLOAT16_FLAGS | {"bf16"}  # Linux's name of Arm's
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
    if has_bfloat16(device, cpuinfo):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def has_bfloat16(device: torch.device, cpuinfo: Path = CPUINFO) -> bool:
    """Return whether the device computes in bfloat16; False for devices other than GPUs and CPUs.

    torch emulates bfloat16 on CPUs that lack it, at half the speed of float32.

    Args:
        device: any device.
        cpuinfo: the file in which Linux describes the CPU, for what torch does not report.
    """
    if device.type == "cuda":
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device)[0] >= AMPERE
    if device.type != "cpu":
        return False
    reported = cpu_capabilities()
    if X86_BFLOAT16_FLAGS & reported.keys():
        return any(reported.get(flag) for flag in X86_BFLOAT16_FLAGS)
    return not BFLOAT16_FLAGS.isdisjoint(_words_of(cpuinfo))


def cpu_capabilities() -> dict[str, object]:
    """Return torch's flags of the CPU, such as "avx512_bf16", and the CPU's name; empty where torch is too old."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def training_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Return the dtype of a training step's products: the named one, or for "auto" the device's `native_dtype`."""
    named = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return native_dtype(device) if precision == "auto" else named[precision]


def autocast(device: torch.device, dtype: torch.dtype | None = None) -> torch.autocast:
    """Return an autocast to `dtype`, by default the device's `native_dtype`; it is disabled for float32."""
    dtype = dtype or native_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@cache
def _words_of(cpuinfo: Path) -> frozenset[str]:
    """Return the words of the file, flags among them; none without the file, as on other systems."""
    try:
        return frozenset(cpuinfo.read_text().split())
    except OSError:
        return frozenset()
