from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from models.devices import DeviceError
from models.subnetwork import SuperViTConfig
from models.supervit import SuperViT
from service.engines.factory import make_engine
from service.engines.openvino_engine import OpenVINOEngine
from service.engines.torch_engine import TorchEngine

CONFIG = SuperViTConfig(
    width=16, depth=3, num_heads=2, patch_kernel=4, patch_grids=(2, 4), prune_blocks=(1,), num_classes=3
)


@pytest.fixture
def build() -> Callable[..., SuperViT]:
    def build(**changes: bool) -> SuperViT:
        torch.manual_seed(1)
        return SuperViT(replace(CONFIG, **changes)).eval()  # type: ignore[arg-type] # flags alone

    return build


def test_openvino_serves_on_a_cpu_unless_told_otherwise(build: Callable[..., SuperViT]) -> None:
    assert isinstance(make_engine("auto", build(), "cpu", 1), OpenVINOEngine)
    assert isinstance(make_engine("openvino", build(), "cpu", 1), OpenVINOEngine)
    assert isinstance(make_engine("torch", build(), "cpu", 1), TorchEngine)


def test_a_model_that_fuses_what_it_prunes_runs_on_torch_alone(build: Callable[..., SuperViT]) -> None:
    model = build(fuse_pruned=True)
    engine = make_engine("auto", model, "cpu", 1)
    assert isinstance(engine, TorchEngine)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    subnetwork = replace(CONFIG.largest, keep_rate=0.5)
    assert not torch.equal(engine.run(images, subnetwork), TorchEngine(build(), "cpu", 1).run(images, subnetwork))
    with pytest.raises(DeviceError, match="cannot run a model that fuses"):
        make_engine("openvino", model, "cpu", 1)
