// The consumers: a warpgroup's 64 packed rows over the blocks of its items.
//
//   s = q k^T scale,  o = sum 2^(s - m) v / sum 2^(s - m),  lse = m + log2(sum 2^(s - m))
//
// with the online softmax of FlashAttention-2 (arXiv:2307.08691). A step takes two blocks where the
// item has as many left: what a step costs besides its products is then spent on 128 columns. While
// one consumer computes weights, the other one has the matrix unit.
#pragma once

#include "cuda/attention_products_sm90.h"
#include "cuda/attention_store_sm90.h"

namespace flashinfer_ops::sm90 {

// kBulk: as of the producers; without it no block is plain.
template <class T, int kHeadDim, bool kBulk>
class Consumer : Products<T, kHeadDim> {
 public:
  __device__ __forceinline__ Consumer(const Params& params, Shared<kHeadDim>& shared, int number,
                                      int thread)
      : Base(shared, number, thread % 32),
        params_(params),
        number_(number),
        warp_(thread / 32),
        order_(shared_address(shared.order[number * (kWarpgroup / 32) + thread / 32])),
        blocks_(shared, number) {}

  __device__ __forceinline__ void run() {
    // The first queries are asked for, and brought into order, before there is any block.
    const First& first = first_item();
    if (!first.is_pair) blocks_.go_alone();
    bool more = first.known || blocks_.find();
    Work work;
    if (more) {
      work = begin_work(first.known ? first.item : blocks_.item(),
                        first.known ? first.is_pair : blocks_.are_pairs());
      begin_item();
    }
    if (first.known) blocks_.find();
    while (more) {
      blocks_.share(work.is_pair);
      Step step = blocks_.template find_step<kPresent>();
      if (work.is_pair && number_ == 1) pass_turn();
      for (;;) {
        show(step, step);
        weigh(step, work.token);
        Step next;
        if (work.is_pair) serve_full_steps(step, next, work.token);
        finish(step);
        if (step.last) break;
        step = work.is_pair ? next : blocks_.template find_step<kNext>();
      }
      if (work.is_pair) end_turns();
      // What comes after the item may be long in coming, and only once these stages are free.
      blocks_.advance();
      more = blocks_.find();
      const Work done = work;
      // The next queries are on their way while this output is stored.
      if (more) work = begin_work(blocks_.item(), blocks_.are_pairs());
      store_state<T, kHeadDim>(params_, done, output_, sums_, order_, lane_);
      if (more) begin_item();
    }
  }

 private:
  using Base = Products<T, kHeadDim>;
  using Base::kPartDim, Base::kStepBlocks;
  using Base::lane_, Base::shared_, Base::queries_, Base::query;
  using Base::scores_, Base::weights_, Base::output_;
  using Base::show, Base::mask, Base::pin_scores, Base::pin_output;
  using typename Base::S;
  using typename Base::Step;

  // Through shared memory, so that the compiler knows that lanes agree.
  __device__ __forceinline__ const First& first_item() {
    struct Words {
      int4 unit, range;
      int num_items;
    };
    const auto load = [&](int list) {
      const gpu::ItemList& x = item_list(params_, list);
      return Words{*reinterpret_cast<const int4*>(x.unit), *reinterpret_cast<const int4*>(&x.items),
                   load_now(&x.items.num_items)};
    };
    const Words pairs = load(0), own = load(1 + number_);
    const bool is_pair = pairs.range.w < pairs.num_items;
    const auto its = [&](int p, int o) { return is_pair ? p : o; };
    const Item item = make_item(params_, its(pairs.unit.x, own.unit.x),
                                its(pairs.unit.y, own.unit.y), its(pairs.unit.z, own.unit.z),
                                its(pairs.range.x, own.range.x), its(pairs.range.y, own.range.y));
    const Tokens tokens = tokens_of(params_, item, is_pair);
    const bool has_kv = is_pair ? pairs.range.z : own.range.w < own.num_items && own.range.z;
    First& first = shared_.first[number_];
    if (warp_ == 0 && lane_ == 0) first = {is_pair, has_kv && tokens.first <= tokens.last, item};
    sync_threads(1 + number_, kWarpgroup);
    return first;
  }

