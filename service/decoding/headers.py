"""The header of an image as one value for all formats, and the detection of the format by its first bytes."""

from dataclasses import dataclass

from service.decoding.exif import UPRIGHT
from service.errors import InvalidImageError

# Most chunks, segments, boxes or blocks that are read of one image. Few photographs have a hundred; as many as one body
# can hold would take seconds.
MAX_BLOCKS = 50_000

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Properties of an image that are known before its pixels are decoded.

    Attributes:
        format: name of the format.
        width, height: size as stored, in pixels.
        data: the file for the codec, where possible without the parts that carry no pixels.
        memory_per_pixel: bytes per pixel that the codec and the decoded picture take together.
        orientation: EXIF orientation.
        is_progressive: whether the pixels come in several passes, between which the codec keeps all of them.
    """

    format: str
    width: int
    height: int
    data: bytes
    memory_per_pixel: float = 4
    orientation: int = UPRIGHT
    is_progressive: bool = False

    @property
    def kind(self) -> str:
        """Kind of image: images of one kind and size take the same time to decode."""
        return f"progressive {self.format}" if self.is_progressive else self.format


def find_format(data: bytes) -> str | None:
    """Return the format by a file's first bytes; None if it is unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        length = min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, length, 4))}
        if brands & _AVIF_BRANDS:
            return "AVIF"
        return "HEIC" if brands & _HEIC_BRANDS else None
    return next((name for signature, name in _SIGNATURES.items() if data.startswith(signature)), None)


def ends_early(what: str) -> InvalidImageError:
    """Return the error for a file that was cut off; `what` says where."""
    return InvalidImageError(f"the file is truncated: {what}")


def too_many_blocks(image_format: str) -> InvalidImageError:
    """Return the error for a file with far too many blocks."""
    return InvalidImageError(f"the {image_format} file has more than {MAX_BLOCKS} blocks besides its pixels")
