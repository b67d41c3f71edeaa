"""Files that are read again when they change."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from service.errors import CommandError

CHECK_S = 1.0  # time between two checks


class WatchedFiles:
    """Detects changes of files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Record the current state of the files."""
        self._paths = tuple(paths)
        self._stamps = self._seen = self._read_stamps()

    def have_changed(self) -> bool:
        """Return whether the files have changed since they were last read."""
        self._seen = self._read_stamps()
        return self._seen != self._stamps

    def mark_read(self) -> None:
        """Record that the files were read as `have_changed` has seen them."""
        self._stamps = self._seen

    def _read_stamps(self) -> list[tuple[int, int, int, int] | None]:
        """Return the times of change, size and inode of each file; None for a missing one."""
        return [_stamp(path) for path in self._paths]


class ReloadedFiles:
    """Loads files, and again once they have changed; while they cannot be used, what was loaded last stays in use."""

    def __init__(self, paths: Sequence[Path], load: Callable[[], str], kept: str, log: logging.Logger) -> None:
        """Load the files.

        Args:
            paths: the files; the log names the first one.
            load: loads all of them and returns a line for the log; if it raises an OSError or a ValueError, which says
                what is wrong with them, it has changed nothing.
            kept: what stays in use, for the log.
            log: logger for later loads; each problem is logged once.

        Raises:
            CommandError: the files cannot be used.
        """
        self._path, self._load, self._kept, self._log = paths[0], load, kept, log
        self._files = WatchedFiles(paths)
        self._problem: str | None = None  # why the changed files cannot be used, as far as it is logged
        try:
            load()
        except (OSError, ValueError) as error:
            raise CommandError(f"{', '.join(map(str, paths))}: {_reason(error)}") from error

    def refresh(self) -> None:
        """Load the files if they have changed; if they cannot be used, try again at the next call."""
        if not self._files.have_changed():
            return
        try:
            loaded = self._load()
        except (OSError, ValueError) as error:
            if (problem := _reason(error)) != self._problem:
                self._log.error("keeping the previous %s: %s: %s", self._kept, self._path, problem)
            self._problem = problem
        else:
            self._files.mark_read()
            self._problem = None
            self._log.info("%s", loaded)


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino  # a chmod changes ctime alone
