"""Files about an evaluation: classes, what is confused with what, mistakes, calibration."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import ImageFolder
from ..errors import writing
from ..evaluation.outcomes import Outcomes, calibration, class_hits, confusion, worst
from ..evaluation.sets import TestSet, readable
from ..pictures.batches import draw_batch
from ..pictures.outcomes import draw_confusion, draw_reliability
from ..pictures.samples import read_images
from ..pictures.style import save, to_pixels

SHOWN = 24
"""Mistakes on the contact sheet."""
_LISTED = 1000  # mistakes in the table


def write_figures(
    folder: Path, test_set: TestSet, outcomes: Outcomes, images: ImageFolder, title: str
) -> list[Path]:
    """Write ``per_class.csv``, ``confusion.csv`` and ``.png``, ``mistakes.csv`` and ``.png``,
    ``reliability.png``, and for corruptions ``corruptions.csv``.

    Where an image may have several labels, it counts for each of them in ``per_class.csv``, and
    there is no confusion matrix. Images that cannot be read are wrong in ``per_class.csv`` and in
    nothing else.

    Args:
        folder: made if need be.
        test_set: what was evaluated.
        outcomes: gathered.
        images: the set's, for the contact sheet.
        title: of which network and set, above pictures.

    Returns:
        The files.

    Raises:
        UserError: one cannot be written, or matplotlib is missing.
    """
    classes = test_set.listing.classes
    labels = np.asarray(test_set.listing.labels)
    hits = test_set.hits(outcomes.best)
    predicted, right = outcomes.best[:, 0], hits[:, 0]
    names = readable(classes)
    several = test_set.accepted is not None
    counts = class_hits(hits, test_set.accepted if several else labels, len(classes))
    # The classes that the set is about: its own, or all where all were possible.
    own = np.array(test_set.subset if test_set.subset is not None else range(len(classes)))
    written: list[Path] = []

    def file(name: str) -> Path:
        written.append(folder / name)
        return written[-1]

    rows = ([classes[c], names[c], counts[c, 0], *_percent(counts[c])] for c in own)
    write_csv(file("per_class.csv"), ("class", "name", "images", "top1", "top5"), rows)
    if not several:
        matrix = confusion(predicted, labels, len(classes))[np.ix_(own, own)]
        heads = [classes[c] for c in own]
        lines = ([head, *row] for head, row in zip(heads, matrix.tolist(), strict=True))
        write_csv(file("confusion.csv"), ["true \\ predicted", *heads], lines)
        save(draw_confusion(matrix, [names[c] for c in own], title), file("confusion.png"))
    if test_set.groups:
        errors = test_set.group_errors(outcomes.best)
        rows = ([*group, error] for group, error in errors.items())
        write_csv(file("corruptions.csv"), ("corruption", "severity", "error"), rows)

    def truth(image: int) -> str:
        kept = test_set.accepted[image] if several else labels[image : image + 1]
        return " / ".join(dict.fromkeys(names[label] for label in kept))

    wrong = worst(outcomes.confidence, right, predicted, _LISTED)
    rows = (
        [images.path(i), truth(i), names[predicted[i]], f"{outcomes.confidence[i]:.4f}"]
        for i in wrong
    )
    write_csv(file("mistakes.csv"), ("file", "true", "predicted", "confidence"), rows)
    if len(wrong):
        pixels = read_images(images, wrong[:SHOWN].tolist())["images"]
        below = [
            f"is {truth(i)}\nsaid {names[predicted[i]]} {outcomes.confidence[i]:.2f}"
            for i in wrong[:SHOWN]
        ]
        head = f"{title}: the most confident of {int((~right).sum()):,} mistakes"
        shown = to_pixels(pixels, torch.zeros(1), torch.ones(1))
        save(draw_batch(shown, below, head), file("mistakes.png"))
    read = predicted >= 0
    bins = calibration(outcomes.confidence[read], right[read])
    save(
        draw_reliability(bins.counts, bins.confidence, bins.accuracy, bins.ece, title),
        file("reliability.png"),
    )
    return written


def _percent(counts: Any) -> tuple[float | str, float | str]:
    images, first, five = counts.tolist()
    return (round(100 * first / images, 4), round(100 * five / images, 4)) if images else ("", "")


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, into a folder that is made if need be.

    Raises:
        UserError: it cannot be written.
    """
    with (
        writing(path),
        # Names that are not UTF-8 are written as the bytes that they are.
        open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        csv.writer(file).writerows(chain([head], rows))
