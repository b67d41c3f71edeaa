"""The `supervit` command: parses, calls, prints. What can be expected to go wrong ends in one line on stderr."""

import asyncio
import importlib
import json
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import uvicorn
from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings, CliPositionalArg, CliSubCommand, SettingsConfigDict, get_subcommand

from models.checkpoint import CheckpointError, Header, load_checkpoint, save_checkpoint
from models.data import DataError
from models.devices import DeviceError
from models.evaluate import accuracy_table, evaluate
from models.recipe import Recipe
from service.app import create_app
from service.settings import Settings, unknown_variables

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 60
READINESS_POLL_S = 0.01


class CommandError(Exception):
    """A command cannot do what it was asked; the message says why."""


class RefusedError(Exception):
    """The server refused a photo; the message is the server's."""


class Classify(BaseModel):
    """Classify photographs, in this process or by a running server."""

    photos: CliPositionalArg[list[Path]] = Field(description="image files", min_length=1)
    budget_gflops: float | None = Field(None, gt=0, description="most that each may cost, in 1e9 multiply-accumulates")
    top_k: int = Field(5, ge=1, description="predictions to show")
    url: str | None = Field(
        None, min_length=1, description="server to ask, e.g. http://127.0.0.1:8000; this process by default"
    )
    checkpoint: Path | None = Field(
        None, description="SuperViT checkpoint to use in this process; by default the one that `serve` would take"
    )
    json_lines: bool = Field(False, description="print the whole answer as a line of JSON per photo")


