"""The folder in which the processes of one server keep their counts, so that each can answer for all of them."""

from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, multiprocess

from service.errors import InvalidParameterError

# Where prometheus_client looks for the folder, the moment it is imported.
SHARED_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def make_folder(folder: str) -> None:
    """Make the folder, if there is none.

    Raises:
        InvalidParameterError: there can be none, or it has no name: the counts would go to the working directory.
    """
    if not folder:
        raise InvalidParameterError(f"{SHARED_FOLDER_VARIABLE} is set and names no folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidParameterError(f"{SHARED_FOLDER_VARIABLE}: {folder}: {error.strerror}") from error


def forget_worker(pid: int, folder: str) -> None:
    """Forget what a worker that has ended last said of itself; what it counted stays counted."""
    multiprocess.mark_process_dead(pid, folder)  # type: ignore[no-untyped-call] # it has no annotations


def forget_dead(folder: str) -> None:
    """Forget what processes that have ended without a word last said of themselves."""
    pids = {path.stem.rpartition("_")[2] for path in Path(folder).glob("gauge_live*.db")}
    for pid in pids:
        if not Path("/proc", pid).exists():
            with suppress(FileNotFoundError):  # another process does the same
                forget_worker(int(pid), folder)


def merged_registry(folder: str) -> CollectorRegistry:
    """Read the counts of all processes of a folder that still run, and what the others have counted."""
    forget_dead(folder)
    merged = CollectorRegistry()
    multiprocess.MultiProcessCollector(merged, folder)  # type: ignore[no-untyped-call] # as above
    return merged
