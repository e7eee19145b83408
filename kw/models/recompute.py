"""Gradient checkpointing: blocks keep their inputs, and compute their insides again in the backward
pass (Chen et al., 2016, arXiv:1604.06174).

timm's networks divide themselves into blocks (``set_grad_checkpointing``). Values and gradients are
those of the network without it: random numbers are drawn again as they were, and BatchNorm takes
only the first of the two forward passes into its running statistics.
"""

from __future__ import annotations

from typing import Any

from timm.layers import convert_sync_batchnorm
from torch import nn

from ..torch_private import BatchNorm, backward_pass


def recompute_blocks(network: nn.Module) -> None:
    """Turn gradient checkpointing on.

    Args:
        network: a timm network, converted or not, changed in place.

    Raises:
        ValueError: the network does not divide itself into blocks.
    """
    turn_on: Any = getattr(network, "set_grad_checkpointing", None)
    try:
        if turn_on is None:
            raise AssertionError("it has no set_grad_checkpointing")
        turn_on(True)
    except AssertionError as error:  # timm's way to say so
        name = type(network).__name__
        raise ValueError(f"{name} cannot compute its blocks again: {error}") from error
    _count_once(network)


def synchronised(network: nn.Module) -> nn.Module:
    """The network with SyncBatchNorm in the place of BatchNorm.

    timm's layers keep their activation, which torch's conversion drops. Blocks that are computed
    again are still counted once.

    Args:
        network: changed in place; parameters and statistics stay the same tensors.
    """
    recomputes = any(_take_statistics in m._forward_hooks.values() for m in network.modules())
    network = convert_sync_batchnorm(network)
    if recomputes:
        _count_once(network)
    return network


def _count_once(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.register_forward_pre_hook(_leave_statistics)
            # Also where the pass is cut short, once all that was asked for is there.
            module.register_forward_hook(_take_statistics, always_call=True)


def _leave_statistics(module: Any, _: Any) -> None:
    if backward_pass() != -1:
        module.statistics_left = dict(module._buffers)
        for name, buffer in module.statistics_left.items():
            module._buffers[name] = None if buffer is None else buffer.clone()


def _take_statistics(module: Any, _: Any, __: Any) -> None:
    module._buffers.update(module.__dict__.pop("statistics_left", {}))
