"""Trained weights, of any project, to start a backbone or a whole detector from.

A classifier's file has the weights of a network. A detector's file has those of the backbone, with
the prefix ``backbone.`` (mmdetection; its ResNets have the names of torchvision and timm) or
``backbone.network.`` (this project), and those of neck and heads.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..config.schema import ModelConfig
from ..errors import say
from ..models.build import pixels_of, read_start
from ..models.weights import CheckpointError, read_weights

_BACKBONE = "backbone."
_OURS = ("backbone.network.", "backbone.output_norms.")
# A setting of mmdetection's ResNets, in the text of the configuration in a file.
_CAFFE = re.compile(r"""style['"]?\s*[=:]\s*['"]caffe""")


@dataclass(frozen=True)
class StartWeights:
    """Weights of a classifier or of a detector, by the names in the file; messages call it
    ``source``.

    Attributes:
        prefix: prefix of the backbone's names; empty for a classifier.
        classes: names of the detector's categories, if the file has them.
        caffe_style: in the file's network, blocks of three convolutions stride in the first one.
        pixels: mean and deviation of the images that it was trained on, in [0, 1], if known.
    """

    source: str
    state: Mapping[str, Tensor]
    prefix: str = ""
    classes: tuple[str, ...] | None = None
    caffe_style: bool = False
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> StartWeights:
        """No copy: settings are copied, but not the tensors in them."""
        return self

    @property
    def backbone(self) -> dict[str, Tensor]:
        """The network's weights, by names without the prefix."""
        start = len(self.prefix)
        return {k[start:]: v for k, v in self.state.items() if k.startswith(self.prefix)}

    @property
    def others(self) -> dict[str, Tensor]:
        """The other weights: those of neck and heads."""
        return {k: v for k, v in self.state.items() if not k.startswith(self.prefix)}


def read_backbone(weights: str, config: ModelConfig) -> StartWeights:
    """The weights of ``model.backbone.weights``; a message counts those of neck and heads.

    Args:
        weights: file of a classifier or of a detector; ``timm`` or ``timm:TAG``.
        config: the network.

    Raises:
        ConfigError: timm does not have them.
        CheckpointError: the file cannot be read.
    """
    if not isinstance(weights, str):
        raise ConfigError(
            f"model.backbone.weights = {weights!r}: expected a file, timm, timm:TAG or None"
        )
    source = f"model.backbone.weights {weights}"
    if weights.partition(":")[0] == "timm":
        wanted = replace(config, weights=weights)
        state = read_start(wanted, "model.backbone.weights")
        return StartWeights(source, state, pixels=pixels_of(wanted))
    state = read_weights(weights)
    if not _is_detector(state):
        return StartWeights(source, state)
    start = _detector_weights(source, weights, state)
    rest = f"not used here: {count_parts(start.others)}" if start.others else "it is all there is"
    say(f"{source}: the {len(start.backbone)} tensors of the backbone are taken; {rest}")
    return start


def read_detector(file: str) -> StartWeights:
    """The weights of ``load_from``, or a CheckpointError if the file has no detector."""
    state = read_weights(file)
    source = f"load_from {file}"
    if not _is_detector(state):
        found = ", ".join(list(state)[:3])
        raise CheckpointError(
            f"{source}: expected a detector's weights, named backbone.*, found {found}, ...; a "
            "classifier's belong to model.backbone.weights"
        )
    return _detector_weights(source, file, state)


def part_of(name: str) -> str:
    """The part of a detector that a tensor belongs to: ``neck``, ``roi_head.mask_head``."""
    steps = name.split(".")
    is_inner = steps[0] == "roi_head" or name.startswith(_OURS)
    return ".".join(steps[: 2 if is_inner else 1])


def count_parts(names: Iterable[str]) -> str:
    """The number of tensors of every part, as text."""
    counts = Counter(map(part_of, names))
    return ", ".join(f"{part} {count}" for part, count in counts.items())


def _is_detector(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(_BACKBONE) for name in state)


def _detector_weights(source: str, file: str, state: Mapping[str, Tensor]) -> StartWeights:
    names = [name for name in state if name.startswith(_BACKBONE)]
    is_ours = all(name.startswith(_OURS) for name in names)
    meta = _read_meta(file)
    data = meta.get("dataset_meta")
    named: Any = data if isinstance(data, dict) else meta
    classes = named.get("classes", named.get("CLASSES"))
    text = meta.get("cfg", meta.get("config"))
    return StartWeights(
        source,
        state,
        _OURS[0] if is_ours else _BACKBONE,
        tuple(map(str, classes)) if isinstance(classes, (list, tuple)) else None,
        isinstance(text, str) and _CAFFE.search(text) is not None,
    )


def _read_meta(file: str) -> dict[str, Any]:
    """The ``meta`` of a file, without reading its tensors."""
    if file.endswith(".safetensors"):
        return {}
    mapped = zipfile.is_zipfile(file)  # not torch's older format
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    meta = content.get("meta") if isinstance(content, dict) else None
    return meta if isinstance(meta, dict) else {}
