"""One SuperViT compared with models trained for one cost each, on the same data with the same seeds.

    python -m tests.benchmarks.bench_paradigm train CIFAR10_FOLDER --epochs 8 --seeds 0 1 2
    python -m tests.benchmarks.bench_paradigm table --epochs 8

The other models are trained for as many epochs as the SuperViT, and once more for as many as cost the same compute. The
first command trains the missing models and resumes interrupted runs. Each finished model adds a line to RESULTS: which
images of test/ it classifies correctly, its accuracy on held-out images, and its training log. The second command
prints the comparison. Another model or data set needs its own files: --model, --init, --runs, --results; --set takes
any option of a recipe, as in --set batch_size=256 keep_rates=[0.5,0.7,1].
"""

import argparse
import base64
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import timm
import torch

from models.checkpoint import load_checkpoint
from models.data.datasets import ImageSet, list_classes, open_folder, open_training_data
from models.data.images import evaluation_transform, normalise
from models.data.loaders import SampleLoader
from models.devices import resolve_device
from models.evaluation.hold_out import label_indices
from models.flops import count_macs
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import SuperViT
from models.training.objective import sample_pairs
from models.training.recipe import Recipe
from models.training.state import LOG_NAME, has_state
from models.training.train import train

RESULTS = Path(__file__).with_name("results") / "paradigm.jsonl"
# Options of each arm, on top of the largest grid alone; the SuperViT is the model as it is registered.
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"keep_rates": (1.0,)},
    "evit 0.7": {"keep_rates": (0.7,), "fuse_pruned": True},
    "evit 0.5": {"keep_rates": (0.5,), "fuse_pruned": True},
    "supervit": {},
}
# An arm, the share of its MACs that the SuperViT may use, and the lead of the paper's SuperViT there in points of
# ImageNet top-1: over DeiT-S by its accuracies and DeiT-S's 79.8; over EViT by the one figure of its abstract, which
# names no keep rate.
COMPARISONS = [
    ("plain", 1.0, "+0.8"),
    ("plain", 2 / 3, "+0.7"),
    ("plain", 1 / 2, "+0.2"),
    ("evit 0.7", 1.0, "+1.1"),
    ("evit 0.5", 1.0, "+1.1"),
]
STEPS_COUNTED = 1000  # steps over which a SuperViT's random sub-networks are averaged


def main(arguments: list[str] | None = None) -> None:
    """Train the arms, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("data", type=Path, help="folder with train/, test/ and perhaps val/")
    training.add_argument("--model", default="supervit_deit_micro_patch4_32")
    training.add_argument("--init", type=Path, help="weights that every arm starts from")
    training.add_argument("--runs", type=Path, default=Path("runs/paradigm"))
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    training.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    training.add_argument("--set", metavar="NAME=VALUE", nargs="+", default=[], help="options of the recipe")
    for command in (training, commands.add_parser("table")):
        command.add_argument("--epochs", type=int, default=8, help="of the SuperViT")
        command.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.command == "train":
        train_all(options)
    else:
        print("\n".join(table(read_results(options.results), options.epochs)))


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the finished models; only results of one model on one data set can be compared."""
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if len({(line.get("model"), line.get("data"), line.get("init")) for line in results}) > 1:
        raise SystemExit(f"{path}: holds results of several models, data sets or starts; part them")
    return results


def train_all(options: argparse.Namespace) -> None:
    """Train every arm with every seed, seed by seed, so that the results at any time can be compared."""
    about = {
        "model": options.model,
        "data": options.data.resolve().name,
        "init": options.init and options.init.name,
    }
    settings = dict(map(parse_setting, options.set))
    for seed, arm in itertools.product(options.seeds, options.arms):
        recipe = Recipe.model_validate(
            {
                "data": options.data,
                "output": options.runs,
                "model": options.model,
                "init": options.init,
                "epochs": options.epochs,
                "seed": seed,
                **settings,
            }
        )
        with torch.device("meta"):
            family = timm.create_model(recipe.model, num_classes=len(list_classes(recipe.data / "train"))).config
        family = replace(family, **recipe.overrides)
        arm_options = ARMS[arm] and {"patch_grids": family.patch_grids[-1:], **ARMS[arm]}
        macs, most = training_macs(replace(family, **arm_options)), training_macs(family)
        for epochs in sorted({options.epochs, epochs_for_as_much(options.epochs, most, macs)}):
            known = {(line["arm"], line["seed"], line["epochs"]) for line in read_results(options.results)}
            if (arm, seed, epochs) in known:
                continue
            output = options.runs / f"{arm.replace(' ', '-')}-{epochs}-{seed}"
            changes = {"output": output, "resume": has_state(output), "epochs": epochs, **arm_options}
            own = Recipe.model_validate(recipe.model_dump(exclude_unset=True) | changes)
            result = {"arm": arm, "seed": seed, "epochs": epochs, "training_macs": macs, **measure(train(own), own)}
            with options.results.open("a") as file:
                file.write(json.dumps(about | result) + "\n")


