// What a producer warp looks up: which KV token each column of a block is, where it lies, who sees
// it.
//
// All producer warps go through the same items and blocks; the columns of a block are looked up by
// the warp that copies it. The tokens of a unit are those of its segments, one after the other; a
// block takes the next 64 wherever segments begin, so that the short nodes of a tree fill a block
// together.
#pragma once

#include <cstddef>

#include "cuda/attention_sm90.h"

namespace flashinfer_ops::sm90 {

constexpr int kLaneColumns = kColumns / 32;  // a lane's: its own number, and 32 behind that

// What a lane knows of a column while the page number is on its way.
struct Column {
  bool live;
  int32_t page, slot;
  int2 seen_by;
};

// Words of an ItemList.
namespace list {
constexpr int kHead = 16, kPart = 17, kHasKv = 18, kItem = 19, kAheadStride = 20, kAheadEnd = 21;
constexpr int kRest = 22, kStride = 23, kItems = 24, kMatrix = 25, kUnitsAHead = 26, kParts = 27;
constexpr int kLevel = 28, kPageBegin = 29, kKvBegin = 30, kKvEnd = 31;
static_assert(offsetof(gpu::ItemList, items) == 4 * kHead);
static_assert(offsetof(gpu::ItemRange, kv_end) == 4 * (kKvEnd - kHead));
}  // namespace list

// Of words that a warp holds, one a lane.
__device__ __forceinline__ int32_t word(int32_t words, int i) { return __shfl_sync(~0u, words, i); }

constexpr int kAllRuns = (1 << kRuns) - 1;

struct Block {
  int flags;
  int plain;
  int bulk;  // bit r: run r is neighbours in a page; -1 where that is not known
  Item item;
  Column columns[kLaneColumns];
};

// A piece of the walk: its pages, its tokens up to kv_end, who sees them, where token 0 would be.
struct Segment {
  const int32_t* pages;
  int32_t kv_end, row_begin, row_end, diagonal, walk;
};

// Whether the runs of a block that is 64 tokens of one segment are neighbours in pages, where that
// is known beforehand; else -1.
template <bool kBulk>
__device__ __forceinline__ int bulk_runs(const Params& params, int position) {
  if (!kBulk) return 0;
  return params.even_pages && position % kRun == 0 ? kAllRuns : -1;
}

// The first consumer's last query token, and the second one's first.
struct Split {
  int32_t first_last, second_first;
};
__device__ __forceinline__ Split split_of(const Params& params, const Item& item,
                                          const Tokens& tokens) {
  const auto token = [&](int row) {
    return item.first_token + static_cast<int>(params.group_size.divide(item.first_packed + row));
  };
  // A consumer without rows counts as the item's last one.
  return {token(kRows - 1), min(token(kRows), tokens.last)};
}

// Flags of consumers none of whose rows are in [row_begin, row_end). None where all of the item's
// rows are, as nobody asks for the flags of plain blocks.
__device__ __forceinline__ int unseen(const Tokens& tokens, const Split& split, int row_begin,
                                      int row_end) {
  const bool by_first = row_end > tokens.first && row_begin <= split.first_last;
  const bool by_second = row_end > split.second_first && row_begin <= tokens.last;
  return (by_first ? 0 : flag::kUnseen) | (by_second ? 0 : 2 * flag::kUnseen);
}

// What holds for the `count` columns from `position` of a walk that ends at `end`. `its`: the
// segment of the lane's last column; `is_whole`: all 64 columns are tokens of that one.
template <bool kBulk>
__device__ __forceinline__ void describe(const Params& params, const Segment& its, int position,
                                         int count, int end, bool is_whole, const Tokens& tokens,
                                         bool pairs, Block& block) {
  const int last = position + kColumns - 1 - its.walk;
  const bool all_rows = its.row_begin <= tokens.first && its.row_end > tokens.last;
  const bool all_seen = is_whole && all_rows && last <= tokens.first + its.diagonal;
  block.flags = (pairs ? flag::kPair : 0) | (all_seen ? 0 : flag::kMasked);
  if (position + count >= end) block.flags |= flag::kLast;
  // Plain blocks behind this one, in the segment of the lane's last column; what lane 31 finds is
  // of the block's. A last block is none, so that a consumer need not ask.
  const bool may_have = pairs && all_rows && count == kColumns &&
                        bulk_runs<kBulk>(params, position - its.walk) == kAllRuns;
  const int seen_up_to = min(its.kv_end, tokens.first + its.diagonal + 1) + its.walk;
  const int plain = max(min(seen_up_to, end - 1) - (position + kColumns), 0) / kColumns;
  block.plain = word(may_have ? plain : 0, 31);
}

// Flags of consumers whose rows see none of the block's columns, of several segments.
__device__ __forceinline__ int unseen(const Tokens& tokens, const Split& split,
                                      const Block& block) {
  int row_begin = INT32_MAX, row_end = 0;
#pragma unroll
  for (const Column& column : block.columns) {
    if (column.live) row_begin = min(row_begin, column.seen_by.x);
    row_end = max(row_end, column.seen_by.y);
  }
  return unseen(tokens, split, __reduce_min_sync(~0u, row_begin), __reduce_max_sync(~0u, row_end));
}

// One warp's way through the items of one list: unit by unit, block by block.
template <bool kBulk>
class Cursor {
 public:
  // Registers are few: a lane holds one word of the list's.
  // The list's first `blocks` blocks, all of the first item, were looked up.
  __device__ __forceinline__ Cursor(const Params& params, bool pairs, int32_t list_words, int lane,
                                    int blocks)
      : params_(params),
        pairs_(pairs),
        list_words_(list_words),
        lane_(lane),
        next_item_(word(list_words, list::kItem)),
        next_words_(list_words),
        next_head_(word(list_words, list::kHead)),
        next_part_(word(list_words, list::kPart)),
        next_is_matrix_(next_item_ < word(list_words, list::kMatrix)),
        looked_up_(blocks > 0),
        skipped_(blocks * kColumns) {}

