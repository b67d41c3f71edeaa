from pathlib import Path

import pytest

from service.access.key_file import KeyFile
from service.cli import main


def test_the_secret_goes_to_stderr_and_an_entry_for_the_key_file_to_stdout(
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
def test_a_key_name_that_cannot_be_a_label_is_a_usage_error(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", name]) == 2
    output = capsys.readouterr()
    assert (output.out, len(output.err.splitlines())) == ("", 1)
