"""Where a checkpoint comes from: a file, the name of one that ships, or a repository of the Hugging Face hub.

Finds files and opens none. The hub's client is imported only when a repository is named.
"""

import re
from pathlib import Path

from models.files.checkpoint_errors import UnreadableCheckpointError, prefixed_errors

SHIPPED_FOLDER = Path(__file__).parents[1] / "checkpoints"
SUFFIX = ".safetensors"

HUB_PREFIX = "hf-hub:"
_HUB_NAME = re.compile(r"hf-hub:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>.+))?", re.ASCII)
_URL = re.compile(r"[a-z][a-z0-9+.-]*:/", re.IGNORECASE)  # one slash, because a Path collapses two in a row
WHAT_IS_TAKEN = "a path, the name of a checkpoint that ships, or hf-hub:owner/name[@revision]"


def shipped_names() -> tuple[str, ...]:
    """Return the names of the checkpoints that ship with this package."""
    return tuple(sorted(path.stem for path in SHIPPED_FOLDER.glob(f"*{SUFFIX}")))


def find_checkpoint(name: str | Path) -> Path:
    """Find the file of a checkpoint, and download it if necessary.

    Args:
        name: a path, which takes precedence if it is a file; the name of a checkpoint that ships; or
            hf-hub:owner/name[@revision].

    Raises:
        UnreadableCheckpointError: there is no such file, or the hub does not provide it.
    """
    with prefixed_errors(name):
        return _find(str(name))


def bare_name(name: str) -> str:
    """Return the base name for a copy of a named checkpoint: without folder, owner and revision."""
    return name.partition("@")[0].rpartition("/")[2]


def _find(name: str) -> Path:
    path = Path(name)
    try:
        if path.is_file():
            return path
        exists = path.exists()
    except OSError as error:
        raise UnreadableCheckpointError(f"cannot be read: {error.strerror}") from error
    if name in shipped_names():
        return SHIPPED_FOLDER / f"{name}{SUFFIX}"
    if match := _HUB_NAME.fullmatch(name):
        from models.files.hub import download  # importing its client takes time

        return download(match["repository"], match["revision"])
    if name.startswith(HUB_PREFIX):
        raise UnreadableCheckpointError("a repository of the hub must be named hf-hub:owner/name[@revision]")
    if _URL.match(name):
        raise UnreadableCheckpointError(f"a URL is not supported; use {WHAT_IS_TAKEN}")
    if exists:
        raise UnreadableCheckpointError("not a regular file")
    is_bare = path.name == name and not path.suffix
    ships = f", and no checkpoint of that name ships; choose from {', '.join(shipped_names())}"
    raise UnreadableCheckpointError(f"no such file{ships if is_bare else ''}")
