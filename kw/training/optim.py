"""Optimizers: which parameters decay, and at which rates they learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..config import ConfigError
from ..config.run_schema import OptimizerConfig
from ..errors import one_line
from ..models.weights import classifier_names
from ..registry import OPTIMIZERS
from ..torch_private import BatchOrInstanceNorm
from ..warehouse import KWLayer

OPTIMIZERS["adamw"] = torch.optim.AdamW
OPTIMIZERS["sgd"] = torch.optim.SGD

# BatchNorm, InstanceNorm, LayerNorm, GroupNorm, RMSNorm and what is derived from them.
NORMS = (BatchOrInstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def build_optimizer(
    network: nn.Module,
    config: OptimizerConfig,
    device: torch.device,
    lr_scales: Mapping[str, float] | None = None,
) -> Optimizer:
    """An optimizer with a group for what decays and one for what does not, for each rate.

    An optimizer whose class has ``group_settings(network, prefixes of classifier and attention) ->
    {parameter: settings}`` has a group for each of these as well (:mod:`kw.training.muon`).

    Args:
        network: the network whose parameters are trained; frozen ones are left out.
        config: the optimizer's settings.
        device: of the parameters; on CPU and CUDA the fused form of AdamW and SGD is used: it
            makes no temporary copies of the parameters, and needs no synchronisation to skip an
            update. SGD of sharded parameters, or with dampening, has none.
        lr_scales: factor on the learning rate by name of the parameter; 1 where there is none. A
            group's stands in its ``lr_scale``, which the schedule multiplies by.

    Raises:
        UserError: there is no such optimizer.
        ConfigError: the classifier has a rate of its own, and the network does not say where it
            is; or the optimizer refuses its arguments.
    """
    branches = tuple(
        f"{prefix}.attention.".removeprefix(".")
        for prefix, module in network.named_modules()
        if isinstance(module, KWLayer)
    )
    heads = classifier_names(network)
    if config.head_lr != 1 and not heads:
        raise ConfigError(
            f"optimizer.head_lr = {config.head_lr:g}: the network does not say which module is its "
            "classifier; set 1"
        )
    norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }
    entry = OPTIMIZERS.find(config.name)
    settings_of = getattr(getattr(entry, "func", entry), "group_settings", None)
    settings = settings_of(network, branches + heads) if settings_of else {}
    grouped: dict[tuple[float, bool, tuple[Any, ...]], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        small = parameter.ndim <= 1 or name.endswith(".bias")
        exempt = {"norm_and_bias": small, "norm": name in norms, "none": False}
        scale = 1.0 if lr_scales is None else lr_scales.get(name, 1.0)
        if name.startswith(branches):
            scale *= config.attention_lr
        if name.startswith(heads):
            scale *= config.head_lr
        key = scale, exempt[config.exempt_from_decay], tuple(settings.get(name, {}).items())
        grouped.setdefault(key, []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": 0.0 if exempt else config.weight_decay,
            "lr_scale": scale,
            **dict(more),
        }
        # The schedule's own rate comes first, where there is one: it is the one that is logged.
        for (scale, exempt, more), parameters in sorted(
            grouped.items(), key=lambda item: (item[0][0] != 1, -item[0][0], *item[0][1:])
        )
    ]
    fused = True if device.type in ("cpu", "cuda") else None
    if config.name == "sgd" and (
        config.args.get("dampening") or any(isinstance(p, DTensor) for p in network.parameters())
    ):
        # torch has no fused SGD of sharded parameters; with dampening, the fused one that skips its
        # first update leaves momenta as memory is found.
        fused = False
        if config.args.get("fused") and config.args.get("dampening"):
            raise ConfigError(
                "optimizer.args: fused SGD with dampening begins with uninitialised momenta where "
                "its first update is skipped; leave out fused"
            )
    own: dict[str, Any] = {}
    if config.name == "adamw":
        own = {"betas": tuple(config.betas), "eps": config.eps, "fused": fused}
    elif config.name == "sgd":
        own = {"momentum": config.momentum, "nesterov": config.nesterov, "fused": fused}
    try:
        return entry(groups, lr=config.lr, **{**own, **config.args})
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"optimizer.name {config.name!r}: {one_line(error)}") from error


def decayed_by_layer(network: nn.Module, decay: float) -> dict[str, float]:
    """Factors on a classifier's learning rates (:func:`kw.models.depth.layer_rates`); none at 1.

    Raises:
        ConfigError: the network's layers are not known.
    """
    if decay == 1:
        return {}
    from ..models.depth import layer_rates  # it imports timm, which a check of settings need not

    try:
        return layer_rates(network, decay)
    except ValueError as error:
        raise ConfigError(f"optimizer.layer_decay = {decay:g}: {error}; set 1") from error
