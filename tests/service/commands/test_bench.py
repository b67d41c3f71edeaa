import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
from PIL import Image
from rich.console import Console

from service.bench.client_protocols import Reply, Request
from service.bench.figures import Figures
from service.bench.generator import Exchange, Planned
from service.bench.options import Bench
from service.commands.bench import bench, table_of
from service.errors import CommandError, ConnectionFailedError, NoAnswerError
from service.simulation.arrivals import Arrival
from tests.service.wire_answers import ANSWER, refusal

Answer = tuple[int, bytes] | NoAnswerError
READY = 200, b"{}"
ANSWERED = 200, json.dumps(ANSWER).encode()


class FakeServer:
    """A server that returns the answers of a test at once."""

    def __init__(self, found: Answer, answer: Callable[[Request], Answer]) -> None:
        self._found, self._answer = found, answer
        self.fetched: list[str] = []
        self.timeout_s = 0.0

    def connect(self, url: str, timeout_s: float) -> Self:
        assert url == "http://server"
        self.timeout_s = timeout_s
        return self

    async def send(self, request: Request) -> tuple[int, bytes]:
        if request.body is None:
            self.fetched.append(request.path)
        reply = self._found if request.body is None else self._answer(request)
        if isinstance(reply, NoAnswerError):
            raise reply
        return reply

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


@pytest.fixture
def dalmatians(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    for name in ("dalmatian", "hedgehog"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.jpg").write_bytes(name.encode())
    return folder


@pytest.fixture
def at_once(tmp_path: Path) -> Path:
    """Write a trace of four requests that are all due at the start, so that the test does not wait."""
    path = tmp_path / "trace.csv"
    path.write_text("0\n" * 4)
    return path


def run(server: FakeServer, **options: Any) -> str:  # noqa: ANN401 - any options of the command
    output = io.StringIO()
    command = Bench.model_validate({"url": "http://server", "budget_ms": (60_000,)} | options)
    bench(command, Console(file=output, width=100), server.connect)
    return output.getvalue()


def test_the_outcomes_of_requests_are_shown_and_written_to_files(
    dalmatians: Path, at_once: Path, tmp_path: Path
) -> None:
    server = FakeServer(READY, lambda request: ANSWERED if request.body == b"dalmatian" else overloaded())
    written, drawn = tmp_path / "figures.json", tmp_path / "course.png"
    shown = run(server, images=(dalmatians,), trace=at_once, json_file=written, plot_file=drawn)
    rows = {
        cells[0].strip(): cells[1].strip() for line in shown.splitlines() if len(cells := line.split("│")[1:-1]) == 2
    }
    assert rows["sent"] == "4"
    assert rows["in time"] == "50.00%"
    assert rows["correct, of those answered"] == "100.00%"
    assert rows["correct and in time, of all"] == "50.00%"
    assert rows["answered by"] == "12-0.7 100%"
    assert rows["not answered"] == "overloaded 2"
    [figures] = json.loads(written.read_text())["runs"]
    assert figures["failures"] == {"overloaded": 2}
    assert figures["attainment"] == 0.5
    with Image.open(drawn) as image:
        assert image.format == "PNG"
    assert server.fetched == ["/health/ready"]
    assert server.timeout_s > 60


def overloaded() -> tuple[int, bytes]:
    return 429, refusal(429, "overloaded").content


def test_json_on_stdout_is_printed_without_the_table(at_once: Path) -> None:
    output = run(FakeServer(READY, lambda _: ANSWERED), trace=at_once, json_file=Path("-"))
    assert json.loads(output)["options"]["url"] == "http://server"


def test_a_model_of_another_server_is_queried_in_v2(dalmatians: Path, at_once: Path) -> None:
    taken = {"name": "image", "datatype": "BYTES", "shape": [-1]}
    given = {"name": "scores", "datatype": "FP32", "shape": [-1, 2]}
    inferred = {"outputs": [given | {"data": [0.1, 0.9]}]}  # the class of the second folder
    server = FakeServer(
        (200, json.dumps({"inputs": [taken], "outputs": [given]}).encode()),
        lambda _: (200, json.dumps(inferred).encode()),
    )
    shown = run(server, images=(dalmatians,), trace=at_once, protocol="v2", model="vit")
    assert server.fetched == ["/v2/models/vit"]
    assert "50.00%" in next(line for line in shown.splitlines() if "correct and in time" in line)
    assert "GFLOPs" not in shown


def test_requests_whose_connection_fails_are_counted(at_once: Path) -> None:
    shown = run(FakeServer(READY, lambda _: ConnectionFailedError("gone")), trace=at_once)
    assert "connection_failed 4" in shown


def test_control_characters_and_markup_from_a_server_are_escaped(at_once: Path) -> None:
    hostile = refusal(429, "\x1b]0;mine\x07[bold]").content
    shown = run(FakeServer(READY, lambda _: (429, hostile)), trace=at_once)
    assert "\x1b" not in shown
    assert r"\x1b]0;mine\x07[bold]" in shown


@pytest.mark.parametrize(("late_s", "warned"), [(0.002, False), (0.05, True)])
def test_the_table_warns_if_the_generator_cannot_keep_up(late_s: float, warned: bool) -> None:
    exchange = Exchange(Planned(Arrival(0.0, 0.1), 0, None), late_s, 0.06, Reply("ok"))
    output = io.StringIO()
    Console(file=output).print(table_of([Figures.of(10, [exchange], 1)]))
    assert ("could not keep up" in " ".join(output.getvalue().split())) == warned


def test_each_rate_has_a_column() -> None:
    shown = run(FakeServer(READY, lambda _: ANSWERED), rate=(3000, 6000), duration_s=0.01)
    assert [cell.strip() for cell in shown.splitlines()[2].split("┃")[1:-1]] == ["requests/s", "3000", "6000"]


def test_nothing_is_sent_to_a_server_that_is_not_ready(at_once: Path) -> None:
    def answer(_: Request) -> Answer:
        raise AssertionError

    with pytest.raises(CommandError, match="http://server/health/ready answered with status 503"):
        run(FakeServer((503, b""), answer), trace=at_once)
    with pytest.raises(ConnectionFailedError):
        run(FakeServer(ConnectionFailedError("nobody"), answer), trace=at_once)
