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

// A step of a transposition: `high` of the lane without the bit for `low` of the lane with it.
template <int kBit>
__device__ __forceinline__ void exchange(uint32_t& low, uint32_t& high, int lane) {
  const bool upper = lane & kBit;
  const uint32_t other = __shfl_xor_sync(~0u, upper ? low : high, kBit);
  (upper ? low : high) = other;
}

// Of four lanes, each with four words: the words of one number to each.
__device__ __forceinline__ void transpose(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d,
                                          int lane) {
  exchange<1>(a, b, lane);
  exchange<1>(c, d, lane);
  exchange<2>(a, c, lane);
  exchange<2>(b, d, lane);
}

// Row i of the thread's two. Four lanes hold a row, each two neighbours of every eight elements;
// they exchange them so that each stores 16 bytes at once.
template <class T, int kParts, int kPart>
__device__ __forceinline__ void store_row(char* row, const float (&output)[kParts][kPart], int i,
                                          float factor, bool live, int lane) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int j = 0; j < kPart / 4; j += 4) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float* x = &output[part][4 * (j + w) + 2 * i];
        words[w] = pack<T>(x[0] * factor, x[1] * factor);
      }
      transpose(words[0], words[1], words[2], words[3], lane);
      const int column = part * kPart * 2 + (j + lane % 4) * 8;
      if (live) {
        *reinterpret_cast<uint4*>(row + column * 2) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

template <class T, int kHeadDim, int kParts, int kPart>
__device__ __forceinline__ void store_state(const Params& params, const Work& work,
                                            const float (&output)[kParts][kPart],
                                            const RowSums& sums, int lane) {
  const Item& item = work.item;
  const int group = params.group_size.divisor;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = sums.total[i];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    // A sum that is NaN is no empty state: it must reach the output.
    const float factor = total == 0 ? 0 : __fdividef(params.v_scale, total);
    const float lse = total == 0 ? -kInfinity : fmaf(sums.peak[i], params.scale_log2, log2f(total));
    // Partial states lie as outputs whose rows are states.
    const bool is_partial = item.partial_row >= 0;
    const int heads = params.num_qo_heads;
    const auto offset = [&](const Strides& stride, int bytes) {
      const Strides chosen = {is_partial ? heads * bytes : stride.token,
                              is_partial ? bytes : stride.head,
                              is_partial ? (heads - group) * bytes : stride.group};
      return row_offset(params, item, is_partial ? item.partial_row : item.first_token,
                        work.token[i] - item.first_token, work.packed[i], chosen);
    };
    char* row =
        (is_partial ? params.partial_o : params.out) + offset(params.out_stride, kHeadDim * 2);
    float* row_lse = (is_partial ? params.partial_lse : params.lse) + offset(params.lse_stride, 1);
    const bool live = work.token[i] < item.end_token;
    store_row<T>(row, output, i, factor, live, lane);
    if (live && lane % 4 == 0) *row_lse = lse;
  }
}

}  // namespace flashinfer_ops::sm90
