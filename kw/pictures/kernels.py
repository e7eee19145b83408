"""Kernels assembled for two images, beside one another and as a difference.

Legend: O, I output and input channels (I of one group), k kernel size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..warehouse import KWLayer
from ..warehouse.ops.assembly import assemble
from .coefficients import attentions
from .style import SIGNED, add_bar, new_figure, shorten, show_image, signed_limit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOSAIC, _MATRIX = 10, 96  # channels shown along an axis: of spatial kernels, of pointwise ones


@torch.no_grad()
def assembled_kernels(
    network: nn.Module, images: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """The kernels that layers assemble for some images.

    Args:
        network: with dynamic layers.
        images: preprocessed, ``[B, 3, S, S]``.
        names: of layers.

    Returns:
        ``[B, O, I, k_1 .. k_d]`` by name, float32.
    """
    found = attentions(network, images, names)
    kernels = {}
    for name in names:
        layer, given = network.get_submodule(name), found[name]
        assert isinstance(layer, KWLayer)
        alpha = given if isinstance(given, Tensor) else given.alpha
        kernel = assemble(alpha.float(), layer.warehouse.cells.float(), layer.spec)
        if not isinstance(given, Tensor):  # ODConv's, which scales input and output as well
            out, into = kernel.shape[1:3]
            of_group = given.channel.float().view(len(kernel), -1, 1, into)  # [B, g, 1, I]
            channel = of_group.expand(-1, -1, out // of_group.shape[1], -1).reshape(-1, out, into)
            kernel = kernel * channel[..., None, None]
            if given.filter is not None:
                kernel = kernel * given.filter.float()[:, :, None, None, None]
        kernels[name] = kernel.cpu()
    return kernels


def difference(a: Tensor, b: Tensor) -> float:
    """``|a - b| / sqrt(|a| |b|)`` in Frobenius norms: 0 for equal kernels, 1.41 for unrelated ones
    of one size."""
    size = math.sqrt(float(a.norm()) * float(b.norm()))
    return float((a - b).norm()) / max(size, 1e-12)


def mosaic(kernel: Tensor) -> Tensor:
    """A kernel as one map: output channels down, input channels across, the first of each.

    Args:
        kernel: ``[O, I, *k]``; a 1-D kernel is drawn as a row, of a 3-D one the middle slice.

    Returns:
        ``[rows, columns]``; tiles of spatial kernels have a gap of NaN between them.
    """
    if kernel.ndim == 3:
        kernel = kernel.unsqueeze(2)
    if kernel.ndim == 5:
        kernel = kernel[:, :, kernel.shape[2] // 2]
    if kernel.shape[2:].numel() == 1:
        return kernel[:_MATRIX, :_MATRIX, 0, 0]
    if kernel.shape[1] == 1:  # depthwise: output channels in rows of a mosaic
        columns = min(len(kernel), _MOSAIC)
        kernel = kernel[: len(kernel) // columns * columns]
        kernel = kernel.unflatten(0, (-1, columns)).squeeze(2)
    tiles = kernel[:_MOSAIC, :_MOSAIC]  # [o, i, k, k]
    tiles = nn.functional.pad(tiles, (0, 1, 0, 1), value=math.nan)
    return tiles.transpose(1, 2).flatten(2).flatten(0, 1)[:-1, :-1]  # [o * (k + 1), i * (k + 1)]


def draw_kernels(
    kernels: Mapping[str, Tensor], pictures: Any, names: Sequence[str], title: str
) -> Figure:
    """One row a layer: the kernel of either image, and the second less the first.

    Args:
        kernels: ``[2, O, I, *k]`` by name of the layer.
        pictures: the two images, uint8 ``[2, S, S, 3]``; ``names`` are theirs.
    """
    said = "the first channels of each kernel; the difference has a scale of its own"
    figure = new_figure(9, 2.7 + 2.65 * len(kernels), title, said)
    ratios = (1.85, *(2.6,) * len(kernels))
    grid = figure.subplots(1 + len(kernels), 3, squeeze=False, height_ratios=ratios)
    for axes, picture, name in zip(grid[0], pictures, names, strict=False):
        show_image(axes, picture, shorten(name, 2.8))
    grid[0, 2].set_axis_off()
    for row, (layer, pair) in zip(grid[1:], kernels.items(), strict=True):
        first, second = pair.float()
        limit = signed_limit(pair, quantile=0.998)
        apart = signed_limit(second - first, quantile=0.998)
        relative = difference(first, second)
        shape = " x ".join(map(str, first.shape))
        for axes, kernel, end, label in (
            (row[0], first, limit, f"{layer}  [{shape}]"),
            (row[1], second, limit, "second image"),
            (row[2], second - first, apart, f"second - first: relative size {relative:.2f}"),
        ):
            image = axes.imshow(mosaic(kernel).numpy(), cmap=SIGNED, vmin=-end, vmax=end)
            axes.set_title(label, fontsize=8)
            axes.set(xticks=[], yticks=[])
            add_bar(figure, image, axes)
        row[0].set_ylabel("output channels", fontsize=8)
        row[0].set_xlabel("input channels", fontsize=8)
    return figure
