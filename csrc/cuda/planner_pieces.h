// Step 3 of the planner (planner.h): what each tile sees, and whether it walks it or pieces own it.
//
// A warp of the cluster takes a run of tiles and its lanes take pieces. It goes over them twice: to
// count, and once the counts of the tiles before are known, to write segments, granules and own
// pieces in place.
#pragma once

#include "cuda/planner.h"

namespace flashinfer_ops::gpu {

template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE int Planner<Block, Memory>::first_tile(int warp) const {
  return min_int(warp * ceil_div(num_tiles, block.cluster_warps()), num_tiles);
}

// The groups of each level that share rows with the warp's tiles: a lane searches for one level of
// a tile, then the lanes add up the levels of each tile.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE void Planner<Block, Memory>::find_levels(int begin, int end) {
  const int levels = in.num_levels;
  FLASHINFER_OPS_ROLLED
  for (int e = begin * levels + block.lane(); e < end * levels; e += block.num_lanes()) {
    const int tile = divide(e, levels), l = e - tile * levels, n = num_groups(l);
    const Found found = count_up_to(level_rows(l), n + 1, tile_row[tile], tile_row[tile + 1] - 1);
    entry_group[e] = max_int(found.x - 1, 0);
    entry_piece[e + tile] = max_int(min_int(found.y, n) - entry_group[e], 0);
  }
  block.warp_sync();
  FLASHINFER_OPS_ROLLED
  for (int tile = begin; tile < end; ++tile) {
    int32_t* before = entry_piece + tile * (levels + 1);
    int pieces = 0;
    FLASHINFER_OPS_ROLLED
    for (int base = 0; base < levels; base += block.num_lanes()) {
      const int l = base + block.lane();
      int total;
      const int at = block.warp_scan(l < levels ? before[l] : 0, &total);
      if (l < levels) before[l] = pieces + at;
      pieces += total;
    }
    if (block.lane() == 0) before[levels] = pieces;
  }
  block.warp_sync();
}

template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE Piece Planner<Block, Memory>::piece(int tile, int level, int group) const {
  const int32_t* rows = level_rows(level);
  const int begin = rows[group], end = rows[group + 1];
  Piece x{tile,
          level,
          group,
          max_int(begin, tile_row[tile]),
          min_int(end, tile_row[tile + 1]),
          lengths[in.first_group[level] + group],
          kNoDiagonal};
  if (in.causal && level == in.num_levels - 1) {
    // The group's last row sees all its KV, each row before it one token less.
    x.diagonal = x.kv_end - end;
    x.kv_end = min_int(x.kv_end, x.row_end + x.diagonal);
  }
  if (x.row_begin >= x.row_end) x.kv_end = 0;
  return x;
}

template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE Piece Planner<Block, Memory>::piece_of_tile(int tile, int p) const {
  const int32_t* before = entry_piece + tile * (in.num_levels + 1);
  const int level = count_up_to(before + 1, in.num_levels - 1, p);
  return piece(tile, level, entry_group[tile * in.num_levels + level] + p - before[level]);
}

// An own piece's ranks follow its ancestors', so each piece above it holds all its rows or none.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE bool Planner<Block, Memory>::nested(const Piece& x) const {
  if (x.row_end - x.row_begin == 1) return true;
  FLASHINFER_OPS_ROLLED
  for (int l = 0; l < x.level; ++l) {
    const int32_t* before = entry_piece + x.tile * (in.num_levels + 1) + l;
    const int32_t* borders = level_rows(l) + entry_group[x.tile * in.num_levels + l];
    const int n = before[1] - before[0] + 1;
    const int next = count_up_to(borders, n, x.row_begin);
    if (next < n && borders[next] < x.row_end) return false;
  }
  return true;
}

template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE Kind Planner<Block, Memory>::kind(const Piece& x, bool all_kinds) const {
  if (x.kv_end <= 0) return Kind::kNone;
  if (!all_kinds) return Kind::kSegment;
  const int tokens = x.row_end - x.row_begin;
  const bool whole = tokens == tile_row[x.tile + 1] - tile_row[x.tile];
  if (!whole && tokens <= in.own_part) {
    const Costs& c = in.costs;
    const int parts = parts_of(tokens, in.stream_part);
    const float own = c.own_token + product(c.own_again, parts - 1);
    const float gain = product(x.kv_end, c.matrix_token[tile_class] - own);
    const float loss = product(c.own_unit, parts) + product(c.state, tokens * in.group_size);
    if (gain > loss && nested(x)) return Kind::kOwn;
  }
  return !in.packed && x.kv_end <= kGatherTokens ? Kind::kGranules : Kind::kSegment;
}

