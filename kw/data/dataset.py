"""The images of a split as training and testing read them: by key, transformed, in batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from kw.config.run_schema import BadImagesConfig
from kw.data.archives import Names
from kw.data.channels import Reader
from kw.data.fast import DecodeError, FastTransform, open_fast
from kw.data.faults import TolerantDataset
from kw.data.listing import Listing, Stored, list_folders
from kw.data.reading import DataError
from kw.data.seeding import seeded
from kw.torch_private import shared_bytes

UNREADABLE = -1
"""Label of a test image that cannot be read: no prediction is right."""


class Sample(NamedTuple):
    """One image, as the batch preprocessing expects it."""

    image: Tensor
    """[C, H, W]; uint8, or float32 in units of bytes (``data.pixels: uint16``)"""
    label: Any
    """class, int; where images have several, int8 ``[classes]`` of 0 and 1"""
    key: tuple[int, ...]
    """epoch and index, and where an epoch repeats images the place in it"""


class Samples(list[Any]):
    """The samples of a batch whose images lie in one memory.

    Attributes:
        images: uint8 ``[B, 3, S, S]``.
    """

    def __init__(self, images: Tensor, samples: Iterable[Any]) -> None:
        super().__init__(samples)
        self.images = images


class ImageFolder(TolerantDataset):
    """The images of one split, from a folder or any other listing.

    An item's key is ``(epoch, index)``: the transform draws under a seed made of the dataset's seed
    and that key, whichever worker or process runs it.

    Args:
        root: folder that holds the splits.
        split: folder under ``root``.
        transform: image as ``reader`` gives it -> tensor [C, H, W].
        seed: seed of the transform's random choices.
        training: whether images that cannot be read are replaced; in evaluation each gives a black
            image with the label :data:`UNREADABLE`, so that all are counted and none is right.
        bad_images: the policy for them; without it they raise.
        listing: the split's files; left out, its folders are its classes (:func:`list_folders`).
        reader: reads files; left out, RGB, turned as their EXIF data say.
        fast: for images that it takes, instead of ``transform``.
        batch_shape: shape of all results, which are uint8; batches are then written where they are
            assembled. That of ``fast`` is known.

    Attributes:
        classes: class names; a label is a place in this list.
        labels: int64 array, the label of every image; int8 ``[images, classes]`` of 0 and 1 where
            images have several.

    Raises:
        DataError: the folder is missing or not laid out as expected; or ``fast`` needs a package
            that is not installed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        transform: Callable[[Any], Tensor],
        seed: int = 0,
        training: bool = False,
        bad_images: BadImagesConfig | None = None,
        listing: Listing | None = None,
        reader: Reader | None = None,
        fast: FastTransform | None = None,
        batch_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(seed, training, bad_images or BadImagesConfig(policy="raise"))
        if fast is not None and find_spec("simplejpeg") is None:
            raise DataError("data.decoder fast: install simplejpeg: pip install simplejpeg")
        self.transform, self.fast = transform, fast
        self.batch_shape = (3, *fast.size) if batch_shape is None and fast else batch_shape
        self.reader = reader or Reader(max_pixels=self.bad_images.max_pixels)
        found = list_folders(Path(root), split) if listing is None else listing
        self.folder = Path(root).expanduser()
        self.files: Sequence[Stored] = found.files
        if isinstance(found.files, list):
            self.files = _Paths(self.folder, found.files)
        if (self.folder / split).is_dir():
            self.folder /= split
        self.names = found.names
        self.classes = list(found.classes)
        labels = np.asarray(found.labels)
        self.labels = labels.astype(np.int8 if labels.ndim == 2 else np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> os.PathLike[str] | str:
        """The file of an image, or what names it."""
        if self.names is not None:
            return self.names[index]
        found = self.files[index]
        return found if isinstance(found, Path) else f"{self.folder}, image {index}"

    def __getitems__(self, keys: Sequence[tuple[int, ...]]) -> list[Any]:
        """The samples of a batch; torch's loader calls this method. Their images lie in one memory
        where their shape is known, so that collation copies nothing."""
        if self.batch_shape is None:
            return [self[key] for key in keys]
        images = _batch_memory(len(keys), self.batch_shape)
        reads = [partial(self.read, out=image) for image in images]
        return Samples(images, map(self.get, keys, reads))

    def read(self, index: int, key: tuple[int, ...], out: Tensor | None = None) -> Sample:
        """Read and transform an image.

        Args:
            index: of the image.
            key: of the random choices.
            out: where the result is written; left out, it is allocated.

        Raises:
            BadImageError: the file cannot be read as an image.
        """
        stored = self.files[index]
        if self.fast is not None:
            room = _batch_memory(1, (3, *self.fast.size))[0] if out is None else out
            picture = open_fast(stored, self.reader.max_pixels, self.reader.upright)
            with suppress(DecodeError):  # Pillow judges the damage
                if picture and self.fast(picture, ("image", self.seed, *key), room):
                    return self._sample(room, index, key)
        image = self.reader(stored, self.path(index))
        with seeded("image", self.seed, *key):
            tensor = self.transform(image)
        return self._sample(tensor if out is None else out.copy_(tensor), index, key)

    def _sample(self, image: Tensor, index: int, key: tuple[int, ...]) -> Sample:
        return Sample(image, _item(self.labels[index]), key)

    def unreadable(self, key: tuple[int, ...]) -> Sample:
        """A black image that belongs to no class."""
        with seeded("image", self.seed, *key):
            tensor = self.transform(self.reader.black())
        unknown = np.full_like(self.labels[key[1]], UNREADABLE)  # of each class, if of several
        return Sample(tensor, _item(unknown), key)


def _item(label: Any) -> Any:
    return torch.from_numpy(label) if label.ndim else int(label)


class _Paths(Sequence[Path]):
    """Paths, kept relative to a folder where they lie in it."""

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self.folder = folder
        inside = f"{folder}{os.sep}"
        # No "..": behind a link it leads to another folder.
        self._names = Names.of(
            text.removeprefix(inside) if text.startswith(inside) else str(path.absolute())
            for path, text in ((path, str(path)) for path in files)
        )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        return self.folder / self._names[index]


def _batch_memory(count: int, shape: Sequence[int]) -> Tensor:
    """uint8 ``[count, 3, S, S]``, channels last; shared by a loader process, else pinned."""
    channels, height, width = shape
    size = count * channels * height * width
    if get_worker_info() is not None:
        flat = shared_bytes(size)
    else:
        flat = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return flat.view(count, height, width, channels).permute(0, 3, 1, 2)
