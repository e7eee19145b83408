"""From a configuration to a network: timm's backbone, converted if the configuration says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.func import functional_call

from .. import peers
from ..config import ConfigError, config_from_mapping, load_config
from ..config.schema import ModelConfig, WarehouseConfig
from ..errors import one_line, say
from ..hub import is_hub_name, weights_file
from ..torch_private import uncompiled
from ..warehouse import convert, get_temperature, has_temperature
from ..warehouse.probe import evaluating
from .freezing import freeze
from .recompute import recompute_blocks
from .stem import set_small_stem
from .weights import is_converted, load_start, read_weights, say_adapted

_SOURCES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")


def build_model(config: str | Path | Mapping[str, Any]) -> nn.Module:
    """Build the network of a configuration as its training begins: with fresh weights, or those of
    ``model.weights``.

    Args:
        config: a configuration file, or a mapping with its keys.

    Returns:
        A network from images ``[B, 3, H, W]`` to logits ``[B, num_classes]``; a KernelWarehouse
        network is at temperature 0.

    Raises:
        kw.config.ConfigError: the configuration is wrong; the message names file, key and remedy.
        kw.models.weights.CheckpointError: ``model.weights`` cannot be read or does not fit.
    """
    loaded = config_from_mapping(config) if isinstance(config, Mapping) else load_config(config)
    return start_network(loaded.model)


def start_network(
    config: ModelConfig,
    state: Mapping[str, Tensor] | None = None,
    source: str = "weights",
    *,
    resumes: bool = False,
    keep_head: bool = True,
    batches: Iterable[Any] | None = None,
) -> nn.Module:
    """Build a classifier for the start of training: load ``weights``, apply ``freeze`` and
    ``gradient_checkpointing``.

    Args:
        config: the network's settings.
        state: weights to start from, in place of ``config.weights``.
        source: name of these weights in messages.
        resumes: the run resumes from a checkpoint, so that no other weights are read.
        keep_head: whether to load the weights of the classifier.
        batches: images ``[B, 3, H, W]``, as for :func:`kw.convert`.

    Raises:
        ConfigError: as for :func:`build_network`.
        CheckpointError: the weights cannot be read or do not fit the network.
    """
    if resumes:
        return _for_training(build_network(config), config)
    if state is None and config.weights is not None:
        source = f"model.weights {config.weights}"
        state = read_start(config)
    network = _static_network(config)
    converted = state is not None and is_converted(state)
    if converted and config.kernel_warehouse is None and config.peer is None:
        raise ConfigError(
            f"{source} are those of a converted network, and this one is static; set "
            "model.kernel_warehouse (or model.peer) as it was converted"
        )
    if state is not None and not converted:
        load_start(network, state, source, keep_head)
    # Where the weights have another classifier, that begins as the configuration says.
    network = _convert(network, config, announce=not converted, batches=batches)
    if state is not None and converted:
        load_start(network, state, source, keep_head)
        if has_temperature(network) and (tau := get_temperature(network)) > 0:
            say(
                f"{source}: was written at temperature {tau:.3g}, before annealing had ended; what "
                "starts from it at another is not what was evaluated"
            )
    return _for_training(network, config)


def _for_training(network: nn.Module, config: ModelConfig) -> nn.Module:
    freeze(network, config.freeze)
    if config.gradient_checkpointing:
        try:
            recompute_blocks(network)
        except ValueError as error:
            raise ConfigError(f"model.gradient_checkpointing: {error}; set false") from error
    return network


def with_start(config: ModelConfig, start: str) -> ModelConfig:
    """A network with this start of every layer, whatever plan and settings say."""
    warehouse, peer = config.kernel_warehouse, config.peer
    if warehouse is not None:
        planned = warehouse.plan.get("warehouses") if isinstance(warehouse.plan, Mapping) else None
        own = {**{name: WarehouseConfig() for name in planned or ()}, **warehouse.warehouses}
        own = {name: replace(settings, start=start) for name, settings in own.items()}
        warehouse = replace(warehouse, start=start, warehouses=own)
    peer = peer and replace(peer, start=start)
    return replace(config, kernel_warehouse=warehouse, peer=peer)


def without_sources(config: ModelConfig) -> ModelConfig:
    """The network without the places of its first weights: a file that was trained has them all,
    and another machine need not have, or ask for, those."""
    kept = {key: value for key, value in config.timm_args.items() if key not in _SOURCES}
    return replace(config, weights=None, timm_args=kept)


def build_network(config: ModelConfig) -> nn.Module:
    """Build the classifier that a configuration's ``model`` describes, initialised at random: for a
    checkpoint's weights. ``weights``, ``freeze`` and ``gradient_checkpointing`` are for training
    (:func:`start_network`).

    Raises:
        ConfigError: timm refuses its arguments, or the conversion does not fit the network.
    """
    return _convert(_static_network(config), config, begin=False)


def read_start(config: ModelConfig, key: str = "model.weights") -> Mapping[str, Tensor]:
    """The weights that ``config.weights`` names; ``key`` is that setting's name in messages.

    Raises:
        ConfigError: timm cannot load them.
        CheckpointError: the file cannot be read.
        kw.hub.HubError: the hub has no such model, or cannot be reached.
    """
    assert config.weights is not None
    if is_hub_name(config.weights):
        return read_weights(weights_file(config.weights))
    name, _, tag = config.weights.partition(":")
    if name != "timm":
        return read_weights(config.weights)
    wanted = f"{config.name}.{tag}" if tag else config.name
    if in_channels(config) != 3:
        say_adapted(f"{key} {config.weights}", 3, in_channels(config))
    try:
        return timm.create_model(wanted, pretrained=True, **config.timm_args).state_dict()
    except Exception as error:  # the hub, the network, or timm's own checks
        raise ConfigError(
            f"{key} {config.weights!r}: timm cannot bring the weights of {wanted!r}: "
            f"{one_line(error)}; give a file instead"
        ) from error


def pixels_of(config: ModelConfig) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation, in [0, 1], of the images that timm's weights were trained on; None for
    those of a file or of the hub, which do not say."""
    name, _, tag = str(config.weights).partition(":")
    wanted = f"{config.name}.{tag}" if tag else config.name
    known = timm.get_pretrained_cfg(wanted) if name == "timm" else None
    return None if known is None else (tuple(known.mean), tuple(known.std))


