"""The folder in which the processes of one server keep their metrics, so that each can report those of all."""

from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, multiprocess

from service.errors import InvalidParameterError

# Variable from which prometheus_client reads the folder when it is imported.
SHARED_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def make_folder(folder: str) -> None:
    """Create the folder if it does not exist.

    Raises:
        InvalidParameterError: it cannot be created, or its name is empty: metrics would go to the working directory.
    """
    if not folder:
        raise InvalidParameterError(f"{SHARED_FOLDER_VARIABLE} is set but empty; it must name a folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidParameterError(f"{SHARED_FOLDER_VARIABLE}: {folder}: {error.strerror}") from error


def forget_worker(pid: int, folder: str) -> None:
    """Remove the live gauges of a worker that has ended; its counters and histograms are kept."""
    multiprocess.mark_process_dead(pid, folder)  # type: ignore[no-untyped-call] # it has no annotations


def forget_dead(folder: str) -> None:
    """Remove the live gauges of processes that have ended without a call of `forget_worker`."""
    pids = {path.stem.rpartition("_")[2] for path in Path(folder).glob("gauge_live*.db")}
    for pid in pids:
        if not Path("/proc", pid).exists():
            with suppress(FileNotFoundError):  # another process does the same
                forget_worker(int(pid), folder)


def merged_registry(folder: str) -> CollectorRegistry:
    """Return the merged metrics of all running processes of a folder, and the counts of those that have ended."""
    forget_dead(folder)
    merged = CollectorRegistry()
    multiprocess.MultiProcessCollector(merged, folder)  # type: ignore[no-untyped-call] # as above
    return merged
