// A consumer's scores to weights, in registers.
//
// Of its warp's 16 rows a thread holds rows r and r + 8, and of each 8 columns two neighbours:
// x[4 j + 2 i + c] is row r + 8 i, column 8 j + 2 (lane % 4) + c.
#pragma once

#include "cuda/attention_sm90.h"

namespace flashinfer_ops::sm90 {

constexpr float kInfinity = __builtin_huge_valf();

// Of the thread's two rows: the highest score so far, and the thread's share of the sum of weights
// relative to it.
struct RowSums {
  float peak[2] = {-kInfinity, -kInfinity};
  float total[2] = {};
};

// -inf where a row does not see a column.
__device__ __forceinline__ void mask_block(float (&scores)[kColumns / 2], const int2* seen_by,
                                           const int (&token)[2], int lane) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const int4 pair = *reinterpret_cast<const int4*>(seen_by + 8 * j + 2 * (lane % 4));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* x = &scores[4 * j + 2 * i];
      if (token[i] < pair.x || token[i] >= pair.y) x[0] = -kInfinity;
      if (token[i] < pair.z || token[i] >= pair.w) x[1] = -kInfinity;
    }
  }
}

// The scores of kMost blocks, or of the first one only where not `full`, to weights
// 2^(score scale - m), in place; what was summed before must become relative to the new maximum, by
// the factors that are returned.
template <int kMost>
__device__ __forceinline__ float2 exponentiate(float (&scores)[kMost][kColumns / 2], RowSums& sums,
                                               float scale, bool full) {
  static_assert(kMost <= 2);
  const auto each_block = [&](auto f) {
    f(scores[0]);
    if (kMost > 1 && full) f(scores[kMost - 1]);
  };
  float rescale[2], base[2];
  // Several maxima and sums at a time: one operation need not wait for the last.
  float peaks[2][2] = {{sums.peak[0], sums.peak[0]}, {sums.peak[1], sums.peak[1]}};
  each_block([&](float (&block)[kColumns / 2]) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* x = &block[4 * j + 2 * i];
        peaks[i][j % 2] = fmaxf(peaks[i][j % 2], fmaxf(x[0], x[1]));
      }
    }
  });
#pragma unroll
  for (int i = 0; i < 2; ++i) peaks[i][0] = fmaxf(peaks[i][0], peaks[i][1]);
#pragma unroll
  for (int delta = 1; delta <= 2; delta *= 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      peaks[i][0] = fmaxf(peaks[i][0], __shfl_xor_sync(~0u, peaks[i][0], delta));
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    // A row that has seen nothing yet has weights 2^(-inf - 0) = 0. The products are rounded before
    // they are subtracted: an unchanged maximum gives exactly 1.
    base[i] = peaks[i][0] == -kInfinity ? 0 : __fmul_rn(peaks[i][0], scale);
    rescale[i] = exp2_fast(__fsub_rn(__fmul_rn(sums.peak[i], scale), base[i]));
    sums.peak[i] = peaks[i][0];
  }
  float totals[2][2] = {};
  each_block([&](float (&block)[kColumns / 2]) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* x = &block[4 * j + 2 * i];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          x[c] = exp2_fast(fmaf(x[c], scale, -base[i]));
          totals[i][c] += x[c];
        }
      }
    }
  });
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sums.total[i] = fmaf(sums.total[i], rescale[i], totals[i][0] + totals[i][1]);
  }
  return make_float2(rescale[0], rescale[1]);
}

// Weights, packed as the matrix unit takes them.
template <class T, int kMost>
__device__ __forceinline__ void pack_weights(const float (&scores)[kMost][kColumns / 2],
                                             uint32_t (&weights)[kMost][kColumns / 16][4]) {
#pragma unroll
  for (int b = 0; b < kMost; ++b) {
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x = &scores[b][8 * k + 2 * i];
        weights[b][k][i] = pack<T>(x[0], x[1]);
      }
    }
  }
}

// What was summed, relative to a new maximum.
template <int kParts, int kPart>
__device__ __forceinline__ void rescale_output(float (&output)[kParts][kPart], float2 rescale) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int j = 0; j < kPart; ++j) output[part][j] *= j / 2 % 2 ? rescale.y : rescale.x;
  }
}

}  // namespace flashinfer_ops::sm90
