"""The `supervit` command: parses, calls, prints. What can be expected to go wrong ends in one line on stderr.

What one command alone needs is imported when it runs: timm takes as long as PyTorch, and `serve` should start soon.
"""

import importlib
import json
import os
import statistics
import sys
from argparse import ArgumentParser, Namespace
from functools import partial
from types import ModuleType

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    CliSubCommand,
    SettingsConfigDict,
    SettingsError,
    get_subcommand,
)

from models.checkpoint import Checkpoint, CheckpointError, Header, load_checkpoint, round_to_half, save_checkpoint
from models.conversion.options import Convert
from models.data.datasets import DataError
from models.devices import DeviceError
from models.files.sources import find_checkpoint
from models.processes import joined_processes
from models.profiles import ProfileTable
from models.training.recipe import Recipe
from service.bench.options import Bench
from service.command_options import Evaluate, Profile, Quantize, file_to_write
from service.commands.classify import Classify, classify, first_problem, make_settings
from service.engines.factory import engine_threads, open_engine
from service.engines.profile_store import extended_profile, measure_latencies
from service.engines.profiler import Measurement
from service.errors import CommandError, ServiceError
from service.hosting.serve import serve
from service.machine.monitor import Monitor
from service.settings import Settings
from service.simulation.report import Simulate, simulate


