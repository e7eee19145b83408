"""Backbones and classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..config import config_from_mapping, load_config
from .build import build_network
from .classifier import ImageClassifier

__all__ = ["ImageClassifier", "build_model", "build_network"]


def build_model(config: str | Path | Mapping[str, Any]) -> nn.Module:
    """Build the network of a configuration, with fresh weights.

    Args:
        config: a configuration file, or a mapping with its keys.

    Returns:
        A network from images ``[B, 3, H, W]`` to logits ``[B, num_classes]``; a KernelWarehouse
        network is at temperature 0.

    Raises:
        kw.config.ConfigError: the configuration is wrong; the message names file, key and remedy.
    """
    loaded = config_from_mapping(config) if isinstance(config, Mapping) else load_config(config)
    return build_network(loaded.model)
