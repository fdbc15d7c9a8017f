// The consumers: a warpgroup's 64 packed rows over the blocks of its items.
//
//   s = q k^T scale,  o = sum 2^(s - m) v / sum 2^(s - m),  lse = m + log2(sum 2^(s - m))
//
// with the online softmax of FlashAttention-2 (arXiv:2307.08691). A step takes two blocks where the
// item has as many left: what a step costs besides its products is then spent on 128 columns. While
// one consumer computes weights, the other one has the matrix unit.
// A thread holds rows r and r + 8 of its warp's 16, and of each 8 columns two neighbours.
#pragma once

#include "cuda/attention_sm90.h"

namespace flashinfer_ops::sm90 {

constexpr float kInfinity = __builtin_huge_valf();

template <class T, int kHeadDim>
class Consumer {
 public:
  using S = Shape<kHeadDim>;

  __device__ __forceinline__ Consumer(const Params& params, Shared<kHeadDim>& shared, int number,
                                      int thread)
      : params_(params),
        shared_(shared),
        number_(number),
        warp_(thread / 32),
        lane_(thread % 32),
        q_tile_(tile_descriptor(shared_address(shared.q) + number * S::kTileBytes)),
        k_tiles_(tile_descriptor(shared_address(shared.k))),
        v_tiles_(tile_descriptor(shared_address(shared.v), S::kAtomBytes)) {}

  __device__ __forceinline__ void run() {
    bool more = find_block();
    while (more) {
      const Item item = entry().item;
      // A consumer's rows of a pair item begin after the other's.
      const int first_packed =
          item.first_packed + (flags_ & (flag::kConsumer0 << (number_ ^ 1)) ? number_ * kRows : 0);
      int token[2], packed[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        packed[i] = first_packed + warp_ * 16 + lane_ / 4 + 8 * i;
        token[i] = item.first_token + params_.group_size.divide(packed[i]);
      }
      begin_item(item, packed, token);
      // The consumers of a pair item take turns on the matrix unit: one weighs values and starts
      // the next scores while the other computes weights.
      const bool turns = (flags_ & flag::kBoth) == flag::kBoth;
      if (turns && number_ == 1) pass_turn();
      if (turns) wait_for_turn();
      for (bool last = false; !last;) {
        const Step step = start_scores();
        finish_scores(step);
        if (turns) pass_turn();
        if (kStepBlocks == 1 || step.count == 1) {
          weigh<1>(step, token);
        } else {
          weigh<kStepBlocks>(step, token);
        }
        if (turns) wait_for_turn();
        start_values(step);
        last = step.last;
        if (!last) {
          advance();
          find_block();
        }
        wgmma_wait<0>();
        release_values(step);
      }
      if (turns && number_ == 0) pass_turn();
      // What comes after the item may be long in coming, and only once these stages are free.
      advance();
      more = find_block();
      store(item, packed, token);
    }
  }

 private:
  static constexpr int kStepBlocks = S::kStepBlocks;
  // The matrix unit takes up to 128 columns of the output at once here.
  static constexpr int kPartDim = kHeadDim < 128 ? kHeadDim : 128;
  static constexpr int kParts = kHeadDim / kPartDim;

  // One or two blocks of an item, and where they are.
  struct Step {
    int count;
    bool last;  // of the item
    int stage[kStepBlocks], parity[kStepBlocks], place[kStepBlocks], flags[kStepBlocks];
    bool gathered[kStepBlocks];
  };

  __device__ __forceinline__ const Entry& entry() const { return shared_.entries[place_.index]; }

  __device__ __forceinline__ void advance() {
    place_.advance();
    stage_.advance();
  }

  // Goes on to the next block that is this consumer's; false when there is none.
  __device__ __forceinline__ bool find_block() {
    for (;; advance()) {
      barrier_wait(&shared_.entry_full[place_.index], place_.parity);
      const int4 head = *reinterpret_cast<const int4*>(&entry().flags);
      flags_ = head.x;
      gathered_ = (head.y | head.z) != 0;
      if (flags_ & flag::kStop) return false;
      if (flags_ & (flag::kConsumer0 << number_)) return true;
      release_entry(place_.index);
    }
  }

  // The matrix unit sees what bulk copies wrote; what threads copied it sees behind a fence.
  __device__ __forceinline__ static void wait_for(uint64_t& full, int parity, bool gathered) {
    barrier_wait(&full, parity);
    if (gathered) fence_async_proxy();
  }

