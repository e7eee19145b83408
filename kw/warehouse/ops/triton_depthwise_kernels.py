"""Triton kernels of depthwise layers on channels-last images.

Neighbouring threads have neighbouring channels, which lie together in images and kernels alike, so
that nothing is brought into another order. There is no product for tensor cores: memory limits.

Legend: B samples, P positions, C channels, T taps.

Rooflines for bfloat16, 128 samples and a GPU of 4.3 TB/s. 384 channels, 7x7, 14x14 positions:
19.3 MB of input and of output, 4.8 MB of kernels: 0.010 ms forward. A layout change of input and
output, which a library's channels-first kernel needs here, moves twice as much again.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments have the types they are launched with. Importing this module needs Triton.

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import _SIZES, _valid_taps, _within

__all__ = ["depthwise", "depthwise_gradient"]


@triton.jit(do_not_specialize=_SIZES)
def depthwise(
    x, w, y,
    # Strides of samples and space; channels have 1. Those of y are between positions written.
    x_b, x_0, x_1, x_2,
    y_b, y_0, y_1, y_2,
    w_b, w_0, w_1, w_2,
    channels,
    # As for triton_kernels.convolve.
    count_0, count_1, count_2,
    size_0, size_1, size_2,
    step_0, step_1, step_2,
    start_0, start_1, start_2,
    hop_0, hop_1, hop_2,
    TAPS_0: tl.constexpr, TAPS_1: tl.constexpr, TAPS_2: tl.constexpr,
    TILE_P: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """``y[b, p, c] = sum_t w[b, t, c] x[b, p * step + start + t * hop, c]``, sums in float32.

    The forward pass and, with the axes of one residue of the stride, the input's gradient.
    """
    c_tiles = tl.cdiv(channels, TILE_C)
    positions = count_0 * count_1 * count_2
    p_tiles = tl.cdiv(positions, TILE_P)
    pid = tl.program_id(0)
    c = (pid % c_tiles) * TILE_C + tl.arange(0, TILE_C)
    p = (pid // c_tiles % p_tiles) * TILE_P + tl.arange(0, TILE_P)
    b = (pid // (c_tiles * p_tiles)).to(tl.int64)
    x += b * x_b
    w += b * w_b
    y += b * y_b

    p_0, p_1, p_2 = p // (count_1 * count_2), p // count_2 % count_1, p % count_2
    at_0 = p_0 * step_0 + start_0
    at_1 = p_1 * step_1 + start_1
    at_2 = p_2 * step_2 + start_2
    x_rows = at_0 * x_0 + at_1 * x_1 + at_2 * x_2
    bits_0 = _valid_taps(at_0, hop_0, size_0, TAPS_0)
    bits_1 = _valid_taps(at_1, hop_1, size_1, TAPS_1)
    bits_2 = _valid_taps(at_2, hop_2, size_2, TAPS_2)
    bits_2 = tl.where(p < positions, bits_2, 0)
    exists = c < channels

    total = tl.zeros((TILE_P, TILE_C), dtype=tl.float32)
    for t in range(TAPS_0 * TAPS_1):
        t_0 = t // TAPS_1
        t_1 = t % TAPS_1
        here_01 = (bits_0 >> t_0) & (bits_1 >> t_1)
        x_row = x + (t_0 * hop_0 * x_0 + t_1 * hop_1 * x_1)
        w_row = w + t_0 * w_0 + t_1 * w_1
        for t_2 in tl.static_range(TAPS_2):
            here = (here_01 & (bits_2 >> t_2) & 1) != 0
            x_tile = tl.load(
                x_row + t_2 * hop_2 * x_2 + x_rows[:, None] + c[None, :],
                mask=here[:, None] & exists[None, :],
                other=0.0,
                cache_modifier=".ca",
            )
            w_tile = tl.load(w_row + t_2 * w_2 + c, mask=exists, other=0.0)
            total += x_tile.to(tl.float32) * w_tile.to(tl.float32)[None, :]
    y_rows = p_0 * y_0 + p_1 * y_1 + p_2 * y_2
    tl.store(
        y + y_rows[:, None] + c[None, :],
        total.to(y.dtype.element_ty),
        mask=(p < positions)[:, None] & exists[None, :],
    )


@triton.jit(do_not_specialize=_SIZES)
def depthwise_gradient(
    x, dy, dw,
    x_b, x_0, x_1, x_2,
    y_b, y_0, y_1, y_2,
    w_b, w_row, w_tap,
    channels,
    count_0, count_1, count_2,
    size_0, size_1, size_2,
    step_0, step_1, step_2,
    start_0, start_1, start_2,
    hop_0, hop_1, hop_2,
    TAPS_0: tl.constexpr, TAPS_1: tl.constexpr, TAPS_2: tl.constexpr,
    TILE_T: tl.constexpr,  # TAPS_2, padded
    TILE_P: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """``dw[b, t, c] = sum_p dy[b, p, c] x[b, p * step + start + t * hop, c]``, sums in float32.

    A program makes the taps of one row of kernel positions for ``TILE_C`` channels and goes through
    all positions: the order of the sums does not depend on the launch.
    """
    c_tiles = tl.cdiv(channels, TILE_C)
    pid = tl.program_id(0)
    c = (pid % c_tiles) * TILE_C + tl.arange(0, TILE_C)
    row = pid // c_tiles % (TAPS_0 * TAPS_1)
    b = (pid // (c_tiles * TAPS_0 * TAPS_1)).to(tl.int64)
    x += b * x_b
    dy += b * y_b
    dw += b * w_b + row * w_row
    t = tl.arange(0, TILE_T)
    from_0 = start_0 + row // TAPS_1 * hop_0
    from_1 = start_1 + row % TAPS_1 * hop_1
    from_2 = start_2 + t * hop_2
    exists = c < channels
    positions = count_0 * count_1 * count_2
    total = tl.zeros((TILE_P, TILE_T, TILE_C), dtype=tl.float32)
    for i in range(tl.cdiv(positions, TILE_P)):
        p = i * TILE_P + tl.arange(0, TILE_P)
        p_0, p_1, p_2 = p // (count_1 * count_2), p // count_2 % count_1, p % count_2
        q_0, q_1 = p_0 * step_0 + from_0, p_1 * step_1 + from_1
        q_2 = (p_2 * step_2)[:, None] + from_2[None, :]  # [P, T]
        rows = _within(q_0, size_0) & _within(q_1, size_1) & (p < positions)
        here = rows[:, None] & _within(q_2, size_2) & (t < TAPS_2)[None, :]
        at = (q_0 * x_0 + q_1 * x_1)[:, None] + q_2 * x_2
        x_tile = tl.load(
            x + at[:, :, None] + c[None, None, :],
            mask=here[:, :, None] & exists[None, None, :],
            other=0.0,
            cache_modifier=".ca",
        )
        y_tile = tl.load(
            dy + (p_0 * y_0 + p_1 * y_1 + p_2 * y_2)[:, None] + c[None, :],
            mask=rows[:, None] & exists[None, :],
            other=0.0,
        )
        total += x_tile.to(tl.float32) * y_tile.to(tl.float32)[:, None, :]
    tl.store(
        dw + t[:, None] * w_tap + c[None, :],
        tl.sum(total, 0).to(dw.dtype.element_ty),
        mask=(t < TAPS_2)[:, None] & exists[None, :],
    )
