"""Images as tensors: RGB conversion, the evaluation transform, normalisation. Does not handle labels.

Training, evaluation and serving share `to_rgb`, `evaluation_transform` and `normalise`, so that a checkpoint is served
with the preprocessing on which it was measured.
"""

import struct
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image
from torch import Tensor

from models.subnetwork import Interpolation, SuperViTConfig

# A longer picture is cropped to this ratio around its centre before resizing; a 1 x 100,000 px one would fill memory.
MAX_ASPECT_RATIO = 8

# Errors that Pillow's codecs are known to raise on malformed bytes.
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

# The transposition that turns a picture upright, by the orientation that its camera stored (Exif 2.3, table 4).
TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Transform = Callable[[Image.Image], Tensor]

# Replaces a picture that cannot be read, where a batch must keep its size.
BLANK = Image.new("RGB", (1, 1))


class UnreadableImageError(Exception):
    """A file is not a picture, or is a broken one; the message names it."""


def load_rgb(path: str) -> Image.Image:
    """Decode a file to an RGB picture.

    Raises:
        UnreadableImageError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (*CODEC_ERRORS, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableImageError(f"{path}: not a readable image: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded picture of any mode to RGB as a viewer shows it: upright, 8 bits, transparency on white."""
    turn = turn_upright(image)
    return flatten(image if turn is None else image.transpose(turn))


def turn_upright(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that turns a picture upright; None where it is upright or states no orientation."""
    # ImageOps.exif_transpose does more: it rewrites the metadata, which fails on what some cameras store there, and
    # copies every picture that needs no turning.
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, ValueError, TypeError, struct.error):  # a picture with broken metadata can still be used
        return None


def _scaled_to_16_bits(image: Image.Image) -> npt.NDArray[np.float32]:
    """Scale grey of 32 bits per pixel to 0..65535: such files hold 0..1, 0..255 or 0..65535."""
    levels = np.array(image, np.float32)
    np.nan_to_num(levels, copy=False)
    if levels.max() <= 255:
        levels *= 65535 if image.mode == "F" and levels.max() <= 1 else 257
    return levels


def flatten(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to 8-bit RGB, transparency on white. An RGB picture is not copied."""
    if image.mode.startswith(("I", "F")):  # convert() would clip 16-bit grey to white
        stored = _scaled_to_16_bits(image) if image.mode in ("I", "F") else np.asarray(image)
        levels = stored.clip(0, 65535).astype(np.uint16)
        grey = (levels >> 8).astype(np.uint8)
        grey[levels == image.info.get("transparency")] = 255
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba)  # unlike alpha_composite, paste releases the GIL
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()  # the file may be closed next
    return image


def resized_side(config: SuperViTConfig) -> int:
    """Return the side in pixels to which the shorter side of a picture is resized before the centre crop."""
    return int(config.image_side / config.crop_fraction)


def limit_aspect_ratio(image: Image.Image) -> Image.Image:
    """Crop a picture that is longer than MAX_ASPECT_RATIO around its centre; return any other unchanged."""
    width, height = image.size
    longest = MAX_ASPECT_RATIO * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, width - left, height - top))


def evaluation_transform(config: SuperViTConfig) -> Transform:
    """Return the transform of an RGB picture to (3, S, S) uint8: resize the shorter side, crop the centre.

    Pillow resizes with antialiasing, as in the published evaluations. The picture may have any size.
    """
    return square_transform(resized_side(config), config.image_side, config.interpolation)


def square_transform(resized: int, side: int, interpolation: Interpolation = "bicubic") -> Transform:
    """Return the transform of an RGB picture to (3, side, side) uint8: shorter side to `resized`, then centre."""
    return partial(_to_square, resized=resized, side=side, resampling=Image.Resampling[interpolation.upper()])


def _to_square(image: Image.Image, *, resized: int, side: int, resampling: Image.Resampling) -> Tensor:
    """Do what torchvision's Resize, CenterCrop and PILToTensor do, without its import, which takes seconds."""
    image = limit_aspect_ratio(image)
    width, height = image.size
    shorter = min(width, height)
    if shorter != resized:
        image = image.resize((int(resized * width / shorter), int(resized * height / shorter)), resampling)
    left, top = (round((length - side) / 2) for length in image.size)
    pixels = np.array(image.crop((left, top, left + side, top + side)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


class Normalisation:
    """Normalises a model's images. Its constants are created once: a CUDA graph must not copy from the host."""

    def __init__(self, config: SuperViTConfig, device: torch.device) -> None:
        """Create the constants on the device of the images."""
        self._mean, self._std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (config.mean, config.std)
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Scale (B, 3, S, S) uint8 images to [0, 1] and normalise them, float32."""
        return (images.float() / 255 - self._mean) / self._std


def normalise(images: Tensor, config: SuperViTConfig) -> Tensor:
    """Scale (B, 3, S, S) uint8 images to [0, 1] and normalise them, float32, on their own device."""
    return Normalisation(config, images.device)(images)