def parse_setting(text: str) -> tuple[str, object]:
    """Parse NAME=VALUE, whose value is JSON or, if it is not valid JSON, a string."""
    name, _, value = text.partition("=")
    with suppress(ValueError):
        return name, json.loads(value)
    return name, value


def count_macs_together(config: SuperViTConfig, patch_grid: int, keep_rates: tuple[float, ...]) -> int:
    """Count the multiply-accumulates of one image at several keep rates of a grid, as in a training step.

    The embedding and the blocks before the first prune block are computed once for all keep rates. An LV-ViT's
    auxiliary head counts at every rate, as in serving; a training step runs it for the largest sub-network alone.
    """
    unpruned, whole = replace(config, prune_blocks=()), SubNetwork(patch_grid, 1.0)
    macs = count_macs(unpruned, whole)
    per_block = count_macs(replace(unpruned, depth=config.depth + 1), whole) - macs
    head = config.num_classes * (count_macs(replace(unpruned, num_classes=config.num_classes + 1), whole) - macs)
    blocks_apart = config.depth - min(config.prune_blocks, default=config.depth)
    shared = macs - head - blocks_apart * per_block
    each = sum(count_macs(config, SubNetwork(patch_grid, rate)) for rate in keep_rates)
    return each - (len(keep_rates) - 1) * shared


def training_macs(config: SuperViTConfig) -> float:
    """Return the mean MACs of one image in the forward pass of a training step.

    The backward pass takes twice as many in every arm, so the ratios of whole steps are those of the forward passes.
    """
    return mean(
        sum(
            count_macs_together(config, pair.patch_grid, tuple(filter(None, (pair.keep_rate, pair.pruned_keep_rate))))
            for pair in sample_pairs(config, 0, step)
        )
        for step in range(STEPS_COUNTED)
    )


def epochs_for_as_much(epochs: int, theirs: float, ours: float) -> int:
    """Return how many epochs at `ours` MACs per image cost as much compute as `epochs` at `theirs`."""
    return max(1, round(epochs * theirs / ours))


def measure(path: Path, recipe: Recipe) -> dict[str, Any]:
    """Return which test images each sub-network of a checkpoint classifies correctly, and its held-out top-1."""
    checkpoint = load_checkpoint(path)
    model, config = checkpoint.model.to(resolve_device(recipe.device)), checkpoint.config
    transform = evaluation_transform(config)
    _, held_out = open_training_data(recipe.data, config, transform, recipe.holdout, recipe.seed)
    folder = recipe.data / "test"
    indices = label_indices(folder, list_classes(folder), checkpoint.class_names)
    files = [(path, indices[label]) for path, label in open_folder(folder, transform).files]
    test = ImageSet(folder, files, transform, max_bad_images=0.0)
    known, chosen_on = find_correct(model, test, recipe), find_correct(model, held_out, recipe)
    return {
        "test_images": len(test),
        "rows": [
            {
                "patch_grid": subnetwork.patch_grid,
                "keep_rate": subnetwork.keep_rate,
                "macs": count_macs(config, subnetwork),
                "top1": float(known[subnetwork].mean()),
                "held_out_top1": float(chosen_on[subnetwork].mean()),
                "correct": base64.b64encode(np.packbits(known[subnetwork]).tobytes()).decode(),
            }
            for subnetwork in config.subnetworks
        ],
        "log": [json.loads(line) for line in (path.parent / LOG_NAME).read_text().splitlines()],
    }


@torch.inference_mode()
def find_correct(model: SuperViT, images: ImageSet, recipe: Recipe) -> dict[SubNetwork, np.ndarray]:
    """Return for each sub-network which images it classifies correctly."""
    correct: dict[SubNetwork, list[np.ndarray]] = {subnetwork: [] for subnetwork in model.config.subnetworks}
    for batch, labels in SampleLoader(images, 100, num_workers=recipe.workers):
        normalised = normalise(batch.to(model.cls_token.device), model.config)
        for subnetwork, parts in correct.items():
            parts.append((model(normalised, subnetwork).argmax(dim=1).cpu() == labels).numpy())
    return {subnetwork: np.concatenate(parts) for subnetwork, parts in correct.items()}


