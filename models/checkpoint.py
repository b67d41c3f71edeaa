"""Weights and all that belongs to them in one file: our own format out and in, the published layouts in.

Nothing in a file is ever executed, and whatever is wrong with one is a CheckpointError that names the file.
"""

import argparse
import hashlib
import os
import pickle
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.flops import count_macs
from models.profiles import ProfileTable
from models.published import describe_published
from models.subnetwork import SuperViTConfig
from models.supervit import SuperViT

HEADER_KEY = "supervit"
NAMES_SHOWN = 4

# What torch.load was seen to raise, or may raise, over bytes that are damaged or were never a checkpoint.
UNPICKLING_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.PickleError,
    struct.error,
)


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message names the file and what is wrong with it."""


class UnreadableCheckpointError(CheckpointError):
    """The file is missing, truncated, or no checkpoint at all."""


class CheckpointMismatchError(CheckpointError):
    """The file holds weights, but not those of the model that it claims to be."""


@dataclass(frozen=True, slots=True)
class Header:
    """What our own format says of its weights."""

    name: str
    config: SuperViTConfig
    class_names: tuple[str, ...]
    profile: ProfileTable

    def __post_init__(self) -> None:
        if len(self.class_names) != self.config.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.config.num_classes} classes")
        missing = set(self.config.subnetworks) - self.profile.by_subnetwork.keys()
        if missing:
            raise ValueError(f"the profile lacks {min(missing)}")
        strange = {row.subnetwork.patch_grid for row in self.profile.rows} - set(self.config.patch_grids)
        if strange:
            raise ValueError(f"the profile has grid {min(strange)}, which was not trained")
        for row in self.profile.rows:
            if row.is_trained != (row.subnetwork in self.config.subnetworks):
                raise ValueError(f"the profile is wrong about whether {row.subnetwork} was trained")


_HEADER = TypeAdapter(Header)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        name: what the model is called.
        version: first 12 hex digits of the file's SHA-256, so that two files never pass for one another.
        model: in eval mode, float32, on the CPU.
        config: the architecture, its family and its preprocessing.
        class_names: one per logit.
        profile: cost and, where known, accuracy of each sub-network.
        is_ours: whether the file is in our own format.
    """

    name: str
    version: str
    model: SuperViT
    config: SuperViTConfig
    class_names: tuple[str, ...]
    profile: ProfileTable
    is_ours: bool = True


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Load our own format, or a published DeiT-S or LV-ViT-S SuperViT checkpoint as it was released.

    Raises:
        UnreadableCheckpointError: there is no such file, it is cut short, it is no checkpoint, or its costs are wrong.
        CheckpointMismatchError: weights are missing, unexpected, misshapen, mistyped or not finite.
    """
    path = Path(path)
    weights, text = _read(path)
    header = Header(*describe_published(weights)) if text is None else _own_header(path, text, len(weights))
    model = _blank_model(path, header.config)
    _check_weights(path, weights, model.state_dict())
    wrong = [row for row in header.profile.rows if row.macs != count_macs(header.config, row.subnetwork)]
    if wrong:
        raise UnreadableCheckpointError(f"{path}: {wrong[0].macs} MACs are not the cost of {wrong[0].subnetwork}")
    model.load_state_dict(weights, assign=True)
    return Checkpoint(
        header.name,
        digest(path),
        model.eval(),
        header.config,
        header.class_names,
        header.profile,
        is_ours=text is not None,
    )


def save_checkpoint(path: Path, model: SuperViT, header: Header) -> None:
    """Write `model` in our own format; a crash half-way leaves whatever stood at `path`."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    partial = path.with_name(path.name + ".partial")
    # Not save_file: it would leave a file that nobody but its owner may read, and so no server under another user.
    partial.write_bytes(safetensors.torch.save(weights, {HEADER_KEY: _HEADER.dump_json(header).decode()}))
    os.replace(partial, path)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of any layout that `load_checkpoint` reads, or of a plain state dict, unchecked, in float32.

    Raises:
        UnreadableCheckpointError: as for `load_checkpoint`.
    """
    return _read(Path(path))[0]


def read_described_weights(path: Path) -> tuple[dict[str, Tensor], Header | None]:
    """Read weights as `read_weights` does, with what our own format says of them; None for any other.

    Raises:
        CheckpointError: as for `load_checkpoint`, but for what the weights are.
    """
    weights, text = _read(path)
    return weights, None if text is None else _own_header(path, text, len(weights))


def _read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        if not path.is_file():
            raise UnreadableCheckpointError(f"{path}: {'no regular' if path.exists() else 'no such'} file")
        with path.open("rb") as file:
            start = file.read(9)
        # A safetensors file opens with the length of its JSON header, eight bytes, and then the header itself.
        weights, header = _read_safetensors(path) if start[8:] == b"{" else (_read_pickle(path), None)
        return {
            name.removeprefix("module."): tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in weights.items()
        }, header
    except (OSError, RuntimeError) as error:  # torch says with the latter that it cannot convert a weight
        raise UnreadableCheckpointError(f"{path}: cannot be read: {error}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER_KEY)
            # Copies: as they come, tensors are windows into the file, and whoever writes over it would change a model.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, header  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UnreadableCheckpointError(f"{path}: truncated or not a safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # The published files keep their options in a Namespace. A path would let torch judge the file by its suffix.
        # Whatever torch would warn of, such as a strange protocol, ends below in an error or in weights that are fine.
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(action="ignore"),
            path.open("rb") as file,
        ):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except UNPICKLING_ERRORS as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UnreadableCheckpointError(f"{path}: truncated, unsafe or not a checkpoint: {reason}") from error
    # The published scripts evaluate 'state_dict_ema' (LV-ViT-S) and 'model' (DeiT-S, beside a 'model_ema').
    if isinstance(content, dict):
        for key in ("state_dict_ema", "state_dict", "model"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    if not isinstance(content, dict) or not content:
        raise UnreadableCheckpointError(f"{path}: holds {type(content).__name__}, not a state dict")
    strange = [name for name, value in content.items() if not (isinstance(name, str) and _is_plain_tensor(value))]
    if strange:
        raise UnreadableCheckpointError(f"{path}: not a state dict: {strange[0]!r} is no weight")
    return content


def _is_plain_tensor(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_nested)
    )


def _own_header(path: Path, header_json: str, num_weights: int) -> Header:
    try:
        header = _HEADER.validate_json(header_json)
    except ValidationError as error:
        raise UnreadableCheckpointError(f"{path}: its header is not ours: {_first_problem(error)}") from error
    if header.config.depth > num_weights:  # building that many blocks might never end
        raise CheckpointMismatchError(f"{path}: {num_weights} weights are too few for {header.config.depth} blocks")
    return header


def _blank_model(path: Path, config: SuperViTConfig) -> SuperViT:
    """Build the model without memory for its weights."""
    try:
        with torch.device("meta"):
            return SuperViT(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointMismatchError(f"{path}: its header asks for weights of impossible size") from error


def _check_weights(path: Path, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    shared = [name for name in expected if name in weights]
    fitting = [name for name in shared if weights[name].shape == expected[name].shape]
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "misshapen": [
            f"{name} is {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in shared
            if name not in fitting
        ],
        "mistyped": [
            f"{name} is {weights[name].dtype} instead of {expected[name].dtype}"
            for name in fitting
            if weights[name].is_floating_point() != expected[name].is_floating_point()
        ],
        "not finite": [name for name in fitting if not weights[name].isfinite().all()],
    }
    found = [f"{_count(names, 'weight')} {problem}: {_some(names)}" for problem, names in problems.items() if names]
    if found:
        raise CheckpointMismatchError(f"{path}: {'; '.join(found)}")


def _count(items: list[str], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _some(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else problem["msg"]


def digest(path: Path) -> str:
    """Tell files apart: the first 12 hex digits of the SHA-256 of what is in one."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
