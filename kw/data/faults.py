"""Images that cannot be read: a substitute for each, a list of them, and a bound on their number.

Loader processes share no memory with the run, so faults travel in the batch. A sample with a
fault is wrapped as :class:`Delivered`, :func:`collate_faults` moves the faults into the batch, and
:class:`~kw.data.loader.Loader` takes them out again into its :class:`FaultLog`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from kw.config.run_schema import BadImagesConfig
from kw.data.reading import BadImageError, DataError, read_image
from kw.data.seeding import derive_seed
from kw.errors import memory_for

_TRIES = 16  # of so many images one is readable, unless the disk is gone
_SHOWN = 20


class BadImage(NamedTuple):
    """A file that could not be read."""

    image: int
    """place in the data set"""
    path: str
    reason: str


class Delivered(NamedTuple):
    """A sample in place of another, or none, and the files that could not be read."""

    sample: Any
    faults: tuple[BadImage, ...]


class TolerantDataset(Dataset[Any]):
    """A data set by keys ``(epoch, index)``, see :mod:`.samplers`, whose files may be bad.

    With the policy ``raise`` a bad file raises its error. With ``skip``, training gets another
    image in its place, drawn from the seed and the key, so that neither the number of loader
    processes nor that of ranks matters; it is transformed by the random choices of the image that
    it stands for. Evaluation gets what :meth:`unreadable` gives.
    """

    def __init__(self, seed: int, training: bool, bad_images: BadImagesConfig) -> None:
        self.seed = seed
        self.training = training
        self.bad_images = bad_images
        self._in_hand: Tensor | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, index: int) -> PathLike[str] | str:
        """The file of an image."""
        raise NotImplementedError

    def read(self, index: int, key: tuple[int, ...]) -> Any:
        """The sample of image ``index``, with the random choices of ``key``.

        Raises:
            BadImageError: the file cannot be read.
        """
        raise NotImplementedError

    def unreadable(self, key: tuple[int, ...]) -> Any:
        """What evaluation gets of an image that cannot be read; ``None`` leaves it out."""
        return None

    def __getitem__(self, key: tuple[int, ...]) -> Any:
        """A sample, :class:`Delivered` where a file could not be read.

        Raises:
            BadImageError: it cannot be read, and the policy is ``raise``.
            DataError: it cannot be read, nor can any of the substitutes.
            OutOfMemory: memory does not suffice for it.
        """
        return self.get(key, self.read)

    def get(self, key: tuple[int, ...], read: Callable[[int, tuple[int, ...]], Any]) -> Any:
        """As indexing does, by another function than :meth:`read`."""
        faults: list[BadImage] = []
        with self._noted(key[1]), memory_for(lambda: [self.path(key[1])]):
            for index in self._candidates(key):
                try:
                    sample = read(index, key)
                except BadImageError as error:
                    if self.bad_images.policy == "raise":
                        raise
                    faults.append(BadImage(index, error.path, error.reason))
                    if not self.training:
                        return Delivered(self.unreadable(key), tuple(faults))
                else:
                    return Delivered(sample, tuple(faults)) if faults else sample
        raise DataError(
            f"none of {len(faults)} images drawn one after another is readable{_listed(faults)}"
        )

    def _candidates(self, key: tuple[int, ...]) -> Iterator[int]:
        yield key[1]
        for attempt in range(1, _TRIES):
            yield derive_seed("substitute", self.seed, *key, attempt) % len(self)

    def note_for(self, workers: int) -> None:
        """Let loader processes note what they read."""
        if workers:
            # Shared memory: a process that is killed cannot report.
            self._in_hand = torch.full((workers,), -1, dtype=torch.int64).share_memory_()

    def in_hand(self, worker: int) -> int | None:
        """The image that a loader process is reading, or was when it died."""
        index = -1 if self._in_hand is None else int(self._in_hand[worker])
        return None if index < 0 else index

    @contextmanager
    def _noted(self, index: int) -> Iterator[None]:
        worker = get_worker_info()
        if worker is None or self._in_hand is None:
            yield
            return
        self._in_hand[worker.id] = index
        try:
            yield
        finally:
            self._in_hand[worker.id] = -1


def collate_faults(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """A batch by ``collate``, with the samples' faults under ``"faults"``.

    A batch of which nothing is left has nothing else.
    """
    faults = [f for each in samples if isinstance(each, Delivered) for f in each.faults]
    if not faults:
        return collate(samples)
    plain = [each.sample if isinstance(each, Delivered) else each for each in samples]
    plain = [each for each in plain if each is not None]
    return {**(collate(plain) if plain else {}), "faults": faults}


class FaultLog:
    """The bad files that are known, each once, of a data set of ``size`` images, read by
    ``reader``; left out, as RGB."""

    def __init__(
        self, size: int, bad_images: BadImagesConfig, reader: Callable[[str], Any] | None = None
    ) -> None:
        # Rounded up, so that one bad file does not stop a run on a small set.
        self.allowed = math.ceil(bad_images.max_fraction * size)
        self.size = size
        self.reader = reader or partial(read_image, max_pixels=bad_images.max_pixels)
        self.known: dict[str, BadImage] = {}  # by path
        # Of this process, by image: a file may be listed more than once.
        self._new: dict[int, BadImage] = {}

    def record(self, faults: Iterable[BadImage]) -> None:
        """Add bad files that this process found."""
        for fault in faults:
            if fault.path not in self.known:
                self._new[fault.image] = BadImage(*fault)

    def take(self) -> list[BadImage]:
        """The images that this process found since the last call and whose files were not known."""
        new, self._new = self._new, {}
        return list(new.values())

    def merge(self, faults: Iterable[BadImage]) -> list[BadImage]:
        """Add what any process found; returns those that are new, in the data set's order."""
        new = {fault.path: fault for fault in faults if fault.path not in self.known}
        self.known.update(new)
        return sorted(new.values())

    def check(self) -> None:
        """Refuse more bad files than the bound.

        Raises:
            DataError: lists them.
        """
        if len(self.known) > self.allowed:
            raise DataError(
                f"{len(self.known)} of {self.size} images cannot be read, more than the "
                f"{self.allowed} that data.bad_images.max_fraction allows; repair or remove the "
                f"files, or raise the bound:{_listed(list(self.known.values()))}"
            )

    def state_dict(self) -> dict[str, Any]:
        """What is known, in plain types."""
        return {"known": [list(fault) for fault in self.known.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; files repaired or removed since are forgotten."""
        known = [BadImage(image, path, reason) for image, path, reason in state["known"]]
        self.known = {fault.path: fault for fault in known if self._is_bad(fault.path)}

    def _is_bad(self, path: str) -> bool:
        # A file that was removed, or lies in an archive, is found again if it is still in the set.
        if not os.path.exists(path):
            return False
        try:
            self.reader(path)
        except BadImageError:
            return True
        return False


def _listed(faults: Sequence[BadImage]) -> str:
    lines = [f"\n  {fault.path}: {fault.reason}" for fault in faults[:_SHOWN]]
    more = len(faults) - _SHOWN
    return "".join(lines) + (f"\n  and {more} more: bad_images.txt" if more > 0 else "")
