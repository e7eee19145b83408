"""Files of one model beside one another: accuracy on labelled images, size, time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.dataset import ImageFolder
from ..data.transforms import build_transform
from ..evaluation import Accuracy
from .classifier import Classifier, load
from .description import ExportError

__all__ = ["Row", "compare_files"]

_REPEATS = 5
_BATCHES = (1, 8)


@dataclass(frozen=True)
class Row:
    """A file, beside the first one.

    Attributes:
        file: its name.
        top1, top5: accuracy, %.
        same: images that get the first file's class, %.
        difference: largest difference from the first file's logits, relative to the largest.
        megabytes: size of the file, 10^6 bytes.
        milliseconds: an image, at batch 1 and 8; the quickest of five runs.
    """

    file: str
    top1: float
    top5: float
    same: float
    difference: float
    megabytes: float
    milliseconds: tuple[float, float]


def compare_files(
    paths: Sequence[str | Path], root: str | Path, split: str = "val", batch_size: int = 32
) -> list[Row]:
    """Run every file on a folder of labelled images, as evaluation does.

    Args:
        paths: models that :func:`kw.load` reads, of one classifier; the first is the yardstick.
        root: a folder with ``split/<class>/*``.
        split: which of its splits.
        batch_size: images at a time.

    Raises:
        DataError: the folder is not as expected, or holds an image that cannot be read.
        ExportError: a file is of other classes than the folder.
    """
    first: Tensor | None = None
    rows = []
    for path in paths:
        classifier = load(path)
        data = classifier.description.config.data
        upright = data.exif_orientation == "apply"
        dataset = ImageFolder(root, split, build_transform(data, False), upright=upright)
        if dataset.classes != classifier.classes:
            raise ExportError(
                f"{path}: its {len(classifier.classes)} classes are not the "
                f"{len(dataset.classes)} of {root}/{split}"
            )
        logits, labels = _run(classifier, dataset, batch_size)
        first = logits if first is None else first
        accuracy = Accuracy()
        accuracy.update(logits, labels)
        found = accuracy.compute()
        scale = max(1.0, float(first.abs().max()))
        file = Path(path)
        rows.append(
            Row(
                file=file.name,
                top1=found["top1"],
                top5=found["top5"],
                same=100 * float((logits.argmax(1) == first.argmax(1)).float().mean()),
                difference=float((logits - first).abs().max()) / scale,
                megabytes=file.stat().st_size / 1e6,
                milliseconds=(_time(classifier, _BATCHES[0]), _time(classifier, _BATCHES[1])),
            )
        )
    return rows


def _run(classifier: Classifier, dataset: ImageFolder, batch_size: int) -> tuple[Tensor, Tensor]:
    """Logits ``[N, C]`` and labels ``[N]`` of all images."""
    logits = []
    for start in range(0, len(dataset), batch_size):
        some = range(start, min(start + batch_size, len(dataset)))
        images = torch.stack([dataset[(0, index)].image for index in some])
        logits.append(classifier.logits(images))
    return torch.cat(logits), torch.from_numpy(dataset.labels)


@torch.no_grad()
def _time(classifier: Classifier, batch: int) -> float:
    """Milliseconds an image: the network alone, without reading and preprocessing."""
    inputs = classifier.description.input
    size, batch = inputs.size, inputs.batch or batch
    images = torch.randn(batch, 3, size, size)
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        classifier(images)
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds) / batch
