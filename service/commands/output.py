"""Chooses the file that the commands that measure a checkpoint write their results to."""

import os
from pathlib import Path

from models.checkpoint import Checkpoint, digest
from models.files.sources import bare_name
from service.errors import CommandError


def output_path(name: str, source: Path, *, is_ours: bool, output: Path | None = None) -> Path:
    """Choose the file to write a checkpoint to.

    A checkpoint found by name lies in the installed package or in a cache, which are not ours to write to: its results
    go into a new file in the current folder.

    Args:
        name: the checkpoint as it was given on the command line.
        source: the file where it was found.
        is_ours: whether the source is in our own format; a file in another format is not overwritten.
        output: the file that was asked for, if any.

    Raises:
        CommandError: another file of that name exists, or its folder is not writable.
    """
    path = output or Path(name)
    if path != source and output is None:
        path = Path(f"{bare_name(name)}.safetensors")
    elif not is_ours or path.suffix != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")
    if path != source and path.exists():
        raise CommandError(f"{path}: already exists and is not overwritten")
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"{path.parent}: is not writable")
    return path


def check_unchanged(path: Path, checkpoint: Checkpoint) -> None:
    """Check that a file which is about to be overwritten is, if it was measured, still what was measured.

    Raises:
        CommandError: it has been replaced, as a running training does after every epoch.
    """
    if path == checkpoint.path and digest(path) != checkpoint.version:
        raise CommandError(f"{path}: was replaced while it was measured, and stays as it is now; measure it again")
