"""What a training epoch reads: augmented images with their labels, or with targets mixed from labels and a teacher.

Small images are decoded once and kept in memory, then cropped and mirrored a whole batch at a time. On a machine with
few cores, decoding and augmenting them one by one takes time from the training step itself.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from models.checkpoint import digest
from models.data.augmentation import Augmentation, training_transform
from models.data.crops import PADDED_CROP_SIDE_PX, crop_padding
from models.data.datasets import ImageSet, TrainingSamples, digest_samples, open_training_data
from models.data.images import evaluation_transform, normalise, square_transform
from models.data.loaders import SampleLoader, gather_round_robin, load_round_robin
from models.files.checkpoint_errors import CheckpointError
from models.files.pickles import UNPICKLING_ERRORS
from models.files.sources import find_checkpoint
from models.processes import ALONE, Process, gather
from models.subnetwork import SuperViTConfig
from models.training.objective import Targets
from models.training.recipe import Recipe, count_training_files
from models.training.state import TrainingError, prepare_folder, save_atomically
from models.training.teacher import Teacher
from models.training.token_labels import CropAndVariation, WithTokenLabels, cut_token_labels

MEMORY_LIMIT_BYTES = 2**31
TARGETS_NAME = "targets.pt"
# The options that determine a teacher's answers and how they are mixed with the labels.
TEACHER_OPTIONS = (
    "data",
    "teacher",
    "teacher_checkpoint",
    "teacher_side",
    "teacher_self",
    "fit_head",
    "teacher_weight",
    "label_smoothing",
)


class ImageBatches:
    """Batches of augmented images from images in memory, drawn as by `training_transform` if they are square."""

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        sampler: RepeatAugSampler,
        batch_size: int,
        config: SuperViTConfig,
        random_erasing: float,
    ) -> None:
        """Create batches from images in memory.

        Args:
            images: (M, 3, S, S) uint8.
            targets: (M,) class indices or (M, classes) probabilities.
            sampler: the order of the images in an epoch.
            batch_size: images per batch; an incomplete last batch is dropped.
            config: the model's configuration, for the normalisation.
            random_erasing: probability of erasing a rectangle.
        """
        self.images, self.targets, self.sampler = images, targets, sampler
        self.batch_size, self.config = batch_size, config
        self.erase = RandomErasing(random_erasing, mode="pixel", device="cpu")

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (B, 3, S, S) normalised float32 images with their targets."""
        order = torch.tensor(list(self.sampler))
        for chosen in order[: len(self) * self.batch_size].view(-1, self.batch_size):
            images = normalise(crop_and_mirror(self.images[chosen]), self.config)
            yield self.erase(images), self.targets[chosen]


Batches = SampleLoader | ImageBatches


def crop_and_mirror(images: Tensor) -> Tensor:
    """Shift each of (B, 3, S, S) images by up to an eighth of its side over black, and mirror it at random."""
    count, _, side, _ = images.shape
    padding = crop_padding(side)
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1))
    rows, columns = top + torch.arange(side), left + torch.arange(side)  # (B, S)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    padded = functional.pad(images, (padding,) * 4)
    index = torch.arange(count)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def read_images(dataset: ImageSet, batch_size: int, workers: int) -> tuple[Tensor, Tensor]:
    """Decode a data set of uint8 images of one size; every process decodes all of it.

    Returns:
        (M, 3, S, S) images and their (M,) class indices, without the images marked as bad.

    Raises:
        DataError: too many images cannot be read.
    """
    first, _ = dataset[0]
    images = torch.empty((len(dataset), *first.shape), dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.long)
    start = 0
    for batch, its_labels in SampleLoader(dataset, batch_size, num_workers=workers):
        # Copied, because a batch from a worker process holds two of the file descriptors that this process may open.
        images[start : start + len(batch)], labels[start : start + len(batch)] = batch, its_labels
        start += len(batch)
    return (images[~dataset.is_bad], labels[~dataset.is_bad]) if dataset.is_bad.any() else (images, labels)


def fits_memory(recipe: Recipe, config: SuperViTConfig, limit_bytes: int = MEMORY_LIMIT_BYTES) -> bool:
    """Return whether the images are kept in memory: small, not too many, and augmented alike.

    RandAugment and maps of token labels need each image by itself.
    """
    size_bytes = count_training_files(recipe.data) * 3 * config.image_side**2
    is_small = config.image_side <= PADDED_CROP_SIDE_PX and size_bytes <= limit_bytes
    return is_small and not recipe.rand_augment and not recipe.token_labels