  // A stage's arrivals are those of both consumers; one that serves a block alone arrives twice.
  __device__ __forceinline__ void release(const Step& step, uint64_t (&barriers)[S::kStages]) {
    const int arrivals = (step.flags[0] & flag::kBoth) == flag::kBoth ? 1 : 2;
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) {
      if (b < step.count && lane_ == 0) barrier_arrive(&barriers[step.stage[b]], arrivals);
    }
  }
  __device__ __forceinline__ void release_entry(int index) {
    __syncwarp();
    if (lane_ == 0) barrier_arrive(&shared_.entry_empty[index]);
  }
  __device__ __forceinline__ void release_values(const Step& step) {
    pin_output();
    release(step, shared_.v_empty);
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) {
      if (b < step.count) release_entry(step.place[b]);
    }
  }

  __device__ __forceinline__ void begin_item(const Item& item, const int (&packed)[2],
                                             const int (&token)[2]) {
    if constexpr (S::kQueriesInRegisters) {
      // A thread's part of the 16x16 fragments: of two rows, pairs of elements 8 columns apart.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t offset = row_offset(params_, item, token[i], packed[i], params_.q_stride);
        const char* row = params_.q + offset + lane_ % 4 * 4;
        const bool live = token[i] < item.end_token;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
          queries_[j / 2][j % 2 * 2 + i] =
              live ? __ldg(reinterpret_cast<const uint32_t*>(row + j * 16)) : 0;
        }
      }
    } else {
      store_queries(item, packed[0] - warp_ * 16 - lane_ / 4);
    }
