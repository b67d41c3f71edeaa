"""The files that keep latencies from one start to the next, one for each set of conditions, and their lock files."""

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

from models.defaults import count_cores
from models.files.atomic import write_atomically
from models.latency_estimate import Cell
from models.subnetwork import SubNetwork
from service.engines.profiler import Figures

logger = logging.getLogger(__name__)

FORMAT = 1
MAX_FILE_BYTES = 2**20  # some hundred rows take 10 kB


class ProfileFile:
    """The file that keeps the latencies of a checkpoint on this machine, and its locks."""

    def __init__(
        self,
        folder: Path,
        checkpoint_version: str,
        engine: str,
        cells: Sequence[Cell],
        cpus: int | None = None,
    ) -> None:
        """Create for a set of conditions; nothing is read yet.

        Args:
            folder: where the files are kept; created if missing.
            checkpoint_version: version of the weights.
            engine: the engine's description of itself: library, device, precision, threads.
            cells: the cells to measure.
            cpus: number of CPUs that this process may run on; counted by default.
        """
        self._conditions: dict[str, str | int] = {
            "format": FORMAT,
            "checkpoint_version": checkpoint_version,
            "engine": engine,
            "cpus": count_cores() if cpus is None else cpus,
        }
        self._cells = cells
        key = json.dumps([self._conditions, [(*astuple(subnetwork), batch_size) for subnetwork, batch_size in cells]])
        name = f"latency-{checkpoint_version}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
        self.path = folder / name
        self._claim = FileLock(self.path.with_suffix(".claim"), thread_local=False)
        self._known_version: tuple[int, int] | None = None

    @contextmanager
    def alone(self, is_stopping: Callable[[], bool]) -> Iterator[None]:
        """Let one process measure while the others wait: measuring together, they would slow each other down."""
        with ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(self.path.with_suffix(".lock")).acquire(cancel_check=is_stopping))
            except Timeout:
                logger.info("stopped while waiting for another process to measure")
            except OSError as error:
                logger.warning("another process may measure at the same time: %s", error)
            self._warn_of_others()
            yield

    def claim(self) -> bool:
        """Try to become the process that measures in idle moments; without a lock file, each measures for itself."""
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
        """Read the stored figures, perhaps a part; None where there is no file, or with a warning an unusable one."""
        try:
            file = _File.model_validate_json(_read_regular(self.path))
            rows = {(SubNetwork(row.patch_grid, row.keep_rate), row.batch_size): row for row in file.rows}
            if file.conditions != self._conditions or not rows.keys() <= set(self._cells):
                raise ValueError("it was measured under different conditions")
            self._known_version = self._version()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s: cannot be used, measuring again: %s", self.path, str(error).splitlines()[0])
            return None
        kept = [cell for cell in self._cells if cell in rows]
        seconds = {cell: rows[cell].median_ms / 1e3 for cell in kept}
        return Figures(seconds, {cell: rows[cell].spread for cell in kept}, file.measured_at)

    def read_if_changed(self) -> Figures | None:
        """Read what another process has written since the last read; None where that is nothing."""
        version = self._version()
        return None if version in (None, self._known_version) else self.read()

    def write(self, figures: Figures) -> None:
        """Write the file, one line per row, so that people can read it; log a warning where that fails."""
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
            logger.warning("failed to save the latencies: %s", error)

    def _version(self) -> tuple[int, int] | None:
        """Return what tells one version of the file from another; None where there is no file."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _warn_of_others(self) -> None:
        """Log a warning where other users may write the figures that this server trusts."""
        folder = self.path.parent
        with suppress(OSError):  # a write will fail, too, and log why
            found = folder.stat()
            if found.st_mode & stat.S_IWOTH or found.st_uid not in (0, os.geteuid()):
                logger.warning("%s: other users can write there and change the latencies that the server uses", folder)


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
    """Read a file that others may have put there: follow no link, wait for no pipe and bound the memory.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a regular one, or too long.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor is no path
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it is longer than {MAX_FILE_BYTES} bytes")
    return content
