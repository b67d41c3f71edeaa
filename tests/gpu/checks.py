"""Checks on a GPU: each function checks one property, returns its measurements, and raises if the property is violated.

Nothing here needs a network. `gpu_check` runs the checks, and leaves out those that need a GPU where there is none.
"""

import copy
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.data.images import evaluation_transform, load_rgb, normalise
from models.processes import seed_everything
from models.subnetwork import SubNetwork
from models.supervit import SuperViT
from models.training.objective import Batch, Learner, PairLoss, Targets, sample_pairs, training_step
from service.engines.base import Captured
from service.engines.profiler import stopwatch
from service.engines.torch_engine import FloatPrecision, TorchEngine
from service.execution.throttle import UtilizationLimiter
from service.machine.monitor import Monitor
from service.machine.snapshot import GpuSnapshot

Found = dict[str, Any]

PHOTOGRAPHS = Path(__file__).parents[2] / "models" / "checkpoints" / "photographs"
# The largest difference of the logits of the median image, in standard deviations of the CPU's logits, and the least
# share of images with the CPU's top-1 class. The median, since rounding can make single images prune another token.
# Emulated on a CPU, bfloat16 differed by 0.21 and agreed on 0.83 of the images at the worst sub-network of the two
# checkpoints that ship.
TOLERANCE: dict[FloatPrecision, float] = {"float32": 0.02, "bfloat16": 0.4}
AGREEMENT: dict[FloatPrecision, float] = {"float32": 0.9, "bfloat16": 0.75}
PREPARED_SIZES, MIXED_COUNTS, ROUNDS = (1, 2, 4, 8), (1, 2, 3, 5, 8), 3
WARM_UPS = 5
MAX_TIME_FRACTION = 0.8  # of the fastest sub-network's time to the largest's; with graphs, at the largest batch size
SETTLE_S = 1.5  # NVML's utilization covers at most the last second
MIB = 2**20
READING_ERRORS = {"total_mib": 2.0, "free_mib": 256.0, "utilization": 0.3}
CEILING, CEILING_ERROR, CEILING_S = 0.5, 0.1, 4.0
STEPS = 8  # enough for float16's loss scale to fall until gradients do not overflow


class CheckFailedError(Exception):
    """A check has failed; the message says why."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the checks run on.

    Attributes:
        device: a torch device.
        checkpoints: checkpoints whose models are checked.
        batch_sizes: batch sizes to time, ascending.
        runs: number of timed runs of each sub-network at each batch size.
        make_engine: creates an engine of a model, which it changes, in a precision; None for the fastest precision.
        clock: returns the time in seconds.
    """

    device: torch.device
    checkpoints: tuple[Checkpoint, ...]
    batch_sizes: tuple[int, ...]
    runs: int
    make_engine: Callable[[SuperViT, FloatPrecision | None], TorchEngine]
    clock: Callable[[], float] = time.perf_counter

    def engine(self, checkpoint: Checkpoint, precision: FloatPrecision | None = None) -> TorchEngine:
        """Create an engine of a copy of a checkpoint's model."""
        return self.make_engine(copy.deepcopy(checkpoint.model), precision)


def require(holds: bool, message: str) -> None:
    """Raise a CheckFailedError unless a condition holds."""
    if not holds:
        raise CheckFailedError(message)


def check_parity(setting: Setting, precision: FloatPrecision) -> Found:
    """Compare the logits of every trained sub-network with those of the CPU in float32."""
    found: Found = {}
    for checkpoint in setting.checkpoints:
        images, engine = photographs(checkpoint), setting.engine(checkpoint, precision)
        for subnetwork in checkpoint.config.subnetworks:
            engine.prepare(subnetwork, len(images))
            with torch.inference_mode():
                expected = checkpoint.model(normalise(images, checkpoint.config), subnetwork)
            logits = engine.run(images, subnetwork)
            difference = ((logits - expected).abs().amax(dim=1).median() / expected.std()).item()
            agreement = (logits.argmax(dim=1) == expected.argmax(dim=1)).float().mean().item()
            found[f"{checkpoint.name} {subnetwork}"] = {"difference": difference, "agreement": agreement}
    wrong = {
        name: each
        for name, each in found.items()
        if not (each["difference"] <= TOLERANCE[precision] and each["agreement"] >= AGREEMENT[precision])
    }
    require(not wrong, f"not the CPU's answers: {wrong}")
    return found


