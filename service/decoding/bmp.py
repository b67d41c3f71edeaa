"""The header of a BMP, and the pixels of BMPs with bit fields, which may place channels where no codec expects them."""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.decoding.headers import ImageHeader, ends_early
from service.errors import ImageTooLargeError, InvalidImageError

_RUN_LENGTHS, _BITFIELDS = (1, 2), 3
# Most pixels, and bytes of the file, of a BMP with run lengths: they are decoded in Python, at a microsecond per run.
_MAX_RUN_LENGTH_BYTES = 1_000_000
_FILE_HEADER_BYTES, _CORE_HEADER_BYTES = 14, 12
_ALPHA_FROM = 56  # header size in bytes from which on there is an alpha mask


@dataclass(frozen=True, slots=True)
class _Layout:
    width: int
    height: int  # negative where the first row is the top one
    bits: int
    compression: int
    header_bytes: int


def read_bmp(data: bytes) -> ImageHeader:
    """Read a BMP's header.

    Raises:
        InvalidImageError: the header is cut off or invalid.
        ImageTooLargeError: the BMP is compressed by run lengths and larger than such BMPs may be.
    """
    layout = _read_layout(data)
    pixels = layout.width * abs(layout.height)
    if layout.compression in _RUN_LENGTHS and max(pixels, len(data)) > _MAX_RUN_LENGTH_BYTES:
        raise ImageTooLargeError(
            f"a run-length encoded BMP may have at most {_MAX_RUN_LENGTH_BYTES} pixels, and as many bytes",
            max_image_pixels=_MAX_RUN_LENGTH_BYTES,
        )
    in_memory = 1 if layout.bits <= 8 else 4
    return ImageHeader("BMP", layout.width, abs(layout.height), data, in_memory)


def read_bitfields(data: bytes) -> npt.NDArray[np.uint8] | None:
    """Decode a BMP of 16 or 32 bits per pixel whose header says in which bits each colour lies.

    Returns:
        (height, width, 3), or (height, width, 4) with transparency; None for any other BMP.

    Raises:
        InvalidImageError: the BMP is cut off, or a colour has no bits.
    """
    layout = _read_layout(data)
    if layout.compression != _BITFIELDS or layout.bits not in (16, 32):
        return None
    masks = list(struct.unpack_from("<3I", data, _FILE_HEADER_BYTES + 40))
    if not any(masks):
        return None
    if not all(masks):
        raise InvalidImageError("the BMP has no bit mask for one of its colours")
    row_bytes = (layout.width * layout.bits + 31) // 32 * 4
    start, height = struct.unpack_from("<I", data, 10)[0], abs(layout.height)
    if start + row_bytes * height > len(data):
        share = max(0, len(data) - start) // row_bytes / height
        raise ends_early(f"it has {100 * share:.0f} % of its rows")
    rows = np.frombuffer(data, np.uint8, row_bytes * height, start).reshape(height, row_bytes)
    pixels = rows[:, : layout.width * layout.bits // 8].copy().view(f"<u{layout.bits // 8}")
    channels = [_channel(pixels, mask) for mask in masks]
    alpha_mask = struct.unpack_from("<I", data, _FILE_HEADER_BYTES + 52)[0] if layout.header_bytes >= _ALPHA_FROM else 0
    if alpha_mask and (alpha := _channel(pixels, alpha_mask)).any():  # a tool that leaves alpha unused writes zeros
        channels.append(alpha)
    return np.stack(channels, axis=2)[:: 1 if layout.height < 0 else -1]


def _channel(pixels: npt.NDArray[np.unsignedinteger], mask: int) -> npt.NDArray[np.uint8]:
    shift = (mask & -mask).bit_length() - 1
    most = mask >> shift
    values = (pixels & pixels.dtype.type(mask & np.iinfo(pixels.dtype).max)) >> shift
    return (values.astype(np.float32) * (255 / most) + 0.5).astype(np.uint8)


def _read_layout(data: bytes) -> _Layout:
    try:
        header_bytes = struct.unpack_from("<I", data, _FILE_HEADER_BYTES)[0]
        if header_bytes == _CORE_HEADER_BYTES:
            width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
            compression = 0
        else:
            width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
            if compression == _BITFIELDS:
                struct.unpack_from("<3I", data, _FILE_HEADER_BYTES + 40)
    except struct.error as error:
        raise ends_early("it has no pixels") from error
    if width <= 0 or not height:
        raise InvalidImageError("the BMP has no valid size")
    return _Layout(width, height, bits, compression, header_bytes)
