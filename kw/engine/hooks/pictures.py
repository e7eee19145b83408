"""Pictures for TensorBoard: how layers use cells, and what a training batch looks like."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook

from ...config.schema import PicturesConfig
from ...pictures import (
    CellUse,
    DynamicLayer,
    cell_shares,
    cell_use,
    check_matplotlib,
    coefficients,
    draw_attention,
    draw_batch,
    draw_cells,
    dynamic_layers,
    label_mixture,
    read_images,
    spaced,
    to_pixels,
    to_tensor,
)
from ...registry import HOOKS
from ...warehouse import KWLayer
from ..optim import autocast

__all__ = ["PictureHook"]


@HOOKS.register_module()
class PictureHook(Hook):
    """Draws after the first epoch, every few epochs and the last; in the main process alone.

    The run is not changed by it: it draws no random number, and what it computes is forgotten. A
    static network gets pictures of batches alone.

    Args:
        config: how often, and of how many images.

    Raises:
        PictureError: matplotlib is missing.
    """

    priority = "LOWEST"  # after the checkpoint, which does not wait for pictures

    def __init__(self, config: PicturesConfig) -> None:
        check_matplotlib()
        self.config = config
        self._batch: Any = None  # the first of the epoch that was seen

    def before_train_epoch(self, runner: Any) -> None:
        self._batch = None

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        if self._batch is None and self._is_due(runner, runner.epoch + 1):
            self._batch = runner.train_loop.batches[0]

    def after_epoch(self, runner: Any, metrics: Any) -> None:
        if not self._is_due(runner, runner.epoch):
            return
        if self._batch is not None:
            self._show_batch(runner)
        if any(isinstance(module, KWLayer) for module in runner.task.network.modules()):
            self._show_cells(runner)

    def _is_due(self, runner: Any, epoch: int) -> bool:
        due = epoch % self.config.interval == 0 or epoch in (1, runner.max_epochs)
        return due and runner.board is not None  # the main process alone has one

    def _show_batch(self, runner: Any) -> None:
        """Again what training saw: a batch's random choices follow from its key."""
        preprocess = runner.task.model.data_preprocessor
        with torch.no_grad():
            images, targets = preprocess(self._batch, True)
        self._batch = None
        smoothing = preprocess.label_smoothing
        labels = [label_mixture(t, runner.task.classes, smoothing) for t in targets.cpu()]
        pixels = to_pixels(images, preprocess.mean, preprocess.std)
        self._add(runner, "batch", draw_batch(pixels, labels, _title(runner)))

    def _show_cells(self, runner: Any) -> None:
        network, dataset = runner.task.network, runner.val_dataloader.dataset
        batch = read_images(dataset, spaced(len(dataset), self.config.images))
        with torch.no_grad():
            images, _ = runner.task.model.data_preprocessor(batch, False)
        layers = dynamic_layers(network)
        with autocast(runner.config.precision, runner.process.device.type):
            use = cell_use([coefficients(network, images)])
        title = f"{_title(runner)}, {len(images)} test images"
        self._add(runner, "attention", draw_attention(layers, use, title))
        self._add(runner, "cells", draw_cells(layers, use, title))
        for name, value in _mean_shares(layers, use).items():
            runner.board.add_scalar(f"cells/{name}", value, runner.iter)

    def _add(self, runner: Any, name: str, figure: Any) -> None:
        runner.board.add_image(f"pictures/{name}", to_tensor(figure), runner.iter)


def _title(runner: Any) -> str:
    return f"epoch {runner.epoch}, update {runner.iter}"


def _mean_shares(layers: list[DynamicLayer], use: dict[str, CellUse]) -> dict[str, float]:
    """Shares of the absolute coefficients, averaged over the layers of each warehouse."""
    sums: dict[str, list[float]] = {}
    for layer in layers:
        shares = cell_shares(use[layer.name], layer)
        values = {part: shares.part(part) for part in ("own", "layer", "foreign")}
        for part, value in {**values, "negative": shares.negative}.items():
            sums.setdefault(f"{layer.warehouse}/{part}", []).append(value)
    return {name: sum(values) / len(values) for name, values in sums.items()}
