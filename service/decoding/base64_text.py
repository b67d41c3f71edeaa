"""Decodes images sent as text, base64 or a data URL, to bytes; in pieces, between which the event loop runs."""

import asyncio
import binascii

from service.errors import InvalidImageError, UnsupportedMediaError

CHUNK_CHARS = 1 << 20  # characters
UNTYPED = ("", "application/octet-stream", "binary/octet-stream")


async def decode_base64(text: str, name: str = "image") -> bytes:
    """Decode base64, or a data URL in base64.

    Args:
        text: the base64 or the data URL.
        name: name of the field that holds the text, for error messages.

    Raises:
        InvalidImageError: the text is neither.
        UnsupportedMediaError: the text is a data URL whose media type is no image.
    """
    if text.startswith("data:"):
        kind, _, text = text.partition(",")
        media_type, *parameters = (part.strip().lower() for part in kind.removeprefix("data:").split(";"))
        if not media_type.startswith("image/") and media_type not in UNTYPED:
            raise UnsupportedMediaError(f"{name}: the data URL must be of an image, not {media_type}")
        if "base64" not in parameters:
            raise InvalidImageError(f"{name}: the data URL must be in base64")
    text = "".join(text.split())  # tools wrap base64 into lines
    data = bytearray()
    try:
        for start in range(0, len(text), CHUNK_CHARS):
            data += binascii.a2b_base64(text[start : start + CHUNK_CHARS], strict_mode=True)
            await asyncio.sleep(0)
    except ValueError as error:
        raise InvalidImageError(f"{name}: must be base64 or a data URL") from error
    return bytes(data)
