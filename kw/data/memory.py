"""Images decoded once and held in memory; batches are cropped and augmented as tensors.

For data sets that fit: reading and augmenting one image takes a processor core about half a
millisecond, so that a GPU waits for its loaders when networks and images are small.
Training images are held as they are and augmented on the device that trains
(:mod:`kw.data.batch_augment`); test images are held as the test transform leaves them.

A batch is as in :mod:`kw.data.loader`, with ``images`` on the device. It depends on the seed, the
epoch and the images in it, as there, not on the number of processes or on resuming.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from kw.config.data_schema import MemoryConfig
from kw.data.batch_augment import BatchAugment
from kw.data.dataset import UNREADABLE, ImageFolder, Sample
from kw.data.faults import BadImage, FaultLog, TolerantDataset
from kw.data.loader import Loader, build_loader, collate, deaths_explained
from kw.data.reading import BadImageError, DataError
from kw.data.samplers import EvalBatchSampler, Key, TrainBatchSampler
from kw.data.seeding import derive_seed

_ROOM = 0.9  # share of the free memory for images: the network must fit as well
_DECODED_AT_ONCE = 64


class MemoryImages(TolerantDataset):
    """The decoded images of one split; gives whole batches.

    Args:
        folder: the split.
        images: uint8 [held, C, H, W].
        rows: int64 [images of the split], the row of ``images`` that holds each.
        device: of the batches.
        augment: for training; left out, images are given as they are held.
        bad: the images that could not be read, by index. In training others stand in for them, by
            the rule of :class:`~kw.data.faults.TolerantDataset`; in evaluation they are black
            and of no class.
    """

    def __init__(
        self,
        folder: ImageFolder,
        images: Tensor,
        rows: Tensor,
        device: torch.device,
        augment: BatchAugment | None,
        bad: dict[int, BadImage],
    ) -> None:
        super().__init__(folder.seed, augment is not None, folder.bad_images)
        self.folder = folder
        self.images = images
        self.rows = rows
        self.device = device
        self.augment = augment
        self.bad = bad
        labels = torch.from_numpy(folder.labels).clone()
        if augment is None and bad:
            labels[list(bad)] = UNREADABLE
        self.labels = labels

    def __len__(self) -> int:
        return len(self.folder)

    def path(self, index: int) -> os.PathLike[str] | str:
        return self.folder.path(index)

    def read(self, index: int, key: tuple[int, ...]) -> Any:
        """One image, from its file: a process may hold a share of them alone."""
        return self.folder.read(index, key)

    def __getitems__(self, keys: Sequence[Key]) -> dict[str, Any]:
        """The batch of these keys; torch's loader calls this method."""
        chosen = torch.tensor([self._readable(key) for key in keys])
        images = self.images[self.rows[chosen].to(self.images.device, non_blocking=True)]
        images = images.to(self.device, non_blocking=True)  # [B, C, H, W]
        if self.augment is not None:
            images = self.augment(images, [derive_seed("image", self.seed, *key) for key in keys])
        return {
            "images": images,
            "labels": self.labels[chosen],
            "indices": torch.tensor([key[1] for key in keys]),
            "key": keys[0],
            "keys": list(keys),
        }

    def _readable(self, key: Key) -> int:
        if self.augment is None:
            return key[1]
        for index in self._candidates(key):
            if index not in self.bad:
                return index
        raise DataError("none of the images drawn for one that cannot be read is readable")


