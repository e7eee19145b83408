"""From a configuration and a checkpoint to pictures of a network (docs/visualizing.md).

Functions take ``config``, network and data; ``checkpoint``, a file that training wrote, whose
moving average is shown where it has one; ``out``, the picture's file; ``layers``, a regular
expression on whole names of layers, ``None`` for all; ``images``, a number of test images, spread
evenly over the set.

They raise a ``PictureError`` where the network is static, no layer matches, ``out`` cannot be
written or matplotlib is missing; and ``ConfigError``, ``DataError`` and ``CheckpointError`` as
:func:`kw.training.evaluate_checkpoint` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import load_config
from ..config.schema import Config
from ..data import read_files, test_images
from ..pictures.cam import class_maps, draw_cam
from ..pictures.cells import draw_cells
from ..pictures.coefficients import (
    DynamicLayer,
    LayerMeasure,
    PictureError,
    cell_use,
    class_effect,
    coefficients,
    dynamic_layers,
    measure_layer,
)
from ..pictures.heatmaps import draw_attention, draw_classes
from ..pictures.history import Snapshot, draw_history
from ..pictures.kernels import assembled_kernels, draw_kernels
from ..pictures.samples import few_of_each, read_images, spaced
from ..pictures.style import check_matplotlib, save, to_pixels
from ..warehouse import get_temperature, has_temperature
from ..warehouse.plan import nearest
from .checkpoint import CheckpointError, load_checkpoint, load_network, refuse_other_classes
from .distributed import find_process
from .precision import autocast
from .run import build_preprocessor, set_contraction
from .run_pictures import network_name
from .saving import checkpoints
from .trained import choose_weights, load_trained

_CHUNK = 32  # images of a forward pass


class _Shown:
    """A network with a checkpoint's weights, its moving average's where it has one; ``title`` says
    which, ``names`` are those of its classes, where the checkpoint has them."""

    def __init__(self, config: Config, checkpoint: str | Path) -> None:
        check_matplotlib()
        self.config, self.device = config, find_process("none").device
        found = load_trained(checkpoint, config, device=self.device)
        self.network, self.names = found.network, found.classes
        set_contraction(config.contraction, self.network)
        self.preprocess = build_preprocessor(config, self.device).to(self.device)
        epoch = found.meta.get("epoch")
        self.title = (
            f"{network_name(config)}, {found.file.absolute().parent.name}/{found.file.name}"
        )
        self.title += "" if epoch is None else f", epoch {epoch}"
        if has_temperature(self.network):
            self.title += f", temperature {get_temperature(self.network):.2f}"

    @property
    def classes(self) -> list[str]:
        return self.names or [str(i) for i in range(self.config.model.num_classes)]

    def layers(self, pattern: str | None) -> list[DynamicLayer]:
        """The dynamic layers whose whole names a regular expression matches."""
        layers = dynamic_layers(self.network)
        if pattern is None:
            return layers
        try:
            found = [layer for layer in layers if re.fullmatch(pattern, layer.name)]
        except re.error as error:
            raise PictureError(f"--layers {pattern!r}: no regular expression: {error}") from None
        if not found:
            names = [layer.name for layer in layers]
            raise PictureError(
                f"--layers {pattern!r}: matches the whole name of no dynamic layer; there are "
                f"{len(names)}, {nearest(pattern, names)}"
            )
        return found

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> Tensor:
        images: Tensor = self.preprocess(batch, False)[0]
        return images

    def coefficients(
        self, layers: Sequence[DynamicLayer], indices: Sequence[int]
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Coefficients by layer and labels of the images, a forward pass's worth at a time."""
        names = {layer.name for layer in layers}
        dataset = test_images(self.config)
        for start in range(0, len(indices), _CHUNK):
            batch = read_images(dataset, indices[start : start + _CHUNK])
            with autocast(self.config.precision, self.device.type):
                yield coefficients(self.network, self.prepare(batch), names), batch["labels"]

    def spaced(self, count: int) -> list[int]:
        """Places of so many test images, evenly over the set; of all where there are fewer."""
        return spaced(len(test_images(self.config)), count)

    def over_images(
        self, layers: Sequence[DynamicLayer], indices: Sequence[int]
    ) -> Iterator[dict[str, Tensor]]:
        """The same without the labels."""
        return (alpha for alpha, _ in self.coefficients(layers, indices))

    def own_images(self, files: Sequence[str | Path]) -> tuple[Tensor, Tensor, list[str]]:
        """Image files as a test would see them; the same as bytes; their names."""
        images = self.prepare(read_files(files, self.config.data))
        pixels = to_pixels(images, self.preprocess.mean, self.preprocess.std)
        return images, pixels, ["/".join(Path(f).parts[-2:]) for f in files]


