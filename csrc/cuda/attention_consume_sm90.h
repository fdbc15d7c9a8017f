// The consumers: a warpgroup's 64 packed rows over the blocks of its items.
//
//   s = q k^T scale,  o = sum 2^(s - m) v / sum 2^(s - m),  lse = m + log2(sum 2^(s - m))
//
// with the online softmax of FlashAttention-2 (arXiv:2307.08691). A step takes two blocks where the
// item has as many left: what a step costs besides its products is then spent on 128 columns. While
// one consumer computes weights, the other one has the matrix unit.
#pragma once

#include "cuda/attention_softmax_sm90.h"
#include "cuda/attention_store_sm90.h"

namespace flashinfer_ops::sm90 {

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
        q_tile_(tile_descriptor(shared_address(shared.q) + number * S::kQueryBytes)),
        k_tiles_(tile_descriptor(shared_address(shared.k))),
        v_tiles_(tile_descriptor(shared_address(shared.v), S::kAtomBytes)) {}

  __device__ __forceinline__ void run() {
    if (!has_pairs(count_items(params_))) go_alone();
    bool more = find_block();
    Work work;
    if (more) work = begin_work();
    while (more) {
      const bool is_pair = work.is_pair;
      const int (&token)[2] = work.token;
      arrivals_ = is_pair ? 1 : kConsumers;
      begin_item();
      // A pair item has much to compute: its consumers take turns on the matrix unit, which goes
      // from the next step's scores to a step's values, while the other consumer computes weights.
      // A solo item waits for memory: its values are done with before it waits for the next keys.
      if (is_pair && number_ == 1) pass_turn();
      for (bool last = false; !last;) {
        bool ready = false;
        Step step = find_step<kPresent>();
        show(step, step);
        if (is_pair) wait_for_turn();
        multiply<0>(step, step, token, is_pair, ready);
        while (is_pair && !step.last) {
          // Most blocks of a long walk: nothing needs to be asked about them.
          if (plain_ >= kStepBlocks) {
            do {
              const Step next = next_plain_step();
              if (!ready) {
                wait_for_values(step);
                wait_for_keys(next);
              }
              show(step, next);
              wait_for_turn();
              multiply_blocks<kStepBlocks, kStepBlocks, true>(step, next, token, true, ready);
              release_values<true>(step);
              step = next;
              plain_ -= kStepBlocks;
            } while (plain_ >= kStepBlocks);
            ready = false;  // no entry was asked for
          }
          Step next;
          if (ready) next = find_step<kKnown>();
          if (!ready) {
            wait_for_values(step);
            next = find_step<kNext>();
          }
          show(step, next);
          wait_for_turn();
          multiply<kStepBlocks>(step, next, token, is_pair, ready);
          release_values<true>(step);
          step = next;
        }
        if (kStepBlocks == 1 || step.count == 1) {
          finish<1>(step, is_pair);
        } else {
          finish<kStepBlocks>(step, is_pair);
        }
        release_values(step);
        last = step.last;
        stage_.advance(step_);
        if (!last) find_block();
      }
      if (is_pair && number_ == 0) pass_turn();
      // What comes after the item may be long in coming, and only once these stages are free.
      more = find_block();
      const Work done = work;
      // The next queries are on their way while this output is stored.
      if (more) work = begin_work();
      store_state<T, kHeadDim>(params_, done, output_, sums_, lane_);
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
    int last;      // not 0: of the item
    int gathered;  // not 0: in part
    int masked[kStepBlocks];
    int stage[kStepBlocks], parity[kStepBlocks];
  };

  // Waits for the present block; false when there is none.
  __device__ __forceinline__ bool find_block() {
    read_entry(true);
    if (flags_ & flag::kSolo) {
      __syncwarp();
      if (lane_ == 0) {
        barrier_arrive(&shared_.k_empty[stage_.index]);
        barrier_arrive(&shared_.v_empty[stage_.index]);
      }
      stage_.advance();
      go_alone();
      read_entry(true);
    }
    return !(flags_ & flag::kStop);
  }
  // From here on the consumer has every other stage.
  __device__ __forceinline__ void go_alone() {
    step_ = kConsumers;
    stage_.align(number_);
  }
  __device__ __forceinline__ void read_entry(bool wait) {
    if (wait) barrier_wait(&shared_.entry_full[stage_.index], stage_.parity);
    const int4 head = *reinterpret_cast<const int4*>(&shared_.entries[stage_.index].flags);
    flags_ = head.x;
    gathered_ = head.y;
    plain_ = head.z;
  }

  // A stage's arrivals are those of both consumers; one that serves a block alone arrives twice.
  template <bool kFull>
  __device__ __forceinline__ void release(const Step& step, uint64_t (&barriers)[S::kStages]) {
    __syncwarp();
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) {
      const bool mine = lane_ == 0 && (b == 0 || kFull || b < step.count);
      barrier_arrive_if(mine, &barriers[step.stage[b]], kFull ? 1 : arrivals_);
    }
  }
  // kFull: a step of a pair item with all its blocks.
  template <bool kFull = false>
  __device__ __forceinline__ void release_values(const Step& step) {
    release<kFull>(step, shared_.v_empty);
  }

