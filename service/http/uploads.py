"""The body of a request: its kind and its bytes, read within limits of size and time."""

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from service.classifier import ClientLimiter
from service.decoding.base64_text import decode_base64
from service.errors import (
    BodyTooLargeError,
    ClientGoneError,
    DeadlineError,
    InvalidParameterError,
    UnsupportedMediaError,
    UploadTimeoutError,
)
from service.http.callers import caller_of
from service.http.forms import IMAGE_FIELD, UNTYPED, Form, FormReader
from service.request_parameters import validated

MAX_LOOP_DELAY_S = 0.05  # beyond it, a body that seems late may have arrived in time
# A slower body holds a connection and memory for too little: a phone on 2G sends some 5,000 bytes a second.
MIN_BYTES_PER_S = 1000
SLOW_START_S = 5.0
MAX_MESSAGE_BYTES = 10_000  # of a body that holds no image
MAX_JSON_MEMBERS = 64  # counted by `,`, `[` and `{`, none of which is in base64


M = TypeVar("M", bound=BaseModel)


class BodyKind(Enum):
    """How a body holds its image."""

    IMAGE = "it is one"
    FORM = "in a part of a form"
    JSON = "as base64 in JSON"


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits of bodies.

    Attributes:
        max_bytes: most bytes of one body that are read.
        max_s: longest time to wait for a whole body, or slow clients would fill the server.
        coming: bounds the bodies that one client sends at once, or it could take the memory of all.
    """

    max_bytes: int
    max_s: float
    coming: ClientLimiter


def kind_of_body(headers: Headers) -> BodyKind:
    """Return how a body holds its image, from the request's headers.

    Raises:
        UnsupportedMediaError: the content type is none that can hold an image, or the body has a content encoding.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise UnsupportedMediaError(f"the content encoding {encoding} is not supported; send the body uncompressed")
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        return BodyKind.FORM
    if media_type == "application/json":
        return BodyKind.JSON
    if not media_type.startswith("image/") and media_type not in UNTYPED:
        accepted = "image/*, multipart/form-data or application/json"
        raise UnsupportedMediaError(f"the content type {media_type} is not supported; use {accepted}")
    return BodyKind.IMAGE


async def read_body(request: Request, limits: BodyLimits, within_s: float = math.inf) -> bytes:
    """Read a body as bytes; arguments and errors as `receive`."""
    chunks: list[bytes] = []
    await receive(request, chunks.append, limits, within_s)
    return b"".join(chunks)


async def read_form(
    request: Request, limits: BodyLimits, within_s: float = math.inf, image_fields: tuple[str, ...] = (IMAGE_FIELD,)
) -> Form:
    """Read a body that is a form; arguments and errors as `receive` and FormReader."""
    reader = FormReader(request.headers["content-type"], image_fields)
    await receive(request, reader.feed, limits, within_s)
    return reader.close()


async def read_json(request: Request, limits: BodyLimits, within_s: float = math.inf) -> Form:
    """Read a body that is JSON with an image in base64; arguments and errors as `receive`.

    Raises:
        InvalidParameterError: the body is no JSON object, `image` is no string, or a parameter is no number.
        InvalidImageError: `image` is no base64.
    """
    members = _members(await read_body(request, limits, within_s))
    text = members.pop("image", None)
    if text is None:
        raise InvalidParameterError("image: is required", parameter="image")
    if not isinstance(text, str):
        raise InvalidParameterError("image: must be base64 or a data URL", parameter="image")
    fields = _parameters(members)
    return Form((await decode_base64(text),), fields)


async def read_parameters(request: Request, limits: BodyLimits) -> tuple[tuple[str, Any], ...]:
    """Read the parameters in a body that holds no image: a JSON object, or nothing; arguments and errors as `receive`.

    Raises:
        InvalidParameterError: the body is anything else, or a parameter is no number.
    """
    body = await read_body(request, replace(limits, max_bytes=MAX_MESSAGE_BYTES))
    if body and kind_of_body(request.headers) is not BodyKind.JSON:
        raise InvalidParameterError("parameters must be in the query or in a JSON object, without an image")
    return _parameters(_members(body)) if body else ()


