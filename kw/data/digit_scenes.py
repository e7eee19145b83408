"""The detection demo's data: handwritten digits scattered over canvases, annotated as COCO is.

The scans are those of :mod:`kw.data.digits`, so that this demo needs no download either::

    python -m kw.data.digit_scenes ROOT
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kw.data.digits import choose_val, load_scans
from kw.data.reading import DataError
from kw.data.seeding import derive_seed
from kw.data.whole_folder import run_writer, whole_folder

__all__ = ["Scene", "compose_scene", "encode_mask", "write_digit_scenes"]

# All of about one area, and multiples of 16: little of a batch is padding.
SHAPES = ((128, 128), (112, 144), (144, 112))
MOST_DIGITS = 6
EMPTY_SHARE = 0.03
# Heights in pixels; the scans have 8 rows.
SMALLEST, LARGEST = 22, 60
# Of a digit's ink, what border and later digits leave to be seen.
LEAST_VISIBLE = 0.7
# Where a blurred edge counts as ink, of 255. Between the outer two, the digit is translucent.
_INK = 112
_INK_EDGES = (80, 144)
_FILE = "{:06d}.png"


@dataclass(frozen=True)
class Scene:
    """One canvas and what is on it, from back to front.

    Attributes:
        image: RGB, uint8 ``[height, width, 3]``.
        digits: the digit of each object.
        scans: which scan each object was made from.
        masks: where each object is seen, bool ``[objects, height, width]``; they are disjoint.
    """

    image: np.ndarray
    digits: list[int]
    scans: list[int]
    masks: np.ndarray


def write_digit_scenes(
    root: str | os.PathLike[str], train: int = 1200, val: int = 120, seed: int = 0
) -> dict[str, int]:
    """Write canvases and their annotations in COCO's format.

    ``root/train/*.png``, ``root/val/*.png`` and ``root/annotations/instances_{train,val}.json``,
    with the categories "0" to "9", whose ids are 1 to 10. Masks are run lengths, because a polygon
    has no holes, and those of visible ink. Besides COCO's fields, an annotation tells its scan.

    Train and val canvases share no scan; the split is that of :func:`kw.data.digits.write_digits`,
    so that a network that was trained on its train images has not seen the digits of val canvases.
    The folder appears only when it is complete; one that is complete, with the same settings, is
    left as it is.

    Args:
        root: folder to write; it must be absent, empty, or written by this function before.
        train: number of canvases to train on.
        val: number of canvases to validate on.
        seed: seed of the canvases. A canvas does not depend on how many there are.

    Returns:
        The number of canvases in ``train`` and ``val``.

    Raises:
        DataError: ``root`` has other content.
        ImportError: scikit-learn is not installed.
    """
    root = Path(root).expanduser().absolute()
    sizes = {"train": train, "val": val}
    settings = {**sizes, "seed": seed}
    with whole_folder(root, "digit_scenes.json", settings, "digit scenes") as partial:
        if partial is None:
            return _check_count(root, sizes)
        scans, labels = load_scans()
        held_out = choose_val(labels)
        (partial / "annotations").mkdir()
        for split, size in sizes.items():
            pool = [i for i in range(len(scans)) if (i in held_out) == (split == "val")]
            (partial / split).mkdir()
            scenes = []
            for number in range(1, size + 1):
                scene_seed = derive_seed("digit scene", seed, split, number)
                generator = np.random.RandomState([scene_seed & 0xFFFFFFFF, scene_seed >> 32])
                scenes.append(compose_scene(scans, labels, pool, generator))
                image = Image.fromarray(scenes[-1].image)
                image.save(partial / split / _FILE.format(number))
            text = json.dumps(_coco(scenes, split), separators=(",", ":"))
            (partial / "annotations" / f"instances_{split}.json").write_text(text + "\n")
    return sizes


def compose_scene(
    scans: np.ndarray,
    labels: np.ndarray,
    pool: Sequence[int],
    generator: np.random.RandomState,
) -> Scene:
    """Scatter digits over one canvas; later ones cover earlier ones.

    Args:
        scans: ink from 0 to 255, uint8 ``[N, 8, 8]``.
        labels: the digit of every scan, ``[N]``.
        pool: the scans to choose from.
        generator: what everything random is drawn from.

    Returns:
        The canvas. Of each digit on it, 70% of the ink is visible at least.
    """
    shape = SHAPES[generator.randint(len(SHAPES))]
    canvas = _background(shape, generator)
    count = 0 if generator.rand() < EMPTY_SHARE else generator.randint(1, MOST_DIGITS + 1)
    chosen: list[int] = []
    masks: list[np.ndarray] = []
    inks: list[int] = []  # of each digit, all that it has, pixels
    for _ in range(count):
        scan = pool[generator.randint(len(pool))]
        ink = _enlarge(scans[scan], generator)
        # Between grey and a saturated colour, and never as dark as a background.
        colour = generator.randint(90, 256, 3).astype(np.float64)
        colour *= generator.randint(170, 256) / colour.max()
        total = int((ink >= _INK).sum())
        for _ in range(20):
            # Positions have the digit's centre on the canvas, so that some digits are cut.
            top = generator.randint(shape[0]) - ink.shape[0] // 2
            left = generator.randint(shape[1]) - ink.shape[1] // 2
            placed = _place(ink, shape, top, left)
            mask = placed >= _INK
            remaining = [earlier & ~mask for earlier in masks] + [mask]
            if all(
                part.sum() >= LEAST_VISIBLE * whole
                for part, whole in zip(remaining, [*inks, total], strict=True)
            ):
                low, high = _INK_EDGES
                alpha = ((placed.astype(np.float64) - low) / (high - low)).clip(0, 1)[..., None]
                canvas = canvas * (1 - alpha) + colour * alpha
                chosen.append(scan)
                masks, inks = remaining, [*inks, total]
                break
    image = np.rint(canvas + generator.randint(-6, 7, (*shape, 1))).clip(0, 255)
    return Scene(
        image.astype(np.uint8),
        [int(labels[scan]) for scan in chosen],
        chosen,
        np.array(masks, bool).reshape(-1, *shape),
    )


def encode_mask(mask: np.ndarray) -> dict[str, list[int]]:
    """A mask as COCO's uncompressed run lengths.

    Args:
        mask: bool ``[height, width]``.

    Returns:
        ``size``, height and width; ``counts``, lengths of runs of zeros and ones in turn, down the
        columns. The first is of zeros and may be 0.
    """
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = [0, *changes.tolist(), flat.size]
    counts = [end - start for start, end in itertools.pairwise(edges)]
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def _enlarge(scan: np.ndarray, generator: np.random.RandomState) -> np.ndarray:
    # Equal steps in the logarithm would need functions whose last digit differs between machines.
    height = SMALLEST + (LARGEST - SMALLEST) * generator.rand() ** 1.5
    width = height * generator.uniform(0.8, 1.2)
    # An empty rim, for strokes that reach the scan's border to have an edge of their own there.
    padded = Image.fromarray(np.pad(scan, 1))
    size = (round(width * 10 / 8), round(height * 10 / 8))
    return np.asarray(padded.resize(size, Image.Resampling.BICUBIC))


def _place(ink: np.ndarray, shape: tuple[int, int], top: int, left: int) -> np.ndarray:
    placed = np.zeros(shape, np.uint8)
    bottom, right = top + ink.shape[0], left + ink.shape[1]
    placed[max(top, 0) : bottom, max(left, 0) : right] = ink[
        max(-top, 0) : max(shape[0] - top, 0), max(-left, 0) : max(shape[1] - left, 0)
    ]
    return placed


def _background(shape: tuple[int, int], generator: np.random.RandomState) -> np.ndarray:
    """A dark colour that varies smoothly, and strokes of little contrast; floats around 20-90."""
    coarse = generator.randint(0, 256, (4, 4, 3)).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC)
    change = (np.asarray(smooth).astype(np.float64) - 128) * (generator.randint(10, 31) / 128)
    canvas = generator.randint(25, 75, 3) + change
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    for _ in range(generator.randint(0, 7)):
        y, x, dy, dx = (generator.rand(4) - [0, 0, 0.5, 0.5]) * [*shape, 100, 100]
        # The squared distance to a line between two points.
        along = ((rows - y) * dy + (columns - x) * dx) / (dy * dy + dx * dx + 1e-6)
        along = along.clip(0, 1)
        distance = (rows - y - along * dy) ** 2 + (columns - x - along * dx) ** 2
        radius = generator.uniform(1, 4)
        stroke = (radius * radius + 1 - distance).clip(0, 1)
        canvas += generator.randint(-25, 41) * stroke[..., None]
    return canvas


def _coco(scenes: Sequence[Scene], split: str) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, 1):
        height, width = scene.image.shape[:2]
        name = _FILE.format(number)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for digit, scan, mask in zip(scene.digits, scene.scans, scene.masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": digit + 1,
                    "bbox": [int(side) for side in box],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": encode_mask(mask),
                    "scan": int(scan),
                }
            )
    return {
        "info": {"description": f"Handwritten digits on canvases, {split}"},
        "licenses": [],
        "categories": [
            {"id": digit + 1, "name": str(digit), "supercategory": "digit"} for digit in range(10)
        ],
        "images": images,
        "annotations": annotations,
    }


def _check_count(root: Path, sizes: dict[str, int]) -> dict[str, int]:
    for split, size in sizes.items():
        found = len(list((root / split).glob("*.png")))
        if found != size or not (root / "annotations" / f"instances_{split}.json").is_file():
            raise DataError(
                f"{root} should have {size} images in {split}/, found {found}, and "
                f"annotations/instances_{split}.json: delete it and run this program again"
            )
    return sizes


main = partial(
    run_writer,
    write_digit_scenes,
    "digit scenes: {train} training and {val} test images with boxes and masks of 10 classes, "
    "in {root}",
)


if __name__ == "__main__":
    sys.exit(main())
