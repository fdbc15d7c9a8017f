// Planning cascade attention: from the index arrays of every level to a schedule (schedule.h).
//
// The query rows are cut into tiles of about kTileRows packed rows, and one unit walks the KV of
// every level that its tile's rows see: a shared piece of KV is read once for a whole tile, and no
// partial states arise. Where that gives the threads too few or too uneven units, a tile's KV is
// cut into several units of about equal cost, whose partial states are merged.
//
//   cost of a segment, for one KV head = KV tokens * (kKvTokenCost + packed rows)
//
// The schedule's size depends on the capacities (lengths) of the index arrays alone.
#include <algorithm>
#include <cstring>

#include "common/stable.h"
#include "cpu/schedule.h"

namespace flashinfer_ops {
namespace {

constexpr int64_t kTileRows = 128;      // packed rows: fills the matrix kernels' register blocks
constexpr int64_t kKvTokenCost = 8;     // reading one KV token, in packed rows' worth of products
constexpr int64_t kMinUnitCost = 8192;  // below this a unit is not worth merging
constexpr int64_t kUnitsPerThread = 4;  // (unit, KV head) pairs a thread should get at least
constexpr int64_t kCutAlignment = 64;   // KV tokens; the attention kernel's block

// Sizes of the tables; the same sums as `schedule_size` in meta/plan.py.
struct ScheduleCapacity {
  static constexpr int64_t kBaseTiles = 256;
  static constexpr int64_t kExtraUnits = 512;
  int64_t tiles, units, segments;

  explicit ScheduleCapacity(const std::vector<Tensor>& kv_indptr) {
    int64_t groups = 0;
    for (const Tensor& t : kv_indptr) groups += t.size(0) - 1;
    tiles = kBaseTiles + kv_indptr.back().size(0) - 1;
    units = tiles + kExtraUnits;
    segments = groups + static_cast<int64_t>(kv_indptr.size()) * tiles + kExtraUnits;
  }
  int64_t words() const { return kHeaderWords + 4 * tiles + 4 * units + 8 * segments; }
};

// One level's index arrays on the host.
struct Level {
  const int32_t* qo_indptr;
  const int32_t* kv_indptr;
  const int32_t* last_page_len;
  int64_t num_groups;
  int64_t page_size;

