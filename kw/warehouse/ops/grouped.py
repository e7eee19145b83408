"""Back ends that assemble every sample's kernel and convolve with it.

Legend: B samples, m mixtures, n cells, S, GO, GI blocks along space, output and input channels,
O, I channels, g groups, k kernel positions, P output positions.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .spec import ConvSpec

__all__ = ["assemble", "conv_bmm", "conv_grouped"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def assemble(alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """All samples' kernels: one matrix product, then every block to its place.

    Args:
        alpha: ``[B, m, n]``.
        cells: ``[n, cell]``.
        spec: the layer.

    Returns:
        ``[B, O, I / g, k_1 .. k_d]``.
    """
    part = spec.partition
    blocks = alpha.to(cells.dtype).flatten(0, 1) @ cells  # [B * m, cell]
    # Either the grid or the cell spans space: [B, S, GO, GI, c_out, c_in, ck] with S or ck being 1.
    blocks = blocks.view(len(alpha), *part.grid, part.cell_out, part.cell_in, -1)
    return blocks.permute(0, 2, 4, 3, 5, 1, 6).reshape(-1, *part.kernel_shape)


def conv_grouped(x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """One convolution with as many groups as samples; an ordinary one for a single sample."""
    batch = len(x)
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


def conv_bmm(x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """A pointwise convolution as one batched matrix product; strides pick positions beforehand."""
    if any(spec.padding):
        x = F.pad(x, [p for p in reversed(spec.padding) for _ in range(2)])
    if any(s > 1 for s in spec.stride):
        everywhere = (slice(None), slice(None))
        steps = everywhere + tuple(slice(None, None, s) for s in spec.stride)
        x = x[steps]
    kernels = assemble(alpha, cells, spec)
    batch, space = len(x), x.shape[2:]
    x = x.reshape(batch, spec.groups, -1, space.numel())  # [B, g, I / g, P]
    kernels = kernels.view(batch, spec.groups, -1, x.shape[2])  # [B, g, O / g, I / g]
    return (kernels @ x).reshape(batch, -1, *space)  # [B, O, ...]
