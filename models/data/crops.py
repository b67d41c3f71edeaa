"""Which part of a picture a training image shows, and the same part of a map over the picture."""

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as pictures

from models.subnetwork import Interpolation

# Inputs up to this side are small pictures already: crop them with padding rather than rescale a random part.
PADDED_CROP_SIDE_PX = 64
# Ratio of width to height of the part of a larger picture that is shown.
RATIO = [3 / 4, 4 / 3]


def crop_padding(side: int) -> int:
    """Tell by how many pixels a small picture is padded before a part of its own size is cropped from it."""
    return side // 8


class RandomCrop:
    """Crop a random part of a picture to a square of `side` pixels, and mirror every other by chance."""

    def __init__(self, side: int, smallest: float, interpolation: Interpolation) -> None:
        """Hold how to crop.

        Args:
            side: of the square, in pixels.
            smallest: share of the picture's area that is shown at least; small pictures are not cropped so.
            interpolation: of larger pictures.
        """
        self.side, self.smallest, self.mode = side, smallest, InterpolationMode(interpolation)

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Give the square."""
        return self.take(picture)[0]

    def take(self, picture: Image.Image) -> tuple[Image.Image, Tensor]:
        """Give the square and which part of the picture it shows.

        Returns:
            The square; and its left, top, right and bottom in fractions of the picture's width and height, below 0 or
            above 1 in the padding of a small one, and 1 where it is mirrored, or else 0: (5,) float32.
        """
        is_small = self.side <= PADDED_CROP_SIDE_PX
        if is_small:
            picture = pictures.resize(picture, [self.side], InterpolationMode.BICUBIC)
        width, height = picture.size
        if is_small:
            padding, rows, columns = crop_padding(self.side), self.side, self.side
            top = int(torch.randint(height + 2 * padding - rows + 1, (1,))) - padding
            left = int(torch.randint(width + 2 * padding - columns + 1, (1,))) - padding
        else:
            top, left, rows, columns = RandomResizedCrop.get_params(picture, [self.smallest, 1.0], RATIO)
        square = pictures.resized_crop(picture, top, left, rows, columns, [self.side, self.side], self.mode)
        mirrored = bool(torch.rand(1) < 0.5)
        edges = (left / width, top / height, (left + columns) / width, (top + rows) / height)
        return pictures.hflip(square) if mirrored else square, torch.tensor([*edges, mirrored])


def crop_maps(maps: Tensor, crops: Tensor, side: int) -> Tensor:
    """Cut from each map what its crop shows, as RoIAlign does (He et al., ICCV 2017).

    Args:
        maps: (B, C, h, w) float, each over a whole picture; 0 is taken for what lies beyond it.
        crops: (B, 5), as `RandomCrop.take` gives them.
        side: cells per side of what is returned.

    Returns:
        (B, C, side, side).
    """
    height, width = maps.shape[2:]
    edges = crops[:, :4] * crops.new_tensor([width, height, width, height])
    index = torch.arange(len(maps), device=maps.device)
    cut: Tensor = roi_align(maps, torch.column_stack([index, edges]), side, aligned=True)
    return torch.where(crops[:, 4].bool().view(-1, 1, 1, 1), cut.flip(3), cut)
