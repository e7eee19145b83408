"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/): timm's, with cells as
stacks of matrices.

Muon makes the update of a matrix orthogonal. Which parameters are matrices follows from what they
do, not from their shapes:

- weights of linear layers ``[out, in]`` and of convolutions, as ``[out, in * positions]``: Muon;
- cells ``[n, c_out * c_in * positions]``: Muon, each cell a matrix ``[c_out, c_in * positions]`` of
  its own. A mixture of cells is a tile of a kernel; an orthogonal update of the whole stack would
  have no meaning there;
- everything else: AdamW, with the same learning rate. Biases, norms and embeddings are no matrices.
  Depthwise and grouped convolutions map no channels to one another, or only parts. The classifier
  is Muon's own exception. Attention branches give logits, as a classifier does, through few hidden
  units, and begin at zero: an orthogonal update would turn all coefficients at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.optim.muon import Muon as _Muon
from torch import nn

from ..registry import OPTIMIZERS
from ..warehouse import KWLayer

_MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Muon(_Muon):
    """timm's Muon; arguments are timm's. Of a group with ``cell_shape = (c_out, c_in * positions)``
    every row is a matrix of that shape."""

    @staticmethod
    def group_settings(network: nn.Module, apart: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """Settings of a parameter's group, by name of the parameter.

        Args:
            network: the network, converted or not.
            apart: prefixes of parameters that AdamW trains: classifier and attention branches.
        """
        matrices: dict[int, dict[str, Any]] = {}
        for name, module in network.named_modules():
            if f"{name}.".startswith(apart):
                continue
            if isinstance(module, KWLayer):
                c_out, *rest = module.warehouse.partition.cell_shape
                shape = (c_out, torch.Size(rest).numel())
                if module.shape.groups == 1 and min(shape) > 1:
                    cells = {
                        "cell_shape": shape,
                        "conv_mode": "batched",
                        "normalize_spatial": False,
                    }
                    matrices[id(module.warehouse.cells)] = cells
            elif isinstance(module, _MAPS):
                weight = module.weight
                shape = (weight.shape[0], weight[0].numel())
                if getattr(module, "groups", 1) == 1 and min(shape) > 1:
                    matrices[id(weight)] = {}
        return {
            name: {"use_muon": id(parameter) in matrices, **matrices.get(id(parameter), {})}
            for name, parameter in network.named_parameters()
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update."""
        assert closure is None, "gradients are there already"
        with _as_stacks(self.param_groups):
            return super().step()  # type: ignore[no-untyped-call]


@contextmanager
def _as_stacks(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Show cells to timm as ``[c_out, c_in * positions, n]``, of which it takes every matrix
    ``[:, :, i]`` by itself; the memory stays where it is."""
    kept = []
    for group in groups:
        if shape := group.get("cell_shape"):
            for cells in group["params"]:
                if cells.grad is not None:
                    kept.append((cells, cells.data, cells.grad, shape))
    try:
        for cells, data, grad, shape in kept:
            cells.grad = None
            cells.data = data.view(-1, *shape).permute(1, 2, 0)
            cells.grad = grad.reshape(-1, *shape).permute(1, 2, 0)
        yield
    finally:
        for cells, data, grad, _ in kept:
            cells.grad = None
            cells.data = data
            cells.grad = grad


OPTIMIZERS["muon"] = Muon
OPTIMIZERS["nmuon"] = partial(Muon, nesterov=True)
OPTIMIZERS["adamuon"] = partial(Muon, algo="adamuon")
OPTIMIZERS["nadamuon"] = partial(Muon, algo="adamuon", nesterov=True)
