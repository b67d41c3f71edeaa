import io
import os
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from models.checkpoint import Checkpoint
from models.files.sources import find_checkpoint
from service.cli import main
from service.commands.registry import COMMANDS
from service.engines.torch_engine import TorchEngine
from service.errors import CommandError
from service.hosting.serve import allow_connections, divide_limits, plan_workers, serve, supervise
from service.hosting.workers import bind
from service.settings import Settings, worker_environment

SHIPPED = "supervit-micro-cifar10"


class BrokenEngine(TorchEngine):
    """An engine whose warm-up fails."""

    def warm_up(self) -> None:
        raise RuntimeError("out of memory")


def test_serve_ends_when_the_model_cannot_run(checkpoint: Checkpoint, checkpoint_path: Path) -> None:
    with pytest.raises(CommandError, match=r"^the model cannot run"):
        serve(Settings(checkpoint=str(checkpoint_path), port=0), BrokenEngine(checkpoint.model, "cpu", 1))


def test_serve_reports_a_port_in_use_in_one_line(checkpoint_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--checkpoint", str(checkpoint_path), "--port", str(port)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.endswith(f"cannot listen on 127.0.0.1 port {port}: Address already in use")


def test_workers_do_not_share_the_port_of_another_server(checkpoint_path: Path) -> None:
    """The kernel would allow it: both sockets are shared (SO_REUSEPORT)."""
    with bind("127.0.0.1", 0, is_shared=True) as taken:
        taken.listen()
        settings = Settings(checkpoint=str(checkpoint_path), port=taken.getsockname()[1], workers=2)
        with pytest.raises(CommandError, match=r"^cannot listen on 127\.0\.0\.1 port \d+: Address already in use$"):
            supervise(settings, cpus={0, 1}, cores=2)


@pytest.mark.parametrize(("cores", "threads", "max_utilization"), [(8, None, "0.5"), (4.5, "2", "0.25")])
def test_workers_divide_a_cpu_quota_among_their_engines(
    monkeypatch: pytest.MonkeyPatch, cores: float, threads: str | None, max_utilization: str
) -> None:
    monkeypatch.delenv("SUPERVIT_THREADS", raising=False)
    settings = Settings(checkpoint=SHIPPED, workers=2, max_utilization=0.5, device="cpu")
    _, shared_out = plan_workers(settings, range(8), cores)
    environment = worker_environment(shared_out)
    assert environment["SUPERVIT_MAX_UTILIZATION"] == max_utilization
    assert environment.get("SUPERVIT_THREADS") == threads
    assert environment["SUPERVIT_WORKERS"] == "2"
    assert environment["SUPERVIT_CHECKPOINT"] == str(find_checkpoint(settings.checkpoint))  # found once for all workers


def test_serve_rejects_more_workers_than_cores() -> None:
    with pytest.raises(CommandError, match=r"^workers must be at most 1, the number of cores, not 2$"):
        plan_workers(Settings(workers=2), range(8), 1.0)


def test_workers_divide_the_utilization_ceiling_of_a_gpu_that_they_share() -> None:
    settings = Settings(workers=4, max_utilization=0.5)
    assert divide_limits(settings, 8, is_quota=False, is_on_cpu=False).max_utilization == 0.125
    assert divide_limits(settings, 8, is_quota=False, is_on_cpu=True).max_utilization == 0.5
    assert divide_limits(Settings(workers=4), 8, is_quota=False, is_on_cpu=False).max_utilization is None


@pytest.mark.parametrize(
    ("limits", "raised", "warned", "room"),
    [
        ((1024, 4096), (2024, 4096), False, 1000),
        ((1024, 1500), (1500, 1500), True, 750),
        ((1024, 2020), (2020, 2020), True, 1010),
        ((8192, 8192), None, False, 1000),
        ((1024, resource.RLIM_INFINITY), (2024, resource.RLIM_INFINITY), False, 1000),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, False, 1000),
    ],
)
def test_the_limit_on_open_files_bounds_the_number_of_connections(
    caplog: pytest.LogCaptureFixture,
    limits: tuple[int, int],
    raised: tuple[int, int] | None,
    warned: bool,
    room: int,
) -> None:
    given: list[tuple[int, int]] = []
    assert allow_connections(1000, limits, lambda _, limit: given.append(limit)) == room
    assert given == ([raised] if raised else [])
    assert ("open files allow only" in caplog.text) == warned


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_serve_reports_a_bad_checkpoint_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = tmp_path / "bad.pth"
    if content is not None:
        path.write_bytes(content)
    assert main(["serve", "--port", "0", "--checkpoint", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error


def test_serve_rejects_workers_together_with_an_inherited_socket(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERVIT_WORKERS", "4")
    assert main(["serve", "--fd", "3"]) == 1
    assert "leave out one of them" in capsys.readouterr().err


def test_serve_rejects_a_device_that_does_not_exist(checkpoint_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "--checkpoint", str(checkpoint_path), "--device", "cuda:77"]) == 1
    assert capsys.readouterr().err.startswith("supervit: device 'cuda:77' cannot be used")


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--port", "99999"],
        ["serve", "--host", ""],
        ["classify", "a.jpg", "--budget-gflops", "-1"],
        ["classify", "a.jpg", "--url", ""],
        ["train", "d", "--epochs", "0"],
        ["evaluate", "c", "d", "--max-bad-images", "1"],
        ["train", "d", "--patch-grids", "[4"],
    ],
)
def test_an_invalid_option_value_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("supervit: ")
    assert arguments[0] in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["bogus"], ["serve", "--bogus"], ["serve", "extra"]])
