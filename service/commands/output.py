"""Where the commands that measure a checkpoint write what they have found."""

import os
from pathlib import Path

from models.files.sources import bare_name
from service.errors import CommandError


def file_to_write(name: str, source: Path, *, output: Path | None = None, is_ours: bool = True) -> Path:
    """Choose the file for a checkpoint: neither the installed package nor a cache is ours to write to.

    Args:
        name: of the checkpoint, as it was given.
        source: where it was found.
        output: the file that was asked for.
        is_ours: whether the source is in our own format; another one is left as it is.

    Raises:
        CommandError: another file is there, or none can be written.
    """
    path = output or Path(name)
    if path != source and output is None:
        path = Path(f"{bare_name(name)}.safetensors")
    elif not is_ours or path.suffix != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")
    if path != source and path.exists():
        raise CommandError(f"{path}: would be overwritten")
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"{path.parent}: is not writable")
    return path
