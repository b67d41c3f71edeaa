"""Untrusted bytes to a checked (3, S, S) uint8 tensor. Codecs enter here alone; runs on worker threads."""

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from models.data import to_rgb
from service.errors import ImageTooLargeError, InvalidImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# What Pillow's codecs are known to raise on malformed bytes.
CODEC_ERRORS = (
    AssertionError,
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)


def decode_image(data: bytes, transform: Callable[[Image.Image], Tensor], max_pixels: int) -> Tensor:
    """Decode the first frame of an image and bring it to the model's size.

    Args:
        data: JPEG, PNG, WebP, GIF or BMP.
        transform: an RGB picture to (3, S, S) uint8.
        max_pixels: most pixels that the header may announce.

    Raises:
        InvalidImageError: the bytes are empty, no such image, or a broken one.
        ImageTooLargeError: the image has more pixels; nothing was decoded.
    """
    if not data:
        raise InvalidImageError("the image is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageTooLargeError(
                    f"the image has {width} x {height} pixels, more than the {max_pixels} that this server decodes",
                    max_image_pixels=max_pixels,
                )
            return transform(to_rgb(image))
    except UnidentifiedImageError as error:
        raise InvalidImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError("the image is far too large", max_image_pixels=max_pixels) from error
    except CODEC_ERRORS as error:
        raise InvalidImageError(f"the image is broken: {error}") from error
