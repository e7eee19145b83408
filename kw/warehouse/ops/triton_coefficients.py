"""Triton kernels of the contrasting attention function, from logits to annealed coefficients.

A row is one mixture of one sample. Everything about a row is in one program, in float32.

Legend: R rows (samples times mixtures), n cells; logits have one more column, the null cell's.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments have the types they are launched with. Importing this module needs Triton.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def coefficients(
    logits, one_hot, temperature, alpha, kept, rows, mixtures, cells,
    EPS: tl.constexpr, ANNEALED: tl.constexpr, ROWS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """``alpha[j, r] = lerp(z[r, j] / (sum_p |z[r, p]| + EPS), one_hot[r % mixtures, j], tau)``.

    ``alpha`` is ``[n, R]``: products of it with the cells then have rows that are read in whole
    vectors, which those of n values would not be. ``kept`` gets tau, for the backward pass: the
    buffer may change before.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CELLS)
    here = (r < rows)[:, None]
    z = tl.load(
        logits + r[:, None] * (cells + 1) + c[None, :], mask=here & (c <= cells)[None, :], other=0.0
    )
    found = z / (tl.sum(tl.abs(z), 1) + EPS)[:, None]
    mask = here & (c < cells)[None, :]
    if ANNEALED:
        tau = tl.load(temperature).to(tl.float32)
        if tl.program_id(0) == 0:
            tl.store(kept, tau)
        own = tl.load(
            one_hot + (r % mixtures)[:, None] * cells + c[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        # As torch.lerp: exact at both ends.
        step = own - found
        found = tl.where(tau < 0.5, found + tau * step, own - step * (1 - tau))
    at = c[None, :].to(tl.int64) * rows + r[:, None]
    tl.store(alpha + at, found.to(alpha.dtype.element_ty), mask=mask)


@triton.jit
def coefficients_gradient(
    grad, logits, kept, into, rows, cells, by_row, by_cell,
    EPS: tl.constexpr, ANNEALED: tl.constexpr, ROWS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """``into[r, j] = (1 - tau) / S * (g[r, j] - sign(z[r, j]) / S * sum_i g[r, i] z[r, i])``.

    ``S = sum_p |z[r, p]| + EPS``; the null cell's ``g`` is 0. ``by_row`` and ``by_cell`` are the
    strides of ``grad``.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CELLS)
    here = (r < rows)[:, None]
    at = r[:, None] * (cells + 1) + c[None, :]
    mask = here & (c <= cells)[None, :]
    z = tl.load(logits + at, mask=mask, other=0.0)
    g = tl.load(
        grad + r[:, None] * by_row + c[None, :].to(tl.int64) * by_cell,
        mask=here & (c < cells)[None, :],
        other=0.0,
    ).to(tl.float32)
    total = tl.sum(tl.abs(z), 1) + EPS
    along = tl.sum(g * z, 1) / total
    sign = (z > 0).to(tl.float32) - (z < 0).to(tl.float32)
    share = 1 / total
    if ANNEALED:
        share = share * (1 - tl.load(kept))
    tl.store(into + at, share[:, None] * (g - sign * along[:, None]), mask=mask)
