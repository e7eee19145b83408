"""The two splits of a classifier's run, as loaders: from files or from memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from PIL import Image

from kw.config.data_schema import DataConfig
from kw.config.schema import Config
from kw.data.batch_augment import BatchAugment
from kw.data.channels import Reader
from kw.data.dataset import ImageFolder
from kw.data.listing import Listing, list_split
from kw.data.loader import Loader, build_loader
from kw.data.memory import as_stored, hold_in_memory
from kw.data.samplers import EvalBatchSampler, TrainBatchSampler
from kw.data.transforms import build_fast_transform, build_transform

Transform = Callable[[Image.Image], torch.Tensor]


def open_training(
    config: Config,
    device: torch.device,
    rank: int,
    world_size: int,
    listing: Listing | None = None,
) -> Loader:
    """The loader of one training process.

    Before each epoch call ``loader.batch_sampler.set_epoch(epoch, start_update)``.

    Args:
        config: the run.
        device: the device that trains, where ``data.memory`` has batches assembled.
        rank, world_size: this process, from 0, of so many.
        listing: the split's files (:func:`kw.data.list_splits`); left out, they are listed here.

    Raises:
        ConfigError: the batches do not fit the data set, see
            :class:`~kw.data.samplers.TrainBatchSampler`.
        DataError: the data folder is not as expected, or ``data.memory`` cannot hold it.
    """
    data, memory = config.data, config.data.memory
    if memory is None:
        transform: Transform = build_transform(data, True)
    elif memory.size is None:
        transform = as_stored
    else:  # resized to a square
        square = replace(data, input_size=memory.size, test_crop_ratio=1.0)
        transform = build_transform(square, False)
    folder = _folder(config, "train", transform, listing, is_held=memory is not None)
    sampler = TrainBatchSampler(
        len(folder),
        config.batch_size,
        config.total_batch_size,
        rank,
        world_size,
        config.seed,
        repeats=data.repeats,
        labels=folder.labels if data.sampling == "balanced" else None,
    )
    if memory is None:
        return build_loader(folder, sampler, data.workers)
    return hold_in_memory(
        folder, sampler, memory, device, augment=BatchAugment(data), workers=data.workers
    )


def open_validation(
    config: Config,
    device: torch.device,
    rank: int,
    world_size: int,
    listing: Listing | None = None,
) -> Loader:
    """The loader of one evaluating process: its share of the images, none of them twice.

    Arguments and errors are those of :func:`open_training`.
    """
    data = config.data
    folder = _folder(config, "val", build_transform(data, False), listing)
    batch_size = config.eval_batch_size or config.batch_size
    sampler = EvalBatchSampler(len(folder), batch_size, rank, world_size)
    if data.memory is None:
        return build_loader(folder, sampler, data.workers)
    return hold_in_memory(folder, sampler, data.memory, device, workers=data.workers)


def test_images(config: Config, listing: Listing | None = None) -> ImageFolder:  # noqa: PT028
    """The test images of a run, always read from files, also with ``data.memory``.

    Arguments and errors are those of :func:`open_training`.
    """
    return _folder(config, "val", build_transform(config.data, False), listing)


def read_files(
    files: Sequence[str | os.PathLike[str]], data: DataConfig
) -> dict[str, torch.Tensor]:
    """A batch of image files as the test images are read; their labels are 0.

    Raises:
        BadImageError: one cannot be read.
    """
    transform, reader = build_transform(data, False), Reader.of(data)
    images = [transform(reader(file)) for file in files]
    return {"images": torch.stack(images), "labels": torch.zeros(len(images), dtype=torch.int64)}


def _folder(
    config: Config,
    split: str,
    transform: Transform,
    listing: Listing | None,
    is_held: bool = False,
) -> ImageFolder:
    data = config.data
    return ImageFolder(
        data.root,
        split,
        transform,
        config.seed,
        training=split == "train",
        bad_images=data.bad_images,
        listing=listing or list_split(data, split),
        reader=Reader.of(data),
        fast=None if data.decoder == "pillow" else build_fast_transform(data, split == "train"),
        batch_shape=None if is_held or data.pixels != "uint8" else (data.channels, *data.shape),
    )
