import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import timm.optim.muon
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn

from models.subnetwork import Flavour, SuperViTConfig
from models.supervit import SuperViT
from models.training.muon import Muon, is_matrix


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("flavour", ["deit", "lvvit"])
def test_muon_takes_the_steps_of_timms_muon_in_full_precision(
    flavour: Flavour,
    tiny_config: SuperViTConfig,
    build: Callable[[SuperViTConfig], SuperViT],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(tiny_config, flavour=flavour, num_classes=4)  # timm leaves matrices of 3 rows to AdamW
    precise = partial(timm.optim.muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", precise)
    ours, theirs = build(config), build(config)
    groups = param_groups_weight_decay(ours, 0.1, no_weight_decay_list=ours.no_weight_decay())
    optimizer = Muon(groups, lr=0.02, weight_decay=0.1)
    reference = create_optimizer_v2(theirs, opt="muon", lr=0.02, weight_decay=0.1)
    for step in range(4):
        for model in (ours, theirs):
            gradients(model, step)
        optimizer.step()
        reference.step()
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=1e-4, msg=name)


def test_a_step_moves_a_matrix_by_about_the_same_length_in_every_direction() -> None:
    matrix = nn.Parameter(torch.zeros(6, 4))
    matrix.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    Muon([matrix], lr=0.5, weight_decay=0.0).step()
    lengths = torch.linalg.svdvals(matrix.detach()) / (0.5 * 0.2 * 6**0.5)
    assert lengths.min() > 0.7
    assert lengths.max() < 1.3


def test_weights_that_map_features_to_features_count_as_matrices() -> None:
    assert is_matrix(torch.zeros(3, 4))
    assert is_matrix(torch.zeros(3, 4, 2, 2))
    assert not is_matrix(torch.zeros(4))
    assert not is_matrix(torch.zeros(1, 17, 8))  # a position embedding


def test_a_step_keeps_gradients_and_skips_parameters_without_one() -> None:
    layer, idle = nn.Linear(3, 4), nn.Linear(3, 4)
    before = idle.weight.clone()
    gradients(layer, 1)
    held = layer.weight.grad
    Muon([*layer.parameters(), *idle.parameters()], lr=0.1, weight_decay=0.1).step()
    assert layer.weight.grad is held
    assert torch.equal(idle.weight, before)


def test_a_step_with_a_closure_uses_the_gradients_of_the_closure() -> None:
    given, held = nn.Linear(4, 4), nn.Linear(4, 4)
    held.load_state_dict(given.state_dict())
    inputs = torch.ones(2, 4)

    def closure() -> float:
        loss = given(inputs).square().mean()
        loss.backward()
        return float(loss.item())

    assert Muon(given.parameters(), 0.1, 0.0).step(closure) == pytest.approx(held(inputs).square().mean().item())
    held(inputs).square().mean().backward()
    Muon(held.parameters(), 0.1, 0.0).step()
    assert torch.equal(given.weight, held.weight)
    assert torch.equal(given.bias, held.bias)


def test_an_optimizer_with_a_loaded_state_continues_like_the_saved_one() -> None:
    torch.manual_seed(2)
    layers = [nn.Linear(5, 4), nn.Linear(5, 4)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [Muon(layer.parameters(), lr=0.1, weight_decay=0.1) for layer in layers]
    for step in range(4):
        if step == 2:
            optimizers[1] = Muon(layers[1].parameters(), lr=0.3, weight_decay=0.3)
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for layer, optimizer in zip(layers, optimizers, strict=True):
            gradients(layer, step)
            optimizer.step()
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(layers[0].bias, layers[1].bias)
