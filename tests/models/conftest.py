"""Tiny models, images and folders shared by all tests of the models."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from models import devices
from models.checkpoint import save_checkpoint
from models.devices import native_dtype
from models.header import Header
from models.profiles import ProfileTable
from models.subnetwork import Flavour, SuperViTConfig
from models.supervit import SuperViT
from models.training.recipe import Recipe

TINY = SuperViTConfig(
    width=16,
    depth=3,
    num_heads=2,
    patch_kernel=4,
    patch_grids=(2, 3, 4),
    prune_blocks=(1, 2),
    num_classes=3,
    stem_width=4,
)
CLASS_NAMES = ("blue", "green", "red")

# parity.npz holds the logits of the reference implementation for the weights and images drawn from this seed: per
# flavour (12 sub-networks, 2 images, 125 classes), and which 125 of the 1000 classes they belong to.
PARITY_SEED = 20220523
PARITY_FILE = Path(__file__).with_name("parity.npz")


@pytest.fixture(scope="session", autouse=True)
def single_thread() -> None:
    """Compute on one thread: threads that wait for one another make tiny products 40 times slower on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def fast_precision() -> Iterator[torch.dtype]:
    """Yield the native dtype of the CPU, under an autocast to another one that the code under test must override."""
    fast = native_dtype(torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=fast == torch.float32):
        yield fast


@pytest.fixture
def torchrun() -> Callable[..., None]:
    """Run a script of this folder in two processes."""

    def run(name: str, *arguments: object) -> None:
        script = Path(__file__).parent / name
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
        finished = subprocess.run(
            [*map(str, command), *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": str(script.parents[3]), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            cwd=script.parents[3],
            capture_output=True,
            text=True,
            timeout=600,  # a busy machine starts processes slowly
            check=False,
        )
        assert finished.returncode == 0, finished.stderr

    return run


@pytest.fixture
def tiny_config() -> SuperViTConfig:
    """Three grids, three keep rates, two blocks that prune, 16 px images."""
    return TINY


@pytest.fixture(params=["deit", "lvvit"])
def config(request: pytest.FixtureRequest) -> SuperViTConfig:
    """The tiny configuration in both flavours."""
    return replace(TINY, flavour=cast("Flavour", request.param))


@pytest.fixture
def build() -> Callable[[SuperViTConfig], SuperViT]:
    """Build models whose weights are spread so widely that token scores and logits have clear margins."""

    def build(config: SuperViTConfig) -> SuperViT:
        torch.manual_seed(7)
        model = SuperViT(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        return model.eval()

    return build


@pytest.fixture
def model(config: SuperViTConfig, build: Callable[[SuperViTConfig], SuperViT]) -> SuperViT:
    return build(config)


@pytest.fixture
def deit(tiny_config: SuperViTConfig, build: Callable[[SuperViTConfig], SuperViT]) -> SuperViT:
    """The tiny model without batch norm, which treats every image by itself."""
    return build(tiny_config)


@pytest.fixture
def images() -> Tensor:
    """(4, 3, 16, 16), normalised."""
    return torch.randn(4, 3, TINY.image_side, TINY.image_side, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 2, 1, 2])


@pytest.fixture
def tiny_header(config: SuperViTConfig) -> Header:
    return Header("tiny", config, CLASS_NAMES, ProfileTable.unmeasured(config))


@pytest.fixture
def tiny_file(tmp_path: Path, model: SuperViT, tiny_header: Header) -> Path:
    """A checkpoint in our own format."""
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, model, tiny_header)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 48 small pictures for training and 12 in val/: noise, tinted by class."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(5)
    for split, per_class in (("train", 16), ("val", 4)):
        for channel, name in enumerate(reversed(CLASS_NAMES)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(per_class):
                pixels = rng.integers(0, 160, (18, 20, 3), dtype=np.uint8)
                pixels[:, :, channel] += 90
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture
def tiny_recipe(pictures: Path) -> Callable[..., Recipe]:
    """Recipes for `TINY` on `pictures`: three epochs of six steps, float32, nothing random but the order and crops."""

    def recipe(output: Path, **options: object) -> Recipe:
        tiny = {
            "data": pictures,
            "model": "supervit_deit_small_patch16_224",
            "width": TINY.width,
            "depth": TINY.depth,
            "num_heads": TINY.num_heads,
            "patch_kernel": TINY.patch_kernel,
            "patch_grids": TINY.patch_grids,
            "prune_blocks": TINY.prune_blocks,
            "epochs": 3,
            "batch_size": 8,
            "workers": 0,
            "device": "cpu",
            "precision": "float32",
        }
        return Recipe.model_validate(tiny | {"output": output} | options)

    return recipe


@pytest.fixture(scope="session")
def drawn_weights() -> Callable[[SuperViTConfig], dict[str, Tensor]]:
    """Draw the weights of a full-size backbone from the parity seed, tensor by tensor in order of the state dict."""

    @cache
    def draw(config: SuperViTConfig) -> dict[str, Tensor]:
        rng = np.random.default_rng(PARITY_SEED)
        with torch.device("meta"):
            blank = SuperViT(config).state_dict()
        weights = {}
        for name, tensor in blank.items():
            if name.endswith("num_batches_tracked"):
                weights[name] = torch.tensor(1000)
                continue
            sample = torch.from_numpy(rng.standard_normal(tuple(tensor.shape)).astype(np.float32))
            weights[name] = _shift_and_scale(name, sample)
        return weights

    return draw


def _shift_and_scale(name: str, sample: Tensor) -> Tensor:
    part, _, leaf = name.rpartition(".")
    if leaf == "running_var":
        return 1 + 0.3 * sample.abs()
    if part.rpartition(".")[2].startswith(("norm", "bn")):
        return float(leaf == "weight") + 0.1 * sample
    if sample.ndim == 4:
        return (sample.double() / math.sqrt(sample[0].numel())).float()
    if sample.ndim == 3:  # class token and position embeddings
        return 0.5 * sample
    if leaf == "bias":
        return 0.05 * sample
    return (0.1 if part in ("head", "aux_head") else 0.06) * sample


@pytest.fixture(scope="session")
def parity_images() -> Tensor:
    coarse = np.random.default_rng(PARITY_SEED + 1).standard_normal((2, 3, 28, 28)).astype(np.float32)
    return functional.interpolate(torch.from_numpy(coarse), (224, 224), mode="bicubic", align_corners=False)


@pytest.fixture(scope="session")
def parity_logits() -> dict[str, Tensor]:
    """The reference's logits by flavour, and the `classes` that they belong to."""
    with np.load(PARITY_FILE) as file:
        return {name: torch.from_numpy(file[name]) for name in file}


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in float32, for comparisons of more digits than bfloat16, the native dtype of some CPUs, has."""
    monkeypatch.setattr(devices, "native_dtype", lambda *_: torch.float32)
