"""The definition of a dynamic convolution, written for reading: one sample, one block at a time.

Every other back end is tested against this one.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .spec import ConvSpec


def assemble_reference(alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """One sample's kernel ``[O, I / g, k_1 .. k_d]`` from its coefficients ``[m, n]``."""
    part = spec.partition
    cells = cells.view(-1, part.cell_out, part.cell_in, *part.cell_kernel)  # [n, c_out, c_in, ck..]
    kernel = cells.new_zeros(part.kernel_shape)
    corners = [range(0, k, c) for k, c in zip(part.kernel, part.cell_kernel, strict=True)]
    positions = itertools.product(*corners)
    _, out_blocks, in_blocks = part.grid
    blocks = itertools.product(positions, range(out_blocks), range(in_blocks))
    for i, (corner, go, gi) in enumerate(blocks):
        mixture = torch.einsum("n,n...->...", alpha[i].to(cells.dtype), cells)
        space = tuple(slice(c, c + s) for c, s in zip(corner, part.cell_kernel, strict=True))
        rows = slice(go * part.cell_out, (go + 1) * part.cell_out)
        columns = slice(gi * part.cell_in, (gi + 1) * part.cell_in)
        index: tuple[slice, ...] = (rows, columns, *space)
        kernel[index] = mixture
    return kernel


def conv_reference(x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
    """Every sample convolved with its own kernel; see :func:`kw.warehouse.ops.dynamic_conv`."""
    outputs = [
        spec.conv(x[b : b + 1], assemble_reference(alpha[b], cells, spec), spec.groups)
        for b in range(len(x))
    ]
    return torch.cat(outputs)
