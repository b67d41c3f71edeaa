from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from pydantic import BaseModel, Field, PositiveInt
from pydantic_settings import BaseSettings, CliPositionalArg, SettingsConfigDict

from service.commands.command import make_command
from service.commands.registry import Command
from service.errors import WrongUsageError

BAKED = list[BaseModel]()


class Bake(BaseModel):
    """Bake a cake [of any kind]."""

    flour: CliPositionalArg[list[Path]] = Field(description="sacks of it")
    layer_sizes: tuple[PositiveInt, ...] = Field((20,), description="of each")
    eggs: int = Field(3, ge=1, le=12, description="how many [fresh] ones")
    oven: Literal["gas", "electric"] = Field("gas", description="of which kind")
    glaze: bool = Field(True, description="with sugar")
    cherry_weight: float | None = Field(None, gt=0, description="in grams")
    recipe: str = Field(description="after whom")


class Kitchen(BaseSettings):
    """Options that environment variables set, too."""

    model_config = SettingsConfigDict(env_prefix="KITCHEN_")

    size: int = Field(10, ge=1, description="in square metres")


def command(model: type[BaseModel]) -> Any:  # noqa: ANN401 - Typer's class of commands is not public
    run = f"{__name__}:BAKED.append"
    examples = {"bake --eggs 2 [sack]": "two [2] eggs"}
    return make_command("bake", Command("Bake.", f"{__name__}:{model.__name__}", run, examples, {"oven": "Heat"}))


def read(words: str, model: type[BaseModel] = Bake) -> BaseModel:
    command(model).main(words.split(), "bake", standalone_mode=False)()
    return BAKED.pop()


def shown_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "140")
    assert command(Bake).main(["--help"], "bake", standalone_mode=False) == 0
    return capsys.readouterr().out


def test_command_line_arguments_become_the_options_of_the_model() -> None:
    words = "one two --layer-sizes 30,20 --layer-sizes 10 --oven electric --no-glaze --cherry-weight=2.5 --recipe Anna"
    assert read(words) == Bake(
        flour=[Path("one"), Path("two")],
        layer_sizes=(30, 20, 10),
        oven="electric",
        glaze=False,
        cherry_weight=2.5,
        recipe="Anna",
    )


def test_options_that_are_not_given_are_left_to_the_model() -> None:
    assert read("one --recipe Anna").model_fields_set == {"flour", "recipe"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("one --recipe Anna --eggs 13", "bake --eggs: must be at most 12"),
        ("one --recipe Anna --eggs x", "bake --eggs: must be an integer"),
        ("one --recipe Anna --layer-sizes 8,0", "bake --layer-sizes: must be greater than 0"),
        ("one --recipe Anna --oven coal", "bake --oven: must be 'gas' or 'electric'"),
    ],
)
def test_a_value_that_the_model_rejects_is_a_usage_error(words: str, message: str) -> None:
    with pytest.raises(WrongUsageError) as caught:
        read(words)
    assert str(caught.value) == message


@pytest.mark.parametrize("words", ["--recipe Anna", "one", "one --recipe", "one --recipe Anna --spoons 2"])
def test_missing_and_unknown_options_are_rejected_before_the_model_validates(words: str) -> None:
    with pytest.raises(typer.TyperException) as caught:
        read(words)
    assert caught.value.exit_code == 2


def test_a_value_from_the_environment_is_read_and_an_error_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITCHEN_SIZE", "12")
    assert read("", Kitchen) == Kitchen(size=12)
    assert read("--size 14", Kitchen) == Kitchen(size=14)
    monkeypatch.setenv("KITCHEN_SIZE", "0")
    with pytest.raises(WrongUsageError) as caught:
        read("", Kitchen)
    assert str(caught.value) == "bake: KITCHEN_SIZE: must be at least 1"


def test_help_shows_the_descriptions_bounds_and_defaults_of_the_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = shown_help(capsys, monkeypatch)
    assert "Bake a cake [of any kind]." in shown
    assert "how many [fresh] ones (>=1, <=12, default 3)" in shown
    assert "of which kind (gas|electric, default gas)" in shown
    assert "in grams (>0)" in shown
    assert "of each (>0, default 20)" in shown
    assert "--no-glaze" in shown
    assert shown.index("─ Options ─") < shown.index("--eggs") < shown.index("─ Heat ─") < shown.index("--oven")


def test_help_ends_with_examples(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    last = [line.strip() for line in shown_help(capsys, monkeypatch).strip().splitlines()][-4:]
    assert last == ["Examples", "", "# two [2] eggs", "bake --eggs 2 [sack]"]
