"""Draws what a sub-network looked at: a photo under its patch grid, and the patches that each pruning block kept."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from models.data.images import CODEC_ERRORS, to_rgb
from models.files.atomic import write_atomically
from models.files.checkpoint_errors import printable_text
from service.errors import CommandError
from service.http.schemas import ExplainAnswer

SCALE = 2  # pixels of the file per pixel of the layout, which keeps the drawing sharp on any screen
PANEL_PX, GAP_PX, MARGIN_PX = 300, 24, 32
MAX_COLUMNS = 4
TITLE_PX, TEXT_PX = 26, 15
PAPER, INK, FAINT = (19, 21, 24), (240, 242, 243), (150, 156, 163)  # dark, or white photos would have no edge
BAR, TRACK = (64, 196, 178), (44, 48, 53)
# Opacity of the background colour over what the model does not see, and over pruned patches, 0..1.
OUTSIDE_SHARE, DROPPED_SHARE = 0.6, 0.82
# Opacity of the white lines between patches, and around the kept patches, 0..1.
LINE_SHARE, EDGE_SHARE = 0.14, 0.85

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class View:
    """A photo as it is drawn, and the square of it that the model sees.

    Attributes:
        photo: the upright photo; its longer side is that of a panel.
        square: the centred square that the model sees: left, top, right, bottom in pixels, half open.
        grid: patches per side of the square.
    """

    photo: Image.Image
    square: tuple[float, float, float, float]
    grid: int

    @classmethod
    def of(cls, photo: Image.Image, seen_share: float, grid: int) -> "View":
        """Scale a photo to a panel.

        Args:
            photo: the upright photo.
            seen_share: side of the square as a share of the photo's shorter side, 0..1.
            grid: patches per side of the square.
        """
        scale = SCALE * PANEL_PX / max(photo.size)
        width, height = (max(1, round(scale * length)) for length in photo.size)
        half = min(width, height) * seen_share / 2
        square = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
        return cls(photo.resize((width, height), Image.Resampling.LANCZOS), square, grid)

    def patch(self, number: int) -> Box:
        """Return the box of a patch, numbered row by row from 0."""
        left, top, right, _ = self.square
        row, column = divmod(number, self.grid)
        step = (right - left) / self.grid
        return (
            round(left + column * step),
            round(top + row * step),
            round(left + (column + 1) * step),
            round(top + (row + 1) * step),
        )


def draw(data: bytes, answer: ExplainAnswer, path: Path) -> None:
    """Write a PNG file: the photo under its patch grid, and the patches that each pruning block kept.

    Args:
        data: the bytes of the photo.
        answer: the server's answer, with its explanation.
        path: the file to write.

    Raises:
        CommandError: Pillow cannot read the photo, or the file cannot be written.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            photo = to_rgb(opened)
    except (*CODEC_ERRORS, Image.DecompressionBombError) as error:
        raise CommandError("the photo was classified but cannot be drawn: Pillow cannot read it") from error
    view = View.of(photo, answer.explanation.seen_share, answer.subnetwork.patch_grid)
    total = view.grid**2
    panels = [(draw_patches(view, range(total)), f"{view.grid} x {view.grid} patches", "the whole input")]
    for pruning in answer.explanation.prunings:
        left = f"{len(pruning.kept)} of {total} kept ({len(pruning.kept) / total:.0%})"
        panels.append((draw_patches(view, pruning.kept), f"Block {pruning.block}", left))
    written = io.BytesIO()
    _sheet(panels, answer).save(written, "PNG")
    try:
        write_atomically(path, written.getvalue())
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}") from error


