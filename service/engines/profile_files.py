"""The files that keep latencies from one start to the next, one for each set of conditions, and locks beside them."""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel, Field, NonNegativeFloat, PositiveFloat

from models.files.atomic import write_atomically
from models.latency_estimate import Cell
from models.subnetwork import SubNetwork
from service.engines.profiler import Figures

logger = logging.getLogger(__name__)

FORMAT = 1
MAX_FILE_BYTES = 2**20  # of some hundred rows, 10 kB


class ProfileFile:
    """Where the latencies of a checkpoint on this machine are kept, and the locks beside it."""

    def __init__(
        self,
        folder: Path,
        checkpoint_version: str,
        engine: str,
        cells: Sequence[Cell],
        cpus: int | None = None,
    ) -> None:
        """Name the conditions; nothing is read yet.

        Args:
            folder: where the files are kept; made if there is none.
            checkpoint_version: of the weights.
            engine: its description of itself: library, device, precision, threads.
            cells: what is measured.
            cpus: how many this process may run on; counted by default.
        """
        self._conditions: dict[str, str | int] = {
            "format": FORMAT,
            "checkpoint_version": checkpoint_version,
            "engine": engine,
            "cpus": _num_cpus() if cpus is None else cpus,
        }
        self._cells = cells
        key = json.dumps([self._conditions, [(*astuple(subnetwork), batch_size) for subnetwork, batch_size in cells]])
        name = f"latency-{checkpoint_version}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
        self.path = folder / name
        self._claim = FileLock(self.path.with_suffix(".claim"), thread_local=False)
        self._known_version: tuple[int, int] | None = None

    @contextmanager
    def alone(self, is_stopping: Callable[[], bool]) -> Iterator[None]:
        """Let one process measure and the others wait: each would find the machine as slow as the others make it."""
        with ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(self.path.with_suffix(".lock")).acquire(cancel_check=is_stopping))
            except Timeout:
                logger.info("stopped while another process measured")
            except OSError as error:
                logger.warning("others may measure at the same time: %s", error)
            self._warn_of_others()
            yield

    def claim(self) -> bool:
        """Try to be the process that measures in idle moments; one that cannot keep anything measures for itself."""
        try:
            self._claim.acquire(blocking=False)
        except Timeout:
            return False
        except OSError:
            return True
        return True

    def release(self) -> None:
        """Let another process measure."""
        self._claim.release()

    def read(self) -> Figures | None:
        """Read what is kept, which may be a part; None where that is nothing, and with a warning where it is no use."""
        try:
            file = _File.model_validate_json(_read_regular(self.path))
            rows = {(SubNetwork(row.patch_grid, row.keep_rate), row.batch_size): row for row in file.rows}
            if file.conditions != self._conditions or not rows.keys() <= set(self._cells):
                raise ValueError("it was measured under other conditions")
            self._known_version = self._version()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s: cannot be used, measuring anew: %s", self.path, str(error).splitlines()[0])
            return None
        kept = [cell for cell in self._cells if cell in rows]
        seconds = {cell: rows[cell].median_ms / 1e3 for cell in kept}
        return Figures(seconds, {cell: rows[cell].spread for cell in kept}, file.measured_at)

    def read_if_changed(self) -> Figures | None:
        """Read what another process has written since the last look; None where that is nothing."""
        version = self._version()
        return None if version in (None, self._known_version) else self.read()

    def write(self, figures: Figures) -> None:
        """Write the file, for people too: a line for each row. Where that fails, the log says so."""
        rows = [
            _Cell(
                patch_grid=subnetwork.patch_grid,
                keep_rate=subnetwork.keep_rate,
                batch_size=batch_size,
                median_ms=round(1e3 * seconds, 4),
                spread=round(figures.spread[subnetwork, batch_size], 4),
            ).model_dump_json()
            for (subnetwork, batch_size), seconds in figures.seconds.items()
        ]
        measured_at = figures.measured_at.isoformat(timespec="seconds")
        head = json.dumps({"conditions": self._conditions, "measured_at": measured_at}, indent=2)
        text = head.removesuffix("\n}") + ',\n  "rows": [\n    ' + ",\n    ".join(rows) + "\n  ]\n}\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, text.encode())
            self._known_version = self._version()
        except OSError as error:
            logger.warning("the latencies cannot be kept: %s", error)

    def _version(self) -> tuple[int, int] | None:
        """Tell one file at the path from another."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _warn_of_others(self) -> None:
        """Say so where other users may write what this server believes."""
        folder = self.path.parent
        with suppress(OSError):  # to write there will fail, too, and say why
            found = folder.stat()
            if found.st_mode & stat.S_IWOTH or found.st_uid not in (0, os.geteuid()):
                logger.warning("%s: other users may write there, and with that decide what this server expects", folder)


class _Cell(BaseModel):
    patch_grid: int
    keep_rate: float
    batch_size: int
    median_ms: PositiveFloat = Field(allow_inf_nan=False)
    spread: NonNegativeFloat = Field(allow_inf_nan=False)


class _File(BaseModel):
    conditions: dict[str, str | int]
    measured_at: AwareDatetime
    rows: list[_Cell] = Field(min_length=1)


def _read_regular(path: Path) -> bytes:
    """Read a file that others may have put there: no link is followed, no pipe is waited for, no memory is filled.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, or too long.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor is no path
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it is longer than {MAX_FILE_BYTES} bytes")
    return content


def _num_cpus() -> int:
    """Count the CPUs that this process may run on, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
