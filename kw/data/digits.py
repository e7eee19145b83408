"""The demo's data: scikit-learn's handwritten digits, written as a folder of images.

1,797 real 8x8 scans (UCI's "Optical Recognition of Handwritten Digits", test half) come with
scikit-learn, so that the demo needs no download::

    python -m kw.data.digits ROOT
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kw.data.dataset import DataError
from kw.errors import answer

__all__ = ["write_digits"]

_MARKER = "digits.json"


def write_digits(
    root: str | os.PathLike[str], size: int = 32, val_fraction: float = 0.2, seed: int = 0
) -> dict[str, int]:
    """Write the digits as ``root/train/<digit>/*.png`` and ``root/val/<digit>/*.png``.

    Every class is split in the same proportion. The folder appears only when it is complete; one
    that is complete, with the same settings, is left as it is.

    Args:
        root: folder to write; it must be absent, empty, or written by this function before.
        size: side of the images, pixels; the scans are enlarged smoothly from 8x8.
        val_fraction: share of the images in val/.
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
    settings = {"size": size, "val_fraction": val_fraction, "seed": seed}
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        return _check_written(root, settings)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed: "
            "pip install 'kernelwarehouse[demo]'"
        ) from error
    digits = load_digits()
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as temporary:
        partial = Path(temporary) / root.name
        val = _choose_val(digits.target, val_fraction, seed)
        for index, (scan, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
            folder = partial / ("val" if index in val else "train") / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.rint(scan * (255 / 16)).astype(np.uint8)  # ink is counted from 0 to 16
            image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
            image.save(folder / f"{index:04d}.png")
        (partial / _MARKER).write_text(json.dumps(settings) + "\n")
        if root.exists():
            root.rmdir()
        shutil.move(partial, root)
    return _count(root)


def _choose_val(labels: np.ndarray, fraction: float, seed: int) -> set[int]:
    # RandomState, because its stream is frozen: the demo's split is the same with every NumPy.
    generator = np.random.RandomState(seed)
    chosen: set[int] = set()
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        chosen.update(members[: round(len(members) * fraction)].tolist())
    return chosen


def _check_written(root: Path, settings: dict[str, float]) -> dict[str, int]:
    marker = root / _MARKER
    if not marker.is_file():
        raise DataError(
            f"{root} exists and was not written by this program (it has no {_MARKER}): "
            "name another folder"
        )
    try:
        found = json.loads(marker.read_text())
    except ValueError as error:
        raise DataError(f"{marker} is not what this program writes: {error}") from error
    if found != settings:
        raise DataError(
            f"{root} has the digits with {found}, not {settings}: name another folder or delete it"
        )
    return _count(root)


def _count(root: Path) -> dict[str, int]:
    counts = {split: len(list((root / split).glob("*/*.png"))) for split in ("train", "val")}
    if sum(counts.values()) != 1797:
        raise DataError(
            f"{root} should have 1,797 images, found {counts['train']} in train/ and "
            f"{counts['val']} in val/: delete it and run this program again"
        )
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: write the digits, print one line; exit status 2 on a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m kw.data.digits",
        description="Write scikit-learn's handwritten digits as a folder of images.",
    )
    parser.add_argument("root", help="folder to write: absent, empty, or written before")
    parser.add_argument("--size", type=int, default=32, help="side of the images, pixels (32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (0)")
    options = parser.parse_args(arguments)
    try:
        counts = write_digits(options.root, options.size, seed=options.seed)
    except (DataError, ImportError, OSError) as error:
        print(f"error: {answer(error) or error}", file=sys.stderr)
        return 2
    print(
        f"digits: {counts['train']} training and {counts['val']} test images of 10 classes, "
        f"{options.size}x{options.size}, in {options.root}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
