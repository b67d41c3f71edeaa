"""Training: the paper's step over four sub-networks of one set of weights, and the loop around it.

On several processes: `torchrun --nproc-per-node N -m service.cli train ...`. Everything random is a function of the
seed, the epoch and the process, so a run that was cut short and resumed ends as it would have ended unbroken.
"""

import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Subset

from models.batches import Batches, open_batches
from models.calibration import Scaling
from models.compilation import compile_in_place
from models.convert import open_initial
from models.data import Sample, SampleLoader, evaluation_transform, list_classes, open_training_data
from models.devices import training_dtype
from models.evaluate import measure_accuracy
from models.head import compute_features, fit_head
from models.muon import Muon
from models.objective import PairLoss, sample_pairs, sample_single, training_step
from models.processes import Process, join_processes, seed_everything
from models.profiles import ProfileTable
from models.progress import Progress
from models.recipe import Recipe
from models.state import (
    CHECKPOINT_NAME,
    State,
    TrainingError,
    has_state,
    prepare_folder,
    read_log,
    save_log,
    save_weights,
    way_out,
)
from models.supervit import SuperViT
from models.teacher import Teacher

IMAGE_FIELDS = ("mean", "std", "interpolation", "crop_fraction")
FINAL_RATE, WARMUP_START_RATE = 1e-2, 1e-3  # fractions of the peak learning rate


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
    model = build_model(recipe, class_names).to(process.device)
    model.patch_embed.to(memory_format=torch.channels_last)
    if recipe.fit_head and not recipe.resume:
        fit_head(model, *training_features(recipe, model, process))
    teacher = build_teacher(recipe, model)
    optimizer = build_optimizer(recipe, model)
    is_half = training_dtype(process.device, recipe.precision) == torch.float16
    scaler = torch.amp.GradScaler(process.device.type) if is_half else None
    state = State(model, ModelEmaV3(model, recipe.ema_decay, use_warmup=True), optimizer, process.count, scaler)
    last = state.load(recipe, class_names) if recipe.resume else {"epoch": 0}
    records = read_log(recipe.output, last["epoch"]) if recipe.resume else []
    loader, sampler, watched = open_batches(recipe, model.config, teacher, process.rank, process.count, process.device)
    if process.is_first:
        prepare_folder(recipe.output)
    steps = math.ceil(len(loader) / recipe.accumulate)
    schedule = learning_rate_schedule(recipe, optimizer, steps, process.count)
    pair_loss = build_pair_loss(recipe, model, process)  # every process has read the log by now
    images = len(loader) * recipe.batch_size * process.count
    with Progress(recipe, steps, images, last["epoch"], is_shown=process.is_first) as progress:
        if "loss" in last and last["epoch"] not in (record["epoch"] for record in records):
            close_epoch(recipe, state, class_names, last, records, watched, progress, process)
        for epoch in range(last["epoch"] + 1, recipe.epochs + 1):
            seed_everything(recipe.seed, epoch, process.rank)
            sampler.set_epoch(recipe.seed * 100_000 + epoch)
            started_at = time.monotonic()
            present = None if recipe.teacher_once else teacher
            losses = train_epoch(recipe, state, pair_loss, present, schedule, loader, epoch, progress, process)
            if not state.is_finite:  # the losses are those before the last update
                raise TrainingError(
                    f"weights are no longer numbers after epoch {epoch}; {way_out(recipe.output, epoch)}"
                )
            last = {
                "epoch": epoch,
                "loss": losses,
                "learning_rate": max(group["lr"] for group in optimizer.param_groups),
                "seconds": time.monotonic() - started_at,
            }
            if process.is_first:
                state.save(recipe, class_names, last)  # first, so that whatever fails now costs nothing
            close_epoch(recipe, state, class_names, last, records, watched, progress, process)


def close_epoch(
    recipe: Recipe,
    state: State,
    class_names: tuple[str, ...],
    last: dict[str, Any],
    records: list[dict[str, Any]],
    watched: Dataset[Sample],
    progress: Progress,
    process: Process,
) -> None:
    """Save the averaged weights, measure them and add the epoch to the log.

    Where this fails or is interrupted, a resumed run does it before all else.
    """
    if process.is_first:
        save_weights(recipe, state, class_names)
        started_at = time.monotonic()
        top1 = watch(recipe, state.average.module, watched)
        seconds = round(last["seconds"] + time.monotonic() - started_at, 1)
        records.append(last | {"top1": top1, "seconds": seconds})
        save_log(recipe.output, records)
        progress.add_accuracies(last["epoch"], top1)
    if process.count > 1:
        distributed.barrier()


def build_model(recipe: Recipe, class_names: tuple[str, ...]) -> SuperViT:
    """Build the recipe's model, from scratch or from its initial weights.

    Raises:
        TrainingError: there is no such model, or its fields contradict one another.
        CheckpointError: the initial weights cannot be used.
    """
    known = timm.list_models("supervit_*")
    if recipe.model not in known:
        raise TrainingError(f"no model {recipe.model!r}; there are {', '.join(known)}")
    initial = open_initial(recipe.init) if recipe.init else None
    # Weights know their images, whatever model they are put into.
    images = {name: getattr(initial.config, name) for name in IMAGE_FIELDS} if initial and initial.config else {}
    fields = images | recipe.overrides | {"num_classes": len(class_names)}
    try:
        if initial and initial.config and "model" not in recipe.model_fields_set:
            model = SuperViT(replace(initial.config, **fields), recipe.drop_path)
        else:
            model = timm.create_model(recipe.model, drop_path_rate=recipe.drop_path, **fields)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    if recipe.freeze_batch_norm and not (initial and model.config.flavour == "lvvit"):
        raise TrainingError("freeze-batch-norm keeps the statistics of an lvvit stem that init names; there are none")
    if initial:
        initial.load_into(model, with_head=initial.has_head_for(class_names))
    return model