def picture_attention(
    config: Config, checkpoint: str | Path, out: Path, *, layers: str | None, images: int
) -> list[LayerMeasure]:
    """Mean coefficients over test images; returns those of the layers in numbers."""
    shown = _Shown(config, checkpoint)
    chosen, indices = shown.layers(layers), shown.spaced(images)
    parts = list(shown.over_images(chosen, indices))
    title = f"mean coefficients: {shown.title}, {len(indices)} test images"
    save(draw_attention(chosen, cell_use(parts), title), out)
    return [
        measure_layer(layer, torch.cat([alpha[layer.name].cpu() for alpha in parts]))
        for layer in chosen
    ]


def picture_cells(
    config: Config, checkpoint: str | Path, out: Path, *, layers: str | None, images: int
) -> None:
    """Which cells the layers use."""
    shown = _Shown(config, checkpoint)
    chosen, indices = shown.layers(layers), shown.spaced(images)
    use = cell_use(shown.over_images(chosen, indices))
    save(draw_cells(chosen, use, f"use of cells: {shown.title}, {len(indices)} test images"), out)


def picture_classes(
    config: Config,
    checkpoint: str | Path,
    out: Path,
    *,
    layers: str | None,
    images: int,
    classes: int,
) -> None:
    """How coefficients differ between the first ``classes``; ``images`` are taken from these, as
    many of each."""
    shown = _Shown(config, checkpoint)
    chosen = shown.layers(layers)
    count = min(classes, config.model.num_classes)
    dataset = test_images(config)
    named = {"meta": {"classes": shown.names}}
    refuse_other_classes(named, dataset.classes, str(checkpoint), config.data.root)
    indices = few_of_each(dataset.labels, count, images)
    parts = list(shown.coefficients(chosen, indices))
    labels = torch.cat([labels for _, labels in parts])
    effects = {}
    for layer in chosen:
        alpha = torch.cat([alpha.pop(layer.name).cpu() for alpha, _ in parts])
        effects[layer.name] = class_effect(alpha, labels)
    title = f"coefficients by class, less the mean over classes: {shown.title}, {len(labels)} "
    names = [shown.classes[i] for i in labels.unique()]
    save(draw_classes(chosen, effects, names, title + "test images"), out)


def picture_kernels(
    config: Config,
    checkpoint: str | Path,
    image_files: Sequence[str | Path],
    out: Path,
    *,
    layers: str | None,
) -> None:
    """The kernels that two images get.

    At most eight layers are drawn; where ``layers`` is ``None``, the first of each warehouse, of
    four warehouses at most.
    """
    shown = _Shown(config, checkpoint)
    chosen = shown.layers(layers)
    if layers is None:
        first = {layer.warehouse: layer for layer in reversed(chosen)}
        chosen = [layer for layer in chosen if first[layer.warehouse] is layer][:4]
    chosen = chosen[:8]
    images, pictures, names = shown.own_images(image_files)
    with autocast(config.precision, shown.device.type):
        kernels = assembled_kernels(shown.network, images, [layer.name for layer in chosen])
    title = f"assembled kernels: {shown.title}"
    save(draw_kernels(kernels, pictures, names, title), out)


def picture_cam(
    config: Config, checkpoint: str | Path, image_files: Sequence[str | Path], out: Path
) -> None:
    """Class-activation maps on any number of images, shown in their order."""
    shown = _Shown(config, checkpoint)
    images, pictures, names = shown.own_images(image_files)
    found = class_maps(shown.network, images)
    title = f"class-activation maps: {shown.title}"
    save(draw_cam(pictures, found, names, shown.classes, title), out)


def picture_history(
    work_dir: Path,
    out: Path,
    *,
    options: Sequence[str],
    warehouse: str | None,
    images: int,
) -> None:
    """Coefficients over training, from the checkpoints that a classifier's run has kept.

    ``options`` are settings in place of its configuration's, ``warehouse`` the one whose maps are
    drawn (``None``: the first).
    """
    files = [file for file in checkpoints(work_dir) if "_update_" not in file.name]
    if not files:
        raise CheckpointError(
            f"{work_dir}: expected checkpoints epoch_N.pth there; a run keeps the newest "
            "checkpoint.keep of them"
        )
    config = load_config(work_dir / "config.yaml", options)
    shown = _Shown(config, files[0])
    layers = dynamic_layers(shown.network)
    names = list(dict.fromkeys(layer.warehouse for layer in layers))
    if warehouse is not None and warehouse not in names:
        raise PictureError(f"--warehouse {warehouse!r}: expected one of {', '.join(names)}")
    snapshots, indices = [], shown.spaced(images)
    for file in files:
        state = load_checkpoint(file)
        network, meta = shown.network, state.get("meta", {})
        load_network(network, choose_weights(state, file)[1], str(file))
        tau = get_temperature(network) if has_temperature(network) else None
        if meta.get("epoch") is None:
            raise CheckpointError(f"{file}: meta.epoch is missing: expected what training writes")
        use = cell_use(shown.over_images(layers, indices))
        snapshots.append(Snapshot(meta["epoch"], tau, use))
    kept = f"{len(files)} checkpoints of {work_dir.absolute().name}"
    title = f"{network_name(config)}, {kept}, {len(indices)} test images"
    save(draw_history(layers, snapshots, warehouse or names[0], title), out)
