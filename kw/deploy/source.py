"""From a checkpoint of a training run to a network that is ready for use, and its description."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..config.names import name_of_config
from ..config.tree import rebuilt
from ..models.build import without_sources
from ..training.trained import load_trained
from ..version import __version__
from ..warehouse import get_temperature, has_temperature, set_temperature
from .description import Description, InputRange

_FIGURES = ("top1", "top5", "mAP", "f1", "loss")


@dataclass(frozen=True)
class Source:
    """A trained network with its description.

    Attributes:
        network: in evaluation mode, at temperature 0, on the CPU.
        description: classes, preprocessing, configuration and figures.
        notes: what a user should know, a sentence each.
    """

    network: nn.Module
    description: Description
    notes: list[str]


def read_source(
    checkpoint: str | Path,
    config: str | Path | None = None,
    options: Iterable[str] = (),
    weights: str = "auto",
) -> Source:
    """The network of a checkpoint; arguments and errors as for :func:`load_trained`."""
    found = load_trained(checkpoint, config, options, weights)
    path, settings, network = found.file, found.config, found.network
    notes = []
    if has_temperature(network) and (tau := get_temperature(network)) > 0:
        notes.append(
            f"{path.name} was written at temperature {tau:.3g}, before annealing had ended; at 0 "
            "it is not what was evaluated"
        )
    classes = found.classes
    if classes is None:
        classes = [str(label) for label in range(settings.model.num_classes)]
        notes.append(f"{path.name} names no classes: they are called 0 to {len(classes) - 1}")
    figures = figures_of(found.meta, found.weights)
    description = Description(
        model=_name(config, path, settings),
        classes=classes,
        config=settings,
        weights=found.weights,
        epoch=found.meta.get("epoch"),
        metrics={name: figures[name] for name in _FIGURES if name in figures},
        input=InputRange.of(settings.data),
        versions={"kernelwarehouse": __version__, "torch": str(torch.__version__)},
    )
    return Source(ready(network), description, notes)


def without_places(config: Config) -> Config:
    """The configuration without paths and accounts of the machine that trained it."""
    teacher = config.distillation
    if teacher is not None:
        names = Path(teacher.teacher).name, Path(teacher.weights or "").name
        teacher = replace(teacher, teacher=names[0], weights=names[1] or None)
    data, hooks = config.data, config.hooks
    plain = {"dataset_args": data.dataset_args, "transforms": data.transforms}
    return replace(
        config,
        model=without_sources(config.model),
        data=replace(data, root=Path(data.root).name or "data", **rebuilt(plain, name_alone)),
        distillation=teacher,
        hooks=rebuilt(hooks, name_alone),
        loggers={},
    )


def name_alone(value: Any) -> Any:
    """Of a path that leads out of a folder, the name; any other setting as it is."""
    leads_out = isinstance(value, str) and value.startswith(("/", "~", ".."))
    return Path(value).name if leads_out else value


def ready(network: nn.Module) -> nn.Module:
    """The network as it is used: evaluation mode, temperature 0, no gradients."""
    if has_temperature(network):
        set_temperature(network, 0)
    return network.eval().requires_grad_(False)


def _name(config: str | Path | None, path: Path, settings: Config) -> str:
    """Its name: that of its configuration file or work directory."""
    if config is not None:
        return name_of_config(config)
    return path.absolute().parent.name or settings.model.name


def figures_of(meta: Mapping[str, Any], weights: str) -> dict[str, float]:
    """Figures of these weights, ``"model"`` or ``"ema"``, in the last evaluation of a checkpoint's
    run, by name; those that are finite, as JSON has no others."""
    found = meta.get("metrics")
    prefix = "ema_" if weights == "ema" else ""
    return {
        name.removeprefix(prefix): float(value)
        for name, value in (found.items() if isinstance(found, Mapping) else ())
        if name.startswith("ema_") == bool(prefix)
        and isinstance(value, int | float)
        and math.isfinite(value)
    }
