// Step 6 of the planner (planner.h): the tables of units, and who takes which.
#pragma once

#include "cuda/planner.h"

namespace flashinfer_ops::gpu {

struct alignas(16) Words {
  int32_t words[4];
};

// Units, then the lists of a packed schedule, which repeat their first items' units.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE void Planner<Block, Memory>::write_units(int num_units) {
  const int matrix_units = tile_units[num_tiles];
  const int num_lists = in.packed ? kLists * in.num_sms : 0;
  FLASHINFER_OPS_ROLLED
  for (int i = block.cluster_thread(); i < num_units + num_lists; i += block.cluster_size()) {
    ItemList* list = nullptr;
    ItemRange range;
    int u = i;
    if (i >= num_units) {
      const int l = divide(i - num_units, in.num_sms), cta = i - num_units - l * in.num_sms;
      list = table<ItemList>(layout.list_at) + l * kMaxCtas + cta;
      range = item_range(l, cta, matrix_units, num_units - matrix_units);
      u = first_unit(range, matrix_units);
    }
    if (u >= 0 && u < matrix_units) {
      const MatrixUnit unit = matrix_unit(u);
      range.has_kv = unit.tokens > 0 && unit.segment_end > unit.segment_begin;
      range.level = unit.level;
      range.page_begin = unit.page_begin;
      range.kv_begin = unit.first_kv;
      range.kv_end = unit.first_end;
      *(list != nullptr ? reinterpret_cast<MatrixUnit*>(list->unit)
                        : table<MatrixUnit>(layout.matrix_at) + u) = unit;
    } else if (u >= 0) {
      const StreamUnit unit = stream_unit(u - matrix_units);
      range.has_kv = unit.kv_end > unit.kv_begin;
      range.level = unit.level;
      range.page_begin = unit.page_begin;
      range.kv_begin = unit.kv_begin;
      range.kv_end = unit.kv_end;
      *(list != nullptr ? reinterpret_cast<StreamUnit*>(list->unit)
                        : table<StreamUnit>(layout.stream_at) + u - matrix_units) = unit;
    }
    if (list != nullptr) {
      // A kernel loads a list as a whole.
      const int words = u < 0 ? 0 : u < matrix_units ? 16 : 8;
      FLASHINFER_OPS_ROLLED
      for (int w = words; w < 16; w += 4) *reinterpret_cast<Words*>(list->unit + w) = {};
      list->items = range;
    }
  }
}

// The unit of a list's first item, or -1; matrix units come before stream units.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE int Planner<Block, Memory>::first_unit(ItemRange& range,
                                                               int matrix_units) const {
  if (range.item >= range.num_items) return -1;
  const int item = range.item - range.num_matrix;
  if (item >= 0) {
    const int unit = divide(item, in.num_kv_heads);
    range.head = item - unit * in.num_kv_heads;
    return matrix_units + unit;
  }
  range.head = divide(range.item, range.units_a_head);
  const int place = range.item - range.head * range.units_a_head, unit = divide(place, range.parts);
  range.part = place - unit * range.parts;
  return unit;
}