  // An item whose queries are asked for.
  __device__ __forceinline__ Work begin_work(const Item& item, bool is_pair) {
    Work work;
    work.item = item;
    work.is_pair = is_pair;
    // A consumer's rows of a pair item begin after the other's.
    const int first_packed = work.item.first_packed + (work.is_pair ? number_ * kRows : 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      work.packed[i] = first_packed + warp_ * 16 + lane_ / 4 + 8 * i;
      work.token[i] = item.first_token + params_.group_size.divide(work.packed[i]);
    }
    // All warps are done with the last item's.
    if constexpr (S::kQueryBytes > 0) sync_threads(1 + number_, kWarpgroup);
    // Of its two rows a thread asks for every fourth 16 bytes: the first to registers, the others
    // to the consumer's tile in shared memory.
    const uint32_t tile = shared_address(shared_.q) + number_ * S::kQueryBytes;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const char* row =
          params_.q + lane_ % 4 * 16 +
          row_offset(params_, item, item.first_token, work.token[i] - item.first_token,
                     work.packed[i], params_.q_stride);
      const bool live = work.token[i] < item.end_token;
      if (!live) row = params_.q;
#pragma unroll
      for (int j = 0; j < S::kQueryAtoms * 2; ++j) {
        uint4 x{};
        if (live) x = __ldg(reinterpret_cast<const uint4*>(row + j * 64));
        uint32_t (&asked)[4] = queries_[i * S::kQueryAtoms * 2 + j];
        asked[0] = x.x, asked[1] = x.y, asked[2] = x.z, asked[3] = x.w;
      }
      const int r = warp_ * 16 + lane_ / 4 + 8 * i;
#pragma unroll
      for (int j = S::kQueryAtoms * 2; j < S::kAtoms * 2; ++j) {
        const int chunk = (j - S::kQueryAtoms * 2) * 4 + lane_ % 4;
        copy_async(tile + chunk_offset(r, chunk, S::kAtomBytes), row + j * 64, live);
      }
    }
    return work;
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
    // From 16 bytes of a row that each of four lanes has to the pairs of elements that it needs.
    constexpr int kAsked = S::kQueryAtoms * 2;
    if constexpr (kAsked > 0) {
      uint32_t asked[2 * kAsked][4];
#pragma unroll
      for (int p = 0; p < 2 * kAsked; ++p) {
        uint32_t (&x)[4] = asked[p];
#pragma unroll
        for (int w = 0; w < 4; ++w) x[w] = queries_[p][w];
        transpose(x[0], x[1], x[2], x[3], lane_);
      }
#pragma unroll
      for (int p = 0; p < 2 * kAsked; ++p) {
#pragma unroll
        for (int w = 0; w < 4; ++w) query(p % kAsked * 4 + w, p / kAsked) = asked[p][w];
      }
    }
  }

  // Barriers of threads: 1 + a consumer's number its own, 3 + that number its turn to compute.
  // The consumers of a pair item take turns. The second one passes the first turn; in the end, both
  // have waited as often as the other one has passed, and no turn of the next item has come.
  __device__ __forceinline__ void wait_for_turn() { sync_threads(3 + number_, 2 * kWarpgroup); }
  __device__ __forceinline__ void pass_turn() { arrive_threads(3 + (number_ ^ 1), 2 * kWarpgroup); }
  __device__ __forceinline__ void end_turns() {
    wait_for_turn();
    if (number_ == 0) pass_turn();
  }

  // None of the consumer's rows sees any of it: there is nothing to compute.
  __device__ __forceinline__ bool is_unseen(const Step& step) const {
    return step.unseen & flag::kUnseen << number_;
  }

  // A step's scores to weights, and the former output in proportion to them.
  __device__ __forceinline__ void weigh(const Step& step, const int (&token)[2]) {
    if (is_unseen(step)) {
      blocks_.release(step, shared_.k_empty);
      return;
    }
    const bool full = kStepBlocks > 1 && step.count == kStepBlocks;
    if (full) {
      Base::template multiply_keys<kStepBlocks>(step, token);
    } else {
      Base::template multiply_keys<1>(step, token);
    }
    blocks_.release(step, shared_.k_empty);
    const Rebase rebase = find_peaks(scores_, sums_, params_.scale_log2, full);
    if (__any_sync(~0u, rebase.changes())) rescale_output(output_, rebase);
    weigh_scores<T>(scores_, weights_, sums_, rebase, params_.scale_log2, full);
  }

