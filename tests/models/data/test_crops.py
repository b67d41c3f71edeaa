import numpy as np
import pytest
import torch
from PIL import Image

from models.data.crops import RandomCrop, crop_maps


def gradient(width: int, height: int) -> Image.Image:
    """Draw a picture whose red encodes the column and whose green encodes the row, as fractions of 200."""
    columns, rows = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((200 * np.stack([columns, rows, 0 * rows], axis=2)).astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(300, 200), (90, 240)])
def test_a_crop_reports_which_part_of_the_picture_it_shows(width: int, height: int) -> None:
    torch.manual_seed(0)
    crop, seen = RandomCrop(96, 0.08, "bicubic"), set()
    for _ in range(20):
        square, place = crop.take(gradient(width, height))
        left, top, right, bottom, mirrored = place.tolist()
        seen.add(mirrored)
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        pixels = np.asarray(square)[:, :: -1 if mirrored else 1].astype(float) / 200
        shares = (np.arange(96) + 0.5) / 96
        assert pixels.shape == (96, 96, 3)
        assert np.abs(pixels[48, 4:-4, 0] - (left + (right - left) * shares)[4:-4]).max() < 0.015
        assert np.abs(pixels[4:-4, 48, 1] - (top + (bottom - top) * shares)[4:-4]).max() < 0.015
    assert seen == {0.0, 1.0}


def test_a_small_crop_is_shifted_into_the_padding_of_its_picture() -> None:
    torch.manual_seed(0)
    crop, lefts, tops = RandomCrop(16, 0.08, "bicubic"), set(), set()
    for _ in range(200):
        square, place = crop.take(Image.new("RGB", (32, 64), "white"))  # 16 by 32 px once resized
        left, top, right, bottom, mirrored = place.tolist()
        lefts.add(left * 16)
        tops.add(top * 32)
        assert (right - left, bottom - top) == (1, 0.5)
        dark = np.asarray(square)[8, :: -1 if mirrored else 1, 0] == 0
        assert dark.tolist() == [not 0 <= left * 16 + column < 16 for column in range(16)]
    assert lefts == set(range(-2, 3))
    assert tops == set(range(-2, 19))


def test_a_map_is_cropped_and_mirrored_like_its_picture() -> None:
    maps = torch.arange(16.0).view(1, 1, 4, 4).repeat(3, 1, 1, 1)
    maps[2] += 100
    crops = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0.25, 0.5, 0.75, 1, 1]])
    whole, mirrored, corner = crop_maps(maps, crops, 4)[:, 0]
    assert torch.equal(whole, maps[0, 0])
    assert torch.equal(mirrored, maps[0, 0].flip(1))
    assert torch.equal(crop_maps(maps, crops, 2)[2, 0], torch.tensor([[110.0, 109.0], [114.0, 113.0]]))
    # The map is linear between the centres of its cells: columns 1.25, 1.75, 2.25, 2.75 less half a cell, mirrored.
    torch.testing.assert_close(corner[0], torch.tensor([2.25, 1.75, 1.25, 0.75]) + 4 * 1.75 + 100)


def test_a_map_is_zero_beyond_its_edges() -> None:
    beyond = crop_maps(torch.ones(1, 1, 4, 4), torch.tensor([[-1.0, 0.0, 1.0, 1.0, 0.0]]), 8)
    assert beyond[0, 0, 4].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
