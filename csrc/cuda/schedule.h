// The schedule that cascade_plan writes and cascade_attention reads on a GPU: one int32 tensor.
//
//   header | item lists | tiles | matrix units | stream units | segments | own pieces |
//   planner's work space
//
// The query rows are cut into tiles of about 128 packed rows. What a tile's rows see is either
// walked by the tile's matrix units, all its rows at once, or belongs to an own piece: a group's
// rows and KV within the tile, with stream units of its own.
//
//   MatrixUnit   a tile and a run of its walk: first granules, then segments
//   Segment      KV tokens of one group that the tile's rows, or some of them, see
//   granule      a Segment of at most kGranule tokens; four of them fill a block of columns, so
//                that short nodes of a tree share the block's product
//   StreamUnit   an own piece, of up to kStreamRows packed rows, and a run of its KV
//   OwnPiece     rows of a tile and the number and first rank of the states they have from it
//
// A walk is measured in tokens and cut at multiples of kBlock. Schedules are of two classes:
//
//   packed       for Hopper's own kernel: no granules; a walk is its segments' tokens one after the
//                other, so that a block may hold the tail of one segment and the heads of others;
//                where pages hold a multiple of kGranule tokens, a segment takes a multiple too
//   not packed   short pieces are granules; each segment begins with a block of its own, so that
//                the walk counts whole blocks
//
// A row's states have ranks: those of its tile's matrix units first, then its own pieces', level by
// level. A tile with more than one rank has scratch rows for partial states, [rank][row of tile].
//
// The capacities are functions of the shapes of the index arrays alone; the same sums stand in
// `_gpu_schedule` in meta/plan.py.
#pragma once

#include <cstdint>