  int64_t kv_len(int64_t group) const {
    const int64_t pages = int64_t{kv_indptr[group + 1]} - kv_indptr[group];
    return pages > 0 ? (pages - 1) * page_size + last_page_len[group] : 0;
  }
};

void check_indptr(const int32_t* indptr, int64_t num_groups, const char* name, size_t level) {
  STD_TORCH_CHECK(indptr[0] >= 0, name, "[", level, "] starts at ", indptr[0],
                  ", expected 0 or more");
  for (int64_t g = 0; g < num_groups; ++g) {
    STD_TORCH_CHECK(indptr[g] <= indptr[g + 1], name, "[", level,
                    "] must not decrease, but goes from ", indptr[g], " to ", indptr[g + 1], " at ",
                    g);
  }
}

std::vector<Level> host_levels(const std::vector<Tensor>& qo_indptr,
                               const std::vector<Tensor>& kv_indptr,
                               const std::vector<Tensor>& kv_last_page_len, int64_t page_size) {
  STD_TORCH_CHECK(!kv_indptr.empty() && qo_indptr.size() == kv_indptr.size() &&
                      kv_last_page_len.size() == kv_indptr.size(),
                  "qo_indptr, kv_indptr and kv_last_page_len have ", qo_indptr.size(), ", ",
                  kv_indptr.size(), " and ", kv_last_page_len.size(),
                  " levels, expected as many, and one at least");
  std::vector<Level> levels;
  for (size_t l = 0; l < kv_indptr.size(); ++l) {
    check_index(qo_indptr[l], "qo_indptr");
    check_index(kv_indptr[l], "kv_indptr");
    check_index(kv_last_page_len[l], "kv_last_page_len");
    const int64_t groups = kv_indptr[l].size(0) - 1;
    STD_TORCH_CHECK(groups >= 0, "kv_indptr[", l, "] is empty, expected at least one element");
    check_sizes(qo_indptr[l], {groups + 1}, "qo_indptr");
    check_sizes(kv_last_page_len[l], {groups}, "kv_last_page_len");
    const Level level{static_cast<const int32_t*>(qo_indptr[l].data_ptr()),
                      static_cast<const int32_t*>(kv_indptr[l].data_ptr()),
                      static_cast<const int32_t*>(kv_last_page_len[l].data_ptr()), groups,
                      page_size};
    check_indptr(level.qo_indptr, groups, "qo_indptr", l);
    check_indptr(level.kv_indptr, groups, "kv_indptr", l);
    for (int64_t g = 0; g < groups; ++g) {
      if (level.kv_indptr[g] == level.kv_indptr[g + 1]) continue;
      STD_TORCH_CHECK(level.last_page_len[g] >= 0 && level.last_page_len[g] <= page_size,
                      "kv_last_page_len[", l, "][", g, "] is ", level.last_page_len[g],
                      ", expected 0 to page_size = ", page_size);
      STD_TORCH_CHECK(level.kv_len(g) < kNoDiagonal, "a group of level ", l, " has ",
                      level.kv_len(g), " KV tokens, expected below 2^30");
    }
    levels.push_back(level);
  }
  return levels;
}

class Planner {
 public:
  Planner(std::vector<Level> levels, int64_t group_size, int64_t num_kv_heads, bool causal)
      : levels_(std::move(levels)),
        group_size_(group_size),
        num_kv_heads_(num_kv_heads),
        causal_(causal) {}

  void run(const ScheduleCapacity& capacity, int32_t* schedule) {
    for (const Level& level : levels_) {
      num_tokens_ = std::max<int64_t>(num_tokens_, level.qo_indptr[level.num_groups]);
    }
    make_tiles(capacity.tiles);
    find_segments();
    cut_units();
    write(capacity, schedule);
  }

 private:
  // Tiles of equal numbers of tokens, as near to kTileRows packed rows as their number allows.
  void make_tiles(int64_t max_tiles) {
    const int64_t wanted = std::max<int64_t>(1, kTileRows / group_size_);
    const int64_t num_tiles = std::min(max_tiles, (num_tokens_ + wanted - 1) / wanted);
    for (int64_t i = 0; i < num_tiles; ++i) {
      tiles_.push_back({static_cast<int32_t>(num_tokens_ * i / num_tiles),
                        static_cast<int32_t>(num_tokens_ * (i + 1) / num_tiles), 0, 0});
    }
  }

  // For each tile, the KV that its rows see, level by level: whole_[tile_start_[i]..].
  void find_segments() {
    std::vector<int64_t> next(levels_.size(), 0);  // first group that may reach into the tile
    for (const Tile& tile : tiles_) {
      tile_start_.push_back(whole_.size());
      for (size_t l = 0; l < levels_.size(); ++l) {
        const Level& level = levels_[l];
        const bool diagonal = causal_ && l + 1 == levels_.size();
        int64_t& g = next[l];
        while (g < level.num_groups && level.qo_indptr[g + 1] <= tile.row_begin) ++g;
        for (int64_t i = g; i < level.num_groups && level.qo_indptr[i] < tile.row_end; ++i) {
          add_segment(level, static_cast<int32_t>(l), i, tile, diagonal);
        }
      }
    }
    tile_start_.push_back(whole_.size());
  }

