// A consumer's matrix products, and what they take and give: queries, scores, weights and output,
// in registers as the matrix unit has them.
#pragma once

#include "cuda/attention_blocks_sm90.h"
#include "cuda/attention_softmax_sm90.h"

namespace flashinfer_ops::sm90 {

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

template <class T, int kHeadDim>
class Products {
 protected:
  using S = Shape<kHeadDim>;
  static constexpr int kStepBlocks = S::kStepBlocks;
  using Step = BlockStep<kStepBlocks>;
  // The matrix unit takes up to 128 columns of the output at once here.
  static constexpr int kPartDim = kHeadDim < 128 ? kHeadDim : 128;
  static constexpr int kParts = kHeadDim / kPartDim;

  __device__ __forceinline__ Products(Shared<kHeadDim>& shared, int number, int lane)
      : shared_(shared),
        lane_(lane),
        q_tile_(tile_descriptor(shared_address(shared.q) + number * S::kQueryBytes)),
        k_tiles_(tile_descriptor(shared_address(shared.k), S::kGroupBytes)),
        v_tiles_(tile_descriptor(shared_address(shared.v), S::kGroupBytes, kSwizzleBytes)) {}

  // A thread's part of the 16x16 fragments: of two rows, pairs of elements 8 columns apart.
  __device__ __forceinline__ uint32_t& query(int j, int row) {
    return queries_[j / 2][j % 2 * 2 + row];
  }

  // The matrix unit sees what bulk copies wrote; what threads copied it sees behind a fence.
  __device__ __forceinline__ static void show(const Step& step, const Step& next) {
    if (step.gathered || next.gathered) fence_async_proxy();
  }

  // The scores of a step, masked; the first block's while the second one's are computed.
  template <int kBlocks>
  __device__ __forceinline__ void multiply_keys(const Step& step, const int (&token)[2]) {
    pin_scores();
    wgmma_fence();
    start_scores<kBlocks>(step);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (b == kBlocks - 1) {
        wgmma_wait<0>();
        pin_scores();
      } else {
        wgmma_wait<kBlocks - 1>();
        pin(scores_[b]);
      }
      mask(step, b, token);
    }
  }
  template <int kBlocks>
  __device__ __forceinline__ void multiply_values(const Step& step) {
    pin_output();
    wgmma_fence();
    start_values<kBlocks>(step);
    wgmma_wait<0>();
    pin_output();
  }

  template <int kBlocks>
  __device__ __forceinline__ void start_scores(const Step& step) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint64_t tile = at(k_tiles_, step.stage[b] * S::kTileBytes);
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        const int atom = k / 4, bytes = k % 4 * 32;
        const uint64_t keys = at(tile, atom * kSwizzleBytes + bytes);
        if (atom < S::kQueryAtoms) {
          wgmma_scores<T>(scores_[b], queries_[k], keys, k != 0);
        } else {
          const int others = (atom - S::kQueryAtoms) * S::kAtomBytes + bytes;
          wgmma_scores<T>(scores_[b], at(q_tile_, others), keys, k != 0);
        }
      }
      wgmma_commit();
    }
  }

  template <int kBlocks>
  __device__ __forceinline__ void start_values(const Step& step) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint64_t tile = at(v_tiles_, step.stage[b] * S::kTileBytes);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int k = 0; k < kColumns / 16; ++k) {
          const int bytes = part * (kPartDim / 64) * kSwizzleBytes + k * 2 * S::kGroupBytes;
          wgmma_values<T>(output_[part], weights_[b][k], at(tile, bytes), 1);
        }
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void pin_scores() {
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) pin(scores_[b]);
  }
  __device__ __forceinline__ void pin_output() {
#pragma unroll
    for (int part = 0; part < kParts; ++part) pin(output_[part]);
  }

  // Of the step's block b.
  __device__ __forceinline__ void mask(const Step& step, int b, const int (&token)[2]) {
    if (step.masked[b]) {
      mask_block(scores_[b], shared_.entries[step.stage[b]].seen_by, token, lane_);
    }
  }

  Shared<kHeadDim>& shared_;
  const int lane_;
  uint32_t queries_[S::kQueryAtoms > 0 ? 4 * S::kQueryAtoms : 1][4];
  uint32_t weights_[kStepBlocks][kColumns / 16][4];
  float scores_[kStepBlocks][kColumns / 2];
  float output_[kParts][kPartDim / 2];

 private:
  // Descriptors count in units of 16 bytes.
  __device__ __forceinline__ static uint64_t at(uint64_t tiles, int bytes) {
    const uint32_t low = static_cast<uint32_t>(tiles) + (bytes >> 4);
    return (tiles & 0xFFFFFFFF00000000) | low;
  }

  const uint64_t q_tile_, k_tiles_, v_tiles_;  // descriptors
};

}  // namespace flashinfer_ops::sm90
