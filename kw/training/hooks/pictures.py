"""Pictures for the loggers: how layers use cells, and what a training batch looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...config.schema import PicturesConfig
from ...models import ImageClassifier
from ...pictures.batches import draw_batch, label_mixture
from ...pictures.cells import draw_cells
from ...pictures.coefficients import (
    CellUse,
    DynamicLayer,
    cell_shares,
    cell_use,
    coefficients,
    dynamic_layers,
)
from ...pictures.heatmaps import draw_attention
from ...pictures.samples import read_images, spaced
from ...pictures.style import check_matplotlib, to_pixels, to_tensor
from ...warehouse import KWLayer
from ..precision import autocast
from ..task import Metrics
from ..trainer import Trainer
from .base import Hook


class PictureHook(Hook):
    """Draws after the first epoch, every few epochs and the last; in the main process alone.

    The run is not changed by it: it draws no random number, and what it computes is forgotten. A
    static network gets pictures of batches alone.

    Args:
        config: how often, and of how many images.

    Raises:
        PictureError: matplotlib is missing.
    """

    def __init__(self, config: PicturesConfig) -> None:
        check_matplotlib()
        self.config = config
        self._batch: Any = None  # the first of the epoch that was seen

    def before_epoch(self, trainer: Trainer) -> None:
        self._batch = None

    def after_update(self, trainer: Trainer, losses: Mapping[str, Tensor]) -> None:
        if self._batch is None and self._is_due(trainer, trainer.epoch + 1):
            self._batch = trainer.batches[0]

    def after_epoch(self, trainer: Trainer, metrics: Metrics | None) -> None:
        if not self._is_due(trainer, trainer.epoch):
            return
        if self._batch is not None:
            self._show_batch(trainer)
        modules = trainer.task.network.modules()
        if any(isinstance(module, KWLayer) and module.is_mixture for module in modules):
            self._show_cells(trainer)

    def _is_due(self, trainer: Trainer, epoch: int) -> bool:
        due = epoch % self.config.interval == 0 or epoch in (1, trainer.config.epochs)
        return due and trainer.board is not None  # the main process alone has one

    def _show_batch(self, trainer: Trainer) -> None:
        """Again what training saw: a batch's random choices follow from its key."""
        preprocess = _preprocess(trainer)
        with torch.no_grad():
            images, targets = preprocess(self._batch, True)
        several = self._batch["labels"].ndim == 2
        self._batch = None
        how = trainer.task.classes, preprocess.label_smoothing, several
        labels = [label_mixture(target, *how) for target in targets.cpu()]
        pixels = to_pixels(images, preprocess.mean, preprocess.std)
        self._add(trainer, "batch", draw_batch(pixels, labels, _title(trainer)))

    def _show_cells(self, trainer: Trainer) -> None:
        network, dataset = trainer.task.network, trainer.val_loader.dataset
        batch = read_images(dataset, spaced(len(dataset), self.config.images))
        with torch.no_grad():
            images, _ = _preprocess(trainer)(batch, False)
        layers = dynamic_layers(network)
        with autocast(trainer.config.precision, trainer.process.device.type):
            use = cell_use([coefficients(network, images)])
        title = f"{_title(trainer)}, {len(images)} test images"
        self._add(trainer, "attention", draw_attention(layers, use, title))
        self._add(trainer, "cells", draw_cells(layers, use, title))
        assert trainer.board is not None
        shares = _mean_shares(layers, use)
        named = {f"cells/{name}": value for name, value in shares.items()}
        trainer.board.scalars(named, trainer.update)

    def _add(self, trainer: Trainer, name: str, figure: Any) -> None:
        assert trainer.board is not None
        pixels = to_tensor(figure).permute(1, 2, 0).numpy()
        trainer.board.image(f"pictures/{name}", pixels, trainer.update)


def _preprocess(trainer: Trainer) -> Any:
    assert isinstance(trainer.task.model, ImageClassifier)
    return trainer.task.model.preprocess


def _title(trainer: Trainer) -> str:
    return f"epoch {trainer.epoch}, update {trainer.update}"


def _mean_shares(layers: list[DynamicLayer], use: dict[str, CellUse]) -> dict[str, float]:
    """Shares of the absolute coefficients, averaged over the layers of each warehouse."""
    sums: dict[str, list[float]] = {}
    for layer in layers:
        shares = cell_shares(use[layer.name], layer)
        values = {part: shares.part(part) for part in ("own", "layer", "foreign")}
        for part, value in {**values, "negative": shares.negative}.items():
            sums.setdefault(f"{layer.warehouse}/{part}", []).append(value)
    return {name: sum(values) / len(values) for name, values in sums.items()}