def check_alternation(setting: Setting) -> Found:
    """Run sub-networks and batch sizes in random order: no graph is captured again, and no answer changes."""
    found: Found = {}
    for checkpoint in setting.checkpoints:
        engine, images = setting.engine(checkpoint), photographs(checkpoint)
        cells = list(product(checkpoint.config.subnetworks, MIXED_COUNTS))
        eager = {cell: engine.run(images[: cell[1]], cell[0]) for cell in cells}
        prepare_all(engine, checkpoint, PREPARED_SIZES)
        captured = require_graphs(engine, len(checkpoint.config.subnetworks) * len(PREPARED_SIZES))
        first = {cell: engine.run(images[: cell[1]], cell[0]) for cell in cells}
        for seed in range(ROUNDS):
            for subnetwork, count in random.Random(seed).sample(cells, len(cells)):
                engine.prepare(subnetwork, max(size for size in PREPARED_SIZES if size <= count))
                again = engine.run(images[:count], subnetwork)
                changed = (again - first[subnetwork, count]).abs().max().item()
                require(changed == 0, f"{count} images at {subnetwork} differ by {changed} from one run to another")
        require(engine.captured() == captured, f"{captured} became {engine.captured()}")
        scale = torch.cat(list(eager.values())).std()
        differences = [((first[cell] - eager[cell]).abs().max() / scale).item() for cell in cells]
        require(median(differences) <= TOLERANCE["bfloat16"], f"graphs differ by {differences} from eager kernels")
        found[checkpoint.name] = {"num_graphs": captured.num_graphs, "largest_difference_to_eager": max(differences)}
    return found


def check_eager_speed(setting: Setting) -> Found:
    """Time every trained sub-network with eager kernels."""
    return {
        checkpoint.name: _times(setting, checkpoint, setting.engine(checkpoint)) for checkpoint in setting.checkpoints
    }


def check_graph_speed(setting: Setting) -> Found:
    """Time every trained sub-network with graphs.

    Graphs must not be slower than eager kernels, and the fastest sub-network must take at most MAX_TIME_FRACTION of
    the time of the largest.
    """
    found, problems = {}, []
    for checkpoint in setting.checkpoints:
        engine = setting.engine(checkpoint)
        eager = _times(setting, checkpoint, engine)
        prepare_all(engine, checkpoint, setting.batch_sizes)
        captured = require_graphs(engine, len(checkpoint.config.subnetworks) * len(setting.batch_sizes))
        graphs = _times(setting, checkpoint, engine)
        found[checkpoint.name] = {"graphs": graphs, "held_bytes": captured.held_bytes}
        for size, rows in graphs.items():
            slower = [name for name, row in rows.items() if row["ms"] > 1.1 * eager[size][name]["ms"]]
            problems += [f"{checkpoint.name} {name} at {size}: graphs are slower than eager kernels" for name in slower]
        least = min(row["of_largest"] for row in graphs[setting.batch_sizes[-1]].values())
        if least > MAX_TIME_FRACTION:
            problems.append(f"{checkpoint.name}: the fastest sub-network takes {least:.2f} of the time of the largest")
    require(not problems, "; ".join(problems))
    return found


def check_readings(setting: Setting) -> Found:
    """Compare the monitor's readings of the GPUs under load with those of nvidia-smi."""
    with under_load(setting):
        time.sleep(SETTLE_S)
        monitor = Monitor()
        monitor.close()
        return compare_readings(monitor.latest.gpus, read_smi())


def compare_readings(gpus: Sequence[GpuSnapshot], theirs: Sequence[Mapping[str, float]]) -> Found:
    """Compare readings of the monitor with those of nvidia-smi, taken at nearly the same time under load."""
    ours = [_readings(gpu) for gpu in gpus]
    found = {"monitor": ours, "nvidia-smi": theirs}
    require(len(ours) == len(theirs), f"other GPUs: {found}")
    for one, other in zip(ours, theirs, strict=True):
        for name, error in READING_ERRORS.items():
            require(abs(one[name] - other[name]) <= error, f"{name} differs: {found}")
    require(any(one["utilization"] > 0 for one in ours), f"no load is seen: {found}")
    return found


def check_ceiling(setting: Setting) -> Found:
    """Run batches under a utilization ceiling: they take that share of the time."""
    time_once, cell = _load(setting)
    limiter = UtilizationLimiter(CEILING, None)
    started_at, busy_s = time.monotonic(), 0.0
    while time.monotonic() < started_at + CEILING_S:
        if pause_s := limiter.pause_s(time.monotonic()):
            time.sleep(pause_s)
        else:
            seconds = time_once(cell)
            limiter.batch_ran(seconds)
            busy_s += seconds
    monitor = Monitor()
    seen = [gpu.utilization for gpu in monitor.latest.gpus]
    monitor.close()
    share = busy_s / (time.monotonic() - started_at)
    require(abs(share - CEILING) <= CEILING_ERROR, f"batches took {share:.2f} of the time, not {CEILING}")
    return {"share": share, "utilization_seen": seen}


