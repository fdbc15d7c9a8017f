// The producers: the columns of a block to a stage, and what consumers must know of it.
//
// The warps take turns block by block. Runs of columns that are neighbours in a page are copied at
// once; others, such as pages of one token, 16 bytes at a time.
#pragma once

#include "cuda/attention_first_sm90.h"
#include "cuda/attention_lookup_sm90.h"

namespace flashinfer_ops::sm90 {

// kBulk: whether anything can be copied in bulk. Where nothing can, what else there is makes the
// gathers slower by its instructions alone.
template <int kHeadDim, bool kBulk>
class Producer {
 public:
  using S = Shape<kHeadDim>;

  __device__ __forceinline__ Producer(const Params& params, Shared<kHeadDim>& shared, int warp,
                                      int lane)
      : params_(params), shared_(shared), rows_(shared.rows[warp]), warp_(warp), lane_(lane) {}

  __device__ __forceinline__ void run() {
    const int consumer = warp_ % kConsumers;
    const int32_t pair_words = list_words(0), own_words = list_words(1 + consumer);
    const bool marked = word(pair_words, list::kItem) < word(pair_words, list::kItems);
    if (!marked) stage_.align(consumer);
    // The first block comes as soon as may be.
    const int first_others = marked ? warp_ : warp_ / kConsumers;
    int blocks = 0;  // of the first list, up to that one
    {
      FirstBlock<kBulk> first(params_, marked, marked ? pair_words : own_words, lane_);
      Block block;
      if (first.look_up(first_others, block)) {
        blocks = first_others + 1;
        const int step = marked ? 1 : kConsumers;
        stage_.advance(first_others * step);
        if (warp_ >= kFirstWarps) take_turn();
        publish<true>(block, [&] { first.describe_to(block); });
        stage_.advance(step);
      }
    }
    in_turn_ = blocks > 0;
    // Where no CTA has items of one consumer, pair items are all there is.
    const bool has_own = !marked || word(own_words, list::kItems) > 0;
#pragma unroll 1
    for (int kind = marked ? 0 : 1; kind < 1 + has_own; ++kind) {
      const bool pairs = kind == 0;
      // A warp's turn among those that share the list, and from one of its places to the next.
      const int step = pairs ? 1 : kConsumers;
      static_assert(kConsumers == 2);
      const int turns = S::kProducerWarps >> kind, its_turn = warp_ >> kind;
      Cursor<kBulk> cursor(params_, pairs, pairs ? pair_words : own_words, lane_, blocks);
      // One consumer frees a list's own places, in order, but both free those up to the mark. A
      // warp that went on before these are free could take the state of a barrier two rounds ago
      // for the last one's. (A warp that has filled no place near the mark may pass here early;
      // then the list's other warp has, and holds it up at its next turn.)
      if (marked && !pairs) barrier_wait(&shared_.k_empty[common_.index], common_.parity);
      // Blocks of other warps before this one's next.
      int others = blocks > 0 ? turns - 1 : its_turn;
      blocks = 0;
      for (;;) {
        int left = others;
        Block block;
        const bool found = cursor.next_block(left, block);
        stage_.advance((others - left) * step);
        others = left;
        if (!found) break;
        if (!in_turn_ && warp_ >= kFirstWarps) take_turn();
        publish<false>(block, [] {});
        if (!in_turn_) take_turn();
        in_turn_ = true;
        stage_.advance(step);
        others = turns - 1;
      }
      // In the first list, or one that waits for the others would wait for what waits for it.
      if (!in_turn_) take_turn();
      in_turn_ = true;
      if (others == 0) mark(pairs && has_own ? flag::kSolo : flag::kStop);
      if (pairs) {
        common_ = stage_.own_or_before(consumer);
        stage_.advance();
        stage_.align(consumer);
      }
    }
  }

 private:
  static constexpr int kRunBytes = kRun / 8 * S::kGroupBytes;

