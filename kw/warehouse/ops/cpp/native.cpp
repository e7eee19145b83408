// Dynamic convolution in float32 on a CPU; see mix.h and gradients.h. Called through ctypes, with
// tensors that native.py has checked.
#include <mutex>
#include <set>
#include <utility>

#include "common.h"
#include "gradients.h"
#include "mix.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace kw {

// Cells and their gradients are read and written in short runs that lie far apart: with pages of
// 4 KB nearly every run needs another entry of the address tables. And the first touch of each page
// of a new gradient is a call into the kernel, 28,000 of them for 113 MB. Where the system leaves
// huge pages to those who ask (its usual setting), this asks; `filled` for memory that has pages
// already, which Linux 6.1 and later copies into huge ones. That is done once: addresses are
// remembered, and other memory that comes to lie there later is merely slower.
inline void prefer_huge_pages(const void* memory, Index bytes, bool filled) {
#ifdef __linux__
  constexpr uintptr_t page = uintptr_t(2) << 20;
  constexpr int collapse = 25;  // MADV_COLLAPSE, which older headers lack
  const uintptr_t start = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t stop = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  if (start >= stop) return;
  if (filled) {
    static std::mutex mutex;
    static std::set<std::pair<uintptr_t, uintptr_t>> known;
    const std::lock_guard<std::mutex> lock(mutex);
    if (known.size() > 4096) known.clear();
    if (!known.emplace(start, stop).second) return;
  }
  madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE);
  if (filled) madvise(reinterpret_cast<void*>(start), stop - start, collapse);
#else
  (void)memory, (void)bytes, (void)filled;
#endif
}

// Samples whose activations are brought into another order at a time: bounds scratch memory.
inline Index chunk_of(Index sample_floats, Index batch) {
  return std::clamp<Index>((Index(64) << 20) / 4 / std::max<Index>(sample_floats, 1), 1, batch);
}

// f() and 0, or 1 where memory ran out: no exception may leave this library.
template <class F>
int64_t status_of(F f) {
  try {
    f();
  } catch (const std::exception&) {  // std::bad_alloc, or a std::vector's std::length_error
    return 1;
  }
  return 0;
}

}  // namespace kw

#pragma GCC visibility push(default)
extern "C" {

// result = conv(source, assemble(alpha, cells)), or its gradient: source that of the output.
int64_t kw_mix(const int64_t* layer, const float* source, const float* alpha, const float* cells,
               float* result, int64_t backward, int64_t source_last, int64_t result_last,
               int64_t threads) {
  using namespace kw;
  return status_of([&] {
    const Layer& l = *reinterpret_cast<const Layer*>(layer);
    static thread_local std::vector<Phase> phases;
    static thread_local Scratch lines;
    make_phases(l, backward, phases);
    prefer_huge_pages(cells, l.cells * l.cell() * Index(sizeof(float)), true);
    const Index channels = backward ? l.out_channels() : l.in_channels();
    const Index results = backward ? l.in_channels() : l.out_channels();
    const Index from = backward ? l.outputs() : l.inputs();
    const Index to = backward ? l.inputs() : l.outputs();
    const Index padded = row_stride(channels) * from;
    const Index chunk = source_last ? l.batch : chunk_of(padded, l.batch);
    float* buffer = source_last ? nullptr : lines.get(chunk * padded);
    for (Index b = 0; b < l.batch; b += chunk) {
      const Index count = std::min(chunk, l.batch - b);
      const Rows rows = as_rows(source + b * channels * from, source_last, count, from, 1, channels,
                                channels, buffer, threads);
      const Mix m{l, alpha + b * l.mixtures() * l.cells, cells, rows, result + b * results * to,
                  backward != 0, result_last != 0, phases};
      mix(m, count, threads);
    }
  });
}

// Gradients of the coefficients and of the cells; null where not wanted. With `add`, cells_grad
// holds other layers' gradients of the cells, to which this one's are added.
int64_t kw_gradients(const int64_t* layer, const float* x, const float* grad, const float* alpha,
                     const float* cells, float* alpha_grad, float* cells_grad, int64_t add,
                     int64_t x_last, int64_t grad_last, int64_t threads) {
  using namespace kw;
  return status_of([&] {
    const Layer& l = *reinterpret_cast<const Layer*>(layer);
    static thread_local std::vector<Phase> phases;
    static thread_local Scratch x_lines, grad_lines, partial;
    make_phases(l, false, phases);
    const Index width = (l.cell_out + T - 1) / T * T, channels = l.in_channels();
    const Index in = channels * l.inputs(), out = l.out_channels() * l.outputs();
    const Index in_lines = row_stride(channels) * l.inputs(), rows = l.mixtures() * l.cells;
    const Index padded = row_stride(l.out_blocks * width) * l.outputs();
    const Parts parts = parts_of(l);
    const bool copied = !grad_last || width != l.cell_out;
    const Index chunk = chunk_of(std::max({in_lines, padded, parts.count() * rows}), l.batch);
    float* x_to = x_last ? nullptr : x_lines.get(chunk * in_lines);
    float* grad_to = copied ? grad_lines.get(chunk * padded) : nullptr;
    if (cells_grad && !add) {
      const Index size = l.cells * l.cell();
      prefer_huge_pages(cells_grad, size * Index(sizeof(float)), false);
    }
    float* sums = alpha_grad ? partial.get(parts.count() * chunk * rows) : nullptr;
    for (Index b = 0; b < l.batch; b += chunk) {
      const Index count = std::min(chunk, l.batch - b);
      const Gradients g{
          l,
          alpha + b * rows,
          cells,
          as_rows(x + b * in, x_last, count, l.inputs(), 1, channels, channels, x_to, threads),
          as_rows(grad + b * out, grad_last, count, l.outputs(), l.out_blocks, l.cell_out, width,
                  grad_to, threads),
          width,
          sums,
          alpha_grad ? alpha_grad + b * rows : nullptr,
          cells_grad,
          add || b > 0,
          phases[0]};
      gradients(g, parts, count, threads);
    }
  });
}
}
#pragma GCC visibility pop