class Evaluate(BaseModel):
    """Measure top-1 and top-5 of every sub-network and write them into the checkpoint's profile."""

    checkpoint: CliPositionalArg[Path] = Field(description="SuperViT checkpoint; ours or a published one")
    data: CliPositionalArg[Path] = Field(description="folder with val/ or else test/, of class folders")
    batch_size: int = Field(100, ge=1, description="images per batch")
    workers: int = Field(2, ge=0, description="processes that decode images")
    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto")


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
    evaluate: CliSubCommand[Evaluate] = Field(description="measure every sub-network of a checkpoint")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 for what went wrong, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        command = get_subcommand(Supervit(_cli_parse_args=sys.argv[1:] if arguments is None else arguments))
    except ValidationError as error:
        return _fail(_first_problem(error), 2)
    try:
        match command:
            case Settings():
                serve(command)
            case Classify():
                classify(command)
            case Recipe():
                train(command)
            case Evaluate():
                evaluate_checkpoint(command)
    except BrokenPipeError:  # whoever read our output has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would complain at its exit
        return 1
    except (CommandError, CheckpointError, DataError, DeviceError, OSError) as error:  # the last: a full disk
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _fail("interrupted", 130)
    return 0


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C; those admitted are answered before the server leaves."""
    failed = threading.Event()

    def stop() -> None:
        failed.set()
        server.should_exit = True

    app = create_app(settings, load_checkpoint(settings.checkpoint), on_failure=stop)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in unknown_variables():
        logger.warning("the environment variable %s is no setting of this server", name)
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, log_config=None, log_level=settings.log_level, server_header=False
    )
    server = uvicorn.Server(config)
    server.run()
    if failed.is_set():
        raise CommandError("the model cannot run; the log says why")
    if not server.started:
        raise CommandError(f"{settings.host} port {settings.port} cannot be listened on")


def classify(command: Classify) -> None:
    """Print the answer for each photo; the same route answers in this process and on a server."""
    failed = asyncio.run(_classify_all(command))
    if failed:
        raise CommandError(f"{failed} of {len(command.photos)} photos could not be classified")


async def _classify_all(command: Classify) -> int:
    query = {"top_k": command.top_k, "budget_gflops": command.budget_gflops}
    query = {name: value for name, value in query.items() if value is not None}
    failed = 0
    connection = _in_process(command.checkpoint) if command.url is None else _connect(command.url)
    async with connection as client:
        for photo in command.photos:
            try:
                answer = await _ask(client, photo, query)
            except (RefusedError, OSError) as error:
                failed += 1
                print(f"supervit: {photo}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
                continue
            print(json.dumps({"photo": str(photo)} | answer) if command.json_lines else _show(photo, answer))
    return failed


@asynccontextmanager
async def _in_process(checkpoint: Path | None) -> AsyncIterator[httpx.AsyncClient]:
    """Start the service in this process, and yield a client of it once it is ready."""
    try:
        settings = Settings() if checkpoint is None else Settings(checkpoint=checkpoint)
    except ValidationError as error:
        raise CommandError(f"a SUPERVIT_ variable of the environment: {_first_problem(error)}") from error
    failed = asyncio.Event()
    app = create_app(settings, load_checkpoint(settings.checkpoint), on_failure=failed.set)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(base_url="http://in-process", transport=httpx.ASGITransport(app)) as client,
    ):
        while (await client.get("/health/ready")).status_code != HTTPStatus.OK:
            if failed.is_set():
                raise CommandError("the model cannot run")
            await asyncio.sleep(READINESS_POLL_S)
        yield client


@asynccontextmanager
async def _connect(url: str) -> AsyncIterator[httpx.AsyncClient]:
    try:
        client = httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S)
    except httpx.InvalidURL as error:
        raise CommandError(f"{url} is no URL: {error}") from error
    async with client:
        yield client


async def _ask(client: httpx.AsyncClient, photo: Path, query: dict[str, Any]) -> dict[str, Any]:
    data = await asyncio.to_thread(photo.read_bytes)
    try:
        response = await client.post("/classify", params=query, content=data)
        answer: dict[str, Any] = response.json()
        if response.status_code != HTTPStatus.OK:
            raise RefusedError(answer["error"]["message"])
    except (httpx.WriteError, httpx.ReadError) as error:  # a server may refuse by closing; the next photo may pass
        raise RefusedError("the server closed the connection, as it does on files larger than it reads") from error
    except (httpx.HTTPError, json.JSONDecodeError, LookupError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise CommandError(f"{client.base_url} does not answer as a SuperViT server does: {reason}") from error
    return answer


def train(recipe: Recipe) -> None:
    """Train, or go on with a training, and say where the checkpoint is."""
    training = _import_extra("models.train")
    try:
        path = training.train(recipe)
    except training.TrainingError as error:
        raise CommandError(str(error)) from error
    print(f"{path}: measure it with `supervit evaluate {path} {recipe.data}`")


def evaluate_checkpoint(command: Evaluate) -> None:
    """Measure, print the table, write the accuracies into the checkpoint and draw the frontier beside it.

    A file of another format is left as it is: a copy in our own format, beside it, gets the accuracies.
    """
    plots, tqdm = _import_extra("models.plots"), _import_extra("tqdm").tqdm
    checkpoint = load_checkpoint(command.checkpoint)
    path = command.checkpoint
    if path.suffix != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")
        if path.exists():
            raise CommandError(f"{path}: would be overwritten")
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"{path.parent}: is not writable")
    profile = evaluate(
        checkpoint,
        command.data,
        batch_size=command.batch_size,
        workers=command.workers,
        device=command.device,
        progress=partial(tqdm, desc="evaluating", mininterval=1),
    )
    header = Header(checkpoint.name, checkpoint.config, checkpoint.class_names, profile)
    picture = path.with_suffix(".png")
    print(accuracy_table(profile))
    save_checkpoint(path, checkpoint.model, header)
    plots.plot_frontier(profile, checkpoint.name, picture)
    print(f"written into {path}, drawn in {picture}")


def _import_extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: pip install 'supervit-serve[train]'"
        raise CommandError(message) from error


def _show(photo: Path, answer: dict[str, Any]) -> str:
    best = "\n".join(f"  {entry['probability']:6.1%}  {entry['label']}" for entry in answer["predictions"])
    milliseconds = answer["timing_ms"]["total"]
    return f"{photo}\n{best}\n  {answer['decision']['reason']} ({milliseconds:.1f} ms)"


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{' '.join(str(part).replace('_', '-') for part in problem['loc'])}: {problem['msg']}"


def _fail(message: str, status: int) -> int:
    print(f"supervit: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