  // The first warps' first blocks are asked for ahead of the others': all of them together would
  // come at about the same time, late.
  static constexpr int kFirstWarps = S::kFirstWarps;
  __device__ __forceinline__ void take_turn() {
    if constexpr (S::kProducerWarps > kConsumers) {
      if (warp_ < kFirstWarps) {
        barrier_arrive(&shared_.first_blocks);
      } else {
        barrier_wait(&shared_.first_blocks, 0);
      }
    }
  }

  // The lane's word of a list of the CTA's.
  __device__ __forceinline__ int32_t list_words(int list) const {
    return reinterpret_cast<const int32_t*>(&item_list(params_, list))[lane_];
  }

  // kFirst: the warp's first block, behind whose keys it lets others begin. What describe() finds
  // out, for the consumers, is not needed before.
  template <bool kFirst, class F>
  __device__ __forceinline__ void publish(const Block& block, F describe) {
    const int stage = stage_.index, parity = stage_.parity;
    // A page number outside of the cache reads some page of it, not other memory.
    uint32_t page[kLaneColumns], live[kLaneColumns];
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      page[c] = min(static_cast<uint32_t>(block.columns[c].page),
                    static_cast<uint32_t>(params_.num_pages - 1));
      live[c] = ~0u;
    }
    const int bulk = !kBulk ? 0 : block.bulk < 0 ? find_runs(block, page) : block.bulk;
    if (bulk != kAllRuns) {
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) live[c] = __ballot_sync(~0u, block.columns[c].live);
      store_rows(block, page);
    }
    // Unrolled for the first block only: the loop of all others shall be short.
    constexpr int kUnrolled = kFirst ? 2 : 1;
#pragma unroll kUnrolled
    for (int values = 0; values < 2; ++values) {
      barrier_wait(values ? &shared_.v_empty[stage] : &shared_.k_empty[stage], parity ^ 1);
      if (values) {
        describe();
        publish_entry(block, bulk != kAllRuns);
      }
      uint64_t* full = values ? &shared_.v_full[stage] : &shared_.k_full[stage];
      const uint32_t tile = shared_address(values ? shared_.v[stage] : shared_.k[stage]);
      if constexpr (kBulk) {
        int run_page[kRuns], run_slot[kRuns];
#pragma unroll
        for (int r = 0; r < kRuns; ++r) {
          run_page[r] = __shfl_sync(~0u, static_cast<int>(page[r / 2]), r % 2 * kRun);
          run_slot[r] = __shfl_sync(~0u, block.columns[r / 2].slot, r % 2 * kRun);
        }
        // An arrival of each lane, and one with the bytes of bulk copies.
        if (elect_lane()) {
          const CUtensorMap* map = values ? &params_.v_map : &params_.k_map;
          const int heads = values ? params_.v_heads : params_.k_heads;
          barrier_arrive_expecting(full, __popc(bulk) * kRun * kHeadDim * 2);
          if (bulk == kAllRuns) barrier_arrive(full, 32);
#pragma unroll
          for (int r = 0; r < kRuns; ++r) {
            if (bulk >> r & 1) {
              const int head = run_page[r] * heads + block.item.kv_head;
              copy_box(tile + r * kRunBytes, map, run_slot[r], head, full);
            }
          }
        }
      } else {
        barrier_arrive_if(lane_ == 0, full, 1);
      }
      __syncwarp();
      if (bulk == kAllRuns) {
        if (kFirst && values && warp_ < kFirstWarps) take_turn();
        continue;
      }
#pragma unroll 1
      for (int r = 0; r < kRuns; ++r) {
        if (!(bulk >> r & 1)) {
          gather((values ? rows_.v : rows_.k) + r * kRun, tile + r * kRunBytes,
                 (r < 2 ? live[0] : live[1]) >> r % 2 * kRun);
        }
      }
      barrier_arrive_after_copies(full);
      // Gathers take long: the others begin behind the keys.
      if (kFirst && !values && warp_ < kFirstWarps) take_turn();
    }
  }

  // Bit r: run r is neighbours in a page.
  __device__ __forceinline__ int find_runs(const Block& block,
                                           const uint32_t (&page)[kLaneColumns]) const {
    int runs = 0;
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      const Column& column = block.columns[c];
      const uint32_t first_page = __shfl_sync(~0u, page[c], lane_ & kRun);
      const int first_slot = __shfl_sync(~0u, column.slot, lane_ & kRun);
      const uint32_t neighbours = __ballot_sync(
          ~0u, column.live && page[c] == first_page && column.slot == first_slot + lane_ % kRun);
      if ((neighbours & 0xFFFF) == 0xFFFF) runs |= 1 << 2 * c;
      if (neighbours >> 16 == 0xFFFF) runs |= 2 << 2 * c;
    }
    return runs;
  }

  __device__ __forceinline__ void publish_entry(const Block& block, bool gathered) {
    Entry& entry = shared_.entries[stage_.index];
    // Consumers do not wait for the entries of plain blocks, so the next one to write does.
    barrier_wait(&shared_.entry_full[stage_.index], stage_.parity ^ 1);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      entry.seen_by[32 * c + lane_] = block.columns[c].seen_by;
    }
    if (lane_ == 0) {
      entry.flags = block.flags;
      entry.gathered = gathered;
      entry.plain = block.plain;
      entry.item = block.item;
    }
    barrier_arrive(&shared_.entry_full[stage_.index]);
  }

  // A stage that holds no block.
  __device__ __forceinline__ void mark(int flags) {
    const int stage = stage_.index, parity = stage_.parity;
    barrier_wait(&shared_.k_empty[stage], parity ^ 1);
    barrier_wait(&shared_.v_empty[stage], parity ^ 1);
    barrier_wait(&shared_.entry_full[stage], parity ^ 1);
    if (lane_ == 0) {
      shared_.entries[stage].flags = flags;
      barrier_arrive(&shared_.k_full[stage], 1 + 32);
      barrier_arrive(&shared_.v_full[stage], 1 + 32);
      barrier_arrive(&shared_.entry_full[stage], 32);
    }
  }

  __device__ __forceinline__ void store_rows(const Block& block,
                                             const uint32_t (&page)[kLaneColumns]) {
    __syncwarp();
    const int64_t head = block.item.kv_head;
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      const int slot = block.columns[c].slot;
      const auto offset = [&](const CacheStrides& stride) {
        return page[c] * stride.page + slot * stride.slot + head * stride.head;
      };
      rows_.k[32 * c + lane_] = params_.k_cache + offset(params_.k_stride);
      rows_.v[32 * c + lane_] = params_.v_cache + offset(params_.v_stride);
    }
    __syncwarp();
  }

  // A run's rows to a tile, zeros for those that are not live (bit i: row i is).
  __device__ __forceinline__ void gather(const char* const* rows, uint32_t tile,
                                         uint32_t live) const {
    constexpr int kRowStep = 32 / S::kChunks > 0 ? 32 / S::kChunks : 1;
    constexpr int kSteps = kRun / kRowStep, kAtOnce = kSteps < 8 ? kSteps : 8;
    const int chunk = lane_ % S::kChunks, first = lane_ / S::kChunks;
    // The first rows are of one group.
    const uint32_t to = tile + chunk_offset(first, chunk, kSwizzleBytes);
    const uint32_t live_here = live >> first;
    // Some addresses are read before the first copy, so that their latencies overlap.
#pragma unroll
    for (int step = 0; step < kSteps; step += kAtOnce) {
      const char* row[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) row[i] = rows[first + (step + i) * kRowStep];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        // That row's number and the first one's have no bit in common.
        const int further = (step + i) * kRowStep, of_group = further & 7;
        copy_async_once((to ^ of_group << 4) + further / 8 * S::kGroupBytes + of_group * 128,
                        row[i] + chunk * 16, live_here & 1 << further);
      }
    }
  }

  const Params& params_;
  Shared<kHeadDim>& shared_;
  Rows& rows_;
  const int warp_, lane_;
  bool in_turn_ = false;
  RingPlace<S::kStages> stage_;
  RingPlace<S::kStages> common_;  // the list's last place that both consumers free
};

}  // namespace flashinfer_ops::sm90
