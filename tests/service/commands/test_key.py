from pathlib import Path

import pytest

from service.access.key_file import KeyFile
from service.cli import main


def test_a_key_is_told_once_and_its_entry_is_ready_for_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["key", "doorbells"]) == 0
    output = capsys.readouterr()
    file = tmp_path / "keys.toml"
    file.write_text(output.out)
    secret = output.err.strip().rpartition(" ")[2]
    assert secret not in output.out
    assert KeyFile(file).find({b"x-api-key": secret.encode()}).name == "doorbells"


@pytest.mark.parametrize("name", ["", "two words", 'a"b', "x" * 65])
def test_a_name_that_a_label_cannot_hold_is_wrong_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", name]) == 2
    output = capsys.readouterr()
    assert (output.out, len(output.err.splitlines())) == ("", 1)
