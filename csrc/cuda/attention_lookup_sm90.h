// The lookup warps: which KV token each column of the next block is, where it lies, who sees it.
//
// Both warps go through the same items and blocks; a lane has one column of each block. The tokens
// of a unit are those of its segments, one after the other; a block takes the next 64 wherever
// segments begin, so that the short nodes of a tree fill a block together.
#pragma once

#include "cuda/attention_sm90.h"

namespace flashinfer_ops::sm90 {

// What a lane knows of its column while the page number is on its way.
struct Column {
  bool live;
  int32_t page, slot;
  int2 seen_by;
};

struct Block {
  int flags;
  Item item;
  Column column;
};

// One warp's way through the items of one list: unit by unit, block by block.
class Cursor {
 public:
  // `flags` says who serves the items of the list.
  __device__ __forceinline__ Cursor(const Params& params, int lane, const gpu::Header& header,
                                    int parts, int flags, int first, int stride, int num_matrix,
                                    int num_stream)
      : params_(params),
        lane_(lane),
        flags_(flags),
        rows_(flags == flag::kBoth ? 2 * kRows : kRows),
        parts_(parts),
        units_a_head_(header.num_matrix_units * parts),
        next_item_(first),
        stride_(stride),
        num_matrix_(num_matrix),
        num_items_(num_matrix + num_stream) {
    fetch();
  }

  // The next block of the list; false at its end. `place` is the lane's column.
  __device__ __forceinline__ bool next_block(int place, Block& block) {
    if (position_ >= end_ && !start_item()) return false;
    if (position_ >= window_end_) load_window();
    const int count = min(kColumns, window_end_ - position_);
    const int32_t* pages = pages_;
    int32_t kv_end = kv_end_, row_begin = row_begin_, row_end = row_end_;
    int32_t diagonal = diagonal_, walk = walk_;
    bool one_segment = true;
    if (window_size_ > 1) {
      // Bit j: a segment begins at column j, behind the first one.
      const int at = walk_ - position_;
      const bool mine = lane_ < window_size_;
      const int first = __popc(__ballot_sync(~0u, mine && at <= 0)) - 1;
      const uint32_t low = __reduce_or_sync(~0u, mine && at > 0 && at < 32 ? 1u << at : 0);
      const uint32_t high =
          __reduce_or_sync(~0u, mine && at >= 32 && at < kColumns ? 1u << (at - 32) : 0);
      one_segment = (low | high) == 0;
      const uint32_t up_to_mine = ~0u >> (31 - place % 32);
      const int segment =
          first + (place < 32 ? __popc(low & up_to_mine) : __popc(low) + __popc(high & up_to_mine));
      pages = reinterpret_cast<const int32_t*>(
          __shfl_sync(~0u, reinterpret_cast<uintptr_t>(pages_), segment));
      kv_end = word(kv_end_, segment);
      row_begin = word(row_begin_, segment);
      row_end = word(row_end_, segment);
      diagonal = word(diagonal_, segment);
      walk = word(walk_, segment);
    }
    const int token = position_ + place - walk;
    const int last = position_ + kColumns - 1 - walk;  // if all are of one segment
    const bool all_seen = one_segment && count == kColumns && last < kv_end &&
                          row_begin <= first_token_ && row_end > last_token_ &&
                          last <= first_token_ + diagonal;
    Column& column = block.column;
    // A segment may take more of the walk than its tokens, so that the next one begins evenly.
    column.live = place < count && token < kv_end;
    const int page = params_.page_size.divide(max(token, 0));
    column.slot = token - page * static_cast<int>(params_.page_size.divisor);
    column.page = column.live ? pages[page] : 0;
    column.seen_by =
        column.live ? make_int2(max(row_begin, token - diagonal), row_end) : make_int2(0, 0);
    block.item = item_;
    block.flags = flags_ | (all_seen ? 0 : flag::kMasked);
    position_ += count;
    if (position_ >= end_) block.flags |= flag::kLast;
    return true;
  }