  // The full steps behind a step whose weights are there. Then that is the last full one, still to
  // be finished, and the next one, if there is any, has fewer blocks. A pair item has much to
  // compute: its consumers take turns on the matrix unit, which goes from the next step's scores to
  // a step's values, while the other consumer computes weights.
  __device__ __forceinline__ void serve_full_steps(Step& step, Step& next, const int (&token)[2]) {
    while (!step.last) {
      bool ready = false;
      // Most blocks of a long walk: nothing needs to be asked about them.
      while (kBulk && blocks_.plain() >= kStepBlocks && !is_unseen(step)) {
        next = blocks_.next_plain_step();
        if (!ready) {
          blocks_.wait_for_values(step);
          blocks_.wait_for_keys(next);
        }
        ready = multiply<true>(step, next, token);
        step = next;
      }
      ready = false;  // no entry was asked for
      do {
        if (!ready) blocks_.wait_for_values(step);
        next = blocks_.template find_step<kNext>(ready);
        if (next.count < kStepBlocks || is_unseen(step) || is_unseen(next)) return;
        ready = multiply<false>(step, next, token);
        step = next;
      } while (!step.last && !(kBulk && blocks_.plain() >= kStepBlocks));
    }
  }

  // The products of the next step's scores and of a step's weights and values, both full; then the
  // next weights. Whether look_ahead() finds what comes next.
  template <bool kPlain>
  __device__ __forceinline__ bool multiply(const Step& step, const Step& next,
                                           const int (&token)[2]) {
    show(step, next);
    // What only one consumer computes needs no turns.
    const bool both = ((step.unseen | next.unseen) & 3 * flag::kUnseen) == 0;
    if (both) wait_for_turn();
    pin_scores();
    pin_output();
    wgmma_fence();
    Base::template start_scores<kStepBlocks>(next);
    Base::template start_values<kStepBlocks>(step);
    const bool ready = blocks_.template look_ahead<kPlain>(next);
    if constexpr (!kPlain && kStepBlocks > 1) {
      // The first block's scores are masked while the second one's are computed.
      wgmma_wait<2>();
      pin(scores_[0]);
      mask(next, 0, token);
    }
    wgmma_wait<1>();
    if (both) pass_turn();
    pin_scores();
    blocks_.template release<true>(next, shared_.k_empty);
    if (!kPlain) mask(next, kStepBlocks - 1, token);
    const Rebase rebase = find_peaks(scores_, sums_, params_.scale_log2, true);
    const bool same = !rebase.changes();
    // The compiler would put the wait before the maxima. It does not know that all lanes are in one
    // of the two ballots, so that it cannot move it across this barrier, nor the maxima behind.
    const uint32_t changed = __ballot_sync(~0u, !same);
    __syncwarp(__ballot_sync(~0u, same) | changed);
    wgmma_wait<0>();
    pin_scores();
    pin_output();
    if (changed != 0) rescale_output(output_, rebase);
    weigh_scores<T>(scores_, weights_, sums_, rebase, params_.scale_log2, true);
    blocks_.template release<true>(step, shared_.v_empty);
    return ready;
  }

  // The products of a step's weights and values.
  __device__ __forceinline__ void finish(const Step& step) {
    blocks_.wait_for_values(step);
    if (is_unseen(step)) {
      blocks_.release(step, shared_.v_empty);
      return;
    }
    show(step, step);
    if (kStepBlocks > 1 && step.count == kStepBlocks) {
      Base::template multiply_values<kStepBlocks>(step);
    } else {
      Base::template multiply_values<1>(step);
    }
    blocks_.release(step, shared_.v_empty);
  }

  const Params& params_;
  const int number_, warp_;
  const uint32_t order_;  // where the warp orders its output
  BlockReader<kHeadDim> blocks_;
  RowSums sums_;
};

}  // namespace flashinfer_ops::sm90
