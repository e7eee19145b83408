"""A training step on a GPU that is not there: predicted, not measured.

Dynamic layers take what the planner predicts (``tools/explain_backends.py --gpu``). Everything else
takes the longer of its arithmetic and its memory traffic at the rates of the GPU's profile
(:mod:`kw.warehouse.ops.device`: 60 % of the peak of matrix products, 80 % of that of the memory)
and a call each; its backward pass counts as twice its forward pass. AdamW reads and writes 28 bytes
a parameter. What this leaves out: additions and pooling that are no modules, host time, the loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...engine import set_contraction
from ...models import build_network
from ...warehouse import KWLayer, explain
from ...warehouse.explain import explain_on
from ...warehouse.ops.contraction import Cost
from ...warehouse.ops.device import DeviceProfile
from ..cases import NetworkSource
from .model import Step

__all__ = ["predict_step"]

_ADAMW_BYTES, _SGD_BYTES = 28, 20
_DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def predict_step(
    source: NetworkSource, batch: int, dtype: torch.dtype, profile: DeviceProfile
) -> Step:
    """A step of a network with fresh weights; see the head of this module.

    Args:
        source: the network.
        batch: images.
        dtype: of convolutions and matrix products, as under autocast.
        profile: of the device.
    """
    config = source.config
    with torch.random.fork_rng(devices=[]):
        network = build_network(config.model).eval()
    set_contraction(config.contraction, network)
    size = config.data.input_size
    images = torch.zeros(1, 3, size, size)
    costs: list[Cost] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        costs.append(_cost(module, inputs[0], output, batch, dtype))

    leaves = [m for m in network.modules() if not list(m.children()) and not isinstance(m, KWLayer)]
    hooks = [module.register_forward_hook(note) for module in leaves]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    static = sum(profile.seconds(cost, dtype) for cost in costs)
    forward, backward = static, 2 * static
    if any(isinstance(module, KWLayer) for module in network.modules()):
        for choice in explain(network, images):
            on = explain_on(choice, batch, dtype, profile)
            forward += on.forward_costs[0].seconds or 0.0
            backward += on.backward_costs[0].seconds or 0.0
    parameters = sum(parameter.numel() for parameter in network.parameters())
    each = _ADAMW_BYTES if config.optimizer.name == "adamw" else _SGD_BYTES
    return Step(batch, forward, backward, each * parameters / profile.bandwidth)


def _cost(module: nn.Module, given: Any, made: Any, batch: int, dtype: torch.dtype) -> Cost:
    """Of a module's forward pass, from what it did with one image."""
    if not (isinstance(given, Tensor) and isinstance(made, Tensor)):
        return Cost(dense_macs=0, bytes=0, launches=0)
    if isinstance(module, (nn.Identity, nn.Flatten)):
        return Cost(dense_macs=0, bytes=0, launches=0)
    macs, weights = 0, 0
    if isinstance(module, _DENSE):
        weight = module.weight
        weights = weight.numel()
        # Multiply-adds of an output value: all of a weight's but those for other outputs.
        macs = batch * made.numel() * math.prod(weight.shape[1:])
    values = batch * (given.numel() + made.numel()) + weights
    return Cost(dense_macs=macs, bytes=values * dtype.itemsize, launches=1)