def say_other_pixels(config: ModelConfig, mean: Sequence[float], std: Sequence[float]) -> None:
    """Say so where a network starts from weights that were trained on other pixels."""
    trained = pixels_of(config)
    if trained is not None and trained != (tuple(mean), tuple(std)) and in_channels(config) == 3:
        say(
            f"model.weights {config.weights}: trained with data.mean {list(trained[0])} and "
            f"data.std {list(trained[1])}, and this run has {list(mean)} and {list(std)}"
        )


def _created(config: ModelConfig, **rates: float) -> nn.Module:
    """timm's network; one without dropout or drop path takes no rate of it, not even 0."""
    sizes: dict[str, Any] = {"num_classes": config.num_classes, **rates}
    try:
        return timm.create_model(config.name, **sizes, **config.timm_args)
    except TypeError as error:
        text = str(error)
        known = {key: rate for key, rate in rates.items() if rate > 0 or key not in text}
        if len(known) == len(rates) or "unexpected keyword" not in text:
            raise
    return _created(config, **known)


def _static_network(config: ModelConfig) -> nn.Module:
    """timm's network, with the stem and the drop path that the configuration asks for."""
    try:
        network = _created(config, drop_rate=config.drop_rate, drop_path_rate=config.drop_path_rate)
    except MemoryError:
        raise
    except Exception as error:  # errors of a network that is given unknown arguments
        raise ConfigError(
            f"model.name {config.name!r}, model.timm_args {config.timm_args}: timm cannot build "
            f"it: {one_line(error)}"
        ) from error
    if config.stem is not None:
        try:
            set_small_stem(network, config.stem.stride, config.stem.pool)
        except ValueError as error:
            raise ConfigError(f"model.stem, model.name {config.name!r}: {error}") from error
    if config.drop_path_rate > 0:
        _set_drop_path(network, config)
    return network