def hold_in_memory(
    folder: ImageFolder,
    sampler: TrainBatchSampler | EvalBatchSampler,
    config: MemoryConfig,
    device: torch.device,
    *,
    augment: BatchAugment | None = None,
    workers: int = 0,
) -> Loader:
    """Decode a split, and give the loader that reads it from memory.

    Args:
        folder: the split; its transform gives the tensors to hold.
        sampler: which images this process reads, in which batches. An evaluating process holds its
            share only, a training one all.
        config: where they are held.
        device: device of the batches.
        augment: for training.
        workers: processes that decode; they end before this returns.

    Raises:
        DataError: the images have different sizes or do not fit into memory, or a file cannot be
            read and the policy is ``raise``.
    """
    indices = sampler.indices if isinstance(sampler, EvalBatchSampler) else range(len(folder))
    rows = torch.full((len(folder),), -1, dtype=torch.int64)
    rows[list(indices)] = torch.arange(len(indices))
    place = device if config.place == "device" else torch.device("cpu")
    shape = _first_shape(folder, indices[0] if len(indices) else 0)
    _check_room(len(indices), shape, place)
    held = torch.zeros((len(indices), *shape), dtype=torch.uint8, device=place)
    in_order = sampler
    if isinstance(sampler, TrainBatchSampler):
        in_order = EvalBatchSampler(len(folder), _DECODED_AT_ONCE)
    decoding = build_loader(folder, in_order, workers, partial(_alike, folder, shape))
    with deaths_explained(decoding):
        for batch in decoding:
            held[rows[batch["indices"]].to(place)] = batch["images"].to(place)
    found = decoding.faults.take()
    bad = {fault.image: fault for fault in found}
    loader = Loader(
        MemoryImages(folder, held, rows, device, augment, bad),
        batch_sampler=sampler,
        collate_fn=dict,  # the batch as it is
        generator=torch.Generator(),  # see kw.data.loader.build_loader
    )
    loader.faults = FaultLog(len(folder), folder.bad_images, folder.reader.__call__)
    loader.faults.record(found)
    return loader


def _first_shape(folder: ImageFolder, first: int) -> torch.Size:
    """The shape of the first image that can be read."""
    for index in [*range(first, len(folder)), *range(first)]:
        try:
            return folder.read(index, (0, index)).image.shape
        except BadImageError:
            if folder.bad_images.policy == "raise":
                raise
    raise DataError(f"none of the {len(folder)} images of {folder.folder} is readable")


def _alike(folder: ImageFolder, shape: torch.Size, samples: list[Sample]) -> dict[str, Any]:
    """A batch of decoded images; a DataError if one has another shape than the first."""
    for sample in samples:
        if sample.image.shape != shape:
            raise DataError(
                f"data.memory: images have different sizes: {_size(shape)} pixels, but "
                f"{folder.path(sample.key[1])} has {_size(sample.image.shape)}; set "
                f"data.memory.size, e.g. {min(shape[1:])}, to hold squares, or data.memory to null"
            )
    return collate(samples)


def as_stored(image: Image.Image | Tensor) -> Tensor:
    """An image as it is -> uint8 [C, H, W]; the transform of training images held unresized."""
    return image if isinstance(image, Tensor) else pil_to_tensor(image)


def _check_room(count: int, shape: torch.Size, place: torch.device) -> None:
    """Refuse images that would not fit, before memory is allocated.

    Raises:
        DataError: with the memory needed and the memory free.
    """
    needed, free = count * shape.numel(), _free_bytes(place)
    if needed <= _ROOM * free:
        return
    what = "GPU memory" if place.type == "cuda" else "memory for each process"
    others = "data.memory.place to host, " if place.type == "cuda" else ""
    raise DataError(
        f"data.memory: {count} images of {_size(shape)} pixels take {needed / 2**30:.2f} GiB, more "
        f"than {_ROOM:.0%} of the {free / 2**30:.2f} GiB of {what} that are free; set "
        f"data.memory.size to a smaller side, {others}or data.memory to null"
    )


def _free_bytes(place: torch.device) -> float:
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's: they share the host
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: all of it
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *_left_by_groups()]) / processes


def _left_by_groups(root: Path = Path("/")) -> Iterator[int]:
    """What the limits of this process's control groups (v1 or v2) leave: a container's, a batch
    job's. As in ``MemAvailable``, memory that holds files is free."""
    with suppress(OSError):  # not Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kind, path = line.split(":", 2)
            if kind not in ("", "memory"):
                continue
            names = ("limit_in_bytes", "usage_in_bytes") if kind else ("max", "current")
            cache = "total_" * bool(kind)
            group = root / "sys/fs/cgroup" / kind / path.lstrip("/")
            for folder in (group, *group.parents):  # limits are those of all groups around it
                with suppress(OSError, ValueError, KeyError):  # no group, or no limit
                    limit, used = (int((folder / f"memory.{n}").read_text()) for n in names)
                    stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                    files = int(stat[f"{cache}inactive_file"]) + int(stat[f"{cache}active_file"])
                    yield limit - used + files


def _size(shape: torch.Size) -> str:
    return f"{shape[2]} x {shape[1]}"
