"""A Triton kernel that mixes kernels on chip and convolves with them there.

The cells are read where they lie; assembled kernels are never written to memory. Legend: B samples,
S of a program, m mixtures, n cells, J cells padded, G mixtures at a time, P positions, N written, K
read channels, T taps.

One tile of the cells, ``[n, TILE_N * TILE_K]``, stays in shared memory while every mixture of it
is made for ``S`` samples: for ``G`` mixtures at a time a small product with their coefficients,
``[G * S, n]``, then a batched product, one sample a matrix, of the input at G taps with the result.

Per value of a kernel (late layer, 16 bit) this moves through shared memory: ``2 J / 16`` bytes of
cells, since 16 rows are what one instruction takes; 4 to bring the mixed tile from the warps that
hold its columns to those that hold its samples; ``256 / TILE_N`` of input, written and read, for 64
positions. With 27 cells and 32 channels 16 bytes, at 29 TB/s in all 132 multiprocessors 0.19 ms for
the 302 M values of 128 samples of 512 -> 512 channels, 3x3 (nine taps count as ten). Through memory
they are 1.2 GB, 0.28 ms. Multiply-adds: 96 a value, 0.14 ms at the rate of ``mma.sync``, the only
instruction that Triton has for a batch. Sums of positions limit the tiles: ``S * 64 * TILE_N``.
"""

