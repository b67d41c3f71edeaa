"""Where the milliseconds of a training step go: `python -m tests.benchmarks.bench_training DATA [--batch-size 64]`.

Each part of the step is printed beside the part that it replaced, measured in turns in the same run: images decoded and
augmented one by one, and timm's Muon, which orthogonalises one matrix after another in bfloat16. Figures are medians
over the turns.
"""

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.profiler import ProfilerActivity, profile

from models.data.augmentation import Augmentation, training_transform
from models.data.datasets import open_training_data
from models.data.loaders import SampleLoader
from models.processes import ALONE
from models.training.batches import open_batches
from models.training.objective import Batch, Learner, PairLoss, Targets, sample_pairs, training_step
from models.training.recipe import Recipe
from models.training.setup import build_model, build_optimizer

PLAIN = Augmentation(None, 0.0)
NO_AUTOCAST = torch.autocast("cpu", enabled=False)
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "convolutions": ("aten::mkldnn_convolution", "aten::convolution_backward"),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "norms": ("norm",),
    "softmax": ("softmax",),
    "copies": ("aten::copy_", "aten::cat", "aten::gather", "aten::scatter_add_"),
}


def main() -> None:
    """Print the parts of a step, the parts that they replaced, and the kinds of operation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="supervit_lvvit_micro_patch4_32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    recipe = Recipe(
        data=options.data, output=Path("unused"), model=options.model, batch_size=options.batch_size, optimizer="muon"
    )
    torch.manual_seed(0)
    model = build_model(recipe, tuple(map(str, range(10)))).train()
    pair_loss = PairLoss(model, recipe.label_smoothing, recipe.teacher_weight)
    in_memory, from_files = batches(recipe, model.config), batches(recipe, model.config, one_by_one=True)
    images, labels = next(in_memory)
    ours = build_optimizer(recipe, model)
    timms = create_optimizer_v2(model, opt="muon", weight_decay=recipe.weight_decay)
    average = ModelEmaV3(model, recipe.ema_decay)
    idle = Learner(pair_loss, torch.optim.SGD(model.parameters(), lr=0.0), NO_AUTOCAST)
    for group in (*ours.param_groups, *timms.param_groups):
        group["lr"] = 1e-4

    def forward_and_backward() -> None:
        steps.update(["step"])
        pairs = sample_pairs(model.config, 0, steps["step"])
        training_step(idle, Batch(images, Targets(labels), pairs))

    steps: Counter[str] = Counter()
    parts: dict[str, Callable[[], object]] = {
        "forward and backward": forward_and_backward,
        "images, in memory": lambda: next(in_memory),
        "images, one by one": lambda: next(from_files),
        "update, our Muon": ours.step,
        "update, timm's Muon": timms.step,
        "average of the weights": lambda: average.update(model),
    }
    taken: dict[str, list[float]] = defaultdict(list)
    for turn in range(options.turns + 2):
        for name, part in parts.items():
            started_at = time.perf_counter()
            part()
            if turn >= 2:
                taken[name].append(1000 * (time.perf_counter() - started_at))
    figures = {name: median(values) for name, values in taken.items()}
    for name, value in figures.items():
        print(f"{name:24s} {value:8.1f} ms")
    shared = figures["forward and backward"] + figures["average of the weights"]
    before = shared + figures["images, one by one"] + figures["update, timm's Muon"]
    after = shared + figures["images, in memory"] + figures["update, our Muon"]
    print(f"a step of {recipe.batch_size} images: {before:.0f} ms before, {after:.0f} ms now: {before / after:.2f} x")
    print("of forward and backward: " + ", ".join(shares(forward_and_backward)))


def batches(recipe: Recipe, config: Any, *, one_by_one: bool = False) -> Iterator[Any]:  # noqa: ANN401 - of SampleLoader
    """Yield batches without end, in this process: on a busy machine, worker processes would take time from the step."""
    loader, _, _ = open_batches(recipe, config, None, ALONE)
    if one_by_one:
        samples, _ = open_training_data(recipe.data, config, training_transform(config, PLAIN), recipe.holdout, 0)
        loader = SampleLoader(samples, recipe.batch_size, num_workers=0, shuffle=True, drop_last=True)
    return (batch for _ in cycle([0]) for batch in loader)


def shares(run: Callable[[], None]) -> Iterator[str]:
    """Yield the share of each kind of operation in the processor time of a step."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(10):
            run()
    spent: Counter[str] = Counter()
    for event in recorded.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), "the rest")
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values())
    for kind, microseconds in spent.most_common():
        yield f"{kind} {100 * microseconds / total:.0f} %"


if __name__ == "__main__":
    main()
