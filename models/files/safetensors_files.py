"""Safetensors files: eight bytes with the length of the header, the header in JSON, and the weights."""

import json
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.files.atomic import write_atomically
from models.files.checkpoint_errors import UnreadableCheckpointError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 4 * 2**20  # thousands of weights and classes take a few hundred kilobytes


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors files do, and no other file with weights."""
    with path.open("rb") as file:
        return file.read(LENGTH_BYTES + 1)[LENGTH_BYTES:] == b"{"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the weights of a file and the metadata strings stored with them.

    Raises:
        UnreadableCheckpointError: the file is truncated or damaged.
    """
    _check_lengths(path)
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned: the tensors map the file, so overwriting the file would change a loaded model.
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
            return weights, file.metadata() or {}
    except (SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UnreadableCheckpointError("its header is damaged") from error


def write_safetensors(path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write weights and metadata strings; a crash half-way leaves the file at `path` as it was."""
    # Not save_file: it writes a file that only its owner may read, which a server under another user could not load.
    write_atomically(path, safetensors.torch.save(weights, metadata))


def _check_lengths(path: Path) -> None:
    """Compare the lengths that the header states with the size of the file, before memory is allocated.

    Raises:
        UnreadableCheckpointError: the file is shorter than its header states, or the header is too large or cannot be
            read.
    """
    with path.open("rb") as file:
        rest = path.stat().st_size - LENGTH_BYTES
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > rest:
            raise UnreadableCheckpointError(f"truncated: a header of {length} bytes in a file of {rest + LENGTH_BYTES}")
        if length > MAX_HEADER_BYTES:
            raise UnreadableCheckpointError(f"its header is too large: {length} bytes")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            missing = max(ends, default=0) - (rest - length)
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise UnreadableCheckpointError("its header is damaged") from error
    if missing > 0:
        raise UnreadableCheckpointError(f"truncated: {missing} bytes of its weights are missing")