// Tokens that a segment takes of its tile's walk. Pages of a multiple of kGranule tokens are copied
// by kGranule neighbours at once, where the segments before end evenly.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE int Planner<Block, Memory>::walk_tokens(const Piece& x) const {
  const int step = !in.packed ? kBlock : in.page_size % kGranule == 0 ? kGranule : 1;
  return (x.kv_end + step - 1) & -step;  // a power of two
}

// The most tokens of a first piece that may come last in its tile's walk; 0 where none may, as the
// tiles do not keep the SMs busy as they are, so that their walks are likely to be cut.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE int Planner<Block, Memory>::most_last_tokens() const {
  if (!in.packed || tile_class != 0 || num_own != 0) return 0;
  const float items = product(num_tiles, static_cast<float>(in.num_kv_heads));
  const float rounds = min_float(product(items, in.inverse_sms), 1e6f);
  const float whole = static_cast<float>(static_cast<int>(rounds + 0.9999f));
  if (rounds < product(kFilledRounds, whole)) return 0;
  return divide(kCachedTokens, min_int(in.num_kv_heads, ceil_div(in.num_sms, num_tiles)));
}

// Whether it does. What other tiles walk too comes from the L2 cache and has much to compute; what
// only few rows see comes from memory. Every other tile begins with the latter, or all SMs would
// compute at the same time, and then all read.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE bool Planner<Block, Memory>::comes_last(const Piece& x, int most) const {
  if (x.kv_end < kLastTokens || x.kv_end > most || x.diagonal != kNoDiagonal) return false;
  const int32_t* rows = level_rows(x.level) + x.group;
  const int begin = tile_row[x.tile], end = tile_row[x.tile + 1];
  const int tokens = tile_counts[x.tile].tokens, others = tokens - x.kv_end;
  return rows[0] <= begin && rows[1] >= end && rows[1] - rows[0] > end - begin &&
         others >= max_int(kOtherTokens, tokens / kOtherPart);
}

// One pass over a tile's pieces, whose counts it returns. `at` counts those of the tiles before.
// Where a lane has one piece at most, and went over it last, it is known.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE Counts Planner<Block, Memory>::visit_tile(int tile, const Counts& at,
                                                                  bool all_kinds, bool write,
                                                                  int most_last, Visited& last,
                                                                  bool is_known) {
  auto* segments = table<Segment>(layout.segment_at);
  auto* granules = table<Segment>(layout.granule_at);
  const int pieces = entry_piece[tile * (in.num_levels + 1) + in.num_levels];
  Counts sum{};
  int own_levels = 0, moved = 0;  // tokens of the walk that come last instead of first
  FLASHINFER_OPS_ROLLED
  for (int base = 0; base < pieces; base += block.num_lanes()) {
    if (!is_known || pieces > block.num_lanes()) {
      last = {};
      if (base + block.lane() < pieces) {
        last.piece = piece_of_tile(tile, base + block.lane());
        last.kind = kind(last.piece, all_kinds);
      }
    }
    const Piece& x = last.piece;
    const Kind k = last.kind;
    const bool is_first = base + block.lane() == 0;
    if (most_last > 0 && base == 0 && tile % 2 == 1) {
      const bool moves = is_first && k == Kind::kSegment && comes_last(x, most_last);
      moved = block.warp_max(moves ? walk_tokens(x) : 0);
    }
    const int granule_count = k == Kind::kGranules ? ceil_div(x.kv_end, kGranule) : 0;
    int segment_total, own_total, token_total, granule_total = 0, g = 0;
    const int s = at.plain + sum.plain + block.warp_rank(k == Kind::kSegment, &segment_total);
    const int o = at.own + sum.own + block.warp_rank(k == Kind::kOwn, &own_total);
    const int walk =
        add_up(sum.tokens, block.warp_scan(k == Kind::kSegment ? walk_tokens(x) : 0, &token_total));
    if (!in.packed) {
      g = at.granules + sum.granules + block.warp_scan(granule_count, &granule_total);
    }
    sum = {sum.plain + segment_total, sum.granules + granule_total, sum.own + own_total,
           add_up(sum.tokens, token_total)};
    if (k == Kind::kOwn) own_levels |= 1 << x.level;
    if (!write || k == Kind::kNone) continue;

    if (k == Kind::kOwn) {
      const int rows = x.row_end - x.row_begin;
      const Walk own{blocks_of(x.kv_end), rows, parts_of(rows, in.stream_part), 0};
      block.store_all(own_place + o, Place{tile * kMaxLevels + x.level, x.group});
      block.store_all(own_walks + o, own);
      block.raise_all(longest_own, own.blocks);
      continue;
    }
    Segment segment{x.level, first_page(x), 0, x.kv_end, x.row_begin, x.row_end, x.diagonal, walk};
    if (k == Kind::kSegment) {
      int place = s;
      if (moved > 0) {
        place = is_first ? at.plain + tile_counts[tile].plain - 1 : s - 1;
        segment.walk = (is_first ? tile_counts[tile].tokens : walk) - moved;
      }
      segments[place] = segment;
      block.store_all(segment_walk + place, segment.walk);
    }
    segment.walk = 0;
    FLASHINFER_OPS_ROLLED
    for (int i = 0; i < granule_count && g + i < layout.granules; ++i) {
      segment.kv_begin = i * kGranule;
      segment.kv_end = min_int(segment.kv_begin + kGranule, x.kv_end);
      granules[g + i] = segment;
    }
  }
  last.own_levels = block.warp_or(own_levels);
  return sum;
}

