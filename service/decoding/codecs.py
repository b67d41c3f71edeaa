"""The codecs, Pillow, torchvision and pillow_heif: decodes images whose header was checked, and translates errors.

The codecs describe broken files in messages, log lines and warnings of their own. None of these reaches a client or the
server's log.
"""

import ctypes
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
)

from models.data.images import CODEC_ERRORS
from service.decoding import bmp, png
from service.decoding.exif import UPRIGHT, read_orientation
from service.decoding.headers import ImageHeader, ends_early
from service.errors import InvalidImageError, OutOfMemoryError

HAS_HEIC = find_spec("pillow_heif") is not None
if HAS_HEIC:
    import pillow_heif

    pillow_heif.options.DECODE_THREADS = 1
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # its default would use the engine's cores
warnings.filterwarnings("ignore", module=r"(PIL|torchvision|pillow_heif)\b")
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision", DeprecationWarning)
logging.getLogger("PIL").setLevel(logging.CRITICAL)
_imaging = ctypes.CDLL(Image.core.__file__)  # type: ignore[attr-defined] # Pillow's C extension, which links libtiff
for _silenced in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):  # libtiff writes to stderr by default
    with suppress(AttributeError):  # a Pillow without libtiff
        getattr(_imaging, _silenced)(None)

_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
_ERRORS: tuple[type[Exception], ...] = (
    *(error for error in CODEC_ERRORS if error is not MemoryError),
    RuntimeError,
    UserWarning,  # raised where warnings are turned into errors
)
_UNCHANGED = 0  # torchvision's ImageReadMode: keeps alpha
_TWO_SIZES = "the {} is broken: it declares two different sizes"
_NO_MEMORY = "there was not enough memory to decode the image; try again later"
_TORCH_NO_MEMORY = "can't allocate memory"  # in PyTorch's message when memory runs out


def _load_webp_codec() -> Callable[[torch.Tensor], torch.Tensor]:
    """Load torchvision's codec library without importing torchvision, which takes as long as importing PyTorch."""
    found = find_spec("torchvision")
    folder = Path(found.origin).parent if found and found.origin else None
    for library in sorted(folder.glob("image*.so")) if folder else ():
        with suppress(OSError):  # a library built for another PyTorch
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call] # it has no annotations
    if not hasattr(torch.ops.image, "decode_webp"):  # on other systems, the library lies elsewhere
        from torchvision.io import decode_webp

        return cast("Callable[[torch.Tensor], torch.Tensor]", decode_webp)
    return partial(torch.ops.image.decode_webp, mode=_UNCHANGED)


_decode_webp_pixels = _load_webp_codec()


def jpeg_scale(header: ImageHeader, least_px: int) -> int:
    """Return the largest divisor, 8, 4, 2 or 1, of a JPEG's sides that keeps its shorter side at `least_px` or more."""
    scale = min(header.width, header.height) // least_px
    return next(fraction for fraction in (8, 4, 2, 1) if scale >= fraction or fraction == 1)


@contextmanager
def codec_errors(image_format: str) -> Iterator[None]:
    """Translate errors of the codecs into ServiceErrors.

    Raises:
        InvalidImageError: the image is broken.
        OutOfMemoryError: there was not enough memory to decode the image.
    """
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError(_NO_MEMORY) from error
    except _ERRORS as error:
        if _TORCH_NO_MEMORY in str(error):
            raise OutOfMemoryError(_NO_MEMORY) from error
        raise InvalidImageError(f"the {image_format} is broken: its pixels cannot be decoded") from error


def decode(header: ImageHeader, least_px: int) -> tuple[Image.Image, int]:
    """Decode an image as it is stored, in any mode; a JPEG is scaled down by `jpeg_scale`.

    Returns:
        The picture, and its EXIF orientation.

    Raises:
        InvalidImageError: the image is broken, or ends early.
        Exception: an error of the codec; see `codec_errors`.
    """
    if header.format == "PNG":
        data, orientation = png.strip_metadata(header.data)
        return _load(header, data, least_px), orientation
    if header.format == "WEBP":
        return _decode_webp(header.data), header.orientation
    if header.format == "HEIC":
        return _decode_heic(header), UPRIGHT
    if header.format == "BMP" and (pixels := bmp.read_bitfields(header.data)) is not None:
        return Image.fromarray(pixels), UPRIGHT
    picture = _load(header, header.data, least_px)
    exif = picture.info.get("exif", b"") if header.format == "AVIF" else b""
    return picture, read_orientation(exif.removeprefix(b"Exif\0\0")) if exif else header.orientation


def _decode_heic(header: ImageHeader) -> Image.Image:
    """Decode with libheif, unless it finds a larger picture than the header says, for which limits were checked.

    Raises:
        InvalidImageError: the size contradicts the header.
        Exception: an error of libheif.
    """
    opened = pillow_heif.open_heif(header.data, convert_hdr_to_8bit=True)
    width, height = opened.size  # a rotation may have swapped them
    if width * height > header.width * header.height:
        raise InvalidImageError(_TWO_SIZES.format(header.format))
    picture: Image.Image = opened.to_pillow()
    return picture


def _load(header: ImageHeader, data: bytes, least_px: int) -> Image.Image:
    """Decode with Pillow.

    Raises:
        InvalidImageError: the file ends early, or its size contradicts its header.
        Exception: an error of Pillow.
    """
    image = _OPENERS[header.format](io.BytesIO(data))
    if header.format != "TIFF" and image.size != (header.width, header.height):
        raise InvalidImageError(_TWO_SIZES.format(header.format))
    if header.format == "JPEG":
        image.draft(None, (least_px, least_px))
    try:
        image.load()
    except OSError as error:
        if "truncated" not in str(error):
            raise
        raise ends_early(_rows_there(image)) from error
    return image


def _rows_there(image: Image.Image) -> str:
    """Describe how much of a picture was decoded; `load` leaves the missing rows black."""
    _, rows = image.im.getprojection()
    share = sum(rows) / image.height
    return f"it has {100 * share:.0f} % of its rows" if share else "it has no complete row"


def _decode_webp(data: bytes) -> Image.Image:
    """Decode with torchvision: Pillow lets no other thread run while it decodes, for 1.5 s with the largest images."""
    pixels = _decode_webp_pixels(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
