"""Fine-tune a timm classifier on a data set, to be a teacher: `python -m models.finetune DATA --output FILE`.

A plain script: one network, the labels, one cosine. What it writes is what `supervit train --teacher-checkpoint` reads.
"""

import time
from pathlib import Path

import timm
import torch
from pydantic import Field, PositiveInt
from pydantic_settings import BaseSettings, CliApp, CliPositionalArg
from timm.data.distributed_sampler import RepeatAugSampler
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from models.batches import ImageBatches, read_images
from models.checkpoint import CheckpointMismatchError, read_weights
from models.data import list_classes, normalise, open_training_data, square_transform
from models.supervit import LVVIT_MICRO
from models.teacher import Adapter


class Finetune(BaseSettings):
    """Fine-tune a timm classifier, to be a teacher."""

    data: CliPositionalArg[Path] = Field(description="folder with train/ and perhaps val/, of class folders")
    output: Path = Field(description="file for its state dict")
    model: str = Field("tf_efficientnet_lite2", description="timm model")
    weights: Path = Field(description="its weights on ImageNet, under timm's names or in timm's order")
    side: PositiveInt = Field(96, description="pixels that the images are resized to")
    epochs: PositiveInt = Field(2, description="passes over the training images")
    batch_size: PositiveInt = Field(64, description="images per step")
    learning_rate: float = Field(1e-3, gt=0, description="peak rate of AdamW")
    weight_decay: float = Field(0.02, ge=0, description="of AdamW")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="probability mass spread over all classes")
    holdout: float = Field(0.02, gt=0, lt=1, description="part of train/ held out where there is no val/ folder")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of head, order and augmentation")
    workers: int = Field(2, ge=0, description="processes that decode images")


def finetune(options: Finetune) -> float:
    """Train the whole network on train/, save it and print its held-out accuracy after every epoch; return the last.

    Raises:
        DataError: the data set is unusable.
        CheckpointError: the weights are.
    """
    torch.manual_seed(options.seed)
    config = LVVIT_MICRO
    num_classes = len(list_classes(options.data / "train"))
    as_they_are = square_transform(config.image_side, config.image_side)
    training, watched = (
        read_images(dataset, options.batch_size, options.workers)
        for dataset in open_training_data(options.data, config, as_they_are, options.holdout, options.seed)
    )
    network = Adapter(load_network(options.model, options.weights, num_classes), config, options.side)
    sampler = RepeatAugSampler(training[1], 1, 0, num_repeats=1, selected_round=0)
    batches = ImageBatches(*training, sampler, options.batch_size, config, random_erasing=0.0)
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate, weight_decay=options.weight_decay)
    steps = options.epochs * len(batches)
    schedule = CosineLRScheduler(optimizer, steps, warmup_t=steps // 20, warmup_prefix=True, t_in_epochs=False)
    step, top1 = 0, 0.0
    for epoch in range(1, options.epochs + 1):
        started_at, total = time.monotonic(), 0.0
        network.train()
        sampler.set_epoch(epoch)
        for images, labels in tqdm(batches, f"epoch {epoch}/{options.epochs}", mininterval=10):
            schedule.step_update(step)
            loss = functional.cross_entropy(network(images), labels, label_smoothing=options.label_smoothing)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total, step = total + loss.item(), step + 1
        torch.save(network.network.state_dict(), options.output)
        top1 = measure(network, *watched, options.batch_size)
        seconds = time.monotonic() - started_at
        print(f"epoch {epoch}: loss {total / len(batches):.4f}, held-out top-1 {top1:.4f}, {seconds:.0f} s", flush=True)
    return top1


def load_network(model: str, path: Path, num_classes: int) -> nn.Module:
    """Build timm's `model` with the weights of another number of classes, all but those of its last layer.

    Raises:
        CheckpointError: the weights cannot be read, or are not those of `model`.
    """
    network: nn.Module = timm.create_model(model)
    weights, own = read_weights(path), network.state_dict()
    own_names = [name for name in own if not name.endswith("num_batches_tracked")]
    if not weights.keys() >= set(own_names):  # the same network under another library's names
        values = [weight for name, weight in weights.items() if not name.endswith("num_batches_tracked")]
        weights = dict(zip(own_names, values, strict=False))
    try:
        network.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointMismatchError(f"{path}: not weights of {model}: {str(error)[:200]}") from error
    network.reset_classifier(num_classes)  # type: ignore[operator] # timm's
    return network


@torch.inference_mode()
def measure(network: Adapter, images: Tensor, labels: Tensor, batch_size: int) -> float:
    """Measure top-1 on (M, 3, S, S) uint8 images with their (M,) labels."""
    network.eval()
    starts = range(0, len(labels), batch_size)
    answers = [network(normalise(images[start : start + batch_size], LVVIT_MICRO)).argmax(dim=1) for start in starts]
    return float((torch.cat(answers) == labels).float().mean())


if __name__ == "__main__":
    finetune(CliApp.run(Finetune))
