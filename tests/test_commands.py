"""Every command of the documentation parses, names files that exist, and is run by a test or listed with a reason."""

import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_settings import CliApp

from models.training.average import Average
from models.training.finetune import Finetune
from service.cli import main, parse
from service.errors import WrongUsageError

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(page.relative_to(ROOT))
    for folder in (".", ".github", "service", "models", "deploy", "tests")
    for page in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
    if page.name != "CHANGELOG.md" and ".venv" not in page.parts
)
PROGRAMS = {
    "curl",
    "docker",
    "kubectl",
    "pip",
    "pre-commit",
    "promtool",
    "python",
    "ray",
    "serve",
    "supervit",
    "torchrun",
}
MODULES: dict[str, type[BaseModel]] = {"models.training.average": Average, "models.training.finetune": Finetune}
PLACEHOLDERS = {"N": "2"}

# Beginnings of commands, and the tests that run these commands.
RUN = {
    "supervit classify *.jpg --budget-gflops": "tests/test_commands.py::test_the_photographs_are_known",
    "python -m tests.benchmarks.bench_paradigm": "tests/benchmarks/test_bench_paradigm.py::"
    "test_arms_are_trained_measured_and_laid_out",
    "set -a; . deploy/ray/environment": "tests/test_commands.py::test_the_environment_of_ray_is_read_by_a_shell",
    "curl ": "tests/end_to_end/test_serving.py::test_the_curl_commands_of_the_readme_are_answered",
    "cd models/checkpoints/photographs": "tests/end_to_end/test_serving.py::"
    "test_the_curl_commands_of_the_readme_are_answered",
    "supervit classify *.jpg --url": "tests/end_to_end/test_serving.py::"
    "test_the_command_gives_the_same_answer_alone_as_from_a_server",
    "supervit classify photos": "tests/service/commands/test_classify.py::"
    "test_a_folder_stands_for_the_images_in_it_and_its_subfolders_in_order",
    "supervit classify cat.jpg": "tests/service/commands/test_classify.py::"
    "test_explain_writes_a_drawing_and_shows_the_answer",
    "supervit key NAME": "tests/service/commands/test_key.py::"
    "test_the_secret_goes_to_stderr_and_an_entry_for_the_key_file_to_stdout",
    "supervit bench http://127.0.0.1:8000": "tests/end_to_end/test_serving.py::"
    "test_a_benchmark_reports_the_outcome_of_its_requests",
    "supervit classify frog.jpg --checkpoint supervit-micro-cifar10": "tests/service/commands/test_classify.py::"
    "test_classify_finds_a_shipped_checkpoint_by_name",
    "export OTEL_": "tests/end_to_end/test_tracing.py::"
    "test_every_request_is_exported_as_a_span_with_a_child_for_each_stage",
    "promtool test rules": "tests/deploy/test_prometheus.py::"
    "test_promtool_accepts_the_configuration_and_the_rules_and_their_tests_pass",
    "ray start": "tests/deploy/test_ray.py::test_the_app_on_ray_answers_and_rejects_like_the_server",
    "serve deploy": "tests/deploy/test_ray.py::test_the_app_on_ray_answers_and_rejects_like_the_server",
}
# Beginnings of the other commands, and the reasons why no test runs these.
NOT_RUN = {
    ". .venv/bin/activate": "changes the reader's shell alone",
    "python3 -m venv": "installs 2 GB of packages; .ci/run does",
    ".venv/bin/ruff": "is the other half of .ci/run",
    "pre-commit install": "changes the reader's checkout",
    "pip ": "downloads packages",
    "supervit serve": "serves until it is told to stop, as in tests/end_to_end",
    "supervit train": "takes hours, on images of the reader's; tests/models/training trains small models",
    "torchrun": "takes hours, on images of the reader's; tests/models/training starts two processes",
    "supervit convert": "needs weights of the reader's; tests/models/conversion makes some",
    "supervit evaluate": "takes minutes to hours, on images of the reader's; tests/service/commands/test_evaluate.py",
    "supervit quantize": "takes minutes to hours, on images of the reader's; tests/service/commands/test_quantize.py",
    "supervit profile": "measures this machine for minutes; tests/service/engines/test_profiler.py",
    "supervit bench http://127.0.0.1:8001": "needs another server; tests/service/commands/test_bench.py fakes one",
    "supervit simulate": "measures this machine for minutes first; tests/service/commands/test_simulate.py",
    "python -m models.training.": "needs the weights of a training of hours; tests/models/training",
    "python -m tests.benchmarks.": "takes minutes to hours of a machine that does nothing else",
    "python -m tests.gpu.gpu_check": "needs a GPU; tests/gpu/test_gpu_check.py runs what needs none",
    "cp runs/": "copies what a training of hours has made",
    "docker ": "needs Docker; tests/deploy/test_container.py and test_compose.py read its files",
    "kubectl ": "needs a cluster; tests/deploy/test_kubernetes.py renders and checks the manifests",
}


