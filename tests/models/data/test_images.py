import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from models.data.augmentation import Augmentation, training_transform
from models.data.images import UnreadableImageError, evaluation_transform, load_rgb, normalise, to_rgb
from models.subnetwork import SuperViTConfig
from models.supervit import DEIT_SMALL, LVVIT_MICRO, LVVIT_SMALL

PLAIN = Augmentation(None, 0.0)
WHITE, RED = (255, 255, 255), (255, 0, 0)


def saved(path: Path, image: Image.Image, **options: object) -> Image.Image:
    """Write the image to a file and return it decoded from there."""
    image.save(path, **options)  # type: ignore[arg-type] # Pillow's options are untyped
    with Image.open(path) as decoded:
        decoded.load()
        return decoded


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def colours(image: Image.Image) -> list[tuple[int, int, int]]:
    assert image.mode == "RGB"
    array = np.asarray(image).reshape(-1, 3)
    return [(int(r), int(g), int(b)) for r, g, b in array]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3)),
        (Image.new("L", (1, 1), 77), (77, 77, 77)),
        (Image.new("1", (1, 1), 1), WHITE),
        (Image.new("LA", (1, 1), (40, 255)), (40, 40, 40)),
        (Image.new("LA", (1, 1), (40, 0)), WHITE),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 255)), RED),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 51)), (255, 204, 204)),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), RED),
        (Image.new("I;16", (1, 1), 65535), WHITE),
        (Image.new("I;16", (1, 1), 128 * 256), (128, 128, 128)),
        (Image.new("I", (1, 1), 64 * 256), (64, 64, 64)),
        (Image.new("I", (1, 1), -5), (0, 0, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_every_mode_becomes_the_rgb_that_a_viewer_shows(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert colours(to_rgb(image)) == [expected]


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return image


def test_a_palette_is_looked_up_and_its_transparent_colour_shows_white(tmp_path: Path) -> None:
    assert colours(to_rgb(saved(tmp_path / "p.png", palette()))) == [RED, (0, 0, 255)]
    assert colours(to_rgb(saved(tmp_path / "t.png", palette(), transparency=1))) == [RED, WHITE]
    assert colours(to_rgb(saved(tmp_path / "t.gif", palette(), transparency=0))) == [WHITE, (0, 0, 255)]


def test_a_transparent_colour_of_a_true_colour_png_shows_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), (9, 8, 7))
    assert colours(to_rgb(saved(tmp_path / "t.png", image, transparency=(9, 8, 7)))) == [RED, WHITE]


def test_a_16_bit_grey_png_keeps_its_shades(tmp_path: Path) -> None:
    levels = np.array([[0, 1000, 32768, 65535]], dtype=np.uint16)
    decoded = saved(tmp_path / "grey.png", Image.fromarray(levels))
    assert decoded.mode == "I;16"
    assert colours(to_rgb(decoded)) == [(value, value, value) for value in (0, 3, 128, 255)]


def test_a_transparent_level_of_a_16_bit_grey_png_shows_white(tmp_path: Path) -> None:
    levels = np.array([[0, 1, 32768]], dtype=np.uint16)
    decoded = saved(tmp_path / "grey.png", Image.fromarray(levels), transparency=1)
    assert colours(to_rgb(decoded)) == [(0, 0, 0), WHITE, (128, 128, 128)]


def test_a_photo_taken_sideways_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), RED)
    image.paste((0, 0, 255), (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    upright = to_rgb(saved(tmp_path / "photo.jpg", image, exif=exif, quality=95, subsampling=0))
    assert upright.size == (8, 16)
    top, bottom = np.asarray(upright)[0, 0], np.asarray(upright)[-1, -1]
    assert top[0] > 200 > 50 > top[2]
    assert bottom[2] > 200 > 50 > bottom[0]


def test_an_rgb_picture_is_not_copied_and_outlives_its_file(tmp_path: Path) -> None:
    noise(16, 8).save(tmp_path / "rgb.png")
    with Image.open(tmp_path / "rgb.png") as image:
        assert to_rgb(image) is image
    assert colours(image) == colours(noise(16, 8))


@pytest.mark.parametrize(("config", "resized"), [(DEIT_SMALL, 256), (LVVIT_SMALL, 248), (LVVIT_MICRO, 32)])
@pytest.mark.parametrize("size", [(500, 375), (333, 499), (224, 224), (40, 30)])
def test_the_evaluation_transform_matches_the_standard_one_of_torchvision(
    config: SuperViTConfig, resized: int, size: tuple[int, int]
) -> None:
    picture = noise(*size)
    standard = transforms.Compose(
        [
            transforms.Resize(resized, interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(config.image_side),
            transforms.ToTensor(),
            transforms.Normalize(config.mean, config.std),
        ]
    )
    pixels = evaluation_transform(config)(picture)
    assert pixels.dtype == torch.uint8
    torch.testing.assert_close(normalise(pixels[None], config)[0], standard(picture))


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (1, 20_000)])
def test_pictures_of_any_shape_become_squares(size: tuple[int, int]) -> None:
    for config in (DEIT_SMALL, LVVIT_MICRO):
        side = config.image_side
        assert evaluation_transform(config)(noise(*size)).shape == (3, side, side)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_a_very_thin_picture_is_cropped_before_it_is_resized(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    resize, asked = Image.Image.resize, []

    def record(image: Image.Image, to: tuple[int, int], *rest: Any) -> Image.Image:  # noqa: ANN401 - passed on
        asked.append(to)
        return resize(image, (1, 1) if max(to) > 10_000 else to, *rest)

    monkeypatch.setattr(Image.Image, "resize", record)
    evaluation_transform(DEIT_SMALL)(noise(*size))
    assert [sorted(to) for to in asked] == [[256, 8 * 256]]


def test_a_long_picture_is_cropped_to_its_middle() -> None:
    strip = Image.new("RGB", (20_000, 2), RED)
    strip.paste((0, 0, 255), (9_990, 0, 10_010, 2))
    pixels = evaluation_transform(LVVIT_MICRO)(strip)
    assert pixels[2].min() == 255
    assert pixels[0].max() == 0


def test_values_are_scaled_and_normalised_by_channel() -> None:
    config = replace(DEIT_SMALL, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    expected = torch.tensor([[-1.0, 1.0], [-1.0, 3.0], [0.0, 1.0]]).view(1, 3, 1, 2)
    torch.testing.assert_close(normalise(pixels, config), expected)


def test_the_strongest_augmentation_never_fails() -> None:
    strongest = training_transform(LVVIT_MICRO, Augmentation("rand-m10-n15-inc1", 0.0))
    picture = Image.new("RGB", (32, 32), (200, 90, 10))
    assert all(strongest(picture).shape == (3, 32, 32) for _ in range(20))


@pytest.mark.parametrize("augmentation", [PLAIN, Augmentation("rand-m9-mstd0.5-inc1", 1.0)])
@pytest.mark.parametrize("config", [LVVIT_MICRO, replace(DEIT_SMALL, patch_grids=(4, 8))], ids=["small", "large"])
def test_training_images_vary_and_have_the_size_of_the_model(
    config: SuperViTConfig, augmentation: Augmentation
) -> None:
    torch.manual_seed(0)
    transform = training_transform(config, augmentation)
    first, second = transform(noise(50, 70)), transform(noise(50, 70))
    assert first.shape == second.shape == (3, config.image_side, config.image_side)
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)


def test_random_erasing_at_probability_one_erases() -> None:
    grey = Image.new("RGB", (32, 32), (124, 116, 104))
    whole = training_transform(replace(LVVIT_MICRO, mean=(0.0, 0.0, 0.0)), PLAIN)(grey)
    erased = training_transform(replace(LVVIT_MICRO, mean=(0.0, 0.0, 0.0)), Augmentation(None, 1.0))(grey)
    assert len(set(erased.flatten().tolist())) > len(set(whole.flatten().tolist())) + 10


def test_about_half_of_the_training_images_are_mirrored() -> None:
    picture = Image.new("RGB", (128, 128), RED)
    picture.paste((0, 0, 255), (64, 0, 128, 128))
    for config in (LVVIT_MICRO, replace(DEIT_SMALL, patch_grids=(4, 8))):  # cropped with padding, and rescaled
        torch.manual_seed(0)
        transform = training_transform(config, PLAIN)
        images = [transform(picture) for _ in range(100)]
        mirrored = sum(bool(image[0, :, :16].mean() < image[0, :, -16:].mean()) for image in images)
        assert 30 < mirrored < 70


def test_augmentation_fills_uncovered_pixels_with_the_mean_colour() -> None:
    """A picture of only that colour therefore stays so when it is rotated, shifted or sheared."""
    config = replace(DEIT_SMALL, patch_grids=(4, 8), mean=(0.8, 0.4, 0.2))
    transform = training_transform(config, Augmentation("rand-m10-n1-p1", 0.0))
    picture = Image.new("RGB", (128, 128), (204, 102, 51))
    for seed in range(60):
        torch.manual_seed(seed)
        random.seed(seed)
        image = transform(picture)
        assert float((image.amax(dim=(1, 2)) - image.amin(dim=(1, 2))).max()) < 1e-5


def broken_text(path: Path) -> None:
    path.write_text("no picture")


def broken_end(path: Path) -> None:
    noise(60, 60).save(path)
    path.write_bytes(path.read_bytes()[:3000])


def broken_size(path: Path) -> None:
    noise(60, 60).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height: more pixels than Pillow decodes
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def broken_palette(path: Path) -> None:
    palette().save(path)
    data = path.read_bytes()
    start = data.index(b"PLTE") - 4
    path.write_bytes(data[:start] + data[data.index(b"IDAT") - 4 :])


@pytest.mark.parametrize("spoil", [broken_text, broken_end, broken_size, broken_palette])
def test_a_broken_image_is_named_in_a_one_line_error(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "broken.png"
    spoil(path)
    with pytest.raises(UnreadableImageError, match=f"^{path}: not a readable image") as caught:
        load_rgb(str(path))
    assert "\n" not in str(caught.value)
