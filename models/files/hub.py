"""Checkpoints from repositories of the Hugging Face hub, cached where its own client caches them.

The client heeds HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE. Only safetensors files are loaded.
"""

import logging
import re
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from models.files.checkpoint_errors import UnreadableCheckpointError, printable_text

DEFAULT_REVISION, USUAL_FILE = "main", "model.safetensors"
TIMEOUT_S = 10.0
UNAUTHORIZED, FORBIDDEN = 401, 403
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The base class of the errors of the client's HTTP library, whichever that is, and OSError.
_TROUBLES = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
_FOREIGN_ANSWERS: tuple[type[Exception], ...] = (ValueError, LookupError, TypeError)  # from a server that is not a hub
_FAILURES = _TROUBLES + _FOREIGN_ANSWERS

logger = logging.getLogger(__name__)


def download(repository: str, revision: str | None = None) -> Path:
    """Download the weights of a repository, or find them in the cache: model.safetensors, or the only *.safetensors.

    For a commit, which never changes, a cached model.safetensors is taken at once. Anything else cached is taken only
    if the hub cannot be reached, denies access or knows no such repository.

    Args:
        repository: owner/name.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        UnreadableCheckpointError: the hub cannot be reached, denies access or knows no such repository, and the cache
            has no copy; or the repository has no such revision or file.
    """
    revision = revision or DEFAULT_REVISION
    cached = _find_cached(repository, revision) if _COMMIT.fullmatch(revision) else None
    if cached and cached.name == USUAL_FILE:  # with another one cached, the repository may still have that name
        return cached
    try:
        listing = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT_S)
        file_name = _choose([sibling.rfilename for sibling in listing.siblings or ()])
        return Path(hf_hub_download(repository, file_name, revision=revision))
    except RevisionNotFoundError as error:
        raise UnreadableCheckpointError(f"the repository has no revision {printable_text(revision)}") from error
    except HFValidationError as error:
        raise UnreadableCheckpointError("not a valid repository name") from error
    except _FAILURES as error:
        problem = _explain(error)
        if cached := _find_cached(repository, revision):
            if not isinstance(error, OfflineModeIsEnabled):  # offline mode is deliberate: no warning
                logger.warning("%s: %s; using the cached copy", repository, problem)
            return cached
        raise UnreadableCheckpointError(problem) from error


def _find_cached(repository: str, revision: str) -> Path | None:
    try:
        folder = Path(
            snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns="*.safetensors")
        )
        return folder / _choose([str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")])
    except (OSError, HFValidationError, UnreadableCheckpointError):
        return None


def _choose(files: list[str]) -> str:
    """Choose the file with the weights among the files of a repository.

    Raises:
        UnreadableCheckpointError: there is none, or there are several and none has the usual name.
    """
    weights = sorted(name for name in files if name.endswith(".safetensors"))
    if USUAL_FILE in weights:
        return USUAL_FILE
    if not weights:
        raise UnreadableCheckpointError("the repository holds no safetensors file")
    if len(weights) > 1:
        names = ", ".join(map(printable_text, weights[:3])) + (" and more" if len(weights) > 3 else "")
        raise UnreadableCheckpointError(
            f"the repository holds several safetensors files, none named {USUAL_FILE}: {names}"
        )
    return weights[0]


def _explain(error: BaseException) -> str:
    """Describe in our own words why the hub gave no file."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        return "the repository is gated: request access on its page, and set HF_TOKEN to a token of that account"
    if isinstance(error, RepositoryNotFoundError) and status not in (UNAUTHORIZED, FORBIDDEN):
        return "the repository does not exist, or the token may not read it"
    if isinstance(error, RepositoryNotFoundError):  # the hub does not say which without a valid token
        return "the repository does not exist or is private: set HF_TOKEN to a token that may read it"
    if status in (UNAUTHORIZED, FORBIDDEN):
        return "the hub rejected the token: set HF_TOKEN to one that may read the repository"
    if status is not None:
        return f"the hub answered with status {status}"
    if isinstance(error, OfflineModeIsEnabled):
        return "not in the cache, and HF_HUB_OFFLINE is set"
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:  # the client wraps the cause
        return _explain(error.__cause__)
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        return f"cannot be written to the cache: {error.strerror}"
    if isinstance(error, _TROUBLES) and not isinstance(error, FileMetadataError):
        return "the hub cannot be reached: no network, or a wrong HF_ENDPOINT"
    return "the server is not a Hugging Face hub; check HF_ENDPOINT"
