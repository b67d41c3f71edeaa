"""A tiny checkpoint with a measured profile, a catalog with round latencies, and images in every format."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pillow_heif
import pytest
import torch
from PIL import Image

from models.checkpoint import Checkpoint, save_checkpoint
from models.flops import count_macs
from models.header import Header
from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import SuperViT
from service.decoding.images import OpenedImage
from service.scheduling.catalog import VariantCatalog

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
# (2, 1) is dominated: it is less accurate than (2, 0.5), which costs less.
TOP1 = {SubNetwork(2, 0.5): 0.5, SubNetwork(2, 1.0): 0.45, SubNetwork(4, 0.5): 0.7, SubNetwork(4, 1.0): 0.8}
# Seconds of batches of 1, 2, 3 and 4: a fixed part and a part for each image, so that they are easy to compute.
SECONDS = {
    SubNetwork(2, 0.5): (2.0, 3.0, 4.0, 5.0),
    SubNetwork(4, 0.5): (4.0, 6.0, 8.0, 10.0),
    SubNetwork(4, 1.0): (8.0, 12.0, 16.0, 20.0),
    SubNetwork(2, 1.0): (6.0, 9.0, 12.0, 15.0),
}


def stand_in(*class_names: str) -> Checkpoint:
    """Return the checkpoint that a pipeline reports; it has no model."""
    rows = tuple(SubNetworkProfile(sub, count_macs(CONFIG, sub), top1) for sub, top1 in TOP1.items())
    return Checkpoint("tiny", "0123456789ab", cast(SuperViT, None), CONFIG, class_names, ProfileTable(rows))


def opening(
    decode: Callable[[bytes], torch.Tensor], cost_s: float = 0.05, kind: str = "picture", memory_bytes: int = 0
) -> Callable[[bytes], OpenedImage]:
    """Return a function that opens any bytes as an image of one kind, which `decode` decodes."""
    return lambda data: OpenedImage(kind, cost_s, memory_bytes, lambda: decode(data))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def profiles() -> ProfileTable:
    return ProfileTable(
        tuple(SubNetworkProfile(sub, count_macs(CONFIG, sub), top1, top1 + 0.1) for sub, top1 in TOP1.items())
    )


@pytest.fixture
def catalog(profiles: ProfileTable) -> VariantCatalog:
    """Three levels, (2, 0.5), (4, 0.5) and (4, 1); the fourth option, (2, 1), is on no level."""
    return VariantCatalog.of(profiles, LatencyTable((1, 2, 3, 4), SECONDS))


@pytest.fixture
def fast_catalog(profiles: ProfileTable) -> VariantCatalog:
    """The same catalog, 100 times as fast: in batches of 4, the levels answer 80, 40 and 20 requests a second."""
    seconds = {subnetwork: tuple(each / 100 for each in row) for subnetwork, row in SECONDS.items()}
    return VariantCatalog.of(profiles, LatencyTable((1, 2, 3, 4), seconds))


@pytest.fixture
def checkpoint(profiles: ProfileTable) -> Checkpoint:
    torch.manual_seed(0)
    model = SuperViT(CONFIG).eval()
    names = tuple(f"thing {index}" for index in range(CONFIG.num_classes))
    return Checkpoint("tiny", "0123456789ab", model, CONFIG, names, profiles)


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """Encode an image: encode(image, "PNG", **options) -> bytes."""

    def encode(image: Image.Image, image_format: str = "PNG", **variants: object) -> bytes:
        buffer = io.BytesIO()
        if image_format == "HEIF":
            pillow_heif.from_pillow(image).save(buffer, **variants)
        else:
            image.save(buffer, image_format, **variants)
        return buffer.getvalue()

    return encode


@pytest.fixture
def photo(encode: Callable[..., bytes]) -> bytes:
    """A JPEG with some structure."""
    gradient = Image.linear_gradient("L").resize((60, 40))
    return encode(Image.merge("RGB", (gradient, gradient.rotate(90, expand=False), gradient)), "JPEG")


@pytest.fixture
def checkpoint_path(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    header = Header(checkpoint.name, checkpoint.config, checkpoint.class_names, checkpoint.profile)
    save_checkpoint(path, checkpoint.model, header)
    return path


@pytest.fixture
def photo_path(photo: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo)
    return path
