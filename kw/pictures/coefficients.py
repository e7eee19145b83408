"""The coefficients that a network's attention gives to its layers, and summaries of them.

Legend: B images, m mixtures of a layer, n cells of its warehouse, C classes. Coefficients are
``alpha`` of Eq. 5 (KernelWarehouse, ICML 2024, arXiv 2406.07879), after the null cell was dropped
and at the temperature that the network has.

A mixture's *own cell* is the one that the one-hot start gives it (``beta`` of Eq. 5); a layer's
cells are those that its mixtures start on; all others are *foreign*: they belong to other layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..warehouse import KWLayer
from ..warehouse.partition import CellSlice
from ..warehouse.probe import evaluating


class PictureError(UserError):
    """There is nothing of this kind to draw."""


@dataclass(frozen=True)
class DynamicLayer:
    """A layer whose kernel is assembled, and the cells that it started on."""

    name: str
    warehouse: str
    mixtures: int  # m
    cells: int  # n, cells of the warehouse
    own: CellSlice  # the layer's cells, and which mixture started on which

    def own_mask(self) -> Tensor:
        """Where a mixture meets its own cell, bool ``[m, n]``: ``beta`` of Eq. 5."""
        mask = torch.zeros(self.mixtures, self.cells, dtype=torch.bool)
        for mixture, cell in enumerate(self.own.owners):
            if cell is not None:
                mask[mixture, cell] = True
        return mask


def dynamic_layers(network: nn.Module) -> list[DynamicLayer]:
    """The dynamic layers of a network, by warehouse and then in the order of their cells.

    Raises:
        PictureError: it has none.
    """
    found: dict[str, list[DynamicLayer]] = {}
    for name, module in network.named_modules():
        if isinstance(module, KWLayer) and module.is_mixture:
            partition = module.warehouse.partition
            slot = next(i for i, own in enumerate(partition.layers) if own is module.partition)
            layer = DynamicLayer(
                name,
                module.warehouse.name,
                module.partition.mixtures,
                partition.cells,
                partition.slices[slot],
            )
            found.setdefault(layer.warehouse, []).append(layer)
    if not found:
        raise PictureError(
            f"{type(network).__name__} is a static network, or one of FDConv or KernelDNA: it has "
            "no coefficients, cells or assembled kernels to draw; expected one with "
            "model.kernel_warehouse or another model.peer"
        )
    return [
        layer
        for group in found.values()
        for layer in sorted(group, key=lambda layer: layer.own.start)
    ]


@contextmanager
def outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Inside it, the outputs of modules in a forward pass are recorded, by their names."""
    seen: dict[str, Any] = {}

    def keep(name: str, _module: Any, _inputs: Any, output: Any) -> None:
        seen[name] = output

    handles = [m.register_forward_hook(partial(keep, name)) for name, m in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attentions(
    network: nn.Module, images: Tensor, names: Collection[str] | None = None
) -> dict[str, Any]:
    """What the attention of layers gives, by their names; otherwise as :func:`coefficients`."""
    branches = {
        name: module.attention
        for name, module in network.named_modules()
        if isinstance(module, KWLayer) and module.is_mixture and (names is None or name in names)
    }
    with evaluating(network), outputs(branches) as seen:
        # Not __call__: a network that network.compile() has compiled calls no hooks.
        network.forward(images)
    return seen


def coefficients(
    network: nn.Module, images: Tensor, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Layers' coefficients for some images, in evaluation mode.

    Draws no random number and leaves the network as it was.

    Args:
        network: with dynamic layers.
        images: preprocessed, ``[B, 3, S, S]``, on the network's device.
        names: names of the layers; default: all.

    Returns:
        ``[B, m, n]`` by name of the layer, float32, on that device.
    """
    return {
        name: (found if isinstance(found, Tensor) else found.alpha).float()  # ODConv's has more
        for name, found in attentions(network, images, names).items()
    }


@dataclass(frozen=True)
class CellUse:
    """How a layer's mixtures use the cells, over images."""

    positive: Tensor  # mean of max(alpha, 0), [m, n]
    negative: Tensor  # mean of max(-alpha, 0), [m, n]

    @property
    def mean(self) -> Tensor:
        """Mean coefficient, ``[m, n]``."""
        return self.positive - self.negative

    @property
    def absolute(self) -> Tensor:
        """Mean of ``|alpha|``, ``[m, n]``."""
        return self.positive + self.negative


def cell_use(batches: Iterable[Mapping[str, Tensor]]) -> dict[str, CellUse]:
    """Averages over images, of what :func:`coefficients` gives for at least one batch; batches are
    taken one at a time."""
    sums: dict[str, Tensor] = {}  # [2, m, n]: positive, negative
    count = 0
    for batch in batches:
        count += len(next(iter(batch.values())))
        for name, alpha in batch.items():
            signs = torch.stack([alpha.clamp(min=0).sum(0), (-alpha).clamp(min=0).sum(0)])
            sums[name] = sums.get(name, 0) + signs.double().cpu()
    return {name: CellUse(*(signs / count)) for name, signs in sums.items()}


@dataclass(frozen=True)
class CellShares:
    """Where the absolute coefficients of a layer's mixtures go, on average over its mixtures.

    The six sum to the mean of ``sum_j |alpha_ij|`` over mixtures; under the contrasting function
    what is missing to 1 went to the null cell.
    """

    own: tuple[float, float]  # to a mixture's own cell: (positive, negative)
    layer: tuple[float, float]  # to the layer's other cells
    foreign: tuple[float, float]  # to cells of other layers

    @property
    def total(self) -> float:
        """The sum of all six."""
        return sum((*self.own, *self.layer, *self.foreign))

    @property
    def negative(self) -> float:
        """The negative ones' share of :attr:`total`."""
        return (self.own[1] + self.layer[1] + self.foreign[1]) / max(self.total, 1e-12)

    def part(self, name: str) -> float:
        """The share of ``"own"``, ``"layer"`` or ``"foreign"`` in :attr:`total`."""
        return sum(getattr(self, name)) / max(self.total, 1e-12)


def cell_shares(use: CellUse, layer: DynamicLayer) -> CellShares:
    """Sum a layer's use of cells by the owners of the cells."""
    own = layer.own_mask()
    inside = torch.zeros_like(own)
    inside[:, layer.own.start : layer.own.stop] = True

    def of(where: Tensor) -> tuple[float, float]:
        signs = (use.positive, use.negative)
        positive, negative = (float(sign[where].sum()) / layer.mixtures for sign in signs)
        return positive, negative

    return CellShares(of(own), of(inside & ~own), of(~inside))


class LayerMeasure(NamedTuple):
    """The coefficients of a layer over some images, in a few numbers.

    A layer whose coefficients are the one-hot start is a static one; one whose coefficients do not
    vary with the image is a static one too, of another kernel.
    """

    layer: str
    mixtures: int
    cells: int
    own: float
    """coefficient of a mixture's own cell, mean over mixtures that have one and over images"""
    others: float
    """sum of the magnitudes of a mixture's other coefficients, mean over mixtures and images"""
    negative: float
    """share of the coefficients that are below zero"""
    variation: float
    """deviation over the images / mean over the images, each a root mean square over coefficients;
    0: the same for every image"""


def measure_layer(layer: DynamicLayer, alpha: Tensor) -> LayerMeasure:
    """Measure a layer's coefficients ``[B, m, n]`` for at least two images."""
    alpha = alpha.double()
    start = layer.own_mask().to(alpha)  # [m, n]
    own = (alpha * start).sum() / (start.sum() * len(alpha))
    others = (alpha * (1 - start)).abs().sum(-1).mean()
    mean, deviation = alpha.mean(0), alpha.std(0)
    return LayerMeasure(
        layer.name,
        layer.mixtures,
        layer.cells,
        float(own),
        float(others),
        float((alpha < 0).double().mean()),
        float((deviation.square().mean() / mean.square().mean()).sqrt()),
    )


def class_effect(alpha: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """How coefficients differ between classes.

    Args:
        alpha: a layer's coefficients, ``[B, m, n]``.
        labels: int64 ``[B]``; at least two classes and more images than classes.

    Returns:
        For every class that occurs, in rising order, its mean coefficient of each cell over images
        and mixtures, less the mean over classes, ``[C, n]``; and the share of the coefficients'
        variance over images that lies between classes, corrected for what as many random groups
        would show (epsilon squared, Kelley 1935): 0 when classes do not matter, 1 when nothing else
        does.

    Raises:
        PictureError: there are fewer than two classes, or no more images than classes.
    """
    found = labels.unique()
    count, groups = len(labels), len(found)
    if groups < 2 or count <= groups:
        raise PictureError(
            f"{count} images of {groups} classes: expected at least two classes and more images "
            "than classes to compare them"
        )
    values = alpha.double().flatten(1)  # [B, m * n]
    means = torch.stack([values[labels == label].mean(0) for label in found])  # [C, m * n]
    rows = torch.searchsorted(found, labels)
    within = float((values - means[rows]).square().sum())
    total = float((values - values.mean(0)).square().sum())
    effect = 1 - (within / (count - groups)) / (total / (count - 1)) if total > 0 else 0.0
    by_cell = means.unflatten(1, alpha.shape[1:]).mean(1)  # [C, n]
    return (by_cell - by_cell.mean(0)).cpu(), effect
