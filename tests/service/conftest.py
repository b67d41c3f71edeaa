"""A tiny checkpoint with a measured profile, and pictures in every format."""

import io
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from models.checkpoint import Checkpoint
from models.flops import count_macs
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import SuperViT

CONFIG = SuperViTConfig(
    flavour="deit",
    width=16,
    depth=2,
    num_heads=2,
    patch_kernel=4,
    patch_grids=(2, 4),
    keep_rates=(0.5, 1.0),
    prune_blocks=(1,),
    num_classes=7,
    crop_fraction=1.0,
)
# The largest grid's pruned sub-network costs less than the smaller grid's would suggest: (2, 1) is dominated.
TOP1 = {SubNetwork(2, 0.5): 0.5, SubNetwork(2, 1.0): 0.45, SubNetwork(4, 0.5): 0.7, SubNetwork(4, 1.0): 0.8}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def profiles() -> ProfileTable:
    return ProfileTable(
        tuple(SubNetworkProfile(sub, count_macs(CONFIG, sub), top1, top1 + 0.1) for sub, top1 in TOP1.items())
    )


@pytest.fixture
def checkpoint(profiles: ProfileTable) -> Checkpoint:
    torch.manual_seed(0)
    model = SuperViT(CONFIG).eval()
    names = tuple(f"thing {index}" for index in range(CONFIG.num_classes))
    return Checkpoint("tiny", "0123456789ab", model, CONFIG, names, profiles)


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """Encode a picture: encode(image, "PNG", **options) -> bytes."""

    def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, image_format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def photo(encode: Callable[..., bytes]) -> bytes:
    """A JPEG with some structure."""
    gradient = Image.linear_gradient("L").resize((60, 40))
    return encode(Image.merge("RGB", (gradient, gradient.rotate(90, expand=False), gradient)), "JPEG")