 private:
  __device__ __forceinline__ static int32_t word(int32_t words, int i) {
    return __shfl_sync(~0u, words, i);
  }

  // Starts to load the next item's unit.
  __device__ __forceinline__ void fetch() {
    if (next_item_ >= num_items_) return;
    next_part_ = 0;
    next_is_matrix_ = next_item_ < num_matrix_;
    if (next_is_matrix_) {
      // Tiles of one head run together and share its KV in the L2 cache.
      next_head_ = next_item_ / units_a_head_;
      int unit = next_item_ - next_head_ * units_a_head_;
      if (parts_ > 1) {
        next_part_ = unit % parts_;
        unit /= parts_;
      }
      if (lane_ < 16) next_words_ = params_.schedule[params_.matrix_at + unit * 16 + lane_];
    } else {
      // One token's heads lie side by side in memory and are read at about the same time.
      const int item = next_item_ - num_matrix_, unit = params_.kv_heads.divide(item);
      next_head_ = item - unit * static_cast<int>(params_.kv_heads.divisor);
      if (lane_ < 8) next_words_ = params_.schedule[params_.stream_at + unit * 8 + lane_];
    }
  }

  // Makes the next item with rows and KV the present one; false at the end of the list.
  __device__ __forceinline__ bool start_item() {
    while (next_item_ < num_items_) {
      const int32_t words = next_words_;
      const bool is_matrix = next_is_matrix_;
      item_.first_token = word(words, 0);
      item_.end_token = min(word(words, 1), params_.num_rows);
      item_.partial_row = word(words, 2);
      item_.kv_head = next_head_;
      item_.first_packed = next_part_ * 2 * kRows;
      next_item_ += stride_;
      fetch();
      first_token_ = item_.first_token + params_.group_size.divide(item_.first_packed);
      last_token_ =
          min(item_.first_token +
                  static_cast<int>(params_.group_size.divide(item_.first_packed + rows_ - 1)),
              item_.end_token - 1);
      int first_kv, tokens, level, page_begin;
      if (is_matrix) {
        next_segment_ = word(words, 5);
        num_segments_ = word(words, 6) - next_segment_;
        first_kv = word(words, 7);
        level = word(words, 9);
        page_begin = word(words, 10);
        row_begin_ = word(words, 11);
        row_end_ = word(words, 12);
        diagonal_ = word(words, 13);
        kv_end_ = word(words, 14);
        tokens = word(words, 15);
      } else {
        next_segment_ = 0;
        num_segments_ = 1;
        level = word(words, 3);
        page_begin = word(words, 4);
        first_kv = word(words, 5);
        kv_end_ = word(words, 6);
        diagonal_ = word(words, 7);
        tokens = kv_end_ - first_kv;
        row_begin_ = item_.first_token;
        row_end_ = item_.end_token;
      }
      if (first_token_ > last_token_ || tokens <= 0 || num_segments_ <= 0) continue;
      if (num_segments_ == 1) {
        pages_ = params_.kv_indices[level] + page_begin;
        walk_ = 0;
        window_size_ = 1;
        position_ = first_kv;
        window_end_ = end_ = first_kv + tokens;
      } else {
        load_window();
        position_ = word(walk_, 0) + first_kv;
        end_ = position_ + tokens;
        if (num_segments_ == 0) window_end_ = end_;
      }
      return true;
    }
    return false;
  }

  // The next segments of the unit, one a lane.
  __device__ __forceinline__ void load_window() {
    window_size_ = min(num_segments_, 32);
    const auto* segments =
        reinterpret_cast<const int4*>(params_.schedule + params_.segment_at) + 2 * next_segment_;
    // Lanes behind the last segment hold that one too.
    const int mine = min(lane_, window_size_ - 1);
    const int4 kv = segments[2 * mine], rows = segments[2 * mine + 1];
    pages_ = params_.kv_indices[kv.x] + kv.y;
    kv_end_ = kv.w;
    row_begin_ = rows.x;
    row_end_ = rows.y;
    diagonal_ = rows.z;
    walk_ = rows.w;
    window_end_ = num_segments_ > window_size_ ? segments[2 * window_size_ + 1].w : end_;
    next_segment_ += window_size_;
    num_segments_ -= window_size_;
  }