def training_features(recipe: Recipe, model: SuperViT, process: Process) -> tuple[Tensor, Tensor]:
    """Compute the features of the training images, unvaried, each once over all processes.

    Returns:
        (M, head width) features and (M,) labels, the same on every process.
    """
    transform = evaluation_transform(model.config)
    samples, _ = open_training_data(recipe.data, model.config, transform, recipe.holdout, recipe.seed)
    own = Subset(samples, range(process.rank, len(samples), process.count))  # type: ignore[arg-type] # it has a length
    features, labels = compute_features(model, SampleLoader(own, recipe.batch_size, num_workers=recipe.workers))
    if process.count == 1:
        return features, labels
    parts: list[tuple[Tensor, Tensor]] = [(features, labels)] * process.count
    distributed.all_gather_object(parts, (features, labels))
    return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])


def build_teacher(recipe: Recipe, model: SuperViT) -> Teacher | None:
    """Build what the recipe's model learns from beside the labels; None where that is nothing.

    Raises:
        TrainingError: timm knows no such model.
        CheckpointError: the teacher's weights cannot be used.
    """
    if recipe.teacher_self:
        return Teacher.of(model)
    if not recipe.teacher:
        return None
    if not timm.is_model(recipe.teacher):
        raise TrainingError(f"timm knows no model {recipe.teacher!r} to learn from")
    teacher = Teacher.load(recipe.teacher, recipe.teacher_checkpoint, recipe.teacher_side, model.config)
    return teacher.to(model.cls_token.device)


def build_optimizer(recipe: Recipe, model: SuperViT) -> torch.optim.Optimizer:
    """Build the recipe's optimiser; `learning_rate_schedule` sets its rate."""
    if recipe.layer_decay < 1:
        decay = partial(param_groups_layer_decay, layer_decay=recipe.layer_decay)
    else:
        decay = param_groups_weight_decay
    groups = decay(model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay())
    kind = Muon if recipe.optimizer == "muon" else torch.optim.AdamW
    return kind(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def learning_rate_schedule(
    recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int, processes: int
) -> CosineLRScheduler:
    """Warm up linearly, then follow a cosine down, step by step; the peak grows with the images of a step."""
    peak = recipe.learning_rate * recipe.batch_size * recipe.accumulate * processes / 512
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
    """Wrap the model in its losses and, where there are several processes, in what averages their gradients.

    Raises:
        TrainingError: it shall be compiled and there is no compiler.
    """
    pair_loss = PairLoss(model, recipe.label_smoothing, recipe.teacher_weight)
    if recipe.compile:
        compile_in_place(pair_loss, process.device)
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
    progress: Progress,
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
    dtype = training_dtype(process.device, recipe.precision)
    autocast = torch.autocast(process.device.type, dtype, enabled=dtype != torch.float32)
    single = partial(sample_single, pruned=recipe.single_pruned)
    sample = single if epoch <= recipe.single_epochs else sample_pairs
    state.model.train()
    if recipe.freeze_batch_norm:
        # All grids are served with the same statistics, which are the mean of theirs; so they are trained with them.
        for module in state.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    totals: dict[str, float] = {}
    progress.start_epoch(epoch)
    step, steps_before = 0, (epoch - 1) * math.ceil(len(loader) / recipe.accumulate)
    for index, (images, labels) in enumerate(loader):
        images, targets = images.to(process.device), labels.to(process.device)
        if mix:
            images, targets = mix(images, targets)
        step, number = steps_before + index // recipe.accumulate, index % recipe.accumulate + 1
        place = number, min(recipe.accumulate, len(loader) - index + number - 1)  # the last step takes what is left
        schedule.step_update(step)
        taught = teacher(images) if teacher else None
        pairs = sample(config, recipe.seed, step)
        losses = training_step(
            pair_loss, state.optimizer, images, targets, taught, pairs, autocast, state.scaler, recipe.clip_grad, place
        )
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of the {name} became {loss} in step {step} of epoch {epoch}; "
                    f"{way_out(recipe.output, epoch)}"
                )
            totals[name] = totals.get(name, 0.0) + loss
        progress.add_batch(recipe.batch_size * process.count, losses)
        if number == place[1]:
            state.average.update(state.model, step + 1)
            progress.add_step(step, losses, state.optimizer.param_groups[0]["lr"])
    progress.end_epoch()
    return {name: total / len(loader) for name, total in totals.items()}


def watch(recipe: Recipe, model: SuperViT, watched: Dataset[Sample]) -> dict[str, float]:
    """Measure the largest and the cheapest sub-network of the averaged weights on the images held out."""
    profile = ProfileTable.unmeasured(model.config)
    loader = SampleLoader(watched, recipe.batch_size, num_workers=recipe.workers)
    ends = (profile.cheapest.subnetwork, model.config.largest)
    measured = measure_accuracy(model, loader, dict.fromkeys(ends, Scaling()))
    return {str(subnetwork): result.top1 for subnetwork, result in measured.items()}
