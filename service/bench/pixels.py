"""A photograph as the pixels that models without a decoder of their own take. Needs PyTorch, which takes seconds."""

from models.data.images import normalise
from models.subnetwork import SuperViTConfig
from service.decoding.images import decode_image

MAX_PIXELS = 50_000_000


def to_pixels(image: bytes, side: int, datatype: str) -> bytes:
    """Decode an image, resize and crop it as evaluations do.

    Args:
        image: a file.
        side: S in pixels.
        datatype: "UINT8", or "FP32", normalised by ImageNet's mean and standard deviation.

    Returns:
        (3, S, S), little-endian, row by row.

    Raises:
        InvalidImageError, ImageTooLargeError, UnsupportedMediaError: it cannot be decoded.
    """
    # Of a model of another kind; its side and the normalisation are all that counts here.
    config = SuperViTConfig(patch_kernel=1, patch_grids=(side,))
    pixels = decode_image(image, config, MAX_PIXELS)
    if datatype == "UINT8":
        return pixels.numpy().tobytes()
    return normalise(pixels.unsqueeze(0), config).numpy().astype("<f4").tobytes()
