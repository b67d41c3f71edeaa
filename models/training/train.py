"""Training: the paper's step over four sub-networks of one set of weights, and the loop around it.

On several processes: `torchrun --nproc-per-node N -m service.cli train ...`. Everything random is a function of the
seed, the epoch and the process, so an interrupted and resumed run ends as it would have without the interruption.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import Mixup
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from models.data.datasets import ImageSet, digest_samples, list_classes
from models.data.loaders import SampleLoader
from models.devices import autocast, training_dtype
from models.evaluation.calibration import Scaling
from models.evaluation.judging import make_answer, measure_accuracy
from models.mix_token import draw_box
from models.processes import Process, joined_processes, seed_everything, share_buffers
from models.profiles import ProfileTable
from models.supervit import SuperViT
from models.training.batches import Batches, find_targets, open_batches
from models.training.compilation import compile_in_place
from models.training.head import fit_head
from models.training.objective import Batch, Learner, PairLoss, Step, sample_pairs, sample_single, training_step
from models.training.progress import Progress
from models.training.recipe import Recipe
from models.training.setup import build_model, build_optimizer, build_teacher, learning_rate_schedule, training_features
from models.training.state import (
    CHECKPOINT_NAME,
    State,
    TrainingError,
    alone_in,
    has_state,
    prepare_folder,
    read_log,
    recovery_advice,
    save_log,
    save_weights,
    version_of_state,
)
from models.training.teacher import Teacher


@dataclass(frozen=True, slots=True)
class Run:
    """A run as one process sees it, from its first epoch to its last.

    Attributes:
        recipe: the options of the run.
        process: this process.
        state: what changes during training.
        class_names: one per logit.
        learn: learns from a batch and returns its losses by name.
        loader: the batches of this process.
        steps_per_epoch: optimiser steps, of one or several batches each.
        schedule: sets the learning rate of each step.
        watched: this process's share of the images to watch.
        progress: shows how far the run is.
    """

    recipe: Recipe
    process: Process
    state: State
    class_names: tuple[str, ...]
    learn: Callable[[Batch], dict[str, float]]
    loader: Batches
    steps_per_epoch: int
    schedule: CosineLRScheduler
    watched: SampleLoader
    progress: Progress


def train(recipe: Recipe, step: Step = training_step) -> Path:
    """Run `recipe` to its end and return the path of the checkpoint, which holds the averaged weights.

    Args:
        recipe: the options of the run.
        step: learns from a batch, as `training_step` does.

    Raises:
        DataError: the data set is unusable.
        DeviceError: the device is unusable.
        CheckpointError: the initial weights or the teacher's are unusable.
        TrainingError: the model or the output folder cannot be used, there is nothing to resume, the run to resume has
            other options or other images to watch, another process trains in the folder, or losses or weights are no
            longer finite.
    """
    if has_state(recipe.output) and not recipe.resume:
        raise TrainingError(f"{recipe.output}: already holds a run; continue it with --resume or choose another folder")
    with joined_processes(recipe.device) as process:
        run_epochs(recipe, process, step)
    return recipe.output / CHECKPOINT_NAME


def run_epochs(recipe: Recipe, process: Process, step: Step = training_step) -> None:
    """Set up this process's part of the run and train, epoch by epoch, to the end."""
    class_names, found = list_classes(recipe.data / "train"), version_of_state(recipe.output)
    seed_everything(recipe.seed)  # every process starts from the same weights
    model = build_model(recipe, class_names).to(process.device)
    model.patch_embed.to(memory_format=torch.channels_last)
    if recipe.fit_head and (recipe.teacher_self or not recipe.resume):  # the state holds only the student's head
        fit_head(model, *training_features(recipe, model, process))
    teacher = build_teacher(recipe, model)
    optimizer = build_optimizer(recipe, model)
    dtype = training_dtype(process.device, recipe.precision)
    scaler = torch.amp.GradScaler(process.device.type) if dtype == torch.float16 else None
    state = State(model, ModelEmaV3(model, recipe.ema_decay, use_warmup=True), optimizer, process.count, scaler)
    last, watched_before = state.load(recipe, class_names) if recipe.resume else ({"epoch": 0}, None)
    records = read_log(recipe.output, last["epoch"]) if recipe.resume else []
    loader, sampler, watched = open_batches(recipe, model.config, teacher, process)
    watched_now = digest_samples(cast(ImageSet, watched.dataset))
    if watched_before not in (None, watched_now):
        raise TrainingError(
            f"{recipe.data}: images were added or removed since the run began, so that other images would be held out; "
            f"restore them, or start another run with --init {recipe.output / CHECKPOINT_NAME}"
        )
    if process.is_first:
        prepare_folder(recipe.output)
    steps = math.ceil(len(loader) / recipe.accumulate)
    schedule = learning_rate_schedule(recipe, optimizer, steps, process.count)
    # DistributedDataParallel synchronises the processes, so all have read the log before the first one writes it.
    pair_loss = build_pair_loss(recipe, model, process)
    learner = Learner(pair_loss, optimizer, autocast(process.device, dtype), scaler, recipe.clip_grad)
    images = len(loader) * recipe.batch_size * process.count
    with (
        alone_in(recipe.output, found) if process.is_first else nullcontext(),
        Progress(recipe, steps, images, last["epoch"], is_shown=process.is_first) as progress,
    ):
        learn = partial(step, learner)
        run = Run(recipe, process, state, class_names, learn, loader, steps, schedule, watched, progress)
        if process.is_first and last["epoch"] and not (recipe.output / CHECKPOINT_NAME).exists():
            save_weights(recipe, state, class_names)
        if "loss" in last and last["epoch"] not in (record["epoch"] for record in records):
            close_epoch(run, last, records)
        for epoch in range(last["epoch"] + 1, recipe.epochs + 1):
            seed_everything(recipe.seed, epoch, process.rank)
            sampler.set_epoch(recipe.seed * 100_000 + epoch)
            started_at = time.monotonic()
            losses = train_epoch(run, None if recipe.teacher_once else teacher, epoch)
            if not state.is_finite:  # the losses do not show the last update
                raise TrainingError(
                    f"weights are not finite after epoch {epoch}; {recovery_advice(recipe.output, epoch)}"
                )
            last = {
                "epoch": epoch,
                "loss": losses,
                "learning_rate": highest_rate(optimizer),
                "seconds": time.monotonic() - started_at,
            }
            if process.is_first:
                state.save(recipe, class_names, last, watched_now)  # first, so that a later failure loses nothing
            close_epoch(run, last, records)


