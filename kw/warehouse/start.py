"""The start ``"keep"``: cells and coefficients that assemble given static kernels.

At temperature 0 a mixture's block is ``alpha E``. Where the logits' weights are zero, alpha depends
on their biases only: it may be any matrix A in the range of the attention function
(:meth:`KernelAttention.hold`), and the cells are then chosen so that ``A E`` is the kernel of
the static layer. Parameters, checkpoints and forward pass are those of the paper.

- Budget b >= 1: a mixture takes the cell that the one-hot start gives it (paper: Eq. 5), with
  coefficient p; all other coefficients are q. For the contrasting function ``p = 1 - eps / c`` and
  ``q = 0``. The other functions are never usefully 0: ``p = c / (1 + c)`` and
  ``q = min(c, 1) / (2 n (1 + c))``, and the cells compensate for q. Cells that no mixture
  owns stay random.
- Budget b < 1: n cells cannot hold all blocks. The truncated singular value decomposition of the
  matrix of all blocks has the smallest error (Eckart and Young); given how large the layers' inputs
  are, alternating least squares make the error of the outputs small instead. Both have negative
  coefficients, which only the contrasting function can give.

The scale c of the logits is ``firmness * n``. An update of AdamW moves every logit by about the
learning rate lr, so that the coefficients of a mixture together move by ``n lr / c``: as much in a
large warehouse as in a small one.

Legend: m mixtures of a layer, M of all layers of the warehouse, n cells, D values of a cell, c the
    scale of the logits, O, I output and input channels, g groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import EPS, KernelAttention, own_and_other
from .ops.assembly import to_blocks
from .partition import Partition
from .warehouse import Warehouse

_ROUNDS, _ENOUGH = 10, 1e-2
"""Alternating least squares stop after this many rounds, or when a round lowers the error by less
than this share."""


@torch.no_grad()
def keep_kernels(
    warehouse: Warehouse,
    attentions: Sequence[KernelAttention],
    kernels: Sequence[Tensor],
    inputs: Sequence[Tensor | None] | None = None,
) -> float:
    """Make dynamic layers compute at temperature 0 what given static kernels compute.

    Args:
        warehouse: its cells are set.
        attentions: those of all its layers, in their order. At a budget of 1 or more they hold
            their own cells since they were made (:attr:`KernelAttention.start_scale`); below, their
            logits are set.
        kernels: ``[O, I / g, k_1 .. k_d]`` of every layer (a linear layer's weight, ``[O, I]``).
        inputs: mean square of every layer's input channels, ``[I]``, to weigh errors by where the
            cells cannot hold all kernels; ``None`` for a layer that was never called.

    Returns:
        How much was kept: 1 - (squared error / squared norm) of all kernels, weighted by
        ``inputs`` where they are given; 1 where the budget is 1 or more.

    Raises:
        ValueError: a budget below 1 with an attention function that has no negative coefficients,
            or a kernel that is not finite.
    """
    settings, layout = warehouse.settings, warehouse.partition
    parts, scale = layout.layers, settings.firmness * layout.cells
    if settings.cell_num_ratio < 1 and settings.attention != "contrasting":
        raise ValueError(
            f"warehouse {warehouse.name!r}: cell_num_ratio {settings.cell_num_ratio:g} with "
            f"attention {settings.attention!r} cannot keep static kernels: fewer cells than "
            "mixtures have to be subtracted from each other, which only 'contrasting' can; set "
            "start='paper', which initialises at random"
        )
    names = [shape.name for shape in warehouse.shapes]
    blocks = torch.cat(list(map(kernel_blocks, kernels, parts, names)))
    if settings.cell_num_ratio >= 1:
        own, other = own_and_other(settings.attention, scale, layout.cells)
        owned = [cell for own_slice in layout.slices for cell in own_slice.owners]
        kept = blocks / own
        if other:
            cells = warehouse.cells.detach().to("cpu").to(torch.float64)
            kept = _without_others(blocks, cells, owned, own, other)
        warehouse.cells[owned] = kept.to(warehouse.cells)
        return 1.0
    alpha, live = _low_rank(blocks, layout.cells)
    by_value = torch.ones((), dtype=torch.float64, device="cpu")
    if inputs is not None and any(square is not None for square in inputs):
        weights = _weights(inputs, parts, [shape.groups for shape in warehouse.shapes])
        alpha, live = _weighted_low_rank(blocks, weights, alpha, live, parts[0])
        by_value = _by_value(weights, parts[0].cell_out, math.prod(parts[0].cell_kernel))
    total = (blocks.square() * by_value).sum().item()
    error = ((blocks - alpha @ live).square() * by_value).sum().item()
    # Cells are unbounded, coefficients are not. Where there are more cells than values, the cells
    # that are not needed stay random.
    size = alpha.abs().sum(-1).max().item() / (1 - EPS / scale) or 1.0
    warehouse.cells[: len(live)] = (live * size).to(warehouse.cells)
    alpha = F.pad(alpha / size, (0, layout.cells - len(live)))
    rows = alpha.split([part.mixtures for part in parts])
    for attention, own_rows in zip(attentions, rows, strict=True):
        attention.hold(own_rows, scale)
    return 1 - error / total if total else 1.0


def kernel_blocks(kernel: Tensor, part: Partition, name: str) -> Tensor:
    """A static layer's kernel as the blocks of its mixtures.

    Args:
        kernel: ``[O, I / g, k_1 .. k_d]``; a linear layer's weight, ``[O, I]``.
        part: how it is cut.
        name: the layer's, for the message.

    Returns:
        ``[m, D]``, float64 on the CPU.

    Raises:
        ValueError: the kernel is not finite.
    """
    kernel = exact_kernel(kernel, name)
    taps = kernel.reshape(1, *kernel.shape[:2], -1).movedim(3, 1)  # [1, K, O, I / g]
    return to_blocks(taps, part)[0]


def exact_kernel(kernel: Tensor, name: str) -> Tensor:
    """A static layer's kernel in float64 on the CPU, since some devices lack that type.

    Raises:
        ValueError: the kernel is not finite.
    """
    kernel = kernel.detach().to("cpu").to(torch.float64)
    if not kernel.isfinite().all():
        raise ValueError(f"the weight of layer {name!r} is not finite: it cannot be kept")
    return kernel


def _without_others(
    blocks: Tensor, cells: Tensor, owned: Sequence[int | None], own: float, other: float
) -> Tensor:
    """The owned cells E of ``(p - q) E_i + q sum_j E_j = blocks_i``, over all cells j."""
    free = cells.sum(0) - cells[owned].sum(0)
    total = (blocks.sum(0) - len(blocks) * other * free) / (own - other + len(blocks) * other)
    return (blocks - other * (total + free)) / (own - other)


def _low_rank(blocks: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """The best ``alpha [M, r]`` and ``cells [r, D]``, with r the smaller of n and D, by the
    eigenvectors of the smaller Gram matrix."""
    mixtures, values = blocks.shape
    wide = mixtures <= values
    _, vectors = torch.linalg.eigh(blocks @ blocks.t() if wide else blocks.t() @ blocks)
    basis = vectors.flip(-1)[:, :cells]  # eigenvalues rise
    return (basis, basis.t() @ blocks) if wide else (blocks @ basis, basis.t())


def _weights(
    inputs: Sequence[Tensor | None], parts: Sequence[Partition], groups: Sequence[int]
) -> Tensor:
    """How much a block's errors count by input channel of the cell, ``[M, c_in]``, mean 1."""
    rows = []
    seen = [square.mean().item() for square in inputs if square is not None]
    for square, part, group_count in zip(inputs, parts, groups, strict=True):
        spatial, out_blocks, in_blocks = part.grid
        in_per_group = in_blocks * part.cell_in
        if square is None:  # never called: the smallest weight of the other layers
            square = torch.full((group_count * in_per_group,), min(seen), device="cpu")
        # Input channels [g, I / g]; output blocks belong to groups in order, some to several.
        by_group = square.to("cpu").to(torch.float64).view(group_count, in_per_group)
        out_channels = out_blocks * part.cell_out
        group_of = torch.arange(out_channels, device="cpu") * group_count // out_channels
        by_block = by_group[group_of].view(out_blocks, part.cell_out, in_blocks, part.cell_in)
        by_block = by_block.mean(1)[None].expand(spatial, -1, -1, -1)
        rows.append(by_block.reshape(part.mixtures, part.cell_in))
    weights = torch.cat(rows)
    # Channels that were zero in all batches may become nonzero in training.
    weights = weights / weights.mean().clamp_min(1e-30)
    return weights.clamp_min(1e-4)


def _by_value(weights: Tensor, cell_out: int, span: int) -> Tensor:
    """Weights ``[M, c_in]`` for every value of a cell, ``[M, c_out * c_in * span]``."""
    return weights[:, None, :, None].expand(-1, cell_out, -1, span).flatten(1)


def _weighted_low_rank(
    blocks: Tensor, weights: Tensor, alpha: Tensor, cells: Tensor, part: Partition
) -> tuple[Tensor, Tensor]:
    """Alternating least squares of ``sum weights * (blocks - alpha E)^2`` from a first guess."""
    shape = (part.cell_out, part.cell_in, math.prod(part.cell_kernel))
    by_value = _by_value(weights, part.cell_out, shape[2])
    weighted = blocks * by_value
    # [c_in, M, c_out * span]: a channel's values share their weights, hence the normal matrix.
    by_channel = weighted.unflatten(1, shape).permute(2, 0, 1, 3).flatten(2)
    distinct, group = weights.unique(dim=0, return_inverse=True)
    last = math.inf
    for _ in range(_ROUNDS):
        grams = (alpha * weights.t().unsqueeze(2)).transpose(1, 2) @ alpha  # [c_in, n, n]
        solved = _solve(grams, alpha.t() @ by_channel)  # [c_in, n, c_out * span]
        solved = solved.unflatten(2, (shape[0], shape[2]))
        cells = solved.permute(1, 2, 0, 3).flatten(1)
        rows = solved.flatten(2)
        products = rows @ rows.transpose(1, 2)  # [c_in, n, n]
        right = cells @ weighted.t()  # [n, M]
        for number, row in enumerate(distinct):
            members = group == number
            gram = torch.tensordot(row, products, 1)
            alpha[members] = _solve(gram, right[:, members]).t()
        error = ((blocks - alpha @ cells).square() * by_value).sum().item()
        if error > (1 - _ENOUGH) * last:
            break
        last = error
    return alpha, cells


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """Least squares by symmetric matrices ``[..., n, n]`` that may be singular up to rounding."""
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    ridge = 1e-9 * size[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device="cpu")
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram + ridge))
