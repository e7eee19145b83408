"""Triton kernels that convolve every sample with its own kernel, read where the assembly left it.

Assembled kernels lie as one matrix product writes them, ``[B, mixtures, rows, ck, c_in]``: nothing
is permuted. A kernel's element is found by strides: along taps, along blocks of output and of input
channels, along rows inside of a block. Positions lie on three axes; fewer have leading axes of one.

Legend: B samples, P positions, O, I channels, T taps, ck kernel positions inside of a cell, rows
output channels of a cell in the chunk at hand.

Rooflines below are for bfloat16 and 128 samples on a GPU of 790 TFLOP/s, 4.3 TB/s to its memory and
about 5.5 TB/s to its L2 cache. *Late*: 512 -> 512 channels, 3x3, 7x7 (604 MB of assembled kernels,
12.8 MB of activations). *Early*: 64 -> 64 channels, 3x3, 56x56 (9.4 MB, 103 MB). Both take
14.8 G multiply-adds: 0.037 ms.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments have the types they are launched with. Importing this module needs Triton; whether its
# kernels run on a GPU or are interpreted on the CPU is settled here, when they are decorated.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["convolve", "convolve_flat", "kernel_gradient", "kernel_gradient_flat"]


@triton.jit
def _within(q, size):
    """``0 <= q < size`` in one comparison: negative numbers are large unsigned ones."""
    return q.to(tl.uint32, bitcast=True) < size


@triton.jit
def _valid_taps(at, hop, size, TAPS: tl.constexpr):
    """Per position the taps that meet the input along one axis, a bit each."""
    bits = tl.zeros_like(at)
    for t in tl.static_range(TAPS):
        bits += _within(at + t * hop, size).to(tl.int32) << t
    return bits


_SIZES = [f"{name}_{axis}" for name in ("count", "size", "start") for axis in range(3)]
"""Arguments that differ with the size of the image: another size compiles nothing anew."""


@triton.jit(do_not_specialize=_SIZES)
def convolve(
    x, w, y,
    # Strides of what is read and written, but for those of channels in units of X_UNIT and Y_UNIT;
    # y's along space between positions of this launch.
    x_b, x_c, x_0, x_1, x_2,
    y_b, y_c, y_0, y_1, y_2,
    # Strides of the kernels in units of W_UNIT: samples, taps per axis, blocks of written (n) and
    # of read (k) channels; then the number of written blocks.
    w_b, w_0, w_1, w_2, w_n_block, w_k_block,
    n_blocks,
    # Positions written, size of x; tap t of position p reads at p * step + start + t * hop.
    count_0, count_1, count_2,
    size_0, size_1, size_2,
    step_0, step_1, step_2,
    start_0, start_1, start_2,
    hop_0, hop_1, hop_2,
    TAPS_0: tl.constexpr, TAPS_1: tl.constexpr, TAPS_2: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, W_UNIT: tl.constexpr,
    # Strides of the kernels inside of a block; channels of a block, and of y and x between blocks
    # (more than a block has in a chunk).
    W_N: tl.constexpr, W_K: tl.constexpr,
    N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, Y_BLOCK: tl.constexpr, X_BLOCK: tl.constexpr,
    K: tl.constexpr, ADD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    TILE_P: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """``y[b, n, p] (+)= sum_{t, k} w[b, t, n, k] x[b, k, p * step + start + t * hop]``.

    The forward pass (n output, k input channels) and the gradient of the input (n input, k output
    channels, one launch per residue of the stride, so that no multiply-add meets a zero) are both
    of this form. It is an implicit matrix product per sample: a program makes ``TILE_P`` positions
    of ``TILE_N`` channels, taps innermost, so that they find the input in the caches. Sums are kept
    in float32, in an order that the launch does not change.

    Bytes: kernels ``TAPS * N * K`` once per tile of positions (from memory the first time), input
    once from memory and ``TAPS * N / TILE_N`` times from the caches, output once.
    Late: one tile of 64 positions holds all 49, kernels are read once, 604 MB: 0.14 ms, bound by
    memory. The arithmetic, positions rounded up, is 0.049 ms and hides behind it.
    Early, tiles of 256 by 64: 0.024 ms for memory, 0.037 ms for arithmetic. Nine taps fetch 0.46 GB
    of input and 0.12 GB of kernels: 0.11 ms if all came from L2. The input of a tile and its rim
    are 47 KB, which L1 holds: then L2 delivers 0.2 GB, 0.035 ms.
    """
    x_b, x_0, x_1, x_2 = x_b * X_UNIT, x_0 * X_UNIT, x_1 * X_UNIT, x_2 * X_UNIT
    y_b, y_0, y_1, y_2 = y_b * Y_UNIT, y_0 * Y_UNIT, y_1 * Y_UNIT, y_2 * Y_UNIT
    w_b, w_0, w_1, w_2 = w_b * W_UNIT, w_0 * W_UNIT, w_1 * W_UNIT, w_2 * W_UNIT
    w_n_block, w_k_block = w_n_block * W_UNIT, w_k_block * W_UNIT
    channels = n_blocks * N_BLOCK
    n_tiles = tl.cdiv(channels, TILE_N)
    positions = count_0 * count_1 * count_2
    p_tiles = tl.cdiv(positions, TILE_P)
    pid = tl.program_id(0)
    # Programs of a sample are neighbours, and those that share a tile of its kernel more so.
    p = (pid % p_tiles) * TILE_P + tl.arange(0, TILE_P)
    n = (pid // p_tiles % n_tiles) * TILE_N + tl.arange(0, TILE_N)
    b = (pid // (p_tiles * n_tiles)).to(tl.int64)  # a batch may have more than 2^31 values
    x += b * x_b
    w += b * w_b
    y += b * y_b

    p_0, p_1, p_2 = p // (count_1 * count_2), p // count_2 % count_1, p % count_2
    at_0 = p_0 * step_0 + start_0
    at_1 = p_1 * step_1 + start_1
    at_2 = p_2 * step_2 + start_2
    x_rows = at_0 * x_0 + at_1 * x_1 + at_2 * x_2  # [P]
    w_rows = n // N_BLOCK * w_n_block + n % N_BLOCK * W_N  # [N]

    # Comparing positions at every tap would take as many instructions as there is time for.
    bits_0 = _valid_taps(at_0, hop_0, size_0, TAPS_0)
    bits_1 = _valid_taps(at_1, hop_1, size_1, TAPS_1)
    bits_2 = _valid_taps(at_2, hop_2, size_2, TAPS_2)
    bits_2 = tl.where(p < positions, bits_2, 0)

    TAPS: tl.constexpr = TAPS_0 * TAPS_1 * TAPS_2
    total = tl.zeros((TILE_P, TILE_N), dtype=tl.float32)
    for i in range(TAPS * ((K + TILE_K - 1) // TILE_K)):
        k_0 = i // TAPS * TILE_K
        tap = i % TAPS
        t_0 = tap // (TAPS_1 * TAPS_2)
        t_1 = tap // TAPS_2 % TAPS_1
        t_2 = tap % TAPS_2
        if K_BLOCK % TILE_K == 0:  # the tile lies in one block: addresses stay consecutive
            # Explicit, since some versions of Triton do not infer it and load value by value.
            inside = tl.multiple_of(k_0 % K_BLOCK, TILE_K) + tl.arange(0, TILE_K)
            x_columns = (k_0 // K_BLOCK * X_BLOCK + inside) * x_c
            w_columns = k_0 // K_BLOCK * w_k_block + inside * W_K
        else:
            k = k_0 + tl.arange(0, TILE_K)
            x_columns = (k // K_BLOCK * X_BLOCK + k % K_BLOCK) * x_c
            w_columns = k // K_BLOCK * w_k_block + k % K_BLOCK * W_K
        here = ((bits_0 >> t_0) & (bits_1 >> t_1) & (bits_2 >> t_2) & 1) != 0
        x_tap = x + (t_0 * hop_0 * x_0 + t_1 * hop_1 * x_1 + t_2 * hop_2 * x_2)
        x_mask, w_mask = here[:, None], (n < channels)[None, :]
        if K % TILE_K != 0:
            exists = k_0 + tl.arange(0, TILE_K) < K
            x_mask, w_mask = x_mask & exists[None, :], w_mask & exists[:, None]
        x_tile = tl.load(
            x_tap + x_rows[:, None] + x_columns[None, :],
            mask=x_mask,
            other=0.0,
            cache_modifier=".ca",  # also in L1, for the next taps; by default only in L2
        )
        w_tap = w + t_0 * w_0 + t_1 * w_1 + t_2 * w_2
        w_tile = tl.load(w_tap + w_rows[None, :] + w_columns[:, None], mask=w_mask, other=0.0)
        total = tl.dot(x_tile.to(DOT), w_tile.to(DOT), total, input_precision=PRECISION)

    y_rows = p_0 * y_0 + p_1 * y_1 + p_2 * y_2  # [P]
    y_columns = (n // N_BLOCK * Y_BLOCK + n % N_BLOCK) * y_c  # [N]
    at = y + y_rows[:, None] + y_columns[None, :]
    mask = (p < positions)[:, None] & (n < channels)[None, :]
    if ADD:  # chunks follow one another on one stream: no two programs add to one value
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def kernel_gradient(
    x, dy, dw,
    x_b, x_c, x_0, x_1, x_2,
    y_b, y_c, y_0, y_1, y_2,
    w_b, w_tap, w_o_block, w_o, w_i_block,
    o_blocks,
    i_blocks,
    # As for convolve; all strides of the kernels are in units of W_UNIT.
    count_0, count_1, count_2,
    size_0, size_1, size_2,
    step_0, step_1, step_2,
    start_0, start_1, start_2,
    hop_0, hop_1, hop_2,
    TAPS_0: tl.constexpr, TAPS_1: tl.constexpr, TAPS_2: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, W_UNIT: tl.constexpr,
    O_BLOCK: tl.constexpr, I_BLOCK: tl.constexpr,
    Y_BLOCK: tl.constexpr,  # channels of y between blocks
    FLAT: tl.constexpr,  # one axis, read at the position that is written
    DEEP: tl.constexpr,  # three axes
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    TILE_O: tl.constexpr, TILE_I: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    """``dw[b, t, o, i] = sum_p dy[b, o, p] x[b, i, p * step + start + t * hop]``.

    The gradient of every sample's kernel, written where its assembled kernel would lie, so that
    one matrix product with the cells and one with the coefficients finish the backward pass. A
    program makes ``TILE_O`` by ``TILE_I`` values of one tap and sums over all positions: nothing is
    added across programs, and the result does not depend on their order.

    Bytes: ``dw`` once; ``dy`` ``TAPS * I / TILE_I`` times and ``x`` ``TAPS * O / TILE_O`` times,
    from the caches but for the first.
    Late: 604 MB written, 0.14 ms; 0.5 GB read through L2, 0.09 ms, overlapping.
    Early: 0.024 ms for memory; nine taps read both tensors through the caches, 0.9 GB, 0.17 ms.
    """
    x_b, x_0, x_1, x_2 = x_b * X_UNIT, x_0 * X_UNIT, x_1 * X_UNIT, x_2 * X_UNIT
    y_b, y_0, y_1, y_2 = y_b * Y_UNIT, y_0 * Y_UNIT, y_1 * Y_UNIT, y_2 * Y_UNIT
    w_b, w_tap, w_o_block = w_b * W_UNIT, w_tap * W_UNIT, w_o_block * W_UNIT
    w_o, w_i_block = w_o * W_UNIT, w_i_block * W_UNIT
    out_channels, in_channels = o_blocks * O_BLOCK, i_blocks * I_BLOCK
    o_tiles = tl.cdiv(out_channels, TILE_O)
    i_tiles = tl.cdiv(in_channels, TILE_I)
    TAPS: tl.constexpr = TAPS_0 * TAPS_1 * TAPS_2
    pid = tl.program_id(0)
    i = (pid % i_tiles) * TILE_I + tl.arange(0, TILE_I)
    o = (pid // i_tiles % o_tiles) * TILE_O + tl.arange(0, TILE_O)
    tap = pid // (i_tiles * o_tiles) % TAPS
    b = (pid // (i_tiles * o_tiles * TAPS)).to(tl.int64)
    x += b * x_b
    dy += b * y_b
    dw += b * w_b + tap * w_tap
    from_0 = start_0 + tap // (TAPS_1 * TAPS_2) * hop_0
    from_1 = start_1 + tap // TAPS_2 % TAPS_1 * hop_1
    from_2 = start_2 + tap % TAPS_2 * hop_2
    y_columns = (o // O_BLOCK * Y_BLOCK + o % O_BLOCK) * y_c  # [O]
    x_columns = i * x_c  # [I]

    # Positions advance by a tile, digit by digit: divisions would take longer than the products.
    plane = count_1 * count_2
    positions = count_0 * plane
    p = tl.arange(0, TILE_P)
    at_0, at_1, at_2 = p // plane, p // count_2 % count_1, p % count_2
    by_0, by_1, by_2 = TILE_P // plane, TILE_P // count_2 % count_1, TILE_P % count_2
    total = tl.zeros((TILE_O, TILE_I), dtype=tl.float32)
    for i_p in range(tl.cdiv(positions, TILE_P)):
        if FLAT:  # seen to be consecutive, which carried positions are not
            at_2 = i_p * TILE_P + tl.arange(0, TILE_P)
        y_rows = at_2 * y_2 if FLAT else at_0 * y_0 + at_1 * y_1 + at_2 * y_2  # [P]
        q_0, q_1, q_2 = at_0 * step_0 + from_0, at_1 * step_1 + from_1, at_2 * step_2 + from_2
        if FLAT:
            here = at_2 < positions
        else:
            here = _within(q_1, size_1) & _within(q_2, size_2) & (at_0 < count_0)
        if DEEP:
            here = here & _within(q_0, size_0)
        x_rows = at_2 * x_2 if FLAT else q_0 * x_0 + q_1 * x_1 + q_2 * x_2  # [P]
        # A gradient counts only where the tap meets the input: the same positions as x.
        y_tile = tl.load(
            dy + y_rows[:, None] + y_columns[None, :],
            mask=here[:, None] & (o < out_channels)[None, :],
            other=0.0,
        )
        x_tile = tl.load(
            x + x_rows[:, None] + x_columns[None, :],
            mask=here[:, None] & (i < in_channels)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(y_tile.to(DOT)), x_tile.to(DOT), total, input_precision=PRECISION)
        if not FLAT:
            at_2 += by_2
            carry = (at_2 >= count_2).to(tl.int32)
            at_2 -= carry * count_2
            at_1 += by_1 + carry
            carry = (at_1 >= count_1).to(tl.int32)
            at_1 -= carry * count_1
            at_0 += by_0 + carry

    w_rows = o // O_BLOCK * w_o_block + o % O_BLOCK * w_o  # [O]
    w_columns = i // I_BLOCK * w_i_block + i % I_BLOCK  # [I]
    tl.store(
        dw + w_rows[:, None] + w_columns[None, :],
        total.to(dw.dtype.element_ty),
        mask=(o < out_channels)[:, None] & (i < in_channels)[None, :],
    )


# Of inputs whose positions are neighbours in memory. They are read in whole vectors, for which the
# compiler has to know that sizes are multiples of 16, as those that are launched are.
convolve_flat = triton.jit(convolve.fn)
kernel_gradient_flat = triton.jit(kernel_gradient.fn)
