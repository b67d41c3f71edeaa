import asyncio
import csv
import io
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from service.cli import main
from service.commands.classify import AT_ONCE, classify, find_photos
from service.commands.drawing import draw
from service.commands.formats import Format
from service.commands.options import Classify
from service.errors import CommandError
from service.http.schemas import ExplainAnswer
from tests.service.wire_answers import ANSWER

SHIPPED = "supervit-micro-cifar10"


def test_classify_shows_the_best_classes_and_the_reason(
    checkpoint_path: Path, photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", str(photo_path), "--checkpoint", str(checkpoint_path), "--top-k", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("%  thing") == 2
    assert "no other request is waiting" in shown


@pytest.mark.parametrize("name", ["a, b.jpg", 'it"s.jpg', "[1].jpg", "{x}.jpg", '"q".jpg', "007", "a\\b.jpg", " ü.jpg"])
def test_classify_accepts_special_characters_in_file_names(
    name: str, checkpoint_path: Path, photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = photo_path.rename(photo_path.with_name(name))
    arguments = [str(named), "--checkpoint", str(checkpoint_path), "--format", "json"]
    assert main(["classify", str(named), *arguments]) == 0
    assert [json.loads(line)["photo"] for line in capsys.readouterr().out.splitlines()] == [str(named)] * 2


def test_classify_ignores_the_default_latency_budget_of_servers(
    checkpoint_path: Path, photo_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERVIT_DEFAULT_BUDGET_MS", "5")  # for servers, whose clients wait
    assert main(["classify", str(photo_path), "--checkpoint", str(checkpoint_path), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget_ms"] >= 600_000


def test_classify_plans_with_latencies_of_this_machine(
    checkpoint_path: Path, photo_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SUPERVIT_PROFILE_FOLDER", str(tmp_path / "profiles"))
    assert main(["classify", str(photo_path), "--checkpoint", str(checkpoint_path), "--budget-ms", "60000"]) == 0
    assert len(list((tmp_path / "profiles").glob("latency-*.json"))) == 1


def test_classify_continues_after_a_photo_that_it_cannot_read(
    checkpoint_path: Path, photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = ["/does/not/exist.jpg", str(checkpoint_path), str(photo_path)]
    assert main(["classify", *photos, "--checkpoint", str(checkpoint_path), "--format", "json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["photo"] == str(photo_path)
    assert "/does/not/exist.jpg: No such file" in printed.err
    assert "tiny.safetensors: not an image" in printed.err
    assert "2 of 3 photos" in printed.err


def test_classify_reports_a_server_that_it_cannot_connect_to(
    photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", str(photo_path), "--url", "http://127.0.0.1:1"]) == 1
    assert capsys.readouterr().err == "supervit: cannot connect to http://127.0.0.1:1\n"


@pytest.mark.parametrize("command", [["bench"], ["classify", "a.jpg", "--url"]])
@pytest.mark.parametrize("url", ["nonsense", "127.0.0.1:8000", "ftp://server", "http://", "http://[::1"])
def test_a_url_that_is_not_one_of_http_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], command: list[str], url: str
) -> None:
    assert main([*command, url]) == 2
    assert capsys.readouterr().err.startswith(f"supervit: {command[0]} ")


@pytest.mark.parametrize(
    "options",
    [
        ["--url", "http://server", "--checkpoint", SHIPPED],
        ["--patch-grid", "8", "--keep-rate", "1", "--min-confidence", "0.9"],
    ],
)
def test_options_that_exclude_each_other_are_a_usage_error(
    capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert main(["classify", "a.jpg", *options]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_classify_continues_after_the_server_closes_the_connection(
    photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang_up(_: httpx.Request) -> httpx.Response:
        raise httpx.WriteError("")

    command = Classify(photos=[photo_path, photo_path], url="http://server")
    with pytest.raises(CommandError, match="2 of 2 photos"):
        classify(command, httpx.MockTransport(hang_up))
    assert capsys.readouterr().err.count("http://server closed the connection") == 2


TITLE = "\x1b]0;mine\x07"  # a terminal would make it the title of its window


@pytest.mark.parametrize("status", [200, 422])
def test_classify_escapes_control_characters_from_a_server(
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
def test_classify_rejects_an_answer_that_is_not_from_a_supervit_server(photo_path: Path, answer: object) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=answer))
    with pytest.raises(CommandError, match="did not answer like a SuperViT server"):
        classify(Classify(photos=[photo_path], url="http://server"), transport)


@pytest.mark.parametrize(("name", "value"), [("PORT", "abc"), ("DEVICE", "cuda:77"), ("CHECKPOINT", "/nowhere")])
def test_classify_names_an_invalid_environment_variable_or_its_value(
    photo_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"SUPERVIT_{name}", value)
    assert main(["classify", str(photo_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"SUPERVIT_{name}" in error or value in error


def test_classify_finds_a_shipped_checkpoint_by_name(
    photo_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Settings that restrict access to a server do not apply to a model in the command's own process.
    monkeypatch.setenv("SUPERVIT_KEYS", str(photo_path.with_name("keys.yaml")))
    monkeypatch.setenv("SUPERVIT_ALLOWED_HOSTS", "vit.example")
    assert main(["classify", str(photo_path), "--checkpoint", SHIPPED, "--top-k", "10"]) == 0
    assert "%  airplane" in capsys.readouterr().out


def server(
    answer: Callable[[httpx.Request], Awaitable[httpx.Response] | httpx.Response],
) -> httpx.AsyncBaseTransport:
    return httpx.MockTransport(answer)  # type: ignore[arg-type] # it also takes async functions


def answered(request: httpx.Request) -> httpx.Response:
    """Answer with the body of the request as the label."""
    label = request.content.decode()
    return httpx.Response(200, json=ANSWER | {"predictions": [{"label": label, "index": 0, "probability": 0.5}]})


def files(folder: Path, *names: str) -> list[Path]:
    """Write files that each contain their own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return [folder / name for name in names]


def test_a_folder_stands_for_the_images_in_it_and_its_subfolders_in_order(tmp_path: Path) -> None:
    files(tmp_path, "b.JPG", "a/z.png", "a/c.webp", "notes.txt", ".hidden.jpg", ".git/x.jpg", "a.avif")
    (single,) = files(tmp_path, "named.dat")
    found = [tmp_path / name for name in ("a/c.webp", "a/z.png", "a.avif", "b.JPG")]
    assert find_photos([single, tmp_path, Path("missing.jpg")]) == [single, *sorted(found), Path("missing.jpg")]


def test_a_folder_without_images_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files(tmp_path, "notes.txt")
    assert main(["classify", str(tmp_path)]) == 1
    assert f"{tmp_path}: no images in this folder" in capsys.readouterr().err


def test_classify_reads_an_image_from_stdin(
    checkpoint_path: Path, photo: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(photo)))
    assert main(["classify", "-", "--checkpoint", str(checkpoint_path), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["photo"] == "-"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["-", "-"], "stdin holds one image"),
        ([""], "a file name must not be empty"),  # otherwise an unset shell variable would mean the current folder
        (["a.jpg", "--patch-grid", "4"], "go together"),
        (["a.jpg", "b.jpg", "--explain", "out.png"], "--explain takes one photo"),
    ],
)
def test_contradictory_or_empty_arguments_are_usage_errors(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", *words]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_few_photos_are_classified_concurrently_and_shown_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the photos that are sent at once, the first is answered last."""
    names = [f"{number}.jpg" for number in range(9)]
    asked, asked_before_the_first_answer = list[str](), list[str]()
    last_of_the_first = asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.content.decode())
        if len(asked) == AT_ONCE:
            last_of_the_first.set()
        if asked[-1] == names[0]:
            await last_of_the_first.wait()
            asked_before_the_first_answer.extend(asked)
        return answered(request)

    classify(Classify(photos=files(tmp_path, *names), url="http://server", format="csv"), server(answer))
    rows = csv.DictReader(capsys.readouterr().out.splitlines())
    assert [row["label"] for row in rows] == names
    assert sorted(asked_before_the_first_answer) == names[:AT_ONCE]


def test_options_are_sent_to_the_server_as_query_parameters(tmp_path: Path) -> None:
    asked: dict[str, str] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        asked.update(request.url.params)
        return answered(request)

    limits = {"budget_gflops": 2.0, "budget_ms": 300.0, "min_confidence": 0.5}
    classify(Classify(photos=files(tmp_path, "a.jpg"), url="http://server", top_k=3, **limits), server(answer))
    assert {name: float(value) for name, value in asked.items()} == {**limits, "top_k": 3}


@pytest.mark.parametrize(("style", "top_k"), [("table", 1), ("text", 5), ("json", 5), ("csv", 1)])
def test_each_format_has_its_own_default_number_of_predictions(style: Format, top_k: int, tmp_path: Path) -> None:
    asked = list[str]()

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.params["top_k"])
        return answered(request)

    classify(Classify(photos=files(tmp_path, "a.jpg"), url="http://server", format=style), server(answer))
    assert asked == [str(top_k)]


def test_classify_ends_with_one_error_if_the_server_is_unreachable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("")

    photos = files(tmp_path, *(f"{number}.jpg" for number in range(20)))
    with pytest.raises(CommandError, match=r"^cannot connect to http://server$"):
        classify(Classify(photos=photos, url="http://server"), server(refuse))
    assert capsys.readouterr().err == ""


def test_explain_writes_a_drawing_and_shows_the_answer(
    checkpoint_path: Path, photo_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing = tmp_path / "out.png"
    words = ["--checkpoint", str(checkpoint_path), "--patch-grid", "4", "--keep-rate", "0.5", "--format", "json"]
    assert main(["classify", str(photo_path), "--explain", str(drawing), *words]) == 0
    answer = ExplainAnswer.model_validate_json(capsys.readouterr().out)
    assert len(answer.explanation.prunings) == 1
    draw(photo_path.read_bytes(), answer, tmp_path / "expected.png")
    assert drawing.read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_explain_rejects_a_folder_of_several_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files(tmp_path, "a.jpg", "b.jpg")
    assert main(["classify", str(tmp_path), "--explain", str(tmp_path / "out.png")]) == 1
    assert "--explain takes one photo, not 2" in capsys.readouterr().err


def test_importing_the_classify_command_does_not_import_torch() -> None:
    found = "import sys, service.commands.classify; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_api_key_from_the_environment_is_sent_to_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = list[str | None]()

    def answer(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers.get("Authorization"))
        return answered(request)

    monkeypatch.setenv("SUPERVIT_API_KEY", "mine")
    classify(Classify(photos=files(tmp_path, "cat.jpg"), url="http://server"), server(answer))
    assert keys == ["Bearer mine"]