def blocks(page: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(page: str) -> Iterator[str]:
    """Yield the commands in a page's code blocks, with variables substituted, and inline commands with arguments."""
    for block in blocks(page):
        variables: dict[str, str] = {}
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if assigned := re.fullmatch(r"(\w+)=\"(.*)\"", line):
                variables[assigned[1]] = assigned[2]
            elif command := re.sub(r"(^|\s+)# .*", "", line):
                yield re.sub(r"\$(\w+)", lambda name: variables[name[1]], command)  # noqa: B023 - called at once
    sentences = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for quoted in re.findall(r"`([^`]+)`", sentences):
        words = quoted.split()
        is_name = words[:1] in (["supervit"], ["docker"], ["python"]) and len(words) == 2 + ("-m" in words)
        if words and words[0] in PROGRAMS and len(words) > 1 and not is_name:
            yield " ".join(words)


def every_command() -> list[tuple[str, str]]:
    return sorted({(page, command) for page in PAGES for command in commands(page)})


def own_arguments(command: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each module of ours that a command line runs, with its arguments."""
    for part in command.split(" && "):
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(part)]
        if words[0].removeprefix(".venv/bin/") == "supervit":
            yield "service.cli", words[1:]
        elif words[0] in ("python", "torchrun") and "-m" in words:
            place = words.index("-m") + 1
            further = words.index("--serve") if "--serve" in words else len(words)
            yield words[place], words[place + 1 : further]
            if further < len(words):  # options that the benchmark passes to the server
                yield "service.cli", ["serve", *words[further + 1 :]]


@pytest.mark.parametrize(("page", "command"), every_command())
def test_every_command_is_run_by_a_test_or_listed_with_a_reason_why_not(page: str, command: str) -> None:
    del page
    assert [start for start in (*RUN, *NOT_RUN) if command.startswith(start)]


def test_every_listed_command_occurs_in_the_documentation() -> None:
    known = [command for _, command in every_command()]
    assert [start for start in (*RUN, *NOT_RUN) if not any(command.startswith(start) for command in known)] == []


@pytest.mark.parametrize("test", sorted(set(RUN.values())))
def test_every_test_that_is_listed_for_a_command_exists(test: str) -> None:
    path, _, name = test.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text()


@pytest.mark.parametrize(("page", "command"), every_command())
def test_our_own_commands_parse_as_written(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    del page
    monkeypatch.chdir(ROOT)
    for module, arguments in own_arguments(command):
        if module == "service.cli":
            parse(arguments)
        elif module in MODULES:
            CliApp.run(MODULES[module], cli_args=arguments)
        else:
            source = Path(str(importlib.import_module(module).__file__)).read_text()
            for option in (argument for argument in arguments if argument.startswith("--")):
                assert f'"{option}"' in source


@pytest.mark.parametrize("arguments", [["serve", "--bogus"], ["train", "photos", "--epochs", "0"], ["classify"]])
def test_a_command_with_wrong_arguments_fails_to_parse(arguments: list[str]) -> None:
    with pytest.raises(WrongUsageError):
        parse(arguments)


@pytest.mark.parametrize(("page", "command"), every_command())
def test_every_file_of_the_repository_that_a_command_names_exists(page: str, command: str) -> None:
    del page
    for word in re.split(r"[\s=;@]+", command):
        if re.match(r"(deploy|models|service|tests)/", word):
            assert list(ROOT.glob(word)), word


def test_the_photographs_are_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the command of the README, with its defaults."""
    monkeypatch.chdir(ROOT / "models/checkpoints/photographs")
    (command,) = (command for command in commands("README.md") if "classify *.jpg --budget-gflops" in command)
    words = [found for word in shlex.split(command) for found in sorted(map(str, Path().glob(word))) or [word]]
    assert main(words[1:]) == 0
    shown = capsys.readouterr().out
    for photograph in (word for word in words if word.endswith(".jpg")):
        assert re.search(rf"{photograph}\n\s+\d+\.\d%  {Path(photograph).stem.rstrip('0123456789')}", shown), photograph


def test_the_environment_of_ray_is_read_by_a_shell() -> None:
    (command,) = (command for command in commands("deploy/ray/README.md") if "set -a" in command)
    done = subprocess.run(["bash", "-ec", f"{command}; env"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "RAY_SERVE_HAPROXY_RETRY_ON=conn-failure empty-response\n" in done.stdout
