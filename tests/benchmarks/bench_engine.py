"""The OpenVINO engine compared with its rivals: `python -m tests.benchmarks.bench_engine CHECKPOINT [--data FOLDER]`.

The rivals are one static OpenVINO graph per sub-network, made by the same builder, and eager PyTorch in a process of
its own: in this process, its idle worker threads would slow the engine down. Times that are compared with one another
are measured in turns, because the speed of a shared machine drifts; figures are medians over those turns.
"""

import argparse
import copy
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import openvino as ov  # type: ignore[import-untyped] # it publishes no types
import torch
from openvino import opset15 as op
from torch import Tensor
from torch.utils.data import DataLoader

from models.checkpoint import Checkpoint, load_checkpoint
from models.data.datasets import open_folder
from models.data.images import evaluation_transform
from models.subnetwork import SubNetwork
from models.supervit import SuperViT
from service.engines.openvino_engine import OpenVINOEngine
from service.engines.openvino_graph import (
    build_classifier,
    build_resizing,
    build_scaling,
    resize_inputs,
    subnetwork_inputs,
)
from service.engines.torch_engine import TorchEngine

BATCH_SIZE = 8
BATCH_SIZES = (1, 2, 4, 8, 16)
MIN_TURNS = 5
SETTLE_S = 0.1  # for the worker threads of the other process to fall asleep
MAX_STARTS = 10


def main() -> None:
    """Print every comparison, or run as one of the processes that are started for them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, help="folder with test/, of class folders: compare top-1 too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3, help="of each comparison")
    parser.add_argument("--role", choices=("report", "torch", "memory"), default="report", help=argparse.SUPPRESS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[BATCH_SIZE], help=argparse.SUPPRESS)
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.checkpoint)
    if options.role == "torch":
        answer_with_torch(checkpoint, options.threads)
    elif options.role == "memory":
        print(json.dumps(measure_memory(checkpoint, options.threads, options.batch_sizes)))
    else:
        report(checkpoint, options)


def report(checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Print the comparisons."""
    engine = OpenVINOEngine(checkpoint.model, options.threads)
    print(f"{checkpoint.name} {checkpoint.version}, batches of {BATCH_SIZE}, {engine.describe()}")
    compare_speed(checkpoint, engine, options)
    compare_sub_networks(checkpoint, engine, options.seconds)
    for batch_sizes in ((BATCH_SIZE,), BATCH_SIZES):
        one, every = json.loads(run_self(options, "memory", batch_sizes).communicate()[0])
        sizes = ", ".join(map(str, batch_sizes))
        print(
            f"resident, batches of {sizes}: {one:.0f} MB with one sub-network, {every / one:.3f} times as much with all"
        )
    if options.data is not None:
        compare_accuracy(checkpoint, engine, options.data)


def compare_speed(checkpoint: Checkpoint, engine: OpenVINOEngine, options: argparse.Namespace) -> None:
    """Print each sub-network's time, and the ratios of its static graph's and eager PyTorch's times to it."""
    images = random_images(checkpoint, BATCH_SIZE)
    ask_torch = start_torch(options)
    print(f"{'sub-network':26}{'ms':>8}{'static / ours':>15}{'torch / ours':>15}")
    for subnetwork in checkpoint.config.subnetworks:
        run = partial(engine.run, images, subnetwork)
        rival = static_graph(checkpoint.model, images, subnetwork, options.threads)
        ours, static = in_turns([run, rival], options.seconds)
        static_ratio = median(s / o for o, s in zip(ours, static, strict=True))
        torch_ratios = []
        for _ in range(MIN_TURNS):
            torch_s = ask_torch(subnetwork)
            time.sleep(SETTLE_S)
            torch_ratios.append(torch_s / min(timed(run), timed(run)))
        row = f"{subnetwork!s:26}{1e3 * median(ours):8.1f}{static_ratio:15.3f}{median(torch_ratios):15.2f}"
        print(row, flush=True)


def compare_sub_networks(checkpoint: Checkpoint, engine: OpenVINOEngine, seconds: float) -> None:
    """Print the speed-up by pruning, and the cost of running a batch after one of another sub-network."""
    images, config = random_images(checkpoint, BATCH_SIZE), checkpoint.config
    largest, pruned = config.largest, replace(config.largest, keep_rate=config.keep_rates[0])
    costs: list[float] = []
    gains: list[float] = []
    ends_at = time.perf_counter() + 4 * seconds
    while time.perf_counter() < ends_at or len(gains) < MIN_TURNS:
        times = {}
        for subnetwork in config.subnetworks:
            run = partial(engine.run, images, subnetwork)
            times[subnetwork] = timed(run), min(timed(run), timed(run))
        costs.append(sum(first for first, _ in times.values()) / sum(again for _, again in times.values()) - 1)
        gains.append(times[largest][1] / times[pruned][1])
    print(f"{largest} takes {median(gains):.2f} times as long as {pruned}")
    print(f"another sub-network with every batch takes {median(costs):.1%} longer")


def compare_accuracy(checkpoint: Checkpoint, engine: OpenVINOEngine, data: Path) -> None:
    """Print top-1 on data/test, and its difference from the profile's, which PyTorch measured in float32."""
    folder = open_folder(data / "test", evaluation_transform(checkpoint.config))
    loaded = [(images, labels) for images, labels in DataLoader(folder, batch_size=64)]
    total = sum(len(labels) for _, labels in loaded)
    print(f"{'sub-network':26}{'top-1':>9}{'of torch':>10}{'points':>9}")
    for row in checkpoint.profile.rows:
        hits = sum(int((engine.run(images, row.subnetwork).argmax(1) == labels).sum()) for images, labels in loaded)
        top1, reference = hits / total, row.top1 or float("nan")
        print(f"{row.subnetwork!s:26}{top1:9.2%}{reference:10.2%}{100 * (top1 - reference):+9.2f}", flush=True)


