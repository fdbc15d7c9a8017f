// The online softmax of the attention kernel: logits of one KV block, in base 2, become weights,
// and the running maximum m and denominator l of each packed row move on. alpha is what the row's
// older output and denominator are multiplied with. A row that has seen nothing but -inf keeps m =
// -inf, l = 0, and its weights and alpha are 0, never NaN.
#pragma once

#include "cpu/attention_simd.h"

namespace flashinfer_ops {
namespace {

inline Vec finite_or_zero(Vec m) { return m == splat(-kInfinity) ? splat(0.0f) : m; }

// kLanes packed rows, one a lane: s [count][s_stride] logits in, weights out. Pairs of weights go
// to s [(count + 1) / 2][s_stride]: row j / 2 is written after the rows j and j + 1 are read. With
// kMasked, lane i sees the tokens below limits[i]; the others are selected out, whatever they are.
template <typename Units, bool kMasked>
void softmax_lanes(float* s, int64_t s_stride, int64_t count, const int32_t* limits, Vec& m, Vec& l,
                   Vec& alpha) {
  const IntVec limit = kMasked ? load_int(limits) : IntVec{};
  const auto logits = [&](int64_t j) {
    const Vec x = load(s + j * s_stride);
    if constexpr (!kMasked) return x;
    return splat_int(static_cast<int32_t>(j)) < limit ? x : splat(-kInfinity);
  };
  Vec top[4] = {m, m, m, m};
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) top[i] = max(logits(j + i), top[i]);
  }
  for (; j < count; ++j) top[0] = max(logits(j), top[0]);
  const Vec m_new = max(max(top[0], top[1]), max(top[2], top[3]));
  const Vec shift = finite_or_zero(m_new);
  alpha = exp2(m - shift);
  m = m_new;
  Vec sum[2] = {};
  for (j = 0; j + 2 <= count; j += 2) {
    const Vec a = exp2(logits(j) - shift), b = exp2(logits(j + 1) - shift);
    sum[0] += a;
    sum[1] += b;
    if constexpr (Units::kPerUnit == 2) {
      store(s + j / 2 * s_stride, round_to_pairs(a, b));
    } else {
      store(s + j * s_stride, a);
      store(s + (j + 1) * s_stride, b);
    }
  }
  if (j < count) {
    const Vec a = exp2(logits(j) - shift);
    sum[0] += a;
    if constexpr (Units::kPerUnit == 2) {
      store(s + j / 2 * s_stride, round_to_pairs(a, splat(0.0f)));
    } else {
      store(s + j * s_stride, a);
    }
  }
  l = l * alpha + (sum[0] + sum[1]);
}

// One packed row: s [count rounded up to kLanes], tokens from limit on selected out. Weights
// overwrite the logits; pairs go to `pairs` (bfloat16, zero from limit on).
template <typename Units>
void softmax_row(float* s, int64_t count, int64_t limit, uint16_t* pairs, float& m, float& l,
                 float& alpha) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t j = limit; j < padded; ++j) s[j] = -kInfinity;
  Vec top = splat(m);
  for (int64_t j = 0; j < padded; j += kLanes) top = max(load(s + j), top);
  const float m_new = reduce_max(top);
  const float shift = m_new == -kInfinity ? 0.0f : m_new;
  alpha = exp2_scalar(m - shift);
  m = m_new;
  Vec sum = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec p = exp2(load(s + j) - splat(shift));
    sum += p;
    if constexpr (Units::kPerUnit == 2) {
      store(reinterpret_cast<BFloat16*>(pairs) + j, p);
    } else {
      store(s + j, p);
    }
  }
  l = l * alpha + reduce_add(sum);
}

}  // namespace
}  // namespace flashinfer_ops
