import json
from pathlib import Path

import httpx
import pytest

from service.cli import main
from service.commands.classify import classify
from service.commands.options import Classify
from service.errors import CommandError
from tests.service.wire_answers import ANSWER

SHIPPED = "supervit-micro-cifar10"


def test_classify_shows_the_best_classes_and_the_reason(
    checkpoint_path: Path, photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", str(photo_path), "--checkpoint", str(checkpoint_path), "--top-k", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("%  thing") == 2
    assert "nothing else waits" in shown


@pytest.mark.parametrize("name", ["a, b.jpg", 'it"s.jpg', "[1].jpg", "{x}.jpg", '"q".jpg', "007", "a\\b.jpg", " ü.jpg"])
def test_classify_takes_file_names_as_they_are(
    name: str, checkpoint_path: Path, photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = photo_path.rename(photo_path.with_name(name))
    arguments = [str(named), "--checkpoint", str(checkpoint_path), "--format", "json"]
    assert main(["classify", str(named), *arguments]) == 0
    assert [json.loads(line)["photo"] for line in capsys.readouterr().out.splitlines()] == [str(named)] * 2


def test_classify_is_in_no_hurry(
    checkpoint_path: Path, photo_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERVIT_DEFAULT_BUDGET_MS", "5")  # of servers, for which somebody waits
    assert main(["classify", str(photo_path), "--checkpoint", str(checkpoint_path), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget_ms"] >= 600_000


def test_classify_goes_on_after_a_photo_that_it_cannot_read(
    checkpoint_path: Path, photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = ["/does/not/exist.jpg", str(checkpoint_path), str(photo_path)]
    assert main(["classify", *photos, "--checkpoint", str(checkpoint_path), "--format", "json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["photo"] == str(photo_path)
    assert "/does/not/exist.jpg: No such file" in printed.err
    assert "tiny.safetensors: not an image" in printed.err
    assert "2 of 3 photos" in printed.err


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[::1"])
def test_classify_says_that_there_is_no_such_server(
    photo_path: Path, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert main(["classify", str(photo_path), "--url", url]) == 1
    error = capsys.readouterr().err
    assert "cannot be connected to" in error or "is no URL" in error
    assert error.count("\n") == 1


def test_classify_goes_on_after_a_photo_on_which_the_server_hangs_up(
    photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang_up(_: httpx.Request) -> httpx.Response:
        raise httpx.WriteError("")

    command = Classify(photos=[photo_path, photo_path], url="http://server")
    with pytest.raises(CommandError, match="2 of 2 photos"):
        classify(command, httpx.MockTransport(hang_up))
    assert capsys.readouterr().err.count("http://server closed the connection") == 2


TITLE = "\x1b]0;mine\x07"  # a terminal would take it for its window's title


@pytest.mark.parametrize("status", [200, 422])
def test_classify_shows_no_control_characters_of_a_server(
    photo_path: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    answer = ANSWER | {
        "predictions": [{"label": TITLE, "index": 0, "probability": 0.5}],
        "decision": ANSWER["decision"] | {"reason": f"r\n{TITLE}"},
    }
    error = {"error": {"code": "invalid_image", "message": f"m{TITLE}", "details": {}}}
    transport = httpx.MockTransport(lambda _: httpx.Response(status, json=answer if status == 200 else error))
    photo = photo_path.rename(photo_path.with_name("\x1b.jpg"))
    if status == 200:
        classify(Classify(photos=[photo], url="http://server"), transport)
    else:
        with pytest.raises(CommandError):
            classify(Classify(photos=[photo], url="http://server"), transport)
    shown = "".join(capsys.readouterr())
    assert not set(shown) & {"\x1b", "\x07"}
    assert r"\x1b]0;mine\x07" in shown
    assert shown.count("\n") == (3 if status == 200 else 1)


@pytest.mark.parametrize("answer", [{}, [], {"predictions": [{"label": "a", "probability": "x"}]}, {"predictions": 1}])
def test_classify_says_that_an_answer_is_none_of_such_a_server(photo_path: Path, answer: object) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=answer))
    with pytest.raises(CommandError, match="does not answer as a SuperViT server does"):
        classify(Classify(photos=[photo_path], url="http://server"), transport)


@pytest.mark.parametrize(("name", "value"), [("PORT", "abc"), ("DEVICE", "cuda:77"), ("CHECKPOINT", "/nowhere")])
def test_classify_names_what_it_cannot_use_of_its_environment(
    photo_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"SUPERVIT_{name}", value)
    assert main(["classify", str(photo_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"SUPERVIT_{name}" in error or value in error


def test_a_checkpoint_that_ships_is_classified_with_by_its_name(
    photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", str(photo_path), "--checkpoint", SHIPPED, "--top-k", "10"]) == 0
    assert "%  airplane" in capsys.readouterr().out
