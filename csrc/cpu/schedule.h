// The schedule that cascade_plan writes and cascade_attention reads on the CPU: one int32 tensor.
//
//   words [0, kHeaderWords)   Header
//   at header.tile_offset     Tile[max_tiles]         consecutive query rows (tokens, all heads)
//   at header.unit_offset     Unit[max_units]         the work units, those of one tile consecutive
//   at header.segment_offset  Segment[max_segments]   the KV that the units read, in the units'
//   order
//
// The three capacities are functions of the shapes of the index arrays alone (ScheduleCapacity), so
// the tensor's size never depends on what the arrays hold. A unit serves every KV head: the
// attention kernel runs each (unit, KV head) pair. A tile with one unit has its rows written
// straight to the output; the units of a tile with several write partial states, which are merged
// in the order of the units. Rows of tiles without units, and rows of no tile, get the empty state.
#pragma once

#include <cstdint>

namespace flashinfer_ops {

struct Header {
  int32_t num_tokens;  // query rows planned for; rows of q from here on get the empty state
  int32_t num_tiles;
  int32_t num_units;
  int32_t num_segments;
  int32_t num_partial_rows;  // token rows of scratch for partial states
  int32_t tile_offset;       // word offsets of the tables
  int32_t unit_offset;
  int32_t segment_offset;
};

struct Tile {
  int32_t row_begin;  // query tokens [row_begin, row_end)
  int32_t row_end;
  int32_t unit_begin;  // units [unit_begin, unit_end)
  int32_t unit_end;
};

struct Unit {
  int32_t tile;
  int32_t segment_begin;  // segments [segment_begin, segment_end)
  int32_t segment_end;
  int32_t partial_row;  // first scratch row of its partial state, or -1: rows go to the output
};

struct Segment {
  int32_t level;
  int32_t
      page_begin;    // kv_indptr[level][group]: where the group's pages start in kv_indices[level]
  int32_t kv_begin;  // KV tokens [kv_begin, kv_end) of the group
  int32_t kv_end;
  int32_t row_begin;  // the query tokens of the tile that see them
  int32_t row_end;
  int32_t diagonal;  // row sees KV token j when j <= row + diagonal; kNoDiagonal when not causal
  int32_t reserved;
};

constexpr int64_t kHeaderWords = 16;
constexpr int32_t kNoDiagonal = 1 << 30;

static_assert(sizeof(Header) <= kHeaderWords * sizeof(int32_t));
static_assert(sizeof(Tile) == 16 && sizeof(Unit) == 16 && sizeof(Segment) == 32);

}  // namespace flashinfer_ops
