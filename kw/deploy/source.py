"""From a checkpoint of a training run to a network that is ready for use, and its description."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Config, ConfigError, config_from_text, load_config
from ..engine.checkpoint import CheckpointError, load_checkpoint, load_network, named_classes
from ..engine.saving import checkpoints
from ..models.build import build_network, check_network
from ..version import __version__
from ..warehouse import get_temperature, has_temperature, set_temperature
from .description import Description, InputRange

__all__ = ["WEIGHTS", "Source", "find_checkpoint", "read_source", "ready"]

WEIGHTS = ("auto", "model", "ema")


@dataclass(frozen=True)
class Source:
    """A trained network and what is known of it.

    Attributes:
        network: in evaluation mode, at temperature 0, on the CPU.
        description: of it.
        notes: what a user should know, a sentence each.
    """

    network: nn.Module
    description: Description
    notes: list[str]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path stands for: a file itself, the best or newest of a work directory.

    Raises:
        CheckpointError: the directory holds none.
    """
    if not path.is_dir():
        return path
    best = path / "best.pth"
    found = [best] if best.is_file() else checkpoints(path)[-1:]
    if not found:
        raise CheckpointError(
            f"{path}: expected a work directory of tools/train.py; no *.pth there"
        )
    return found[0]


def read_source(
    checkpoint: str | Path,
    config: str | Path | None = None,
    options: Iterable[str] = (),
    weights: str = "auto",
) -> Source:
    """The network of a checkpoint.

    Args:
        checkpoint: a file that tools/train.py wrote, or its work directory.
        config: the configuration file; left out, the checkpoint's own.
        options: ``key=value`` settings over the configuration file's.
        weights: ``"model"``, ``"ema"``, or ``"auto"`` for those that the run's figures stand for:
            the moving average where there is one.

    Raises:
        CheckpointError: it cannot be read, is of another model, or lacks what is asked for.
        ConfigError: the configuration is wrong.
    """
    path = find_checkpoint(Path(checkpoint))
    saved = load_checkpoint(path)
    meta = saved.get("meta", {})
    settings = _config(path, meta) if config is None else load_config(config, options)
    if weights == "auto":
        weights = "ema" if "ema_state_dict" in saved else "model"
    state = saved.get("ema_state_dict" if weights == "ema" else "state_dict")
    if state is None:
        raise CheckpointError(
            f"checkpoint {path}: holds no moving average; use the model's weights"
        )
    network = build_network(settings.model)
    check_network(network, settings.model, settings.data.input_size)
    load_network(network, state, str(path))
    notes = []
    if has_temperature(network) and (tau := get_temperature(network)) > 0:
        notes.append(f"{path} was written at temperature {tau:.3g}, before annealing had ended")
    classes = named_classes(saved, settings.model.num_classes, str(path))
    if classes is None:
        classes = [str(label) for label in range(settings.model.num_classes)]
        notes.append(f"{path} names no classes: they are called 0 to {len(classes) - 1}")
    description = Description(
        model=_name(config, path, settings),
        classes=classes,
        config=settings,
        weights=weights,
        epoch=meta.get("epoch"),
        metrics=_metrics(meta, weights),
        input=InputRange(settings.data.input_size),
        versions={"kernelwarehouse": __version__, "torch": str(torch.__version__)},
    )
    return Source(ready(network), description, notes)


def ready(network: nn.Module) -> nn.Module:
    """The network as it is used: evaluation mode, temperature 0, no gradients."""
    if has_temperature(network):
        set_temperature(network, 0)
    return network.eval().requires_grad_(False)


def _config(path: Path, meta: Mapping[str, Any]) -> Config:
    text = meta.get("config")
    if not isinstance(text, str):
        raise CheckpointError(f"checkpoint {path}: holds no configuration (meta.config)")
    try:
        return config_from_text(text, f"configuration in {path}")
    except ConfigError as error:
        if "\nmodel = dict(" in text or text.startswith("model = "):
            raise CheckpointError(
                f"checkpoint {path}: is a detector's; expected one of a classifier"
            ) from error
        raise


def _name(config: str | Path | None, path: Path, settings: Config) -> str:
    """What to call it: after its configuration file or work directory."""
    if config is not None:
        return Path(config).stem
    return path.absolute().parent.name or settings.model.name


def _metrics(meta: Mapping[str, Any], weights: str) -> dict[str, float]:
    """Figures of these weights in the run's last evaluation."""
    found = meta.get("metrics")
    if not isinstance(found, Mapping):
        return {}
    prefix = "ema_" if weights == "ema" else ""
    named = {name: found.get(prefix + name) for name in ("top1", "top5", "loss")}
    return {name: float(v) for name, v in named.items() if isinstance(v, int | float)}
