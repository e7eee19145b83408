// Gradients of the coefficients and of the cells, without any sample's kernel gradient in memory.
//
//   for a tile of T output channels and a slice of input channels of the cell       parallel
//     pack the slice of all cells, and as much space for their gradients: [line][cell][T]
//     for some samples
//       kernel gradients [sample, mixture][line][T] = x^T grad
//       alpha_grad[sample, mixture][cell] += <kernel gradient, cell>
//       cells_grad[line][cell][T] += alpha^T kernel gradients
//
// A line is an input channel of the cell or, where cells are whole, one of its taps and channels.
// Parts of the work write sums of their own to alpha_grad, which are added up in order: the result
// does not depend on the threads.
#pragma once
#include <algorithm>

#include "common.h"
#include "mix.h"

namespace kw {

// Positions whose x and grad stay in the L1 cache while all taps and tiles use them.
constexpr Index POSITIONS = 224;
// Rows of kernel gradients that stay in the L2 cache while all cells are multiplied with them.
constexpr int DOT_BLOCK = 24;

// The work: tiles of output channels, and for each of them shares of the input channels.
struct Parts {
  Index tiles, shares, each;  // input channels of a share
  Index count() const { return tiles * shares; }
};

inline Parts parts_of(const Layer& l) {
  const Index tiles = (l.cell_out + T - 1) / T;
  const Index wanted = std::max<Index>((8 + tiles - 1) / tiles, 1);
  const Index each = std::max<Index>(l.cell_in / wanted / 16 * 16, std::min<Index>(16, l.cell_in));
  return {tiles, (l.cell_in + each - 1) / each, each};
}

struct Gradients {
  const Layer& l;
  const float *alpha, *cells;
  Rows x, grad;
  Index width;  // of a block of channels in grad
  float *partial, *alpha_grad, *cells_grad;
  bool add;  // to cells_grad, which holds the sums of earlier samples or other layers
  const Phase& forward;
};

// Pairs of positions that meet under a tap, as offsets into x and grad.
struct Meetings {
  std::vector<Index> x, grad, first;

