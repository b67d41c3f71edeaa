"""The `supervit` command: parses, calls, prints. What can be expected to go wrong ends in one line on stderr."""

import asyncio
import importlib
import json
import logging
import sys
from contextlib import AsyncExitStack
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
from models.evaluate import accuracy_table, evaluate
from models.recipe import Recipe
from service.app import create_app
from service.settings import DEFAULT_CHECKPOINT, Settings

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
    url: str | None = Field(None, description="server to ask, e.g. http://127.0.0.1:8000; this process by default")
    checkpoint: Path = Field(DEFAULT_CHECKPOINT, description="SuperViT checkpoint to use in this process")
    json_lines: bool = Field(False, description="print the whole answer as a line of JSON per photo")


class Evaluate(BaseModel):
    """Measure top-1 and top-5 of every sub-network and write them into the checkpoint's profile."""

    checkpoint: CliPositionalArg[Path] = Field(description="SuperViT checkpoint; ours or a published one")
    data: CliPositionalArg[Path] = Field(description="folder with val/ or else test/, of class folders")
    batch_size: int = Field(100, ge=1, description="images per batch")
    workers: int = Field(2, ge=0, description="processes that decode images")
    device: str = Field("cpu", description="cpu, cuda or cuda:1")


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

    serve: CliSubCommand[Settings]
    classify: CliSubCommand[Classify]
    train: CliSubCommand[Recipe]
    evaluate: CliSubCommand[Evaluate]


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
    except (CommandError, CheckpointError, DataError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _fail("interrupted", 130)
    return 0


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C; those admitted are answered before the server leaves."""
    checkpoint = load_checkpoint(settings.checkpoint)
    try:
        app = create_app(settings, checkpoint)
    except ValueError as error:
        raise CommandError(str(error)) from error
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    uvicorn.run(
        app, host=settings.host, port=settings.port, log_config=None, log_level=settings.log_level, server_header=False
    )


def classify(command: Classify) -> None:
    """Print the answer for each photo; the same route answers in this process and on a server."""
    failed = asyncio.run(_classify_all(command))
    if failed:
        raise CommandError(f"{failed} of {len(command.photos)} photos could not be classified")


async def _classify_all(command: Classify) -> int:
    query = {"top_k": command.top_k, "budget_gflops": command.budget_gflops}
    query = {name: value for name, value in query.items() if value is not None}
    failed = 0
    async with AsyncExitStack() as stack:
        transport = None
        if command.url is None:
            app = create_app(Settings(checkpoint=command.checkpoint), load_checkpoint(command.checkpoint))
            await stack.enter_async_context(app.router.lifespan_context(app))
            transport = httpx.ASGITransport(app)
        base_url = command.url or "http://in-process"
        client = httpx.AsyncClient(base_url=base_url, transport=transport, timeout=REQUEST_TIMEOUT_S)
        await stack.enter_async_context(client)
        if command.url is None:
            while (await client.get("/health/ready")).status_code != HTTPStatus.OK:  # noqa: ASYNC110 - asked over HTTP
                await asyncio.sleep(READINESS_POLL_S)
        for photo in command.photos:
            try:
                answer = await _ask(client, photo, query)
            except (RefusedError, OSError) as error:
                failed += 1
                print(f"supervit: {photo}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
                continue
            print(json.dumps({"photo": str(photo)} | answer) if command.json_lines else _show(photo, answer))
    return failed


async def _ask(client: httpx.AsyncClient, photo: Path, query: dict[str, Any]) -> dict[str, Any]:
    data = await asyncio.to_thread(photo.read_bytes)
    try:
        response = await client.post("/classify", params=query, content=data)
        answer: dict[str, Any] = response.json()
        if response.status_code != HTTPStatus.OK:
            raise RefusedError(answer["error"]["message"])
    except (httpx.HTTPError, json.JSONDecodeError, LookupError, TypeError) as error:
        raise CommandError(f"{client.base_url} does not answer as a SuperViT server does: {error}") from error
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
    """Measure, print the table, write the accuracies into the checkpoint and draw the frontier beside it."""
    plots, tqdm = _import_extra("models.plots"), _import_extra("tqdm").tqdm
    checkpoint = load_checkpoint(command.checkpoint)
    profile = evaluate(
        checkpoint,
        command.data,
        batch_size=command.batch_size,
        workers=command.workers,
        device=command.device,
        progress=partial(tqdm, desc="evaluating", mininterval=1),
    )
    header = Header(checkpoint.name, checkpoint.config, checkpoint.class_names, profile)
    path, picture = (command.checkpoint.with_suffix(suffix) for suffix in (".safetensors", ".png"))
    save_checkpoint(path, checkpoint.model, header)
    plots.plot_frontier(profile, checkpoint.name, picture)
    print(f"{accuracy_table(profile)}\nwritten into {path}, drawn in {picture}")


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
    command, *option = (str(part) for part in problem["loc"])
    return f"{command} {'.'.join(option).replace('_', '-')}: {problem['msg']}"


def _fail(message: str, status: int) -> int:
    print(f"supervit: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
