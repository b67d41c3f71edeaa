"""Turns untrusted bytes into a checked (3, S, S) uint8 tensor, on worker threads. The only way to the codecs.

The result equals that of `evaluation_transform` on the same picture, to within rounding; large photos are decoded at a
fraction of their size, and the result is close to it. tests/benchmarks/bench_images.py measures both differences, and
tests/benchmarks/bench_hostile_images.py the cost of files made to be expensive.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from models.data.images import TURNS, evaluation_transform, flatten, limit_aspect_ratio, resized_side
from models.subnetwork import Interpolation, SuperViTConfig
from service.decoding import bmp, gif, jpeg, png, tiff, webp
from service.decoding.codecs import HAS_HEIC, codec_errors, decode, jpeg_scale
from service.decoding.headers import ImageHeader, find_format
from service.decoding.heif import read_heif
from service.errors import ImageTooLargeError, InvalidImageError, UnsupportedMediaError

# Least shorter side to which a picture is scaled down before it is resized, in pixels and as a multiple of the resized
# side. With less, a model of 32 pixels predicts another class for 3 of 100 photos of 500 x 375.
LEAST_SIDE_PX = 512
LEAST_MULTIPLE = 2

# Most pixels of a JPEG before scaling; only the scaled picture is in memory. The largest photographs of telephones have
# 200 million.
MAX_JPEG_PIXELS = 1 << 28
# Longest side. A row takes as long as a hundred pixels: 49.9 million rows of one pixel took 6 s.
MAX_SIDE_PX = 1_000_000
# Most pixels times scans of a JPEG: 50 million pixels, the default limit of `max_pixels`, at MAX_SCANS.
MAX_PIXEL_SCANS = jpeg.MAX_SCANS * 50_000_000
# Larger pictures are converted to RGB and averaged in strips of about this many pixels.
STRIP_PIXELS = 1 << 22

# interpolate() takes a quarter of Pillow's time where it is vectorised for uint8, and more than Pillow elsewhere.
HAS_FAST_RESIZE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

# Nanoseconds per pixel and per byte of the file, measured on a core of 2.5 GHz. The decoder learns by which factor
# this machine differs.
COSTS_NS = {
    "JPEG": (2, 20),
    "progressive JPEG": (12, 40),
    "PNG": (25, 4),
    "GIF": (20, 5),
    "BMP": (8, 1),
    "TIFF": (15, 4),
    "WEBP": (20, 80),
    "AVIF": (40, 40),
    "HEIC": (60, 40),
}
LEAST_COST_S = 0.0005

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """An image whose header was read and accepted.

    Attributes:
        kind: kind of image; images of one kind and size take the same time to decode.
        cost_s: time to decode the image on the machine of COSTS_NS.
        memory_bytes: most memory that decoding takes.
        decode: decodes the image to (3, S, S) uint8; raises an InvalidImageError if its pixels are broken.
    """

    kind: str
    cost_s: float
    memory_bytes: int
    decode: Callable[[], Tensor]


def decode_image(
    data: bytes, config: SuperViTConfig, max_pixels: int, *, fast_resize: bool = HAS_FAST_RESIZE
) -> Tensor:
    """Open an image and decode it; see `open_image` and `OpenedImage.decode`."""
    return open_image(data, config, max_pixels, fast_resize=fast_resize).decode()


def open_image(
    data: bytes,
    config: SuperViTConfig,
    max_pixels: int,
    max_memory_bytes: int | None = None,
    *,
    fast_resize: bool = HAS_FAST_RESIZE,
) -> OpenedImage:
    """Read and check the header of an image. Whatever the bytes, this takes some hundredths of a second at most.

    Args:
        data: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC; of several pictures in a file, the first is decoded.
        config: configuration of the model: S and the crop.
        max_pixels: most pixels that are decoded; those of a JPEG are counted after `jpeg_scale`.
        max_memory_bytes: most memory that decoding may take; None for no limit.
        fast_resize: whether PyTorch resizes; otherwise Pillow does.

    Raises:
        InvalidImageError: the bytes are empty, of no known format, or a broken image.
        ImageTooLargeError: the image has too many pixels, too long a side or too long a BMP, or decoding it would take
            too much memory; nothing was decoded.
        UnsupportedMediaError: the image is HEIC, and its decoder is not installed.
    """
    if not data:
        raise InvalidImageError("the image is empty")
    with codec_errors(find_format(data) or "image"):  # a check that a header's reader lacks is no error of the server
        header = read_header(data)
    least_px = max(LEAST_SIDE_PX, LEAST_MULTIPLE * resized_side(config))
    width, height = decoded_size(header, least_px)
    check_size(header, width * height, max_pixels)
    pixels = header.width * header.height
    if header.format == "JPEG":
        memory_bytes = int(4 * width * height + header.memory_per_pixel * pixels)
    else:
        memory_bytes = int(header.memory_per_pixel * pixels)
    if max_memory_bytes is not None and memory_bytes > max_memory_bytes:
        raise ImageTooLargeError(
            f"decoding the image would take {memory_bytes} bytes of memory, more than the limit of {max_memory_bytes}",
            max_decode_bytes=max_memory_bytes,
        )
    per_pixel, per_byte = COSTS_NS[header.kind]
    cost_s = LEAST_COST_S + 1e-9 * (per_pixel * pixels + per_byte * len(header.data))
    decode = partial(_decode, header, config, least_px, fast_resize=fast_resize)
    return OpenedImage(header.kind, cost_s, memory_bytes, decode)


def read_header(data: bytes) -> ImageHeader:
    """Read the header of an image of any format.

    Raises:
        ServiceError: as in `open_image`.
    """
    match find_format(data):
        case "JPEG":
            return jpeg.read_jpeg(data)
        case "PNG":
            return png.read_png(data)
        case "WEBP":
            return webp.read_webp(data)
        case "GIF":
            return gif.read_gif(data)
        case "BMP":
            return bmp.read_bmp(data)
        case "TIFF":
            return tiff.read_tiff(data)
        case "AVIF":
            return read_heif(data, "AVIF")
        case "HEIC" if HAS_HEIC:
            return read_heif(data, "HEIC")
        case "HEIC":
            raise UnsupportedMediaError(
                "HEIC is not supported by this server; send a JPEG, or install the decoder, "
                "`pip install 'supervit-serve[heif]'`"
            )
    formats = ", ".join((*("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF"), *(("HEIC",) if HAS_HEIC else ())))
    raise InvalidImageError(f"not an image in a supported format; use one of {formats}")


def decoded_size(header: ImageHeader, least_px: int) -> tuple[int, int]:
    """Return the width and height at which an image is decoded: its own, or those of a JPEG after `jpeg_scale`."""
    if header.format != "JPEG":
        return header.width, header.height
    scale = jpeg_scale(header, least_px)
    return -(-header.width // scale), -(-header.height // scale)


def check_size(header: ImageHeader, decoded_pixels: int, max_pixels: int) -> None:
    """Check that the size in an image's header is within the limits.

    Raises:
        ImageTooLargeError: the image has too many pixels, or too long a side.
    """
    pixels, size = header.width * header.height, f"the image has {header.width} x {header.height} pixels"
    if decoded_pixels > max_pixels:
        raise ImageTooLargeError(f"{size}; the server decodes at most {max_pixels}", max_image_pixels=max_pixels)
    if max(header.width, header.height) > MAX_SIDE_PX:
        raise ImageTooLargeError(f"{size}; a side may have at most {MAX_SIDE_PX}", max_side_pixels=MAX_SIDE_PX)
    if pixels > MAX_JPEG_PIXELS:
        raise ImageTooLargeError(f"{size}; a JPEG may have at most {MAX_JPEG_PIXELS}", max_image_pixels=MAX_JPEG_PIXELS)


def check_scans(header: ImageHeader) -> None:
    """Check that a JPEG has no more scans than are decoded; searches all of its bytes.

    Raises:
        InvalidImageError: the JPEG has more than MAX_SCANS scans.
        ImageTooLargeError: the JPEG has more scans than are decoded at its size.
    """
    most = MAX_PIXEL_SCANS // (header.width * header.height)
    if not jpeg.has_more_scans(header.data, min(most, jpeg.MAX_SCANS)):
        return
    if most >= jpeg.MAX_SCANS:
        raise InvalidImageError(f"the JPEG has more than {jpeg.MAX_SCANS} scans")
    raise ImageTooLargeError(
        f"the image has {header.width} x {header.height} pixels in more than {most} scans, the limit at that size",
        max_scans=most,
    )


def _decode(header: ImageHeader, config: SuperViTConfig, least_px: int, *, fast_resize: bool) -> Tensor:
    if header.format == "JPEG":
        check_scans(header)
    with codec_errors(header.format):
        image, orientation = decode(header, least_px)
        picture, factor = _shrink(image, least_px)
    scale = jpeg_scale(header, least_px) if header.format == "JPEG" else 1
    width, height = (header.width / scale, header.height / scale) if scale > 1 else image.size
    turn = TURNS.get(orientation)
    if not fast_resize:
        return evaluation_transform(config)(picture if turn is None else picture.transpose(turn))
    resized = _resize(picture, width / factor, height / factor, resized_side(config), config.interpolation)
    return _crop(resized, turn, config.image_side)


def _shrink(image: Image.Image, least_px: int) -> tuple[Image.Image, int]:
    """Convert a picture to RGB, cut it to MAX_ASPECT_RATIO, and average a large one to a fraction of its size.

    Returns:
        The picture, and the factor by which both of its sides are smaller than the image's. The last row or column may
        be the average of fewer pixels.
    """
    factor = max(1, min(image.size) // least_px)
    image = limit_aspect_ratio(image) if factor == 1 else image
    if image.width * image.height <= STRIP_PIXELS:
        return (flatten(image).reduce(factor) if factor > 1 else flatten(image)), factor
    # In strips: as a whole, a grey picture would take four times its memory as RGB.
    rows = max(1, STRIP_PIXELS // image.width // factor) * factor
    picture = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, image.height, rows):
        strip = flatten(image.crop((0, top, image.width, min(top + rows, image.height))))
        picture.paste(strip.reduce(factor) if factor > 1 else strip, (0, top // factor))
    return limit_aspect_ratio(picture), factor


def _resize(picture: Image.Image, width: float, height: float, shorter: int, mode: Interpolation) -> Pixels:
    """Resize a picture with antialiasing, so that the shorter side gets a given length.

    Args:
        picture: RGB.
        width: width of the whole image, in pixels of the picture. It is fractional where the last column covers only a
            part of a pixel, and larger than the picture's where the picture was cut to MAX_ASPECT_RATIO.
        height: likewise.
        shorter: length of the resized shorter side, in pixels.
        mode: interpolation.

    Returns:
        (height, width, 3).
    """
    pixels: Pixels = np.array(picture)
    # A billionth more, here and below, keeps whole numbers from being rounded down.
    rows, columns = (int(shorter * length / min(width, height) + 1e-9) for length in (height, width))
    if (columns, rows) == picture.size:
        return pixels
    scale = [rows / height * (1 + 1e-9), columns / width * (1 + 1e-9)]
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = interpolate(images, scale_factor=scale, mode=mode, antialias=True)
    return resized[0, :, :rows, :columns].permute(1, 2, 0).numpy()


def _crop(pixels: Pixels, turn: Image.Transpose | None, side: int) -> Tensor:
    """Turn a picture upright and crop its centre to (3, side, side)."""
    if turn is not None:
        pixels = np.asarray(Image.fromarray(pixels).transpose(turn))
    top, left = (round((length - side) / 2) for length in pixels.shape[:2])
    # NumPy copies in this thread; PyTorch would use OpenMP threads that the engine needs.
    return torch.from_numpy(pixels[top : top + side, left : left + side].transpose(2, 0, 1).copy())
