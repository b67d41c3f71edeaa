"""The OpenVINO engine in each precision of this CPU: `python -m tests.benchmarks.bench_precision CHECKPOINT`.

The checkpoint must be prepared for int8 (`supervit quantize`). Times that are compared with one another are measured in
turns, because the speed of a shared machine drifts; figures are medians over those turns. `--cpu-time` counts the CPU
time of this process instead of wall time: with one thread, for a machine under other load.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

from models.checkpoint import Checkpoint, load_checkpoint
from models.subnetwork import SubNetwork
from service.engines.factory import int8_engine
from service.engines.openvino_engine import OpenVINOEngine, has_bfloat16
from tests.benchmarks.bench_engine import random_images

MIN_TURNS = 5


def main() -> None:
    """Print a line for each sub-network and batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=3, help="of each comparison")
    parser.add_argument("--cpu-time", action="store_true", help="count computing time, not the time that passes")
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.checkpoint)
    engines = open_engines(checkpoint, options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(f"{checkpoint.name} {checkpoint.version}; {'; '.join(engine.describe() for engine in engines.values())}")
    over = [name for name in engines if name != "int8"]
    ratios = "".join(f"{f'{name} / int8':>17}" for name in over)
    print(f"{'sub-network':26}{'batch':>6}" + "".join(f"{f'{name} ms':>13}" for name in engines) + ratios)
    for subnetwork in checkpoint.config.subnetworks:
        for size in options.batch_sizes:
            images = random_images(checkpoint, size)
            runs = {name: partial(engine.run, images, subnetwork) for name, engine in engines.items()}
            print(row(subnetwork, size, in_turns(runs, options.seconds, clock)), flush=True)


def open_engines(checkpoint: Checkpoint, threads: int) -> dict[str, OpenVINOEngine]:
    """Open an engine in float32, one in bfloat16 if this CPU supports it, and one in int8."""
    if checkpoint.int8 is None:
        raise SystemExit("the checkpoint is not prepared for int8: `supervit quantize` does that")
    engines = {"float32": OpenVINOEngine(checkpoint.model, threads, "float32")}
    if has_bfloat16():
        engines["bfloat16"] = OpenVINOEngine(checkpoint.model, threads, "bfloat16")
    return engines | {"int8": int8_engine(checkpoint.model, checkpoint.int8.ranges, threads)}


def in_turns(
    runs: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Time the runs in turns, after two warm-up runs of each."""
    for run in (*runs.values(), *runs.values()):
        run()
    turns: dict[str, list[float]] = {name: [] for name in runs}
    ends_at = time.perf_counter() + seconds
    while time.perf_counter() < ends_at or len(turns["int8"]) < MIN_TURNS:
        for name, run in runs.items():
            started_at = clock()
            run()
            turns[name].append(clock() - started_at)
    return turns


def row(subnetwork: SubNetwork, size: int, turns: dict[str, list[float]]) -> str:
    """Format the medians in milliseconds, and the medians of the ratios in each turn."""
    figures = "".join(f"{1e3 * median(times):13.2f}" for times in turns.values())
    others = [times for name, times in turns.items() if name != "int8"]
    ratios = [median(a / b for a, b in zip(times, turns["int8"], strict=True)) for times in others]
    return f"{subnetwork!s:26}{size:6d}{figures}" + "".join(f"{ratio:17.2f}" for ratio in ratios)


if __name__ == "__main__":
    main()