def close_epoch(run: Run, last: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Save the averaged weights, measure them and add the epoch to the log.

    If this fails or is interrupted, a resumed run does it first.
    """
    if run.process.is_first:
        save_weights(run.recipe, run.state, run.class_names)
    started_at = time.monotonic()
    top1 = measure_ends(run.state.average.module, run.watched)
    if run.process.is_first:
        seconds = round(last["seconds"] + time.monotonic() - started_at, 1)
        records.append(last | {"top1": top1, "seconds": seconds})
        save_log(run.recipe.output, records)
        run.progress.add_accuracies(last["epoch"], top1)
    if run.process.count > 1:
        distributed.barrier()


def build_pair_loss(recipe: Recipe, model: SuperViT, process: Process) -> PairLoss | DistributedDataParallel:
    """Wrap the model in its losses and, if there are several processes, in DistributedDataParallel.

    Raises:
        TrainingError: the recipe asks for compilation and there is no compiler.
    """
    pair_loss = PairLoss(model, recipe.label_smoothing, recipe.teacher_weight, recipe.token_label_weight)
    if recipe.compile:
        compile_in_place(pair_loss, process.device)
    # A pair leaves the other grids' position embeddings unused.
    return pair_loss if process.count == 1 else DistributedDataParallel(pair_loss, find_unused_parameters=True)


def train_epoch(run: Run, teacher: Teacher | None, epoch: int) -> dict[str, float]:
    """Run one epoch and return the mean of each loss by its name; a teacher is asked about every batch.

    Raises:
        TrainingError: a loss is no longer finite.
    """
    recipe, state, loader, device = run.recipe, run.state, run.loader, run.process.device
    config = state.model.config
    mix = (
        Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=config.num_classes)
        if recipe.mixup or recipe.cutmix
        else None
    )
    single = partial(sample_single, pruned=recipe.single_pruned)
    sample = single if epoch <= recipe.single_epochs else sample_pairs
    state.model.train()
    if recipe.freeze_batch_norm:
        # All grids are served with the same statistics, the mean over the grids, so they are trained with these.
        for module in state.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    totals: dict[str, float] = {}
    run.progress.start_epoch(epoch)
    for index, (images, labels, *maps) in enumerate(loader):
        images, labels = images.to(device), labels.to(device)
        if mix:
            images, labels = mix(images, labels)
        step, number = (epoch - 1) * run.steps_per_epoch + index // recipe.accumulate, index % recipe.accumulate + 1
        count = min(recipe.accumulate, len(loader) - index + number - 1)  # the last step takes the rest
        run.schedule.step_update(step)
        targets = find_targets(recipe, config, teacher, images, labels, maps)
        pairs = sample(config, recipe.seed, step)
        box = draw_box(config.patch_grids[-1], recipe.seed, step) if recipe.mix_token else None
        losses = run.learn(Batch(images, targets, pairs, box, number, count))
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of the {name} became {loss} in step {step} of epoch {epoch}; "
                    f"{recovery_advice(recipe.output, epoch)}"
                )
            totals[name] = totals.get(name, 0.0) + loss
        run.progress.add_batch(recipe.batch_size * run.process.count, losses)
        if number == count:
            state.average.update(state.model, step + 1)
            run.progress.add_step(step, losses, highest_rate(state.optimizer))
    run.progress.end_epoch()
    return {name: total / len(loader) for name, total in totals.items()}


def highest_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of the last layers: that of earlier ones may be a part of it."""
    return max(float(group["lr"]) for group in optimizer.param_groups)


def measure_ends(model: SuperViT, watched: SampleLoader) -> dict[str, float]:
    """Measure the largest and the cheapest sub-network of the averaged weights, each process on its share."""
    profile = ProfileTable.unmeasured(model.config)
    ends = (profile.cheapest.subnetwork, model.config.largest)
    share_buffers(model)
    measured = measure_accuracy(make_answer(model), watched, dict.fromkeys(ends, Scaling()))
    return {str(subnetwork): result.top1 for subnetwork, result in measured.items()}