  // Passes over `others` blocks, takes them off that number, and looks up the one behind them;
  // false where the list ends before.
  __device__ __forceinline__ bool next_block(int& others, Block& block) {
    for (;;) {
      // The next item's unit is on its way early, but not before the warp's first block.
      if (looked_up_ || position_ >= end_) fetch_ahead();
      if (position_ >= end_) {
        if (!start_item()) return false;
        continue;
      }
      if (position_ >= window_end_) load_window();
      if (others == 0) break;
      const int passed = min(others, (window_end_ - position_ + kColumns - 1) / kColumns);
      position_ = min(position_ + passed * kColumns, window_end_);
      others -= passed;
    }
    const int count = min(kColumns, window_end_ - position_);
    look_up(count, block);
    position_ += count;
    looked_up_ = true;
    return true;
  }

 private:
  __device__ __forceinline__ Segment segment(int i) const {
    const auto pages = __shfl_sync(~0u, reinterpret_cast<uintptr_t>(mine_.pages), i);
    return {reinterpret_cast<const int32_t*>(pages),
            word(mine_.kv_end, i),
            word(mine_.row_begin, i),
            word(mine_.row_end, i),
            word(mine_.diagonal, i),
            word(mine_.walk, i)};
  }

  __device__ __forceinline__ void look_up(int count, Block& block) const {
    Segment its = mine_;
    const int at = mine_.walk - position_;
    const bool may_begin = window_size_ > 1 && lane_ < window_size_ && at > 0 && at < kColumns;
    const bool several = window_size_ > 1 && __any_sync(~0u, may_begin);
    int index = 0;  // of the segment that the columns begin in
    if (window_size_ > 1) {
      index = __popc(__ballot_sync(~0u, lane_ < window_size_ && at <= 0)) - 1;
      if (!several) its = segment(index);
    }
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      if (several) {
        // Bit j: a segment begins at column j, behind the first one.
        const int bit = at - 32 * c;
        const bool begins_here = may_begin && bit >= 0 && bit < 32;
        const uint32_t begins = __reduce_or_sync(~0u, begins_here ? 1u << bit : 0);
        its = segment(index + __popc(begins & ~0u >> (31 - lane_)));
        index += __popc(begins);
      }
      const int place = 32 * c + lane_, token = position_ + place - its.walk;
      Column& column = block.columns[c];
      // A segment may take more of the walk than its tokens, so that the next one begins evenly.
      column.live = place < count && token < its.kv_end;
      const int page = params_.page_size.divide(max(token, 0));
      column.slot = column.live ? token - page * static_cast<int>(params_.page_size.divisor) : 0;
      column.page = column.live ? __ldg(its.pages + page) : 0;
      column.seen_by = column.live
                           ? make_int2(max(its.row_begin, token - its.diagonal), its.row_end)
                           : make_int2(0, 0);
    }
    const bool is_whole =
        count == kColumns && !several && position_ + kColumns - its.walk <= its.kv_end;
    block.item = item_;
    const Tokens tokens{first_token_, last_token_};
    describe<kBulk>(params_, its, position_, count, end_, is_whole, tokens, pairs_, block);
    if (pairs_) {
      if (!kBulk) {
        block.flags |= unseen(tokens, split_, block);
      } else {
        const Split split = split_of(params_, item_, tokens);
        block.flags |= several ? unseen(tokens, split, block)
                               : unseen(tokens, split, its.row_begin, its.row_end);
      }
    }
    const bool has_runs = params_.even_pages && (position_ - its.walk) % kRun == 0;
    block.bulk = !kBulk ? 0 : is_whole && has_runs ? kAllRuns : -1;
  }

