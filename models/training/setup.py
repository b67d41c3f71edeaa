"""What a training run builds before its first step: model, features for a head, teacher, optimiser and schedule."""

from dataclasses import replace
from functools import partial

import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor

from models.conversion.convert import open_initial
from models.data.datasets import NO_LABEL, open_training_data
from models.data.images import evaluation_transform
from models.data.loaders import gather_round_robin, load_round_robin
from models.processes import Process
from models.supervit import SuperViT
from models.training.head import compute_features
from models.training.muon import Muon
from models.training.recipe import Recipe
from models.training.state import TrainingError
from models.training.teacher import Teacher

IMAGE_FIELDS = ("mean", "std", "interpolation", "crop_fraction")
FINAL_RATE, WARMUP_START_RATE = 1e-2, 1e-3  # fractions of the peak learning rate


def build_model(recipe: Recipe, class_names: tuple[str, ...]) -> SuperViT:
    """Build the recipe's model, from scratch or from its initial weights.

    Raises:
        TrainingError: there is no such model, or its fields contradict one another.
        CheckpointError: the initial weights cannot be used.
    """
    known = timm.list_models("supervit_*")
    if recipe.model not in known:
        raise TrainingError(f"unknown model {recipe.model!r}; choose from {', '.join(known)}")
    initial = open_initial(recipe.init, num_heads=recipe.num_heads) if recipe.init else None
    # The preprocessing belongs to the weights, whatever model they are loaded into.
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
        raise TrainingError("freeze-batch-norm requires --init with the weights of an lvvit")
    if model.aux_head is not None and model.config.keep_rates[-1] < 1:
        raise TrainingError("an lvvit is trained on all patch tokens; its keep-rates must end in 1")
    if initial:
        initial.load_into(model, with_head=initial.has_head_for(class_names))
    return model


def training_features(recipe: Recipe, model: SuperViT, process: Process) -> tuple[Tensor, Tensor]:
    """Compute the features of the training images without augmentation, each image once over all processes.

    Returns:
        (M, head width) features and (M,) labels, the same on every process.
    """
    images, _ = open_training_data(
        recipe.data,
        model.config,
        evaluation_transform(model.config),
        recipe.holdout,
        recipe.seed,
        recipe.max_bad_images,
    )
    own = load_round_robin(images, range(len(images)), recipe.batch_size, recipe.workers, process)
    features, labels = map(gather_round_robin, compute_features(model, own))
    is_known = labels != NO_LABEL
    return features[is_known], labels[is_known]


def build_teacher(recipe: Recipe, model: SuperViT) -> Teacher | None:
    """Build the teacher of the recipe's model; None if the recipe asks for none.

    Raises:
        TrainingError: timm knows no such model.
        CheckpointError: the teacher's weights cannot be used.
    """
    if recipe.teacher_self:
        return Teacher.of(model)
    if not recipe.teacher:
        return None
    if not timm.is_model(recipe.teacher):
        raise TrainingError(f"unknown timm model {recipe.teacher!r} as the teacher")
    teacher = Teacher.load(
        recipe.teacher, recipe.teacher_checkpoint, recipe.teacher_side, model.config, recipe.teacher_tokens
    )
    return teacher.to(model.cls_token.device)


def build_optimizer(recipe: Recipe, model: SuperViT) -> torch.optim.Optimizer:
    """Build the recipe's optimiser; `learning_rate_schedule` sets its learning rate."""
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
    """Build a schedule: linear warm-up, then cosine decay, step by step; the peak scales with the images in a step."""
    peak = recipe.learning_rate * recipe.batch_size * recipe.accumulate * processes / 512
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = peak  # timm takes `initial_lr` as its peak; a resumed state has one, too
    warmup_epochs = min(recipe.warmup_epochs, recipe.epochs / 10)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(2, recipe.epochs * steps_per_epoch),  # timm warns of a cosine over the single step of a tiny run
        lr_min=FINAL_RATE * peak,
        warmup_t=round(warmup_epochs * steps_per_epoch),
        warmup_lr_init=WARMUP_START_RATE * peak,
        t_in_epochs=False,
    )
