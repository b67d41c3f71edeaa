"""Folders of labelled images: their classes, their splits, and the handling of images that cannot be read.

An unreadable image keeps its place, so that every batch keeps its size and every process its number of batches: it
becomes blank and has no label. Evaluation skips it; training takes the next readable image instead. Whether a file can
be read is found out when it is first read, as in timm: decoding everything beforehand would cost a pass over the data.
"""

import copy
import hashlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from models.data.images import BLANK, Transform, UnreadableImageError, evaluation_transform, load_rgb
from models.defaults import MAX_BAD_IMAGES
from models.errors import DataError
from models.processes import gather, is_first
from models.subnetwork import SuperViTConfig

NO_LABEL = -100  # the label that torch's cross_entropy ignores
MOST_NAMES = 3

Sample = tuple[Tensor, int]


class ImageSet(Dataset[Sample]):
    """Images with their labels. An unreadable one is recorded, and from then on blank and without a label.

    Attributes:
        folder: the folder of class folders.
        files: path and label of each image.
        transform: from an RGB picture to a tensor.
        max_bad_images: fraction of the images that may be unreadable.
        skipped: number of skipped files by extension.
        is_bad: (M,) bool, the images found to be unreadable, in memory shared with worker processes.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[tuple[str, int]],
        transform: Transform,
        max_bad_images: float,
        skipped: Counter[str] | None = None,
    ) -> None:
        self.folder, self.files, self.transform, self.max_bad_images = folder, files, transform, max_bad_images
        self.skipped = skipped or Counter()
        self.is_bad = torch.zeros(len(files), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]
        self._is_reported = self.is_bad.clone()

    def __len__(self) -> int:
        """Count the images, unreadable ones included."""
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """Return an image and its label, or a blank image and NO_LABEL.

        Raises:
            DataError: too many images cannot be read.
        """
        path, label = self.files[index]
        if not self.is_bad[index]:
            try:
                return self.transform(load_rgb(path)), label
            except UnreadableImageError as error:
                self.is_bad[index] = True
                self._check(f"{error}; ")
        return self.transform(BLANK), NO_LABEL

    def with_transform(self, transform: Transform) -> "ImageSet":
        """Return the same images, with the same record of unreadable ones, through another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def report(self) -> None:
        """Merge what all processes found unreadable; the first names it on stderr, once. All processes must call it.

        Raises:
            DataError: too many images cannot be read.
        """
        for marks in gather(self.is_bad):
            self.is_bad.logical_or_(marks)
        self._check()
        if not torch.equal(self.is_bad, self._is_reported) and is_first():
            print(f"\nskipped: {self._complaint()}", file=sys.stderr)  # below a progress bar
        self._is_reported.copy_(self.is_bad)

    def report_skipped_files(self) -> None:
        """Print on stderr, from the first process, how many files were skipped for their extensions."""
        if self.skipped and is_first():
            kinds = ", ".join(
                f"{count} {extension or 'without extension'}" for extension, count in self.skipped.most_common()
            )
            print(f"{self.folder}: skipped files with unsupported extensions: {kinds}", file=sys.stderr)

    def _check(self, newest: str = "") -> None:
        if int(self.is_bad.sum()) > self.max_bad_images * len(self):
            limit = f"--max-bad-images {self.max_bad_images:g}"
            raise DataError(f"{newest}{self._complaint()}, more than {limit} allows")

    def _complaint(self) -> str:
        bad = [os.path.relpath(self.files[index][0], self.folder) for index in self.is_bad.nonzero()[:, 0].tolist()]
        return f"{len(bad)} of {len(self)} images of {self.folder} cannot be read: {name_first(bad)}"


class TrainingSamples(Dataset[tuple[Tensor, Tensor | int]]):
    """Images to train on. The next readable image, most likely of the same class, replaces an unreadable one."""

    def __init__(self, images: ImageSet, targets: Tensor | None) -> None:
        """Create the samples.

        Args:
            images: the images, with a training transform.
            targets: (M, classes) probabilities that replace the labels; None to keep the labels.
        """
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        """Count the images, unreadable ones included."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | int]:
        """Return an image and its target.

        Raises:
            DataError: too many images cannot be read.
        """
        image, target, _ = self.take(index)
        return image, target

    def take(self, index: int) -> tuple[Tensor, Tensor | int, int]:
        """Return an image, its target, and its index in `images`.

        Raises:
            DataError: too many images cannot be read, or all of them.
        """
        for place in itertools.chain(range(index, len(self)), range(index)):
            image, label = self.images[place]
            if label != NO_LABEL:
                return image, label if self.targets is None else self.targets[place], place
        raise DataError(f"{self.images.folder}: no image can be read")

    def report(self) -> None:
        """Report unreadable images, as `ImageSet.report` does."""
        self.images.report()


def list_classes(folder: Path) -> tuple[str, ...]:
    """Return the names of the class folders of `folder`, in the order of their labels.

    Raises:
        DataError: there is no such folder, it holds no class folders, or the name of one is not UTF-8.
    """
    from torchvision.datasets.folder import find_classes  # its import takes seconds, and a server does not need it

    try:
        names = tuple(find_classes(folder)[0])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{folder}: not a folder of class folders: {error}") from error
    for name in names:
        if not is_unicode(name):
            raise DataError(f"{folder}: the class folder {name!r} has a name that is not UTF-8; rename it")
    return names


def is_unicode(name: str) -> bool:
    """Return whether a file's name is text, without bytes that Python could only pass through as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def name_first(names: Sequence[str]) -> str:
    """List the first few names, and the number of the others."""
    others = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + others


