"""Loaders: plain torch ``DataLoader`` objects over :class:`~kw.data.dataset.ImageFolder`.

A batch is ``{"images": uint8 [B, 3, S, S], "labels": int64 [B], "indices": int64 [B],
"key": (epoch, index of the first image)}``, in host memory (pinned where CUDA is available).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from kw.data.dataset import ImageFolder, Sample
from kw.data.samplers import EvalBatchSampler, TrainBatchSampler

__all__ = ["build_eval_loader", "build_loader", "build_train_loader", "collate", "stop_workers"]


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Samples of one epoch -> a batch."""
    return {
        # torch's own collation stacks straight into memory that loader processes share.
        "images": default_collate([sample.image for sample in samples]),  # [B, 3, S, S]
        "labels": torch.tensor([sample.label for sample in samples]),
        "indices": torch.tensor([sample.key[1] for sample in samples]),
        "key": samples[0].key,
    }


def build_train_loader(
    dataset: ImageFolder,
    *,
    batch_size: int,
    total_batch_size: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Sample]:
    """The loader of one training process.

    Before each epoch call ``loader.batch_sampler.set_epoch(epoch, start_update)``.

    Args:
        dataset: the training images; its seed also seeds the order.
        batch_size: images per process and micro-batch.
        total_batch_size: images per optimizer update, over all processes and micro-batches.
        workers: loader processes; 0 loads in this process.
        rank: this process, from 0.
        world_size: number of processes.

    Raises:
        ValueError: from :class:`~kw.data.samplers.TrainBatchSampler`.
    """
    sampler = TrainBatchSampler(
        len(dataset), batch_size, total_batch_size, rank, world_size, dataset.seed
    )
    return build_loader(dataset, sampler, workers)


def build_eval_loader(
    dataset: ImageFolder, *, batch_size: int, workers: int, rank: int = 0, world_size: int = 1
) -> DataLoader[Sample]:
    """The loader of one evaluating process: its share of the images, none of them twice.

    Args:
        dataset: the test images.
        batch_size: images per process and batch; the last batch may be smaller.
        workers: loader processes; 0 loads in this process.
        rank: this process, from 0.
        world_size: number of processes.
    """
    return build_loader(
        dataset, EvalBatchSampler(len(dataset), batch_size, rank, world_size), workers
    )


def stop_workers(loader: DataLoader[Any]) -> None:
    """Stop a loader's processes, where they wait for another epoch.

    Left to the garbage collector, which may close their queues first, each takes five seconds.
    """
    loader._iterator = None


def build_loader(
    dataset: Dataset[Any],
    sampler: TrainBatchSampler | EvalBatchSampler,
    workers: int,
    collate: Callable[[list[Any]], Any] = collate,
) -> DataLoader[Any]:
    """A loader over any dataset of keys ``(epoch, index)``.

    Args:
        dataset: gives a sample for a key.
        sampler: gives lists of keys.
        workers: loader processes; 0 loads in this process.
        collate: samples -> batch.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        # Its own generator: a loader otherwise draws from the global one at each epoch's start,
        # which would make the model's random choices depend on how often data was loaded.
        generator=torch.Generator(),
    )
