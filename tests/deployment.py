"""A small checkpoint that the tests of exports, loading and predictions share."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch

from kw.config import config_from_mapping, to_yaml
from kw.models import build_network
from kw.training.checkpoint import save_checkpoint

_SCRIPT = Path(__file__).parents[1] / "scripts" / "check_exports.py"
_script = runpy.run_path(str(_SCRIPT), run_name="read")
random_source, randomise = _script["random_source"], _script["randomise"]

CLASSES = ["bird", "cat", "dog", "fish"]
SETTINGS: dict[str, Any] = {
    "model": {
        "name": "resnet18",
        "num_classes": 4,
        "timm_args": {"channels": [8, 8, 8, 16], "layers": [1, 1, 1, 1]},
        "kernel_warehouse": {"plan": "resnet18", "cell_num_ratio": 1, "start": "paper"},
    },
    "data": {"root": "nowhere", "input_size": 40, "interpolation": "bilinear"},
    "epochs": 2,
    "total_batch_size": 4,
    "batch_size": 4,
    "optimizer": {"name": "sgd", "lr": 0.1},
}


def write_checkpoint(path: Path, settings: dict[str, Any], **meta: Any) -> Path:
    """A checkpoint as a run leaves it: a network at temperature 0.5 and its average, which differ,
    with random weights."""
    config = config_from_mapping(settings)
    torch.manual_seed(0)
    states = {}
    for seed, key in enumerate(("state_dict", "ema_state_dict")):
        network = build_network(config.model)
        randomise(network, torch.randn(32, config.data.channels, *config.data.shape), seed)
        states[key] = network.state_dict()
        for name, value in states[key].items():
            if name.endswith("temperature"):
                value.fill_(0.5)
    known = {"epoch": 2, "config": to_yaml(config), "classes": CLASSES}
    known["metrics"] = {"top1": 10.0, "ema_top1": 20.0, "ema_top5": 90.0}
    save_checkpoint({"meta": {**known, **meta}, **states}, path)
    return path
