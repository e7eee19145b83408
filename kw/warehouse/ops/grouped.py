"""The yardstick ``grouped``: the usual implementation of dynamic convolution.

Legend: B samples, O, I channels, g groups, k kernel size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .assembly import assemble
from .spec import ConvSpec

__all__ = ["conv_grouped"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_grouped(x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """One convolution with as many groups as samples; an ordinary one for a single sample."""
    batch = x.shape[0]
    kernels = assemble(alpha, cells, spec).flatten(0, 1)  # [B * O, I / g, k..]
    y = _CONV[len(spec.partition.kernel)](
        x.reshape(1, -1, *x.shape[2:]),  # [1, B * I, ...]
        kernels,
        None,
        spec.stride,
        spec.padding,
        spec.dilation,
        batch * spec.groups,
    )
    return y.view(batch, -1, *y.shape[2:])  # [B, O, ...]
