// Steps 4 and 5 of the planner (planner.h): the lengths of runs, ranks of states, places of units
// and of scratch rows.
#pragma once

#include "cuda/planner.h"

namespace flashinfer_ops::gpu {

// Adds up what n walks come to when the longest is cut into candidate_runs(k) runs and the others
// into runs of that length. A lane takes a candidate, a warp its share of the walks.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE void Planner<Block, Memory>::sum_runs(RunSums* sums, int n,
                                                              const Walk* walks, int longest) {
  if (block.warp() >= n) return;
  FLASHINFER_OPS_ROLLED
  for (int k = block.lane(); k < kCandidates; k += block.num_lanes()) {
    const int run = run_of(longest, k);
    const float inverse = 1.0f / run;
    RunSums sum{};
    FLASHINFER_OPS_BY_FOURS
    for (int i = block.warp(); i < n; i += block.num_warps()) {
      const Walk w = walks[i];
      // ceil(blocks / run), which a float gives up to one.
      const int blocks = w.blocks + run - 1;
      const int about = static_cast<int>(blocks * inverse), rest = blocks - about * run;
      const uint32_t runs = about + (rest >= run) - (rest < 0), parts = w.parts;
      sum = {sum.units + runs, sum.items + runs * parts, sum.blocks + w.blocks * parts,
             sum.states + (runs > 1 ? runs * w.rows : 0)};
    }
    block.add(&sums[k].units, sum.units);
    block.add(&sums[k].items, sum.items);
    block.add(&sums[k].blocks, sum.blocks);
    block.add(&sums[k].states, sum.states);
  }
}

// Time of units of `run` blocks each, the longest.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE float Planner<Block, Memory>::time_of(const RunSums& sums, int run,
                                                              float token, float slots) const {
  const Costs& c = in.costs;
  const float heads = static_cast<float>(in.num_kv_heads);
  const float items = max_float(sums.items * heads, 1), total = sums.blocks * heads;
  const float at_once = min_float(items, slots * in.num_sms), share = 1.0f / at_once;
  // An SM divides its share of the memory's rate among the units that it has.
  const float on_sm = static_cast<float>(static_cast<int>(at_once * in.inverse_sms + 0.9999f));
  const float block_time = kBlock * max_float(c.token_latency, token * on_sm);
  const float unit = product(run, block_time) + c.unit_start;
  // The half keeps a quotient that is whole from being rounded down.
  const float waves = static_cast<float>(static_cast<int>((items + at_once - 0.5f) * share));
  const float even = product(product(total, block_time) + product(items, c.unit_start), share);
  return min_float(product(waves, unit), even + unit);
}

// And of the partial states that they leave; no time is as long as that of units and states that
// have no room. One run a walk always has.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE float Planner<Block, Memory>::time_of_states(const RunSums& sums,
                                                                     int64_t most_units,
                                                                     int64_t most_states) const {
  if (sums.units > most_units || sums.states > most_states) return 1e38f;
  return product(sums.states * static_cast<float>(in.num_kv_heads),
                 in.group_size * in.costs.state * in.inverse_sms);
}

// Matrix units of tiles of many rows compute, stream units read: where the last round of matrix
// units would leave SMs idle, or with a round more, fewer SMs take the matrix units and the others
// read meanwhile.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE Sharing Planner<Block, Memory>::share_sms(const RunSums& tiles, int run,
                                                                  const RunSums& own) const {
  const Costs& c = in.costs;
  const float heads = static_cast<float>(in.num_kv_heads);
  const float block_time = kBlock * max_float(c.token_latency, c.matrix_token[0]);
  const float unit = product(run, block_time) + c.unit_start;
  const float most = min_float(tiles.items * heads, kMaxSum);
  const float total = product(tiles.blocks * heads, block_time) + product(most, c.unit_start);
  const int items = max_int(static_cast<int>(most), 1), least = ceil_div(items, in.num_sms);
  const float own_items = min_float(own.items * heads, kMaxSum);
  const float own_time = product(own.blocks * heads, kBlock * c.beside_token) +
                         product(own_items, 0.5f * c.unit_start);
  const float all = 1.0f / min_float(in.num_sms, c.beside_sms);
  float best = 3e38f, best_meanwhile = 0;
  int best_ctas = in.num_sms;
  FLASHINFER_OPS_ROLLED
  for (int rounds = least; rounds < least + kMoreRounds; ++rounds) {
    const int ctas = ceil_div(items, rounds), others = in.num_sms - ctas;
    const float end = min_float(product(rounds, unit), total / ctas + unit);
    const float meanwhile = product(min_float(others, c.beside_sms), end);
    const float time = end + product(max_float(own_time - meanwhile, 0), all);
    if (time < best) best = time, best_ctas = ctas, best_meanwhile = meanwhile;
  }
  const int others = in.num_sms - best_ctas;
  const float done = min_float(best_meanwhile / max_float(own_time, 1), 1);
  const int last = items - divide(items, best_ctas) * best_ctas;
  return {best, best_ctas,
          others > 0 ? static_cast<int>(product(done, own_items) / (2 * others)) : 0,
          last > 0                 ? last
          : best_ctas < in.num_sms ? best_ctas
                                   : 0};
}

