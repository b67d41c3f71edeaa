"""Begins a model change whenever the file of the served checkpoint is replaced."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from models.checkpoint import digest
from models.files.checkpoint_errors import CheckpointError
from service.access.watched_files import CHECK_S, WatchedFiles
from service.errors import ServiceError
from service.model_change import ModelChange

STABLE_CHECKS = 2  # consecutive checks without a change after which a file counts as complete

logger = logging.getLogger(__name__)


class CheckpointWatch:
    """Checks a file, and begins a model change once it has been replaced and is complete."""

    def __init__(self, path: Path, version: str, begin: Callable[[ModelChange], object]) -> None:
        """Begin to watch a file; one that was replaced since the model was read counts as changed.

        Args:
            path: path of the checkpoint.
            version: version of the served checkpoint.
            begin: begins a model change.

        Raises:
            OSError: the file cannot be read.
        """
        self._path, self._begin = path, begin
        self._files = WatchedFiles([path])  # before the file is read, so that no change is missed
        self._looks_left = None if digest(path) == version else STABLE_CHECKS

    def look(self) -> None:
        """Check the file once; a change refused now, as while another one runs, is tried again at the next check."""
        if self._files.have_changed():
            self._files.mark_read()
            self._looks_left = STABLE_CHECKS
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
    """Check the file every CHECK_S until cancelled, and continue after any error.

    Args:
        name: name of the checkpoint, for the log.
        open_watch: finds the file and begins to watch it; called on another thread, because it may take long.
        sleep: waits for the given number of seconds.
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
        except Exception as error:  # whatever the error, the next file put there must be served
            if is_well:
                message = "the file of %s cannot be watched; trying again: %s"
                logger.error(message, name, error, exc_info=not isinstance(error, OSError | CheckpointError))
            is_well = False
            await sleep(CHECK_S)
