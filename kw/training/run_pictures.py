"""From a configuration to pictures of a run: its batches and schedules (docs/visualizing.md)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..config.run_schema import RunConfig
from ..config.schema import Config
from ..data import deaths_explained, list_splits, open_training
from ..pictures.batches import draw_batch, label_mixture
from ..pictures.schedules import Curves, draw_schedules
from ..pictures.style import check_matplotlib, save, to_pixels
from .distributed import find_process
from .run import build_preprocessor
from .schedule import Schedule


def network_name(config: Config) -> str:
    """The network in words: ``"KernelWarehouse 4x resnet18"``."""
    model = config.model
    if model.kernel_warehouse is None:
        return f"{model.peer.method} {model.name}" if model.peer else model.name
    ratio = model.kernel_warehouse.cell_num_ratio
    return f"KernelWarehouse {'' if ratio is None else f'{ratio:g}x '}{model.name}"


def training_batch(config: Config, epoch: int, update: int) -> tuple[Tensor, Tensor, list[str]]:
    """The first micro-batch that the first process trains on in an update (from 1) of an epoch
    (from 1).

    Returns:
        Images, normalised ``[B, N, H, W]``; targets, labels ``[B]`` or probabilities ``[B, C]``;
        names of the classes.

    Raises:
        ConfigError: there is no such update.
        DataError: the data folder is not as expected.
    """
    listing = list_splits(config.data, config.model.num_classes)["train"]
    device = find_process("none").device
    loader = open_training(config, device, 0, 1, listing)
    sampler: Any = loader.batch_sampler
    for name, value, most in (
        ("--epoch", epoch, config.epochs),
        ("--update", update, sampler.updates_per_epoch),
    ):
        if value > most:
            raise ConfigError(f"{name} {value}: the run has {most}")
    sampler.set_epoch(epoch - 1, update - 1)
    with deaths_explained(loader):
        batch = next(iter(loader))
    with torch.no_grad():
        images, targets = build_preprocessor(config, device).to(device)(batch, True)
    return images, targets, list(listing.classes)


def picture_batch(config: Config, out: Path, *, epoch: int, update: int) -> None:
    """What the network sees in one update; arguments and errors as for :func:`training_batch`."""
    check_matplotlib()
    images, targets, classes = training_batch(config, epoch, update)
    how = classes, config.label_smoothing, config.several_classes
    labels = [label_mixture(target, *how) for target in targets.cpu()]
    preprocess = build_preprocessor(config, images.device).to(images.device)
    pictures = to_pixels(images, preprocess.mean, preprocess.std)
    title = f"training batch: {network_name(config)}, epoch {epoch}, update {update}"
    if config.label_smoothing:
        title += f", label smoothing {config.label_smoothing:g} not shown"
    save(draw_batch(pictures, labels, title), out)


def schedule_curves(config: RunConfig, updates: int = 100) -> Curves:
    """What a run sets before each update, and when that changes its course. The curves over epochs
    hardly depend on the number of updates in one, so that no data are needed; a warm-up that is
    counted in updates would, and is left out."""
    in_epochs = replace(config.schedule, warmup_updates=0)
    schedule = Schedule(replace(config, schedule=in_epochs), updates)
    # A long run needs no more points than a picture has.
    step = max(schedule.total_updates // 20_000, 1)
    steps = range(0, schedule.total_updates, step)
    marks = {}
    if schedule.warmup_updates:
        marks["warm-up ends"] = schedule.warmup_updates / schedule.updates_per_epoch
    if config.temperature_epochs:
        marks["temperature is 0"] = config.temperature_epochs
    if config.schedule.name == "step":
        for number, epoch in enumerate(config.schedule.milestones, 1):
            marks[f"step {number}"] = epoch
    return Curves(
        config.epochs,
        [u / updates for u in steps],
        [schedule.lr(u) for u in steps],
        [schedule.temperature(u) for u in steps] if config.temperature_epochs else None,
        config.optimizer.weight_decay,
        config.optimizer.name == "adamw",
        marks,
    )


def picture_schedules(config: RunConfig, out: Path, *, title: str) -> None:
    """The schedules of a run, before it; needs neither data nor a network.

    Raises:
        PictureError: ``out`` cannot be written, or matplotlib is missing.
    """
    if config.schedule.warmup_updates:
        title += f"; not drawn: warm-up of {config.schedule.warmup_updates} updates"
    save(draw_schedules(schedule_curves(config), title), out)
