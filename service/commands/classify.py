"""`supervit classify`: sends photos to a server, or to the same routes in this process; shows the answers in order."""

import asyncio
import os
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from service.bench.photos import SUFFIXES
from service.client import AsyncClient
from service.commands.formats import DEFAULT_TOP_K, default_format, progress, readable, showing
from service.commands.options import STDIN, Classify
from service.errors import CommandError, ServiceError, UnexpectedAnswerError, UnreachableError
from service.http.schemas import ClassifyAnswer
from service.settings import API_KEY_VARIABLE, environment_variable

if TYPE_CHECKING:
    import httpx

AT_ONCE = 4
ASKED = {"budget_gflops", "budget_ms", "min_confidence", "patch_grid", "keep_rate"}

Outcome = ClassifyAnswer | ServiceError | OSError


def classify(command: Classify, transport: "httpx.AsyncBaseTransport | None" = None) -> None:
    """Print the answer for each photo. The same route answers in this process and on a server.

    Args:
        command: the options of the command.
        transport: carries the requests to a server; httpx's network transport by default.

    Raises:
        CommandError: a photo could not be classified, or no such server answers at the URL.
    """
    photos = find_photos(command.photos)
    if command.explain and len(photos) > 1:
        raise CommandError(f"--explain takes one photo, not {len(photos)}")
    # Read here rather than in a thread, for which Ctrl-C would have to wait.
    stdin = sys.stdin.buffer.read() if STDIN in photos else b""
    failed = asyncio.run(_classify_all(command, photos, stdin, transport))
    if failed:
        raise CommandError(f"{failed} of {len(photos)} photos could not be classified")


def find_photos(paths: Sequence[Path]) -> list[Path]:
    """Replace each folder by the images in it and in its subfolders, sorted by path.

    Raises:
        CommandError: a folder holds no images.
        OSError: a folder cannot be read.
    """
    photos = list[Path]()
    for path in paths:
        if not path.is_dir():
            photos.append(path)
            continue
        found = sorted(_walk(path))
        if not found:
            raise CommandError(f"{readable(path)}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
        photos += found
    return photos


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the images in a folder and its subfolders; hidden ones are skipped unless the command line names them."""
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(place, name) for name in names if not name.startswith("."))
        yield from (file for file in files if file.suffix.lower() in SUFFIXES)


def _raise(error: OSError) -> None:
    raise error


async def _classify_all(
    command: Classify, photos: Sequence[Path], stdin: bytes, transport: "httpx.AsyncBaseTransport | None"
) -> int:
    failures = list[Path]()
    style = command.format or default_format()
    top_k = command.top_k or DEFAULT_TOP_K[style]
    async with _connected(command, transport) as client:
        with showing(style) as show, progress(len(photos), style) as advance:

            async def ask(photo: Path) -> Outcome:
                try:
                    data = stdin if photo == STDIN else await asyncio.to_thread(photo.read_bytes)
                    return await _ask(client, command, top_k, data)
                except (ServiceError, OSError) as error:
                    return error

            def take(photo: Path, outcome: Outcome) -> None:
                advance()
                if isinstance(outcome, ClassifyAnswer):
                    show(photo, outcome)
                    return
                failures.append(photo)
                reason = (isinstance(outcome, OSError) and outcome.strerror) or outcome
                print(f"supervit: {readable(photo)}: {readable(reason)}", file=sys.stderr)

            await _in_order(photos, ask, take)
    return len(failures)


def _connected(
    command: Classify, transport: "httpx.AsyncBaseTransport | None"
) -> AbstractAsyncContextManager[AsyncClient]:
    if command.url is not None:
        return AsyncClient(command.url, api_key=environment_variable(API_KEY_VARIABLE), transport=transport)
    from service.commands.in_process import serve_in_process  # imports torch, which a request to a server does not need

    return serve_in_process(command.checkpoint)


async def _in_order(
    photos: Sequence[Path], ask: Callable[[Path], Awaitable[Outcome]], take: Callable[[Path, Outcome], None]
) -> None:
    """Classify up to AT_ONCE photos concurrently, and pass the outcomes to `take` in the order of the photos."""
    waiting = deque[tuple[Path, asyncio.Future[Outcome]]]()
    try:
        for photo in photos:
            waiting.append((photo, asyncio.ensure_future(ask(photo))))
            if len(waiting) == AT_ONCE:
                take(waiting[0][0], await waiting[0][1])
                waiting.popleft()
        for first, outcome in waiting:
            take(first, await outcome)
    finally:
        for _, outcome in waiting:
            outcome.cancel()
        await asyncio.gather(*(outcome for _, outcome in waiting), return_exceptions=True)


async def _ask(client: AsyncClient, command: Classify, top_k: int, data: bytes) -> ClassifyAnswer:
    """Classify a photo, and draw what the sub-network looked at if `--explain` asks for it.

    Raises:
        CommandError: there is no such server, so that every other photo would fail, too; or the drawing fails.
        ServiceError: this photo is not answered.
    """
    options = command.model_dump(include=ASKED)
    try:
        if command.explain is None:
            return await client.classify(data, top_k=top_k, **options)
        answer = await client.explain(data, top_k=top_k, **options)
    except (UnreachableError, UnexpectedAnswerError) as error:
        raise CommandError(str(error)) from error
    from service.commands.drawing import draw  # imports torch

    draw(data, answer, command.explain)
    return answer
