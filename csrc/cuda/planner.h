// The planner of a GPU's schedule (schedule.h), run by one block of threads, or by a cluster of
// them.
//
//   1. rows and lengths of all groups into fast memory              planner_tiles.h
//   2. tiles of about kTileRows packed rows, aligned to a level
//   3. pieces: (tile, group) pairs that share rows, in the order    planner_pieces.h
//      tile, level, group; each is walked by its tile (as granules
//      or as a segment) or owned, whichever the costs say
//   4. how long a run of KV a unit takes, by trying numbers of runs planner_states.h
//      against the cost model; which SMs take which units
//   5. ranks of states, places of units and of scratch rows
//   6. units                                                        planner_units.h
//
// All of it waits for memory and for the other threads rather than for arithmetic, so steps are
// few: warps take tiles in step 3, and what a later step needs of an earlier one is computed again
// rather than stored where that takes a few operations. Nothing depends on the order in which
// threads run: a plan is a function of its input. `Block` gives the threads, planner_threads.h's
// on the GPU, one thread on the host for tests without a GPU; `Memory` holds the planner's own
// arrays.
//
// Blocks of a cluster share steps 3 and 6 out; everything else each of them does for itself, as if
// it were alone. In step 3 what one finds goes into the arrays of all (`store_all`).
//
// Index arrays may hold anything: no table is written beyond its capacity. Arrays with rows that
// decrease or counts beyond kMaxRows and kMaxLength give the plan of an empty batch.
#pragma once

#include "cuda/schedule.h"

#ifdef __CUDACC__
#define FLASHINFER_OPS_ANYWHERE __host__ __device__ __forceinline__
#else
#define FLASHINFER_OPS_ANYWHERE inline
#endif
// Before loops that run once or twice: unrolled ones are instructions to fetch, at a miss each.
#ifdef __CUDA_ARCH__
#define FLASHINFER_OPS_ROLLED _Pragma("unroll 1")
#define FLASHINFER_OPS_UNROLLED _Pragma("unroll")
#define FLASHINFER_OPS_BY_FOURS _Pragma("unroll 4")
#else
#define FLASHINFER_OPS_ROLLED
#define FLASHINFER_OPS_UNROLLED
#define FLASHINFER_OPS_BY_FOURS
#endif

