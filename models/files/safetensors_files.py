"""Safetensors files: eight bytes that say how long the header is, the header in JSON, and the weights."""

import json
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.files.atomic import write_atomically
from models.files.checkpoint_errors import UnreadableCheckpointError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 4 * 2**20  # of thousands of weights and classes, a few hundred kilobytes


def is_safetensors(path: Path) -> bool:
    """Tell whether a file begins as these do, and no other that holds weights."""
    with path.open("rb") as file:
        return file.read(LENGTH_BYTES + 1)[LENGTH_BYTES:] == b"{"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the weights of a file and the strings that its writer kept beside them.

    Raises:
        UnreadableCheckpointError: the file is truncated or damaged.
    """
    _check_lengths(path)
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: as they come, tensors are windows into the file, and whoever writes over it would change a model.
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
            return weights, file.metadata() or {}
    except (SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UnreadableCheckpointError("its header is damaged") from error


def write_safetensors(path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write weights, and strings beside them; a crash half-way leaves whatever stood at `path`."""
    # Not save_file: it would leave a file that only its owner may read, and so no server under another user.
    write_atomically(path, safetensors.torch.save(weights, metadata))


def _check_lengths(path: Path) -> None:
    """Hold what the header says against the length of the file, before memory is taken.

    Raises:
        UnreadableCheckpointError: there is less than it says, or the header cannot be read.
    """
    with path.open("rb") as file:
        rest = path.stat().st_size - LENGTH_BYTES
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > rest:
            raise UnreadableCheckpointError(f"truncated: a header of {length} bytes in a file of {rest + LENGTH_BYTES}")
        if length > MAX_HEADER_BYTES:
            raise UnreadableCheckpointError(f"its header is of absurd size: {length} bytes")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            missing = max(ends, default=0) - (rest - length)
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise UnreadableCheckpointError("its header is damaged") from error
    if missing > 0:
        raise UnreadableCheckpointError(f"truncated: {missing} bytes of its weights are missing")