  const Params& params_;
  const int lane_, flags_, rows_, parts_, units_a_head_;
  int next_item_;
  const int stride_, num_matrix_, num_items_;
  // The next item; its unit's words, one a lane.
  int32_t next_words_ = 0;
  int next_head_ = 0, next_part_ = 0;
  bool next_is_matrix_ = false;
  // The present one.
  Item item_;
  int first_token_ = 0, last_token_ = 0;
  int position_ = 0, end_ = 0;  // in the walk
  // A window of its segments, one a lane.
  int window_size_ = 0, window_end_ = 0, next_segment_ = 0, num_segments_ = 0;
  const int32_t* pages_ = nullptr;
  int32_t kv_end_ = 0, row_begin_ = 0, row_end_ = 0, diagonal_ = 0, walk_ = 0;
};

// Hands a warp's half of a block on: bulk copies of runs that are neighbours in a page, the rest to
// the gather warps, and what consumers must know.
template <int kHeadDim>
class Publisher {
 public:
  using S = Shape<kHeadDim>;

  __device__ __forceinline__ Publisher(const Params& params, Shared<kHeadDim>& shared, int warp,
                                       int lane)
      : params_(params), shared_(shared), warp_(warp), lane_(lane) {}

  __device__ __forceinline__ void publish(const Block& block) {
    const Column& column = block.column;
    // A page number outside of the cache reads some page of it, not other memory.
    const int page =
        min(static_cast<uint32_t>(column.page), static_cast<uint32_t>(params_.num_pages - 1));
    const int leader = lane_ & kRun;
    const int first_page = __shfl_sync(~0u, page, leader);
    const int first_slot = __shfl_sync(~0u, column.slot, leader);
    const bool neighbour =
        column.live && page == first_page && column.slot == first_slot + lane_ % kRun;
    const uint32_t neighbours = __ballot_sync(~0u, neighbour);
    const int bulk = !params_.has_tensor_maps
                         ? 0
                         : ((neighbours & 0xFFFF) == 0xFFFF) + 2 * (neighbours >> 16 == 0xFFFF);
    const bool mine_is_bulk = bulk >> (lane_ / kRun) & 1;

    barrier_wait(&shared_.k_empty[stage_.index], stage_.parity ^ 1);
    copy_runs(params_.k_map, shared_.k[stage_.index], shared_.k_full[stage_.index], bulk,
              block.item.kv_head, page, column.slot);

    barrier_wait(&shared_.entry_empty[place_.index], place_.parity ^ 1);
    Entry& entry = shared_.entries[place_.index];
    const int at = warp_ * 32 + lane_;
    entry.seen_by[at] = column.seen_by;
    if (!mine_is_bulk) {
      entry.k[at] = column.live ? offset(page, column.slot, block, params_.k_stride) : -1;
      entry.v[at] = column.live ? offset(page, column.slot, block, params_.v_stride) : -1;
    }
    if (lane_ == 0) entry.gathered[warp_] = bulk ^ 3;
    if (at == 0) {
      entry.flags = block.flags;
      entry.item = block.item;
    }
    __syncwarp();
    if (lane_ == 0) barrier_arrive(&shared_.entry_full[place_.index]);

    barrier_wait(&shared_.v_empty[stage_.index], stage_.parity ^ 1);
    copy_runs(params_.v_map, shared_.v[stage_.index], shared_.v_full[stage_.index], bulk,
              block.item.kv_head, page, column.slot);
    place_.advance();
    stage_.advance();
  }