  void make(const Gradients& g) {
    const Index positions = g.l.outputs();
    x.clear(), grad.clear(), first.assign(1, 0);
    for (Index tap = 0; tap < g.l.taps; ++tap) {
      for (Index p = 0; p < positions; ++p) {
        const int from = g.forward.from[tap * positions + p];
        if (from < 0) continue;
        x.push_back(from * g.x.stride), grad.push_back(p * g.grad.stride);
      }
      first.push_back(Index(x.size()));
    }
  }
};

struct GradientScratch {
  Scratch packed, sums, kernels;
  std::vector<Index> left, right;
};

inline GradientScratch& gradient_scratch() {
  static thread_local GradientScratch own;
  return own;
}

// to[mixture][line][T], for one sample.
inline void kernel_gradient(const Gradients& g, const Meetings& meet, Index sample, Index tile,
                            Index channel, Index depth, Index stride, float* to) {
  const Layer& l = g.l;
  Index most = 1;
  for (Index tap = 0; tap < l.taps; ++tap)
    most = std::max(most, meet.first[tap + 1] - meet.first[tap]);
  for (Index p = 0; p < most; p += POSITIONS)
    for (Index go = 0; go < l.out_blocks; ++go)
      for (Index tap = 0; tap < l.taps; ++tap) {
        const Index start = meet.first[tap] + p;
        const Index count = std::min(POSITIONS, meet.first[tap + 1] - start);
        if (p > 0 && count <= 0) continue;
        const float* right = g.grad.data + sample * g.grad.sample + go * g.width + tile * T;
        for (Index gi = 0; gi < l.in_blocks; ++gi) {
          const float* left = g.x.data + sample * g.x.sample + gi * l.cell_in + channel;
          float* c = to + l.mixture(tap, go, gi) * stride + (l.space > 1 ? 0 : tap) * depth * T;
          tiles(depth, [&](Index first, Index height) {
            outer_of(height)(left + first, meet.x.data() + start, right, meet.grad.data() + start,
                             std::max<Index>(count, 0), c + first * T, T, p > 0);
          });
        }
      }
}

inline void run_part(const Gradients& g, const Meetings& meet, const Parts& parts, Index batch,
                     Index part) {
  const Layer& l = g.l;
  GradientScratch& w = gradient_scratch();
  const Index tile = part % parts.tiles, share = part / parts.tiles;
  const Index width = std::min<Index>(T, l.cell_out - tile * T), n = l.cells, m = l.mixtures();
  const Index end = std::min(l.cell_in, (share + 1) * parts.each), taps = l.cell_taps();
  float* partial = g.partial ? g.partial + part * batch * m * n : nullptr;
  if (partial) std::memset(partial, 0, batch * m * n * sizeof(float));
  const Index line = T * Index(sizeof(float)) * taps;
  const Index samples = std::min<Index>(batch, 8);
  Index depth = std::min(PACK_BYTES / (n * line), KERNEL_BYTES / (samples * m * line));
  depth = std::clamp<Index>(depth / 16 * 16, 16, 64);
  const Index some = std::clamp<Index>(KERNEL_BYTES / (m * line * depth), 1, batch);
  const Index stride = taps * depth * T + T, hop = packed_hop(n);
  float* packed = w.packed.get(taps * depth * packed_hop(n));
  float* sums = w.sums.get(taps * depth * packed_hop(n));
  float* kernels = w.kernels.get(some * m * stride);
  w.left.resize(some * m), w.right.resize(some * m);
  for (Index r = 0; r < some * m; ++r) w.left[r] = r * n, w.right[r] = r * stride;

  for (Index k = share * parts.each; k < end; k += depth) {
    const Index high = std::min(depth, end - k), lines = taps * high;
    for (Index tap = 0; tap < taps; ++tap) {
      const Index at = tap * high * hop;
      if (g.alpha_grad)
        pack_cells(l, g.cells, false, tap, tile * T, width, k, high, 0, n, packed + at,
                   hop);
      if (g.cells_grad && g.add)
        pack_cells(l, g.cells_grad, false, tap, tile * T, width, k, high, 0, n, sums + at,
                   hop);
    }
    for (Index b = 0; b < batch; b += some) {
      const Index count = std::min(some, batch - b), rows = count * m;
      for (Index i = 0; i < count; ++i)
        kernel_gradient(g, meet, b + i, tile, k, high, stride, kernels + i * m * stride);
      if (g.alpha_grad)
        tiles<DOT_BLOCK>(rows, [&](Index block, Index some_rows) {
          tiles<DOT_COLUMNS>(n, [&](Index j, Index columns) {
            tiles<DOT_ROWS>(some_rows, [&](Index r, Index height) {
              dot_of(height, columns)(kernels + (block + r) * stride, stride, packed + j * T, lines,
                                      hop, partial + (b * m + block + r) * n + j, n);
            });
          });
        });
      if (g.cells_grad)
        for (Index i = 0; i < lines; ++i)
          tiles(n, [&](Index j, Index height) {
            outer_of(height)(g.alpha + b * m * n + j, w.left.data(), kernels + i * T,
                             w.right.data(), rows, sums + i * hop + j * T, T, g.add || b > 0);
          });
    }
    if (!g.cells_grad) continue;
    for (Index tap = 0; tap < taps; ++tap)
      for (Index j = 0; j < n; ++j) {
        const float* from = sums + tap * high * hop + j * T;
        float* to = g.cells_grad + j * l.cell() + (tile * T * l.cell_in + k) * taps + tap;
        if (j + 2 < n)
          for (Index c = 0; c < width; ++c)
            for (Index d = 0; d < high * taps; d += 16)
              __builtin_prefetch(to + 2 * l.cell() + c * l.cell_in * taps + d, 1, 2);
        if (taps == 1)
          transpose(from, hop, high, width, to, l.cell_in);
        else
          for (Index d = 0; d < high; ++d)
            for (Index c = 0; c < width; ++c)
              to[(c * l.cell_in + d) * taps] = from[d * hop + c];
      }
  }
}

inline void gradients(const Gradients& g, const Parts& parts, Index batch, Index threads) {
  static thread_local Meetings meetings;
  Meetings& meet = meetings;
  meet.make(g);
  parallel(parts.count(), threads, [&](Index part) { run_part(g, meet, parts, batch, part); });
  if (!g.alpha_grad) return;
  const Index values = batch * g.l.mixtures() * g.l.cells, block = 1024;
  parallel((values + block - 1) / block, threads, [&](Index t) {
    const Index first = t * block, end = std::min(values, first + block);
    for (Index i = first; i < end; ++i) g.alpha_grad[i] = 0;
    for (Index part = 0; part < parts.count(); ++part)
      for (Index i = first; i < end; ++i) g.alpha_grad[i] += g.partial[part * values + i];
  });
}

}  // namespace kw