# mypy: disable-error-code="no-untyped-def"
# As triton_kernels.py, whose import decides whether there is Triton.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cell_tile(
    cells, columns, exists,
    c_j,
    first: tl.constexpr, count: tl.constexpr, CELLS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Columns of cells ``first`` and the ``count`` from there, ``[count, columns]``; zeros beyond.

    Cells are many where they are large: positions have 64 bit.
    """
    j = first + tl.arange(0, count)
    at = cells + j.to(tl.int64)[:, None] * c_j + columns[None, :]
    return tl.load(at, mask=(j < CELLS)[:, None] & exists[None, :], other=0.0).to(DOT)


@triton.jit
def convolve_on_chip(
    x, alpha, cells, y,
    # Strides of the packed input: blocks and chunks of channels, positions, taps.
    x_block, x_chunk, x_p0, x_p1, x_p2, x_t0, x_t1, x_t2,
    # Of the output: samples, channels, positions.
    y_b, y_c, y_p0, y_p1, y_p2,
    # Of the cells: cells, written and read channels, taps where a cell spans them.
    c_j, c_n, c_k, c_t0, c_t1, c_t2,
    # Of the coefficients: samples, blocks of written and of read channels, taps elsewhere.
    a_b, a_n, a_k, a_t0, a_t1, a_t2,
    batch,
    count_0, count_1, count_2,
    TAPS_0: tl.constexpr, TAPS_1: tl.constexpr, TAPS_2: tl.constexpr,
    INSIDE: tl.constexpr,  # cells span the taps; else taps are mixtures
    N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    K_FAST: tl.constexpr,  # read channels are neighbours in the cells; else written ones
    X_B: tl.constexpr,  # between samples of the input, known so that addresses share registers
    CELLS: tl.constexpr, J: tl.constexpr,
    J_REST: tl.constexpr,  # cells beyond the first J, padded; powers of two, or 0
    DOT: tl.constexpr, PRECISION: tl.constexpr, S: tl.constexpr, G: tl.constexpr,
    TILE_P: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """``y[b, n, p] = sum_{t, k} (sum_j alpha[b, i, j] cells[j, n, k, t]) x[b, k, p + t]``, where
    mixture ``i`` is that of the blocks in which ``n``, ``k`` and ``t`` lie.

    The input is packed: channels in runs of ``TILE_K``, positions and rim around them, so that a
    tap of a tile is read without a comparison, in whole lines. A program makes ``TILE_P`` positions
    of ``TILE_N`` channels of one block for ``S`` samples. Inputs and coefficients have samples for
    whole programs; what comes of those beyond the batch, and of positions beyond the last, which
    repeat that, is not written.
    """
    groups = tl.cdiv(batch, S)
    positions = count_0 * count_1 * count_2
    p_tiles = tl.cdiv(positions, TILE_P)
    N_TILES: tl.constexpr = (N_BLOCK + TILE_N - 1) // TILE_N
    pid = tl.program_id(0)
    # Programs that read the same cells are neighbours, and find them in the L2 cache.
    first_sample = pid % groups * S
    p = pid // groups % p_tiles * TILE_P + tl.arange(0, TILE_P)
    n_tile = pid // (groups * p_tiles) % N_TILES
    n_block = pid // (groups * p_tiles * N_TILES)

    s = tl.arange(0, S)
    x += first_sample.to(tl.int64) * X_B
    y += first_sample.to(tl.int64) * y_b
    p_at = tl.minimum(p, positions - 1)
    p_0, p_1, p_2 = p_at // (count_1 * count_2), p_at // count_2 % count_1, p_at % count_2
    gk = tl.arange(0, G * TILE_K)
    x_rows = (s * X_B)[:, None] + (p_0 * x_p0 + p_1 * x_p1 + p_2 * x_p2)[None, :]  # [S, P]
    x_tile_at = x + x_rows[:, :, None] + (gk % TILE_K)[None, None, :]  # [S, P, G * K]

    # Rows of coefficients: mixtures, then samples, so that a warp's registers hold one sample.
    row = tl.arange(0, G * S)
    a_rows = (first_sample + row % S) * a_b + n_block * a_n
    a_at = alpha + a_rows[:, None] + tl.arange(0, J)[None, :]
    if J_REST > 0:
        a_rest_at = alpha + a_rows[:, None] + J + tl.arange(0, J_REST)[None, :]

    # Columns of the tile of cells, in their order in memory.
    q = tl.arange(0, TILE_N * TILE_K)
    if K_FAST:
        q_n, q_k = n_tile * TILE_N + q // TILE_K, q % TILE_K
    else:
        q_n, q_k = n_tile * TILE_N + q % TILE_N, q // TILE_N
    columns = q_n * c_n + q_k * c_k

    TAPS: tl.constexpr = TAPS_0 * TAPS_1 * TAPS_2
    OUTER: tl.constexpr = TAPS if INSIDE else 1  # taps that have a tile of cells of their own
    INNER: tl.constexpr = 1 if INSIDE else TAPS  # taps that share it
    MIXTURES: tl.constexpr = INNER * K_BLOCKS
    total = tl.zeros((S, TILE_P, TILE_N), dtype=tl.float32)
    for i in range(OUTER * ((K_BLOCK + TILE_K - 1) // TILE_K)):
        chunk = i // OUTER
        tap = i % OUTER
        t_0, t_1, t_2 = tap // (TAPS_1 * TAPS_2), tap // TAPS_2 % TAPS_1, tap % TAPS_2
        tile_at = cells + (chunk * TILE_K * c_k + t_0 * c_t0 + t_1 * c_t1 + t_2 * c_t2)
        exists = q_n < N_BLOCK
        if K_BLOCK % TILE_K != 0:
            exists = exists & (chunk * TILE_K + q_k < K_BLOCK)
        c = _cell_tile(tile_at, columns, exists, c_j, 0, J, CELLS, DOT)
        if J_REST > 0:
            c_rest = _cell_tile(tile_at, columns, exists, c_j, J, J_REST, CELLS, DOT)
        x_at = chunk * x_chunk + t_0 * x_t0 + t_1 * x_t1 + t_2 * x_t2

        for u in range((MIXTURES + G - 1) // G):
            # Mixtures of this step: a block of read channels and, unless a cell spans them, a tap.
            mixture = u * G + row // S
            if INSIDE:
                a_mixture = mixture * a_k
            else:
                a_mixture = mixture // TAPS * a_k + mixture % TAPS_2 * a_t2
                if TAPS_0 * TAPS_1 > 1:
                    a_mixture += mixture % TAPS // (TAPS_1 * TAPS_2) * a_t0
                    a_mixture += mixture // TAPS_2 % TAPS_1 * a_t1
            known = (mixture < MIXTURES)[:, None]  # the last step may lack one: it adds zero
            a = tl.load(a_at + a_mixture[:, None], mask=known, other=0.0).to(DOT)
            w = tl.dot(a, c, input_precision=PRECISION)  # [G * S, N * K]
            if J_REST > 0:
                a = tl.load(a_rest_at + a_mixture[:, None], mask=known, other=0.0).to(DOT)
                w = tl.dot(a, c_rest, w, input_precision=PRECISION)
            w = w.to(x.dtype.element_ty).to(DOT)
            if K_FAST:
                w = tl.permute(tl.reshape(w, (G, S, TILE_N, TILE_K)), (1, 0, 3, 2))
            else:
                w = tl.permute(tl.reshape(w, (G, S, TILE_K, TILE_N)), (1, 0, 2, 3))
            w = tl.reshape(w, (S, G * TILE_K, TILE_N))

            mixture = tl.minimum(u * G + gk // TILE_K, MIXTURES - 1)
            if INSIDE:
                x_mixture = mixture * x_block
            else:
                x_mixture = mixture // TAPS * x_block + mixture % TAPS_2 * x_t2
                if TAPS_0 * TAPS_1 > 1:
                    x_mixture += mixture % TAPS // (TAPS_1 * TAPS_2) * x_t0
                    x_mixture += mixture // TAPS_2 % TAPS_1 * x_t1
            x_tile = tl.load(x_tile_at + (x_at + x_mixture)[None, None, :]).to(DOT)
            total = tl.dot(x_tile, w, total, input_precision=PRECISION)

    n = n_tile * TILE_N + tl.arange(0, TILE_N)
    y_rows = (s * y_b)[:, None] + (p_0 * y_p0 + p_1 * y_p1 + p_2 * y_p2)[None, :]  # [S, P]
    tl.store(
        y + y_rows[:, :, None] + ((n_block * N_BLOCK + n) * y_c)[None, None, :],
        total.to(y.dtype.element_ty),
        mask=((first_sample + s < batch)[:, None] & (p < positions)[None, :])[:, :, None]
        & (n < N_BLOCK)[None, None, :],
    )