def difference(expected: Sequence[str], found: Sequence[str]) -> str:
    """Describe which class folders are missing and which are extra."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    parts = (("missing", missing), ("extra", extra))
    return "; ".join(f"{len(names)} {kind}: {name_first(names)}" for kind, names in parts if names)


def digest_samples(images: ImageSet) -> str:
    """Return a digest of the files' names, labels and order; the files' contents do not count."""
    digest = hashlib.sha256()
    for path, label in images.files:
        digest.update(os.fsencode(f"{os.path.relpath(path, images.folder)}\0{label}\0"))
    return digest.hexdigest()


def open_folder(folder: Path, transform: Transform, max_bad_images: float = MAX_BAD_IMAGES) -> ImageSet:
    """Open a folder of class folders of images, labelled in the order of `list_classes`.

    Raises:
        DataError: the folder does not exist or has no usable class folders, or a class has no images.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    classes = list_classes(folder)
    skipped: Counter[str] = Counter()

    def is_image(path: str) -> bool:
        extension = os.path.splitext(path)[1].lower()  # noqa: PTH122 - for a million files, in a tenth of Path's time
        skipped.update([extension] * (extension not in IMG_EXTENSIONS))
        return extension in IMG_EXTENSIONS

    labels = {name: label for label, name in enumerate(classes)}
    files = make_dataset(folder, labels, is_valid_file=is_image, allow_empty=True)
    empty = sorted(set(classes) - {classes[label] for _, label in files})
    if empty:
        raise DataError(f"{folder}: class folders without images ({', '.join(IMG_EXTENSIONS)}): {name_first(empty)}")
    return ImageSet(folder, files, transform, max_bad_images, skipped)


def open_training_data(
    data: Path,
    config: SuperViTConfig,
    transform: Transform,
    holdout: float,
    seed: int,
    max_bad_images: float = MAX_BAD_IMAGES,
) -> tuple[ImageSet, ImageSet]:
    """Open `data`/train to train on, and `data`/val, or else a part held out from train, to validate on.

    A test/ folder is never read, so that it stays a test.

    Args:
        data: folder with train/ and perhaps val/, each of class folders.
        config: architecture, for the transform of the validation images.
        transform: transform of the training images.
        holdout: fraction of train/ to hold out where there is no val/, the same of each class; each class keeps at
            least an image in train/.
        seed: seed of the choice of held-out images.
        max_bad_images: fraction of the images of each set that may be unreadable.

    Raises:
        DataError: a folder is unusable, train/ has a single class, val/ has other classes than train/, or there is no
            val/ and no class has a second image.
    """
    classes = list_classes(data / "train")
    training = open_folder(data / "train", transform, max_bad_images)
    if len(classes) < 2:
        raise DataError(f"{data / 'train'}: must have at least two class folders")
    if (data / "val").is_dir():
        if differences := difference(classes, list_classes(data / "val")):
            raise DataError(f"{data / 'val'}: its class folders differ from those of train/: {differences}")
        return training, open_folder(data / "val", evaluation_transform(config), max_bad_images)
    files = training.files
    order = stratified_order([label for _, label in files], seed)
    kept = set({files[index][1]: index for index in order}.values())  # the last of each class stays in train/
    spare = [index for index in order if index not in kept]
    held_out = set(spare[: max(1, round(holdout * len(files)))])
    if not held_out:
        raise DataError(f"{data / 'train'}: no class has enough images to hold one out; add a val/ folder")
    parts = [[file for index, file in enumerate(files) if (index in held_out) == is_watched] for is_watched in (0, 1)]
    return (
        ImageSet(data / "train", parts[0], transform, max_bad_images, training.skipped),
        ImageSet(data / "train", parts[1], evaluation_transform(config), max_bad_images),
    )


def stratified_order(labels: Sequence[int], seed: int) -> list[int]:
    """Order indices at random, with every prefix holding the classes in proportion, to within an image of each."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    sizes, seen = Counter(labels), Counter[int]()
    place = {}
    for index in shuffled:
        place[index] = (seen[labels[index]] + 0.5) / sizes[labels[index]]
        seen[labels[index]] += 1
    return sorted(shuffled, key=place.__getitem__)
