// Steps 1 and 2 of the planner (planner.h): groups into fast memory, tiles of rows.
#pragma once

#include "cuda/planner.h"

namespace flashinfer_ops::gpu {

// Of the i-th of the rows of groups, all levels'. Unrolled, it compares with constants.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE int Planner<Block, Memory>::level_of_row(int i) const {
  int level = 0;
  FLASHINFER_OPS_UNROLLED
  for (int l = 1; l < kMaxLevels; ++l) level += i >= in.first_row[l];
  return level;
}

template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE bool Planner<Block, Memory>::load_groups() {
  const int levels = in.num_levels, groups = in.first_group[levels];
  int32_t* live = memory.ints(kMaxLevels);  // groups of a level that have rows and KV
  longest_tile = memory.ints(1);
  rows_at = memory.ints(groups + levels);
  pages = memory.ints(groups + levels);
  lengths = memory.ints(groups);
  if (!memory.fits()) return false;
  // Copies are on their way together, however many levels there are.
  FLASHINFER_OPS_ROLLED
  for (int i = block.thread(); i < groups + levels; i += block.size()) {
    const int l = level_of_row(i), g = i - in.first_row[l];
    memory.copy(rows_at + i, in.qo_indptr[l] + g);
    memory.copy(pages + i, in.kv_indptr[l] + g);
    if (g < num_groups(l)) memory.copy(lengths + i - l, in.kv_last_page_len[l] + g);
  }
  FLASHINFER_OPS_ROLLED
  for (int l = block.thread(); l < levels; l += block.size()) live[l] = 0;
  if (block.thread() == 0) *longest_tile = 0;
  memory.wait();
  block.sync();

  bool bad = false;
  FLASHINFER_OPS_ROLLED
  for (int i = block.thread(); i < groups + levels; i += block.size()) {
    const int level = level_of_row(i);
    if (i - in.first_row[level] == num_groups(level)) continue;
    const int row = rows_at[i], next_row = rows_at[i + 1];
    const int64_t full = int64_t{pages[i + 1]} - pages[i] - 1;
    const int64_t slots = full * in.page_size + lengths[i - level];
    const int length = static_cast<int>(full < 0 || slots < 0 ? 0 : slots);
    bad |= row < 0 || row > next_row || slots > kMaxLength;
    lengths[i - level] = length;
    if (row < next_row && length > 0) block.add(live + level, 1);
  }
  bad = block.any(bad);

  // Tiles end where groups do: those of the deepest level that fill most of a tile on average.
  FLASHINFER_OPS_ROLLED
  for (int l = block.lane(); l < levels; l += block.num_lanes()) {
    const int n = num_groups(l), begin = level_rows(l)[0], end = level_rows(l)[n];
    num_tokens = max_int(num_tokens, end);
    const bool wide = (int64_t{end} - begin) * in.group_size >= int64_t{kAlignRows} * live[l];
    if (live[l] > 0 && wide && n + 2 <= layout.tiles - kBaseTiles / 2) align_level = l;
  }
  num_tokens = block.warp_max(num_tokens);
  align_level = block.warp_max(align_level);
  if (bad || num_tokens > kMaxRows) {
    num_tokens = 0;
    align_level = -1;
  }
  return true;
}

// Where the i-th of the intervals that tiles do not cross begins: the groups of a level, and the
// rows before and after.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE int Planner<Block, Memory>::border(int i) const {
  if (i == 0) return 0;
  return i > num_groups(align_level) + 1 ? num_tokens : level_rows(align_level)[i - 1];
}

template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE bool Planner<Block, Memory>::make_tiles() {
  const int intervals = align_level < 0 ? 1 : num_groups(align_level) + 2;
  // So many tokens that the number of tiles, with one more for each interval, stays within the
  // capacity; whole parts, as one that is nearly empty takes as long as a full one.
  const int most = static_cast<int>(layout.tiles) - intervals;
  const int wanted = in.tile_part * max_int(ceil_div(num_tokens, most * in.tile_part), 1);
  int32_t* interval_tile = memory.ints(intervals + 1);  // the first of its tiles
  if (!memory.fits()) return false;
  if (align_level < 0) {
    num_tiles = ceil_div(num_tokens, wanted);
    tile_tokens = num_tiles > 0 ? ceil_div(num_tokens, num_tiles) : 0;
  } else {
    const auto count = [&](int i, int (&value)[1]) {
      const int tokens = border(i + 1) - border(i);
      value[0] = tokens > 0 ? parts_of(tokens, wanted) : 0;
      const int longest = value[0] > 1 ? ceil_div(tokens, value[0]) : tokens;
      if (longest > *longest_tile) block.raise(longest_tile, longest);
    };
    const auto place = [&](int i, const int (&at)[1], const int (&)[1]) {
      interval_tile[i] = at[0];
    };
    int total[1];
    block.scan(intervals, count, place, total);
    if (block.thread() == 0) interval_tile[intervals] = total[0];
    num_tiles = total[0];
    block.sync();
    tile_tokens = *longest_tile;
  }
  const int rows = tile_tokens < kTileRows ? tile_tokens * in.group_size : kTileRows;
  tile_class = rows > 64 ? 0 : rows > 32 ? 1 : 2;

  tile_row = memory.ints(num_tiles + 1);
  entry_group = memory.ints(num_tiles * in.num_levels);
  entry_piece = memory.ints(num_tiles * (in.num_levels + 1));
  tile_counts = reinterpret_cast<Counts*>(memory.ints(4 * num_tiles));
  tile_first = reinterpret_cast<Counts*>(memory.ints(4 * (num_tiles + 1)));
  tile_walks = reinterpret_cast<Walk*>(memory.ints(4 * num_tiles));
  tile_ranks = memory.ints(num_tiles);
  tile_units = memory.ints(num_tiles + 1);
  tile_scratch = memory.ints(num_tiles);
  run_sums = reinterpret_cast<RunSums*>(memory.ints(8 * kCandidates));
  longest_own = memory.ints(1);
  if (!memory.fits()) return false;
  FLASHINFER_OPS_ROLLED
  for (int t = block.thread(); t <= num_tiles; t += block.size()) {
    int begin = 0, end = num_tokens, first = 0, n = num_tiles;
    if (align_level >= 0 && t < num_tiles) {
      const int i = count_up_to(interval_tile, intervals, t) - 1;
      begin = border(i);
      end = border(i + 1);
      first = interval_tile[i];
      n = interval_tile[i + 1] - first;
    }
    const int index = t - first,
              even = n > 1 && t < num_tiles ? divide(end - begin, n) : end - begin;
    tile_row[t] =
        t == num_tiles ? num_tokens : begin + even * index + min_int(index, end - begin - even * n);
  }
  block.sync();
  return true;
}

}  // namespace flashinfer_ops::gpu