  // The present block's item; its queries are asked for.
  __device__ __forceinline__ Work begin_work() {
    Work work;
    work.item = shared_.entries[stage_.index].item;
    work.is_pair = flags_ & flag::kPair;
    // A consumer's rows of a pair item begin after the other's.
    const int first_packed = work.item.first_packed + (work.is_pair ? number_ * kRows : 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      work.packed[i] = first_packed + warp_ * 16 + lane_ / 4 + 8 * i;
      work.token[i] = work.item.first_token + params_.group_size.divide(work.packed[i]);
    }
    if constexpr (S::kQueryBytes > 0) copy_queries(work.item, first_packed);
    // A thread's part of the 16x16 fragments: of two rows, pairs of elements 8 columns apart.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const char* row =
          params_.q + lane_ % 4 * 4 +
          row_offset(params_, work.item, work.token[i], work.packed[i], params_.q_stride);
      const bool live = work.token[i] < work.item.end_token;
#pragma unroll
      for (int j = 0; j < S::kQueryAtoms * 8; ++j) {
        queries_[j / 2][j % 2 * 2 + i] =
            live ? __ldg(reinterpret_cast<const uint32_t*>(row + j * 16)) : 0;
      }
    }
    return work;
  }

  // The other queries, to the consumer's tile in shared memory.
  __device__ __forceinline__ void copy_queries(const Item& item, int first_packed) {
    sync_threads(1 + number_, kWarpgroup);  // all warps are done with the last item's
    constexpr int kFirst = S::kQueryAtoms * 8, kCount = S::kChunks - kFirst;
    const uint32_t tile = shared_address(shared_.q) + number_ * S::kQueryBytes;
    const int thread = warp_ * 32 + lane_, chunk = thread % kCount;
#pragma unroll 4
    for (int r = thread / kCount; r < kRows; r += kWarpgroup / kCount) {
      const int packed = first_packed + r;
      const int token = item.first_token + params_.group_size.divide(packed);
      const bool live = token < item.end_token;
      const int64_t offset = live ? row_offset(params_, item, token, packed, params_.q_stride) : 0;
      copy_async(tile + chunk_offset(r, chunk, S::kAtomBytes),
                 params_.q + offset + (kFirst + chunk) * 16, live);
    }
  }

  __device__ __forceinline__ void begin_item() {
    if constexpr (S::kQueryBytes > 0) {
      wait_for_own_copies();
      fence_async_proxy();
      sync_threads(1 + number_, kWarpgroup);
    }
#pragma unroll
    for (int j = 0; j < kHeadDim / 2; ++j) output_[j / (kPartDim / 2)][j % (kPartDim / 2)] = 0;
    sums_ = {};
  }

  // Descriptors count in units of 16 bytes.
  __device__ __forceinline__ static uint64_t at(uint64_t tiles, int bytes) {
    const uint32_t low = static_cast<uint32_t>(tiles) + (bytes >> 4);
    return (tiles & 0xFFFFFFFF00000000) | low;
  }

  __device__ __forceinline__ void wait_for_turn() { sync_threads(3 + number_, 2 * kWarpgroup); }
  __device__ __forceinline__ void pass_turn() { arrive_threads(3 + (number_ ^ 1), 2 * kWarpgroup); }

  // The present block, or the next one, and the one behind it where that is the item's too, when
  // their keys are there. They are known to be there, or waited for.
  enum Finding { kPresent, kNext, kKnown };
  template <Finding kFinding>
  __device__ __forceinline__ Step find_step() {
    Step step{};
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) {
      if (b > 0 && (step.count < b || (flags_ & flag::kLast))) break;
      if (b > 0 || kFinding != kPresent) {
        stage_.advance(step_);
        read_entry(kFinding != kKnown);
      }
      step.count = b + 1;
      step.last = flags_ & flag::kLast;
      step.stage[b] = stage_.index;
      step.parity[b] = stage_.parity;
      step.masked[b] = flags_ & flag::kMasked;
      step.gathered |= gathered_;
      if (kFinding != kKnown) barrier_wait(&shared_.k_full[stage_.index], stage_.parity);
    }
    return step;
  }

  // The next blocks, which are known to be plain; they need not be there.
  __device__ __forceinline__ Step next_plain_step() {
    Step step{};
    step.count = kStepBlocks;
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) {
      stage_.advance();
      step.stage[b] = stage_.index;
      step.parity[b] = stage_.parity;
    }
    return step;
  }

  // Whether the step's values and the next step's blocks and keys are there, without a wait. The
  // step is full and not the item's last.
  // What a barrier guards must not be read here: the answer and a read side by side are unordered.
  template <bool kPlain>
  __device__ __forceinline__ bool look_ahead(const Step& step) const {
    RingPlace<S::kStages> stage = stage_;
    bool ready = true;
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) {
      ready &= barrier_done(&shared_.v_full[step.stage[b]], step.parity[b]);
      stage.advance();
      // One block may be the item's last; then the next item's is asked for in vain.
      if (!kPlain) ready &= barrier_done(&shared_.entry_full[stage.index], stage.parity);
      ready &= barrier_done(&shared_.k_full[stage.index], stage.parity);
    }
    return __all_sync(~0u, ready);
  }

  __device__ __forceinline__ void wait_for_values(const Step& step) {
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) {
      if (b < step.count) barrier_wait(&shared_.v_full[step.stage[b]], step.parity[b]);
    }
  }

  __device__ __forceinline__ void wait_for_keys(const Step& step) {
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) {
      barrier_wait(&shared_.k_full[step.stage[b]], step.parity[b]);
    }
  }

  // The matrix unit sees what bulk copies wrote; what threads copied it sees behind a fence.
  __device__ __forceinline__ static void show(const Step& step, const Step& next) {
    if (step.gathered || next.gathered) fence_async_proxy();
  }

  // Starts the products of the next step's scores and then those of a step's weights and values.
  // The next weights are computed as soon as the scores are there, beside the other products.
  template <int kBlocks>
  __device__ __forceinline__ void multiply(const Step& step, const Step& next,
                                           const int (&token)[2], bool is_pair, bool& ready) {
    if (kStepBlocks == 1 || next.count == 1) {
      multiply_blocks<kBlocks, 1, false>(step, next, token, is_pair, ready);
    } else {
      multiply_blocks<kBlocks, kStepBlocks, false>(step, next, token, is_pair, ready);
    }
  }

  template <int kBlocks, int kNextBlocks, bool kPlain>
  __device__ __forceinline__ void multiply_blocks(const Step& step, const Step& next,
                                                  const int (&token)[2], bool is_pair,
                                                  bool& ready) {
    pin_scores();
    pin_output();
    wgmma_fence();
    start_scores<kNextBlocks>(next);
    start_values<kBlocks>(step);
    if (is_pair) pass_turn();
    if (kNextBlocks == kStepBlocks && is_pair) ready = look_ahead<kPlain>(next);
    wgmma_wait<(kBlocks > 0)>();
    pin_scores();
    release<kPlain>(next, shared_.k_empty);
    if (!kPlain) mask<kNextBlocks>(next, token);
    const float2 rescale = exponentiate<kNextBlocks>(scores_, sums_, params_.scale_log2);
    const bool same = rescale.x == 1 && rescale.y == 1 && sums_.total[0] == sums_.total[0] &&
                      sums_.total[1] == sums_.total[1];
    // The compiler would put the wait before the weights. It does not know that all lanes are in
    // one of the two ballots, so that it cannot move it across this barrier, nor the sums behind.
    const uint32_t changed = __ballot_sync(~0u, !same);
    __syncwarp(__ballot_sync(~0u, same) | changed);
    wgmma_wait<0>();
    pin_scores();
    pin_output();
    // Most steps leave the maxima of all of a warp's rows as they are.
    if (changed != 0) rescale_output(output_, rescale);
    pack_weights<T, kNextBlocks>(scores_, weights_);
  }

  // The item's last step.
  template <int kBlocks>
  __device__ __forceinline__ void finish(const Step& step, bool is_pair) {
    wait_for_values(step);
    show(step, step);
    if (is_pair) wait_for_turn();
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
        const uint64_t keys = at(tile, atom * S::kAtomBytes + bytes);
        if constexpr (S::kQueryBytes == 0) {
          wgmma_scores<T>(scores_[b], queries_[k], keys, k != 0);
        } else if (atom < S::kQueryAtoms) {
          wgmma_scores<T>(scores_[b], queries_[k], keys, k != 0);
        } else {
          const int others = (atom - S::kQueryAtoms) * S::kAtomBytes + bytes;
          wgmma_scores<T>(scores_[b], at(q_tile_, others), keys, k != 0);
        }
      }
    }
    wgmma_commit();
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
          const int bytes = part * (kPartDim / 64) * S::kAtomBytes + k * 16 * 128;
          wgmma_values<T>(output_[part], weights_[b][k], at(tile, bytes), 1);
        }
      }
    }
    if (kBlocks > 0) wgmma_commit();
  }

  __device__ __forceinline__ void pin_scores() {
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) pin(scores_[b]);
  }
  __device__ __forceinline__ void pin_output() {
#pragma unroll
    for (int part = 0; part < kParts; ++part) pin(output_[part]);
  }

  template <int kBlocks>
  __device__ __forceinline__ void mask(const Step& step, const int (&token)[2]) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (step.masked[b]) {
        mask_block(scores_[b], shared_.entries[step.stage[b]].seen_by, token, lane_);
      }
    }
  }

  const Params& params_;
  Shared<kHeadDim>& shared_;
  const int number_, warp_, lane_;
  const uint64_t q_tile_, k_tiles_, v_tiles_;  // descriptors
  RingPlace<S::kStages> stage_;
  int step_ = 1;      // from one of its blocks to the next
  int arrivals_ = 0;  // that a warp owes a stage
  int flags_ = 0;
  int gathered_ = 0;
  int plain_ = 0;  // blocks behind the present one
  uint32_t queries_[S::kQueryAtoms > 0 ? 4 * S::kQueryAtoms : 1][4];
  uint32_t weights_[kStepBlocks][kColumns / 16][4];
  float scores_[kStepBlocks][kColumns / 2];
  float output_[kParts][kPartDim / 2];
  RowSums sums_;
};

}  // namespace flashinfer_ops::sm90