#pragma unroll
    for (int j = 0; j < kHeadDim / 2; ++j) output_[j / (kPartDim / 2)][j % (kPartDim / 2)] = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      peak_[i] = -kInfinity;
      total_[i] = 0;
    }
  }

  // The consumer's queries to its tile in shared memory.
  __device__ __forceinline__ void store_queries(const Item& item, int first_packed) {
    sync_threads(1 + number_, kWarpgroup);  // all warps are done with the last item's
    char* tile = shared_.q + number_ * S::kTileBytes;
    const int thread = warp_ * 32 + lane_, chunk = thread % S::kChunks;
#pragma unroll 4
    for (int r = thread / S::kChunks; r < kRows; r += kWarpgroup / S::kChunks) {
      const int packed = first_packed + r;
      const int token = item.first_token + params_.group_size.divide(packed);
      uint4 x{};
      if (token < item.end_token) {
        x = *reinterpret_cast<const uint4*>(
            params_.q + row_offset(params_, item, token, packed, params_.q_stride) + chunk * 16);
      }
      *reinterpret_cast<uint4*>(tile + chunk_offset(r, chunk, S::kAtomBytes)) = x;
    }
    fence_async_proxy();
    sync_threads(1 + number_, kWarpgroup);
  }

  // Descriptors count in units of 16 bytes.
  __device__ __forceinline__ static uint64_t at(uint64_t tiles, int bytes) {
    return tiles + (bytes >> 4);
  }

  __device__ __forceinline__ void wait_for_turn() { sync_threads(3 + number_, 2 * kWarpgroup); }
  __device__ __forceinline__ void pass_turn() { arrive_threads(3 + (number_ ^ 1), 2 * kWarpgroup); }

  // Starts the scores of the present block, and of the next one where it is the item's too.
  __device__ __forceinline__ Step start_scores() {
    Step step;
    step.count = 0;
    pin_scores();
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) {
      if (b > 0) {
        if (step.count < b || (flags_ & flag::kLast)) break;
        advance();
        find_block();
      }
      step.count = b + 1;
      step.last = flags_ & flag::kLast;
      step.stage[b] = stage_.index;
      step.parity[b] = stage_.parity;
      step.place[b] = place_.index;
      step.flags[b] = flags_;
      step.gathered[b] = gathered_;
      wait_for(shared_.k_full[stage_.index], stage_.parity, gathered_);
      wgmma_fence();
      const uint64_t tile = at(k_tiles_, stage_.index * S::kTileBytes);
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        const int bytes = (k / 4) * S::kAtomBytes + (k % 4) * 32;
        if constexpr (S::kQueriesInRegisters) {
          wgmma_scores<T>(scores_[b], queries_[k], at(tile, bytes), k != 0);
        } else {
          wgmma_scores<T>(scores_[b], at(q_tile_, bytes), at(tile, bytes), k != 0);
        }
      }
      wgmma_commit();
    }
    return step;
  }

  __device__ __forceinline__ void finish_scores(const Step& step) {
    wgmma_wait<0>();
    pin_scores();
    release(step, shared_.k_empty);
  }

  __device__ __forceinline__ void start_values(const Step& step) {
    pin_output();
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) {
      if (b >= step.count) break;
      // Not the phase before the last: the stage's earlier values, of the other consumer's item
      // maybe, must be behind it.
      barrier_wait(&shared_.v_empty[step.stage[b]], step.parity[b] ^ 1);
      wait_for(shared_.v_full[step.stage[b]], step.parity[b], step.gathered[b]);
      wgmma_fence();
      const uint64_t tile = at(v_tiles_, step.stage[b] * S::kTileBytes);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int k = 0; k < kColumns / 16; ++k) {
          const int bytes = part * (kPartDim / 64) * S::kAtomBytes + k * 16 * 128;
          wgmma_values<T>(output_[part], weights_[b][k], at(tile, bytes), 1);
        }
      }
      wgmma_commit();
    }
  }

  __device__ __forceinline__ void pin_scores() {
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) pin(scores_[b]);
  }
  __device__ __forceinline__ void pin_output() {
#pragma unroll
    for (int part = 0; part < kParts; ++part) pin(output_[part]);
  }

  // Scores to weights, of as many blocks as the step has.
  template <int kBlocks>
  __device__ __forceinline__ void weigh(const Step& step, const int (&token)[2]) {
    mask<kBlocks>(step, token);
    softmax<kBlocks>();
  }

  // -inf where a row does not see a column.
  template <int kBlocks>
  __device__ __forceinline__ void mask(const Step& step, const int (&token)[2]) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (step.flags[b] & flag::kMasked) {
        const int2* seen_by = shared_.entries[step.place[b]].seen_by;
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
          const int4 pair = *reinterpret_cast<const int4*>(seen_by + 8 * j + 2 * (lane_ % 4));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float* x = &scores_[b][4 * j + 2 * i];
            if (token[i] < pair.x || token[i] >= pair.y) x[0] = -kInfinity;
            if (token[i] < pair.z || token[i] >= pair.w) x[1] = -kInfinity;
          }
        }
      }
    }
  }

  // Scores to weights; the running maximum and sum; what was summed before, relative to the new
  // maximum.
  template <int kBlocks>
  __device__ __forceinline__ void softmax() {
    const float scale = params_.scale_log2;
    float rescale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float peak = peak_[i];
#pragma unroll
      for (int j = 0; j < kBlocks * kColumns / 8; ++j) {
        const float* x = &scores_[j / (kColumns / 8)][4 * (j % (kColumns / 8)) + 2 * i];
        peak = fmaxf(peak, fmaxf(x[0], x[1]));
      }
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
      // A row that has seen nothing yet has weights 2^(-inf - 0) = 0.
      const float base = peak == -kInfinity ? 0 : peak * scale;
      rescale[i] = exp2_fast(peak_[i] * scale - base);
      peak_[i] = peak;
      float total = 0;
#pragma unroll
      for (int j = 0; j < kBlocks * kColumns / 8; ++j) {
        float* x = &scores_[j / (kColumns / 8)][4 * (j % (kColumns / 8)) + 2 * i];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          x[c] = exp2_fast(fmaf(x[c], scale, -base));
          total += x[c];
        }
      }
      total_[i] = fmaf(total_[i], rescale[i], total);
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int k = 0; k < kColumns / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* x = &scores_[b][8 * k + 2 * i];
          weights_[b][k][i] = pack<T>(x[0], x[1]);
        }
      }
    }
    // Most steps leave the maxima of all of a warp's rows as they are.
    if (__all_sync(~0u, rescale[0] == 1 && rescale[1] == 1)) return;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int j = 0; j < kPartDim / 2; ++j) output_[part][j] *= rescale[(j / 2) % 2];
    }
  }

  // The state to the output or to scratch.
  __device__ __forceinline__ void store(const Item& item, const int (&packed)[2],
                                        const int (&token)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float total = total_[i];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      // A sum that is NaN is no empty state: it must reach the output.
      const float factor = total == 0 ? 0 : params_.v_scale / total;
      const float lse = total == 0 ? -kInfinity : fmaf(peak_[i], params_.scale_log2, log2f(total));
      if (token[i] >= item.end_token) continue;
      const int head = query_head(params_, item, token[i], packed[i]);
      char* row = params_.out + row_offset(params_, item, token[i], packed[i], params_.out_stride);
      float* row_lse =
          params_.lse + token[i] * params_.lse_stride.token + head * params_.lse_stride.head;
      if (item.partial_row >= 0) {
        const int64_t state =
            int64_t{item.partial_row + token[i] - item.first_token} * params_.num_qo_heads + head;
        row = params_.partial_o + state * kHeadDim * 2;
        row_lse = params_.partial_lse + state;
      }
      store_row(row, i, factor);
      if (lane_ % 4 == 0) *row_lse = lse;
    }
  }

  __device__ __forceinline__ void store_row(char* row, int i, float factor) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int j = 0; j < kPartDim / 8; ++j) {
        const float* x = &output_[part][4 * j + 2 * i];
        const int column = part * kPartDim + j * 8 + lane_ % 4 * 2;
        *reinterpret_cast<uint32_t*>(row + column * 2) = pack<T>(x[0] * factor, x[1] * factor);
      }
    }
  }

  const Params& params_;
  Shared<kHeadDim>& shared_;
  const int number_, warp_, lane_;
  const uint64_t q_tile_, k_tiles_, v_tiles_;  // descriptors
  RingPlace<kEntries> place_;
  RingPlace<S::kStages> stage_;
  int flags_ = 0;
  bool gathered_ = false;
  uint32_t queries_[S::kQueriesInRegisters ? kHeadDim / 16 : 1][4];
  uint32_t weights_[kStepBlocks][kColumns / 16][4];
  float scores_[kStepBlocks][kColumns / 2];
  float output_[kParts][kPartDim / 2];
  float peak_[2], total_[2];
};

}  // namespace flashinfer_ops::sm90
