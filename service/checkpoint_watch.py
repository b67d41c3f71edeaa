"""Asks for a change of the model whenever the file of the checkpoint that is served is replaced."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from service.access.watched_files import CHECK_S, WatchedFiles
from service.errors import ServiceError
from service.model_change import ModelChange

LEVEL_LOOKS = 2  # without a change, after which a file is taken to be whole

logger = logging.getLogger(__name__)


async def follow(
    path: Path,
    begin: Callable[[ModelChange], object],
    files: WatchedFiles | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Look at the file until cancelled; what cannot be begun yet, because another change goes on, is tried again.

    Args:
        path: of the checkpoint.
        begin: begins a change.
        files: tells whether the file has changed.
        sleep: waits for so many seconds.
    """
    files, looks_left = files or WatchedFiles([path]), None
    while True:
        await sleep(CHECK_S)
        if files.have_changed():
            looks_left = LEVEL_LOOKS
        elif looks_left:
            looks_left -= 1
        if looks_left != 0:
            continue
        try:
            begin(ModelChange(str(path)))
        except ServiceError as error:
            logger.info("%s: %s", path, error.message)
        else:
            looks_left = None
