"""Save and load checkpoints: weights and their header in one file, in our own format; published layouts are read only.

Nothing in a file is ever executed. Whatever is wrong with a file is raised as a CheckpointError that names the file.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from models.files.checkpoint_errors import (
    CheckpointMismatchError,
    UnreadableCheckpointError,
    prefixed_errors,
    printable_text,
)
from models.files.safetensors_files import is_safetensors, read_safetensors, write_safetensors
from models.files.sources import find_checkpoint
from models.files.torch_files import read_torch_file
from models.flops import count_macs
from models.header import Header
from models.profiles import ProfileTable
from models.published import describe_published, is_plain_vit
from models.quantization import Quantization
from models.subnetwork import SuperViTConfig
from models.supervit import SuperViT

HEADER_KEY = "supervit"
NAMES_SHOWN = 4
STATISTICS = (".running_mean", ".running_var")
SMALLEST_NORMAL_HALF, LARGEST_HALF = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max


_HEADER = TypeAdapter(Header)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        name: the model's name.
        version: first 12 hex digits of the file's SHA-256, so that different files have different versions.
        model: the network, in eval mode, in float32, on the CPU.
        config: the architecture, its family and its preprocessing.
        class_names: one per logit.
        profile: cost and, where known, accuracy of each sub-network.
        is_ours: whether the file is in our own format.
        is_half: whether the file holds its weights in half precision.
        int8: what the model needs to run in 8 bits; None where the checkpoint is not quantised.
        path: the file; None for a model that was not loaded from one.
    """

    name: str
    version: str
    model: SuperViT
    config: SuperViTConfig
    class_names: tuple[str, ...]
    profile: ProfileTable
    is_ours: bool = True
    is_half: bool = False
    int8: Quantization | None = None
    path: Path | None = None


def load_checkpoint(name: str | Path) -> Checkpoint:
    """Load a checkpoint in our own format, or a published DeiT-S or LV-ViT-S SuperViT checkpoint as it was released.

    Args:
        name: a path or a name, as `find_checkpoint` takes it.

    Raises:
        UnreadableCheckpointError: the file does not exist, is truncated or is not a checkpoint, or its header states
            wrong MACs.
        CheckpointMismatchError: weights are missing, unexpected, misshapen, mistyped or not finite, or are those of a
            plain ViT.
    """
    path = find_checkpoint(name)
    with prefixed_errors(name):
        version = _version(path)  # first, so that a file replaced during the read differs from this version
        stored, own_header = _read(path)
        weights = _in_float32(stored)
        if own_header is None and is_plain_vit(weights):
            raise CheckpointMismatchError("is a plain ViT: run `supervit convert` to make a SuperViT of it")
        header = describe_published(weights) if own_header is None else _own_header(own_header, len(weights))
        model = _blank_model(header.config)
        check_weights(weights, model.state_dict())
        rows = (*header.profile.rows, *(header.int8.profile.rows if header.int8 else ()))
        wrong = [row for row in rows if row.macs != count_macs(header.config, row.subnetwork)]
        if wrong:
            raise UnreadableCheckpointError(f"its header has wrong MACs for {wrong[0].subnetwork}: {wrong[0].macs}")
    model.load_state_dict(weights, assign=True)
    return Checkpoint(
        header.name,
        version,
        model.eval(),
        header.config,
        header.class_names,
        header.profile,
        is_ours=own_header is not None,
        is_half=_is_half(stored, weights),
        int8=header.int8,
        path=path,
    )


def save_checkpoint(path: Path, model: SuperViT, header: Header, *, half: bool = False) -> None:
    """Write `model` in our own format; a crash half-way leaves the file at `path` as it was.

    Args:
        path: the file to write.
        model: the model whose weights are written.
        header: the description written with the weights.
        half: whether to round weights to float16, which halves the size. Weights loaded from such a file are written as
            they were; batch norm's statistics, and weights beyond the range of float16, stay in float32.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if half:
        weights = {name: tensor.half() if _fits_half(name, tensor) else tensor for name, tensor in weights.items()}
    write_safetensors(path, weights, {HEADER_KEY: _HEADER.dump_json(header).decode()})


def round_to_half(model: SuperViT) -> None:
    """Round the weights of `model` in place, as `save_checkpoint` does where `half` is set."""
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if _fits_half(name, weight):
                weight.copy_(weight.half())


def read_weights(name: str | Path) -> dict[str, Tensor]:
    """Read the weights of any layout that `load_checkpoint` reads, or of a plain state dict, unchecked, in float32.

    Raises:
        UnreadableCheckpointError: as for `load_checkpoint`.
    """
    path = find_checkpoint(name)
    with prefixed_errors(name):
        return _in_float32(_read(path)[0])


def read_described_weights(name: str | Path) -> tuple[dict[str, Tensor], Header | None]:
    """Read weights as `read_weights` does, together with the header of our own format; None for any other format.

    Raises:
        CheckpointError: as for `load_checkpoint`, except that the weights are not compared with a model's.
    """
    path = find_checkpoint(name)
    with prefixed_errors(name):
        weights, header = _read(path)
        return _in_float32(weights), None if header is None else _own_header(header, len(weights))


def _read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Read the weights of a file, in the precision in which they are stored, and our header if the file has one."""
    try:
        weights, metadata = read_safetensors(path) if is_safetensors(path) else (read_torch_file(path), {})
    except OSError as error:
        raise UnreadableCheckpointError(f"cannot be read: {error.strerror}") from error
    return {name.removeprefix("module."): weight for name, weight in weights.items()}, metadata.get(HEADER_KEY)


