// Register tiles: the four loops in which all arithmetic happens.
//
// Legend: V floats of a vector; T = NR * V the width of every tile, channels side by side; M <= MR
// the rows of a tile, all of its M * NR accumulators in registers.
#pragma once
#include <cstdint>
#include <utility>

namespace kw {

typedef int64_t Index;

// MR * NR accumulators, NR vectors of the right factor and a broadcast must fit the registers: 32
// of them with AVX-512 and NEON, 16 with AVX. Seven divides 7, 14, 28 and 56, the sides of
// ImageNet's feature maps; hence 14 rows and not 12.
#if defined(__AVX512F__)
constexpr int V = 16, NR = 2, MR = 14, DOT_ROWS = 4, DOT_COLUMNS = 6;
#elif defined(__AVX__)
constexpr int V = 8, NR = 2, MR = 6, DOT_ROWS = 3, DOT_COLUMNS = 3;
#else
constexpr int V = 4, NR = 4, MR = 6, DOT_ROWS = 4, DOT_COLUMNS = 5;
#endif
constexpr int T = V * NR;

typedef float vec __attribute__((vector_size(4 * V), aligned(4 * V), may_alias));
typedef float loose __attribute__((vector_size(4 * V), aligned(4), may_alias));  // at any address

inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<loose*>(p) = v; }

// c[r] (+)= sum over segments and k of a[segment][r][k] * b[segment][k][0 .. T).
// Rows lie anywhere: unfolding an input is a matter of pointers.
template <int M, bool ahead>
void gather_tile(const float* const* a, const float* const* b, Index segments, Index depth,
                 float* const* c, bool add) {
  vec sum[M][NR];
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < NR; ++i) sum[r][i] = add ? load(c[r] + i * V) : vec{};
  for (Index s = 0; s < segments; ++s, a += M) {
    const float* right = b[s];
    const float* left[M];
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) left[r] = a[r];
    auto step = [&](Index k) {
      vec w[NR];
#pragma GCC unroll 4
      for (int i = 0; i < NR; ++i) w[i] = load(right + i * V);
#pragma GCC unroll 16
      for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < NR; ++i) sum[r][i] += left[r][k] * w[i];
      right += T;
    };
    // No hardware prefetcher follows so many rows: each is asked for a cache line ahead.
    Index k = 0;
    for (; ahead && k + 16 <= depth; k += 16) {
      const bool more = k + 16 < depth;
      const float* const* soon = more || s + 1 == segments ? a : a + M;
      const Index at = more ? k + 16 : 0;
      for (int i = 0; i < 16; ++i) {
        if (i < M) __builtin_prefetch(soon[i] + at);
        step(k + i);
      }
    }
    for (; k < depth; ++k) step(k);
  }
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < NR; ++i) store(c[r] + i * V, sum[r][i]);
}

// c[r][0 .. T) (+)= sum over k of a[k][r] * b[k][0 .. T), where a[k] is left + at_left[k] and b[k]
// right + at_right[k].
template <int M>
void outer_tile(const float* left, const Index* at_left, const float* right, const Index* at_right,
                Index depth, float* c, Index stride, bool add) {
  vec sum[M][NR];
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < NR; ++i) sum[r][i] = add ? load(c + r * stride + i * V) : vec{};
  for (Index k = 0; k < depth; ++k) {
    const float* a = left + at_left[k];
    const float* b = right + at_right[k];
    vec w[NR];
#pragma GCC unroll 4
    for (int i = 0; i < NR; ++i) w[i] = load(b + i * V);
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < NR; ++i) sum[r][i] += a[r] * w[i];
  }
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < NR; ++i) store(c + r * stride + i * V, sum[r][i]);
}

