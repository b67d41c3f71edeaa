"""The Dockerfile is held against what it packs: the project, the server's settings, and a health check that is run."""

import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
from fastapi.testclient import TestClient

from models.checkpoint import load_checkpoint
from models.files.sources import find_checkpoint
from service.app import create_app
from service.engines.torch_engine import TorchEngine
from service.runtime import ServerRuntime
from service.settings import DEFAULT_CHECKPOINT, Settings

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FIRST_START_S = 120  # on two slow cores, with DeiT-S


class Instruction(NamedTuple):
    """Such as COPY, and what comes behind it."""

    name: str
    value: str


def read_dockerfile() -> list[list[Instruction]]:
    """Read the instructions of each stage, FROM first; comments, also between continued lines, are left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    stages: list[list[Instruction]] = []
    for line in "\n".join(lines).replace("\\\n", "").splitlines():
        if line.strip():
            instruction = Instruction(*line.split(maxsplit=1))
            if instruction.name == "FROM":
                stages.append([])
            stages[-1].append(instruction)
    return stages


STAGES = read_dockerfile()
FINAL = STAGES[-1]


def values(name: str, stage: list[Instruction]) -> list[str]:
    return [instruction.value for instruction in stage if instruction.name == name]


def last(name: str) -> str:
    return values(name, FINAL)[-1]


def stage_named(name: str) -> list[Instruction]:
    (found,) = (stage for stage in STAGES if stage[0].value.endswith(f" AS {name}"))
    return found


def environment() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(values("ENV", FINAL))))


def copied_from_here() -> set[str]:
    """What is taken out of the repository, in any stage."""
    copies = [copy for stage in STAGES for copy in values("COPY", stage) if not copy.startswith("--from=")]
    return {source for copy in copies for source in copy.split()[:-1]}


def test_the_server_runs_as_a_user_without_rights_whom_kubernetes_can_tell_from_root() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last("USER"))
    names = [instruction.name for instruction in FINAL]
    assert "RUN" not in names[names.index("USER") :]


def test_a_signal_reaches_the_server_because_no_shell_is_in_between() -> None:
    assert json.loads(last("ENTRYPOINT"))[-1] == "supervit"
    assert json.loads(last("CMD")) == ["serve"]
    assert "supervit" in PROJECT["scripts"]


def test_the_signal_that_ends_the_server_counts_as_success() -> None:
    assert json.loads(last("ENTRYPOINT"))[:4] == ["tini", "-e", "143", "--"]


def test_nothing_but_the_signal_forwarder_is_added_to_the_system() -> None:
    installed = re.findall(r"apt-get install ([^&]*)", " ".join(values("RUN", FINAL)))
    assert [word for words in installed for word in words.split() if not word.startswith("-")] == ["tini"]
    assert "pip" not in " ".join(values("RUN", FINAL))


def test_what_is_installed_is_what_serving_and_tracing_need_over_http_and_grpc(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    (command,) = values("RUN", stage_named("requirements"))
    subprocess.run(["sh", "-c", command.replace("python", sys.executable, 1)], cwd=tmp_path, check=True)
    requirements = (tmp_path / "requirements.txt").read_text().splitlines()
    extras = PROJECT["optional-dependencies"]
    assert requirements == PROJECT["dependencies"] + extras["grpc"] + extras["otel"]
    assert not set(requirements) & set(extras["train"])
    installs = [command for stage in STAGES for command in values("RUN", stage) if " install " in command]
    assert not [command for command in installs if re.search(r"\[\w+\]|\s-e\s", command)]


def test_pytorch_is_the_one_for_cpus_unless_told_otherwise() -> None:
    assert values("ARG", stage_named("dependencies")) == ["TORCH_INDEX=https://download.pytorch.org/whl/cpu"]


def test_a_change_of_code_installs_no_dependency_anew() -> None:
    assert not [copy for copy in values("COPY", stage_named("dependencies")) if not copy.startswith("--from=")]
    layers = [value for name, value in FINAL if name in {"COPY", "RUN"}]
    (ours,) = (index for index, value in enumerate(layers) if value.startswith("--from=application"))
    (theirs,) = (index for index, value in enumerate(layers) if value.startswith("--from=dependencies"))
    assert theirs < ours
    assert "--no-deps" in values("RUN", stage_named("application"))[-1]


def test_the_build_sees_what_it_copies_and_nothing_else_of_the_repository() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert patterns[0] == "*"
    assert {pattern[1:] for pattern in patterns if pattern[0] == "!"} == copied_from_here()
    assert patterns[-1] == "**/__pycache__"  # the last word counts
    assert all((ROOT / source).exists() for source in copied_from_here())


def test_the_default_checkpoint_and_the_packages_of_the_wheel_are_among_it() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["packages"]) <= copied_from_here()
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= copied_from_here()
    assert find_checkpoint(DEFAULT_CHECKPOINT).relative_to(ROOT).parts[0] in wheel["packages"]


def test_python_is_one_that_the_project_supports_and_paths_agree_with_it() -> None:
    (image,) = {stage[0].value.split()[0] for stage in STAGES} - {"base"}
    version = re.fullmatch(r"python:(\d+\.\d+)-slim-bookworm", image)
    assert version
    assert PROJECT["requires-python"] == f">={version[1]}"
    assert set(re.findall(r"python(\d+\.\d+)", (ROOT / "Dockerfile").read_text())) == {version[1]}


def test_every_variable_is_a_knob_of_the_server_and_the_port_is_the_one_it_takes() -> None:
    knobs = {name for name in environment() if name.startswith("SUPERVIT_")}
    assert knobs == {"SUPERVIT_HOST", "SUPERVIT_PROFILE_FOLDER"}
    assert {name.removeprefix("SUPERVIT_").lower() for name in knobs} <= set(Settings.model_fields)
    assert environment()["SUPERVIT_HOST"] == "0.0.0.0"
    assert last("EXPOSE") == str(Settings.model_fields["port"].default)


def test_the_folder_of_profiles_belongs_to_the_user_and_may_be_written_by_others_of_group_0() -> None:
    uid = last("USER").partition(":")[0]
    made = f"install --directory --owner={uid} --group=0 --mode=0775 {environment()['SUPERVIT_PROFILE_FOLDER']}"
    assert made in " ".join(values("RUN", FINAL))


def health_check() -> list[str]:
    found: list[str] = json.loads(re.sub(r"^.*?CMD ", "", last("HEALTHCHECK")))
    assert found[0] == "python"
    return [sys.executable, *found[1:]]


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[int]:
    """Answer on a port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("answered", "expected"), [(200, 0), (503, 1)])
def test_health_is_what_the_server_answers_when_asked_whether_it_is_ready(answered: int, expected: int) -> None:
    asked: list[str] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        request.send_response(answered)
        request.end_headers()

    with serving(answer) as port:
        status = subprocess.run(health_check(), env={"SUPERVIT_PORT": str(port)}, check=False).returncode
    assert status == expected
    checkpoint = load_checkpoint(DEFAULT_CHECKPOINT)
    runtime = ServerRuntime(Settings(), checkpoint, TorchEngine(checkpoint.model, "cpu", threads=1))
    client = TestClient(create_app(runtime))
    assert [client.get(path).status_code for path in asked] == [503]  # known, and not ready: nothing was started


def test_a_server_that_does_not_listen_is_not_healthy() -> None:
    with serving(lambda _: None) as port:
        pass
    done = subprocess.run(health_check(), env={"SUPERVIT_PORT": str(port)}, check=False, capture_output=True)
    assert done.returncode == 1


def test_a_first_start_may_take_its_time_before_it_counts_as_unhealthy() -> None:
    minutes = re.search(r"--start-period=(\d+)m", last("HEALTHCHECK"))
    assert minutes
    assert int(minutes[1]) * 60 > FIRST_START_S