  __device__ __forceinline__ void stop() {
    barrier_wait(&shared_.entry_empty[place_.index], place_.parity ^ 1);
    if (warp_ == 0 && lane_ == 0) shared_.entries[place_.index].flags = flag::kStop;
    __syncwarp();
    if (lane_ == 0) barrier_arrive(&shared_.entry_full[place_.index]);
  }

 private:
  __device__ __forceinline__ static int64_t offset(int64_t page, int64_t slot, const Block& block,
                                                   const CacheStrides& stride) {
    return page * stride.page + slot * stride.slot + block.item.kv_head * stride.head;
  }

  // The warp's arrival, its bulk copies, and the gather warp's arrivals where that has nothing to
  // do.
  __device__ __forceinline__ void copy_runs(const CUtensorMap& map, char* tile, uint64_t& full,
                                            int bulk, int head, int page, int slot) const {
    if (lane_ == 0) {
      barrier_arrive_expecting(&full, __popc(bulk) * kRun * kHeadDim * 2);
      if (bulk == 3) barrier_arrive(&full, 32);
    }
    __syncwarp();
    if (lane_ % kRun == 0 && bulk >> (lane_ / kRun) & 1) {
      const uint32_t to = shared_address(tile) + (warp_ * 32 + lane_) * 128;
#pragma unroll
      for (int atom = 0; atom < S::kAtoms; ++atom) {
        copy_box(to + atom * S::kAtomBytes, &map, atom * 64, slot, head, page, &full);
      }
    }
  }

  const Params& params_;
  Shared<kHeadDim>& shared_;
  const int warp_, lane_;
  RingPlace<kEntries> place_;
  RingPlace<S::kStages> stage_;
};

template <int kHeadDim>
__device__ __forceinline__ void look_up(const Params& params, Shared<kHeadDim>& shared, int warp,
                                        int lane) {
  const auto& header = *reinterpret_cast<const gpu::Header*>(params.schedule);
  const int heads = params.kv_heads.divisor, cta = blockIdx.x, grid = gridDim.x;
  const int tile_rows = header.tile_tokens * static_cast<int>(params.group_size.divisor);
  const bool pairs = tile_rows > kRows;
  const int parts = pairs ? (tile_rows + 2 * kRows - 1) / (2 * kRows) : 1;
  const int num_matrix = header.num_matrix_units * parts * heads;
  const int num_stream = header.num_stream_units * heads;
  const int num_pairs = pairs ? num_matrix : 0, num_solo_matrix = pairs ? 0 : num_matrix;
  // Solo items begin with the CTAs that have a pair item less.
  const int turn = cta < num_pairs % grid ? cta + grid - num_pairs % grid : cta - num_pairs % grid;
  Publisher<kHeadDim> publisher(params, shared, warp, lane);
  // But for the first, a block is handed on when the next one's page numbers are on their way.
  const int place = warp * 32 + lane;
  Block pending;
  bool started = false, have = false;
  const auto take = [&](Cursor& cursor) {
    Block block;
    if (!cursor.next_block(place, block)) return false;
    if (have) publisher.publish(pending);
    have = started;
    if (started) {
      pending = block;
    } else {
      publisher.publish(block);
    }
    started = true;
    return true;
  };
  if (num_pairs > 0) {
    Cursor pair(params, lane, header, parts, flag::kBoth, cta, grid, num_pairs, 0);
    while (take(pair)) {
    }
  }
  Cursor mine(params, lane, header, 1, flag::kConsumer0, turn, 2 * grid, num_solo_matrix,
              num_stream);
  Cursor other(params, lane, header, 1, flag::kConsumer1, turn + grid, 2 * grid, num_solo_matrix,
               num_stream);
  for (bool one = true, two = true; one || two;) {
    one = one && take(mine);
    two = two && take(other);
  }
  if (have) publisher.publish(pending);
  publisher.stop();
}

}  // namespace flashinfer_ops::sm90
