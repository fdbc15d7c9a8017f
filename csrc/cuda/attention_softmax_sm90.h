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

// What scores become weights with: a score of the row's highest, times the scale, and the factors
// that make what was summed before relative to it.
struct Rebase {
  float base[2], factor[2];
  // Most steps leave the maxima as they are.
  __device__ __forceinline__ bool changes() const { return !(factor[0] == 1 && factor[1] == 1); }
};

// f of each block of scores, or of the first one only where not `full`.
template <int kMost, class F>
__device__ __forceinline__ void each_block(float (&scores)[kMost][kColumns / 2], bool full, F f) {
  static_assert(kMost <= 2);
  f(scores[0]);
  if (kMost > 1 && full) f(scores[kMost - 1]);
}

template <int kMost>
__device__ __forceinline__ Rebase find_peaks(float (&scores)[kMost][kColumns / 2], RowSums& sums,
                                             float scale, bool full) {
  // Several maxima at a time: one operation need not wait for the last.
  float peaks[2][2] = {{sums.peak[0], sums.peak[0]}, {sums.peak[1], sums.peak[1]}};
  each_block(scores, full, [&](float (&block)[kColumns / 2]) {
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
  Rebase rebase;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    // A row that has seen nothing yet has weights 2^(-inf - 0) = 0. The products are rounded before
    // they are subtracted: an unchanged maximum gives exactly 1.
    rebase.base[i] = peaks[i][0] == -kInfinity ? 0 : __fmul_rn(peaks[i][0], scale);
    rebase.factor[i] = exp2_fast(__fsub_rn(__fmul_rn(sums.peak[i], scale), rebase.base[i]));
    sums.peak[i] = peaks[i][0];
  }
  return rebase;
}

// Scores to weights 2^(score scale - base), packed as the matrix unit takes them.
template <class T, int kMost>
__device__ __forceinline__ void weigh_scores(float (&scores)[kMost][kColumns / 2],
                                             uint32_t (&weights)[kMost][kColumns / 16][4],
                                             RowSums& sums, const Rebase& rebase, float scale,
                                             bool full) {
  float totals[2][2] = {};
  const auto weigh = [&](float (&block)[kColumns / 2], uint32_t (&packed)[kColumns / 16][4]) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* x = &block[4 * j + 2 * i];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          x[c] = exp2_fast(fmaf(x[c], scale, -rebase.base[i]));
          totals[i][c] += x[c];
        }
        packed[j / 2][j % 2 * 2 + i] = pack<T>(x[0], x[1]);
      }
    }
  };
  weigh(scores[0], weights[0]);
  if (kMost > 1 && full) weigh(scores[kMost - 1], weights[kMost - 1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sums.total[i] = fmaf(sums.total[i], rebase.factor[i], totals[i][0] + totals[i][1]);
  }
}

// What was summed, relative to a new maximum.
template <int kParts, int kPart>
__device__ __forceinline__ void rescale_output(float (&output)[kParts][kPart],
                                               const Rebase& rebase) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int j = 0; j < kPart; ++j) output[part][j] *= rebase.factor[j / 2 % 2];
  }
}

}  // namespace flashinfer_ops::sm90