def table(results: list[dict[str, Any]], epochs: int) -> Iterator[str]:
    """Lay out the results in Markdown: every model's accuracies, and then SuperViT's differences from the others."""
    budget = max((line.get("training_macs", 0.0) for line in results if line["arm"] == "supervit"), default=0.0)

    def is_as_long(line: dict[str, Any]) -> bool:
        return bool(line["epochs"] == epochs)

    def costs_as_much(line: dict[str, Any]) -> bool:
        macs = line.get("training_macs")
        return macs is not None and line["epochs"] == epochs_for_as_much(epochs, budget, macs)

    def by_arm(line: dict[str, Any]) -> tuple[int, int]:
        return list(ARMS).index(line["arm"]), line["epochs"]

    compared = sorted((line for line in results if is_as_long(line) or costs_as_much(line)), key=by_arm)
    largest = max((row["macs"] for line in compared for row in line["rows"]), default=0)
    yield "| model | epochs | grid | keep rate | GFLOPs | of the largest | top-1 | seeds |"
    yield "|---|---|---|---|---|---|---|---|"
    for _, group in itertools.groupby(compared, by_arm):
        lines = list(group)
        for row in sorted(lines[0]["rows"], key=lambda row: int(row["macs"])):
            values = [100 * same_subnetwork_row(line, row)["top1"] for line in lines]
            cells = [lines[0]["arm"], lines[0]["epochs"], row["patch_grid"], f"{row['keep_rate']:g}"]
            cells += [f"{row['macs'] / 1e9:.4g}", f"{row['macs'] / largest:.2f}x", spread(values), len(values)]
            yield "| " + " | ".join(map(str, cells)) + " |"
    measured = [line for line in compared if "test_images" in line]  # older lines do not say which images were correct
    for title, fits in (("as many epochs", is_as_long), ("as much computing", costs_as_much)):
        yield ""
        yield f"| SuperViT within | at | against, with {title} | difference ± standard error | by seed | the paper's |"
        yield "|---|---|---|---|---|---|"
        for arm, share, published in COMPARISONS:
            supers = [line for line in measured if line["arm"] == "supervit" and is_as_long(line)]
            others = [line for line in measured if line["arm"] == arm and fits(line)]
            yield from compare(supers, others, share, published)


def compare(supers: list[dict[str, Any]], others: list[dict[str, Any]], share: float, published: str) -> Iterable[str]:
    """Compare an arm with SuperViT's best sub-network, by held-out top-1, within `share` of the arm's MACs.

    The difference is paired by image and averaged over the seeds. Its standard error is over the test images, with
    these models fixed; the differences by seed are printed beside it.
    """
    theirs = {line["seed"]: line for line in others}
    mine = {line["seed"]: line for line in supers if line["seed"] in theirs}
    if not mine:
        return
    other = others[0]["rows"][0]
    affordable = [row for row in supers[0]["rows"] if row["macs"] <= share * other["macs"]]
    if not affordable:
        return
    best = max(affordable, key=lambda row: mean(same_subnetwork_row(line, row)["held_out_top1"] for line in supers))
    by_seed = [
        100
        * (
            correct_images(mine[seed], same_subnetwork_row(mine[seed], best))
            - correct_images(theirs[seed], theirs[seed]["rows"][0])
        )
        for seed in sorted(mine)
    ]
    by_image = np.mean(by_seed, axis=0)
    error = by_image.std(ddof=1) / len(by_image) ** 0.5
    cells = [
        f"{share:.2g}x the MACs",
        SubNetwork(best["patch_grid"], best["keep_rate"]),
        f"{others[0]['arm']}, {others[0]['epochs']} epochs",
        f"{by_image.mean():+.2f} ± {error:.2f}",
        ", ".join(f"{differences.mean():+.2f}" for differences in by_seed),
        published,
    ]
    yield "| " + " | ".join(map(str, cells)) + " |"


def same_subnetwork_row(line: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Find the row of the same sub-network in another model's results."""
    key = like["patch_grid"], like["keep_rate"]
    return next(row for row in line["rows"] if (row["patch_grid"], row["keep_rate"]) == key)


def correct_images(line: dict[str, Any], row: dict[str, Any]) -> np.ndarray:
    """Return for every test image whether it was classified correctly, 1.0 or 0.0."""
    packed = np.frombuffer(base64.b64decode(row["correct"]), dtype=np.uint8)
    return np.unpackbits(packed, count=line["test_images"]).astype(float)


def spread(values: list[float]) -> str:
    """Format a mean and the standard deviation over the seeds."""
    around = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{around}"


if __name__ == "__main__":
    main()
