// The planner of a GPU's schedule (schedule.h), run by one block of threads.
//
//   1. rows and lengths of all groups into fast memory; the level to align tiles to
//   2. tiles of about kTileRows packed rows
//   3. pieces: (tile, group) pairs that share rows, in the order tile, level, group; each is walked
//      by its tile (as granules or as a segment) or owned, whichever the costs below say
//   4. how long a run of KV a unit takes, by trying 32 numbers of runs against the cost model
//   5. ranks of states, scratch rows
//   6. the tables
//
// Every step is a loop over items that the threads share, a sum or a scan; nothing depends on the
// order in which threads run, so a plan is a function of its input. The class `Block` gives the
// threads: planner.cu's on the GPU; one thread on the host, for tests without a GPU.
//
// Index arrays may hold anything: no table is written beyond its capacity.
#pragma once

#include "cuda/schedule.h"

#ifdef __CUDACC__
#define FLASHINFER_OPS_ANYWHERE __host__ __device__ __forceinline__
#else
#define FLASHINFER_OPS_ANYWHERE inline
#endif

namespace flashinfer_ops::gpu {

// Costs in nanoseconds of one streaming multiprocessor (SM), measured on an H100 with head_dim 128;
// docs/performance.md has the measurements.
namespace cost {
constexpr float kState = 30;      // writing and merging one more state of a packed row
constexpr float kOwnUnit = 400;   // one more stream unit of a KV head
constexpr float kOwnToken = 20;   // one KV token of a KV head in a stream unit of 16 packed rows,
constexpr float kOwnAgain = 10;   // and for each 16 rows more
constexpr float kUnitStart = 2500;  // from a unit's start to its first product
constexpr float kTokenLatency = 14;  // per KV token, of a unit that has its SM for itself

// One KV token of a KV head in a matrix unit, by the packed rows of a tile.
FLASHINFER_OPS_ANYWHERE float matrix_token(int rows) {
  return rows > 64 ? 26 : rows > 32 ? 22 : 20;
}
}  // namespace cost

constexpr int kTileRows = 128;        // packed rows
constexpr int kAlignRows = 96;        // tiles are aligned to a level of this many rows a group
constexpr int kGatherTokens = 48;     // a piece up to this long is walked as granules
constexpr int kStreamRows = 16;       // packed rows of a stream unit
constexpr int kMaxOwnRows = 64;       // packed rows of an own piece
constexpr int kStreamSlots = 3;       // stream units that an SM runs at once

// Matrix units that an SM runs at once, by the packed rows of a tile.
FLASHINFER_OPS_ANYWHERE int matrix_slots(int rows) { return rows > 64 ? 1 : rows > 32 ? 2 : 3; }

struct PlanInput {
  const int32_t* qo_indptr[kMaxLevels];
  const int32_t* kv_indptr[kMaxLevels];
  const int32_t* kv_last_page_len[kMaxLevels];
  int32_t num_groups[kMaxLevels];
  int32_t num_levels;
  int32_t page_size;
  int32_t group_size;  // query heads a KV head
  int32_t num_kv_heads;
  int32_t causal;
  int32_t num_sms;
};

struct Counts {
  int32_t plain, granules, own, blocks;
  FLASHINFER_OPS_ANYWHERE Counts operator+(const Counts& o) const {
    return {plain + o.plain, granules + o.granules, own + o.own, blocks + o.blocks};
  }
};

FLASHINFER_OPS_ANYWHERE int ceil_div(int a, int b) { return (a + b - 1) / b; }
FLASHINFER_OPS_ANYWHERE int min_int(int a, int b) { return a < b ? a : b; }
FLASHINFER_OPS_ANYWHERE int max_int(int a, int b) { return a > b ? a : b; }
FLASHINFER_OPS_ANYWHERE float min_float(float a, float b) { return a < b ? a : b; }
FLASHINFER_OPS_ANYWHERE float max_float(float a, float b) { return a > b ? a : b; }

// The first i in [0, n) with values[i] > x, or n; values do not decrease.
FLASHINFER_OPS_ANYWHERE int first_above(const int32_t* values, int n, int x) {
  int low = 0;
  while (low < n) {
    const int middle = (low + n) >> 1;
    if (values[middle] > x) {
      n = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Numbers of runs to try for the longest walk: 1 to 16, then in growing steps up to 128.
constexpr int kCandidates = 32;
FLASHINFER_OPS_ANYWHERE int candidate_runs(int k) {
  return k < 16   ? k + 1
         : k < 22 ? 2 * k - 14
         : k < 27 ? 4 * k - 56
         : k < 29 ? 8 * k - 160
         : k < 31 ? 16 * k - 384
                  : 128;
}

// Memory for the planner's own arrays: fast where there is room, else the schedule's work space.
struct Arena {
  char* fast;
  int64_t fast_bytes;
  int32_t* slow;

  FLASHINFER_OPS_ANYWHERE int32_t* ints(int64_t n) {
    const int64_t padded = (n + 3) & ~int64_t{3};
    if (padded * 4 <= fast_bytes) {
      char* p = fast;
      fast += padded * 4;
      fast_bytes -= padded * 4;
      return reinterpret_cast<int32_t*>(p);
    }
    int32_t* p = slow;
    slow += padded;
    return p;
  }
};

template <class Block>
struct Planner {
  FLASHINFER_OPS_ANYWHERE Planner(Block& block, const PlanInput& in, const Layout& layout,
                                  int32_t* schedule, char* fast, int64_t fast_bytes)
      : block(block),
        in(in),
        layout(layout),
        schedule(schedule),
        arena{fast, fast_bytes, schedule + layout.work_at} {}

  Block& block;
  const PlanInput& in;
  const Layout& layout;
  int32_t* schedule;
  Arena arena;

  // Step 1.
  int32_t* rows_at;              // qo_indptr of all levels, one after the other
  int32_t* lengths;              // KV tokens of all groups
  int first_group[kMaxLevels];   // of a level, in lengths; in rows_at it is + level
  int num_tokens = 0;
  int align_level = -1;
  // Step 2.
  int num_tiles = 0, tile_tokens = 0, tile_rows = 0;  // the most tokens, packed rows
  int32_t* tile_row;                                  // [num_tiles + 1] where tiles begin
  // Step 3.
  int num_pieces = 0, num_own = 0;
  int32_t* entry_group;  // [tile, level] its first group
  int32_t* entry_piece;  // [tile, level] + 1: its first piece
  int32_t* piece_entry;
  Counts* before;  // [num_pieces + 1] of the pieces before
  int32_t* own_piece;
  // Steps 4 and 5.
  int matrix_run = 0, stream_run = 0;  // blocks
  int32_t* tile_units;                 // [num_tiles + 1] first matrix unit
  int32_t* tile_ranks;                 // the most states of a row
  int32_t* tile_scratch;               // first scratch row or -1
  int32_t *tile_walk, *tile_size;      // blocks, query tokens
  int32_t* own_units;                  // [num_own + 1] first stream unit
  int32_t *own_walk, *own_size;        // blocks, query tokens

  FLASHINFER_OPS_ANYWHERE Tile* tiles() {
    return reinterpret_cast<Tile*>(schedule + layout.tile_at);
  }
  FLASHINFER_OPS_ANYWHERE Segment* segments() {
    return reinterpret_cast<Segment*>(schedule + layout.segment_at);
  }
  FLASHINFER_OPS_ANYWHERE OwnPiece* own_pieces() {
    return reinterpret_cast<OwnPiece*>(schedule + layout.own_at);
  }
  FLASHINFER_OPS_ANYWHERE const int32_t* level_rows(int level) const {
    return rows_at + first_group[level] + level;
  }

  struct Piece {
    int tile, level, group;
    int row_begin, row_end, kv_end, diagonal;
  };
  enum class Kind { kNone, kGranules, kSegment, kOwn };

  FLASHINFER_OPS_ANYWHERE void run() {
    load_groups();
    choose_level();
    make_tiles();
    // A schedule that does not fit is made again with less in it: without cutting the walks, then
    // without own pieces and granules.
    for (int attempt = 0; attempt < 3; ++attempt) {
      const Arena saved = arena;
      find_pieces(attempt < 2);
      choose_runs(attempt < 1);
      if (rank_states() || attempt == 2) break;
      block.sync();
      arena = saved;
    }
    write_tiles();
    write_pieces();
    block.sync();
    write_matrix_units();
    write_stream_units();
  }

  // --- 1. groups

  FLASHINFER_OPS_ANYWHERE void load_groups() {
    int groups = 0;
    for (int l = 0; l < in.num_levels; ++l) {
      first_group[l] = groups;
      groups += in.num_groups[l];
    }
    rows_at = arena.ints(groups + in.num_levels);
    lengths = arena.ints(groups);
    for (int l = 0; l < in.num_levels; ++l) {
      const int n = in.num_groups[l];
      int32_t* rows = rows_at + first_group[l] + l;
      for (int g = block.thread(); g <= n; g += block.size()) {
        rows[g] = max_int(in.qo_indptr[l][g], 0);
        if (g == n) break;
        const int pages = in.kv_indptr[l][g + 1] - in.kv_indptr[l][g];
        lengths[first_group[l] + g] =
            pages > 0 ? max_int((pages - 1) * in.page_size + in.kv_last_page_len[l][g], 0) : 0;
      }
    }
    block.sync();
    for (int l = 0; l < in.num_levels; ++l) {
      num_tokens = max_int(num_tokens, level_rows(l)[in.num_groups[l]]);
    }
  }

  // The deepest level whose groups fill most of a tile on average: tiles end where its groups do.
  FLASHINFER_OPS_ANYWHERE void choose_level() {
    for (int l = in.num_levels - 1; l >= 0 && align_level < 0; --l) {
      const int32_t* rows = level_rows(l);
      const int n = in.num_groups[l];
      int count = 0;
      for (int base = 0; base < n; base += block.size()) {
        const int g = base + block.thread();
        count += block.count(g < n && rows[g] < rows[g + 1] && lengths[first_group[l] + g] > 0);
      }
      const bool wide = int64_t{rows[n] - rows[0]} * in.group_size >= int64_t{kAlignRows} * count;
      if (count > 0 && wide && n + 2 <= layout.tiles - kBaseTiles / 2) align_level = l;
    }
  }

  // --- 2. tiles

  FLASHINFER_OPS_ANYWHERE int border(int i) const {  // of the intervals that tiles do not cross
    if (align_level < 0) return i == 0 ? 0 : num_tokens;
    const int n = in.num_groups[align_level];
    if (i == 0) return 0;
    return i <= n + 1 ? min_int(level_rows(align_level)[i - 1], num_tokens) : num_tokens;
  }

  FLASHINFER_OPS_ANYWHERE void make_tiles() {
    const int intervals = align_level < 0 ? 1 : in.num_groups[align_level] + 2;
    // So many that their number, with one more for each interval, stays within the capacity.
    const int most = static_cast<int>(layout.tiles) - intervals;
    const int wanted =
        max_int(matrix_tokens(), ceil_div(num_tokens, max_int(most, 1)));
    tile_row = arena.ints(layout.tiles + 1);
    const auto count = [&](int i) {
      return Counts{ceil_div(max_int(border(i + 1) - border(i), 0), wanted), 0, 0, 0};
    };
    const auto place = [&](int i, const Counts& at) {
      const int begin = border(i), rows = border(i + 1) - begin, n = count(i).plain;
      for (int t = 0; t < n && at.plain + t < layout.tiles; ++t) {
        tile_row[at.plain + t] = begin + static_cast<int>(int64_t{rows} * t / n);
      }
    };
    num_tiles = min_int(block.scan(intervals, count, place).plain, static_cast<int>(layout.tiles));
    if (block.thread() == 0) tile_row[num_tiles] = num_tokens;
    block.sync();
    tile_tokens = min_int(wanted, num_tokens);
    tile_rows = min_int(tile_tokens * in.group_size, kTileRows);
  }

  // --- 3. pieces

  FLASHINFER_OPS_ANYWHERE Piece piece(int p) const {
    const int e = piece_entry[p];
    Piece x;
    x.tile = e / in.num_levels;
    x.level = e - x.tile * in.num_levels;
    x.group = entry_group[e] + p - entry_piece[e];
    const int32_t* rows = level_rows(x.level);
    x.row_begin = max_int(rows[x.group], tile_row[x.tile]);
    x.row_end = min_int(rows[x.group + 1], tile_row[x.tile + 1]);
    x.kv_end = lengths[first_group[x.level] + x.group];
    x.diagonal = kNoDiagonal;
    if (in.causal && x.level == in.num_levels - 1) {
      // The group's last row sees all its KV, each row before it one token less.
      x.diagonal = x.kv_end - rows[x.group + 1];
      x.kv_end = min_int(x.kv_end, x.row_end + x.diagonal);
    }
    if (x.row_begin >= x.row_end) x.kv_end = 0;
    return x;
  }

  FLASHINFER_OPS_ANYWHERE int packed_rows(const Piece& x) const {
    return (x.row_end - x.row_begin) * in.group_size;
  }
  // Query tokens of a stream unit, and stream units for a piece's rows.
  FLASHINFER_OPS_ANYWHERE int stream_tokens() const {
    return max_int(1, kStreamRows / in.group_size);
  }
  FLASHINFER_OPS_ANYWHERE int matrix_tokens() const {
    return max_int(1, kTileRows / in.group_size);
  }
  FLASHINFER_OPS_ANYWHERE int stream_parts(const Piece& x) const {
    return ceil_div(x.row_end - x.row_begin, stream_tokens());
  }

  // An own piece's ranks follow its ancestors', so each piece above it holds all its rows or none.
  FLASHINFER_OPS_ANYWHERE bool nested(const Piece& x) const {
    for (int l = 0; l < x.level; ++l) {
      const int32_t* rows = level_rows(l);
      const int end = rows[ancestor_group(x, l) + 1];  // with -1: where the first group begins
      if (end > x.row_begin && end < x.row_end) return false;
    }
    return true;
  }
  // The last group of a level that begins at or before the piece's rows, or -1.
  FLASHINFER_OPS_ANYWHERE int ancestor_group(const Piece& x, int level) const {
    return min_int(first_above(level_rows(level), in.num_groups[level] + 1, x.row_begin) - 1,
                   in.num_groups[level] - 1);
  }

  FLASHINFER_OPS_ANYWHERE Kind kind(const Piece& x, bool all_kinds) const {
    if (x.kv_end <= 0) return Kind::kNone;
    if (!all_kinds) return Kind::kSegment;
    const int rows = packed_rows(x);
    const bool whole = x.row_begin == tile_row[x.tile] && x.row_end == tile_row[x.tile + 1];
    if (!whole && rows <= kMaxOwnRows && in.group_size <= kMaxOwnRows) {
      const float own = cost::kOwnToken + cost::kOwnAgain * (stream_parts(x) - 1);
      const float gain = x.kv_end * (cost::matrix_token(tile_rows) - own);
      const float loss = cost::kOwnUnit * stream_parts(x) + cost::kState * rows;
      if (gain > loss && nested(x)) return Kind::kOwn;
    }
    return x.kv_end <= kGatherTokens ? Kind::kGranules : Kind::kSegment;
  }

  FLASHINFER_OPS_ANYWHERE void find_pieces(bool all_kinds) {
    const int entries = num_tiles * in.num_levels;
    entry_group = arena.ints(entries);
    entry_piece = arena.ints(entries + 1);
    const auto count = [&](int e) {
      const int tile = e / in.num_levels, level = e - tile * in.num_levels;
      const int32_t* rows = level_rows(level);
      const int n = in.num_groups[level];
      const int first = max_int(first_above(rows, n + 1, tile_row[tile]) - 1, 0);
      const int end = min_int(first_above(rows, n + 1, tile_row[tile + 1] - 1), n);
      entry_group[e] = first;
      return Counts{max_int(end - first, 0), 0, 0, 0};
    };
    const auto place = [&](int e, const Counts& at) {
      entry_piece[e] = min_int(at.plain, static_cast<int>(layout.pieces));
    };
    num_pieces =
        min_int(block.scan(entries, count, place).plain, static_cast<int>(layout.pieces));
    if (block.thread() == 0) entry_piece[entries] = num_pieces;
    piece_entry = arena.ints(num_pieces);
    before = reinterpret_cast<Counts*>(arena.ints(4 * (int64_t{num_pieces} + 1)));
    block.sync();

    const auto classify = [&](int p) {
      piece_entry[p] = first_above(entry_piece, entries + 1, p) - 1;
      const Piece x = piece(p);
      const Kind k = kind(x, all_kinds);
      if (k == Kind::kOwn) return Counts{0, 0, 1, 0};
      if (k == Kind::kGranules) return Counts{0, ceil_div(x.kv_end, kGranule), 0, 0};
      if (k == Kind::kSegment) return Counts{1, 0, 0, ceil_div(x.kv_end, kBlock)};
      return Counts{0, 0, 0, 0};
    };
    const auto store = [&](int p, const Counts& at) { before[p] = at; };
    const Counts total = block.scan(num_pieces, classify, store);
    if (block.thread() == 0) before[num_pieces] = total;
    num_own = total.own;
    own_piece = arena.ints(num_own);
    tile_units = arena.ints(num_tiles + 1);
    tile_ranks = arena.ints(num_tiles);
    tile_scratch = arena.ints(num_tiles);
    tile_walk = arena.ints(num_tiles);
    tile_size = arena.ints(num_tiles);
    own_units = arena.ints(num_own + 1);
    own_walk = arena.ints(num_own);
    own_size = arena.ints(num_own);
    block.sync();
    for (int p = block.thread(); p < num_pieces; p += block.size()) {
      const int o = before[p].own;
      if (before[p + 1].own == o) continue;
      const Piece x = piece(p);
      own_piece[o] = p;
      own_walk[o] = ceil_div(x.kv_end, kBlock);
      own_size[o] = x.row_end - x.row_begin;
    }
    for (int t = block.thread(); t < num_tiles; t += block.size()) {
      tile_walk[t] = tile_blocks(t);
      tile_size[t] = tile_row[t + 1] - tile_row[t];
    }
    block.sync();
  }

  FLASHINFER_OPS_ANYWHERE const Counts& tile_before(int tile) const {
    return before[entry_piece[tile * in.num_levels]];
  }
  FLASHINFER_OPS_ANYWHERE int tile_granule_blocks(int tile) const {
    const int granules = tile_before(tile + 1).granules - tile_before(tile).granules;
    return ceil_div(granules * kGranule, kBlock);
  }
  FLASHINFER_OPS_ANYWHERE int tile_blocks(int tile) const {
    return tile_granule_blocks(tile) + tile_before(tile + 1).blocks - tile_before(tile).blocks;
  }

  // --- 4. runs

  // Time of `items` units of `run` blocks each (the longest), `total` blocks in all.
  FLASHINFER_OPS_ANYWHERE float time_of(float items, float total, int run, float token,
                                        int slots) const {
    const float at_once = min_float(items, static_cast<float>(slots) * in.num_sms);
    const float block_time =
        kBlock * max_float(cost::kTokenLatency, token * at_once / in.num_sms);
    const float unit = run * block_time + cost::kUnitStart;
    const float waves = static_cast<float>(static_cast<int>((items + at_once - 1) / at_once));
    const float even = (total * block_time + items * cost::kUnitStart) / at_once + unit;
    return min_float(waves * unit, even);
  }

  // The best run length for n walks of walk[i] blocks and rows[i] query tokens, of which one unit
  // takes `part` at most.
  FLASHINFER_OPS_ANYWHERE int best_run(int n, const int32_t* walk, const int32_t* rows, int part,
                                       float token, int slots, int64_t capacity) {
    int longest = 0;
    for (int i = block.thread(); i < n; i += block.size()) longest = max_int(longest, walk[i]);
    longest = block.max(longest);
    if (longest == 0) return 1;
    for (int k = block.warp(); k < kCandidates; k += block.num_warps()) {
      const int run = ceil_div(longest, candidate_runs(k));
      float units = 0, items = 0, total = 0, states = 0;
      for (int i = block.lane(); i < n; i += block.num_lanes()) {
        const int runs = ceil_div(walk[i], run), parts = ceil_div(rows[i], part);
        units += runs;
        items += runs * parts;
        total += static_cast<float>(walk[i]) * parts;
        if (runs > 1) states += static_cast<float>(runs) * rows[i];
      }
      units = block.warp_sum(units);
      items = block.warp_sum(items) * in.num_kv_heads;
      total = block.warp_sum(total) * in.num_kv_heads;
      states = block.warp_sum(states) * in.num_kv_heads * in.group_size;
      float time = time_of(items, total, run, token, slots) + states * cost::kState / in.num_sms;
      if (units > capacity) time = k == 0 ? 1e37f : 1e38f;
      if (block.lane() == 0) block.candidate(k) = time;
    }
    block.sync();
    int best = 0;
    for (int k = 1; k < kCandidates; ++k) {
      if (block.candidate(k) < block.candidate(best)) best = k;
    }
    block.sync();
    return ceil_div(longest, candidate_runs(best));
  }

  FLASHINFER_OPS_ANYWHERE void choose_runs(bool cut) {
    matrix_run = stream_run = 1 << 30;
    if (!cut) return;
    matrix_run = best_run(num_tiles, tile_walk, tile_size, matrix_tokens(),
                          cost::matrix_token(tile_rows), matrix_slots(tile_rows),
                          layout.matrix_units);
    stream_run = best_run(num_own, own_walk, own_size, stream_tokens(), cost::kOwnToken,
                          kStreamSlots, layout.stream_units / 2);
  }

  // --- 5. states

  FLASHINFER_OPS_ANYWHERE int tile_states(int tile) const {
    return ceil_div(tile_walk[tile], matrix_run);
  }
  FLASHINFER_OPS_ANYWHERE int own_states(const Piece& x) const {
    return ceil_div(ceil_div(x.kv_end, kBlock), stream_run);
  }
  // The rank of an own piece's first state: after its tile's and its own ancestors'.
  FLASHINFER_OPS_ANYWHERE int own_rank(const Piece& x) const {
    int rank = tile_states(x.tile);
    for (int l = 0; l < x.level; ++l) {
      const int e = x.tile * in.num_levels + l;
      if (before[entry_piece[e]].own == before[entry_piece[e + 1]].own) continue;
      const int p = entry_piece[e] + ancestor_group(x, l) - entry_group[e];
      if (p < entry_piece[e] || p >= entry_piece[e + 1]) continue;
      const Piece above = piece(p);
      if (above.row_begin > x.row_begin || above.row_end <= x.row_begin) continue;
      if (before[p + 1].own > before[p].own) rank += own_states(above);
    }
    return rank;
  }

  // Whether all units and states fit into the schedule and the scratch.
  FLASHINFER_OPS_ANYWHERE bool rank_states() {
    const auto units = [&](int t) { return Counts{tile_states(t), 0, 0, 0}; };
    const auto place_units = [&](int t, const Counts& at) {
      tile_units[t] = at.plain;
      tile_ranks[t] = tile_states(t);
    };
    const int matrix_units = block.scan(num_tiles, units, place_units).plain;
    const auto own = [&](int o) {
      const Piece x = piece(own_piece[o]);
      return Counts{own_states(x) * stream_parts(x), 0, 0, 0};
    };
    const auto place_own = [&](int o, const Counts& at) { own_units[o] = at.plain; };
    const int stream_units = block.scan(num_own, own, place_own).plain;
    if (block.thread() == 0) {
      tile_units[num_tiles] = matrix_units;
      own_units[num_own] = stream_units;
    }
    block.sync();
    for (int o = block.thread(); o < num_own; o += block.size()) {
      const Piece x = piece(own_piece[o]);
      const int rank = own_rank(x), states = own_states(x);
      if (o < layout.pieces) own_pieces()[o] = {x.row_begin, x.row_end, rank, states};
      block.raise(&tile_ranks[x.tile], rank + states);
    }
    block.sync();
    const auto scratch = [&](int t) {
      return Counts{tile_ranks[t] > 1 ? tile_ranks[t] * (tile_row[t + 1] - tile_row[t]) : 0, 0, 0,
                    0};
    };
    const auto place_scratch = [&](int t, const Counts& at) {
      tile_scratch[t] = tile_ranks[t] > 1 ? at.plain : -1;
    };
    const int partial_rows = block.scan(num_tiles, scratch, place_scratch).plain;
    if (block.thread() == 0) {
      *reinterpret_cast<Header*>(schedule) = Header{num_tokens,   num_tiles,    tile_tokens,
                                                    matrix_units, stream_units, partial_rows,
                                                    {}};
    }
    block.sync();
    return matrix_units <= layout.matrix_units && stream_units <= layout.stream_units &&
           before[num_pieces].granules <= layout.granules && partial_rows <= layout.partial_rows;
  }

  // --- 6. tables

  FLASHINFER_OPS_ANYWHERE void write_tiles() {
    for (int t = block.thread(); t < num_tiles; t += block.size()) {
      tiles()[t] = {tile_row[t],          tile_row[t + 1],         tile_states(t), tile_scratch[t],
                    tile_before(t).own,   tile_before(t + 1).own,  tile_ranks[t],  0};
    }
  }

  FLASHINFER_OPS_ANYWHERE void write_pieces() {
    auto* granules = reinterpret_cast<Segment*>(schedule + layout.granule_at);
    for (int p = block.thread(); p < num_pieces; p += block.size()) {
      const Counts &at = before[p], &next = before[p + 1];
      if (next.plain == at.plain && next.granules == at.granules) continue;
      const Piece x = piece(p);
      Segment s{x.level, in.kv_indptr[x.level][x.group], 0, x.kv_end, x.row_begin, x.row_end,
                x.diagonal, at.blocks - tile_before(x.tile).blocks};
      if (next.plain > at.plain) segments()[at.plain] = s;
      s.reserved = 0;
      for (int g = at.granules; g < next.granules && g < layout.granules; ++g) {
        s.kv_end = min_int(s.kv_begin + kGranule, x.kv_end);
        granules[g] = s;
        s.kv_begin = s.kv_end;
      }
    }
  }

  FLASHINFER_OPS_ANYWHERE void write_matrix_units() {
    auto* units = reinterpret_cast<MatrixUnit*>(schedule + layout.matrix_at);
    const int n = min_int(tile_units[num_tiles], static_cast<int>(layout.matrix_units));
    for (int u = block.thread(); u < n; u += block.size()) {
      const int tile = first_above(tile_units, num_tiles + 1, u) - 1;
      const int rank = u - tile_units[tile], states = tile_units[tile + 1] - tile_units[tile];
      const int total = tile_blocks(tile), run = ceil_div(total, states);
      const int begin = rank * run, end = min_int(begin + run, total);
      const int rows = tile_row[tile + 1] - tile_row[tile];
      const Counts &at = tile_before(tile), &next = tile_before(tile + 1);
      MatrixUnit unit{};
      unit.row_begin = tile_row[tile];
      unit.row_end = tile_row[tile + 1];
      unit.partial_row = tile_scratch[tile] < 0 ? -1 : tile_scratch[tile] + rank * rows;
      const int in_block = kBlock / kGranule, granule_blocks = tile_granule_blocks(tile);
      unit.granule_begin = min_int(at.granules + begin * in_block, next.granules);
      unit.granule_end = min_int(at.granules + min_int(end, granule_blocks) * in_block,
                                 next.granules);
      if (end > granule_blocks && next.plain > at.plain) {
        const int first = max_int(begin - granule_blocks, 0), last = end - granule_blocks - 1;
        const int s0 = segment_of(at.plain, next.plain, first);
        const int s1 = segment_of(at.plain, next.plain, last);
        unit.segment_begin = s0;
        unit.segment_end = s1 + 1;
        unit.first_kv = (first - segments()[s0].reserved) * kBlock;
        unit.last_kv = min_int((last + 1 - segments()[s1].reserved) * kBlock,
                               segments()[s1].kv_end);
      }
      units[u] = unit;
    }
  }
  // The segment of a tile that holds a block of its walk.
  FLASHINFER_OPS_ANYWHERE int segment_of(int low, int high, int walk_block) {
    while (high - low > 1) {
      const int middle = (low + high) >> 1;
      if (segments()[middle].reserved <= walk_block) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  FLASHINFER_OPS_ANYWHERE void write_stream_units() {
    auto* units = reinterpret_cast<StreamUnit*>(schedule + layout.stream_at);
    const int n = min_int(own_units[num_own], static_cast<int>(layout.stream_units));
    for (int u = block.thread(); u < n; u += block.size()) {
      const int o = first_above(own_units, num_own + 1, u) - 1;
      const Piece x = piece(own_piece[o]);
      const int parts = stream_parts(x), index = u - own_units[o];
      const int state = index / parts, part = index - state * parts;
      const int blocks = ceil_div(x.kv_end, kBlock), run = ceil_div(blocks, own_states(x));
      const int tokens = stream_tokens(), row = x.row_begin + part * tokens;
      const int rows = tile_row[x.tile + 1] - tile_row[x.tile];
      const int scratch = tile_scratch[x.tile];
      const int rank = own_pieces()[o].rank + state;
      units[u] = {row,
                  min_int(row + tokens, x.row_end),
                  scratch < 0 ? -1 : scratch + rank * rows + row - tile_row[x.tile],
                  x.level,
                  in.kv_indptr[x.level][x.group],
                  state * run * kBlock,
                  min_int((state + 1) * run * kBlock, x.kv_end),
                  x.diagonal};
    }
  }
};

}  // namespace flashinfer_ops::gpu