  // Starts to load the unit of the item behind the present one, if that was not done.
  __device__ __forceinline__ void fetch_ahead() {
    if (fetched_) return;
    fetched_ = true;
    const int ahead_end = word(list_words_, list::kAheadEnd);
    const bool is_ahead = next_item_ < ahead_end;
    next_item_ += word(list_words_, is_ahead ? list::kAheadStride : list::kStride);
    if (is_ahead && next_item_ >= ahead_end) next_item_ = word(list_words_, list::kRest);
    fetch();
  }

  // Starts to load the next item's unit.
  __device__ __forceinline__ void fetch() {
    if (next_item_ >= word(list_words_, list::kItems)) return;
    next_part_ = 0;
    next_is_matrix_ = next_item_ < word(list_words_, list::kMatrix);
    if (next_is_matrix_) {
      // Tiles of one head run together and share its KV in the L2 cache.
      const int units_a_head = word(list_words_, list::kUnitsAHead);
      const int parts = word(list_words_, list::kParts);
      // The quotient is small, so that its float is off by one at most; a division takes longer.
      const float head = __fdividef(static_cast<float>(next_item_), units_a_head);
      next_head_ = word(static_cast<int>(head), 0);  // which tells the compiler that lanes agree
      int unit = next_item_ - next_head_ * units_a_head;
      const int off = unit < 0 ? -1 : unit >= units_a_head;
      next_head_ += off;
      unit -= off * units_a_head;
      if (parts > 1) {
        next_part_ = unit % parts;
        unit /= parts;
      }
      if (lane_ < 16) next_words_ = params_.schedule[params_.matrix_at + unit * 16 + lane_];
    } else {
      // One token's heads lie side by side in memory and are read at about the same time.
      const int item = next_item_ - word(list_words_, list::kMatrix),
                unit = params_.kv_heads.divide(item);
      next_head_ = item - unit * static_cast<int>(params_.kv_heads.divisor);
      if (lane_ < 8) next_words_ = params_.schedule[params_.stream_at + unit * 8 + lane_];
    }
  }

