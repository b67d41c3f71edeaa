"""The Dockerfile agrees with the project and the server's settings, and its health check works."""

import json
import re
import ssl
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
import trustme
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
    """An instruction such as COPY, and its arguments."""

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
    """Return the paths of the repository that any stage copies."""
    copies = [copy for stage in STAGES for copy in values("COPY", stage) if not copy.startswith("--from=")]
    return {source for copy in copies for source in copy.split()[:-1]}


def test_the_server_runs_as_a_numeric_user_that_kubernetes_can_tell_from_root() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last("USER"))
    names = [instruction.name for instruction in FINAL]
    assert "RUN" not in names[names.index("USER") :]


def test_signals_reach_the_server_since_no_shell_is_in_between() -> None:
    assert json.loads(last("ENTRYPOINT"))[-1] == "supervit"
    assert json.loads(last("CMD")) == ["serve"]
    assert "supervit" in PROJECT["scripts"]


def test_an_exit_by_sigterm_counts_as_success() -> None:
    assert json.loads(last("ENTRYPOINT"))[:4] == ["tini", "-e", "143", "--"]


def test_the_final_stage_installs_nothing_but_tini() -> None:
    installed = re.findall(r"apt-get install ([^&]*)", " ".join(values("RUN", FINAL)))
    assert [word for words in installed for word in words.split() if not word.startswith("-")] == ["tini"]
    assert "pip" not in " ".join(values("RUN", FINAL))


def test_only_the_dependencies_of_serving_and_the_grpc_and_otel_extras_are_installed(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    (command,) = values("RUN", stage_named("requirements"))
    subprocess.run(["sh", "-c", command.replace("python", sys.executable, 1)], cwd=tmp_path, check=True)
    requirements = (tmp_path / "requirements.txt").read_text().splitlines()
    extras = PROJECT["optional-dependencies"]
    assert requirements == PROJECT["dependencies"] + extras["grpc"] + extras["otel"]
    assert not set(requirements) & set(extras["train"])
    installs = [command for stage in STAGES for command in values("RUN", stage) if " install " in command]
    assert not [command for command in installs if re.search(r"\[\w+\]|\s-e\s", command)]


def test_pytorch_is_the_cpu_build_by_default() -> None:
    assert values("ARG", stage_named("dependencies")) == ["TORCH_INDEX=https://download.pytorch.org/whl/cpu"]


def test_a_code_change_does_not_reinstall_dependencies() -> None:
    assert not [copy for copy in values("COPY", stage_named("dependencies")) if not copy.startswith("--from=")]
    layers = [value for name, value in FINAL if name in {"COPY", "RUN"}]
    (ours,) = (index for index, value in enumerate(layers) if value.startswith("--from=application"))
    (theirs,) = (index for index, value in enumerate(layers) if value.startswith("--from=dependencies"))
    assert theirs < ours
    assert "--no-deps" in values("RUN", stage_named("application"))[-1]


def test_the_build_context_contains_exactly_what_the_build_copies() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert patterns[0] == "*"
    assert {pattern[1:] for pattern in patterns if pattern[0] == "!"} == copied_from_here()
    assert patterns[-1] == "**/__pycache__"  # the last matching pattern counts
    assert all((ROOT / source).exists() for source in copied_from_here())


def test_the_image_contains_the_default_checkpoint_and_the_packages_of_the_wheel() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["packages"]) <= copied_from_here()
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= copied_from_here()
    assert find_checkpoint(DEFAULT_CHECKPOINT).relative_to(ROOT).parts[0] in wheel["packages"]


def test_the_python_version_is_the_oldest_supported_one_and_matches_all_paths() -> None:
    (image,) = {stage[0].value.split()[0] for stage in STAGES} - {"base"}
    version = re.fullmatch(r"python:(\d+\.\d+)-slim-bookworm", image)
    assert version
    assert PROJECT["requires-python"] == f">={version[1]}"
    assert set(re.findall(r"python(\d+\.\d+)", (ROOT / "Dockerfile").read_text())) == {version[1]}


def test_every_variable_is_a_setting_of_the_server_and_the_exposed_port_is_the_default() -> None:
    knobs = {name for name in environment() if name.startswith("SUPERVIT_")}
    assert knobs == {"SUPERVIT_HOST", "SUPERVIT_PROFILE_FOLDER"}
    assert {name.removeprefix("SUPERVIT_").lower() for name in knobs} <= set(Settings.model_fields)
    assert environment()["SUPERVIT_HOST"] == "0.0.0.0"
    assert last("EXPOSE") == str(Settings.model_fields["port"].default)


def test_the_profile_folder_belongs_to_the_user_and_is_writable_by_group_0() -> None:
    uid = last("USER").partition(":")[0]
    made = f"install --directory --owner={uid} --group=0 --mode=0775 {environment()['SUPERVIT_PROFILE_FOLDER']}"
    assert made in " ".join(values("RUN", FINAL))


def health_check() -> list[str]:
    found: list[str] = json.loads(re.sub(r"^.*?CMD ", "", last("HEALTHCHECK")))
    assert found[0] == "python"
    return [sys.executable, *found[1:]]


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None], tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Run an HTTP server on this machine, over TLS if there is a context, and yield its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("answered", "expected"), [(200, 0), (503, 1)])
def test_the_health_check_reports_the_readiness_of_the_server(answered: int, expected: int) -> None:
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
    assert [client.get(path).status_code for path in asked] == [503]  # a known route, not ready: nothing was started


def test_the_health_check_of_a_server_with_tls_speaks_tls() -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("supervit.example").configure_cert(tls)
    with serving(answer, tls) as port:
        given = {"SUPERVIT_PORT": str(port), "SUPERVIT_TLS_CERTIFICATE": "/certificates/tls.crt"}
        assert subprocess.run(health_check(), env=given, check=False).returncode == 0


def test_a_server_that_does_not_listen_is_unhealthy() -> None:
    with serving(lambda _: None) as port:
        pass
    done = subprocess.run(health_check(), env={"SUPERVIT_PORT": str(port)}, check=False, capture_output=True)
    assert done.returncode == 1


def test_the_start_period_of_the_health_check_is_longer_than_a_first_start() -> None:
    minutes = re.search(r"--start-period=(\d+)m", last("HEALTHCHECK"))
    assert minutes
    assert int(minutes[1]) * 60 > FIRST_START_S
