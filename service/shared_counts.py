"""The folder in which the processes of one server keep their counts, so that each can answer for all of them."""

from contextlib import suppress
from pathlib import Path

from prometheus_client import multiprocess

# Where prometheus_client looks for the folder, the moment it is imported.
SHARED_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


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