  // Makes the next item, whose unit was fetched, the present one; false at the end of the list. An
  // item without rows or KV ends where it begins.
  __device__ __forceinline__ bool start_item() {
    if (next_item_ >= word(list_words_, list::kItems)) return false;
    const int32_t words = next_words_;
    item_ =
        make_item(params_, word(words, 0), word(words, 1), word(words, 2), next_head_, next_part_);
    fetched_ = false;
    const Tokens its = tokens_of(params_, item_, pairs_);
    first_token_ = its.first;
    last_token_ = its.last;
    if (!kBulk) split_ = split_of(params_, item_, its);
    int level, page_begin;
    if (next_is_matrix_) {
      next_segment_ = word(words, 5);
      num_segments_ = word(words, 6) - next_segment_;
      first_kv_ = word(words, 7);
      level = word(words, 9);
      page_begin = word(words, 10);
      mine_.row_begin = word(words, 11);
      mine_.row_end = word(words, 12);
      mine_.diagonal = word(words, 13);
      mine_.kv_end = word(words, 14);
      tokens_ = word(words, 15);
    } else {
      num_segments_ = 1;
      level = word(words, 3);
      page_begin = word(words, 4);
      first_kv_ = word(words, 5);
      mine_.kv_end = word(words, 6);
      mine_.diagonal = word(words, 7);
      tokens_ = mine_.kv_end - first_kv_;
      mine_.row_begin = item_.first_token;
      mine_.row_end = item_.end_token;
    }
    const bool has_blocks = first_token_ <= last_token_ && tokens_ > 0 && num_segments_ > 0;
    if (num_segments_ == 1) {
      mine_.pages = params_.kv_indices[level] + page_begin;
      mine_.walk = 0;
      window_size_ = 1;
      position_ = first_kv_ + skipped_;
      window_end_ = end_ = has_blocks ? first_kv_ + tokens_ : position_;
      skipped_ = 0;
    } else {
      // Where it begins in the walk is known with the first window.
      position_ = window_end_ = 0;
      end_ = has_blocks;
    }
    return true;
  }

  // The next segments of the unit, one a lane.
  __device__ __forceinline__ void load_window() {
    window_size_ = min(num_segments_, 32);
    const auto* segments =
        reinterpret_cast<const int4*>(params_.schedule + params_.segment_at) + 2 * next_segment_;
    // Lanes behind the last segment hold that one too.
    const int mine = min(lane_, window_size_ - 1);
    const int4 kv = segments[2 * mine], rows = segments[2 * mine + 1];
    mine_ = {params_.kv_indices[kv.x] + kv.y, kv.w, rows.x, rows.y, rows.z, rows.w};
    prefetch_line(mine_.pages);
    if (tokens_ > 0) {
      position_ = word(mine_.walk, 0) + first_kv_;
      end_ = position_ + tokens_;
      position_ += skipped_;
      tokens_ = skipped_ = 0;
    }
    window_end_ = num_segments_ > window_size_ ? segments[2 * window_size_ + 1].w : end_;
    next_segment_ += window_size_;
    num_segments_ -= window_size_;
  }

  const Params& params_;
  const bool pairs_;
  const int32_t list_words_;
  const int lane_;
  // The next item; its unit's words, one a lane.
  int next_item_;
  int32_t next_words_;
  int next_head_, next_part_;
  bool next_is_matrix_;
  bool fetched_ = true, looked_up_;
  int skipped_;  // tokens of the first item that were looked up before
  // The present one.
  Item item_;
  int first_token_ = 0, last_token_ = 0;
  Split split_{};
  int position_ = 0, end_ = 0;  // in the walk
  int first_kv_ = 0, tokens_ = 0;
  // A window of its segments, one a lane.
  int window_size_ = 0, window_end_ = 0, next_segment_ = 0, num_segments_ = 0;
  Segment mine_{};
};

}  // namespace flashinfer_ops::sm90
