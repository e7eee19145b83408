"""The images that a process reads, and their order.

An *update* is one optimizer step on ``total_batch_size`` images, read as ``accumulation``
micro-batches of ``batch_size`` images on each of ``world_size`` processes. The images of an update
depend on the seed, the epoch and the update's number only, so that one process with a batch of 16
and two with 8 train on the same images, and a run can resume at any update.

Both samplers yield lists of keys ``(epoch, index)``: the dataset needs the epoch to seed an image's
augmentation. They belong to ``DataLoader(batch_sampler=...)``, which reads them in the main
process, so that persistent workers see every ``set_epoch``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from kw.config import ConfigError
from kw.data.seeding import derive_seed

__all__ = ["EvalBatchSampler", "TrainBatchSampler"]

Key = tuple[int, int]


class TrainBatchSampler(Sampler[list[Key]]):
    """Shuffled micro-batches of one process; the epoch's last, incomplete update is left out.

    Update ``u`` is the block ``[u * total_batch_size, (u + 1) * total_batch_size)`` of the epoch's
    permutation. Its rows are dealt out by micro-batch, then by process.

    Args:
        size: images in the dataset.
        batch_size: images per process and micro-batch.
        total_batch_size: images per update, over all processes and micro-batches.
        rank: this process, from 0.
        world_size: number of processes.
        seed: seed of the permutations.
        groups: a number for every image; the images of an update are dealt out in its order, so
            that images of one number share a micro-batch where possible. The images of an update
            do not change.

    Attributes:
        updates_per_epoch: optimizer steps in an epoch.
        accumulation: micro-batches per update.

    Raises:
        ConfigError: ``total_batch_size`` is no multiple of ``batch_size * world_size``, or there
            are fewer images than one update takes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        total_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        groups: Sequence[int] | None = None,
    ) -> None:
        _check_rank(rank, world_size)
        step = batch_size * world_size
        if total_batch_size % step:
            below = total_batch_size // step * step
            nearest = f"{below} and {below + step}" if below else f"{step}"
            raise ConfigError(
                f"total_batch_size {total_batch_size} is not a multiple of "
                f"batch_size {batch_size} x {world_size} process(es) = {step}; "
                f"the nearest that are: {nearest}; or choose a batch_size that divides "
                f"{total_batch_size} / {world_size}"
            )
        if size < total_batch_size:
            fits = size // step * step
            remedy = (
                f"set total_batch_size to {fits} or less"
                if fits
                else f"set batch_size to at most {size // world_size} and total_batch_size to match"
            )
            raise ConfigError(
                f"the training set has {size} images, too few for one update of "
                f"total_batch_size {total_batch_size}; {remedy}"
            )
        self.size = size
        self.batch_size = batch_size
        self.total_batch_size = total_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.groups = None if groups is None else torch.as_tensor(groups)
        self.updates_per_epoch = size // total_batch_size
        self.accumulation = total_batch_size // step
        self._epoch = 0
        self._start_update = 0

    def set_epoch(self, epoch: int, start_update: int = 0) -> None:
        """Choose the images of the next iteration; call it before iterating over the loader.

        Args:
            epoch: number of the epoch, from 0.
            start_update: updates of that epoch that were made before and are skipped; an
                iteration then yields fewer batches than ``len()``, which counts a whole epoch.

        Raises:
            ValueError: ``start_update`` lies outside the epoch.
        """
        if not 0 <= start_update <= self.updates_per_epoch:
            raise ValueError(
                f"cannot start at update {start_update}: "
                f"an epoch has {self.updates_per_epoch} updates"
            )
        self._epoch = epoch
        self._start_update = start_update

    def __len__(self) -> int:
        return self.updates_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self._epoch
        generator = torch.Generator()
        generator.manual_seed(derive_seed("permutation", self.seed, epoch))
        permutation = torch.randperm(self.size, generator=generator)
        for update in range(self._start_update, self.updates_per_epoch):
            first = update * self.total_batch_size
            images = permutation[first : first + self.total_batch_size]
            if self.groups is not None:
                images = images[self.groups[images].argsort(stable=True)]
            for micro_batch in range(self.accumulation):
                row = micro_batch * self.world_size + self.rank
                start = row * self.batch_size
                indices = images[start : start + self.batch_size].tolist()
                yield [(epoch, index) for index in indices]


class EvalBatchSampler(Sampler[list[Key]]):
    """Every image once over all processes, none twice: rank r reads r, r + W, r + 2W, ...

    Processes may differ by one image and by one batch; a process may have none. Reduce sums and
    counts after the loop, never inside it.

    Args:
        size: images in the dataset.
        batch_size: images per process and batch; the last batch may be smaller.
        rank: this process, from 0.
        world_size: number of processes W.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        _check_rank(rank, world_size)
        self.batch_size = batch_size
        self.indices = range(rank, size, world_size)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside 0 to {world_size - 1} ({world_size} process(es))")