def _convert(
    network: nn.Module,
    config: ModelConfig,
    begin: bool = True,
    announce: bool = True,
    batches: Iterable[Any] | None = None,
) -> nn.Module:
    """The network in the dynamic form that the configuration asks for, if any; without ``begin`` a
    checkpoint's weights are loaded next: static kernels are not kept, and nothing is logged."""
    if not begin:
        config, announce = with_start(config, "paper"), False
    warehouse, peer = config.kernel_warehouse, config.peer
    try:
        if warehouse is not None:
            settings = {**warehouse.overrides(), "batches": batches}
            return convert(network, warehouse.plan, announce=announce, **settings)
        if peer is not None:
            return peers.convert(network, peer.method, announce=announce, **peer.settings())
    except ValueError as error:
        key = "model.peer" if warehouse is None else "model.kernel_warehouse"
        # timm's arguments may change the network so that the plan does not fit.
        given = f" (model.timm_args {config.timm_args})" if config.timm_args else ""
        raise ConfigError(f"{key}: {error}{given}") from error
    return network


def in_channels(config: ModelConfig) -> int:
    """Channels of the images that a network takes: those of ``data.channels``."""
    return int(config.timm_args.get("in_chans", 3))


@torch.no_grad()
def check_network(network: nn.Module, config: ModelConfig, input_size: int | Sequence[int]) -> None:
    """Refuse a network that does not turn images of this size into logits.

    One image passes without its data, on the meta device: a tenth of a second, before anything is
    loaded, compiled or trained.

    Args:
        network: :func:`build_network`'s, on any device; it is left as it is.
        config: its settings.
        input_size: side of the images, or their height and width, pixels.

    Raises:
        ConfigError: the forward pass fails, or its output is not ``[1, num_classes]``.
    """
    tensors = [*network.named_parameters(), *network.named_buffers()]
    state = {name: tensor.to("meta") for name, tensor in tensors}
    height, width = (input_size,) * 2 if isinstance(input_size, int) else input_size
    images = torch.empty(1, in_channels(config), height, width, device="meta")
    size = height if height == width else [height, width]
    where = f"data.input_size {size}, model.name {config.name!r}"
    try:
        with evaluating(network), uncompiled(network):
            logits = functional_call(network, state, (images,))
    except Exception as error:
        if "meta" in str(error).lower():  # its forward pass reads values
            return
        given = f", model.timm_args {config.timm_args}" if config.timm_args else ""
        raise ConfigError(
            f"{where}{given}: the network refuses images {list(images.shape)}: {one_line(error)}"
        ) from error
    expected = (1, config.num_classes)
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != expected:
        raise ConfigError(
            f"{where}, model.timm_args {config.timm_args}: expected logits {list(expected)} from "
            f"the network, found {list(found) if isinstance(found, tuple) else found}"
        )


def _set_drop_path(network: nn.Module, config: ModelConfig) -> None:
    """Refuse a network without drop path, which some of timm's take a rate of; where it is to be
    constant, give every residual block the same rate, where timm's grows from zero with depth."""
    branches = [
        (module, name)
        for module in network.modules()
        for name in ("drop_path", "drop_path1", "drop_path2")  # a transformer's block has two
        if hasattr(module, name)
    ]
    constant = config.drop_path_decay == "constant"
    kinds = {type(module).__name__ for module in network.modules()}  # others have their own class
    if not (branches if constant else kinds & {"DropPath", "StochasticDepth"}):
        raise ConfigError(
            f"model.drop_path_rate {config.drop_path_rate}, model.drop_path_decay "
            f"{config.drop_path_decay!r}: {config.name} has no residual blocks with drop path; set "
            "the rate to 0"
        )
    for block, name in branches if constant else ():
        setattr(block, name, DropPath(config.drop_path_rate))
