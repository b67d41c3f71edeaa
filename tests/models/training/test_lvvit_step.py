"""A training step of an LV-ViT, compared with a plain reference: image by image, in double precision."""

import math
import random
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.mix_token import TokenBox
from models.subnetwork import SuperViTConfig
from models.supervit import SuperViT
from models.training.objective import Batch, Learner, PairChoice, PairLoss, Targets, training_step

GRIDS, HEADS, WIDTH = (2, 3, 5), 2, 16
FULL_PRECISION = torch.autocast("cpu", enabled=False)
Weights = dict[str, Tensor]


def normed(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def patches_of(w: Weights, images: Tensor, grid: int) -> Tensor:
    """Compute the stem's (B, grid, grid, D) patches; batch norm uses the statistics of the batch."""
    x = functional.interpolate(images, (4 * grid, 4 * grid), mode="bilinear", align_corners=True)
    for i, (stride, padding) in enumerate(((2, 3), (1, 1), (1, 1)), start=1):
        x = functional.conv2d(x, w[f"patch_embed.conv{i}.weight"], stride=stride, padding=padding)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        scale, shift = (w[f"patch_embed.bn{i}.{leaf}"].view(1, -1, 1, 1) for leaf in ("weight", "bias"))
        x = ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)
    return functional.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=2).permute(0, 2, 3, 1)


def transformed(w: Weights, x: Tensor, rate: float) -> Tensor:
    """Apply the three blocks, of which the last two prune, to the (N, D) tokens of one image."""
    for block in range(3):
        of = f"blocks.{block}"
        query, key, value = (normed(w, f"{of}.norm1", x) @ w[f"{of}.attn.qkv.weight"].T).chunk(3, dim=1)
        heads, to_patches = [], torch.zeros(len(x) - 1, dtype=torch.float64)
        for head in range(HEADS):
            part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            attention = (query[:, part] @ key[:, part].T / math.sqrt(WIDTH / HEADS)).softmax(1)
            heads.append(attention @ value[:, part])
            to_patches = to_patches + attention[0, 1:].detach()
        x = x + (torch.cat(heads, 1) @ w[f"{of}.attn.proj.weight"].T + w[f"{of}.attn.proj.bias"]) / 2
        if block > 0 and rate < 1:
            kept = min(math.ceil(rate * len(x)), len(x) - 1)
            best = sorted(range(len(x) - 1), key=lambda token: -to_patches[token])[:kept]
            x = torch.stack([x[0], *(x[1 + token] for token in best)])
        hidden = normed(w, f"{of}.norm2", x) @ w[f"{of}.mlp.fc1.weight"].T + w[f"{of}.mlp.fc1.bias"]
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + (hidden @ w[f"{of}.mlp.fc2.weight"].T + w[f"{of}.mlp.fc2.bias"]) / 2
    return normed(w, "norm", x)


def plain_losses(
    w: Weights, images: Tensor, labels: Tensor, maps: Tensor, box: TokenBox, subnetworks: list[tuple[int, float]]
) -> list[Tensor]:
    """Compute the four losses for (B, classes) labels and (B, grid, grid, classes) maps of token labels."""
    count, largest = len(images), GRIDS[-1]
    logits: list[list[Tensor]] = []
    token_losses = []
    for number, (grid, rate) in enumerate(subnetworks):
        top, bottom, left, right = (side * grid // largest for side in (box.top, box.bottom, box.left, box.right))
        patches, answers, outputs = patches_of(w, images, grid), [], []
        for image in range(count):
            tokens = [w["cls_token"][0, 0]]
            for row in range(grid):
                for column in range(grid):
                    inside = top <= row < bottom and left <= column < right
                    tokens.append(patches[count - 1 - image if inside else image, row, column])
            embedded = torch.stack(tokens) + w[f"pos_embed_list.{GRIDS.index(grid)}"][0]
            last = transformed(w, embedded, rate)
            answers.append(w["head.weight"] @ last[0] + w["head.bias"])
            outputs.append(last[1:] @ w["aux_head.weight"].T + w["aux_head.bias"])
        logits.append(answers)
        if number == 0:
            for image in range(count):
                for row in range(grid):
                    for column in range(grid):
                        inside = top <= row < bottom and left <= column < right
                        output = outputs[count - 1 - image if inside else image][row * grid + column]
                        token_losses.append(-(maps[image, row, column] * output.log_softmax(0)).sum())
    share = 1 - (box.bottom - box.top) * (box.right - box.left) / largest**2
    mixed = [share * labels[image] + (1 - share) * labels[count - 1 - image] for image in range(count)]
    first, third = (
        torch.stack(
            [-(label * answer.log_softmax(0)).sum() for label, answer in zip(mixed, answers, strict=True)]
        ).mean()
        for answers in (logits[0], logits[2])
    )
    example = [answer.detach().softmax(0) for answer in logits[0]]
    second, fourth = (
        torch.stack(
            [(p * (p.log() - answer.log_softmax(0))).sum() for p, answer in zip(example, answers, strict=True)]
        ).mean()
        for answers in (logits[1], logits[3])
    )
    return [first + torch.stack(token_losses).mean(), second, third, fourth]


def mean_of(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_a_training_step_has_the_losses_and_gradients_of_a_plain_reference(
    seed: int, build: Callable[[SuperViTConfig], SuperViT]
) -> None:
    choice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    config = SuperViTConfig(
        "lvvit", WIDTH, 3, HEADS, patch_kernel=4, patch_grids=GRIDS, prune_blocks=(1, 2), num_classes=4, stem_width=3
    )
    model = build(config).train()
    with torch.no_grad():  # spread enough for the sub-networks to answer differently
        for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
            norm.weight.add_(2)
    count, subnetworks = choice.choice((3, 4)), [(5, 1.0), (5, choice.choice((0.5, 0.7))), (choice.choice((2, 3)), 1.0)]
    subnetworks.append((subnetworks[2][0], choice.choice((0.5, 0.7))))
    rows, columns = (sorted(choice.sample(range(6), 2)) for _ in range(2))
    box = TokenBox(5, *rows, *columns)
    images = torch.randn(count, 3, 20, 20, generator=generator)
    labels = torch.rand(count, 4, generator=generator).softmax(1)
    has_maps = seed % 2 == 0
    maps = torch.rand(count, 25, 4, generator=generator).softmax(2) if has_maps else labels[:, None].expand(-1, 25, -1)

    weights = {name: tensor.double().detach().requires_grad_() for name, tensor in model.named_parameters()}
    expected = plain_losses(
        weights, images.double(), labels.double(), maps.double().reshape(count, 5, 5, 4), box, subnetworks
    )
    torch.autograd.backward(expected)

    pairs = tuple(PairChoice(whole[0], 1.0, pruned[1]) for whole, pruned in (subnetworks[:2], subnetworks[2:]))
    learner = Learner(PairLoss(model, 0.1, 0.5), torch.optim.SGD(model.parameters(), lr=0.0), FULL_PRECISION)
    targets = Targets(labels, tokens=maps if has_maps else None)
    losses = training_step(learner, Batch(images, targets, pairs, box))
    assert list(losses.values()) == pytest.approx([loss.item() for loss in expected], rel=1e-5, abs=1e-6)
    assert min(losses.values()) > 1e-4
    for name, parameter in model.named_parameters():
        gradient = weights[name].grad
        if gradient is None:
            assert parameter.grad is None
            assert name == f"pos_embed_list.{1 if subnetworks[2][0] == 2 else 0}"  # of the grid that took no part
        else:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad.double(), gradient, atol=1e-4, rtol=1e-3, msg=name)
