from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.flops import count_macs
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import DEIT_SMALL, LVVIT_MICRO, LVVIT_SMALL, SuperViT

# Published GMACs by grid and then keep rate 0.5, 0.7, 1.
PUBLISHED = {
    "deit": (0.742, 0.972, 1.438, 1.155, 1.515, 2.268, 1.668, 2.194, 3.315, 2.298, 3.013, 4.599),
    "lvvit": (1.115, 1.402, 2.052, 1.737, 2.185, 3.236, 2.500, 3.153, 4.728, 3.432, 4.319, 6.551),
}


@pytest.mark.parametrize("config", [DEIT_SMALL, LVVIT_SMALL], ids=["deit", "lvvit"])
def test_macs_of_the_published_backbones_match_to_three_decimals(config: SuperViTConfig) -> None:
    gmacs = [round(count_macs(config, subnetwork) / 1e9, 3) for subnetwork in config.subnetworks]
    assert gmacs == list(PUBLISHED[config.flavour])


def test_macs_of_a_single_block_deit_match_a_count_by_hand() -> None:
    config = SuperViTConfig(
        width=4, depth=1, num_heads=2, mlp_ratio=2.0, patch_kernel=2, patch_grids=(3,), prune_blocks=(0,), num_classes=5
    )
    embedding = 9 * 2 * 2 * 3 * 4
    attention = 10 * 4 * 12 + 2 * 10 * 10 * 4 + 10 * 4 * 4
    head = 4 * 5
    assert count_macs(config, SubNetwork(3, 1.0)) == embedding + attention + 2 * 10 * 4 * 8 + head
    assert count_macs(config, SubNetwork(3, 0.5)) == embedding + attention + 2 * 6 * 4 * 8 + head


def test_macs_are_half_the_flops_that_torch_counts(model: SuperViT, config: SuperViTConfig, images: Tensor) -> None:
    # Blocks in training mode on a CPU take the class row from the explicit attention: nothing is computed in addition.
    model.eval().blocks.train()
    for subnetwork in (*config.subnetworks, SubNetwork(3, 0.33), SubNetwork(4, 1e-6)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images, subnetwork)
        assert counter.get_total_flops() == 2 * len(images) * count_macs(config, subnetwork)


def test_macs_include_the_fused_token_in_every_block_that_processes_it(
    tiny_config: SuperViTConfig, build: Callable[[SuperViTConfig], SuperViT], images: Tensor
) -> None:
    config = replace(tiny_config, fuse_pruned=True)
    for subnetwork in config.subnetworks:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            build(config).train()(images, subnetwork)
        assert counter.get_total_flops() == 2 * len(images) * count_macs(config, subnetwork)


def test_macs_of_the_micro_model_are_half_the_flops_that_torch_counts() -> None:
    model = SuperViT(LVVIT_MICRO).eval()
    model.blocks.train()
    images = torch.zeros(2, 3, 32, 32)
    for subnetwork in LVVIT_MICRO.subnetworks:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images, subnetwork)
        assert counter.get_total_flops() == 2 * len(images) * count_macs(LVVIT_MICRO, subnetwork)
