"""Class-activation maps: which parts of an image support a class.

Paper: HiResCAM (Draelos and Carin, arXiv 2011.08891), ``relu(sum_c dy/df_c * f_c)`` position by
position. On the last map of a network that averages it before a linear classifier this is the
original CAM (Zhou et al., CVPR 2016) over the number of positions, as Grad-CAM is; on earlier maps,
where Grad-CAM's averaged gradients mix positions up, it stays a sum over positions.

Legend: B images, c channels, h, w positions of a feature map, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..warehouse.probe import evaluating
from .coefficients import PictureError, outputs
from .style import new_figure, shorten, show_image, wrap_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = 7
"""Positions along a side that a map should have: those of the last one of 224 pixels."""


@dataclass(frozen=True)
class ClassMaps:
    """Maps of some images."""

    module: str  # name of the module whose output was used
    maps: Tensor  # [B, h, w], not negative
    classes: Tensor  # the class that each map explains, int64 [B]
    probabilities: Tensor  # the network's probability of that class, [B]


def class_maps(
    network: Any, images: Tensor, classes: Tensor | None = None, least: int = LEAST
) -> ClassMaps:
    """Class-activation maps on the deepest feature map that is fine enough.

    That is the last stage of timm's ``feature_info`` with at least ``least`` positions along its
    shorter side, of those that the logit depends on (a class token reads the patches in the last
    block, whose own patches go nowhere); the finest if none has as many.

    Args:
        network: a timm network; left as it was.
        images: preprocessed, ``[B, 3, S, S]``.
        classes: classes to explain, int64 ``[B]``; default: the predicted ones.
        least: positions along a side.

    Raises:
        PictureError: the network has no ``feature_info``, or no stage has a gradient.
    """
    channels = _stages(network)
    stages = {name: network.get_submodule(name) for name in channels}
    with evaluating(network), outputs(stages) as seen:
        # Where parameters are frozen, features have gradients through the images.
        images = images.detach().clone().requires_grad_(True)
        logits = network.forward(images)
        if classes is None:
            classes = logits.argmax(1)
        score = logits.gather(1, classes[:, None]).sum()
        found = {name: each for name, each in seen.items() if isinstance(each, Tensor)}
        gradients = torch.autograd.grad(score, [images, *found.values()], allow_unused=True)[1:]
    maps: list[tuple[str, Tensor]] = []
    for (name, features), gradient in zip(found.items(), gradients, strict=True):
        if gradient is None:
            continue
        product = _positions(network, gradient * features.detach(), channels[name])
        if product is not None and bool(product.any()):
            maps.append((name, product))
    if not maps:
        raise PictureError(
            f"{type(network).__name__}: none of its stages ({', '.join(channels)}) has a map with "
            "a gradient"
        )
    fine = [each for each in maps if min(each[1].shape[1:]) >= least]
    name, best = fine[-1] if fine else max(maps, key=lambda each: each[1][0].numel())
    probabilities = logits.detach().float().softmax(1).gather(1, classes[:, None])[:, 0]
    return ClassMaps(name, best.relu().float().cpu(), classes.cpu(), probabilities.cpu())


def _stages(network: Any) -> dict[str, int]:
    """Channels of the stages by the names of their modules."""
    info = getattr(network, "feature_info", None) or ()
    modules = dict(network.named_modules())
    channels = {each["module"]: each["num_chs"] for each in info if each["module"] in modules}
    if not channels:
        raise PictureError(
            f"{type(network).__name__} does not tell its stages (timm's feature_info): expected a "
            "timm network"
        )
    return channels


def _positions(network: Any, product: Tensor, channels: int) -> Tensor | None:
    """Sums over channels, ``[B, h, w]``; None for what has no positions."""
    if product.ndim == 4:  # channels are first, or last
        is_last = product.shape[1] != channels == product.shape[3]
        return product.sum(3 if is_last else 1)
    if product.ndim != 3:
        return None
    tokens = product[:, getattr(network, "num_prefix_tokens", 0) :].sum(2)  # [B, N]
    grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    side = math.isqrt(tokens.shape[1])
    height, width = grid or (side, side)
    return tokens.unflatten(1, (height, width)) if height * width == tokens.shape[1] else None


def draw_cam(
    pictures: Any, found: ClassMaps, names: Sequence[str], classes: Sequence[str], title: str
) -> Figure:
    """Every image, uint8 ``[B, S, S, 3]``, above its map, whose scale ends at its largest value.

    ``names`` are the images', ``classes`` the network's.
    """
    count, columns = len(names), min(len(names), 5)
    side = min(9 / columns, 3.6)
    height, width = found.maps.shape[1:]
    said = f"map of {found.module}, {height} x {width} positions; below: class and probability"
    if count == 1:  # the map beside the image
        figure = new_figure(2 * side, side + 0.9, title, said)
        grid = figure.subplots(1, 2, squeeze=False).T
    else:
        blocks = math.ceil(count / columns)
        figure = new_figure(side * columns, 0.5 + blocks * (2 * side + 0.5), title, said)
        grid = figure.subplots(2 * blocks, columns, squeeze=False)
    for axes in grid[-2:, columns - (-count % columns) :].flatten():  # places without an image
        axes.set_axis_off()
    for number, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        top, bottom = grid[number // columns * 2 :, number % columns][:2]
        label = f"{classes[int(found.classes[number])]}: {float(found.probabilities[number]):.2f}"
        show_image(top, picture, shorten(name, side))
        show_image(bottom, picture.mean(2), below=wrap_label(label, side))
        fine = nn.functional.interpolate(
            found.maps[number][None, None], picture.shape[:2], mode="bilinear", align_corners=False
        )[0, 0]
        peak = max(float(found.maps[number].max()), 1e-12)
        bottom.imshow(fine.numpy(), cmap="inferno", vmin=0, vmax=peak, alpha=0.6)
    return figure
