"""`supervit quantize`: finds the activation ranges, measures every sub-network in 8 bits, and saves both."""

import torch
from torch import Tensor

from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.data.datasets import NO_LABEL
from models.data.loaders import load_round_robin
from models.evaluation.evaluate import evaluate
from models.evaluation.hold_out import open_hold_out
from models.evaluation.tables import accuracy_table, calibration_summary, cascade_table
from models.files.sources import find_checkpoint
from models.header import Header
from models.processes import ALONE
from models.profiles import ProfileTable
from models.quantization import (
    LAYERS,
    SMOOTHING_BOUND,
    SMOOTHING_STEPS,
    TOLERATED_LOSS,
    BlockRanges,
    ProductInput,
    Quantization,
    Range,
)
from service.commands.options import Quantize
from service.commands.output import check_unchanged, output_path
from service.engines.factory import int8_engine
from service.engines.openvino_engine import OpenVINOEngine
from service.engines.openvino_products import ObservedProducts

RANGE_IMAGES = 240  # calibration images in all, divided among the sub-networks
# The share of images whose highest value lies in the range, and likewise the lowest. In a range that covers all images,
# a few outliers make every step longer; in one that ends at the mean of their highest values, half of the images lose
# theirs. On 160 held-out images, at the cheapest sub-network of DeiT-S's size, the answers' divergence from float32's
# was 0.068 and 0.035 with those two, and 0.033 with this share.
COVERED_SHARE = 0.9
# Migration strength (alpha of SmoothQuant): how much of the difference between channels moves from activations to
# weights. Compared with no smoothing, the error of logits on 287 held-out images is 8 % lower at the cheapest
# sub-network and 18 % lower at a middling one.
SMOOTHING = 0.6
LEAST_SHARE = 1e-4  # floor of a channel's magnitude, as a share of the largest channel's


def quantize(command: Quantize) -> None:
    """Calibrate, measure, print the table and write the checkpoint.

    Raises:
        CommandError: the file cannot be written, another file of its name exists, or the checkpoint was replaced.
        CheckpointError: there is no such checkpoint.
        DataError: the data set is unusable.
        DeviceError: this CPU has no instructions for 8 bits, or OpenVINO cannot run the model.
    """
    source = find_checkpoint(command.checkpoint)
    checkpoint = load_checkpoint(source)
    path = output_path(command.checkpoint, source, is_ours=checkpoint.is_ours, output=command.output)
    ranges = find_ranges(checkpoint, command)
    engine = int8_engine(checkpoint.model, ranges, command.threads)
    found = evaluate(
        checkpoint,
        command.data,
        batch_size=command.batch_size,
        workers=command.workers,
        max_bad_images=command.max_bad_images,
        process=ALONE,
        progress=lambda loader: loader,
        answer=engine.run,
    )
    int8 = Quantization(ranges, found.profile)
    print(f"{engine.describe()}\n{accuracy_table(found.profile)}\n{cascade_table(found.profile)}")
    print(f"{calibration_summary(found.profile)}\n{found.basis}")
    print(verdict(int8, checkpoint.profile))
    header = Header(checkpoint.name, checkpoint.config, checkpoint.class_names, checkpoint.profile, int8)
    check_unchanged(path, checkpoint)
    save_checkpoint(path, checkpoint.model, header, half=checkpoint.is_half)
    print(f"written to {path}")


def find_ranges(checkpoint: Checkpoint, command: Quantize) -> tuple[BlockRanges, ...]:
    """Find the activation ranges of each block, over images of the hold-out and all sub-networks.

    Raises:
        DataError: the data set is unusable.
    """
    images, chosen, _ = open_hold_out(checkpoint, command.data, command.max_bad_images, RANGE_IMAGES)
    products, subnetworks = ObservedProducts(), checkpoint.config.subnetworks
    engine = OpenVINOEngine(checkpoint.model, command.threads, "float32", products)
    seen: list[list[Tensor]] = [[] for _ in range(2 * len(products.places))]
    for number, subnetwork in enumerate(subnetworks):
        share = chosen[number :: len(subnetworks)]
        for batch, labels in load_round_robin(images, share, command.batch_size, command.workers, ALONE):
            for values, noted in zip(seen, engine.observe(batch[labels != NO_LABEL], subnetwork), strict=True):
                values.append(torch.from_numpy(noted))
    found = {
        place: make_range(torch.cat(lows), torch.cat(highs), torch.from_numpy(products.largest_weights[place]))
        for place, lows, highs in zip(products.places, seen[::2], seen[1::2], strict=True)
    }
    return tuple(
        BlockRanges(**{layer: found[ProductInput(block, layer)] for layer in LAYERS})
        for block in range(checkpoint.config.depth)
    )


def make_range(lows: Tensor, highs: Tensor, largest_weights: Tensor) -> Range:
    """Compute the smoothing of the channels, and the range of the smoothed activations.

    Args:
        lows: (M, D), the lowest value of each channel in each image.
        highs: (M, D), the highest value of each channel in each image.
        largest_weights: (D,), the largest absolute weight of each channel in the products that follow.
    """
    activations, weights = (
        largest.clamp(min=max(float(largest.max()) * LEAST_SHARE, LEAST_SHARE))
        for largest in (torch.maximum(-lows, highs).amax(dim=0), largest_weights)
    )
    octaves = SMOOTHING * activations.log2() - (1 - SMOOTHING) * weights.log2()
    steps = ((octaves - octaves.mean()) * SMOOTHING_STEPS).round().clamp(-SMOOTHING_BOUND, SMOOTHING_BOUND)
    factors = torch.exp2(steps / SMOOTHING_STEPS)
    low = (lows / factors).amin(dim=1).quantile(1 - COVERED_SHARE)
    high = (highs / factors).amax(dim=1).quantile(COVERED_SHARE)
    return Range.of(float(low), float(high), tuple(map(int, steps.tolist())))


def verdict(int8: Quantization, profile: ProfileTable) -> str:
    """Describe the top-1 lost compared with `profile`, and what `--precision auto` then serves in floating point."""
    losses = int8.losses(profile)
    if not losses:
        return "not compared with floating point: measure it with `supervit evaluate`, or serve with --precision int8"
    told = f"at most {100 * max(losses.values()):.2f} points of top-1 lost compared with floating point"
    floating = int8.too_lossy(profile)
    if not floating:
        return told
    lossy = ", ".join(map(str, floating))
    return f"{told}; more than {100 * TOLERATED_LOSS:.2g} at {lossy}, served in floating point unless --precision int8"
