import re
import shlex
from pkgutil import resolve_name

import pytest
from pydantic import BaseModel

from service.cli import parse
from service.commands.registry import COMMANDS, Command

EXAMPLES = [(name, example) for name, command in COMMANDS.items() for example in command.examples]


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_every_example_parses(name: str, example: str) -> None:
    (words,) = [part for part in re.split(r"[|>]", example) if "supervit" in part]
    while "=" in (word := shlex.split(words)[0]):
        words = words.removeprefix(word).lstrip()
    assert shlex.split(words)[:2] == ["supervit", name]
    assert callable(parse(shlex.split(words)[1:]))


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_every_example_and_its_description_fit_on_a_line(name: str, example: str) -> None:
    assert len(example) <= 78
    assert len(f"# {COMMANDS[name].examples[example]}") <= 78


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_has_two_to_five_examples_and_an_existing_function(command: Command) -> None:
    assert 2 <= len(command.examples) <= 5
    assert callable(resolve_name(command.run))


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_option_has_a_description_and_every_panel_begins_with_an_option(command: Command) -> None:
    model: type[BaseModel] = resolve_name(command.options)
    assert all(field.description for field in model.model_fields.values())
    assert set(command.panels) <= set(model.model_fields)
    assert model.__doc__
