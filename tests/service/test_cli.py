import json
import resource
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from service.client import Classify, classify

from models.checkpoint import Checkpoint, Header, load_checkpoint, save_checkpoint
from models.files.sources import find_checkpoint
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork
from models.supervit import DEIT_SMALL, SuperViT
from service.cli import main
from service.engines.torch_engine import TorchEngine
from service.errors import CommandError
from service.hosting.serve import allow_connections, plan_workers, serve, share_out, supervise
from service.hosting.workers import bind
from service.settings import Settings, worker_environment

SHIPPED = "supervit-micro-cifar10"


@pytest.fixture
def checkpoint_path(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    header = Header(checkpoint.name, checkpoint.config, checkpoint.class_names, checkpoint.profile)
    save_checkpoint(path, checkpoint.model, header)
    return path


@pytest.fixture
def photo_path(photo: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo)
    return path


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
    arguments = [str(named), "--checkpoint", str(checkpoint_path), "--json-lines"]
    assert main(["classify", str(named), *arguments]) == 0
    assert [json.loads(line)["photo"] for line in capsys.readouterr().out.splitlines()] == [str(named)] * 2


def test_classify_is_in_no_hurry(
    checkpoint_path: Path, photo_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERVIT_DEFAULT_BUDGET_MS", "5")  # of servers, for which somebody waits
    assert main(["classify", str(photo_path), "--checkpoint", str(checkpoint_path), "--json-lines"]) == 0
    assert json.loads(capsys.readouterr().out)["budget_ms"] >= 600_000


def test_classify_goes_on_after_a_photo_that_it_cannot_read(
    checkpoint_path: Path, photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = ["/does/not/exist.jpg", str(checkpoint_path), str(photo_path)]
    assert main(["classify", *photos, "--checkpoint", str(checkpoint_path), "--json-lines"]) == 1
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
    assert "does not answer" in error or "is no URL" in error
    assert error.count("\n") == 1


def test_classify_goes_on_after_a_photo_on_which_the_server_hangs_up(
    photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang_up(_: httpx.Request) -> httpx.Response:
        raise httpx.WriteError("")

    command = Classify(photos=[photo_path, photo_path], url="http://server")
    with pytest.raises(CommandError, match="2 of 2 photos"):
        classify(command, httpx.MockTransport(hang_up))
    assert capsys.readouterr().err.count("the server closed the connection") == 2


TITLE = "\x1b]0;mine\x07"  # a terminal would take it for its window's title


@pytest.mark.parametrize("status", [200, 422])
def test_classify_shows_no_control_characters_of_a_server(
    photo_path: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    answer = {
        "predictions": [{"label": TITLE, "probability": 0.5}],
        "timing_ms": {"total": 1.0},
        "decision": {"reason": f"r\n{TITLE}"},
        "error": {"message": f"m{TITLE}"},
    }
    transport = httpx.MockTransport(lambda _: httpx.Response(status, json=answer))
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
    assert name.lower() in error or value in error


class BrokenEngine(TorchEngine):
    """Fails as it warms up."""

    def warm_up(self) -> None:
        raise RuntimeError("out of memory")


def test_serve_ends_when_the_model_cannot_run(checkpoint: Checkpoint, checkpoint_path: Path) -> None:
    with pytest.raises(CommandError, match=r"^the model cannot run"):
        serve(Settings(checkpoint=str(checkpoint_path), port=0), BrokenEngine(checkpoint.model, "cpu", 1))


def test_serve_rejects_a_port_that_is_in_use_in_one_line(
    checkpoint_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        assert main(["serve", "--checkpoint", str(checkpoint_path), "--port", str(taken.getsockname()[1])]) == 1
        assert capsys.readouterr().err.splitlines()[-1].endswith("cannot be listened on: Address already in use")


def test_workers_do_not_join_those_of_another_server(checkpoint_path: Path) -> None:
    """The kernel would let them in."""
    with bind("127.0.0.1", 0, is_shared=True) as taken:
        taken.listen()
        settings = Settings(checkpoint=str(checkpoint_path), port=taken.getsockname()[1], workers=2)
        with pytest.raises(CommandError, match=r"cannot be listened on: Address already in use$"):
            supervise(settings, cpus={0, 1}, cores=2)


@pytest.mark.parametrize(("cores", "threads", "max_utilization"), [(8, None, "0.5"), (4.5, "2", "0.25")])
def test_workers_divide_a_quota_among_their_engines(
    monkeypatch: pytest.MonkeyPatch, cores: float, threads: str | None, max_utilization: str
) -> None:
    monkeypatch.delenv("SUPERVIT_THREADS", raising=False)
    settings = Settings(checkpoint=SHIPPED, workers=2, max_utilization=0.5, device="cpu")
    _, shared_out = plan_workers(settings, range(8), cores)
    environment = worker_environment(shared_out)
    assert environment["SUPERVIT_MAX_UTILIZATION"] == max_utilization
    assert environment.get("SUPERVIT_THREADS") == threads
    assert environment["SUPERVIT_WORKERS"] == "2"
    assert environment["SUPERVIT_CHECKPOINT"] == str(
        find_checkpoint(settings.checkpoint)
    )  # found once, for all of them


def test_serve_rejects_more_workers_than_cores() -> None:
    with pytest.raises(CommandError, match=r"^2 workers need a core each, and there are 1$"):
        plan_workers(Settings(workers=2), range(8), 1.0)


def test_workers_divide_the_ceiling_on_a_gpu_that_all_of_them_use() -> None:
    settings = Settings(workers=4, max_utilization=0.5)
    assert share_out(settings, 8, is_quota=False, is_on_cpu=False).max_utilization == 0.125
    assert share_out(settings, 8, is_quota=False, is_on_cpu=True).max_utilization == 0.5
    assert share_out(Settings(workers=4), 8, is_quota=False, is_on_cpu=False).max_utilization is None


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
def test_as_many_connections_are_allowed_as_the_limit_on_open_files_leaves_room_for(
    caplog: pytest.LogCaptureFixture,
    limits: tuple[int, int],
    raised: tuple[int, int] | None,
    warned: bool,
    room: int,
) -> None:
    given: list[tuple[int, int]] = []
    assert allow_connections(1000, limits, lambda _, limit: given.append(limit)) == room
    assert given == ([raised] if raised else [])
    assert ("open files are allowed" in caplog.text) == warned


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_serve_rejects_to_start_on_a_bad_checkpoint_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = tmp_path / "bad.pth"
    if content is not None:
        path.write_bytes(content)
    assert main(["serve", "--checkpoint", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error


def test_serve_rejects_workers_on_a_socket_of_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERVIT_WORKERS", "4")
    assert main(["serve", "--fd", "3"]) == 1
    assert "leave out --fd, or --workers" in capsys.readouterr().err


def test_serve_rejects_a_device_that_is_not_there(checkpoint_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--checkpoint", str(checkpoint_path), "--device", "cuda:77"]) == 1
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
def test_a_value_outside_its_range_is_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("supervit: ")
    assert arguments[0] in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["bogus"], ["serve", "--bogus"], []])
def test_an_unknown_command_or_option_is_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code


@pytest.fixture
def data(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return plain_images(tmp_path / "data", checkpoint.class_names)


def plain_images(folder: Path, class_names: Sequence[str]) -> Path:
    """Two plain images of each class to measure on."""
    for index, name in enumerate(class_names):
        (folder / "test" / name).mkdir(parents=True)
        for shade in (0, 1):
            picture = Image.new("RGB", (20, 20), (25 * index, 100 * shade, 5))
            picture.save(folder / "test" / name / f"{shade}.png")
    return folder


def test_evaluate_measures_every_sub_network_and_writes_it_into_the_checkpoint(
    checkpoint: Checkpoint, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.safetensors"
    unmeasured = ProfileTable.unmeasured(checkpoint.config)
    save_checkpoint(path, checkpoint.model, Header("tiny", checkpoint.config, checkpoint.class_names, unmeasured))
    command = ["evaluate", str(path), str(data), "--workers", "0", "--batch-size", "3"]
    (data / "test" / checkpoint.class_names[0] / "2.png").write_text("no picture")
    assert main([*command, "--rates-between"]) == 1
    assert "more than --max-bad-images 0.01 allows" in capsys.readouterr().err
    assert main([*command, "--rates-between", "--max-bad-images", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "images of test/, calibration error from the other " in printed
    assert f"accuracy from all {2 * len(checkpoint.class_names)} of test/" in printed
    measured = load_checkpoint(path)
    assert measured.profile.is_measured
    assert SubNetwork(4, 0.75) in measured.profile.by_subnetwork
    assert "expected calibration error" in printed
    assert all(row.temperature != 1 and row.calibration_error is not None for row in measured.profile.rows)
    assert all(0 < (row.top5 or 0) <= 1 for row in measured.profile.rows)
    assert all(f"{100 * (row.top1 or 0):.2f} %" in printed for row in measured.profile.rows)
    assert torch.equal(measured.model.head.weight, checkpoint.model.head.weight)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_writes_a_copy_of_what_ships_into_the_current_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = find_checkpoint(SHIPPED)
    before = shipped.read_bytes(), set(shipped.parent.iterdir())
    data = plain_images(tmp_path / "data", load_checkpoint(shipped).class_names)
    command = ["evaluate", SHIPPED, str(data), "--workers", "0"]
    assert main(command) == 0
    copy = load_checkpoint(tmp_path / f"{SHIPPED}.safetensors")
    assert copy.profile.is_measured
    assert copy.profile != load_checkpoint(shipped).profile
    assert (shipped.read_bytes(), set(shipped.parent.iterdir())) == before
    capsys.readouterr()
    assert main(command) == 1
    assert capsys.readouterr().err == f"supervit: {SHIPPED}.safetensors: would be overwritten\n"


def test_a_checkpoint_that_ships_is_classified_with_by_its_name(
    photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", str(photo_path), "--checkpoint", SHIPPED, "--top-k", "10"]) == 0
    assert "%  airplane" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["serve", "--checkpoint"], ["profile", "--checkpoint"], ["simulate", "--checkpoint"], ["evaluate"]]
)
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("unknown", f"no such file, and no checkpoint of that name ships; those that do: {SHIPPED}, "),
        ("https://host/a", "a URL is not taken"),
        ("hf-hub:name", "a repository of the hub is named hf-hub:owner/name"),
    ],
)
def test_a_checkpoint_that_cannot_be_found_is_named_by_every_command(
    command: list[str], name: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, name, *(["data"] if command == ["evaluate"] else [])]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"supervit: {name}: {complaint}")
    assert error.count("\n") == 1


def test_evaluate_never_replaces_weights_that_others_named_as_it_names_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The authors' weights are of another format, though the file's name is one of ours."""
    published = tmp_path / "net.safetensors"
    save_file(SuperViT(DEIT_SMALL).state_dict(), published)
    assert not load_checkpoint(published).is_ours
    stranger = tmp_path / "net.safetensors.safetensors"
    stranger.touch()
    assert main(["evaluate", str(published), str(tmp_path)]) == 1
    assert f"{stranger}: would be overwritten" in capsys.readouterr().err


def test_evaluate_never_replaces_a_file_that_is_not_its_own(
    checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unrelated = checkpoint_path.rename(tmp_path / "net.pth.safetensors")
    (tmp_path / "net.pth").write_bytes(unrelated.read_bytes())
    assert main(["evaluate", str(tmp_path / "net.pth"), str(tmp_path)]) == 1
    assert f"{unrelated}: would be overwritten" in capsys.readouterr().err


def test_evaluate_names_a_data_set_that_it_cannot_use(
    checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(checkpoint_path), str(tmp_path)]) == 1
    assert "neither val/ nor test/" in capsys.readouterr().err


def test_train_names_a_data_set_that_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path), "--output", str(tmp_path / "run")]) == 1
    assert str(tmp_path / "train") in capsys.readouterr().err


def test_evaluate_rounds_to_half_precision_before_it_measures(
    checkpoint: Checkpoint, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.safetensors"
    unmeasured = ProfileTable.unmeasured(checkpoint.config)
    save_checkpoint(path, checkpoint.model, Header("tiny", checkpoint.config, checkpoint.class_names, unmeasured))
    whole = load_checkpoint(path)
    assert main(["evaluate", str(path), str(data), "--workers", "0", "--half"]) == 0
    halved = load_checkpoint(path)
    assert halved.is_half
    assert halved.profile.is_measured
    assert main(["evaluate", str(path), str(data), "--workers", "0"]) == 0
    assert load_checkpoint(path).is_half  # it stays so
    for name, weight in halved.model.state_dict().items():
        original = whole.model.state_dict()[name]
        assert torch.equal(weight, original.half().float() if original.is_floating_point() else original) or (
            "running" in name
        )