def _version(path: Path) -> str:
    try:
        return digest(path)
    except OSError as error:
        raise UnreadableCheckpointError(f"cannot be read: {error.strerror}") from error


def _in_float32(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for name, weight in weights.items():
        try:
            converted[name] = weight.float() if weight.is_floating_point() else weight
        except RuntimeError as error:
            raise UnreadableCheckpointError(f"the weight {printable_text(name)} has an unsupported dtype") from error
    return converted


def _fits_half(name: str, weight: Tensor) -> bool:
    """Return whether a weight may be stored in float16: no statistic, and neither overflows nor vanishes as a whole."""
    if not weight.is_floating_point() or name.endswith(STATISTICS):
        return False
    largest = weight.abs().amax().item() if weight.numel() else 0.0
    return largest == 0 or SMALLEST_NORMAL_HALF <= largest <= LARGEST_HALF


def _is_half(stored: dict[str, Tensor], weights: dict[str, Tensor]) -> bool:
    """Return whether writing the weights in half precision writes them as they were stored."""
    halves = {name for name, weight in stored.items() if weight.dtype == torch.float16}
    return bool(halves) and not any(_fits_half(name, weights[name]) for name in weights.keys() - halves)


def _own_header(header_json: str, num_weights: int) -> Header:
    try:
        header = _HEADER.validate_json(header_json)
    except ValidationError as error:
        raise UnreadableCheckpointError(f"invalid SuperViT header: {_first_problem(error)}") from error
    except ArithmeticError as error:  # an integer too large to compute with
        raise UnreadableCheckpointError("invalid SuperViT header: a number is out of range") from error
    if header.config.depth > num_weights:  # building so many blocks might never end
        raise CheckpointMismatchError(f"{num_weights} weights are too few for {header.config.depth} blocks")
    return header


def _blank_model(config: SuperViTConfig) -> SuperViT:
    """Build the model on the meta device, without memory for its weights."""
    try:
        with torch.device("meta"):
            return SuperViT(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointMismatchError("invalid SuperViT header: its weights would be too large") from error


def check_weights(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare weights with the state dict that a model expects.

    Raises:
        CheckpointMismatchError: weights are missing, unexpected, misshapen, mistyped or not finite; the message names
            the first few.
    """
    shared = [name for name in expected if name in weights]
    fitting = [name for name in shared if weights[name].shape == expected[name].shape]
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [printable_text(name) for name in weights if name not in expected],
        "with the wrong shape": [
            f"{name} is {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in shared
            if name not in fitting
        ],
        "with the wrong dtype": [
            f"{name} is {weights[name].dtype} instead of {expected[name].dtype}"
            for name in fitting
            if weights[name].is_floating_point() != expected[name].is_floating_point()
        ],
        "not finite": [name for name in fitting if not _is_finite(weights[name])],
    }
    found = [f"{_count(names, 'weight')} {problem}: {_some(names)}" for problem, names in problems.items() if names]
    if found:
        raise CheckpointMismatchError("; ".join(found))


def _is_finite(weight: Tensor) -> bool:
    """Return whether all values are finite, by their minimum and maximum: a mask of all takes ten times as long."""
    if not weight.is_floating_point() or not weight.numel():
        return True
    return all(bound.isfinite() for bound in weight.aminmax())


def _count(items: list[str], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _some(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _first_problem(error: ValidationError) -> str:
    """Describe in our own words the first problem that pydantic found."""
    problem = error.errors(include_url=False)[0]
    where, value = printable_text(".".join(map(str, problem["loc"]))), printable_text(repr(problem["input"]))
    match problem["type"]:
        case "value_error":  # raised by one of our own dataclasses
            return str(problem["ctx"]["error"])
        case "json_invalid":
            return "not valid JSON"
        case "missing":
            return f"{where} is missing"
    return f"invalid value {value}" + (f" for {where}" if where else "")


def digest(path: Path) -> str:
    """Return the first 12 hex digits of the SHA-256 of a file's content, which tell files apart."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