def test_an_unknown_command_or_option_is_a_usage_error_reported_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("supervit: ")
    assert arguments[-1] in error
    assert error.count("\n") == 1


def test_a_missing_command_is_a_usage_error_and_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize(
    "command",
    [["serve", "--port", "0", "--checkpoint"], ["profile", "--checkpoint"], ["simulate", "--checkpoint"], ["evaluate"]],
)
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("unknown", f"no such file, and no checkpoint of that name ships; choose from {SHIPPED}, "),
        ("https://host/a", "a URL is not supported"),
        ("hf-hub:name", "a repository of the hub must be named hf-hub:owner/name"),
    ],
)
def test_every_command_names_a_checkpoint_that_it_cannot_find(
    command: list[str], name: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, name, *(["data"] if command == ["evaluate"] else [])]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"supervit: {name}: {complaint}")
    assert error.count("\n") == 1


def test_train_names_a_data_set_that_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path), "--output", str(tmp_path / "run")]) == 1
    assert str(tmp_path / "train") in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"supervit {version('supervit-serve')}\n"


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["serve", "--help"], ["serve", "-h", "--port", "abc"]])
def test_help_exits_with_status_0(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert "Usage: supervit" in capsys.readouterr().out


def test_help_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(command.summary in shown for command in COMMANDS.values())
    assert all(f"\n   {code} " in shown for code in (0, 1, 2, 130))


@pytest.mark.parametrize(("typo", "meant"), [(["srve"], "serve"), (["serve", "--prot", "9"], "--port")])
def test_a_typo_is_answered_with_a_suggestion(typo: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typo) == 2
    assert meant in capsys.readouterr().err


def test_control_characters_of_an_option_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "--\x1b[31m"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_full_disk_and_a_closed_pipe_are_failures() -> None:
    command = [sys.executable, "-m", "service.cli", "--version"]
    reading, writing = os.pipe()
    os.close(reading)
    with Path("/dev/full").open("w") as full, os.fdopen(writing, "w") as pipe:
        onto_full, into_pipe = (
            subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, check=False)
            for file in (full, pipe)
        )
    assert (onto_full.returncode, onto_full.stderr) == (1, "supervit: No space left on device\n")
    assert (into_pipe.returncode, into_pipe.stderr) == (1, "")


def test_help_and_usage_errors_import_no_heavy_library() -> None:
    words = [["--help"], *([name, "--help"] for name in COMMANDS), ["serve", "--port", "x"], ["classify", "a", "--x"]]
    heavy = ["torch", "timm", "matplotlib", "fastapi", "httpx", "openvino"]
    code = f"""import sys
from service.cli import main
statuses = [main(words) for words in {words!r}]
print(*statuses, *(name for name in {heavy!r} if name in sys.modules), file=sys.stderr)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1].split() == [*"0" * (1 + len(COMMANDS)), "2", "2"]


def test_the_list_of_commands_does_not_import_pydantic() -> None:
    code = "import sys; from service.cli import main; main(['--help']); print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("words", "library", "extra"),
    [
        (["evaluate", "checkpoint", "data"], "matplotlib", "train"),
        (["profile", "--plot-file", "out.png"], "matplotlib", "train"),
        (["bench", "http://server"], "aiohttp", "bench"),
    ],
)
def test_a_missing_optional_library_is_reported_with_the_extra_that_installs_it(
    words: list[str], library: str, extra: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("models.evaluation.plots", "service.bench.connections", f"service.commands.{words[0]}"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, library, None)  # makes its import fail
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error == f"supervit: {library} is not installed; install it with pip install '.[{extra}]'\n"


def test_ctrl_c_exits_with_status_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.BytesIO):
        def read(self, _: int | None = -1, /) -> bytes:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Interrupted()))
    assert main(["classify", "-", "--url", "http://server"]) == 130
    assert capsys.readouterr().err == "\nsupervit: interrupted\n"
