"""Builds a Typer command from a pydantic model, which remains the only definition of the options and their ranges.

Values come from the command line as text, and the model parses them. Help waits for every import of this module.
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
KINDS = {"array": list[str], "boolean": bool}  # annotations for Typer by JSON type; other values are text or paths
# JSON Schema's names of bounds, in the order in which help shows them.
BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
CONTEXT = {"help_option_names": ["--help", "-h"]}

Schema = dict[str, Any]


def make_command(name: str, command: Command) -> Any:  # noqa: ANN401 - Typer's class of commands is not public
    """Build the command that Typer parses and completes; invoking it returns a function that runs the command."""
    model: type[BaseModel] = resolve_name(command.options)

    def read(**words: Any) -> Callable[[], int]:  # noqa: ANN401 - text, texts or a flag
        return partial(_call, command.run, read_options(name, model, words))

    parameters = list(_parameters(model, command.panels))
    read.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # where Typer looks
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", context_settings=CONTEXT)
    app.command(name, help=_plain(inspect.getdoc(model) or ""), epilog=_shown_examples(command.examples))(read)
    return typer.main.get_command(app)


def read_options(name: str, model: type[BaseModel], words: Mapping[str, Any]) -> BaseModel:
    """Create the options of a command; options that were not given are left to the model.

    Raises:
        WrongUsageError: a value of the command line or of the environment is out of its range.
    """
    given = {option: value for option, value in words.items() if value is not None}
    for option, value in given.items():
        if isinstance(value, list) and not _is_positional(model, option):
            given[option] = [part for text in value for part in str(text).split(",")]  # an element may be a path
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
    """Yield a parameter for Typer for each field of a model: a text, a path or a flag, which the model then parses."""
    panel = None
    for name, schema in model.model_json_schema()["properties"].items():
        panel = panels.get(name, panel)
        is_required = model.model_fields[name].is_required()
        default = ... if is_required else None
        value = schema | schema.get("anyOf", [schema])[0]  # the other alternative is null: the option is left out
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
    """Format the choices, the bounds, and the default unless it is empty or False."""
    default = schema.get("default")
    notes = ["|".join(item["enum"])] if "enum" in item else []
    notes += [f"{sign}{item[bound]:.10g}" for bound, sign in BOUNDS if bound in item]
    if default not in (None, "", []) and default is not False:  # 0 is shown
        values = default if isinstance(default, list) else [default]
        notes.append("default " + ",".join(f"{one:.10g}" if isinstance(one, float) else str(one) for one in values))
    return f" [dim]({_plain(', '.join(notes))})[/dim]" if notes else ""


def _shown_examples(examples: Mapping[str, str]) -> str:
    lines = [f"[dim]# {_plain(what)}[/dim]\n{_plain(line)}" for line, what in examples.items()]
    return "\n\n".join(["[bold]Examples[/bold]", *lines])


def _is_positional(model: type[BaseModel], option: str) -> bool:
    return POSITIONAL in model.model_fields[option].metadata


def _variable(model: type[BaseModel], option: str) -> str | None:
    """Return the environment variable of an option, if the model reads the environment."""
    prefix = model.model_config.get("env_prefix")
    return f"{prefix}{option}".upper() if prefix else None


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _plain(text: str) -> str:
    """Escape brackets, which Rich would read as markup."""
    return text.replace("[", r"\[")


def _call(place: str, options: BaseModel) -> int:
    resolve_name(place)(options)
    return 0
