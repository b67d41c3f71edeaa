"""The segments of a JPEG: its size, its number of scans, and the file without the segments that carry no pixels."""

import re
from collections.abc import Iterator

from service.decoding.exif import UPRIGHT, read_orientation
from service.decoding.headers import MAX_BLOCKS, ImageHeader, ends_early, too_many_blocks
from service.errors import InvalidImageError

# Most scans of a JPEG. Its size bounds its pixels, not how often scans refine them: with 50 million pixels, 80 bytes
# more take 43 ms more. Encoders write about 10 scans.
MAX_SCANS = 32
# Markers that have a segment, and the image's start and end. In the data of a scan, libjpeg skips all other markers.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_PROGRESSIVE_FRAMES = {0xC2, 0xC6, 0xCA, 0xCE}
# Tables, frames, and the segments that define the colour space, JFIF and Adobe.
_NEEDED = _FRAMES | {0xC4, 0xCC, 0xDB, 0xDC, 0xDD, 0xE0, 0xEE}
_EXIF, _EXIF_PREFIX = 0xE1, b"Exif\0\0"
_SLICE = 1 << 18  # bytes searched at a time, between which other threads can get the GIL
_MAX_GAP_BYTES = 1_000_000  # between two segments of a header, such as fill bytes; encoders write a few
_COEFFICIENT_BYTES = 2


def read_jpeg(data: bytes) -> ImageHeader:
    """Read a JPEG's header, up to its first scan.

    Raises:
        InvalidImageError: the header is incomplete or invalid, or has far too many segments or bytes between them.
    """
    parts, frame, orientation = [data[:2]], b"", UPRIGHT
    code = 0
    for code, start, end in _segments(data, _MAX_GAP_BYTES):
        body = data[start + 4 : end]
        if code == _START_OF_SCAN:
            parts.append(data[start:])
            break
        if code == _EXIF and orientation == UPRIGHT and body.startswith(_EXIF_PREFIX):
            orientation = read_orientation(body[len(_EXIF_PREFIX) :])
        if code in _FRAMES and not frame:
            frame = bytes([code]) + body
        if code in _NEEDED:
            parts.append(data[start:end])
    if code != _START_OF_SCAN:
        raise ends_early("it has no pixels")
    if len(frame) < 7 or len(frame) < 7 + 3 * frame[6]:
        raise InvalidImageError("the JPEG has no valid size")
    height, width, components = int.from_bytes(frame[2:4]), int.from_bytes(frame[4:6]), frame[6]
    if not width or not height or not components:
        raise InvalidImageError("the JPEG has no valid size")
    # Of a JPEG with one component per scan, all coefficients are kept as well, until the last scan is read.
    is_progressive = frame[0] in _PROGRESSIVE_FRAMES or data[start + 4 : start + 5] < bytes([components])
    memory = _COEFFICIENT_BYTES * _numbers_per_pixel(frame) if is_progressive else 0
    return ImageHeader("JPEG", width, height, b"".join(parts), memory, orientation, is_progressive)


def has_more_scans(data: bytes, limit: int) -> bool:
    """Return whether a JPEG has more than `limit` scans."""
    at_most = sum(data.count(b"\xff\xda", start, start + _SLICE + 1) for start in range(0, len(data), _SLICE))
    if at_most <= limit:
        return False
    scans = 0
    for code, _, _ in _segments(data, len(data)):  # bytes that look like a scan may be in a thumbnail
        scans += code == _START_OF_SCAN
        if scans > limit or (code == _END_OF_IMAGE and scans):  # what follows, such as a video, is not decoded
            break
    return scans > limit


def _segments(data: bytes, max_gap_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield the code of each marker, its start, and the end of its segment.

    Raises:
        InvalidImageError: more than `max_gap_bytes` lie between two segments, or there are far too many segments.
    """
    position = 0
    for _ in range(MAX_BLOCKS):
        limit = min(len(data), position + max_gap_bytes)
        marker = _next_marker(data, position, limit)
        if marker is None and limit < len(data):
            raise InvalidImageError(f"the JPEG has more than {max_gap_bytes} bytes between two of its segments")
        if marker is None:
            return
        code, position = marker[0][-1], marker.end()
        if code not in (_START_OF_IMAGE, _END_OF_IMAGE):
            position += int.from_bytes(data[position : position + 2])
        yield code, marker.start(), position
    raise too_many_blocks("JPEG")


def _next_marker(data: bytes, position: int, limit: int) -> re.Match[bytes] | None:
    for start in range(position, limit, _SLICE):
        if marker := _MARKER.search(data, start, start + _SLICE + 1):
            return marker
    return None


def _numbers_per_pixel(frame: bytes) -> float:
    """Return the coefficients per pixel of all components: 3, or 1.5 where colours are stored at half the size."""
    factors = [(sampling >> 4, sampling & 15) for sampling in frame[8::3][: frame[6]]]
    most = max(across for across, _ in factors) * max(down for _, down in factors)
    return sum(across * down for across, down in factors) / max(1, most)
