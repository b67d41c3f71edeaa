"""Training: the paper's step over four sub-networks of one set of weights, and the loop around it.

On several processes: `torchrun --nproc-per-node N -m service.cli train ...`. Everything random is a function of the
seed, the epoch and the process, so a run that was cut short and resumed ends as it would have ended unbroken.
"""

import math
import os
import random
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

from models.batches import Batches, find_targets, open_batches
from models.calibration import Scaling
from models.data import Sample, SampleLoader, list_classes
from models.devices import resolve_device
from models.evaluate import measure_accuracy
from models.initial import load_initial_weights
from models.mix_token import draw_box
from models.muon import Muon
from models.objective import PairLoss, sample_pairs, sample_single, training_step
from models.profiles import ProfileTable
from models.recipe import Recipe
from models.state import CHECKPOINT_NAME, State, TrainingError, has_state, prepare_folder, read_log, save_epoch, way_out
from models.supervit import SuperViT
from models.teacher import Teacher

FINAL_RATE, WARMUP_START_RATE = 1e-2, 1e-3  # fractions of the peak learning rate
LONGEST_WAIT = timedelta(hours=6)  # of one process for another


@dataclass(frozen=True, slots=True)
class Process:
    """Which of the processes of a run this is, and where it computes."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that saves, logs and prints."""
        return self.rank == 0


def train(recipe: Recipe) -> Path:
    """Run `recipe` to its end and return the path of the checkpoint, which holds the averaged weights.

    Raises:
        DataError: the data set is unusable.
        DeviceError: the device is.
        CheckpointError: the weights to start from, or the teacher's, are.
        TrainingError: the model or the output folder cannot be used, there is nothing to resume or a run of other
            options, or losses or weights are no longer numbers.
    """
    if has_state(recipe.output) and not recipe.resume:
        raise TrainingError(f"{recipe.output}: holds a run already; go on with --resume or name another folder")
    process = join_processes(recipe.device)
    try:
        run_epochs(recipe, process)
    finally:
        if process.count > 1:
            distributed.destroy_process_group()
    return recipe.output / CHECKPOINT_NAME


def run_epochs(recipe: Recipe, process: Process) -> None:
    """Set up this process's part of the run and take it, epoch by epoch, to the end."""
    class_names = list_classes(recipe.data / "train")
    seed_everything(recipe.seed)  # every process starts from the same weights
    model = build_model(recipe, len(class_names)).to(process.device)
    optimizer = build_optimizer(recipe, model)
    state = State(model, ModelEmaV3(model, recipe.ema_decay, use_warmup=True), optimizer, process.count)
    teacher = None
    if recipe.teacher:
        if not timm.is_model(recipe.teacher):
            raise TrainingError(f"timm knows no model {recipe.teacher!r} to learn from")
        teacher = Teacher(
            recipe.teacher, recipe.teacher_checkpoint, recipe.teacher_side, model.config, recipe.teacher_tokens
        )
        teacher = teacher.to(process.device)
    epochs_done = state.load(recipe, class_names) if recipe.resume else 0
    records = read_log(recipe.output, epochs_done) if recipe.resume else []
    loader, sampler, watched = open_batches(recipe, model.config, teacher, process.rank, process.count, process.device)
    if process.is_first:
        prepare_folder(recipe.output)
    schedule = learning_rate_schedule(recipe, optimizer, len(loader), process.count)
    pair_loss = build_pair_loss(recipe, model, process)
    for epoch in range(epochs_done + 1, recipe.epochs + 1):
        seed_everything(recipe.seed, epoch, process.rank)
        sampler.set_epoch(recipe.seed * 100_000 + epoch)
        started_at = time.monotonic()
        present = None if recipe.teacher_once else teacher
        losses = train_epoch(recipe, state, pair_loss, present, schedule, loader, epoch, process)
        if not state.is_finite:  # the losses are those before the last update
            raise TrainingError(f"weights are no longer numbers after epoch {epoch}; {way_out(recipe.output, epoch)}")
        if process.is_first:
            record = {
                "epoch": epoch,
                "loss": losses,
                "top1": watch(recipe, state.average.module, watched),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": round(time.monotonic() - started_at, 1),
            }
            records.append(record)
            save_epoch(recipe, state, class_names, records)
        if process.count > 1:
            distributed.barrier()


