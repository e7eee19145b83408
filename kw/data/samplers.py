"""The images that a process reads, and their order.

An *update* is one optimizer step on ``total_batch_size`` images, read as ``accumulation``
micro-batches of ``batch_size`` images on each of ``world_size`` processes. The images of an update
depend on the seed, the epoch and the update's number only, so that one process with a batch of 16
and two with 8 train on the same images, and a run can resume at any update.

Both samplers yield lists of keys ``(epoch, index)``: the dataset needs the epoch to seed an image's
augmentation. Where an epoch may have an image more than once, a key has a third part, the place in
the epoch's order, so that each time is augmented anew. The samplers belong to
``DataLoader(batch_sampler=...)``, which reads them in the main process, so that persistent workers
see every ``set_epoch``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from kw.config import ConfigError
from kw.data.seeding import derive_seed

Key = tuple[int, ...]
"""``(epoch, index)``, or ``(epoch, index, place in the epoch's order)``."""


class TrainBatchSampler(Sampler[list[Key]]):
    """Shuffled micro-batches of one process; the epoch's last, incomplete update is left out.

    Update ``u`` is the block ``[u * total_batch_size, (u + 1) * total_batch_size)`` of the epoch's
    order, a permutation of the images. Its rows are dealt out by micro-batch, then by process.

    Repeated augmentation (Hoffer et al., CVPR 2020; Berman et al., arXiv 1902.05509) has every
    image of the order ``repeats`` times in a row. As in DeiT's code an epoch keeps its number of
    updates: it has 1 / ``repeats`` of the images, and a recipe's epochs cost what they did. Where
    ``repeats`` does not divide ``total_batch_size``, an image's copies go on in the next update.
    The places of an update are dealt out in turn to its rows: copies share a micro-batch only
    where an update has fewer of these than ``repeats``.

    Balanced sampling draws images with replacement: a class, all equally likely, then one of its
    images.

    Args:
        size: images in the dataset.
        batch_size: images per process and micro-batch.
        total_batch_size: images per update, over all processes and micro-batches.
        rank, world_size: this process, from 0, of so many.
        seed: seed of the permutations.
        groups: a number for every image; the images of an update are dealt out in its order, so
            that images of one number share a micro-batch where possible. The images of an update
            do not change.

    Attributes:
        updates_per_epoch: optimizer steps in an epoch.
        accumulation: micro-batches per update.

    Raises:
        ConfigError: ``total_batch_size`` is no multiple of ``batch_size * world_size``, there are
            fewer images than one update takes, or images to balance have several classes each.
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
        repeats: int = 1,
        labels: Sequence[int] | np.ndarray | None = None,
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
        self.repeats = repeats
        self.labels = None if labels is None else torch.as_tensor(labels)
        if self.labels is not None and self.labels.ndim > 1:
            raise ConfigError(
                "data.sampling: balanced needs images of one class each, these have several; set "
                "data.sampling to shuffle"
            )
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
        epoch, total, rows = self._epoch, self.total_batch_size, self.accumulation * self.world_size
        order = self._order()
        may_repeat = self.repeats > 1 or self.labels is not None
        for update in range(self._start_update, self.updates_per_epoch):
            places = torch.arange(update * total, (update + 1) * total)
            if self.groups is not None:
                places = places[self.groups[order[places // self.repeats]].argsort(stable=True)]
            elif self.repeats > 1:
                places = places.view(-1, rows).T.flatten()
            indices = order[places // self.repeats]
            parts = (indices, places) if may_repeat else (indices,)
            for micro_batch in range(self.accumulation):
                row = micro_batch * self.world_size + self.rank
                own = slice(row * self.batch_size, (row + 1) * self.batch_size)
                columns = (part[own].tolist() for part in parts)
                yield [(epoch, *each) for each in zip(*columns, strict=True)]

    def _order(self) -> Tensor:
        """The epoch's images, each still once where it is to be repeated."""
        generator = torch.Generator()
        generator.manual_seed(derive_seed("permutation", self.seed, self._epoch))
        if self.labels is None:
            return torch.randperm(self.size, generator=generator)
        by_class = self.labels.argsort(stable=True)
        counts = self.labels.unique(return_counts=True)[1]  # of the classes that have images
        first = counts.cumsum(0) - counts
        drawn = torch.randint(len(counts), (self.size,), generator=generator)
        shares = torch.rand(self.size, dtype=torch.float64, generator=generator)
        return by_class[first[drawn] + (shares * counts[drawn]).long()]


class EvalBatchSampler(Sampler[list[Key]]):
    """Every image once over all processes, none twice: rank r reads r, r + W, r + 2W, ...

    Processes may differ by one image and by one batch; a process may have none. Reduce sums and
    counts after the loop, never inside it. The last batch may have less than ``batch_size`` images.
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
