// What a consumer has summed, to the output or to scratch.
#pragma once

#include "cuda/attention_softmax_sm90.h"

namespace flashinfer_ops::sm90 {

// An item, and the thread's two rows of it.
struct Work {
  Item item;
  bool is_pair;
  int token[2], packed[2];
};

// Rows r and r + 8 of the thread's warp to `rows`, where these are not null. Each four lanes hold
// a row, two neighbours of every eight elements; by way of shared memory each lane comes to store
// 16 bytes, and eight lanes 128 of a row.
template <class T, int kParts, int kPart>
__device__ __forceinline__ void store_rows(char* const (&rows)[2],
                                           const float (&output)[kParts][kPart],
                                           const float (&factor)[2], uint32_t order, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    char* to[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const auto row =
          __shfl_sync(~0u, reinterpret_cast<uintptr_t>(rows[i]), lane / 8 * 4 + 16 * t);
      to[t] = reinterpret_cast<char*>(row);
    }
#pragma unroll
    for (int atom = 0; atom < kParts * kPart / 32; ++atom) {
      const float* x = &output[atom / (kPart / 32)][atom % (kPart / 32) * 32 + 2 * i];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float* pair = x + 4 * (4 * m + w);
          words[w] = pack<T>(pair[0] * factor[i], pair[1] * factor[i]);
        }
        store_matrices(order + chunk_offset(lane % 8, 4 * m + lane / 8, kSwizzleBytes), words);
      }
      __syncwarp();
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int row = lane / 8 + 4 * t, chunk = lane % 8;
        const uint4 words = load_shared(order + chunk_offset(row, chunk, kSwizzleBytes));
        if (to[t] != nullptr) {
          *reinterpret_cast<uint4*>(to[t] + atom * 128 + chunk * 16) = words;
        }
      }
      __syncwarp();
    }
  }
}

template <class T, int kHeadDim, int kParts, int kPart>
__device__ __forceinline__ void store_state(const Params& params, const Work& work,
                                            const float (&output)[kParts][kPart],
                                            const RowSums& sums, uint32_t order, int lane) {
  const Item& item = work.item;
  const int group = params.group_size.divisor;
  // Partial states lie as outputs whose rows are states.
  const bool is_partial = item.partial_row >= 0;
  const int first_token = is_partial ? item.partial_row : item.first_token;
  const auto offset = [&](const Strides& stride, int bytes, int i) {
    const int heads = params.num_qo_heads;
    const Strides chosen = {is_partial ? heads * bytes : stride.token,
                            is_partial ? bytes : stride.head,
                            is_partial ? (heads - group) * bytes : stride.group};
    return row_offset(params, item, first_token, work.token[i] - item.first_token, work.packed[i],
                      chosen);
  };
  char* rows[2];
  float factor[2], lse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = sums.total[i];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    // A sum that is NaN is no empty state: it must reach the output.
    const bool empty = total == 0;
    factor[i] = empty ? 0 : params.v_scale * reciprocal_fast(total);
    lse[i] = empty ? -kInfinity : fmaf(sums.peak[i], params.scale_log2, log2_fast(total));
    char* row =
        (is_partial ? params.partial_o : params.out) + offset(params.out_stride, kHeadDim * 2, i);
    rows[i] = work.token[i] < item.end_token ? row : nullptr;
  }
  store_rows<T>(rows, output, factor, order, lane);
  if (lane % 4 != 0) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float* row = (is_partial ? params.partial_lse : params.lse) + offset(params.lse_stride, 1, i);
    if (rows[i] != nullptr) *row = lse[i];
  }
}

}  // namespace flashinfer_ops::sm90
