import pytest

from models.files.checkpoint_errors import (
    CheckpointMismatchError,
    UnreadableCheckpointError,
    prefixed_errors,
    printable_text,
)


def test_control_characters_are_shown_escaped() -> None:
    assert printable_text("a\nb\x1b[31m\x00\u202e\udcff") == r"a\nb\x1b[31m\x00\u202e\udcff"
    assert printable_text("ü … 日本") == "ü … 日本"


@pytest.mark.parametrize("at_most", [10, 11])
def test_a_long_text_is_shortened_to_its_two_ends(at_most: int) -> None:
    text = printable_text("start" + "x" * 10_000 + "the end", at_most)
    assert len(text) == at_most
    assert text.startswith("start…")
    assert text.endswith(" end")
    assert printable_text("x" * at_most, at_most) == "x" * at_most


@pytest.mark.parametrize("kind", [UnreadableCheckpointError, CheckpointMismatchError])
def test_prefixed_errors_adds_the_name_to_the_error_in_one_line(kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^a\\nb: no\\tgood$"), prefixed_errors("a\nb"):
        raise kind("no\tgood")
    with pytest.raises(kind, match=r"^'': no such file$"), prefixed_errors(""):
        raise kind("no such file")
