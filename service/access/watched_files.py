"""Files that are read again when they change."""

from collections.abc import Sequence
from pathlib import Path

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


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino  # a chmod changes ctime alone
