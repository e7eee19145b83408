"""Predictions for files and folders, a batch at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..data.reading import BadImageError, DataError
from ..data.walk import IMAGE_EXTENSIONS, describe, walk_images
from ..errors import say
from .classifier import Classifier, Prediction


@dataclass(frozen=True)
class Result:
    """The result for a file.

    Attributes:
        file: as it was given, or found in a folder that was given.
        predictions: the likeliest first; none for a file that could not be read.
        reason: why it could not be read, or an empty string.
    """

    file: str
    predictions: list[Prediction]
    reason: str = ""


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files as given; of folders every image below, by its name, sorted by path.

    Hidden files and files of other kinds are left out (:mod:`kw.data.walk`); a message counts them.

    Raises:
        DataError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            if not path.exists():
                raise DataError(f"{path}: no such file or folder")
            found.append(path)
            continue
        left_out: Counter[str] = Counter()
        inside = sorted(walk_images(path, left_out))
        if left_out:
            say(f"{path}: left out: {describe(left_out)}")
        if not inside:
            raise DataError(f"{path}: holds no image; looked for {', '.join(IMAGE_EXTENSIONS)}")
        found += inside
    return found


def predict_files(
    classifier: Classifier, files: Iterable[Path], k: int = 5, batch_size: int = 32
) -> Iterator[Result]:
    """A result for every file, in their order, also for those that cannot be read; ``k`` classes
    an image, ``batch_size`` files are read at a time."""
    remaining = iter(files)
    while some := list(islice(remaining, batch_size)):
        images, reasons = [], {}
        for file in some:
            try:
                images.append(classifier.read(file))
            except BadImageError as error:
                reasons[file] = error.reason
        best = iter(classifier.predict(images, k, batch_size))
        for file in some:
            if file in reasons:
                yield Result(str(file), [], reasons[file])
            else:
                yield Result(str(file), next(best))
