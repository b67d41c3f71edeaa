"""`supervit evaluate`: measures every sub-network of a checkpoint; prints, saves and plots the accuracies."""

from functools import partial

from tqdm import tqdm

from models.checkpoint import load_checkpoint, round_to_half, save_checkpoint
from models.evaluation.evaluate import evaluate as evaluate_subnetworks
from models.evaluation.plots import plot_frontier
from models.evaluation.tables import accuracy_table, calibration_summary, cascade_table
from models.files.sources import find_checkpoint
from models.header import Header
from models.processes import joined_processes
from service.commands.options import Evaluate
from service.commands.output import check_unchanged, output_path


def evaluate(command: Evaluate) -> None:
    """Measure, print the table, write the accuracies into the checkpoint and plot the frontier in the same folder.

    A file in another format is left unchanged: a copy in our own format, in the same folder, gets the accuracies. For a
    checkpoint given by name rather than by path, the copy is written into the current folder.

    Raises:
        CheckpointError, DataError, DeviceError: the checkpoint, the data set or the device cannot be used.
        CommandError: the file cannot be written, another file of its name exists, or the checkpoint was replaced.
    """
    source = find_checkpoint(command.checkpoint)
    checkpoint = load_checkpoint(source)
    path = output_path(command.checkpoint, source, is_ours=checkpoint.is_ours)
    is_half = checkpoint.is_half or command.half
    if is_half:
        round_to_half(checkpoint.model)
    with joined_processes(command.device) as process:
        found = evaluate_subnetworks(
            checkpoint,
            command.data,
            batch_size=command.batch_size,
            workers=command.workers,
            max_bad_images=command.max_bad_images,
            process=process,
            rates_between=command.rates_between,
            progress=partial(tqdm, desc="evaluating", disable=not process.is_first, mininterval=1),
        )
    if not process.is_first:
        return
    # Ranges and accuracies in 8 bits do not hold for rounded weights.
    int8 = None if command.half and not checkpoint.is_half else checkpoint.int8
    header = Header(checkpoint.name, checkpoint.config, checkpoint.class_names, found.profile, int8)
    picture = path.with_suffix(".png")
    print(accuracy_table(found.profile))
    print(cascade_table(found.profile))
    print(calibration_summary(found.profile))
    print(found.basis)
    check_unchanged(path, checkpoint)
    save_checkpoint(path, checkpoint.model, header, half=is_half)
    plot_frontier(found.profile, checkpoint.name, picture)
    if int8 is None and checkpoint.int8 is not None:
        print("the weights were rounded and are no longer prepared for int8; run `supervit quantize` again")
    print(f"written to {path}, plotted in {picture}")