  void add_segment(const Level& level, int32_t l, int64_t group, const Tile& tile, bool diagonal) {
    const int32_t row_begin = std::max(level.qo_indptr[group], tile.row_begin);
    const int32_t row_end = std::min(level.qo_indptr[group + 1], tile.row_end);
    auto kv_end = static_cast<int32_t>(level.kv_len(group));
    int32_t offset = kNoDiagonal;
    if (diagonal) {  // the group's last row sees all its KV, each row before it one token less
      offset = kv_end - level.qo_indptr[group + 1];
      kv_end = std::min(kv_end, row_end + offset);
    }
    if (row_begin >= row_end || kv_end <= 0) return;
    whole_.push_back({l, level.kv_indptr[group], 0, kv_end, row_begin, row_end, offset, 0});
  }

  int64_t token_cost(const Segment& s) const {
    return kKvTokenCost + int64_t{s.row_end - s.row_begin} * group_size_;
  }
  int64_t cost(const Segment& s) const { return int64_t{s.kv_end - s.kv_begin} * token_cost(s); }

  void cut_units() {
    int64_t total = 0;
    for (const Segment& s : whole_) total += cost(s);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t target = std::max({kMinUnitCost, total / ScheduleCapacity::kExtraUnits + 1,
                                     total * num_kv_heads_ / (threads * kUnitsPerThread)});
    for (size_t i = 0; i < tiles_.size(); ++i) {
      Tile& tile = tiles_[i];
      tile.unit_begin = tile.unit_end = static_cast<int32_t>(units_.size());
      int64_t tile_cost = 0;
      for (size_t s = tile_start_[i]; s < tile_start_[i + 1]; ++s) tile_cost += cost(whole_[s]);
      if (tile_cost == 0) continue;
      const int64_t num_units = (tile_cost + target - 1) / target;
      cut_tile(i, (tile_cost + num_units - 1) / num_units);
      tile.unit_end = static_cast<int32_t>(units_.size());
      if (tile.unit_end - tile.unit_begin < 2) continue;
      for (int32_t u = tile.unit_begin; u < tile.unit_end; ++u) {
        units_[u].partial_row = static_cast<int32_t>(num_partial_rows_);
        num_partial_rows_ += tile.row_end - tile.row_begin;
      }
    }
  }

  // Deals the tile's segments to units of `budget` each, cutting where one runs over.
  void cut_tile(size_t tile, int64_t budget) {
    int64_t left = 0;  // of the current unit's budget
    for (size_t i = tile_start_[tile]; i < tile_start_[tile + 1]; ++i) {
      Segment rest = whole_[i];
      while (rest.kv_begin < rest.kv_end) {
        if (left <= 0) {
          const auto begin = static_cast<int32_t>(segments_.size());
          units_.push_back({static_cast<int32_t>(tile), begin, begin, -1});
          left = budget;
        }
        int64_t take = (left + token_cost(rest) - 1) / token_cost(rest);
        take = (take + kCutAlignment - 1) / kCutAlignment * kCutAlignment;
        Segment piece = rest;
        piece.kv_end = static_cast<int32_t>(std::min<int64_t>(rest.kv_end, rest.kv_begin + take));
        rest.kv_begin = piece.kv_end;
        left -= cost(piece);
        segments_.push_back(piece);
        units_.back().segment_end = static_cast<int32_t>(segments_.size());
      }
    }
  }

  void write(const ScheduleCapacity& capacity, int32_t* schedule) const {
    STD_TORCH_CHECK(static_cast<int64_t>(tiles_.size()) <= capacity.tiles &&
                        static_cast<int64_t>(units_.size()) <= capacity.units &&
                        static_cast<int64_t>(segments_.size()) <= capacity.segments,
                    "the schedule's capacity is too small");
    std::memset(schedule, 0, capacity.words() * sizeof(int32_t));
    const auto tile_offset = static_cast<int32_t>(kHeaderWords);
    const auto unit_offset = static_cast<int32_t>(tile_offset + 4 * capacity.tiles);
    const auto segment_offset = static_cast<int32_t>(unit_offset + 4 * capacity.units);
    const Header header{static_cast<int32_t>(num_tokens_),
                        static_cast<int32_t>(tiles_.size()),
                        static_cast<int32_t>(units_.size()),
                        static_cast<int32_t>(segments_.size()),
                        static_cast<int32_t>(num_partial_rows_),
                        tile_offset,
                        unit_offset,
                        segment_offset};
    const auto copy = [&](int64_t offset, const auto& table) {
      if (!table.empty()) {
        std::memcpy(schedule + offset, table.data(), table.size() * sizeof(table[0]));
      }
    };
    std::memcpy(schedule, &header, sizeof(header));
    copy(tile_offset, tiles_);
    copy(unit_offset, units_);
    copy(segment_offset, segments_);
  }

