// What both directions share: the layer's shapes, threads, scratch memory, tables of positions.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <vector>

#include "tiles.h"

// The OpenMP runtime that the process has already loaded, whatever its name: linking one here might
// bring in a second, whose threads would compete with the first's.
extern "C" {
void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
}

namespace kw {

// The layer, as integers in the order in which native.py writes them. Sizes have three axes, the
// first ones 1 where there are fewer.
struct Layer {
  Index batch, cells, cell_out, cell_in, space, out_blocks, in_blocks, taps;
  Index in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];

  Index mixtures() const { return space * out_blocks * in_blocks; }
  Index cell_taps() const { return taps / space; }  // 1, or all of them where cells are whole
  Index cell() const { return cell_out * cell_in * cell_taps(); }
  Index inputs() const { return in[0] * in[1] * in[2]; }
  Index outputs() const { return out[0] * out[1] * out[2]; }
  Index in_channels() const { return in_blocks * cell_in; }
  Index out_channels() const { return out_blocks * cell_out; }
  Index mixture(Index tap, Index go, Index gi) const {
    return ((space > 1 ? tap : 0) * out_blocks + go) * in_blocks + gi;
  }
};

// Memory that a thread keeps between calls: faults on fresh pages cost more than the arithmetic.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* get(Index floats) {
    if (floats > size_) {
      std::free(data_);
      size_ = 0;
      const Index wanted = (floats + floats / 8 + 1023) / 1024 * 1024;
      data_ = static_cast<float*>(std::aligned_alloc(4096, wanted * sizeof(float)));
      if (!data_) throw std::bad_alloc();
      size_ = wanted;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  Index size_ = 0;
};

// f(task) for every task, on as many threads; who does which decides nothing but the time. An
// exception may not leave a thread of OpenMP: the first is kept, and thrown when all have ended.
template <class F>
void parallel(Index tasks, Index threads, F f) {
  struct Shared {
    F& f;
    Index tasks;
    std::atomic<Index> next;
    std::atomic<bool> failed;
    std::exception_ptr error;
  } shared{f, tasks, {0}, {false}, nullptr};
  auto run = [](void* argument) {
    auto& s = *static_cast<Shared*>(argument);
    try {
      for (Index t; !s.failed && (t = s.next.fetch_add(1)) < s.tasks;) s.f(t);
    } catch (...) {
      if (!s.failed.exchange(true)) s.error = std::current_exception();
    }
  };
  const Index count = std::min(tasks, threads);
  if (count < 2 || !GOMP_parallel)
    run(&shared);
  else
    GOMP_parallel(run, &shared, static_cast<unsigned>(count), 0);
  if (shared.error) std::rethrow_exception(shared.error);
}

// Results of equal geometry: they use the same taps. A phase is a residue of the position modulo
// the stride where gradients go back to the input, and everything in the forward direction.
struct Phase {
  std::vector<int> rows;  // positions in the result
  std::vector<int> taps;
  std::vector<int> from;  // [taps, rows] position in the source, or -1 outside of it
};

inline void axis_tables(const Layer& l, bool backward, int axis, Index residue,
                        std::vector<int>& rows, std::vector<int>& taps, std::vector<int>& from) {
  const Index stride = l.stride[axis], pad = l.padding[axis], dilation = l.dilation[axis];
  rows.clear(), taps.clear(), from.clear();
  for (Index q = 0; q < (backward ? l.in : l.out)[axis]; ++q)
    if (!backward || (q + pad) % stride == residue) rows.push_back(static_cast<int>(q));
  for (Index t = 0; t < l.kernel[axis]; ++t) {
    if (backward && (residue - t * dilation) % stride) continue;
    taps.push_back(static_cast<int>(t));
    for (int q : rows) {
      // Exact in the backward direction: the residues agree.
      const Index moved = backward ? q + pad - t * dilation : q * stride - pad + t * dilation;
      const Index p = backward ? (moved < 0 ? -1 : moved / stride) : moved;
      from.push_back(p >= 0 && p < (backward ? l.out : l.in)[axis] ? static_cast<int>(p) : -1);
    }
  }
}