def static_graph(model: SuperViT, images: Tensor, subnetwork: SubNetwork, threads: int) -> Callable[[], object]:
    """Return a function that runs the batch through graphs of fixed shapes; at keep rate 1, they cannot prune."""
    config = model.config
    if subnetwork.keep_rate == 1:
        model = copy.copy(model)
        config = model.config = replace(config, prune_blocks=())
    side = subnetwork.patch_grid * config.patch_kernel
    resizing = resize_inputs(config.image_side, side) if side < config.image_side else []
    prepare = fixed(build_resizing(config) if resizing else build_scaling(config), [images.numpy(), *resizing], threads)
    prepared = np.zeros((len(images), 3, side, side), np.float32)
    classify = fixed(build_classifier(model), [prepared, *subnetwork_inputs(model, subnetwork)], threads)

    def run() -> object:
        prepare.infer()
        classify.set_input_tensor(0, prepare.get_output_tensor(0))
        classify.infer()
        return classify.get_output_tensor(0).data.copy()

    return run


def fixed(graph: ov.Model, inputs: Sequence[np.ndarray[Any, Any]], threads: int) -> ov.InferRequest:
    """Compile a graph for the shapes of these inputs, and set the inputs; token counts become constants."""
    parameters = list(zip(graph.get_parameters(), inputs, strict=True))
    for parameter, value in parameters:
        for reader in parameter.output(0).get_target_inputs() if value.ndim == 0 else ():
            reader.replace_source_output(op.constant(value).output(0))
    kept = [(parameter, value) for parameter, value in parameters if value.ndim]
    graph = ov.Model(graph.get_results(), [parameter for parameter, _ in kept], "static")
    graph.reshape({index: list(value.shape) for index, (_, value) in enumerate(kept)})
    options = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    request = ov.Core().compile_model(graph, "CPU", options).create_infer_request()
    for index, (_, value) in enumerate(kept):
        request.set_input_tensor(index, ov.Tensor(value))
    return request


def in_turns(runs: Sequence[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Time the runs in turns, after two warm-up runs of each."""
    for run in (*runs, *runs):
        run()
    turns: list[list[float]] = [[] for _ in runs]
    ends_at = time.perf_counter() + seconds
    while time.perf_counter() < ends_at or len(turns[0]) < MIN_TURNS:
        for times, run in zip(turns, runs, strict=True):
            times.append(timed(run))
    return turns


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that a run takes."""
    started_at = time.perf_counter()
    run()
    return time.perf_counter() - started_at


def random_images(checkpoint: Checkpoint, count: int) -> Tensor:
    """Return (count, 3, S, S) uint8 images."""
    side = checkpoint.config.image_side
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def run_self(options: argparse.Namespace, role: str, batch_sizes: Sequence[int] = ()) -> "subprocess.Popen[str]":
    """Start this script in another role."""
    sizes = ["--batch-sizes", *map(str, batch_sizes)] if batch_sizes else []
    arguments = [str(options.checkpoint), "--threads", str(options.threads), "--role", role, *sizes]
    command = [sys.executable, "-m", "tests.benchmarks.bench_engine", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start_torch(options: argparse.Namespace) -> Callable[[SubNetwork], float]:
    """Start a PyTorch process, and return a function that asks it for the seconds of a sub-network.

    One process in ten starts with its threads on the same core, takes fifty times as long and stays so: discard it.
    """
    for _ in range(MAX_STARTS):
        process = run_self(options, "torch")
        assert process.stdin is not None
        assert process.stdout is not None
        questions, answers = process.stdin, process.stdout
        if answers.readline().strip() == "ready":
            break
        process.communicate()
    else:
        raise SystemExit(f"PyTorch's threads came to lie on one core {MAX_STARTS} times")

    def ask(subnetwork: SubNetwork) -> float:
        print(subnetwork.patch_grid, subnetwork.keep_rate, file=questions, flush=True)
        return float(answers.readline())

    return ask


def answer_with_torch(checkpoint: Checkpoint, threads: int) -> None:
    """Print for each sub-network on stdin the seconds that a batch takes: the lower of two runs."""
    engine = TorchEngine(checkpoint.model, "cpu", threads)
    images, largest = random_images(checkpoint, BATCH_SIZE), checkpoint.config.largest
    run = partial(engine.run, images, largest)
    together = min(timed(run) for _ in range(3))
    torch.set_num_threads(1)
    alone = min(timed(run) for _ in range(3))
    torch.set_num_threads(threads)
    print("ready" if together < 3 * alone else "broken", flush=True)
    for line in sys.stdin:
        grid, rate = line.split()
        run = partial(engine.run, images, SubNetwork(int(grid), float(rate)))
        print(min(timed(run), timed(run)), flush=True)


def measure_memory(checkpoint: Checkpoint, threads: int, batch_sizes: Sequence[int]) -> tuple[float, float]:
    """Return the resident megabytes of this process with one sub-network in use, and then with all of them."""
    engine = OpenVINOEngine(checkpoint.model, threads)
    resident = []
    for subnetworks in ((checkpoint.config.largest,), checkpoint.config.subnetworks):
        for _, subnetwork, batch_size in itertools.product(range(2), subnetworks, batch_sizes):
            engine.run(random_images(checkpoint, batch_size), subnetwork)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * 4096 / 1e6)
    return resident[0], resident[1]


if __name__ == "__main__":
    main()
