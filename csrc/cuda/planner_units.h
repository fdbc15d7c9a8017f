// Step 6 of the planner (planner.h): the tables of units.
#pragma once

#include "cuda/planner.h"

namespace flashinfer_ops::gpu {

template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE void Planner<Block, Memory>::write_units(int num_units) {
  const int matrix_units = tile_units[num_tiles];
  FLASHINFER_OPS_ROLLED
  for (int u = block.thread(); u < num_units; u += block.size()) {
    if (u < matrix_units) {
      write_matrix_unit(u);
    } else {
      write_stream_unit(u - matrix_units);
    }
  }
}

template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE void Planner<Block, Memory>::write_matrix_unit(int u) {
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
  table<MatrixUnit>(layout.matrix_at)[u] = unit;
}

template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE void Planner<Block, Memory>::write_stream_unit(int u) {
  const int o = count_up_to(own_units, num_own, u) - 1;
  const int state = u - own_units[o], states = own_units[o + 1] - own_units[o];
  const Piece x = own_piece(o);
  const Walk walk = own_walks[o];
  const int run = ceil_div(walk.blocks, states) * kBlock;
  const int rows = tile_walks[x.tile].rows, scratch = tile_scratch[x.tile];
  table<StreamUnit>(layout.stream_at)[u] = {
      x.row_begin,
      x.row_end,
      scratch < 0 ? -1 : scratch + (walk.rank + state) * rows + x.row_begin - tile_row[x.tile],
      x.level,
      first_page(x),
      state * run,
      min_int((state + 1) * run, x.kv_end),
      x.diagonal};
}

}  // namespace flashinfer_ops::gpu
