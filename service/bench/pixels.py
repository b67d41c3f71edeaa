"""Turns a photograph into pixels, for models that decode no files. Imports PyTorch, which takes seconds."""

from models.data.images import normalise
from models.subnetwork import SuperViTConfig
from service.decoding.images import decode_image

MAX_PIXELS = 50_000_000


def to_pixels(image: bytes, side: int, datatype: str) -> bytes:
    """Decode an image, and resize and crop it as evaluations do.

    Args:
        image: the bytes of an image file.
        side: S in pixels.
        datatype: "UINT8", or "FP32", normalised by ImageNet's mean and standard deviation.

    Returns:
        (3, S, S), little-endian, row by row.

    Raises:
        InvalidImageError, ImageTooLargeError, UnsupportedMediaError: the image cannot be decoded.
    """
    # A stand-in for the configuration of another kind of model; only its side and normalisation are used here.
    config = SuperViTConfig(patch_kernel=1, patch_grids=(side,))
    pixels = decode_image(image, config, MAX_PIXELS)
    if datatype == "UINT8":
        return pixels.numpy().tobytes()
    return normalise(pixels.unsqueeze(0), config).numpy().astype("<f4").tobytes()
