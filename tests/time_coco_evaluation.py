"""Time COCO's evaluation by ``CocoEvaluator`` and by pycocotools; not a test.

    python tests/time_coco_evaluation.py [--images 5000] [--no-masks]

The set is random, of the size of COCO's validation set: images of about 640 x 480 with 7 objects
and 100 detections each, 80 categories. Prints the seconds of both, what each part of ours takes,
and the largest difference between the figures.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from coco_sets import random_set, reference, write

from kw.detection.evaluation import CocoEvaluator


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--no-masks", action="store_true", help="boxes only")
    args = parser.parse_args()
    truth, found = random_set(
        np.random.default_rng(0),
        images=args.images,
        classes=80,
        objects=7,
        detections=100,
        size=(620, 460),
    )
    count = sum(len(each["scores"]) for each in found.values())
    print(f"{args.images:,} images, {len(truth['annotations']):,} objects, {count:,} detections")
    masks = not args.no_masks
    clock = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder:
        evaluator = CocoEvaluator(write(truth, Path(folder) / "truth.json"), masks=masks)
    clock.append(time.perf_counter())
    for image_id, each in found.items():
        evaluator.add(image_id, **each)
    clock.append(time.perf_counter())
    figures = evaluator.compute()
    clock.append(time.perf_counter())
    read, add, compute = np.diff(clock)
    print(f"CocoEvaluator: compute {compute:.1f} s (besides: read {read:.1f} s, add {add:.1f} s)")
    start = time.perf_counter()
    expected = reference(truth, found, ("bbox", "segm") if masks else ("bbox",))
    print(f"pycocotools: {time.perf_counter() - start:.1f} s")
    for name, value in expected.items():
        print(f"{name:12} {figures[name]!r:22} {value!r}")
    far = max(abs((-1 if figures[k] is None else figures[k]) - expected[k]) for k in expected)
    print(f"largest difference: {far:.1e}")


if __name__ == "__main__":
    main()