def check_training(setting: Setting, dtype: torch.dtype) -> Found:
    """Run the paper's training steps until weights change, at most STEPS: losses and weights stay finite."""
    seed_everything(0)
    config = setting.checkpoints[0].config
    model = SuperViT(config).to(setting.device)
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.randn(8, 3, config.image_side, config.image_side, device=setting.device)
    targets = Targets(torch.randint(config.num_classes, (8,), device=setting.device))
    scaler = torch.amp.GradScaler(setting.device.type) if dtype == torch.float16 else None
    before = copy.deepcopy(model.state_dict())
    learner = Learner(PairLoss(model, 0.1, 0.5), optimizer, torch.autocast(setting.device.type, dtype), scaler)
    for step in range(1, STEPS + 1):
        pairs = sample_pairs(config, 0, step)
        losses = training_step(learner, Batch(images, targets, pairs))
        require(all(map(torch.isfinite, map(torch.tensor, losses.values()))), f"losses are no numbers: {losses}")
        if any(not torch.equal(before[name], weight) for name, weight in model.state_dict().items()):
            require(all(weight.isfinite().all() for weight in model.parameters()), "weights are no numbers")
            return {"steps_until_weights_changed": step, "losses": losses}
    raise CheckFailedError(f"no weight has changed after {STEPS} steps")


def photographs(checkpoint: Checkpoint) -> Tensor:
    """Read the (B, 3, S, S) uint8 photographs that ship, and their mirror images."""
    transform = evaluation_transform(checkpoint.config)
    images = torch.stack([transform(load_rgb(str(path))) for path in sorted(PHOTOGRAPHS.glob("*.jpg"))])
    return torch.cat([images, images.flip(3)])


def prepare_all(engine: TorchEngine, checkpoint: Checkpoint, batch_sizes: tuple[int, ...]) -> None:
    """Capture every trained sub-network at each batch size."""
    for size, subnetwork in product(batch_sizes, checkpoint.config.subnetworks):
        engine.prepare(subnetwork, size)


def require_graphs(engine: TorchEngine, count: int) -> Captured:
    """Return what an engine has captured, and check that it is this number of graphs."""
    captured = engine.captured()
    require(captured is not None and captured.num_graphs == count, f"{count} graphs were to be captured: {captured}")
    assert captured is not None
    return captured


def _times(setting: Setting, checkpoint: Checkpoint, engine: TorchEngine) -> dict[int, dict[str, dict[str, float]]]:
    """Return the times of the trained sub-networks by batch size, with what the engine has captured so far."""
    time_once = stopwatch(engine.run, checkpoint.config.image_side, setting.batch_sizes[-1], setting.clock)
    rows: dict[int, dict[str, dict[str, float]]] = {}
    for size in setting.batch_sizes:
        seconds = {
            subnetwork: median([time_once((subnetwork, size)) for _ in range(WARM_UPS + setting.runs)][WARM_UPS:])
            for subnetwork in checkpoint.config.subnetworks
        }
        largest_s = seconds[checkpoint.config.largest]
        rows[size] = {str(each): {"ms": 1e3 * s, "of_largest": s / largest_s} for each, s in seconds.items()}
    return rows


def _load(setting: Setting) -> tuple[Callable[[tuple[SubNetwork, int]], float], tuple[SubNetwork, int]]:
    """Return an engine's stopwatch, and the largest sub-network with the largest batch size, prepared."""
    checkpoint = setting.checkpoints[-1]
    engine, cell = setting.engine(checkpoint), (checkpoint.config.largest, setting.batch_sizes[-1])
    engine.prepare(*cell)
    time_once = stopwatch(engine.run, checkpoint.config.image_side, cell[1])
    time_once(cell)
    return time_once, cell


@contextmanager
def under_load(setting: Setting) -> Iterator[None]:
    """Keep the GPU busy as long as the block lasts."""
    time_once, cell = _load(setting)
    is_over = threading.Event()

    def run() -> None:
        while not is_over.is_set():
            time_once(cell)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def read_smi() -> list[Mapping[str, float]]:
    """Read the memory and utilization of every GPU from nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=memory.total,memory.free,utilization.gpu", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    rows = [[float(figure) for figure in line.split(",")] for line in lines]
    return [{"total_mib": total, "free_mib": free, "utilization": percent / 100} for total, free, percent in rows]


def _readings(gpu: GpuSnapshot) -> Mapping[str, float]:
    total, free, utilization = gpu.memory_total_bytes, gpu.memory_free_bytes, gpu.utilization
    if total is None or free is None or utilization is None:
        raise CheckFailedError(f"NVML does not say all: {gpu}")
    return {"total_mib": total / MIB, "free_mib": free / MIB, "utilization": utilization}
