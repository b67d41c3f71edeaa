"""Random crops of training pictures, and the same crops of maps over the pictures."""

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as pictures

from models.subnetwork import Interpolation

# Up to this input side, pictures count as small: they are padded and cropped, rather than a random part rescaled.
PADDED_CROP_SIDE_PX = 64
# Bounds of the ratio of width to height of the part that is cropped from a larger picture.
RATIO = [3 / 4, 4 / 3]


def crop_padding(side: int) -> int:
    """Return by how many pixels a small picture is padded on each side before a part of its own size is cropped."""
    return side // 8


class RandomCrop:
    """Crop a random part of a picture to a square of `side` pixels, and mirror it with probability 1/2."""

    def __init__(self, side: int, smallest: float, interpolation: Interpolation) -> None:
        """Create a crop.

        Args:
            side: side of the square in pixels.
            smallest: smallest share of the picture's area that is shown; not used for small pictures.
            interpolation: for larger pictures; small ones are resized bicubically.
        """
        self.side, self.smallest, self.mode = side, smallest, InterpolationMode(interpolation)

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Return the square."""
        return self.take(picture)[0]

    def take(self, picture: Image.Image) -> tuple[Image.Image, Tensor]:
        """Return the square and the part of the picture that it shows.

        Returns:
            The square; and (5,) float32: its left, top, right and bottom as fractions of the picture's width and
            height, below 0 or above 1 in the padding of a small picture, then 1 if the square is mirrored, else 0.
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
    """Cut from each map the part that its crop shows, as RoIAlign does (He et al., ICCV 2017).

    Args:
        maps: (B, C, h, w) float, each over a whole picture; taken to be 0 beyond it.
        crops: (B, 5), as `RandomCrop.take` returns them.
        side: cells per side of the result.

    Returns:
        (B, C, side, side).
    """
    height, width = maps.shape[2:]
    edges = crops[:, :4] * crops.new_tensor([width, height, width, height])
    index = torch.arange(len(maps), device=maps.device)
    cut: Tensor = roi_align(maps, torch.column_stack([index, edges]), side, aligned=True)
    return torch.where(crops[:, 4].bool().view(-1, 1, 1, 1), cut.flip(3), cut)
