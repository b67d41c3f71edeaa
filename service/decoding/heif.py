"""Reads the size of an AVIF or a HEIC from its boxes, which the frames of an AVIF must not exceed."""

import re
import struct
from collections.abc import Iterator
from itertools import islice

from service.decoding.av1 import frame_sizes
from service.decoding.exif import has_odd_orientation
from service.decoding.headers import MAX_BLOCKS, ImageHeader, ends_early, too_many_blocks
from service.errors import InvalidImageError

# Bytes searched for boxes, which come before the pixels; those of a photograph in tiles take some kilobytes.
_BOXES_BYTES = 1_000_000
# Bytes: colour planes of up to two bytes per value, the decoded picture as bytes, and as a Pillow image.
_MEMORY_PER_PIXEL = 12
_EXIF_STARTS = (b"MM\0*", b"II*\0")
_MAX_EXIFS = 16  # a photograph has one; one in a hundred has bytes that look like a second


def read_heif(data: bytes, image_format: str) -> ImageHeader:
    """Read the size of the largest picture of a file; tiles and thumbnails have sizes, too.

    Raises:
        InvalidImageError: the file has no size, far too many or too much EXIF, its EXIF orientation is not a single
            number, or the frames of an AVIF are larger than it says.
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
        raise InvalidImageError(f"the {image_format} has no valid size")
    # The codec reads the EXIF itself, and an orientation of two million fractions takes it seconds.
    exifs = list(islice(_exifs(data), _MAX_EXIFS + 1))
    if len(exifs) > _MAX_EXIFS or any(map(has_odd_orientation, exifs)):
        raise InvalidImageError(f"the {image_format} has more than one EXIF orientation, or too much EXIF")
    if image_format == "AVIF":
        frames = [frame_width * frame_height for frame_width, frame_height in frame_sizes(data)]
        if not frames:
            raise ends_early("it has no pixels")
        if max(frames) > width * height:  # the codec would decode all of the frame, and then shrink it
            raise InvalidImageError("the AVIF is broken: it declares two different sizes")
    return ImageHeader(image_format, width, height, data, _MEMORY_PER_PIXEL)


def _exifs(data: bytes) -> Iterator[memoryview]:
    """Yield every position that looks like the start of EXIF, with all bytes after it."""
    for start in _EXIF_STARTS:
        position = data.find(start)
        while position >= 0:
            yield memoryview(data)[position:]
            position = data.find(start, position + 1)