// out[i] = sum of the lanes of v[i], for as many vectors as one has lanes.
inline void totals(const vec* v, float* out) {
#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 12)
// Pairs of vectors fold into one, halves of their groups of lanes added; four rounds.
#define KW_PICK(...) __builtin_shufflevector(a, b, __VA_ARGS__)
  vec w[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const vec a = v[2 * i], b = v[2 * i + 1];
    w[i] = KW_PICK(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           KW_PICK(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    const vec a = w[2 * i], b = w[2 * i + 1];
    w[i] = KW_PICK(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           KW_PICK(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    const vec a = w[2 * i], b = w[2 * i + 1];
    w[i] = KW_PICK(0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           KW_PICK(2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  }
  const vec a = w[0], b = w[1];
  store(out, KW_PICK(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
                 KW_PICK(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
#undef KW_PICK
#else
  for (int i = 0; i < V; ++i) {
    float lanes[V];
    store(lanes, v[i]);
    for (int width = V / 2; width; width /= 2)
      for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    out[i] = lanes[0];
  }
#endif
}

// c[r][j] += <a[r], b[j]> over blocks of T values: a's blocks lie side by side, b's `hop` apart.
template <int M, int N>
void dot_tile(const float* a, Index a_stride, const float* b, Index blocks, Index hop, float* c,
              Index c_stride) {
  constexpr int COUNT = (M * N + V - 1) / V * V;
  vec sum[M * N] = {};
  for (Index k = 0; k < blocks; ++k, a += T, b += hop)
#pragma GCC unroll 4
    for (int i = 0; i < T; i += V) {
      vec row[M];
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) row[r] = load(a + r * a_stride + i);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        const vec column = load(b + j * T + i);
#pragma GCC unroll 8
        for (int r = 0; r < M; ++r) sum[r * N + j] += row[r] * column;
      }
    }
  vec all[COUNT] = {};
  float out[COUNT];
#pragma GCC unroll 32
  for (int i = 0; i < M * N; ++i) all[i] = sum[i];
  for (int i = 0; i < COUNT; i += V) totals(all + i, out + i);
  for (int r = 0; r < M; ++r)
    for (int j = 0; j < N; ++j) c[r * c_stride + j] += out[r * N + j];
}

typedef decltype(&dot_tile<1, 1>) Dot;

template <int... MN>
Dot dot_of(Index rows, Index columns, std::integer_sequence<int, MN...>) {
  static constexpr Dot table[] = {dot_tile<MN / DOT_COLUMNS + 1, MN % DOT_COLUMNS + 1>...};
  return table[(rows - 1) * DOT_COLUMNS + columns - 1];
}
inline Dot dot_of(Index rows, Index columns) {
  return dot_of(rows, columns, std::make_integer_sequence<int, DOT_ROWS * DOT_COLUMNS>());
}

typedef decltype(&gather_tile<1, true>) Gather;
typedef decltype(&outer_tile<1>) Outer;

template <bool ahead, int... M>
Gather gather_of(Index rows, std::integer_sequence<int, M...>) {
  static constexpr Gather table[] = {gather_tile<M + 1, ahead>...};
  return table[rows - 1];
}
template <bool ahead>
inline Gather gather_of(Index rows) {
  return gather_of<ahead>(rows, std::make_integer_sequence<int, MR>());
}

template <int... M>
Outer outer_of(Index rows, std::integer_sequence<int, M...>) {
  static constexpr Outer table[] = {outer_tile<M + 1>...};
  return table[rows - 1];
}
inline Outer outer_of(Index rows) { return outer_of(rows, std::make_integer_sequence<int, MR>()); }

// Rows [0, n) in as few tiles as will hold them, of nearly equal height: f(first row, rows).
template <int HIGHEST = MR, class F>
void tiles(Index n, F f) {
  const Index count = (n + HIGHEST - 1) / HIGHEST;
  for (Index t = 0; t < count; ++t) {
    const Index first = n * t / count, end = n * (t + 1) / count;
    f(first, end - first);
  }
}

// to[q][c] = from[c][q] for c < rows, q < columns.
inline void transpose(const float* from, Index from_stride, Index rows, Index columns, float* to,
                      Index to_stride) {
  constexpr Index B = 16;
  Index c = 0;
#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 12)
  for (; c + B <= rows; c += B) {
    Index q = 0;
    for (; q + B <= columns; q += B) {
      vec v[B], w[B];
#pragma GCC unroll 16
      for (int i = 0; i < B; ++i) v[i] = load(from + (c + i) * from_stride + q);
      // Four rounds: lanes of 1, 2, 4, 8 floats change places between vectors as far apart.
#define KW_SWAP(from, to, apart, low, high)                                      \
  _Pragma("GCC unroll 16") for (int i = 0; i < B; ++i) if (!(i & (apart))) {     \
    to[i] = __builtin_shufflevector(from[i], from[i + (apart)], KW_LANES low);   \
    to[i + (apart)] = __builtin_shufflevector(from[i], from[i + (apart)], KW_LANES high); \
  }
#define KW_LANES(...) __VA_ARGS__
      KW_SWAP(v, w, 1, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
              (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
      KW_SWAP(w, v, 2, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
              (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
      KW_SWAP(v, w, 4, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
              (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
      KW_SWAP(w, v, 8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
              (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#undef KW_LANES
#undef KW_SWAP
#pragma GCC unroll 16
      for (int i = 0; i < B; ++i) store(to + (q + i) * to_stride + c, v[i]);
    }
    for (; q < columns; ++q)
      for (Index i = c; i < c + B; ++i) to[q * to_stride + i] = from[i * from_stride + q];
  }
#endif
  for (; c < rows; c += B)
    for (Index q = 0; q < columns; ++q)
      for (Index i = c; i < rows && i < c + B; ++i)
        to[q * to_stride + i] = from[i * from_stride + q];
}

}  // namespace kw
