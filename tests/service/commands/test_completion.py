from pathlib import Path

import pytest

from models.files.sources import shipped_names
from service.cli import main
from service.commands.registry import COMMANDS


def complete(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Request completions at the end of a line, as bash does."""
    monkeypatch.setenv("_SUPERVIT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("supervit ", [*COMMANDS]),
        ("supervit q", ["quantize"]),
        ("supervit serve --max-conn", ["--max-connections", "--max-connections-per-address"]),
        ("supervit serve --engine ", ["auto", "torch", "openvino"]),
        ("supervit serve --checkpoint ", [*shipped_names()]),
        ("supervit evaluate supervit-m", ["supervit-micro-cifar10"]),
        ("supervit serve --policy slackfit-", ["slackfit-capped", "slackfit-estimate"]),
        ("supervit simulate --compare lev", ["level"]),
        ("supervit --v", ["--version"]),
    ],
)
def test_commands_options_and_values_are_completed(
    line: str,
    offered: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert complete(line, capsys, monkeypatch) == offered


def test_checkpoint_files_are_completed_along_with_shipped_checkpoints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("supervit-mine.safetensors", "supervit-mine.txt", "runs/it.safetensors"):
        (tmp_path / name).touch()
    offered = complete("supervit serve --checkpoint supervit-m", capsys, monkeypatch)
    assert offered == ["supervit-micro-cifar10", "supervit-mine.safetensors"]
    assert complete("supervit serve --checkpoint runs/", capsys, monkeypatch) == ["runs/it.safetensors"]