inline void make_phases(const Layer& l, bool backward, std::vector<Phase>& phases) {
  std::vector<int> rows[3], taps[3], from[3];
  const Index *source = backward ? l.out : l.in, *result = backward ? l.in : l.out;
  const Index residues[3] = {backward ? l.stride[0] : 1, backward ? l.stride[1] : 1,
                             backward ? l.stride[2] : 1};
  phases.resize(residues[0] * residues[1] * residues[2]);
  for (size_t which = 0; which < phases.size(); ++which) {
    Phase& phase = phases[which];
    const Index at[3] = {Index(which) / residues[2] / residues[1],
                         Index(which) / residues[2] % residues[1], Index(which) % residues[2]};
    for (int a = 0; a < 3; ++a) axis_tables(l, backward, a, at[a], rows[a], taps[a], from[a]);
    phase.rows.clear(), phase.taps.clear(), phase.from.clear();
    for (int z : rows[0])
      for (int y : rows[1])
        for (int x : rows[2])
          phase.rows.push_back(static_cast<int>((z * result[1] + y) * result[2] + x));
    for (size_t u = 0; u < taps[0].size(); ++u)
      for (size_t v = 0; v < taps[1].size(); ++v)
        for (size_t w = 0; w < taps[2].size(); ++w) {
          phase.taps.push_back(static_cast<int>(
              (taps[0][u] * l.kernel[1] + taps[1][v]) * l.kernel[2] + taps[2][w]));
          for (size_t z = 0; z < rows[0].size(); ++z)
            for (size_t y = 0; y < rows[1].size(); ++y) {
              const int plane = from[0][u * rows[0].size() + z];
              const int line = from[1][v * rows[1].size() + y];
              const int* step = from[2].data() + w * rows[2].size();
              const int start = static_cast<int>((plane * source[1] + line) * source[2]);
              for (size_t x = 0; x < rows[2].size(); ++x)
                phase.from.push_back((plane | line | step[x]) < 0 ? -1 : start + step[x]);
            }
        }
  }
}

// Activations with channels side by side: [batch, positions, blocks * width], blocks of `channels`
// channels zero-padded to `width`.
struct Rows {
  const float* data;
  Index stride;  // floats from one position to the next
  Index sample;  // floats from one sample to the next
};

// Floats from one position to the next: an odd number of cache lines, where an even one, such as a
// power of two, would have positions displace one another in the cache.
inline Index row_stride(Index width) { return width % 32 ? width : width + 16; }

inline Rows as_rows(const float* from, bool channels_last, Index batch, Index positions,
                    Index blocks, Index channels, Index width, float* to, Index threads) {
  const Index all = blocks * channels, stride = row_stride(blocks * width);
  if (channels_last && width == channels) return {from, all, positions * all};
  constexpr Index LINES = 64;
  const Index parts = (positions + LINES - 1) / LINES;
  parallel(batch * parts, threads, [&](Index task) {
    const Index b = task / parts, q = task % parts * LINES, n = std::min(LINES, positions - q);
    float* lines = to + (b * positions + q) * stride;
    if (width != channels) std::memset(lines, 0, n * stride * sizeof(float));
    for (Index g = 0; g < blocks; ++g) {
      const Index first = g * channels;
      if (!channels_last)
        transpose(from + (b * all + first) * positions + q, positions, channels, n,
                  lines + g * width, stride);
      else
        for (Index i = 0; i < n; ++i)
          std::memcpy(lines + i * stride + g * width, from + (b * positions + q + i) * all + first,
                      channels * sizeof(float));
    }
  });
  return {to, stride, positions * stride};
}

// Cells [j, j + count), a tap of theirs, as tiles: to[depth][count][T], lines of depth `hop` floats
// apart. Columns are `width` output channels from `first`, depth is input channels from k;
// `swapped`, the other way round.
inline void pack_cells(const Layer& l, const float* cells, bool swapped, Index tap, Index first,
                       Index width, Index k, Index depth, Index j, Index count, float* to,
                       Index hop) {
  const Index taps = l.cell_taps(), cell = l.cell();
  const Index across = swapped ? taps : l.cell_in * taps;  // from one column to the next
  const Index down = swapped ? l.cell_in * taps : taps;
  const float* from = cells + j * cell + first * across + k * down + tap;
  const Index runs = swapped ? depth : width, run = swapped ? width : depth;
  const Index apart = l.cell_in * taps;
  if (width < T) std::memset(to, 0, ((depth - 1) * hop + count * T) * sizeof(float));
  for (Index i = 0; i < count; ++i, from += cell, to += T) {
    // Short runs, far apart: no hardware prefetcher sees the pattern.
    if (i + 2 < count)
      for (Index r = 0; r < runs; ++r)
        for (Index c = 0; c < run * taps; c += 16)
          __builtin_prefetch(from + 2 * cell + r * apart + c, 0, 2);
    if (down == 1) {
      transpose(from, across, width, depth, to, hop);
    } else if (across == 1) {
      for (Index d = 0; d < depth; ++d)
        std::memcpy(to + d * hop, from + d * down, width * sizeof(float));
    } else {
      for (Index d = 0; d < depth; ++d)
        for (Index w = 0; w < width; ++w) to[d * hop + w] = from[w * across + d * down];
    }
  }
}

// Floats between lines of packed cells: an odd number of vectors, which spreads the lines of a
// transposed block over the sets of the cache.
inline Index packed_hop(Index count) { return count * T + V; }

}  // namespace kw