class Supervit(BaseSettings):
    """Adaptive inference with one vision transformer that runs at many costs."""

    model_config = SettingsConfigDict(
        env_prefix="SUPERVIT_COMMAND_",
        cli_prog_name="supervit",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    serve: CliSubCommand[Settings] = Field(description="serve a checkpoint over HTTP")
    classify: CliSubCommand[Classify] = Field(description="classify photographs")
    train: CliSubCommand[Recipe] = Field(description="train a checkpoint on a folder of images")
    convert: CliSubCommand[Convert] = Field(description="make a SuperViT of a plain ViT, without training")
    evaluate: CliSubCommand[Evaluate] = Field(description="measure every sub-network of a checkpoint")
    quantize: CliSubCommand[Quantize] = Field(description="prepare a checkpoint for CPUs that are fastest in 8 bits")
    profile: CliSubCommand[Profile] = Field(description="measure the latency of every sub-network on this machine")
    simulate: CliSubCommand[Simulate] = Field(description="replay traffic against this machine's profile")
    bench: CliSubCommand[Bench] = Field(description="send a server traffic and measure how it does")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 for what went wrong, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
    except ValidationError as error:
        return _fail(first_problem(error), 2)
    except SettingsError as error:  # a list that is none, as '[4'
        return _fail(str(error), 2)
    try:
        match command:
            case Settings():
                serve(command)
            case Classify():
                classify(command)
            case Recipe():
                train(command)
            case Convert():
                convert_vit(command)
            case Evaluate():
                evaluate_checkpoint(command)
            case Quantize():
                from service.quantize import quantize

                quantize(command)
            case Profile():
                profile(command)
            case Simulate():
                replay(command)
            case Bench():
                send_load(command)
    except BrokenPipeError:  # the reader of our output has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would complain at its exit
        return 1
    except (
        CommandError,
        CheckpointError,
        DataError,
        DeviceError,
        ServiceError,
        OSError,
    ) as error:  # the last: a full disk
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _fail("interrupted", 130)
    return 0


def parse(arguments: list[str]) -> object:
    """Make the options of one command, each of its own class, of the words after `supervit`.

    Raises:
        SystemExit: there is no such command or option.
        SettingsError: a list is none.
        ValidationError: a value is out of its range.
    """

    def read(parser: ArgumentParser, arguments: list[str]) -> Namespace:
        namespace = parser.parse_args(arguments)
        for name, value in vars(namespace).items():
            if name.endswith("photos") and value:
                # File names, whatever they hold: as a list of JSON, or commas and quotes would part or end them.
                setattr(namespace, name, json.dumps(value))
        return namespace

    source = CliSettingsSource[Supervit](Supervit, cli_parse_args=arguments, parse_args_method=read)
    return get_subcommand(Supervit(_cli_settings_source=source))


def train(recipe: Recipe) -> None:
    """Train, or go on with a training, and say where the checkpoint is."""
    training = _import_extra("models.training.train")
    try:
        path = training.train(recipe)
    except training.TrainingError as error:
        raise CommandError(str(error)) from error
    print(f"{path}: measure it with `supervit evaluate {path} {recipe.data}`")


def convert_vit(command: Convert) -> None:
    """Convert, and say what images the result takes and what is to be done next."""
    from models.conversion.convert import convert

    config = convert(command)
    profile = ProfileTable.unmeasured(config)
    told = command.mean or command.name or not command.vit.exists()
    print(
        f"{command.output}: {len(profile.rows)} sub-networks of {profile.cheapest.gflops:.3g} to "
        f"{profile.rows[-1].gflops:.3g} GFLOPs, for images normalised by mean {config.mean} and std {config.std}"
        + ("" if told else " (ImageNet's, unless the file says otherwise: give --name, or --mean and --std)")
    )
    if config.num_classes == 1:
        print(f"it came without a head: give it one with `supervit train DATA --init {command.output}`")
    else:
        print(f"measure it with `supervit evaluate {command.output} DATA`")


def evaluate_checkpoint(command: Evaluate) -> None:
    """Measure, print the table, write the accuracies into the checkpoint and draw the frontier beside it.

    A file of another format is left as it is: a copy in our own format, beside it, gets the accuracies. Of a checkpoint
    that is named, not given as a path, the copy is written into the current folder.
    """
    from models.evaluation.evaluate import evaluate
    from models.evaluation.tables import accuracy_table, calibration_summary, cascade_table

    plots, tqdm = _import_extra("models.evaluation.plots"), _import_extra("tqdm").tqdm
    source = find_checkpoint(command.checkpoint)
    checkpoint = load_checkpoint(source)
    path = file_to_write(command.checkpoint, source, is_ours=checkpoint.is_ours)
    is_half = checkpoint.is_half or command.half
    if is_half:
        round_to_half(checkpoint.model)
    with joined_processes(command.device) as process:
        found = evaluate(
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
    # Other weights are other ones in 8 bits, too.
    int8 = None if command.half and not checkpoint.is_half else checkpoint.int8
    header = Header(checkpoint.name, checkpoint.config, checkpoint.class_names, found.profile, int8)
    picture = path.with_suffix(".png")
    print(accuracy_table(found.profile))
    print(cascade_table(found.profile))
    print(calibration_summary(found.profile))
    print(found.basis)
    save_checkpoint(path, checkpoint.model, header, half=is_half)
    plots.plot_frontier(found.profile, checkpoint.name, picture)
    if int8 is None and checkpoint.int8 is not None:
        print("its weights were rounded, so it is no longer prepared for int8: `supervit quantize` does that anew")
    print(f"written into {path}, drawn in {picture}")


def profile(command: Profile) -> None:
    """Print the latencies of this machine, measured now or before, and draw them."""
    plots = _import_extra("models.evaluation.plots") if command.plot_file else None
    given = command.model_dump(exclude={"fresh", "plot_file"}, exclude_none=True)
    settings = make_settings(**given)
    measurement, _ = _measure(settings, load_checkpoint(settings.checkpoint), fresh=command.fresh)
    print(_latency_table(measurement))
    if plots and command.plot_file:
        plots.plot_latency(measurement.table, command.plot_file)
        print(f"drawn in {command.plot_file}")


def _latency_table(measurement: Measurement) -> str:
    table = measurement.table
    head = f"{'ms per batch of':28s}" + "".join(f"{size:9d}" for size in table.batch_sizes)
    rows = [
        f"{subnetwork!s:28s}" + "".join(f"{1000 * seconds:9.2f}" for seconds in table.seconds[subnetwork])
        for subnetwork in sorted(table.seconds)
    ]
    spread = statistics.median(share for shares in measurement.spread.values() for share in shares)
    return "\n".join([head, *rows, f"measured {measurement.measured_at}, median spread {spread:.1%}"])


def replay(command: Simulate) -> None:
    """Print what would become of traffic on this machine."""
    if command.plot_file:
        _import_extra("models.evaluation.plots")
    settings = make_settings(**command.model_dump(include={"checkpoint", "max_batch_size"}, exclude_none=True))
    checkpoint = load_checkpoint(settings.checkpoint)
    measurement, served = _measure(settings, checkpoint)
    print(simulate(command, extended_profile(served), measurement.table))


def send_load(command: Bench) -> None:
    """Print how a server does under traffic."""
    if command.plot_file:
        _import_extra("models.evaluation.plots", "bench")
    _import_extra("service.commands.bench", "bench").bench(command)


def _measure(settings: Settings, checkpoint: Checkpoint, *, fresh: bool = False) -> tuple[Measurement, Checkpoint]:
    """Return the latencies, and the checkpoint with the profile of the precision that they are of."""
    threads = settings.threads or engine_threads(checkpoint, Monitor().latest.cores)
    engine, served = open_engine(checkpoint, settings.engine, settings.device, settings.precision, threads)
    folder, most = settings.profile_folder, settings.max_batch_size
    measured = measure_latencies(served, engine.describe(), engine.run, folder=folder, max_batch_size=most, fresh=fresh)
    return measured, served


def _import_extra(module: str, extra: str = "train") -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: install this project with its extra, pip install '.[{extra}]'"
        raise CommandError(message) from error


def _fail(message: str, status: int) -> int:
    print(f"supervit: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