namespace flashinfer_ops::gpu {

constexpr int kMaxLevels = 16;
constexpr int kHeaderWords = 16;
constexpr int kBaseTiles = 256;
constexpr int kExtraUnits = 1024;
constexpr int kBasePartialRows = 2048;
constexpr int kBlock = 64;       // columns of a product: the step in which a walk is cut
constexpr int kGranule = 16;     // columns
constexpr int kStreamRows = 64;  // packed rows of a stream unit
constexpr int32_t kNoDiagonal = 1 << 30;
constexpr int kMaxCtas = 144;  // of Hopper's own kernel: the SMs of the largest such chip
constexpr int kLists = 3;      // of a CTA

struct Header {
  int32_t num_tokens;  // query rows planned for; rows of q from here on get the empty state
  int32_t num_tiles;
  int32_t tile_tokens;  // the most tokens a tile has
  int32_t num_matrix_units;
  int32_t num_stream_units;
  int32_t num_partial_rows;
  int32_t stream_tokens;  // query tokens that a stream unit has at most
  int32_t merges;         // 0 where each planned row has exactly one state
  int32_t reserved[8];
};

struct alignas(16) Tile {
  int32_t row_begin;  // query tokens [row_begin, row_end)
  int32_t row_end;
  int32_t num_matrix_states;  // ranks [0, num_matrix_states) are the tile's matrix units'
  int32_t partial_row;        // first scratch row, or -1: every state goes to the output
  int32_t own_begin;          // own pieces [own_begin, own_end)
  int32_t own_end;
  int32_t num_ranks;
  int32_t reserved;
};

struct alignas(16) MatrixUnit {
  int32_t row_begin;  // query tokens of the tile
  int32_t row_end;
  int32_t partial_row;  // scratch row of row_begin's state, or -1: to the output
  int32_t granule_begin;
  int32_t granule_end;
  int32_t segment_begin;
  int32_t segment_end;
  int32_t first_kv;  // where the first segment's KV starts for this unit,
  int32_t last_kv;   // and where the last one's ends
  // The first segment, so that a kernel starts without loading it; zero where there is none.
  int32_t level;
  int32_t page_begin;
  int32_t segment_row_begin;
  int32_t segment_row_end;
  int32_t diagonal;
  int32_t first_end;  // where its KV ends for this unit
  int32_t tokens;     // of the walk in this unit's segments
};

struct alignas(16) StreamUnit {
  int32_t row_begin;  // query tokens
  int32_t row_end;
  int32_t partial_row;  // as above
  int32_t level;
  int32_t page_begin;
  int32_t kv_begin;
  int32_t kv_end;
  int32_t diagonal;
};

struct alignas(16) Segment {
  int32_t level;
  int32_t page_begin;  // kv_indptr[level][group]: where the group's pages start in kv_indices
  int32_t kv_begin;    // KV tokens [kv_begin, kv_end) of the group
  int32_t kv_end;
  int32_t row_begin;  // the query tokens that see them
  int32_t row_end;
  int32_t diagonal;  // row sees KV token j when j <= row + diagonal; kNoDiagonal when not causal
  int32_t walk;      // tokens of the tile's walk before this segment, after the granules'; 0 in one
};

// Of a packed schedule, what one CTA of Hopper's kernel does. An item is a unit, a part of its rows
// and a KV head; those of matrix units come first, by head, unit and part, then those of stream
// units, by unit and head. A CTA has three lists: pair items, of tiles with more than kStreamRows
// packed rows, which both of its consumers serve; then the items of each consumer alone. A list is
// the items `item`, item + ahead_stride, ... below ahead_end, then rest, rest + stride, ... below
// num_items. Its first item is here as a whole: one load, and a kernel can begin.
struct alignas(16) ItemRange {
  int32_t head;    // the first item's KV head,
  int32_t part;    // part of its unit's rows,
  int32_t has_kv;  // whether it has KV,
  int32_t item;    // and number; num_items or more where the list is empty
  int32_t ahead_stride, ahead_end, rest, stride;
  int32_t num_items;
  int32_t num_matrix;    // of them, matrix units' items
  int32_t units_a_head;  // matrix units times parts
  int32_t parts;         // of a matrix unit's rows
  // Where the first item's KV begins: tokens [kv_begin, kv_end) of a group whose pages start at
  // page_begin of the level's kv_indices.
  int32_t level, page_begin, kv_begin, kv_end;
};
struct alignas(16) ItemList {
  int32_t unit[16];  // the first item's MatrixUnit or StreamUnit
  ItemRange items;
};

struct alignas(16) OwnPiece {
  int32_t row_begin;
  int32_t row_end;
  int32_t rank;  // of its first state
  int32_t num_states;
};

static_assert(sizeof(Header) == 64 && sizeof(Tile) == 32 && sizeof(MatrixUnit) == 64);
static_assert(sizeof(StreamUnit) == 32 && sizeof(Segment) == 32 && sizeof(OwnPiece) == 16);
static_assert(sizeof(ItemList) == 128);

// Sizes of the tables, and their places in words.
struct Layout {
  int64_t tiles, matrix_units, stream_units, segments, granules, pieces, partial_rows;
  int64_t list_at, tile_at, matrix_at, stream_at, segment_at, granule_at, own_at, work_at, words;

  Layout(const int64_t* num_groups, int64_t num_levels) {
    int64_t groups = 0;
    for (int64_t l = 0; l < num_levels; ++l) groups += num_groups[l];
    tiles = kBaseTiles + num_groups[num_levels - 1];
    pieces = groups + num_levels * tiles;
    matrix_units = tiles + kExtraUnits;
    stream_units = pieces + kExtraUnits;
    segments = pieces;
    granules = 2 * pieces;
    partial_rows = kBasePartialRows + 2 * groups;
    list_at = kHeaderWords;
    tile_at = list_at + 32 * kLists * kMaxCtas;
    matrix_at = tile_at + 8 * tiles;
    stream_at = matrix_at + 16 * matrix_units;
    segment_at = stream_at + 8 * stream_units;
    granule_at = segment_at + 8 * segments;
    own_at = granule_at + 8 * granules;
    work_at = own_at + 4 * pieces;
    // The planner's arrays when they do not fit into shared memory.
    words =
        work_at + 3 * groups + 2 * num_levels + (2 * num_levels + 18) * tiles + 7 * pieces + 384;
  }
};

}  // namespace flashinfer_ops::gpu
