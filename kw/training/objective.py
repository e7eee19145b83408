"""What a classifier's training minimises: its loss, with weights of the classes, and what a teacher
adds to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..config.schema import Config, DistillationConfig, ModelConfig
from ..data import DataError, Listing
from ..data.preprocess import training_size
from ..errors import UserError
from ..models.build import build_network, check_network, in_channels, pixels_of, read_start
from ..models.losses import balanced_weights, hard_distillation, soft_distillation
from ..models.weights import load_start
from ..registry import LOSSES
from .checkpoint import CheckpointError, refuse_other_classes
from .distributed import from_all
from .logs import logger
from .presence import set_place
from .trained import load_trained


def check_labels(config: Config, listing: Listing) -> None:
    """Refuse labels of another kind than the run's metrics, which decide what is right.

    Raises:
        ConfigError: images have several classes each without the metric ``multilabel``, or one
            class each with it.
    """
    several = np.ndim(listing.labels[0]) > 0
    if several and not config.several_classes:
        raise ConfigError(
            f"data.dataset {config.data.dataset!r} has images of several classes each: set "
            "metrics: {multilabel: {}} and loss.name: bce"
        )
    if not several and config.several_classes:
        raise ConfigError(
            f"metrics.multilabel: data.dataset {config.data.dataset!r} has images of one class "
            "each; leave the metric out"
        )


def check_same(listed: Mapping[str, tuple[int, bytes]]) -> None:
    """Refuse images that another process lists otherwise, such as an incomplete copy on the disk of
    its machine: places in a list are dealt out to processes. A collective call.

    Args:
        listed: by split the number of images, and what tells their labels from others.

    Raises:
        DataError: on all processes.
    """
    set_place("comparing its images with those of other processes")
    for split, (count, labels) in listed.items():
        found = from_all((count, hashlib.blake2b(labels).hexdigest()))
        for rank, other in enumerate(found):
            if other != found[0]:
                raise DataError(
                    f"data.root: process {rank} lists {other[0]:,} images of {split}, process 0 "
                    f"lists {found[0][0]:,}, or other labels; give all machines the same images"
                )


def check_sizes(network: nn.Module, model: ModelConfig, config: Config) -> None:
    """Refuse a network, student or teacher, that does not take images of every size of
    ``data.progressive``.

    Raises:
        ConfigError: it takes one size.
    """
    sizes = {training_size(config.data, epoch) for epoch in range(config.epochs)}
    for size in sizes - {config.data.shape[0]}:
        try:
            check_network(network, model, size)
        except ConfigError as error:
            raise ConfigError(
                f"data.progressive: a network of one size: {error}; set null, or for a transformer "
                "model.timm_args: {dynamic_img_size: true}"
            ) from error


def build_loss(
    config: Config, listing: Listing, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a run: ``(logits [B, C] float32, targets) -> scalar``.

    Raises:
        ConfigError: classes are to be balanced, and one has no image.
    """
    loss, settings = config.loss, dict(config.loss.args)
    if loss.class_weights == "balanced":
        try:
            weights = balanced_weights(listing.labels, config.model.num_classes)
        except ValueError as error:
            raise ConfigError(
                f"loss.class_weights: balanced: {error}; give a list of numbers"
            ) from error
        settings["class_weights"] = weights.to(device)
    elif loss.class_weights is not None:
        settings["class_weights"] = torch.tensor(loss.class_weights, device=device)
    return partial(LOSSES.find(loss.name), **settings)


class Teacher:
    """A trained network whose logits a student learns; it is never changed.

    No module: it has no part in the student's parameters, checkpoints, averages and reductions. Its
    network gives logits for images, on the student's device.
    """

    def __init__(self, network: nn.Module, config: DistillationConfig) -> None:
        self.network = network.eval().requires_grad_(False)
        self.config = config

    def __call__(self, images: Tensor, logits: Tensor, loss: Tensor) -> dict[str, Tensor]:
        """The losses of a student: ``loss`` = (1 - alpha) ``loss_labels`` + alpha ``loss_teacher``,
        of the images that it saw, its logits ``[B, C]`` float32, and their loss with the labels."""
        with torch.no_grad():
            taught = self.network(images).float()
        if self.config.kind == "hard":
            learned = hard_distillation(logits, taught)
        else:
            learned = soft_distillation(logits, taught, self.config.temperature)
        alpha = self.config.alpha
        total = (1 - alpha) * loss + alpha * learned
        return {"loss": total, "loss_labels": loss, "loss_teacher": learned}


def build_teacher(
    config: Config, listing: Listing, device: torch.device, channels_last: bool = False
) -> Teacher | None:
    """The teacher that a run has, if any, on the device.

    Raises:
        UserError: it cannot be read, has other classes, or expects images of other means and
            deviations or another size.
    """
    wanted, data = config.distillation, config.data
    if wanted is None:
        return None
    try:
        if wanted.weights is None:
            network, model, mean, std = _run(wanted, listing, data.root)
        else:
            network, model, mean, std = _timm_network(
                ModelConfig(wanted.teacher, config.model.num_classes, weights=wanted.weights)
            )
        if model.num_classes != config.model.num_classes:
            raise ConfigError(
                f"it has {model.num_classes} classes, model.num_classes is "
                f"{config.model.num_classes}: a teacher has the student's classes"
            )
        if mean is not None and (list(mean), list(std)) != (data.mean, data.std):
            raise ConfigError(
                f"it learned from images of data.mean {list(mean)}, data.std {list(std)}, and is "
                f"to see those of this run, {data.mean} and {data.std}: set these to the teacher's"
            )
        if in_channels(model) != data.channels:
            raise ConfigError(
                f"it takes images of {in_channels(model)} channels, data.channels is "
                f"{data.channels}: a teacher sees the student's images"
            )
        check_network(network, model, data.shape)
        check_sizes(network, model, config)
    except UserError as error:
        raise type(error)(f"distillation.teacher {wanted.teacher}: {error}") from error
    network.to(device)
    if channels_last:
        network.to(memory_format=torch.channels_last)
    count = sum(parameter.numel() for parameter in network.parameters())
    logger.info(f"teacher {wanted.teacher}: {count / 1e6:.2f}M parameters, not trained")
    return Teacher(network, wanted)


_Found = tuple[nn.Module, ModelConfig, Sequence[float] | None, Sequence[float]]


def _run(wanted: DistillationConfig, listing: Listing, root: str) -> _Found:
    """A finished run's network, its settings, and means and deviations of its images."""
    try:
        trained = load_trained(wanted.teacher)
    except CheckpointError as error:
        remedy = "" if Path(wanted.teacher).exists() else "; a timm network needs its weights"
        raise CheckpointError(f"{error}{remedy}") from error
    refuse_other_classes({"meta": trained.meta}, listing.classes, str(trained.file), root)
    data = trained.config.data
    return trained.network, trained.config.model, data.mean, data.std


def _timm_network(model: ModelConfig) -> _Found:
    """The same of a timm network; a file does not say how its images were."""
    key = "distillation.weights"
    network = build_network(model)
    load_start(network, read_start(model, key), f"{key} {model.weights}", new_head=False)
    return network, model, *(pixels_of(model) or (None, ()))
