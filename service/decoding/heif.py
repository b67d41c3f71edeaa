"""The size of an AVIF or a HEIC, out of its boxes."""

import re
import struct
from collections.abc import Iterator
from itertools import islice

from service.decoding.exif import has_odd_orientation
from service.decoding.headers import MAX_BLOCKS, ImageHeader, ends_early, too_many_blocks
from service.errors import InvalidImageError

# They come before the pixels; those of a photograph in tiles take some kilobytes.
_BOXES_BYTES = 1_000_000
# Planes of colours of up to two bytes, the picture as bytes, and as a picture.
_MEMORY_PER_PIXEL = 12
_EXIF_STARTS = (b"MM\0*", b"II*\0")
_MAX_EXIFS = 16  # a photograph has one, and by chance one in a hundred has a second


def read_heif(data: bytes, image_format: str) -> ImageHeader:
    """Read how large the largest picture of a file is; tiles and thumbnails have sizes, too.

    Raises:
        InvalidImageError: no size is there.
    """
    sizes = [
        struct.unpack_from(">II", data, found.end() + 4)
        for found in re.finditer(b"ispe", data[:_BOXES_BYTES])
        if found.end() + 12 <= len(data)
    ]
    if len(sizes) > MAX_BLOCKS:
        raise too_many_blocks(image_format)
    width, height = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
    if not sizes:
        raise ends_early("it has no pixels")
    if not width or not height:
        raise InvalidImageError(f"the {image_format} does not say what size it has")
    # The codec reads the EXIF itself, and one orientation of two million fractions for seconds.
    exifs = list(islice(_exifs(data), _MAX_EXIFS + 1))
    if len(exifs) > _MAX_EXIFS or any(map(has_odd_orientation, exifs)):
        raise InvalidImageError(f"the {image_format} says in more than one way how its camera was held")
    return ImageHeader(image_format, width, height, data, _MEMORY_PER_PIXEL)


def _exifs(data: bytes) -> Iterator[memoryview]:
    """Yield whatever looks like the beginning of EXIF, with all that follows it."""
    for start in _EXIF_STARTS:
        position = data.find(start)
        while position >= 0:
            yield memoryview(data)[position:]
            position = data.find(start, position + 1)
