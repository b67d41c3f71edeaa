import csv
import json
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest

from service.commands.formats import Format, default_format, progress, showing
from service.http.schemas import ClassifyAnswer
from tests.service.wire_answers import ANSWER

TITLE = "\x1b]0;mine\x07"  # a terminal would make it the title of its window


class Terminal(StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def answer(*labels: str) -> ClassifyAnswer:
    predictions = [{"label": label, "index": 0, "probability": 0.5**rank} for rank, label in enumerate(labels, start=1)]
    return ClassifyAnswer.model_validate(ANSWER | {"predictions": predictions})


def show(style: Format, *shown: tuple[str, ClassifyAnswer]) -> None:
    with showing(style) as add:
        for photo, one in shown:
            add(Path(photo), one)


def lines(capsys: pytest.CaptureFixture[str]) -> Sequence[str]:
    return capsys.readouterr().out.splitlines()


def test_text_has_the_predictions_and_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    show("text", ("a.jpg", answer("cat", "dog")))
    assert lines(capsys) == ["a.jpg", "   50.0%  cat", "   25.0%  dog", "  no other request is waiting (63.2 ms)"]


def test_text_says_that_an_answer_was_late(capsys: pytest.CaptureFixture[str]) -> None:
    show("text", ("a.jpg", answer("cat").model_copy(update={"deadline_met": False})))
    assert lines(capsys)[-1] == "  no other request is waiting (63.2 ms, too late)"


def test_json_has_one_line_with_the_whole_answer_per_photo(capsys: pytest.CaptureFixture[str]) -> None:
    show("json", ("a.jpg", answer("cat")), ("b.jpg", answer("dog")))
    first, second = map(json.loads, lines(capsys))
    assert first == {"photo": "a.jpg", **answer("cat").model_dump(mode="json")}
    assert second["photo"] == "b.jpg"


def test_csv_has_a_header_and_a_row_for_each_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    show("csv", ("a, b.jpg", answer("cat", 'a "dog"')))
    header, first, second = csv.reader(lines(capsys))
    assert header[:4] == ["photo", "rank", "label", "probability"]
    assert first == ["a, b.jpg", "1", "cat", "0.5", "12", "0.7", "2.193", "63.2", "True"]
    assert second[:4] == ["a, b.jpg", "2", 'a "dog"', "0.25"]


def test_csv_without_answers_has_only_the_header(capsys: pytest.CaptureFixture[str]) -> None:
    show("csv")
    assert len(lines(capsys)) == 1


def test_a_table_has_a_row_for_each_prediction_and_names_a_photo_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show("table", ("[bold]a.jpg", answer("[red]cat", "dog")), (f"{'long/' * 20}b.jpg", answer("cat")))
    header, *rows = lines(capsys)
    assert header.split() == ["photo", "answer", "probability", "grid-keep", "GFLOPs", "ms"]
    assert [row.split()[:3] for row in rows[:2]] == [
        ["[bold]a.jpg", "[red]cat", "50.0%"],
        ["dog", "25.0%", rows[1].split()[2]],
    ]
    assert rows[0].split()[-3:] == ["12-0.7", "2.19", "63"]
    assert rows[2].split()[0].startswith("…")
    assert rows[2].split()[0].endswith("/b.jpg")
    assert max(map(len, rows)) <= 80


def test_an_interrupted_table_shows_the_answers_so_far(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        with showing("table") as add:
            add(Path("a.jpg"), answer("cat"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "a.jpg" in capsys.readouterr().out


@pytest.mark.parametrize("style", ["table", "text", "json", "csv"])
def test_control_characters_in_file_names_and_labels_are_not_printed(
    style: Format, capsys: pytest.CaptureFixture[str]
) -> None:
    show(style, (f"{TITLE}.jpg", answer(TITLE)))
    assert not set(capsys.readouterr().out) & {"\x1b", "\x07"}


def test_the_default_format_is_a_table_on_a_terminal_and_text_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", StringIO())
    assert default_format() == "text"
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert default_format() == "table"


@pytest.mark.parametrize(
    ("photos", "style", "stdout", "is_shown"),
    [
        (2, "table", Terminal(), True),
        (2, "json", StringIO(), True),
        (2, "json", Terminal(), False),  # the bar would appear between the lines of output
        (1, "table", Terminal(), False),
    ],
)
def test_progress_of_several_photos_is_shown_unless_answers_are_written_to_the_same_terminal(
    photos: int, style: Format, stdout: StringIO, is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "stdout", stdout)
    with progress(photos, style) as advance:
        advance()
        print("an answer")
    assert ("classifying" in stderr.getvalue()) == is_shown
    assert stdout.getvalue().endswith("an answer\n")


def test_progress_is_not_shown_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(9, "table") as advance:
        advance()
    assert capsys.readouterr().err == ""
