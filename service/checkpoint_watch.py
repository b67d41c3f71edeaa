"""Asks for a change of the model whenever the file of the checkpoint that is served is replaced."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from models.checkpoint import CheckpointError, digest
from service.access.watched_files import CHECK_S, WatchedFiles
from service.errors import ServiceError
from service.model_change import ModelChange

LEVEL_LOOKS = 2  # without a change, after which a file is taken to be whole

logger = logging.getLogger(__name__)


class CheckpointWatch:
    """Looks at a file, and begins a change once it has been replaced and is whole."""

    def __init__(
        self, path: Path, version: str, begin: Callable[[ModelChange], object], files: WatchedFiles | None = None
    ) -> None:
        """Take the file as it is now: what was put there since the model was read is a change already.

        Args:
            path: of the checkpoint.
            version: of the one that is served.
            begin: begins a change.
            files: tells whether the file has changed.

        Raises:
            OSError: the file cannot be read.
        """
        self._path, self._begin = path, begin
        self._files = files or WatchedFiles([path])  # before it is read, so that nothing is missed between
        self._looks_left = None if digest(path) == version else LEVEL_LOOKS

    def look(self) -> None:
        """Look once; what cannot be begun yet, because another change goes on, is tried again at the next look."""
        if self._files.have_changed():
            self._looks_left = LEVEL_LOOKS
        elif self._looks_left:
            self._looks_left -= 1
        if self._looks_left != 0:
            return
        try:
            self._begin(ModelChange(str(self._path)))
        except ServiceError as error:
            logger.info("%s: %s", self._path, error.message)
        else:
            self._looks_left = None


async def follow(
    name: str, open_watch: Callable[[], CheckpointWatch], sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Look at the file until cancelled, whatever goes wrong meanwhile.

    Args:
        name: of the checkpoint, for the log.
        open_watch: finds the file and begins to watch it; it may take long, and is called on a thread of its own.
        sleep: waits for so many seconds.
    """
    watch: CheckpointWatch | None = None
    is_well = True
    while True:
        try:
            if watch is None:
                watch = await asyncio.to_thread(open_watch)
            await sleep(CHECK_S)
            watch.look()
            is_well = True
        except Exception as error:  # whatever it is, the next file that is put there must be served
            if is_well:
                message = "the file of %s cannot be watched, and is tried again: %s"
                logger.error(message, name, error, exc_info=not isinstance(error, OSError | CheckpointError))
            is_well = False
            await sleep(CHECK_S)
