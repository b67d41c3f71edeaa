"""Chooses the engine that serves a model on a device, its precision and its number of threads."""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from models.checkpoint import Checkpoint
from models.devices import cpu_capabilities, resolve_device
from models.errors import DeviceError
from models.quantization import BlockRanges
from models.subnetwork import SubNetwork
from models.supervit import SuperViT
from service.engines.base import Engine
from service.engines.openvino_engine import OpenVINOEngine, has_bfloat16
from service.engines.openvino_products import integer_products
from service.engines.torch_engine import TorchEngine
from service.settings import EngineKind, Precision

Compiled = Callable[[Callable[[bytes], Any]], Iterable[Any]]

logger = logging.getLogger(__name__)

SMALL_GFLOPS = 0.3
FUSES = "the OpenVINO engine does not support models that fuse pruned tokens; use the torch engine"
NO_INSTRUCTIONS = "this CPU has neither AVX2 nor VNNI"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine that an operator chose.

    Attributes:
        kind: kind of engine; "auto" is OpenVINO on a CPU and PyTorch on a GPU.
        device: a torch device, or "auto" for the first GPU where there is one.
        precision: "auto" is 8 bits where the checkpoint is prepared for them and OpenVINO serves it on a CPU that gains
            from them, except for sub-networks that lose more than TOLERATED_LOSS; elsewhere the engine's fastest
            precision.
        threads: number of threads of the engine, on a CPU.
    """

    kind: EngineKind
    device: str
    precision: Precision
    threads: int


def open_engine(
    checkpoint: Checkpoint,
    choice: EngineChoice,
    capabilities: Mapping[str, object] | None = None,
    compiled: Compiled | None = None,
) -> tuple[Engine, Checkpoint]:
    """Build the chosen engine, and return it with the checkpoint as it is served.

    Args:
        checkpoint: the checkpoint whose model runs.
        choice: the engine.
        capabilities: CPU capabilities under torch's names; by default what torch reports.
        compiled: reads what OpenVINO's engine of these arguments exports; called only if that is the engine.

    Returns:
        The engine, and the checkpoint with the profile of what is served.

    Raises:
        DeviceError: there is no such device here, or the device or the engine cannot do what was asked for.
    """
    int8, problem = checkpoint.int8, _problem_of_int8(checkpoint, choice, capabilities or cpu_capabilities())
    if choice.precision == "int8" and problem is not None:
        raise DeviceError(f"precision int8 is not available: {problem}")
    if choice.precision in ("float32", "bfloat16") or int8 is None or problem is not None:
        return make_engine(checkpoint.model, choice, compiled), checkpoint
    floating = int8.too_lossy(checkpoint.profile) if choice.precision == "auto" else []
    if floating:
        lossy = ", ".join(map(str, floating))
        logger.info("int8 would lose too much top-1 accuracy at %s; use --precision int8 to override", lossy)
    if set(floating) >= set(checkpoint.config.subnetworks):
        return make_engine(checkpoint.model, choice, compiled), checkpoint
    engine = int8_engine(checkpoint.model, int8.ranges, choice.threads, floating, compiled)
    return engine, replace(checkpoint, profile=int8.profile_with(checkpoint.profile, floating, checkpoint.config))


def int8_engine(
    model: SuperViT,
    ranges: Sequence[BlockRanges],
    threads: int,
    in_floating_point: Collection[SubNetwork] = (),
    compiled: Compiled | None = None,
) -> OpenVINOEngine:
    """Build the engine that computes products in 8 bits, except for the sub-networks `in_floating_point`.

    Raises:
        DeviceError: this CPU has no instructions for products in 8 bits, or OpenVINO cannot run the model.
    """
    products = integer_products(ranges, cpu_capabilities())
    if products is None:
        raise DeviceError(NO_INSTRUCTIONS)
    if model.config.fuse_pruned:
        raise DeviceError(FUSES)
    return OpenVINOEngine(model, threads, products=products, in_floating_point=in_floating_point, compiled=compiled)


def make_engine(model: SuperViT, choice: EngineChoice, compiled: Compiled | None = None) -> Engine:
    """Build an engine in floating point: by default OpenVINO on a CPU and PyTorch on a GPU, in its fastest precision.

    Args:
        model: in eval mode, on the CPU.
        choice: the engine; its precision is not "int8".
        compiled: as in `open_engine`.

    Raises:
        DeviceError: there is no such device here, the engine cannot use it, or the device lacks the precision.
    """
    is_cpu = resolve_device(choice.device).type == "cpu"
    if choice.kind == "openvino" and not is_cpu:
        raise DeviceError(f"device {choice.device!r} cannot be used: the OpenVINO engine runs only on the CPU")
    if choice.kind == "openvino" and model.config.fuse_pruned:
        raise DeviceError(FUSES)
    precision = None if choice.precision == "auto" or choice.precision == "int8" else choice.precision
    if _is_openvino(model, choice):
        if precision == "bfloat16" and not has_bfloat16():
            raise DeviceError("precision bfloat16 is not available: this CPU has no instructions for it")
        return OpenVINOEngine(model, choice.threads, precision, compiled=compiled)
    return TorchEngine(model, choice.device, choice.threads, precision)


def engine_threads(checkpoint: Checkpoint, cores: float) -> int:
    """Return the default number of threads of the engine: one for each core that this process may use.

    For a model so small that HTTP takes more of a request than inference does, one core is left to HTTP. On two cores
    the small checkpoint then answered 85 % in time at a load at which it had answered 63 %, one run of 6 s each.
    """
    whole = math.ceil(cores)
    largest = checkpoint.profile.by_subnetwork[checkpoint.config.largest]
    return max(1, whole - 1) if largest.gflops < SMALL_GFLOPS else whole


def _is_openvino(model: SuperViT, choice: EngineChoice) -> bool:
    is_cpu = resolve_device(choice.device).type == "cpu"
    return choice.kind == "openvino" or (choice.kind == "auto" and is_cpu and not model.config.fuse_pruned)


def _problem_of_int8(checkpoint: Checkpoint, choice: EngineChoice, capabilities: Mapping[str, object]) -> str | None:
    """Return why a checkpoint cannot be served in 8 bits; None where it can."""
    if resolve_device(choice.device).type != "cpu" or not _is_openvino(checkpoint.model, choice):
        return "it requires the OpenVINO engine on a CPU"
    if checkpoint.int8 is None:
        return "the checkpoint is not prepared for it; run `supervit quantize`"
    return None if integer_products(checkpoint.int8.ranges, capabilities) else NO_INSTRUCTIONS
