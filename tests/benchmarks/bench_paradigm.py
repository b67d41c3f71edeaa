"""One SuperViT beside models trained for one cost each, on the same data for as many epochs with the same seeds.

    python -m tests.benchmarks.bench_paradigm train CIFAR10_FOLDER --epochs 8 --seeds 0 1 2
    python -m tests.benchmarks.bench_paradigm table

The first trains what is missing and goes on with what was cut short; each finished model adds a line to RESULTS: its
accuracy on test/, and its training log. The second prints what they come to.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tqdm import tqdm

from models.checkpoint import load_checkpoint
from models.evaluate import evaluate
from models.processes import joined_processes
from models.recipe import Recipe
from models.state import LOG_NAME, has_state
from models.subnetwork import SubNetwork
from models.supervit import DEIT_MICRO
from models.train import train

RESULTS = Path(__file__).with_name("results") / "paradigm.jsonl"
LARGEST_GRID = DEIT_MICRO.patch_grids[-1]
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"patch_grids": (LARGEST_GRID,), "keep_rates": (1.0,)},
    "evit 0.7": {"patch_grids": (LARGEST_GRID,), "keep_rates": (0.7,), "fuse_pruned": True},
    "evit 0.5": {"patch_grids": (LARGEST_GRID,), "keep_rates": (0.5,), "fuse_pruned": True},
    "supervit": {},
}
WHOLE = SubNetwork(LARGEST_GRID, 1.0)
# At what share of the plain model's MACs, against whom, and by how many points of ImageNet top-1 the paper's SuperViT
# is ahead there: by its accuracies over DeiT-S's 79.8; over EViT by the one figure of its abstract, for no rate named.
COMPARISONS = [
    ("1x the MACs", 1.0, "plain", WHOLE, "+0.8"),
    ("2/3 of the MACs", 2 / 3, "plain", WHOLE, "+0.7"),
    ("1/2 of the MACs", 1 / 2, "plain", WHOLE, "+0.2"),
    ("the MACs of EViT at 0.7", 2 / 3, "evit 0.7", SubNetwork(LARGEST_GRID, 0.7), "+1.1"),
    ("the MACs of EViT at 0.5", 1 / 2, "evit 0.5", SubNetwork(LARGEST_GRID, 0.5), "+1.1"),
]


def main() -> None:
    """Train, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("data", type=Path)
    training.add_argument("--runs", type=Path, default=Path("runs/paradigm"))
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    training.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    training.add_argument("--precision", default="float32")
    for command in (training, commands.add_parser("table")):
        command.add_argument("--epochs", type=int, default=8)
        command.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.command == "train":
        train_all(options)
    else:
        results = [json.loads(line) for line in options.results.read_text().splitlines()]
        print("\n".join(table([result for result in results if result["epochs"] == options.epochs])))


def train_all(options: argparse.Namespace) -> None:
    """Train every arm with every seed, seed by seed, so that what is there at any time can be compared."""
    done = options.results.read_text().splitlines() if options.results.exists() else []
    known = {(line["arm"], line["seed"], line["epochs"]) for line in map(json.loads, done)}
    for seed, arm in itertools.product(options.seeds, options.arms):
        if (arm, seed, options.epochs) in known:
            continue
        output = options.runs / f"{arm.replace(' ', '-')}-{options.epochs}-{seed}"
        recipe = Recipe(
            data=options.data,
            output=output,
            resume=has_state(output),
            model="supervit_deit_micro_patch4_32",
            epochs=options.epochs,
            seed=seed,
            precision=options.precision,
            **ARMS[arm],
        )
        result = {"arm": arm, "seed": seed, "epochs": options.epochs, **measure(train(recipe), options.data)}
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")


def measure(path: Path, data: Path) -> dict[str, Any]:
    """Return the accuracy of a checkpoint on test/, and the log of its training."""
    progress = partial(tqdm, desc="evaluating", mininterval=1)
    with joined_processes("auto") as process:
        profile = evaluate(
            load_checkpoint(path),
            data,
            batch_size=100,
            workers=0,
            max_bad_images=0.0,
            progress=progress,
            process=process,
        ).profile
    return {
        "rows": [
            {
                "patch_grid": row.subnetwork.patch_grid,
                "keep_rate": row.subnetwork.keep_rate,
                "macs": row.macs,
                "top1": row.top1,
            }
            for row in profile.rows
        ],
        "log": [json.loads(line) for line in (path.parent / LOG_NAME).read_text().splitlines()],
    }


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """Lay out the results in Markdown: every model's accuracies, and then the differences, seed by seed."""
    accuracies: dict[tuple[str, SubNetwork], dict[int, float]] = {}
    macs: dict[tuple[str, SubNetwork], int] = {}
    for result in results:
        for row in result["rows"]:
            key = result["arm"], SubNetwork(row["patch_grid"], row["keep_rate"])
            accuracies.setdefault(key, {})[result["seed"]] = 100 * row["top1"]
            macs[key] = row["macs"]
    yield "| model | grid | keep rate | GFLOPs | of the plain one's | top-1 | seeds |"
    yield "|---|---|---|---|---|---|---|"
    for key in sorted(accuracies, key=lambda key: (list(ARMS).index(key[0]), macs[key])):
        arm, subnetwork = key
        share = macs[key] / macs["plain", WHOLE]
        cells = [arm, subnetwork.patch_grid, f"{subnetwork.keep_rate:g}", f"{macs[key] / 1e9:.4f}", f"{share:.2f}x"]
        yield "| " + " | ".join(map(str, [*cells, spread(list(accuracies[key].values())), len(accuracies[key])])) + " |"
    yield ""
    yield "| SuperViT at | against | difference | the paper's |"
    yield "|---|---|---|---|"
    for name, share, arm, theirs, published in COMPARISONS:
        affordable = [
            subnetwork
            for name, subnetwork in accuracies
            if name == "supervit" and macs[name, subnetwork] <= share * macs["plain", WHOLE]
        ]
        if not affordable:
            continue
        ours = max(affordable, key=lambda subnetwork: mean(accuracies["supervit", subnetwork].values()))
        mine, others = accuracies["supervit", ours], accuracies.get((arm, theirs), {})
        differences = [mine[seed] - others[seed] for seed in sorted(mine.keys() & others.keys())]
        if differences:
            yield f"| {name}, {ours} | {arm} | {spread(differences, '+')} | {published} |"


def spread(values: list[float], sign: str = "") -> str:
    """Write a mean and the standard deviation from seed to seed."""
    around = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.2f}{around}"


if __name__ == "__main__":
    main()
