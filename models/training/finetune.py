"""Fine-tune a timm classifier on a data set, to be a teacher.

    python -m models.training.finetune DATA --weights FILE --output FILE

A plain script: one network, labels only, one cosine schedule. `supervit train --teacher-checkpoint` reads its output.
"""

import tempfile
import time
from pathlib import Path

import timm
import torch
from pydantic import BaseModel, Field, PositiveInt
from pydantic_settings import CliApp, CliPositionalArg
from timm.data.distributed_sampler import RepeatAugSampler
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from models.checkpoint import check_weights, read_weights
from models.data.datasets import list_classes, open_training_data
from models.data.images import normalise, square_transform
from models.devices import resolve_device
from models.errors import DataError
from models.files.checkpoint_errors import prefixed_errors
from models.supervit import SuperViT
from models.training.batches import ImageBatches, read_images
from models.training.state import save_atomically
from models.training.teacher import Adapter


class Finetune(BaseModel):
    """Fine-tune a timm classifier, to be a teacher."""

    data: CliPositionalArg[Path] = Field(description="folder with train/ and perhaps val/, of class folders")
    output: Path = Field(description="file for its state dict")
    model: str = Field("tf_efficientnet_lite2", description="timm model")
    weights: Path = Field(
        description="its weights on ImageNet, under timm's names or in timm's order; or what an earlier run wrote"
    )
    side: PositiveInt = Field(96, description="pixels that it sees the images resized to")
    student: str = Field(
        "supervit_lvvit_micro_patch4_32", description="SuperViT to be taught; all images are kept in memory at its size"
    )
    epochs: PositiveInt = Field(2, description="passes over the training images")
    batch_size: PositiveInt = Field(64, description="images per step")
    learning_rate: float = Field(1e-3, gt=0, description="peak rate of AdamW")
    weight_decay: float = Field(0.02, ge=0, description="of AdamW")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="probability mass spread over all classes; what it adds, students do not learn"
    )
    holdout: float = Field(0.02, gt=0, lt=1, description="part of train/ held out where there is no val/ folder")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of head, order and augmentation")
    workers: int = Field(2, ge=0, description="processes that decode images")
    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto")


def finetune(options: Finetune) -> float:
    """Train the whole network on train/, save it and print its held-out top-1 after every epoch; return the last top-1.

    Raises:
        DataError: the data set is unusable.
        CheckpointError: the weights are unusable.
        DeviceError: the device cannot be used.
        OSError: `output` cannot be written.
    """
    torch.manual_seed(options.seed)
    device = resolve_device(options.device)
    student: SuperViT = timm.create_model(options.student)
    config = student.config
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=options.output.parent):
        pass  # fail now, not an hour later, if the folder cannot be written to
    num_classes = len(list_classes(options.data / "train"))
    as_they_are = square_transform(config.image_side, config.image_side)
    training, watched = (
        read_images(dataset, options.batch_size, options.workers)
        for dataset in open_training_data(options.data, config, as_they_are, options.holdout, options.seed)
    )
    network = Adapter(load_network(options.model, options.weights, num_classes), config, options.side)
    network.to(device).to(memory_format=torch.channels_last)  # one and a half times as fast on a CPU
    if len(training[1]) < options.batch_size:
        raise DataError(f"{len(training[1])} training images do not fill a batch of {options.batch_size}")
    sampler = RepeatAugSampler(training[1], 1, 0, num_repeats=1, selected_round=0)
    batches = ImageBatches(*training, sampler, options.batch_size, config, random_erasing=0.0)
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate, weight_decay=options.weight_decay)
    steps = options.epochs * len(batches)
    schedule = CosineLRScheduler(optimizer, steps, warmup_t=steps // 20, warmup_prefix=True, t_in_epochs=False)
    step, top1 = 0, 0.0
    for epoch in range(1, options.epochs + 1):
        started_at, total = time.monotonic(), 0.0
        network.train()
        sampler.set_epoch(options.seed * 100_000 + epoch)
        for images, labels in tqdm(batches, f"epoch {epoch}/{options.epochs}", mininterval=10):
            schedule.step_update(step)
            loss = functional.cross_entropy(
                network(images.to(device)), labels.to(device), label_smoothing=options.label_smoothing
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total, step = total + loss.item(), step + 1
        save_atomically(network.network.state_dict(), options.output)
        top1 = measure(network, *watched, options.batch_size)
        seconds = time.monotonic() - started_at
        print(f"epoch {epoch}: loss {total / len(batches):.4f}, held-out top-1 {top1:.4f}, {seconds:.0f} s", flush=True)
    return top1


def load_network(model: str, path: Path, num_classes: int) -> nn.Module:
    """Build timm's `model` with these weights, and with a new last layer if they know another number of classes.

    Raises:
        CheckpointError: the weights cannot be read, or are not those of `model`.
    """
    network: nn.Module = timm.create_model(model)
    weights = {name: weight for name, weight in read_weights(path).items() if not _is_counter(name)}
    names = [name for name in network.state_dict() if not _is_counter(name)]
    if not weights.keys() & set(names) and len(weights) == len(names):  # the same network under another library's names
        weights = dict(zip(names, weights.values(), strict=True))
    classes_known = weights[names[-1]].numel() if names[-1] in weights else 0  # the length of the last layer's bias
    if classes_known:
        network.reset_classifier(classes_known)  # type: ignore[operator] # timm's
    with prefixed_errors(f"{path}: its weights do not match {model}"):
        check_weights(weights, {name: tensor for name, tensor in network.state_dict().items() if not _is_counter(name)})
    network.load_state_dict(weights, strict=False)
    if classes_known != num_classes:
        network.reset_classifier(num_classes)  # type: ignore[operator] # timm's
    return network


@torch.inference_mode()
def measure(network: Adapter, images: Tensor, labels: Tensor, batch_size: int) -> float:
    """Measure top-1 on (M, 3, S, S) uint8 images with their (M,) labels."""
    network.eval()
    starts = range(0, len(labels), batch_size)
    device, config = network.scale.device, network.config
    batches = (images[start : start + batch_size].to(device) for start in starts)
    answers = [network(normalise(batch, config)).argmax(dim=1).cpu() for batch in batches]
    return float((torch.cat(answers) == labels).float().mean())


def _is_counter(name: str) -> bool:
    """Return whether `name` is a batch norm's count of batches, which some libraries leave out."""
    return name.endswith("num_batches_tracked")


if __name__ == "__main__":
    finetune(CliApp.run(Finetune))
