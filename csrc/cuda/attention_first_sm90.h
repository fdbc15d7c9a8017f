// A producer warp's first block, straight from the list of items.
#pragma once

#include "cuda/attention_lookup_sm90.h"

namespace flashinfer_ops::sm90 {

// The block behind `others` of a list, if all of it is in the first item's first segment: with as
// little as possible before its page numbers, and then its keys, are asked for.
template <bool kBulk>
class FirstBlock {
 public:
  __device__ __forceinline__ FirstBlock(const Params& params, bool pairs, int32_t words, int lane)
      : params_(params), pairs_(pairs), words_(words), lane_(lane) {}

  // False where there is no such block, or the item has no rows.
  __device__ __forceinline__ bool look_up(int others, Block& block) {
    const int level = word(words_, list::kLevel), page_begin = word(words_, list::kPageBegin);
    const int kv_begin = word(words_, list::kKvBegin), kv_end = word(words_, list::kKvEnd);
    position_ = kv_begin + others * kColumns;
    const int32_t* indices = params_.kv_indices[level];
    block.item = make_item(params_, word(words_, 0), word(words_, 1), word(words_, 2),
                           word(words_, list::kHead), word(words_, list::kPart));
    const int first_token =
        block.item.first_token + params_.group_size.divide(block.item.first_packed);
    const bool has_rows = first_token < block.item.end_token;
    if (__any_sync(~0u, position_ + kColumns > kv_end || !has_rows)) return false;
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      Column& column = block.columns[c];
      const int token = position_ + 32 * c + lane_, page = params_.page_size.divide(token);
      column.slot = token - page * static_cast<int>(params_.page_size.divisor);
      column.page = load_now(indices + (page_begin + page));
      column.live = true;
    }
    // What is not needed for these comes behind them.
    __syncwarp();
    block.bulk = bulk_runs<kBulk>(params_, position_);
    return true;
  }

  // What consumers must know of it.
  __device__ __forceinline__ void describe_to(Block& block) const {
    const bool is_matrix = word(words_, list::kItem) < word(words_, list::kMatrix);
    const int rows_at = is_matrix ? 11 : 0;
    const int kv_begin = word(words_, list::kKvBegin), kv_end = word(words_, list::kKvEnd);
    const Segment its{nullptr,
                      kv_end,
                      word(words_, rows_at),
                      word(words_, rows_at + 1),
                      word(words_, is_matrix ? 13 : 7),
                      0};
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      const int token = position_ + 32 * c + lane_;
      block.columns[c].seen_by = make_int2(max(its.row_begin, token - its.diagonal), its.row_end);
    }
    const int end = is_matrix ? kv_begin + word(words_, 15) : kv_end;
    const Tokens tokens = tokens_of(params_, block.item, pairs_);
    describe<kBulk>(params_, its, position_, kColumns, end, true, tokens, pairs_, block);
    if (pairs_) {
      const Split split = split_of(params_, block.item, tokens);
      block.flags |= unseen(tokens, split, its.row_begin, its.row_end);
    }
  }

 private:
  const Params& params_;
  const bool pairs_;
  const int32_t words_;
  const int lane_;
  int position_;
};

}  // namespace flashinfer_ops::sm90