def soft_targets(
    recipe: Recipe, config: SuperViTConfig, teacher: Teacher, samples: ImageSet, process: Process = ALONE
) -> Tensor:
    """Mix the labels of the training images with the teacher's answers to each image and its mirror image.

    Each process asks the teacher about its share. The targets are kept in the output folder, so a resumed run does not
    ask again.

    Returns:
        (M, classes) probabilities in the order of the images; for an unreadable image, those of its label alone.
    """
    path = recipe.output / TARGETS_NAME
    asked = {name: str(getattr(recipe, name)) for name in TEACHER_OPTIONS} | {
        "images": digest_samples(samples),
        "seen as": str((config.image_side, config.crop_fraction, config.interpolation, config.mean, config.std)),
        "teacher's weights": _identify(recipe.teacher_checkpoint) if recipe.teacher_checkpoint else "timm's",
        "initial weights": _identify(recipe.init) if recipe.teacher_self and recipe.init else "",
        "itself": str(config) if recipe.teacher_self else "",
    }
    kept = _kept_targets(path, asked)
    if all(gather(kept is not None)) and kept is not None:  # or one would wait for shares that the others skip
        return kept
    if process.is_first:
        prepare_folder(recipe.output)
    everything, seen = range(len(samples)), samples.with_transform(evaluation_transform(config))
    loader = load_round_robin(seen, everything, recipe.batch_size, recipe.workers, process)
    answers = [
        teacher.classify_with_mirror(images.to(teacher.device)).cpu()
        for images, _ in tqdm(loader, "teacher targets", disable=not process.is_first, mininterval=1)
    ]
    certain = functional.one_hot(torch.tensor([label for _, label in samples.files]), config.num_classes).float()
    targets = certain.lerp(torch.full_like(certain, 1 / config.num_classes), recipe.label_smoothing)
    teacher_probs = targets.lerp(gather_round_robin(answers), recipe.teacher_weight)
    targets = torch.where(samples.is_bad[:, None], targets, teacher_probs)
    if process.is_first:
        save_atomically({"asked": asked, "targets": targets}, path)
    return targets


def _identify(weights: Path) -> str:
    """Return the digest of a file of weights, which may be given by name; of timm's own models, the name."""
    try:
        return digest(find_checkpoint(weights))
    except CheckpointError:
        return str(weights)


def _kept_targets(path: Path, asked: dict[str, str]) -> Tensor | None:
    with suppress(OSError, *UNPICKLING_ERRORS):  # no such file, or a damaged one: the teacher is asked again
        kept = torch.load(path, weights_only=True)
        if kept["asked"] == asked:
            targets: Tensor = kept["targets"]
            return targets
    return None


def find_targets(
    recipe: Recipe, config: SuperViTConfig, teacher: Teacher | None, images: Tensor, labels: Tensor, maps: list[Tensor]
) -> Targets:
    """Build the targets of a batch.

    Args:
        recipe: the recipe, which says what the teacher is asked.
        config: the student's configuration.
        teacher: the teacher to ask about these very images; None for none.
        images: (B, 3, S, S), normalised, augmented.
        labels: (B,) class indices or (B, classes) probabilities.
        maps: the rest of the batch, which is the token labels and crops of `WithTokenLabels`; empty for none.
    """
    if maps:
        classes, weights, crops = (part.to(images.device) for part in maps)
        tokens = cut_token_labels(classes, weights, crops, config.patch_grids[-1], config.num_classes)
        return Targets(labels, teacher(images) if teacher else None, tokens)
    if teacher and recipe.teacher_tokens:
        return Targets(labels, *teacher.label_patches(images))
    return Targets(labels, teacher(images) if teacher else None)


def open_batches(
    recipe: Recipe, config: SuperViTConfig, teacher: Teacher | None, process: Process
) -> tuple[Batches, RepeatAugSampler, SampleLoader]:
    """Open the data that one process of a run trains on.

    Returns:
        The batches; the sampler, whose epoch sets their order; and this process's share of the images to watch.

    Raises:
        DataError: the data set is unusable.
        TrainingError: the data set is too small for a batch.
    """
    in_memory = fits_memory(recipe, config)
    augmentation = Augmentation(recipe.rand_augment or None, recipe.random_erasing, recipe.smallest_crop)
    side = config.image_side
    vary = CropAndVariation if recipe.token_labels else training_transform
    transform = square_transform(side, side) if in_memory else vary(config, augmentation)
    samples, watching = open_training_data(
        recipe.data,
        config,
        transform,  # type: ignore[arg-type] # the one for token labels returns the crop, too
        recipe.holdout,
        recipe.seed,
        recipe.max_bad_images,
    )
    sampler = _sampler(recipe, len(samples), process)
    for images in (samples, watching):
        images.report_skipped_files()
    watched = load_round_robin(watching, range(len(watching)), recipe.batch_size, recipe.workers, process)
    targets = soft_targets(recipe, config, teacher, samples, process) if teacher and recipe.teacher_once else None
    if in_memory:
        pixels, labels = read_images(samples, recipe.batch_size, recipe.workers)
        sampler = _sampler(recipe, len(labels), process)
        labels = labels if targets is None else targets[~samples.is_bad]
        return ImageBatches(pixels, labels, sampler, recipe.batch_size, config, recipe.random_erasing), sampler, watched
    labelled = TrainingSamples(samples, targets)
    loader = SampleLoader(
        WithTokenLabels(labelled, recipe.token_labels, config.num_classes) if recipe.token_labels else labelled,  # type: ignore[arg-type] # labels of any kind
        recipe.batch_size,
        sampler=sampler,
        num_workers=recipe.workers,
        drop_last=True,
        pin_memory=process.device.type == "cuda",
    )
    return loader, sampler, watched


def _sampler(recipe: Recipe, count: int, process: Process) -> RepeatAugSampler:
    repeats = recipe.augmentation_repeats
    sampler = RepeatAugSampler(range(count), process.count, process.rank, num_repeats=repeats, selected_round=0)
    if len(sampler) < recipe.batch_size:
        raise TrainingError(f"{len(sampler)} training images per process do not fill a batch of {recipe.batch_size}")
    return sampler