// List 0 holds pair items, list 1 + c the items of consumer c.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE ItemRange Planner<Block, Memory>::item_range(int l, int cta,
                                                                     int matrix_units,
                                                                     int stream_units) const {
  constexpr int kConsumers = kLists - 1;
  const int ctas = in.num_sms, rows = tile_tokens * in.group_size;
  const bool are_pairs = rows > kStreamRows, is_pairs = l == 0;
  const int parts = are_pairs ? ceil_div(rows, kTileRows) : 1;
  // Matrix units that are pair items go to the first CTAs, if not to all; the others begin with
  // stream units. What is left goes on where a CTA has a pair item less.
  const int matrix_ctas = are_pairs ? max_int(sharing.matrix_ctas, 1) : ctas;
  const int others = ctas - matrix_ctas, other = cta - matrix_ctas;
  const int ahead = is_pairs ? 0 : sharing.stream_rounds * kConsumers * others;
  const int turn = cta - (are_pairs ? sharing.first_free : 0), consumer = l - 1;
  const bool begins = other >= 0 && ahead > 0;
  ItemRange range{};
  range.units_a_head = matrix_units * parts;
  range.parts = parts;
  range.num_matrix = is_pairs == are_pairs ? range.units_a_head * in.num_kv_heads : 0;
  range.num_items = range.num_matrix + (is_pairs ? 0 : stream_units * in.num_kv_heads);
  range.rest = ahead + (turn < 0 ? turn + ctas : turn) + consumer * ctas;
  range.stride = is_pairs ? matrix_ctas : kConsumers * ctas;
  range.ahead_stride = begins ? kConsumers * others : 0;
  range.ahead_end = begins ? ahead : 0;
  range.item = is_pairs ? (other < 0 ? cta : range.num_items)
               : begins ? other + consumer * others
                        : range.rest;
  return range;
}

template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE MatrixUnit Planner<Block, Memory>::matrix_unit(int u) const {
  const int tile = count_up_to(tile_units, num_tiles, u) - 1;
  const int rank = u - tile_units[tile], states = tile_units[tile + 1] - tile_units[tile];
  const Counts at = tile_first[tile], next = tile_first[tile + 1];
  const Walk walk = tile_walks[tile];
  const int gathered = blocks_of((next.granules - at.granules) * kGranule) * kBlock;
  const int run = ceil_div(walk.blocks, states) * kBlock;
  const int begin = rank * run, end = min_int(begin + run, gathered + tile_counts[tile].tokens);
  const int scratch = tile_scratch[tile];
  MatrixUnit unit{};
  unit.row_begin = tile_row[tile];
  unit.row_end = tile_row[tile + 1];
  unit.partial_row = scratch < 0 ? -1 : scratch + rank * walk.rows;
  unit.granule_begin = min_int(at.granules + begin / kGranule, next.granules);
  unit.granule_end = min_int(at.granules + min_int(end, gathered) / kGranule, next.granules);
  if (end > gathered && next.plain > at.plain) {
    const int first = max_int(begin - gathered, 0), last = end - gathered;
    const auto* segments = table<const Segment>(layout.segment_at) + at.plain;
    const Found found =
        count_up_to(segment_walk + at.plain, next.plain - at.plain, first, last - 1);
    const Segment segment = segments[found.x - 1], other = segments[found.y - 1];
    unit.segment_begin = at.plain + found.x - 1;
    unit.segment_end = at.plain + found.y;
    unit.first_kv = first - segment.walk;
    unit.last_kv = min_int(last - other.walk, other.kv_end);
    unit.level = segment.level;
    unit.page_begin = segment.page_begin;
    unit.segment_row_begin = segment.row_begin;
    unit.segment_row_end = segment.row_end;
    unit.diagonal = segment.diagonal;
    unit.first_end = found.x == found.y ? unit.last_kv : segment.kv_end;
    unit.tokens = last - first;
  }
  return unit;
}

template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE StreamUnit Planner<Block, Memory>::stream_unit(int u) const {
  const int o = count_up_to(own_units, num_own, u) - 1;
  const int state = u - own_units[o], states = own_units[o + 1] - own_units[o];
  const Piece x = own_piece(o);
  const Walk walk = own_walks[o];
  const int run = ceil_div(walk.blocks, states) * kBlock;
  const int rows = tile_walks[x.tile].rows, scratch = tile_scratch[x.tile];
  return {x.row_begin,
          x.row_end,
          scratch < 0 ? -1 : scratch + (walk.rank + state) * rows + x.row_begin - tile_row[x.tile],
          x.level,
          first_page(x),
          state * run,
          min_int((state + 1) * run, x.kv_end),
          x.diagonal};
}

}  // namespace flashinfer_ops::gpu
