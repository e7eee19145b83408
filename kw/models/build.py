"""From a configuration to a network: timm's backbone, converted if the configuration says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch.func import functional_call

from .. import peers
from ..config import ConfigError, config_from_mapping, load_config
from ..config.schema import ModelConfig
from ..errors import one_line
from ..warehouse import convert
from .stem import set_small_stem

__all__ = ["build_model", "build_network", "check_network"]


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
    except MemoryError:
        raise
    except Exception as error:  # what a network makes of arguments that it does not expect
        raise ConfigError(
            f"model.name {config.name!r}, model.timm_args {config.timm_args}: timm cannot build "
            f"it: {one_line(error)}"
        ) from error
    if config.stem is not None:
        try:
            set_small_stem(network, config.stem.stride, config.stem.pool)
        except ValueError as error:
            raise ConfigError(f"model.stem, model.name {config.name!r}: {error}") from error
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
        # Arguments of timm's may have made a network that the plan does not know.
        given = f" (model.timm_args {config.timm_args})" if config.timm_args else ""
        raise ConfigError(f"{key}: {error}{given}") from error
    return network


@torch.no_grad()
def check_network(network: nn.Module, config: ModelConfig, input_size: int) -> None:
    """Refuse a network that does not turn images of this size into logits.

    One image passes without its data, on the meta device: a tenth of a second, before anything is
    loaded, compiled or trained.

    Args:
        network: :func:`build_network`'s, on any device; it is left as it is.
        config: its settings.
        input_size: side of the images, pixels.

    Raises:
        ConfigError: it refuses them, or gives something else than ``[1, num_classes]``.
    """
    tensors = [*network.named_parameters(), *network.named_buffers()]
    state = {name: tensor.to("meta") for name, tensor in tensors}
    images = torch.empty(1, 3, input_size, input_size, device="meta")
    where = f"data.input_size {input_size}, model.name {config.name!r}"
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        logits = functional_call(network, state, (images,))
    except Exception as error:
        if "meta" in str(error).lower():  # it reads its data: it can only be tried for real
            return
        given = f", model.timm_args {config.timm_args}" if config.timm_args else ""
        raise ConfigError(
            f"{where}{given}: the network refuses images [1, 3, {input_size}, {input_size}]: "
            f"{one_line(error)}"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
    expected = (1, config.num_classes)
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != expected:
        raise ConfigError(
            f"{where}, model.timm_args {config.timm_args}: expected logits {list(expected)} from "
            f"the network, found {list(found) if isinstance(found, tuple) else found}"
        )


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
