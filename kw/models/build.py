"""From a configuration to a network: timm's backbone, converted if the configuration says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.layers import DropPath
from torch import nn

from .. import peers
from ..config import ConfigError, config_from_mapping, load_config
from ..config.schema import ModelConfig
from ..warehouse import convert

__all__ = ["build_model", "build_network"]


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


def build_network(config: ModelConfig) -> nn.Module:
    """Build the classifier that a configuration's ``model`` describes, with fresh weights.

    Args:
        config: the network's settings.

    Returns:
        A network from images ``[B, 3, H, W]`` to logits ``[B, num_classes]``.

    Raises:
        ConfigError: timm refuses its arguments, or the conversion does not fit the network.
    """
    try:
        network = timm.create_model(
            config.name,
            num_classes=config.num_classes,
            drop_rate=config.drop_rate,
            drop_path_rate=config.drop_path_rate,
            **config.timm_args,
        )
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"model.name {config.name!r}, model.timm_args: {error}") from error
    if config.drop_path_decay == "constant" and config.drop_path_rate > 0:
        _set_constant_drop_path(network, config)
    return _convert(network, config)


def _convert(network: nn.Module, config: ModelConfig) -> nn.Module:
    """The network in the dynamic form that the configuration asks for, if any."""
    warehouse, peer = config.kernel_warehouse, config.peer
    try:
        if warehouse is not None:
            return convert(network, warehouse.plan, **warehouse.overrides())
        if peer is not None:
            return peers.convert(network, peer.method, **peer.settings())
    except ValueError as error:
        key = "model.peer" if warehouse is None else "model.kernel_warehouse"
        raise ConfigError(f"{key}: {error}") from error
    return network


def _set_constant_drop_path(network: nn.Module, config: ModelConfig) -> None:
    """The same rate for every residual block, where timm's grows from zero with depth."""
    blocks = [module for module in network.modules() if hasattr(module, "drop_path")]
    if not blocks:
        raise ConfigError(
            f"model.drop_path_rate {config.drop_path_rate}: {config.name} has no residual blocks "
            "with drop path; set it to 0"
        )
    for block in blocks:
        block.drop_path = DropPath(config.drop_path_rate)