async def read_message(request: Request, limits: BodyLimits, kind: type[M]) -> M:
    """Read a short JSON body into a pydantic model; arguments and errors as `receive`.

    Raises:
        InvalidParameterError: the body does not fit the model.
    """
    return validated(kind, await read_body(request, replace(limits, max_bytes=MAX_MESSAGE_BYTES)))


async def receive(
    request: Request,
    feed: Callable[[bytes], object],
    limits: BodyLimits,
    within_s: float = math.inf,
) -> None:
    """Receive a request's body.

    Args:
        request: the request, its body not yet read.
        feed: called with each chunk of the body.
        limits: limits of size, time and bodies per client.
        within_s: time left, after which the answer would be too late.

    Raises:
        BodyTooLargeError: the body is longer than the limit; `feed` got no more than that.
        UploadTimeoutError: the body took longer than `within_s` or `limits.max_s`, or came slower than
            MIN_BYTES_PER_S.
        DeadlineError: the deadline passed, and the event loop was too busy to tell whether the body came in time.
        ClientGoneError: the client left.
        OverloadedError: the client is sending as many bodies as it may at once.
    """
    if _declares_more(request.headers, limits.max_bytes):
        raise _too_large(limits.max_bytes)
    caller = caller_of(request)
    with limits.coming.counting(caller.address, caller.key) as enter:
        enter()
        await _receive(request, feed, limits, within_s)


async def _receive(request: Request, feed: Callable[[bytes], object], limits: BodyLimits, within_s: float) -> None:
    loop, size, max_s = asyncio.get_running_loop(), 0, limits.max_s
    started_at = loop.time()
    ends_at = started_at + max(0.0, min(max_s, within_s))
    try:
        async with asyncio.timeout_at(min(ends_at, started_at + SLOW_START_S)) as limit:
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.max_bytes:
                    raise _too_large(limits.max_bytes)
                feed(chunk)
                limit.reschedule(min(ends_at, started_at + SLOW_START_S + size / MIN_BYTES_PER_S))
    except TimeoutError as error:
        ended_at = limit.when() or 0.0
        if ended_at < ends_at:
            raise UploadTimeoutError(f"the upload was slower than {MIN_BYTES_PER_S} bytes a second") from error
        if within_s < max_s and loop.time() - ended_at > MAX_LOOP_DELAY_S:
            raise DeadlineError("the deadline passed before the server read the body") from error
        allowed = "the latency budget" if within_s < max_s else f"{max_s:g} s"
        raise UploadTimeoutError(f"the body did not arrive within {allowed}") from error
    except ClientDisconnect as error:
        raise ClientGoneError("the client disconnected during the upload") from error


def _declares_more(headers: Mapping[str, str], max_bytes: int) -> bool:
    """Return whether a body declares a length over the limit; the Content-Length of a chunked body proves nothing."""
    length = headers.get("content-length", "")
    is_declared = length.isascii() and length.isdigit() and "transfer-encoding" not in headers
    return is_declared and int(length) > max_bytes


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is longer than {max_bytes} bytes", max_body_bytes=max_bytes)


def _parameters(members: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the members of a JSON object that are parameters; null stands for an absent one."""
    for name, value in members.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise InvalidParameterError(f"{name}: must be a number", parameter=name)
    return tuple((name, value) for name, value in members.items() if value is not None)


def _members(body: bytes) -> dict[str, Any]:
    """Parse a JSON object, refusing one with many members: millions would fill the memory."""
    is_small = sum(map(body.count, (b",", b"[", b"{"))) <= MAX_JSON_MEMBERS
    try:
        members = from_json(body, allow_inf_nan=False) if is_small else None
    except ValueError as error:
        raise InvalidParameterError("the body is not valid JSON") from error
    if not isinstance(members, dict):
        raise InvalidParameterError("the body must be a JSON object that holds an image or parameters only")
    return members
