// The matrix products of the attention kernel. All work on 32-bit units (attention_simd.h): a unit
// is one float, or a pair of bfloat16 neighbours along the dimension that is summed over.
//
//   dense   many packed rows: an outer product of registers. Rows run along the lanes of S^T = K
//   Q^T
//           (so that the softmax needs no sum across lanes), head_dim along those of O = P V. K and
//           V are panels in the thread's own scratch, which L1 and L2 read without set conflicts
//           (in a cache of 8 heads of 128 floats, tokens are 4096 bytes apart: one L1 set).
//   gemv    few packed rows: each K and V row is loaded once, where it lies in its page, for all
//           rows; memory sets the speed.
#pragma once

#include "cpu/attention_simd.h"

namespace flashinfer_ops {
namespace {

constexpr int kLine = 16;  // units of one cache line; K panels are stored by lines of head_dim
#if defined(__AVX512F__)
constexpr int kDenseRows =
    12;  // 12 x 2 accumulators, 2 vectors and a broadcast: 27 of 32 registers
constexpr int kGemvColumns = 4;
#else
constexpr int kDenseRows = 6;  // 15 of 16 registers
constexpr int kGemvColumns = 2;
#endif
constexpr int kDenseColumns = 2;
constexpr int kPanel = kDenseColumns * kLanes;  // units of a row of a V panel
constexpr int kGemvRows = 4;

// --- dense ---------------------------------------------------------------------------------------

// s[t][c] = scale * sum_d k[t][d] q[d][c] for R tokens and C vectors of packed rows.
//   k  line l of token t at k + l * line_stride + t * kLine
//   q  [depth][q_stride]
template <typename Units, int R, int C>
void dense_qk(const float* k, int64_t line_stride, const float* q, int64_t q_stride, int64_t depth,
              Vec scale, float* s, int64_t s_stride) {
  Vec acc[R][C] = {};
  for (int64_t begin = 0; begin < depth; begin += kLine, k += line_stride) {
    const int count = static_cast<int>(depth - begin < kLine ? depth - begin : kLine);
    for (int d = 0; d < count; ++d, q += q_stride) {
      Vec x[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) x[c] = load(q + c * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec a = splat(k[r * kLine + d]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = Units::multiply_add(acc[r][c], a, x[c]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(s + r * s_stride + c * kLanes, acc[r][c] * scale);
  }
}

// o[r][c] = alpha[r] * o[r][c] + sum_j p[j][r] v[j][c] for R packed rows and C vectors of head_dim.
//   p  [depth][p_stride], v  [depth][kPanel]
template <typename Units, int R, int C>
void dense_pv(const float* p, int64_t p_stride, const float* v, int64_t depth, const float* alpha,
              float* o, int64_t o_stride) {
  Vec acc[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Vec a = splat(alpha[r]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = a * load(o + r * o_stride + c * kLanes);
  }
  for (int64_t j = 0; j < depth; ++j, p += p_stride, v += kPanel) {
    Vec x[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) x[c] = load(v + c * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec a = splat(p[r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = Units::multiply_add(acc[r][c], a, x[c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(o + r * o_stride + c * kLanes, acc[r][c]);
  }
}

using DenseQk = void (*)(const float*, int64_t, const float*, int64_t, int64_t, Vec, float*,
                         int64_t);
using DensePv = void (*)(const float*, int64_t, const float*, int64_t, const float*, float*,
                         int64_t);

// The kernels for 1 .. kDenseRows rows.
template <typename Units, int C, typename Rows = typename MakeIndices<kDenseRows>::type>
struct DenseTable;
template <typename Units, int C, int... I>
struct DenseTable<Units, C, Indices<I...>> {
  static constexpr DenseQk qk[] = {dense_qk<Units, I + 1, C>...};
  static constexpr DensePv pv[] = {dense_pv<Units, I + 1, C>...};
};

// Calls f(begin, count) over [0, n) in pieces of at most kDenseRows that differ by at most one: a
// short last piece would not hide the latency of the multiply-add.
template <typename F>
inline void for_balanced(int64_t n, const F& f) {
  const int64_t pieces = (n + kDenseRows - 1) / kDenseRows;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t begin = n * i / pieces;
    f(begin, n * (i + 1) / pieces - begin);
  }
}

// --- gemv ----------------------------------------------------------------------------------------

// One vector of units read from a cache row: floats converted as needed, or pairs as they are.
template <typename Units, typename T>
inline Vec load_units(const T* p) {
  if constexpr (Units::kPerUnit == 2) {
    return reinterpret_cast<Vec>(load_int(p));
  } else {
    return load(p);
  }
}

// s[r][j] = scale * sum_d q[r][d] k[j][d] for R <= 4 rows and tokens [0, n).
//   k     one pointer a token; up to the next multiple of kLanes they are valid
//   next  rows to prefetch, one a token: one cache line for each that is read, since a burst of
//         prefetches would stop the core until memory has answered
//   depth, in units, is a multiple of kLanes
template <typename Units, typename T, int R>
void gemv_qk(const T* const* k, const T* const* next, int64_t n, const float* q, int64_t q_stride,
             int64_t depth, float scale, float* s, int64_t s_stride) {
  constexpr int kSlots = R == 3 ? 4 : R;
  constexpr int kTokens = kLanes / kSlots;
  for (int64_t j = 0; j < n; j += kTokens) {
    Vec acc[kLanes] = {};
    for (int64_t d = 0; d < depth; d += kLanes) {
      Vec x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = load(q + r * q_stride + d);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const Vec y = load_units<Units>(k[j + t] + d * Units::kPerUnit);
        prefetch(next[j + t] + d * Units::kPerUnit);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          acc[r * kTokens + t] = Units::multiply_add(acc[r * kTokens + t], x[r], y);
        }
      }
    }
    float sums[kLanes];
    store(sums, sum_each(acc) * splat(scale));
    for (int r = 0; r < R; ++r) {
      memcpy(s + r * s_stride + j, sums + r * kTokens, kTokens * sizeof(float));
    }
  }
}

// o[r][c] = alpha[r] * o[r][c] + sum_j p[r][j] v[j][c], C vectors of head_dim, tokens [0, n).
//   p  [R][p_stride] floats
//   v, next  as k and next above; next is not moved by column
template <typename T, int R, int C>
void gemv_pv(const float* p, int64_t p_stride, const T* const* v, const T* const* next,
             int64_t column, int64_t n, const float* alpha, float* o, int64_t o_stride) {
  Vec acc[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = splat(alpha[r]) * load(o + r * o_stride + c * kLanes);
  }
  for (int64_t j = 0; j < n; ++j) {
    Vec x[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      x[c] = load(v[j] + column + c * kLanes);
      prefetch(next[j] + c * kLanes);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec a = splat(p[r * p_stride + j]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = a * x[c] + acc[r][c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(o + r * o_stride + c * kLanes, acc[r][c]);
  }
}

// The same for pairs: p [R][p_stride] bfloat16, C / 2 pieces of 32 columns. The last token of an
// odd n is paired with zeros, not with whatever lies behind it.
template <int R, int C>
void gemv_pv_pairs(const uint16_t* p, int64_t p_stride, const BFloat16* const* v,
                   const BFloat16* const* next, int64_t column, int64_t n, const float* alpha,
                   float* o, int64_t o_stride) {
  Vec acc[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = splat(alpha[r]) * load(o + r * o_stride + c * kLanes);
  }
  for (int64_t j = 0; j < n; j += 2) {
    Vec x[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; c += 2) {
      const Vec a = load_units<PairUnits>(v[j] + column + c * kLanes);
      const Vec b = j + 1 < n ? load_units<PairUnits>(v[j + 1] + column + c * kLanes) : Vec{};
      prefetch(next[j] + c * kLanes);
      prefetch(next[j + 1] + c * kLanes);
      interleave_pairs(a, b, &x[c], &x[c + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      float pair;
      memcpy(&pair, p + r * p_stride + j, sizeof(pair));
      const Vec a = splat(pair);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = PairUnits::multiply_add(acc[r][c], a, x[c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(o + r * o_stride + c * kLanes, acc[r][c]);
  }
}

}  // namespace
}  // namespace flashinfer_ops
