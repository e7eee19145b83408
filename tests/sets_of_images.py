"""Small copies of ImageNet's other test sets, and a network that reads a picture's grey.

The network knows the first twelve classes of ImageNet; class k is the grey 20 + 20 k. Its logits
are minus the squared distance to each class's grey, in steps of 20: a grey between two classes is
of the nearer one, and the other comes second.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from timm.models import register_model
from torch import Tensor, nn

from kw.evaluation.sets import wnids
from kw.training.checkpoint import save_checkpoint

CLASSES = list(wnids()[:12])


class ReadsGrey(nn.Module):
    """Images in [0, 1], ``[B, 3, S, S]``, -> logits ``[B, C]``."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_parameter("greys", nn.Parameter(20.0 + 20 * torch.arange(classes)))

    def forward(self, images: Tensor) -> Tensor:
        steps = (255 * images.mean((1, 2, 3))[:, None] - self.greys) / 20
        return -steps.square()


@register_model
def reads_grey(
    pretrained: bool = False, num_classes: int = 12, drop_rate: float = 0.0, **_: Any
) -> nn.Module:
    return ReadsGrey(num_classes)


def logits_of(grey: float) -> np.ndarray:
    """What the network says, in float64."""
    return -(((grey - (20 + 20 * np.arange(len(CLASSES)))) / 20) ** 2)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def write_grey(file: Path, label: float, left: float | None = None) -> Path:
    """A picture of the grey of a class, or between two; another class's in its left half."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((8, 8, 3), 20 + 20 * label)
    if left is not None:
        pixels[:, :4] = 20 + 20 * left
    Image.fromarray(pixels.round().astype(np.uint8)).save(file)
    return file


def write_run(folder: Path, classes: list[str] | None = CLASSES, **data: Any) -> Path:
    """A work directory of the network."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model": {"name": "reads_grey", "num_classes": 12},
        "data": {
            "root": str(folder / "data"),
            "input_size": 8,
            "workers": 0,
            "test_crop_ratio": 1.0,
            "mean": [0.0, 0.0, 0.0],
            "std": [1.0, 1.0, 1.0],
            **data,
        },
        "epochs": 1,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "batch_size": 4,
        "total_batch_size": 4,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    meta = {"epoch": 1} if classes is None else {"epoch": 1, "classes": classes}
    save_checkpoint({"state_dict": ReadsGrey(12).state_dict(), "meta": meta}, folder / "best.pth")
    return folder


def write_corruptions(
    root: Path, names: dict[str, str], wrong: Callable[[str, int], int], images: int = 4
) -> None:
    """ImageNet-C's layout: so many of a corruption's images are of another class's grey."""
    for group_and_name in names.items():
        name, group = group_and_name
        for severity in range(1, 6):
            for image in range(images):
                label = image % 2
                said = 7 if image < wrong(name, severity) else label
                where = root / group / name / str(severity) / CLASSES[label]
                write_grey(where / f"{image}.png", said)