// The first pass counts. Once the counts of the tiles before are known, the second writes segments,
// granules and own pieces.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE bool Planner<Block, Memory>::find_pieces(bool all_kinds) {
  const int begin = first_tile(block.cluster_warp()), end = first_tile(block.cluster_warp() + 1);
  // Zeros for steps 4 and 5; the barrier between the passes is one for these too.
  for (int t = block.thread(); t < num_tiles; t += block.size()) tile_ranks[t] = 0;
  for (int i = block.thread(); i < 8 * kCandidates; i += block.size()) {
    reinterpret_cast<int32_t*>(run_sums)[i] = 0;
  }
  if (block.thread() == 0) *longest_own = 0;
  find_levels(begin, end);
  Counts at{};
  Visited last{};
  int most_last = 0;
  FLASHINFER_OPS_ROLLED
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) {
      block.sync_all();
      block.stamp(1);
      at = sum_counts(begin);
      if (!memory.fits()) return false;
      most_last = most_last_tokens();
    }
    FLASHINFER_OPS_ROLLED
    for (int tile = begin; tile < end; ++tile) {
      const bool is_known = pass == 1 && end - begin == 1;
      const Counts c = visit_tile(tile, at, all_kinds, pass == 1, most_last, last, is_known);
      if (pass == 1) {
        block.warp_store_all(tile_first + tile, at);
        at = {at.plain + c.plain, at.granules + c.granules, at.own + c.own, 0};
      } else {
        const int rows = tile_row[tile + 1] - tile_row[tile];
        const int blocks = blocks_of(c.granules * kGranule) + blocks_of(c.tokens);
        block.warp_store_all(tile_counts + tile, c);
        block.warp_store_all(tile_walks + tile,
                             Walk{blocks, rows, parts_of(rows, in.tile_part), last.own_levels});
      }
    }
  }
  block.sync_all();
  return true;
}

// Of the tiles before `tile`. Also makes room for what all tiles have.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE Counts Planner<Block, Memory>::sum_counts(int tile) {
  Counts at{}, all{};
  longest_walk = 0;
  FLASHINFER_OPS_ROLLED
  for (int t = block.lane(); t < num_tiles; t += block.num_lanes()) {
    const Counts c = tile_counts[t];
    const int counted = t < tile;
    at = {at.plain + counted * c.plain, at.granules + counted * c.granules,
          at.own + counted * c.own, 0};
    all = {all.plain + c.plain, all.granules + c.granules, all.own + c.own, 0};
    longest_walk = max_int(longest_walk, tile_walks[t].blocks);
  }
  at = {block.warp_sum(at.plain), block.warp_sum(at.granules), block.warp_sum(at.own), 0};
  all = {block.warp_sum(all.plain), block.warp_sum(all.granules), block.warp_sum(all.own), 0};
  longest_walk = block.warp_max(longest_walk);
  num_own = all.own;
  segment_walk = memory.ints(all.plain);
  own_place = reinterpret_cast<Place*>(memory.ints(2 * num_own));
  own_walks = reinterpret_cast<Walk*>(memory.ints(4 * num_own));
  own_units = memory.ints(num_own + 1);
  if (memory.fits() && block.thread() == 0) tile_first[num_tiles] = all;
  return at;
}

}  // namespace flashinfer_ops::gpu
