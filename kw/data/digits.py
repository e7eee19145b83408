"""The demo's data: scikit-learn's handwritten digits, written as a folder of images.

1,797 real 8x8 scans (UCI's "Optical Recognition of Handwritten Digits", test half) come with
scikit-learn, so that the demo needs no download::

    python -m kw.data.digits ROOT
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from kw.data.reading import DataError
from kw.data.whole_folder import run_writer, whole_folder

__all__ = ["choose_val", "load_scans", "write_digits"]

VAL_FRACTION = 0.2


def write_digits(root: str | os.PathLike[str], size: int = 32, seed: int = 0) -> dict[str, int]:
    """Write the digits as ``root/train/<digit>/*.png`` and ``root/val/<digit>/*.png``.

    A fifth of every class is for validation. The folder appears only when it is complete; one
    that is complete, with the same settings, is left as it is.

    Args:
        root: folder to write; it must be absent, empty, or written by this function before.
        size: side of the images, pixels; the scans are enlarged smoothly from 8x8.
        seed: seed of the split.

    Returns:
        The number of images in ``train`` and ``val``.

    Raises:
        DataError: ``root`` has other content, or a size or seed cannot be.
        ImportError: scikit-learn is not installed.
    """
    if not 1 <= size <= 4096 or not 0 <= seed < 2**32:
        raise DataError(
            f"--size {size} --seed {seed}: expected a size from 1 to 4096 and a seed from 0 to "
            f"{2**32 - 1}"
        )
    root = Path(root).expanduser().absolute()
    settings = {"size": size, "val_fraction": VAL_FRACTION, "seed": seed}
    with whole_folder(root, "digits.json", settings, "digits") as partial:
        if partial is not None:
            scans, labels = load_scans()
            val = choose_val(labels, seed=seed)
            for index, (scan, digit) in enumerate(zip(scans, labels, strict=True)):
                folder = partial / ("val" if index in val else "train") / str(digit)
                folder.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(scan).resize((size, size), Image.Resampling.BICUBIC)
                image.save(folder / f"{index:04d}.png")
    return _count(root)


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """The scans, and the digits that they show.

    Returns:
        Ink from 0 to 255, uint8 ``[1797, 8, 8]``; digits 0 to 9, integers ``[1797]``.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed: "
            "pip install 'kernelwarehouse[demo]'"
        ) from error
    digits = load_digits()
    # Scikit-learn counts ink from 0 to 16.
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


def choose_val(labels: np.ndarray, fraction: float = VAL_FRACTION, seed: int = 0) -> set[int]:
    """Indices of the scans of the val split, a fraction of every digit; all that are written from
    the scans agree on its default. ``labels`` are the digits of the scans, ``[N]``."""
    # RandomState, because its stream is frozen: the demo's split is the same with every NumPy.
    generator = np.random.RandomState(seed)
    chosen: set[int] = set()
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        chosen.update(members[: round(len(members) * fraction)].tolist())
    return chosen


def _count(root: Path) -> dict[str, int]:
    counts = {split: len(list((root / split).glob("*/*.png"))) for split in ("train", "val")}
    if sum(counts.values()) != 1797:
        raise DataError(
            f"{root} should have 1,797 images, found {counts['train']} in train/ and "
            f"{counts['val']} in val/: delete it and run this program again"
        )
    return counts


main = partial(
    run_writer,
    write_digits,
    "digits: {train} training and {val} test images of 10 classes, {size}x{size}, in {root}",
)


if __name__ == "__main__":
    sys.exit(main())
