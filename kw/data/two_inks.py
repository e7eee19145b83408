"""The demo's data: images of two handwritten digits; the light determines which one is the class.

One digit is written in bright ink and one in dark, on grey. In warm light the bright one is the
class, in cool light the dark one: a global property of the image changes the sign of the strokes
that matter. The scans are scikit-learn's (:mod:`kw.data.digits`), so that nothing is downloaded::

    python -m kw.data.two_inks ROOT
"""

from __future__ import annotations

import colorsys
import math
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from kw.data.digits import choose_val, load_scans
from kw.data.reading import DataError
from kw.data.seeding import derive_seed
from kw.data.whole_folder import run_writer, whole_folder

__all__ = ["choose_scans", "see", "write_two_inks"]

TEST_FRACTION, SEARCH_FRACTION = 0.4, 0.2
"""Shares of the scans for test images, and for those on which settings are searched."""


def write_two_inks(
    root: str | os.PathLike[str],
    train: int = 16_000,
    val: int = 6_000,
    seed: int = 0,
    size: int = 16,
    search: bool = False,
) -> dict[str, int]:
    """Write images of two digits, ``root/train/<digit>/*.png`` and ``root/val/<digit>/*.png``.

    No scan is in both splits. Every digit and either light has the same number of images, up to
    one. The folder appears only when it is complete; one that is complete, with the same settings,
    is left as it is.

    Args:
        root: folder to write; it must be absent, empty, or written by this function before.
        train: number of training images.
        val: number of held-out images.
        seed: seed of the images. An image does not depend on how many there are.
        size: side of the images, pixels.
        search: do not use the test scans, and hold out some of the training scans instead: for
            choosing settings.

    Returns:
        The number of images in ``train`` and ``val``.

    Raises:
        DataError: ``root`` has other content, or a number cannot be.
        ImportError: scikit-learn is not installed.
    """
    if not 8 <= size <= 512 or min(train, val) < 10 or not 0 <= seed < 2**32:
        raise DataError(
            f"--train {train} --val {val} --size {size} --seed {seed}: expected at least 10 "
            f"images, a size from 8 to 512 and a seed from 0 to {2**32 - 1}"
        )
    root = Path(root).expanduser().absolute()
    sizes = {"train": train, "val": val}
    settings = {**sizes, "seed": seed, "size": size, "search": search}
    with whole_folder(root, "two_inks.json", settings, "two inks") as partial:
        if partial is None:
            return sizes
        scans, labels = load_scans()
        members = {
            split: [pool[labels[pool] == digit] for digit in range(10)]
            for split, pool in choose_scans(labels, search).items()
        }
        for split, count in sizes.items():
            for digit in range(10):
                (partial / split / str(digit)).mkdir(parents=True)
            for number in range(count):
                digit, warm = number % 10, number // 10 % 2
                image_seed = derive_seed("two inks", seed, split, number)
                # RandomState, because its stream is the same with every NumPy.
                generator = np.random.RandomState([image_seed & 0xFFFFFFFF, image_seed >> 32])
                other_digit = (digit + generator.randint(1, 10)) % 10
                scan, other = (
                    generator.choice(members[split][shown]) for shown in (digit, other_digit)
                )
                image = see(scans[scan], scans[other], bool(warm), size, generator)
                light = "warm" if warm else "cool"
                name = f"{number:06d}_{light}_scan{scan:04d}_scan{other:04d}.png"
                Image.fromarray(image).save(partial / split / str(digit) / name, compress_level=1)
    return sizes


def choose_scans(labels: np.ndarray, search: bool = False) -> dict[str, np.ndarray]:
    """The scans of either split, as indices; see :func:`write_two_inks`."""
    test = choose_val(labels, TEST_FRACTION)
    held_out = test
    if search:  # a larger share of the same order contains the smaller one
        held_out = choose_val(labels, TEST_FRACTION + SEARCH_FRACTION) - test
    train = set(range(len(labels))) - test - held_out
    return {"train": np.array(sorted(train)), "val": np.array(sorted(held_out))}


def see(
    scan: np.ndarray, other: np.ndarray, warm: bool, size: int, generator: np.random.RandomState
) -> np.ndarray:
    """A picture of two digits.

    Args:
        scan: the one that counts, ink from 0 to 255, uint8 ``[8, 8]``; bright in warm light.
        other: the one that does not.
        warm: the light.
        size: side of the image, pixels.
        generator: what places, slants, light and noise are drawn from.

    Returns:
        RGB, uint8 ``[size, size, 3]``.
    """
    uniform = generator.uniform

    def ink(digit: np.ndarray) -> np.ndarray:
        shape = uniform(0.55, 0.75), uniform(-15, 15), uniform(-0.2, 0.2)
        return _lay(digit, size, *shape, uniform(-0.15, 0.15, 2)) * uniform(0.6, 1)

    grey = 0.5 + (1 if warm else -1) * 0.45 * (ink(scan) - ink(other))
    hue = (0.05 if warm else 0.55) + uniform(-0.1, 0.1)
    tint = np.array(colorsys.hsv_to_rgb(hue % 1, 1, 1))
    colour = (1 - uniform(0.25, 0.45) * (1 - tint)) * uniform(0.7, 1.1)
    noise = uniform(0, 0.05) * generator.standard_normal((size, size))
    image = grey[..., None] * colour + noise[..., None]
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def _lay(
    scan: np.ndarray, size: int, height: float, turn: float, shear: float, shift: np.ndarray
) -> np.ndarray:
    """A scan on an empty square; ``height`` and ``shift`` are shares of its side, ``turn`` degrees.

    Returns:
        Ink from 0 to 1, ``[size, size]``.
    """
    angle = math.radians(turn)
    cosine, sine = math.cos(angle), math.sin(angle)
    scale = len(scan) / (size * height)
    # From a pixel to the place in the scan, both from their middles.
    a, b = scale * (cosine + shear * sine), scale * (-sine + shear * cosine)
    d, e = scale * sine, scale * cosine
    x, y = size * (0.5 + shift)
    middle = len(scan) / 2
    placing = (a, b, middle - a * x - b * y, d, e, middle - d * x - e * y)
    image = Image.fromarray(scan).transform(
        (size, size), Image.Transform.AFFINE, placing, Image.Resampling.BICUBIC
    )
    return np.asarray(image).astype(np.float64) / 255


main = partial(
    run_writer,
    write_two_inks,
    "two inks: {train} training and {val} held-out images of 10 classes in 2 lights, "
    "{size}x{size}, in {root}",
)


if __name__ == "__main__":
    sys.exit(main())