namespace flashinfer_ops::gpu {

// Costs in nanoseconds of one streaming multiprocessor (SM), of one KV head, for an H100
// and head_dim 128; docs/performance.md says how they were chosen. All floats: FLASHINFER_OPS_COSTS
// of a build for tuning (plan.cu) lists them in this order.
struct Costs {
  float state;            // writing and merging one more state of a packed row
  float own_unit;         // one more stream unit,
  float own_token;        // one KV token in it,
  float own_again;        // and for each stream_rows packed rows more
  float unit_start;       // from a unit's start to its first product
  float token_latency;    // per KV token, of a unit that has its SM for itself
  float matrix_token[3];  // one KV token in a matrix unit: of tiles with more than 64 packed rows,
  float matrix_slots[3];  // more than 32, fewer; such units that an SM runs at once
  float stream_slots;     // stream units that an SM runs at once
  float stream_rows;      // packed rows that a stream kernel takes at once
  // Of stream units beside matrix units on other SMs: one KV token on an SM of their own, and so
  // many SMs that have all of the memory's rate.
  float beside_token;
  float beside_sms;
};

constexpr Costs kPackedCosts{10,           800,       12, 0,           2500, 12,
                             {14, 12, 12}, {1, 2, 2}, 2,  kStreamRows, 8,    66};
constexpr Costs kPlainCosts{30, 400, 20, 10, 2500, 14, {26, 22, 20}, {1, 2, 3}, 3, 16, 0, 0};

constexpr int kTileRows = 128;     // packed rows
constexpr int kAlignRows = 96;     // tiles are aligned to a level of this many rows a group
constexpr int kMoreRounds = 4;     // of matrix units that are tried, from the fewest on
constexpr int kGatherTokens = 48;  // a piece up to this long is walked as granules
// Of tiles that walk their first piece last: tokens that it has at least, and the others, which are
// one of so many parts of the walk or more; tokens of it that may be walked at a time, over all
// heads, as they stay in the L2 cache; how much of the SMs' rounds the tiles fill.
constexpr int kLastTokens = 1024;
constexpr int kOtherTokens = 768;
constexpr int kOtherPart = 5;
constexpr int kCachedTokens = 65536;
constexpr float kFilledRounds = 0.85f;

// Bounds that keep all sums within 32 bits; the launcher refuses more groups.
constexpr int kMaxGroups = 1 << 19;
constexpr int kMaxRows = 1 << 26;
constexpr int kMaxLength = 1 << 25;  // KV tokens of a group
constexpr int kMaxSum = 1 << 30;     // where sums stop: tokens of a walk, scratch rows

struct PlanInput {
  const int32_t* qo_indptr[kMaxLevels];
  const int32_t* kv_indptr[kMaxLevels];
  const int32_t* kv_last_page_len[kMaxLevels];
  int32_t first_group[kMaxLevels + 1];  // groups of the levels before
  int32_t num_levels;
  int32_t page_size;
  int32_t group_size;  // query heads a KV head
  int32_t num_kv_heads;
  int32_t causal;
  int32_t num_sms;
  int32_t packed;  // the class of the schedule
  Costs costs;
  // What follows from these, divided out on the host: query tokens of a full tile, of a full stream
  // unit (none where a token has more rows), and those that a stream kernel takes at once.
  int32_t tile_part;
  int32_t own_part;
  int32_t stream_part;
  float inverse_sms;
  // Rows of groups lie one level after the other, one more than a level has groups.
  int32_t first_row[kMaxLevels];
};

inline void derive(PlanInput& in) {
  const auto tokens = [&](int rows) { return rows < in.group_size ? 1 : rows / in.group_size; };
  in.tile_part = tokens(kTileRows);
  in.own_part = kStreamRows / in.group_size;
  in.stream_part = tokens(static_cast<int>(in.costs.stream_rows));
  in.inverse_sms = 1.0f / in.num_sms;
  for (int l = 0; l < kMaxLevels; ++l) {
    in.first_row[l] = l < in.num_levels ? in.first_group[l] + l : INT32_MAX;
  }
}

// Of a >= 0 and b > 0; unsigned, which takes fewer operations.
FLASHINFER_OPS_ANYWHERE int divide(int a, int b) {
  return static_cast<int>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}
FLASHINFER_OPS_ANYWHERE int ceil_div(int a, int b) { return divide(a + b - 1, b); }
// Of a > 0, seldom more than b: without a division where it is not.
FLASHINFER_OPS_ANYWHERE int parts_of(int a, int b) { return a <= b ? 1 : ceil_div(a, b); }
FLASHINFER_OPS_ANYWHERE int blocks_of(int tokens) { return ceil_div(tokens, kBlock); }
FLASHINFER_OPS_ANYWHERE int min_int(int a, int b) { return a < b ? a : b; }
FLASHINFER_OPS_ANYWHERE int max_int(int a, int b) { return a > b ? a : b; }
// A product that no sum swallows, so that the host's plans are the GPU's to the bit.
FLASHINFER_OPS_ANYWHERE float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
FLASHINFER_OPS_ANYWHERE float min_float(float a, float b) { return a < b ? a : b; }
FLASHINFER_OPS_ANYWHERE float max_float(float a, float b) { return a > b ? a : b; }

// Of a, at most kMaxSum, and b, less than 2^31.
FLASHINFER_OPS_ANYWHERE int add_up(int a, int b) {
  const uint32_t sum = static_cast<uint32_t>(a) + static_cast<uint32_t>(b);
  return static_cast<int>(sum < kMaxSum ? sum : kMaxSum);
}

// How many of n values, which do not decrease, are x or less; for two x at once, since a search is
// a chain of loads that wait for each other.
struct Found {
  int x, y;
};
FLASHINFER_OPS_ANYWHERE Found count_up_to(const int32_t* values, int n, int x, int y) {
  Found at{0, 0};
  FLASHINFER_OPS_ROLLED
  while (n > 0) {
    const int half = (n + 1) >> 1;
    if (values[at.x + half - 1] <= x) at.x += half;
    if (values[at.y + half - 1] <= y) at.y += half;
    n -= half;
  }
  return at;
}
FLASHINFER_OPS_ANYWHERE int count_up_to(const int32_t* values, int n, int x) {
  int at = 0;
  FLASHINFER_OPS_ROLLED
  while (n > 0) {
    const int half = (n + 1) >> 1;
    if (values[at + half - 1] <= x) at += half;
    n -= half;
  }
  return at;
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

// The planner's arrays in words from `base` on, each aligned to 16 bytes.
struct PlainMemory {
  int32_t* base;
  int64_t capacity;
  int64_t used = 0;

  FLASHINFER_OPS_ANYWHERE int32_t* ints(int n) {
    int32_t* p = base + used;
    used += (int64_t{n} + 3) & ~int64_t{3};
    return p;
  }
  FLASHINFER_OPS_ANYWHERE bool fits() const { return used <= capacity; }
  // Copies of one word, done after wait() for the thread that made them.
  FLASHINFER_OPS_ANYWHERE void copy(int32_t* to, const int32_t* from) { *to = *from; }
  FLASHINFER_OPS_ANYWHERE void wait() {}
};

struct alignas(16) Counts {
  int32_t plain, granules, own;
  int32_t tokens;  // of the segments
};

// What is to be cut into runs: a tile's walk, or an own piece's KV.
struct alignas(16) Walk {
  int32_t blocks;
  int32_t rows;   // query tokens
  int32_t parts;  // kernels' row blocks
  int32_t rank;   // an own piece's first; of a tile the levels, as bits, on which it has own pieces
};

// Of walks that are cut into runs: runs; these times the parts of their rows; blocks times the
// parts; partial states of query tokens.
struct alignas(16) RunSums {
  uint32_t units, items, blocks, states;
};

// How the SMs share tiles' units and stream units (ItemList), and how long these take.
struct Sharing {
  float time;
  int matrix_ctas, stream_rounds, first_free;
};

struct Piece {
  int tile, level, group;
  int row_begin, row_end, kv_end, diagonal;
};

// Where an own piece is.
struct alignas(8) Place {
  int32_t tile_level;  // tile * kMaxLevels + level
  int32_t group;
};

enum class Kind { kNone, kGranules, kSegment, kOwn };

// What a lane found of the last piece that it went over, and the warp of its tile.
struct Visited {
  Piece piece;
  Kind kind;
  int own_levels;  // bits
};

template <class Block, class Memory>
struct Planner {
  FLASHINFER_OPS_ANYWHERE Planner(Block& block, const PlanInput& in, const Layout& layout,
                                  int32_t* schedule, Memory memory)
      : block(block), in(in), layout(layout), schedule(schedule), memory(memory) {}

  Block& block;
  const PlanInput& in;
  const Layout& layout;
  int32_t* schedule;
  Memory memory;

  // Step 1.
  int32_t* rows_at;  // qo_indptr of all levels, one after the other
  int32_t* lengths;  // KV tokens of all groups
  int32_t* pages;    // kv_indptr of all levels
  int num_tokens = 0;
  int align_level = -1;
  int32_t* longest_tile;  // tokens, where tiles are aligned to a level
  // Step 2.
  int num_tiles = 0, tile_tokens = 0, tile_class = 0;  // the most tokens; an index into costs
  int32_t* tile_row;                                   // [num_tiles + 1] where tiles begin
  // Step 3.
  int num_own = 0;
  int32_t* entry_group;  // [tile, level] its first group
  int32_t* entry_piece;  // [tile, level + 1] pieces of the tile's levels before
  Counts* tile_counts;   // of the tile,
  Counts* tile_first;    // [num_tiles + 1] and of the tiles before
  Walk* tile_walks;
  int32_t* segment_walk;  // `walk` of all segments
  Place* own_place;
  Walk* own_walks;
  int longest_walk = 0;  // blocks
  int32_t* longest_own;
  // Steps 4 and 5.
  RunSums* run_sums;                   // [2, kCandidates] of tiles, of own pieces
  int matrix_run = 0, stream_run = 0;  // blocks
  Sharing sharing{};
  int32_t* tile_ranks;    // the most states of a row
  int32_t* tile_units;    // [num_tiles + 1] first matrix unit
  int32_t* tile_scratch;  // first scratch row or -1
  int32_t* own_units;     // [num_own + 1] first stream unit

  // Writes the schedule, or returns false where `memory` is too small.
  FLASHINFER_OPS_ANYWHERE bool run() {
    // Before one block writes into another's memory, that one runs.
    block.arrive_all();
    const bool has_room = load_groups() && make_tiles();
    block.wait_all();
    if (!has_room) return false;
    block.stamp(0);
    // A schedule that does not fit is made again with less in it: with fewer partial states,
    // without cutting any walk, without own pieces and granules.
    const Memory before = memory;
    int num_units = 0;
    FLASHINFER_OPS_ROLLED
    for (int attempt = 0; attempt < 4; ++attempt) {
      memory = before;
      if (attempt > 0) block.sync_all();  // all have read what was found
      if (!find_pieces(attempt < 3)) return false;
      block.stamp(2);
      choose_runs(attempt < 2 ? layout.partial_rows >> (2 * attempt) : 0);
      block.stamp(3);
      num_units = place_states();
      block.stamp(4);
      if (num_units >= 0) break;
    }
    write_units(num_units);
    block.stamp(5);
    return true;
  }

  FLASHINFER_OPS_ANYWHERE int num_groups(int level) const {
    return in.first_group[level + 1] - in.first_group[level];
  }
  FLASHINFER_OPS_ANYWHERE const int32_t* level_rows(int level) const {
    return rows_at + in.first_row[level];
  }
  // Where the group's pages start in kv_indices.
  FLASHINFER_OPS_ANYWHERE int first_page(const Piece& x) const {
    return pages[in.first_row[x.level] + x.group];
  }
  template <class T>
  FLASHINFER_OPS_ANYWHERE T* table(int64_t at) const {
    return reinterpret_cast<T*>(schedule + at);
  }

  FLASHINFER_OPS_ANYWHERE int level_of_row(int i) const;
  FLASHINFER_OPS_ANYWHERE bool load_groups();
  FLASHINFER_OPS_ANYWHERE int border(int i) const;
  FLASHINFER_OPS_ANYWHERE bool make_tiles();

  FLASHINFER_OPS_ANYWHERE int first_tile(int warp) const;
  FLASHINFER_OPS_ANYWHERE void find_levels(int begin, int end);
  FLASHINFER_OPS_ANYWHERE Piece piece(int tile, int level, int group) const;
  FLASHINFER_OPS_ANYWHERE Piece piece_of_tile(int tile, int p) const;
  FLASHINFER_OPS_ANYWHERE bool nested(const Piece& x) const;
  FLASHINFER_OPS_ANYWHERE Kind kind(const Piece& x, bool all_kinds) const;
  FLASHINFER_OPS_ANYWHERE int walk_tokens(const Piece& x) const;
  FLASHINFER_OPS_ANYWHERE int most_last_tokens() const;
  FLASHINFER_OPS_ANYWHERE bool comes_last(const Piece& x, int most) const;
  FLASHINFER_OPS_ANYWHERE Counts visit_tile(int tile, const Counts& at, bool all_kinds, bool write,
                                            int most_last, Visited& last, bool is_known);
  FLASHINFER_OPS_ANYWHERE bool find_pieces(bool all_kinds);
  FLASHINFER_OPS_ANYWHERE Counts sum_counts(int tile);

  // Blocks of a run when the longest walk is cut into so many as candidate k says.
  FLASHINFER_OPS_ANYWHERE int run_of(int longest, int k) const {
    return max_int(ceil_div(longest, candidate_runs(k)), 1);
  }
  FLASHINFER_OPS_ANYWHERE void sum_runs(RunSums* sums, int n, const Walk* walks, int longest);
  FLASHINFER_OPS_ANYWHERE float time_of(const RunSums& sums, int run, float token,
                                        float slots) const;
  FLASHINFER_OPS_ANYWHERE float time_of_states(const RunSums& sums, int64_t most_units,
                                               int64_t most_states) const;
  FLASHINFER_OPS_ANYWHERE Sharing share_sms(const RunSums& tiles, int run,
                                            const RunSums& own) const;
  FLASHINFER_OPS_ANYWHERE void choose_runs(int64_t most_states);
  FLASHINFER_OPS_ANYWHERE int tile_states(int tile) const {
    return ceil_div(tile_walks[tile].blocks, matrix_run);
  }
  FLASHINFER_OPS_ANYWHERE int own_states(int own) const {
    return ceil_div(own_walks[own].blocks, stream_run);
  }
  FLASHINFER_OPS_ANYWHERE Piece own_piece(int own) const;
  FLASHINFER_OPS_ANYWHERE void rank_own_pieces();
  FLASHINFER_OPS_ANYWHERE int place_states();

  FLASHINFER_OPS_ANYWHERE void write_units(int num_units);
  FLASHINFER_OPS_ANYWHERE MatrixUnit matrix_unit(int u) const;
  FLASHINFER_OPS_ANYWHERE StreamUnit stream_unit(int u) const;
  FLASHINFER_OPS_ANYWHERE ItemRange item_range(int l, int cta, int matrix_units,
                                               int stream_units) const;
  FLASHINFER_OPS_ANYWHERE int first_unit(ItemRange& range, int matrix_units) const;
};

}  // namespace flashinfer_ops::gpu

#include "cuda/planner_pieces.h"
#include "cuda/planner_states.h"
#include "cuda/planner_tiles.h"
#include "cuda/planner_units.h"
