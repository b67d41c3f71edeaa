"""The documentation agrees with the code: its options and files exist, and every setting is documented."""

import re
from pathlib import Path

import pytest

from models.conversion.options import Convert
from models.training.recipe import Recipe
from service.bench.options import Bench
from service.commands.options import Classify, Evaluate, Profile, Quantize
from service.settings import Settings
from service.simulation.options import Simulate

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "service/README.md",
    "service/http/README.md",
    "service/inference_protocol/README.md",
    "service/rpc/README.md",
    "service/scheduling/README.md",
    "models/README.md",
    "deploy/README.md",
    "deploy/kubernetes/README.md",
    "deploy/ray/README.md",
    "tests/benchmarks/README.md",
    ".github/CONTRIBUTING.md",
)


def shell_lines(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_the_first_two_setup_commands_of_the_readme_run_the_server_and_the_tests() -> None:
    run, test = [line for line in shell_lines("README.md") if line.startswith("python3 -m venv")][:2]
    assert run.endswith("supervit serve")
    assert test.endswith("pytest -n 2")
    assert test in (ROOT / ".ci" / "run").read_text()


def test_every_setting_of_the_server_is_documented() -> None:
    page = (ROOT / "service" / "README.md").read_text()
    for name in Settings.model_fields:
        assert f"| `--{name.replace('_', '-')}` |" in page


def test_every_option_in_an_example_exists() -> None:
    known = {
        f"--{name.replace('_', '-')}"
        for command in (Settings, Classify, Convert, Evaluate, Quantize, Recipe, Profile, Simulate, Bench)
        for name in command.model_fields
    }
    lines = [line for page in PAGES for line in shell_lines(page)]
    examples = [line for line in lines if "supervit " in line or "service.cli" in line]
    used = {
        option
        for line in examples
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", re.split(r"supervit |service\.cli ", line, maxsplit=1)[1])
    }
    assert used
    assert used <= known


@pytest.mark.parametrize("page", PAGES)
def test_every_linked_file_exists(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_the_readme_has_at_most_250_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250