  const std::vector<Level> levels_;
  const int64_t group_size_;
  const int64_t num_kv_heads_;
  const bool causal_;
  int64_t num_tokens_ = 0;
  int64_t num_partial_rows_ = 0;
  std::vector<Tile> tiles_;
  std::vector<Segment> whole_;      // uncut, tile by tile
  std::vector<size_t> tile_start_;  // of each tile in whole_, and the end
  std::vector<Unit> units_;
  std::vector<Segment> segments_;
};

// cascade_plan.out(Tensor[] qo_indptr, Tensor[] kv_indptr, Tensor[] kv_last_page_len,
//   int num_qo_heads, int num_kv_heads, int head_dim, int page_size, bool causal,
//   Tensor(a!) schedule) -> ()
void cascade_plan_out(const std::vector<Tensor>& qo_indptr, const std::vector<Tensor>& kv_indptr,
                      const std::vector<Tensor>& kv_last_page_len, int64_t num_qo_heads,
                      int64_t num_kv_heads, int64_t head_dim, int64_t page_size, bool causal,
                      const Tensor& schedule) {
  STD_TORCH_CHECK(num_kv_heads > 0 && num_qo_heads > 0 && num_qo_heads % num_kv_heads == 0,
                  "num_qo_heads is ", num_qo_heads,
                  ", expected a multiple of num_kv_heads = ", num_kv_heads);
  STD_TORCH_CHECK(page_size > 0 && page_size < kNoDiagonal, "page_size is ", page_size,
                  ", expected 1 or more, below 2^30");
  std::vector<Level> levels = host_levels(qo_indptr, kv_indptr, kv_last_page_len, page_size);
  const ScheduleCapacity capacity(kv_indptr);
  check_index(schedule, "schedule");
  check_sizes(schedule, {capacity.words()}, "schedule");
  Planner(std::move(levels), num_qo_heads / num_kv_heads, num_kv_heads, causal)
      .run(capacity, static_cast<int32_t*>(schedule.data_ptr()));
}

// cascade_plan(Tensor[] qo_indptr, Tensor[] kv_indptr, Tensor[] kv_last_page_len, int num_qo_heads,
//   int num_kv_heads, int head_dim, int page_size, bool causal) -> Tensor
Tensor cascade_plan(const std::vector<Tensor>& qo_indptr, const std::vector<Tensor>& kv_indptr,
                    const std::vector<Tensor>& kv_last_page_len, int64_t num_qo_heads,
                    int64_t num_kv_heads, int64_t head_dim, int64_t page_size, bool causal) {
  STD_TORCH_CHECK(!kv_indptr.empty(), "kv_indptr has no levels, expected one at least");
  Tensor schedule = empty(kv_indptr[0], {ScheduleCapacity(kv_indptr).words()}, ScalarType::Int);
  cascade_plan_out(qo_indptr, kv_indptr, kv_last_page_len, num_qo_heads, num_kv_heads, head_dim,
                   page_size, causal, schedule);
  return schedule;
}

}  // namespace
}  // namespace flashinfer_ops

STABLE_TORCH_LIBRARY_IMPL(flashinfer_ops, CPU, m) {
  m.impl("cascade_plan", TORCH_BOX(&flashinfer_ops::cascade_plan));
  m.impl("cascade_plan.out", TORCH_BOX(&flashinfer_ops::cascade_plan_out));
}
