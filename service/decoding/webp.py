"""The chunks of a WebP: its size, its orientation, and the first frame of an animation as a still picture."""

import struct
from collections.abc import Iterator

from service.decoding.exif import UPRIGHT, read_orientation
from service.decoding.headers import MAX_BLOCKS, ImageHeader, ends_early, too_many_blocks
from service.errors import InvalidImageError

_HAS_ALPHA = 0x10
# Per pixel: the decoded picture as bytes and as a Pillow image; of a lossless one, libwebp keeps another copy.
_LOSSY_BYTES, _LOSSLESS_BYTES = 8, 12


def read_webp(data: bytes) -> ImageHeader:
    """Read a WebP's chunks up to its end: size, orientation and first picture.

    Raises:
        InvalidImageError: the WebP has no picture or no size, or far too many chunks.
    """
    canvas, stored, picture, orientation, frame = None, None, None, UPRIGHT, False
    for kind, start, end in _chunks(data, 12, len(data)):
        body = data[start + 8 : end]
        match kind:
            case b"VP8X" if start == 12 and len(body) >= 10:  # the codec ignores one that comes later
                canvas = _length(body[4:7]) + 1, _length(body[7:10]) + 1
            case b"ANMF" if picture is None and len(body) >= 16:
                frame, picture = True, _still(body[16:], _length(body[6:9]) + 1, _length(body[9:12]) + 1)
            case b"VP8 " | b"VP8L" if picture is None:
                picture, stored = data, _stored_size(kind, body)
            case b"EXIF":
                orientation = read_orientation(body.removeprefix(b"Exif\0\0"))
    if picture is None:
        raise ends_early("it has no pixels")
    # Of an animation, the size of the frame, which may be smaller than the canvas.
    size = _size_of_still(picture) if frame else stored
    if size is None or not min(size) or (not frame and canvas not in (None, size)):
        raise InvalidImageError("the WebP has no valid size")
    memory = _LOSSLESS_BYTES if b"VP8L" in picture[12:64] else _LOSSY_BYTES
    return ImageHeader("WEBP", *size, picture, memory, orientation)


def _chunks(data: bytes, position: int, limit: int) -> Iterator[tuple[bytes, int, int]]:
    for _ in range(MAX_BLOCKS):
        if position + 8 > limit:
            return
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        yield data[position : position + 4], position, position + 8 + length
        position += 8 + length + length % 2
    raise too_many_blocks("WebP")


def _still(frame: bytes, width: int, height: int) -> bytes:
    """Make a WebP file of an animation's frame."""
    header = struct.pack("<I", _HAS_ALPHA) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(header)) + header + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _size_of_still(picture: bytes) -> tuple[int, int]:
    return _length(picture[24:27]) + 1, _length(picture[27:30]) + 1


def _stored_size(kind: bytes, body: bytes) -> tuple[int, int] | None:
    if kind == b"VP8L":
        if len(body) < 5 or body[0] != 0x2F:
            return None
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if len(body) < 10 or body[3:6] != b"\x9d\x01\x2a":
        return None
    width, height = struct.unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF


def _length(three: bytes) -> int:
    return int.from_bytes(three, "little")
