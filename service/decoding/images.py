"""Untrusted bytes to a checked (3, S, S) uint8 tensor. Codecs enter here alone; runs on worker threads.

What comes out is what `evaluation_transform` makes of the same picture, to within rounding; of large photos, which are
decoded at a fraction of their size, nearly so. tests/benchmarks/bench_images.py measures both.
"""

import io
import re

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn.functional import interpolate

from models.data.images import (
    CODEC_ERRORS,
    evaluation_transform,
    flatten,
    limit_aspect_ratio,
    resized_side,
    turn_upright,
)
from models.subnetwork import Interpolation, SuperViTConfig
from service.errors import ImageTooLargeError, InvalidImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# A picture is decoded smaller only as long as its shorter side keeps this length and this multiple of the resized one.
# With less, a model of 32 pixels sees another class in 3 of 100 photos of 500 x 375.
LEAST_SIDE_PX = 512
LEAST_MULTIPLE = 2

# A JPEG's size bounds its pixels, not how often it refines them: 80 bytes more are 43 ms more for 50 million pixels.
# Encoders write 10 scans or so.
MAX_SCANS = 32
# Those that have a segment, and the image's start and end; between the bytes of a scan, libjpeg passes over all others.
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN = 0xD8, 0xD9, 0xDA
SLICE = 1 << 18  # bytes that are searched before other threads get the GIL

# interpolate() takes a quarter of Pillow's time where it is vectorised for uint8, and longer than Pillow elsewhere.
HAS_FAST_RESIZE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

Pixels = npt.NDArray[np.uint8]


def decode_image(
    data: bytes, config: SuperViTConfig, max_pixels: int, *, fast_resize: bool = HAS_FAST_RESIZE
) -> Tensor:
    """Decode the first frame of an image and bring it to the model's size.

    Args:
        data: JPEG, PNG, WebP, GIF or BMP.
        config: of the model: S and how to crop.
        max_pixels: most pixels that the header may announce.
        fast_resize: whether PyTorch resizes; otherwise Pillow does.

    Returns:
        (3, S, S) uint8.

    Raises:
        InvalidImageError: the bytes are empty, no such image, a broken one, or a JPEG of too many scans.
        ImageTooLargeError: the image has more pixels; nothing was decoded.
    """
    if not data:
        raise InvalidImageError("the image is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            columns, rows = image.size
            if columns * rows > max_pixels:
                raise ImageTooLargeError(
                    f"the image has {columns} x {rows} pixels, more than the {max_pixels} that this server decodes",
                    max_image_pixels=max_pixels,
                )
            if isinstance(image, JpegImageFile) and _has_more_scans(data, MAX_SCANS):
                raise InvalidImageError(f"the JPEG has more than {MAX_SCANS} scans")
            picture, width, height = _load(image, max(LEAST_SIDE_PX, LEAST_MULTIPLE * resized_side(config)))
            turn = turn_upright(image)
    except UnidentifiedImageError as error:
        raise InvalidImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError("the image is far too large", max_image_pixels=max_pixels) from error
    except CODEC_ERRORS as error:
        raise InvalidImageError(f"the image is broken: {error}") from error
    if not fast_resize:
        return evaluation_transform(config)(picture if turn is None else picture.transpose(turn))
    resized = _resize(picture, width, height, resized_side(config), config.interpolation)
    return _crop(resized, turn, config.image_side)


def _has_more_scans(data: bytes, limit: int) -> bool:
    """Tell whether a JPEG goes over its pixels more often than `limit` times."""
    at_most = sum(data.count(b"\xff\xda", start, start + SLICE + 1) for start in range(0, len(data), SLICE))
    if at_most <= limit:
        return False
    scans, position = 0, 0
    while scans <= limit and (marker := _next_marker(data, position)):  # what looks like one may be in a thumbnail
        code, position = marker[0][-1], marker.end()
        if code == END_OF_IMAGE and scans:  # what follows, as a film of the same moment, is not decoded
            break
        if code not in (START_OF_IMAGE, END_OF_IMAGE):
            scans += code == START_OF_SCAN
            position += int.from_bytes(data[position : position + 2])
    return scans > limit


def _next_marker(data: bytes, position: int) -> re.Match[bytes] | None:
    for start in range(position, len(data), SLICE):
        if marker := MARKER.search(data, start, start + SLICE + 1):
            return marker
    return None


def _load(image: Image.Image, least: int) -> tuple[Image.Image, float, float]:
    """Decode to RGB as it is stored, a large picture at a fraction of its size.

    Args:
        image: opened, not yet decoded.
        least: what to leave of the shorter side, in pixels, where there is more.

    Returns:
        The picture, and the width and height of the whole image in its pixels: a fraction where the last row or column
        of pixels is a part of one, and more than the picture has where that was too long and was cut.
    """
    draft = image.draft(None, (least, least))  # a JPEG decodes to 1/2, 1/4 or 1/8 at a fraction of the cost
    width, height = draft[1][2:] if draft else image.size
    picture = flatten(image)
    factor = min(picture.size) // least
    if factor > 1:
        picture, width, height = picture.reduce(factor), width / factor, height / factor
    return limit_aspect_ratio(picture), width, height


def _resize(picture: Image.Image, width: float, height: float, shorter: int, mode: Interpolation) -> Pixels:
    """Resize the shorter side to a length, with antialiasing.

    Args:
        picture: RGB.
        width: of the whole image, in pixels of the picture; may be a fraction.
        height: likewise.
        shorter: the length, in pixels.
        mode: by what the pixels between are found.

    Returns:
        (height, width, 3).
    """
    pixels: Pixels = np.array(picture)
    # A billionth more, here and below, keeps what should be whole from being rounded down.
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
    # NumPy copies in this thread; PyTorch would call in OpenMP threads that the engine needs.
    return torch.from_numpy(pixels[top : top + side, left : left + side].transpose(2, 0, 1).copy())
