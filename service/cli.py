"""The `supervit` command: parses, calls, prints. Expected failures end in one line on stderr.

The modules of a command are imported once its arguments are parsed: help, completion and wrong usage do not wait for
torch.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version as version_of
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from models.errors import DataError, DeviceError
from models.files.checkpoint_errors import MESSAGE_CHARACTERS, CheckpointError, printable_text
from service.commands.registry import COMMANDS
from service.errors import CommandError, ServiceError, WrongUsageError

EXIT_CODES = """[bold]Exit codes[/bold]
  0    done
  1    failure; stderr gives the reason
  2    unknown command or option, or a value out of its range
  130  stopped by Ctrl-C

Help for a command: [bold]supervit COMMAND --help[/bold]"""
EXTRAS = {"aiohttp": "bench", "matplotlib": "train", "tqdm": "train"}  # the extra that installs each optional library


class Supervit(TyperGroup):
    """The group of commands; loads only the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:  # noqa: ANN401 - not public
        """Find the command that the arguments name, and load it."""
        name, _, rest = super().resolve_command(ctx, args)
        if name is None:  # a partial word that a shell asks to complete
            return None, None, rest
        from service.commands.command import make_command  # imports pydantic, which the list of commands does not need

        return name, make_command(name, COMMANDS[name]), rest


def _show_version(asked: bool) -> None:
    if asked:
        print(f"supervit {version_of('supervit-serve')}")
        raise typer.Exit


app = typer.Typer(cls=Supervit, rich_markup_mode="rich", context_settings={"help_option_names": ["--help", "-h"]})
for name, command in COMMANDS.items():
    app.command(name, help=command.summary)(lambda: None)  # a placeholder in the list of commands


@app.callback(epilog=EXIT_CODES)
def supervit(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Adaptive inference with one vision transformer that runs at many costs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        asked = parse(words or ["--help"])
        status = asked if isinstance(asked, int) else asked()
        sys.stdout.flush()  # while a full disk can still be reported
        return status if words else 2
    except WrongUsageError as error:
        return _fail(printable_text(error, MESSAGE_CHARACTERS), 2)
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would complain at exit
        return 1
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        with_extra = f"pip install '.[{EXTRAS[error.name]}]'"
        return _fail(f"{error.name} is not installed; install it with {with_extra}", 1)
    except (CommandError, CheckpointError, DataError, DeviceError, ServiceError) as error:
        return _fail(str(error), 1)
    except OSError as error:  # such as a full disk
        return _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part), 1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _fail("interrupted", 130)


def parse(words: Sequence[str]) -> Callable[[], int] | int:
    """Parse the arguments of `supervit`; return the call that they ask for, or the exit status if help was all of it.

    Raises:
        WrongUsageError: there is no such command or option, or a value is out of its range.
    """
    try:
        parsed: Callable[[], int] | int = typer.main.get_command(app).main(words, "supervit", standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message().rstrip(".")
        where = f"{words[0]}: " if words[0] in COMMANDS else ""
        raise WrongUsageError(f"{where}{message[:1].lower()}{message[1:]}") from error
    return parsed


def _fail(message: str, status: int) -> int:
    print(f"supervit: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
