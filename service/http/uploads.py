"""The image out of a request's body, whether it is the body or a form's field, without reading more than is allowed."""

import asyncio
import math
from collections.abc import AsyncGenerator

from fastapi import Request
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from service.errors import (
    BodyTooLargeError,
    ClientGoneError,
    DeadlineError,
    InvalidImageError,
    UnsupportedMediaError,
    UploadTimeoutError,
)

FIELD = "file"
MAX_FORM_PARTS = 16
LATE_S = 0.05
# What clients send that name no type: none at all, "some bytes", and what `curl --data-binary` says of itself.
UNTYPED = ("", "application/octet-stream", "application/x-www-form-urlencoded")


async def read_image(
    request: Request, max_bytes: int, max_s: float, within_s: float = math.inf, late_s: float = LATE_S
) -> bytes:
    """Read the image of a request: the multipart field `file`, or else the whole body.

    Args:
        request: its body not yet read.
        max_bytes: most bytes of the body to read.
        max_s: longest time to wait for the whole body, or slow clients would fill the server.
        within_s: time after which its answer would be too late.
        late_s: of an event loop that is told of a timeout: then what the socket holds may have come in time.

    Raises:
        UnsupportedMediaError: the content type says that the body is no image.
        BodyTooLargeError: the body is longer; no more than the limit was read.
        UploadTimeoutError: the body took longer than either.
        DeadlineError: so it may have done, but the event loop was too busy to see in time whether it was there.
        InvalidImageError: the form is broken or has no such file.
        ClientGoneError: the client left.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = media_type == "multipart/form-data"
    if not is_form and not media_type.startswith("image/") and media_type not in UNTYPED:
        raise UnsupportedMediaError(f"the content type {media_type} is no image; send image/* or multipart/form-data")
    declared_length = request.headers.get("content-length", "")
    is_declared = declared_length.isascii() and declared_length.isdigit() and "transfer-encoding" not in request.headers
    if is_declared and int(declared_length) > max_bytes:
        raise _too_large(max_bytes)
    # Of a body with a length, the HTTP parser reads no more than that.
    chunks = request.stream() if is_declared else _limited(request.stream(), max_bytes)
    try:
        async with asyncio.timeout(max(0.0, min(max_s, within_s))) as limit:
            if is_form:
                return await _read_field(request.headers, chunks, max_bytes)
            return b"".join([chunk async for chunk in chunks])
    except TimeoutError as error:
        if within_s < max_s and asyncio.get_running_loop().time() - (limit.when() or 0.0) > late_s:
            raise DeadlineError("the deadline passed before the server looked at the body") from error
        allowed = "its budget" if within_s < max_s else f"{max_s:g} s"
        raise UploadTimeoutError(f"the body did not arrive within {allowed}") from error
    except ClientDisconnect as error:
        raise ClientGoneError("the client left in the middle of its upload") from error


async def _read_field(headers: Headers, chunks: AsyncGenerator[bytes, None], max_bytes: int) -> bytes:
    parser = MultiPartParser(headers, chunks, max_files=MAX_FORM_PARTS, max_fields=MAX_FORM_PARTS)
    parser.spool_max_size = max_bytes  # keep the file in memory: the disk may be read-only
    try:
        form = await parser.parse()
    except (MultiPartException, LookupError, ValueError) as error:  # the latter two: a charset that is none
        raise InvalidImageError(f"the form is broken: {error}") from error
    try:
        uploads = form.getlist(FIELD)
        if len(uploads) > 1:
            raise InvalidImageError(f"the form has {len(uploads)} fields {FIELD!r}; send one image per request")
        if not uploads or not isinstance(uploads[0], UploadFile):
            raise InvalidImageError(f"the form has no file in its field {FIELD!r}, or was cut off before its end")
        return await uploads[0].read()
    finally:
        await form.close()


async def _limited(chunks: AsyncGenerator[bytes, None], max_bytes: int) -> AsyncGenerator[bytes, None]:
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        yield chunk


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is longer than {max_bytes} bytes", max_body_bytes=max_bytes)
