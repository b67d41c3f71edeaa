"""Creates the engine of a candidate while another model is served, which has the first claim on the processors.

A separate process compiles it. A thread then takes over the compiled graphs, which needs a few tenths of a second.
Threads that OpenVINO starts meanwhile inherit the low priority of that thread for good. Two for each graph do nothing
later. The threads that compute batches are shared by all graphs; they must have been started before, by the served
model.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import BinaryIO, TypeVar, cast

from models.checkpoint import Checkpoint
from service.engines.base import Engine
from service.engines.compile_process import LENGTH
from service.engines.factory import EngineChoice, open_engine
from service.engines.priority import give_way
from service.errors import NotReadyError

NICENESS = 19  # of the thread that imports; at 10, requests were late as often as with an import between two batches
POLL_S = 0.1  # between two checks whether the server is stopping
PATIENCE_S = 60.0  # on two busy cores the process took some ten seconds for the default checkpoint

T = TypeVar("T")

logger = logging.getLogger(__name__)


def open_candidate(
    checkpoint: Checkpoint, choice: EngineChoice, served_threads: int, is_stopping: Callable[[], bool]
) -> tuple[Engine, Checkpoint]:
    """Create the engine that `open_engine` creates, compiled in a process that has the lowest priority.

    If the machine leaves that process too little time, it is compiled in this one.

    Args:
        checkpoint: as in `open_engine`; a checkpoint without a file is compiled in this process.
        choice: the engine.
        served_threads: number of threads of the served engine; if the candidate needs more, it is taken over at the
            normal priority.
        is_stopping: returns whether the server is stopping, which ends the process.

    Raises:
        DeviceError: as for `open_engine`.
        NotReadyError: the server is stopping.
        RuntimeError: the process failed; the message is what it wrote.
    """
    if checkpoint.path is None:
        return open_engine(checkpoint, choice)
    arguments = [str(checkpoint.path), checkpoint.version, json.dumps(asdict(choice))]
    niceness = NICENESS if choice.threads <= served_threads else 0
    try:
        return open_engine(checkpoint, choice, compiled=partial(_compile, arguments, is_stopping, niceness))
    except TimeoutError:
        logger.info("the machine has no time to spare: the new model is compiled at the cost of requests")
        return open_engine(checkpoint, choice)


def _compile(
    arguments: list[str],
    is_stopping: Callable[[], bool],
    niceness: int,
    read: Callable[[bytes], T],
) -> Iterator[T]:
    with _nameless_file() as file:
        command = [sys.executable, "-P", "-m", "service.engines.compile_process", *arguments, str(file.fileno())]
        with subprocess.Popen(  # noqa: S603 - our own command
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[file.fileno()],
            process_group=0,  # a signal from the terminal is for the server, which then ends the process
        ) as process:
            messages = _messages(process, is_stopping)
        if process.returncode:
            raise RuntimeError(f"the compilation ended with {process.returncode}: {messages}")
        file.seek(0)
        with ThreadPoolExecutor(1, "import", give_way, (niceness,)) as thread:
            while head := file.read(LENGTH.size):
                yield thread.submit(read, file.read(LENGTH.unpack(head)[0])).result()


def _messages(process: "subprocess.Popen[bytes]", is_stopping: Callable[[], bool]) -> str:
    """Wait for the end of a process, and return what it wrote to its standard error.

    Raises:
        NotReadyError: the server is stopping.
        TimeoutError: the process takes longer than PATIENCE_S.
    """
    ends_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            return process.communicate(timeout=POLL_S)[1].decode(errors="replace").strip()
        except subprocess.TimeoutExpired:
            if is_stopping():
                process.kill()
                raise NotReadyError("the server is stopping") from None
            if time.monotonic() > ends_at:
                process.kill()
                raise TimeoutError from None


def _nameless_file() -> BinaryIO:
    """Open a file in memory where the system has such files; a container's folder of temporary files is small."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("graphs"), "w+b")
    return cast(BinaryIO, tempfile.TemporaryFile())
