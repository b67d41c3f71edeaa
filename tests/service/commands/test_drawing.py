import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.commands.drawing import View, draw, draw_patches
from service.errors import CommandError
from service.http.schemas import ExplainAnswer
from tests.service.wire_answers import ANSWER

WHITE = Image.new("RGB", (200, 100), "white")


def explained(*kept: list[int], grid: int = 4) -> ExplainAnswer:
    prunings = [
        {"block": 3 * index, "kept": numbers, "scores": [0.1] * len(numbers), "keeps_fused": False}
        for index, numbers in enumerate(kept, start=1)
    ]
    subnetwork = ANSWER["subnetwork"] | {"patch_grid": grid}
    explanation = {"seen_share": 0.875, "prunings": prunings}
    return ExplainAnswer.model_validate(ANSWER | {"subnetwork": subnetwork, "explanation": explanation})


def encoded(photo: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    photo.save(file, "JPEG", **options)
    return file.getvalue()


def test_patches_tile_the_centred_square_that_the_model_sees() -> None:
    view = View.of(WHITE, seen_share=0.875, grid=3)
    width, height = view.photo.size
    assert width == 2 * height
    covered = np.zeros((height, width), int)
    for number in range(9):
        left, top, right, bottom = view.patch(number)
        covered[top:bottom, left:right] += 1
    side = round(0.875 * height)
    assert covered.max() == 1
    assert covered.sum() == pytest.approx(side**2, rel=0.01)
    rows, columns = np.nonzero(covered)
    assert rows.mean() == pytest.approx((height - 1) / 2, abs=1)
    assert columns.mean() == pytest.approx((width - 1) / 2, abs=1)
    assert view.patch(0)[:2] == (columns.min(), rows.min())  # numbered row by row
    assert view.patch(1)[0] == view.patch(0)[2]


def test_kept_patches_are_shown_unchanged_and_all_else_is_dimmed() -> None:
    view = View.of(WHITE, seen_share=0.5, grid=2)
    drawn = np.asarray(draw_patches(view, [1])).astype(int)
    middles = []
    for number in range(4):
        left, top, right, bottom = view.patch(number)
        middles.append(drawn[(top + bottom) // 2, (left + right) // 2].max())
    assert middles[1] == 255
    assert max(middles[0], *middles[2:]) < drawn[2, 2].max() < 255  # pruned patches are darker than unseen areas


def test_the_drawing_has_a_panel_for_the_photo_and_one_for_each_pruning_block(tmp_path: Path) -> None:
    widths = []
    for kept in ([], [[0, 1, 2]], [[0, 1, 2], [0]], [[0, 1, 2], [0, 1], [0]]):
        draw(encoded(WHITE), explained(*kept), tmp_path / "out.png")
        with Image.open(tmp_path / "out.png") as drawn:
            assert drawn.format == "PNG"
            widths.append(drawn.width)
    assert widths[0] <= widths[1] < widths[2] < widths[3]


def test_a_photo_is_turned_by_its_exif_orientation_before_it_is_drawn(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    heights = []
    for options in ({}, {"exif": exif}):
        draw(encoded(WHITE, **options), explained([0]), tmp_path / "out.png")
        with Image.open(tmp_path / "out.png") as drawn:
            heights.append(drawn.height)
    assert heights[1] > heights[0]


def test_a_photo_that_cannot_be_read_and_a_file_that_cannot_be_written_raise_a_command_error(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"^the photo was classified but cannot be drawn"):
        draw(b"something that only a server can read", explained(), tmp_path / "out.png")
    with pytest.raises(CommandError, match=r"cannot be written: No such file or directory$"):
        draw(encoded(WHITE), explained(), tmp_path / "missing" / "out.png")
    assert list(tmp_path.iterdir()) == []
