"""A command of the shell made of a pydantic model, which stays the one place that says what an option means and may be.

Values come from the command line as text, and the model reads them. What is imported here is what help has to wait for.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args

import typer
from pydantic import BaseModel, ValidationError
from pydantic_settings import CliPositionalArg

from service.commands.completion import COMPLETIONS, one_of
from service.commands.registry import Command
from service.errors import WrongUsageError, first_problem

_, POSITIONAL = get_args(CliPositionalArg[str])
METAVARS = {"integer": "INT", "number": "NUMBER", "string": "TEXT", "path": "PATH", "enum": "NAME"}
KINDS = {"array": list[str], "boolean": bool}  # for Typer; all else is text
# As JSON Schema names them, in the order in which they are told.
BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
CONTEXT = {"help_option_names": ["--help", "-h"]}

Schema = dict[str, Any]


def make_command(name: str, command: Command) -> Any:  # noqa: ANN401 - Typer's own class of it is not public
    """Make what Typer parses and completes; what it then returns is the call that the words ask for."""
    model: type[BaseModel] = resolve_name(command.options)

    def read(**words: Any) -> Callable[[], int]:  # noqa: ANN401 - text, texts or a flag
        return partial(_call, command.run, read_options(name, model, words))

    parameters = list(_parameters(model, command.panels))
    read.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # where Typer looks
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", context_settings=CONTEXT)
    app.command(name, help=_plain(inspect.getdoc(model) or ""), epilog=_shown_examples(command.examples))(read)
    return typer.main.get_command(app)


def read_options(name: str, model: type[BaseModel], words: Mapping[str, Any]) -> BaseModel:
    """Make the options of a command; what was not given is left to the model.

    Raises:
        WrongUsageError: a value is out of its range, be it of the command or of the environment.
    """
    given = {option: value for option, value in words.items() if value is not None}
    for option, value in given.items():
        if isinstance(value, list) and not _is_positional(model, option):
            given[option] = [part for text in value for part in str(text).split(",")]  # or paths
    try:
        return model(**given)
    except ValidationError as error:
        path, what = first_problem(error.errors())
        raise WrongUsageError(f"{_place(name, model, path[0], given) if path else name}: {what}") from error


def _place(name: str, model: type[BaseModel], option: str, given: Mapping[str, Any]) -> str:
    if option not in given and (variable := _variable(model, option)):
        return f"{name}: {variable}"
    return f"{name} {option.upper() if _is_positional(model, option) else _flag(option)}"


def _parameters(model: type[BaseModel], panels: Mapping[str, str]) -> Iterator[inspect.Parameter]:
    """Describe each field of a model as Typer wants a parameter described: as optional text, whatever it is."""
    panel = None
    for name, schema in model.model_json_schema()["properties"].items():
        panel = panels.get(name, panel)
        is_required = model.model_fields[name].is_required()
        default = ... if is_required else None
        value = schema | schema.get("anyOf", [schema])[0]  # the other is null, which means that it is left out
        item = value.get("items") or value.get("prefixItems", [value])[0]
        about: dict[str, Any] = {
            "help": _plain(schema["description"]) + _notes(schema, item),
            "show_default": False,
            "autocompletion": COMPLETIONS.get(name) or (one_of(item["enum"]) if "enum" in item else None),
        }
        kind: Any = KINDS.get(value["type"], Path if _type(value) == "path" else str)
        if _is_positional(model, name):
            information = typer.Argument(default, metavar=name.upper(), **about)
        elif kind is bool:
            flags = f"{_flag(name)}/{_flag('no_' + name)}"
            information = typer.Option(default, flags, metavar=" ", rich_help_panel=panel, **about)
        else:
            metavar = METAVARS[_type(item)] + ",..." * (value["type"] == "array")
            information = typer.Option(default, _flag(name), metavar=metavar, rich_help_panel=panel, **about)
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=information, annotation=kind | None)


def _type(item: Schema) -> str:
    return "enum" if "enum" in item else str(item.get("format", item["type"]))


def _notes(schema: Schema, item: Schema) -> str:
    """Tell the choices, the bounds, and the default if it is one to be told."""
    default = schema.get("default")
    notes = ["|".join(item["enum"])] if "enum" in item else []
    notes += [f"{sign}{item[bound]:.10g}" for bound, sign in BOUNDS if bound in item]
    if default not in (None, "", []) and default is not False:  # 0 is one to be told
        values = default if isinstance(default, list) else [default]
        notes.append("default " + ",".join(f"{one:.10g}" if isinstance(one, float) else str(one) for one in values))
    return f" [dim]({_plain(', '.join(notes))})[/dim]" if notes else ""


def _shown_examples(examples: Mapping[str, str]) -> str:
    lines = [f"[dim]# {_plain(what)}[/dim]\n{_plain(line)}" for line, what in examples.items()]
    return "\n\n".join(["[bold]Examples[/bold]", *lines])


def _is_positional(model: type[BaseModel], option: str) -> bool:
    return POSITIONAL in model.model_fields[option].metadata


def _variable(model: type[BaseModel], option: str) -> str | None:
    """Name the variable of the environment that says what an option says, where the model reads the environment."""
    prefix = model.model_config.get("env_prefix")
    return f"{prefix}{option}".upper() if prefix else None


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _plain(text: str) -> str:
    """Keep Rich from taking brackets for its markup."""
    return text.replace("[", r"\[")


def _call(place: str, options: BaseModel) -> int:
    resolve_name(place)(options)
    return 0