def join_processes(device: str) -> Process:
    """Find out from torchrun's environment, if there is one, which process this is, and pick its device."""
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    own_device = resolve_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)  # or NCCL and pinned memory would open GPU 0 in every process
    if count > 1 and not distributed.is_initialized():
        # The others wait while the first watches and saves: as long as that takes, and torch's ten minutes may not do.
        distributed.init_process_group("nccl" if own_device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    return Process(rank, count, own_device)


def seed_everything(*parts: int) -> None:
    """Seed every generator that training draws from by what `parts` say together."""
    seed = random.Random("/".join(map(str, parts))).getrandbits(32)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's mixup draws from it
    torch.manual_seed(seed)


def build_model(recipe: Recipe, num_classes: int) -> SuperViT:
    """Build the recipe's model, from scratch or from its initial weights.

    Raises:
        TrainingError: there is no such model, or its fields contradict one another.
        CheckpointError: the initial weights cannot be used.
    """
    known = timm.list_models("supervit_*")
    if recipe.model not in known:
        raise TrainingError(f"no model {recipe.model!r}; there are {', '.join(known)}")
    try:
        model: SuperViT = timm.create_model(
            recipe.model, num_classes=num_classes, drop_path_rate=recipe.drop_path, **recipe.overrides
        )
    except ValueError as error:
        raise TrainingError(str(error)) from error
    if recipe.freeze_batch_norm and not (recipe.init and model.config.flavour == "lvvit"):
        raise TrainingError("freeze-batch-norm keeps the statistics of an lvvit stem that init names; there are none")
    if model.aux_head is not None and model.config.keep_rates[-1] < 1:
        raise TrainingError("an lvvit learns the labels of all patch tokens; its keep-rates must end in 1")
    if recipe.init:
        load_initial_weights(model, recipe.init)
    return model


def build_optimizer(recipe: Recipe, model: SuperViT) -> torch.optim.Optimizer:
    """Build the recipe's optimiser; `learning_rate_schedule` sets its rate."""
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay())
    kind = Muon if recipe.optimizer == "muon" else torch.optim.AdamW
    return kind(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def learning_rate_schedule(
    recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int, processes: int
) -> CosineLRScheduler:
    """Warm up linearly, then follow a cosine down, step by step; the peak grows with the images of a step."""
    peak = recipe.learning_rate * recipe.batch_size * processes / 512
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = peak  # timm takes the latter for its peak, and a resumed state holds one
    warmup_epochs = min(recipe.warmup_epochs, recipe.epochs / 10)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(2, recipe.epochs * steps_per_epoch),  # timm warns of a cosine over the one step of a tiny run
        lr_min=FINAL_RATE * peak,
        warmup_t=round(warmup_epochs * steps_per_epoch),
        warmup_lr_init=WARMUP_START_RATE * peak,
        t_in_epochs=False,
    )


def build_pair_loss(recipe: Recipe, model: SuperViT, process: Process) -> PairLoss | DistributedDataParallel:
    """Wrap the model in its losses and, where there are several processes, in what averages their gradients."""
    pair_loss = PairLoss(model, recipe.label_smoothing, recipe.teacher_weight, recipe.token_label_weight)
    # A pair leaves the other grids' position embeddings unused.
    return pair_loss if process.count == 1 else DistributedDataParallel(pair_loss, find_unused_parameters=True)


def train_epoch(
    recipe: Recipe,
    state: State,
    pair_loss: PairLoss | DistributedDataParallel,
    teacher: Teacher | None,
    schedule: CosineLRScheduler,
    loader: Batches,
    epoch: int,
    process: Process,
) -> dict[str, float]:
    """Run one epoch and return the mean of each loss by its name.

    Raises:
        TrainingError: a loss is no longer a number.
    """
    config = state.model.config
    mix = (
        Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=config.num_classes)
        if recipe.mixup or recipe.cutmix
        else None
    )
    autocast = torch.autocast(process.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")
    sample = sample_single if epoch <= recipe.single_epochs else sample_pairs
    state.model.train()
    if recipe.freeze_batch_norm:
        # All grids are served with the same statistics, which are the mean of theirs; so they are trained with them.
        for module in state.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    totals: dict[str, float] = {}
    progress = tqdm(loader, f"epoch {epoch}/{recipe.epochs}", disable=not process.is_first, mininterval=1)
    for step, (images, labels, *maps) in enumerate(progress, start=(epoch - 1) * len(loader)):
        images, labels = images.to(process.device), labels.to(process.device)
        if mix:
            images, labels = mix(images, labels)
        schedule.step_update(step)
        targets = find_targets(recipe, config, teacher, images, labels, maps)
        pairs = sample(config, recipe.seed, step)
        box = draw_box(config.patch_grids[-1], recipe.seed, step) if recipe.mix_token else None
        losses = training_step(pair_loss, state.optimizer, images, targets, pairs, autocast, box)
        state.average.update(state.model, step + 1)
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of the {name} became {loss} in step {step} of epoch {epoch}; "
                    f"{way_out(recipe.output, epoch)}"
                )
            totals[name] = totals.get(name, 0.0) + loss
        progress.set_postfix({"loss": f"{sum(losses.values()):.3f}"})
    return {name: total / len(loader) for name, total in totals.items()}


def watch(recipe: Recipe, model: SuperViT, watched: Dataset[Sample]) -> dict[str, float]:
    """Measure the largest and the cheapest sub-network of the averaged weights on the images held out."""
    profile = ProfileTable.unmeasured(model.config)
    loader = SampleLoader(watched, recipe.batch_size, num_workers=recipe.workers)
    ends = (profile.cheapest.subnetwork, model.config.largest)
    measured = measure_accuracy(model, loader, dict.fromkeys(ends, Scaling()))
    return {str(subnetwork): result.top1 for subnetwork, result in measured.items()}
