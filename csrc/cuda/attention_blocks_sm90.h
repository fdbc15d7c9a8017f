// What a consumer finds in the ring: blocks, and the steps made of them.
#pragma once

#include "cuda/attention_sm90.h"

namespace flashinfer_ops::sm90 {

// One or two blocks of an item, and where they are.
template <int kBlocks>
struct BlockStep {
  int count;
  int last;      // not 0: of the item
  int gathered;  // not 0: in part
  int unseen;    // flags: consumers whose rows see none of it
  int masked[kBlocks];
  int stage[kBlocks], parity[kBlocks];
};

enum Finding { kPresent, kNext };

template <int kHeadDim>
class BlockReader {
 public:
  using S = Shape<kHeadDim>;
  static constexpr int kStepBlocks = S::kStepBlocks;
  using Step = BlockStep<kStepBlocks>;

  __device__ __forceinline__ BlockReader(Shared<kHeadDim>& shared, int number)
      : shared_(shared), number_(number) {}

  // Waits for the present block; false when there is none.
  __device__ __forceinline__ bool find() {
    read_entry(true);
    if (flags_ & flag::kSolo) {
      barrier_wait(&shared_.k_full[stage_.index], stage_.parity);
      barrier_wait(&shared_.v_full[stage_.index], stage_.parity);
      barrier_arrive(&shared_.k_empty[stage_.index]);
      barrier_arrive(&shared_.v_empty[stage_.index]);
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

  // A stage's arrivals are those of both consumers; one that serves a block alone arrives twice.
  // kFull: a step of a pair item with all its blocks.
  template <bool kFull = false>
  __device__ __forceinline__ void release(const Step& step, uint64_t (&barriers)[S::kStages]) {
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) {
      const bool there = b == 0 || kFull || b < step.count;
      barrier_arrive_if(there, &barriers[step.stage[b]], kFull ? 1 : arrivals_);
    }
  }

  // The present block's item, and whether both consumers serve it.
  __device__ __forceinline__ const Item& item() const { return shared_.entries[stage_.index].item; }
  __device__ __forceinline__ bool are_pairs() const { return flags_ & flag::kPair; }
  // From here on stages are released for an item of both consumers, or of one.
  __device__ __forceinline__ void share(bool is_pair) { arrivals_ = is_pair ? 1 : kConsumers; }
  // How many plain blocks come next.
  __device__ __forceinline__ int plain() const { return plain_; }
  __device__ __forceinline__ void advance() { stage_.advance(step_); }

  // The present block, or the next one, and the one behind it where that is the item's too, when
  // their keys are there. They are known to be there, or waited for.
  template <Finding kFinding>
  __device__ __forceinline__ Step find_step(bool known = false) {
    Step step{};
    step.unseen = 3 * flag::kUnseen;
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) {
      if (b > 0 && (flags_ & flag::kLast)) break;
      if (b > 0 || kFinding != kPresent) {
        stage_.advance(step_);
        read_entry(!known);
      }
      step.count = b + 1;
      step.last = flags_ & flag::kLast;
      step.stage[b] = stage_.index;
      step.parity[b] = stage_.parity;
      step.masked[b] = flags_ & flag::kMasked;
      step.unseen &= flags_;
      step.gathered |= gathered_;
      if (!known) barrier_wait(&shared_.k_full[stage_.index], stage_.parity);
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
    plain_ -= kStepBlocks;
    return step;
  }

  // Whether the step's values and the next step's blocks and keys are there, without a wait. Nobody
  // need ask for the entries of plain blocks.
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

 private:
  __device__ __forceinline__ void read_entry(bool wait) {
    if (wait) barrier_wait(&shared_.entry_full[stage_.index], stage_.parity);
    const int4 head = *reinterpret_cast<const int4*>(&shared_.entries[stage_.index].flags);
    flags_ = head.x;
    gathered_ = head.y;
    plain_ = head.z;
  }

  Shared<kHeadDim>& shared_;
  const int number_;
  RingPlace<S::kStages> stage_;
  int step_ = 1;      // from one of its blocks to the next
  int arrivals_ = 0;  // that a thread owes a stage
  int flags_ = 0;
  int gathered_ = 0;
  int plain_ = 0;  // blocks behind the present one
};

}  // namespace flashinfer_ops::sm90