def draw_patches(view: View, kept: Sequence[int]) -> Image.Image:
    """Draw the photo, dimmed outside the square that the model sees and at pruned patches."""
    size = view.photo.size
    veil, lines = Image.new("L", size, round(255 * OUTSIDE_SHARE)), Image.new("L", size, 0)
    dim, line = ImageDraw.Draw(veil), ImageDraw.Draw(lines)
    for number in range(view.grid**2):
        left, top, right, bottom = view.patch(number)
        is_kept = number in kept
        dim.rectangle((left, top, right - 1, bottom - 1), fill=0 if is_kept else round(255 * DROPPED_SHARE))
        line.rectangle((left, top, right, bottom), outline=round(255 * LINE_SHARE), width=SCALE)
    for number in kept:
        for neighbour, edge in _edges(view, number):
            if neighbour not in kept:
                line.line(edge, fill=round(255 * EDGE_SHARE), width=SCALE)
    drawn = Image.composite(Image.new("RGB", size, PAPER), view.photo, veil)
    drawn.paste((255, 255, 255), mask=lines)
    return drawn


def _edges(view: View, number: int) -> Iterator[tuple[int | None, Box]]:
    """Yield the neighbour across each edge of a patch, None at the border of the square, and the edge as a line."""
    left, top, right, bottom = view.patch(number)
    row, column = divmod(number, view.grid)
    last = view.grid - 1
    yield number - view.grid if row else None, (left, top, right, top)
    yield number + view.grid if row < last else None, (left, bottom, right, bottom)
    yield number - 1 if column else None, (left, top, left, bottom)
    yield number + 1 if column < last else None, (right, top, right, bottom)


def _sheet(panels: Sequence[tuple[Image.Image, str, str]], answer: ExplainAnswer) -> Image.Image:
    """Lay out the panels below the answer, at most MAX_COLUMNS in a row."""
    columns = min(MAX_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    cell_width, cell_height = panels[0][0].width // SCALE, panels[0][0].height // SCALE + 52
    head = 108
    width = max(640, 2 * MARGIN_PX + columns * cell_width + (columns - 1) * GAP_PX)
    height = 2 * MARGIN_PX + head + rows * cell_height + (rows - 1) * GAP_PX
    sheet = Image.new("RGB", (SCALE * width, SCALE * height), PAPER)
    _write_answer(sheet, answer, width)
    for index, (panel, title, text) in enumerate(panels):
        row, column = divmod(index, columns)
        left = MARGIN_PX + column * (cell_width + GAP_PX)
        top = MARGIN_PX + head + row * (cell_height + GAP_PX)
        sheet.paste(panel, (SCALE * left, SCALE * top))
        below = top + panel.height // SCALE
        _write(sheet, (left, below + 10), title, TEXT_PX + 1, INK)
        _write(sheet, (left, below + 31), text, TEXT_PX - 1, FAINT)
    return sheet


def _write_answer(sheet: Image.Image, answer: ExplainAnswer, width: int) -> None:
    best, subnetwork = answer.predictions[0], answer.subnetwork
    _write(sheet, (MARGIN_PX, MARGIN_PX - 4), printable_text(best.label), TITLE_PX, INK)
    _write(sheet, (width - MARGIN_PX, MARGIN_PX - 4), f"{best.probability:.1%}", TITLE_PX, INK, anchor="ra")
    bar = [MARGIN_PX, MARGIN_PX + 40, width - MARGIN_PX, MARGIN_PX + 46]
    pencil = ImageDraw.Draw(sheet)
    pencil.rounded_rectangle([SCALE * edge for edge in bar], 3 * SCALE, TRACK)
    bar[2] = MARGIN_PX + max(6, round(best.probability * (width - 2 * MARGIN_PX)))
    pencil.rounded_rectangle([SCALE * edge for edge in bar], 3 * SCALE, BAR)
    cost = f"grid {subnetwork.patch_grid} at keep rate {subnetwork.keep_rate:g}, {answer.gflops:.3g} GFLOPs"
    _write(sheet, (MARGIN_PX, MARGIN_PX + 60), f"{cost}, by {printable_text(answer.model.name)}", TEXT_PX, FAINT)


def _write(
    sheet: Image.Image, place: tuple[int, int], text: str, size: int, colour: tuple[int, int, int], anchor: str = "la"
) -> None:
    font = ImageFont.load_default(SCALE * size)
    ImageDraw.Draw(sheet).text((SCALE * place[0], SCALE * place[1]), text, colour, font, anchor)
