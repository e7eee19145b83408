// The forward pass, and the gradient of the input: kernels assembled in cache and used at once.
//
// Both are one computation. Channels of the result are the tile's columns ("wide"), channels of the
// source what is summed over ("deep"): output and input channels in the forward pass, the other way
// round for the gradient of the input.
//
//   for a tile of T wide channels of the cell            parallel, with groups of samples, blocks
//     for a slice of deep channels
//       pack the slice of all cells: [deep][cell][T]
//       kernels of some samples: [sample, block][deep][T] = alpha x packed cells
//       result [sample, block][position][T] += source x kernels
#pragma once
#include <algorithm>

#include "common.h"

namespace kw {

// Bytes that a thread's kernels and packed cells may take. Packed cells are used many times and stay
// in an L2 cache of 1 MB. Kernels are written and read once, and may spill into the L3: packing the
// cells a second time, for samples whose kernels did not fit, costs far more.
constexpr Index KERNEL_BYTES = 1280 << 10, PACK_BYTES = 512 << 10, RESULT_BYTES = 512 << 10;

struct Mix {
  const Layer& l;
  const float *alpha, *cells;
  Rows source;
  float* result;
  bool backward, result_last;
  const std::vector<Phase>& phases;

  Index wide() const { return backward ? l.cell_in : l.cell_out; }
  Index deep() const { return backward ? l.cell_out : l.cell_in; }
  Index wide_blocks() const { return backward ? l.in_blocks : l.out_blocks; }
  Index deep_blocks() const { return backward ? l.out_blocks : l.in_blocks; }
  Index positions() const { return backward ? l.inputs() : l.outputs(); }
  Index mixture(Index tap, Index w, Index d) const {
    return backward ? l.mixture(tap, d, w) : l.mixture(tap, w, d);
  }
  Index wide_tiles() const { return (wide() + T - 1) / T; }
};

// How the work is cut. Only the depth of a slice decides in which order products are summed, so
// only it must not depend on the number of threads.
struct Cut {
  Index depth, samples, wide_groups, sample_groups;
};

inline Index slice_depth(const Mix& m, Index batch) {
  // Bytes of a sample's kernels for one deep channel.
  const Index line = m.l.mixtures() * m.l.cell_taps() * T * Index(sizeof(float));
  for (Index samples = std::min<Index>(batch, 8);; samples = samples / 2) {
    Index depth = std::max<Index>(KERNEL_BYTES / (samples * line) / 16 * 16, 16);
    depth = std::min(depth, m.deep());
    const Index results =
        samples * m.wide_blocks() * m.positions() * T * Index(sizeof(float));
    if (depth == m.deep() || results <= RESULT_BYTES || samples == 1) return depth;
  }
}

inline Cut cut(const Mix& m, Index batch, Index threads) {
  Cut c{slice_depth(m, batch), 1, 1, 1};
  const double mixtures = m.l.mixtures(), n = m.l.cells;
  double best = 0;
  for (Index wide = 1; wide <= m.wide_blocks(); ++wide) {
    if (m.wide_blocks() % wide) continue;
    for (Index groups = 1; groups <= batch; ++groups) {
      const Index each = (batch + groups - 1) / groups;
      if ((batch + each - 1) / each != groups) continue;
      const Index tasks = m.wide_tiles() * wide * groups;
      const double kernels = mixtures * each / wide;
      const double taps = double(m.l.taps) / m.l.space / double(m.phases.size());
      // Packing a value costs about as much as a dozen multiply-adds on it.
      const double task = n * 12 + kernels * (n + taps * m.positions());
      const double time = task * ((tasks + threads - 1) / threads);
      if (!best || time < best * 0.97) best = time, c.wide_groups = wide, c.sample_groups = groups;
    }
  }
  const Index each = (batch + c.sample_groups - 1) / c.sample_groups;
  const Index line = m.l.mixtures() / c.wide_groups * T * Index(sizeof(float)) * c.depth *
                     m.l.cell_taps();
  c.samples = std::clamp<Index>(KERNEL_BYTES / line, 1, each);
  const Index blocks = (each + c.samples - 1) / c.samples;
  c.samples = (each + blocks - 1) / blocks;
  return c;
}

struct Workspace {
  Scratch pack, kernels, sums, zeros;
  std::vector<const float*> left, right;
  std::vector<float*> to;
};

inline Workspace& workspace() {
  static thread_local Workspace own;
  return own;
}

struct Task {
  Index first, width;              // wide channels within the cell
  Index block, blocks;             // wide blocks
  Index sample, samples;           // samples
};

inline Index kernel_stride(const Mix& m, Index depth) {
  return m.l.cell_taps() * depth * T + T;  // the odd line keeps rows out of one another's cache set
}

// Kernels of the samples for deep channels [k, k + depth): rows [sample, mixture of the blocks].
inline void assemble(const Mix& m, const Task& t, Index k, Index depth, float* kernels) {
  const Layer& l = m.l;
  Workspace& w = workspace();
  const Index n = l.cells, deep_blocks = m.deep_blocks();
  const Index per_sample = l.space * t.blocks * deep_blocks, rows = t.samples * per_sample;
  const Index stride = kernel_stride(m, depth);
  const Index line = T * Index(sizeof(float));
  // Deep channels lie side by side in the forward direction: two cache lines of them at a time.
  const Index least = m.backward ? 16 : 32;
  Index step = std::min<Index>(n, std::max<Index>(PACK_BYTES / line / least, 16));
  step = (n + (n + step - 1) / step - 1) / ((n + step - 1) / step);
  Index high = std::clamp<Index>(PACK_BYTES / line / step / 16 * 16, 16, 64);
  high = std::min(high, depth);
  float* packed = w.pack.get(high * packed_hop(step));
  w.left.resize(rows), w.to.resize(rows);
  for (Index r = 0; r < rows; ++r) {
    const Index b = r / per_sample, s = r % per_sample / (t.blocks * deep_blocks);
    const Index wide = t.block + r / deep_blocks % t.blocks, deep = r % deep_blocks;
    w.left[r] = m.alpha + ((t.sample + b) * l.mixtures() + m.mixture(s, wide, deep)) * n;
  }
  for (Index tap = 0; tap < l.cell_taps(); ++tap)
    for (Index d = 0; d < depth; d += high)
      for (Index j = 0; j < n; j += step) {
        const Index count = std::min(step, n - j), lines = std::min(high, depth - d);
        const Index hop = packed_hop(count);
        pack_cells(l, m.cells, m.backward, tap, t.first, t.width, k + d, lines, j, count, packed,
                   hop);
        for (Index i = 0; i < lines; ++i) {
          float* to = kernels + (tap * depth + d + i) * T;
          const float* right = packed + i * hop;
          tiles(rows, [&](Index first, Index height) {
            const float* left[MR];
            float* c[MR];
            for (Index r = 0; r < height; ++r) {
              left[r] = w.left[first + r] + j;
              c[r] = to + (first + r) * stride;
              // The next line of the kernels, which lie in the L3 cache.
              for (Index v = 0; v < T; v += 16) __builtin_prefetch(c[r] + T + v, 1);
            }
            gather_of<false>(height)(left, &right, 1, count, c, j > 0);
          });
        }
      }
}

// Where the sums of a block lie: in the result, or, where it has another layout, aside.
struct Sums {
  float* data;
  Index stride;
};

inline void convolve(const Mix& m, Index b, Index block, Index k, Index depth,
                     const float* kernels, Index stride, Index blocks, Sums sums, bool add) {
  Workspace& w = workspace();
  const Layer& l = m.l;
  const float* source = m.source.data + b * m.source.sample + k;
  const Index deep_blocks = m.deep_blocks(), deep = m.deep();
  const float* zeros = w.zeros.get(std::max<Index>(deep, T));  // cleared by the task
  for (const Phase& phase : m.phases) {
    const Index taps = phase.taps.size(), count = phase.rows.size(), segments = taps * deep_blocks;
    w.right.resize(segments), w.left.resize(segments * MR), w.to.resize(MR);
    for (Index s = 0; s < segments; ++s) {
      const Index tap = phase.taps[s / deep_blocks], d = s % deep_blocks;
      const Index row = ((l.space > 1 ? tap : 0) * blocks + block) * deep_blocks + d;
      w.right[s] = kernels + row * stride + (l.space > 1 ? 0 : tap) * depth * T;
    }
    tiles(count, [&](Index first, Index height) {
      const float** left = w.left.data();
      for (Index s = 0; s < taps; ++s) {
        const int* from = phase.from.data() + s * count + first;
        for (Index d = 0; d < deep_blocks; ++d)
          for (Index r = 0; r < height; ++r)
            *left++ = from[r] < 0 ? zeros : source + from[r] * m.source.stride + d * deep;
      }
      for (Index r = 0; r < height; ++r)
        w.to[r] = sums.data + phase.rows[first + r] * sums.stride;
      gather_of<true>(height)(w.left.data(), w.right.data(), segments, depth, w.to.data(), add);
    });
  }
}

inline void run_task(const Mix& m, const Cut& c, const Task& whole) {
  Workspace& w = workspace();
  const Index deep = m.deep(), channels = m.wide_blocks() * m.wide(), positions = m.positions();
  const bool direct = m.result_last && whole.width == T;
  const bool at_once = c.depth >= deep;
  std::memset(w.zeros.get(std::max<Index>(deep, T)), 0, deep * sizeof(float));
  const Index stride = kernel_stride(m, c.depth);
  const Index rows = m.l.space * whole.blocks * m.deep_blocks();
  float* kernels = w.kernels.get(c.samples * rows * stride);
  const Index kept = at_once ? 1 : c.samples * whole.blocks;
  float* aside = direct ? nullptr : w.sums.get(kept * positions * T);
  for (Index s = 0; s < whole.samples; s += c.samples) {
    Task t = whole;
    t.sample += s, t.samples = std::min(c.samples, whole.samples - s);
    for (Index k = 0; k < deep; k += c.depth) {
      const Index depth = std::min(c.depth, deep - k);
      const Index own = kernel_stride(m, depth);
      assemble(m, t, k, depth, kernels);
      for (Index b = 0; b < t.samples; ++b)
        for (Index g = 0; g < t.blocks; ++g) {
          const Index channel = (t.block + g) * m.wide() + t.first;
          float* result = m.result + (t.sample + b) * channels * positions;
          Sums sums{aside + (at_once ? 0 : b * t.blocks + g) * positions * T, T};
          if (direct) sums = {result + channel, channels};
          convolve(m, t.sample + b, g, k, depth, kernels + b * rows * own, own, t.blocks, sums,
                   k > 0);
          if (direct || k + depth < deep) continue;
          if (m.result_last)
            for (Index p = 0; p < positions; ++p)
              std::memcpy(result + p * channels + channel, sums.data + p * T,
                          t.width * sizeof(float));
          else
            transpose(sums.data, T, positions, t.width, result + channel * positions, positions);
        }
    }
  }
}

inline void mix(const Mix& m, Index batch, Index threads) {
  const Cut c = cut(m, batch, threads);
  const Index each = (batch + c.sample_groups - 1) / c.sample_groups;
  const Index blocks = m.wide_blocks() / c.wide_groups, tiles = m.wide_tiles();
  parallel(tiles * c.wide_groups * c.sample_groups, threads, [&](Index task) {
    const Index tile = task % tiles, rest = task / tiles;
    const Index first = tile * T, sample = rest / c.wide_groups * each;
    run_task(m, c,
             {first, std::min<Index>(T, m.wide() - first), rest % c.wide_groups * blocks, blocks,
              sample, std::min(each, batch - sample)});
  });
}

}  // namespace kw