template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE void Planner<Block, Memory>::choose_runs(int64_t most_states) {
  const Costs& c = in.costs;
  const int longest = *longest_own;
  FLASHINFER_OPS_ROLLED
  for (int own = 0; own <= (num_own > 0); ++own) {
    sum_runs(run_sums + own * kCandidates, own ? num_own : num_tiles, own ? own_walks : tile_walks,
             own ? longest : longest_walk);
  }
  block.sync();
  RunSums own{};
  if (num_own > 0) {
    const RunSums* sums = run_sums + kCandidates;
    const int chosen = block.lowest([&](int k) {
      return time_of(sums[k], run_of(longest, k), c.own_token, c.stream_slots) +
             time_of_states(sums[k], layout.stream_units, most_states);
    });
    stream_run = run_of(longest, chosen);
    own = sums[chosen];
  }
  const bool share = in.packed && tile_class == 0 && num_own > 0;
  sharing = {0, in.num_sms, 0, 0};
  const int chosen = block.lowest([&](int k) {
    const int run = run_of(longest_walk, k);
    if (share) sharing = share_sms(run_sums[k], run, own);
    const float time =
        share ? sharing.time
              : time_of(run_sums[k], run, c.matrix_token[tile_class], c.matrix_slots[tile_class]);
    return time + time_of_states(run_sums[k], layout.matrix_units, most_states);
  });
  matrix_run = run_of(longest_walk, chosen);
  if (share) sharing = block.of_candidate(sharing, chosen);
}

template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE Piece Planner<Block, Memory>::own_piece(int own) const {
  const Place at = own_place[own];
  return piece(at.tile_level / kMaxLevels, at.tile_level % kMaxLevels, at.group);
}

// The rank of an own piece's first state comes after its tile's and its own ancestors'.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE void Planner<Block, Memory>::rank_own_pieces() {
  auto* table_of_own = table<OwnPiece>(layout.own_at);
  FLASHINFER_OPS_ROLLED
  for (int o = block.thread(); o < num_own; o += block.size()) {
    const Piece x = own_piece(o);
    const int states = own_states(o);
    int rank = tile_states(x.tile);
    FLASHINFER_OPS_ROLLED
    for (int l = 0; l < x.level; ++l) {
      if ((tile_walks[x.tile].rank >> l & 1) == 0) continue;
      // The last own piece of the tile that is on a level before, or on this one and begins no
      // later: own pieces are in the order of levels and rows.
      int low = tile_first[x.tile].own, n = o - low;
      FLASHINFER_OPS_ROLLED
      while (n > 0) {
        const int half = (n + 1) >> 1;
        const Piece y = own_piece(low + half - 1);
        if (y.level < l || (y.level == l && y.row_begin <= x.row_begin)) low += half;
        n -= half;
      }
      if (low == tile_first[x.tile].own) continue;
      const Piece above = own_piece(low - 1);
      if (above.level == l && above.row_end > x.row_begin) rank += own_states(low - 1);
    }
    if (block.is_first()) table_of_own[o] = {x.row_begin, x.row_end, rank, states};
    own_walks[o].rank = rank;
    block.raise(tile_ranks + x.tile, rank + states);
  }
}

// Writes header and tiles. Returns the number of units, or -1 when they and their states do not fit
// into the schedule and the scratch.
template <class Block, class Memory>
FLASHINFER_OPS_ANYWHERE int Planner<Block, Memory>::place_states() {
  if (num_own > 0) {
    rank_own_pieces();
    block.sync();
  }
  auto* tiles = table<Tile>(layout.tile_at);
  // Matrix units, stream units, scratch rows. A tile with more rows than there are counts as full:
  // that keeps sums within 32 bits.
  const auto count = [&](int i, int (&value)[3]) {
    if (i < num_tiles) {
      value[0] = tile_states(i);
      const int ranks = max_int(value[0], tile_ranks[i]);
      const int64_t rows = ranks > 1 ? int64_t{ranks} * tile_walks[i].rows : 0;
      value[2] = static_cast<int>(rows > layout.partial_rows ? layout.partial_rows + 1 : rows);
    }
    if (i < num_own) value[1] = own_states(i);
  };
  const auto place = [&](int i, const int (&at)[3], const int (&value)[3]) {
    if (i < num_own) own_units[i] = at[1];
    if (i < num_tiles) {
      const int scratch = value[2] > 0 ? at[2] : -1;
      tile_units[i] = at[0];
      tile_scratch[i] = scratch;
      if (!block.is_first()) return;
      tiles[i] = {tile_row[i],
                  tile_row[i + 1],
                  value[0],
                  scratch,
                  tile_first[i].own,
                  tile_first[i + 1].own,
                  max_int(value[0], tile_ranks[i]),
                  0};
    }
  };
  int total[3];
  block.scan(max_int(num_tiles, num_own), count, place, total);
  if (block.thread() == 0) {
    tile_units[num_tiles] = total[0];
    own_units[num_own] = total[1];
    if (block.is_first()) {
      *table<Header>(0) = {num_tokens,
                           num_tiles,
                           tile_tokens,
                           total[0],
                           total[1],
                           total[2],
                           max_int(in.own_part, 1),
                           total[2] > 0 || total[0] != num_tiles,
                           {}};
    }
  }
  block.sync();
  const bool fits = total[0] <= layout.matrix_units && total[1] <= layout.stream_units &&
                    tile_first[num_tiles].granules <= layout.granules &&
                    total[2] <= layout.partial_rows;
  return fits ? total[0] + total[1] : -1;
}

}  // namespace flashinfer_ops::gpu
