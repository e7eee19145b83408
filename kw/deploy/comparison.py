"""Compare files of one model: accuracy on labelled images, size, time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.channels import Reader
from ..data.dataset import ImageFolder
from ..data.transforms import build_transform
from ..evaluation import Accuracy
from .classifier import Classifier, load
from .description import ExportError
from .verify import Difference


def compare_files(
    paths: Sequence[str | Path], root: str | Path, split: str = "val", batch_size: int = 32
) -> list[dict[str, Any]]:
    """Run every file on a folder of labelled images, as evaluation does.

    Args:
        paths: models that :func:`kw.load` reads, of one classifier; the others are compared with
            the first.
        root: a folder with ``split/<class>/*``.
        split: which of its splits.
        batch_size: images at a time.

    Returns:
        A row a file: ``file``, its name; ``top1`` and ``top5`` in %; ``same``, images that get the
        first file's class, in %; ``difference``, the largest from the first file's logits, relative
        to the largest; ``megabytes``, 10^6 bytes; ``milliseconds`` an image at batch 1 and 8.

    Raises:
        DataError: the folder is not as expected, or holds an image that cannot be read.
        ExportError: a file has other classes than the folder, or gives values that are not finite.
    """
    first: Tensor | None = None
    rows = []
    for path in map(Path, paths):
        classifier = load(path)
        if not isinstance(classifier, Classifier):
            raise ExportError(f"{path}: is a detector's; expected classifiers (kw test has AP)")
        data = classifier.description.config.data
        dataset = ImageFolder(root, split, build_transform(data, False), reader=Reader.of(data))
        if dataset.classes != classifier.classes:
            raise ExportError(
                f"{path}: its {len(classifier.classes)} classes are not the "
                f"{len(dataset.classes)} of {root}/{split}"
            )
        if classifier.description.config.several_classes:
            raise ExportError(
                f"{path}: its images have several classes each, and a folder's have one; kw test "
                "evaluates the run"
            )
        parts = []
        for batch in torch.arange(len(dataset)).split(batch_size):
            images = torch.stack([dataset[(0, index)].image for index in batch.tolist()])
            parts.append(classifier.logits(images))
        logits = torch.cat(parts)
        first = logits if first is None else first
        accuracy, difference = Accuracy(), Difference()
        accuracy.update(logits, torch.from_numpy(dataset.labels))
        difference.add(first, logits, (len(dataset),))
        found = accuracy.compute()
        rows.append(
            {
                "file": path.name,
                "top1": found["top1"],
                "top5": found["top5"],
                "same": 100 * difference.same / difference.images,
                "difference": difference.largest,
                "megabytes": sum(p.stat().st_size for p in _parts(path)) / 1e6,
                "milliseconds": [_time(classifier, 1), _time(classifier, 8)],
            }
        )
    return rows


def _parts(path: Path) -> list[Path]:
    weights = path.with_suffix(".bin")
    return [path, weights] if path.suffix == ".xml" and weights.exists() else [path]


@torch.no_grad()
def _time(classifier: Classifier, batch: int) -> float:
    """Milliseconds an image of the quickest of five runs: the network alone, without reading."""
    inputs = classifier.description.input
    images = torch.randn(inputs.batch or batch, inputs.channels, *inputs.sides)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        classifier(images)
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds) / len(images)
