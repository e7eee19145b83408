"""Images of a shape each, with labels as Ultralytics reads them for a task."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageDraw

NAMES = ("square", "triangle", "bar")


def make_data(root: Path, task: str, classes: int) -> str:
    """Eight images to train and four to test; returns what ``data=`` takes. A task is "detect",
    "segment", "pose" (three points) or "classify"."""
    draw_from = random.Random(0)
    for split, count in (("train", 8), ("val", 4)):
        for i in range(count):
            kind = i % classes
            w, h = draw_from.uniform(0.3, 0.5), draw_from.uniform(0.3, 0.5)
            x, y = draw_from.uniform(w / 2, 1 - w / 2), draw_from.uniform(h / 2, 1 - h / 2)
            left, right, top, bottom = x - w / 2, x + w / 2, y - h / 2, y + h / 2
            points = [(left, bottom), (right, bottom), (right, top), (left, top)]
            if kind == 1:
                points[2:] = [(x, top)]
            image = Image.new("RGB", (64, 64), tuple(draw_from.randrange(60) for _ in range(3)))
            ImageDraw.Draw(image).polygon([(a * 64, b * 64) for a, b in points], (230, 90, kind))
            if task == "classify":
                folder = root / split / NAMES[kind]
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{i}.png")
                continue
            for name in ("images", "labels"):
                (root / name / split).mkdir(parents=True, exist_ok=True)
            image.save(root / "images" / split / f"{i}.png")
            numbers = [x, y, w, h]
            if task == "segment":
                numbers = [value for point in points for value in point]
            if task == "pose":
                numbers += [value for point in points[:3] for value in (*point, 2)]
            line = " ".join(map(str, [kind, *numbers]))
            (root / "labels" / split / f"{i}.txt").write_text(line)
    if task == "classify":
        return str(root)
    lines = [f"path: {root}", "train: images/train", "val: images/val"]
    lines += [f"names: {dict(enumerate(NAMES[:classes]))}"]
    (root / "data.yaml").write_text("\n".join([*lines, *["kpt_shape: [3, 3]"] * (task == "pose")]))
    return str(root / "data.yaml")
