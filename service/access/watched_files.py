"""Files that are read again when they change."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

CHECK_S = 1.0  # between two looks at whether they have


class WatchedFiles:
    """Tells whether files have changed."""

    def __init__(self, paths: Sequence[Path], clock: Callable[[], float] = time.monotonic) -> None:
        """Take the files as they are now."""
        self._paths, self._clock = tuple(paths), clock
        self._stamps, self._looked_at = self._read_stamps(), clock()

    def have_changed(self) -> bool:
        """Tell whether they have since it was last told; it is not looked more often than every CHECK_S."""
        now = self._clock()
        if now < self._looked_at + CHECK_S:
            return False
        self._looked_at = now
        before, self._stamps = self._stamps, self._read_stamps()
        return self._stamps != before

    def _read_stamps(self) -> list[tuple[int, int, int] | None]:
        """Return what tells one state of each file from another; None for one that is not there."""
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
