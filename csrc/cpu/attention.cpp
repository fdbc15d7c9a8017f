// cascade_attention on the CPU: checks, the walk over the schedule, threads, partial states.
//
//   q [tokens, num_qo_heads, head_dim], k_cache and v_cache [pages, page_size, num_kv_heads,
//   head_dim], all of one dtype (float32, float16, bfloat16), any strides but 1 in the last
//   dimension; schedule as in schedule.h; out as q, lse [tokens, num_qo_heads] float32, base 2.
//
// Threads take items, a KV head of a work unit or a few, from one counter. An item's result does
// not depend on who computes it, and partial states are merged in the order of the units, so a
// schedule always gives the same bits. Rows of tiles without units, and rows of no tile, get the
// empty state.
//
// The schedule is data: every index in it, and every page that it reaches, is checked before the
// first thread starts, since nothing may be thrown from a worker.
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "common/stable.h"
#include "cpu/capability.h"

namespace flashinfer_ops {

namespace {

// Grow-only scratch of the calling thread, shared out to the workers: allocating it anew each call
// would cost a page fault every 4 KB.
char* scratch_memory(int64_t bytes) {
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t capacity = 0;
  if (capacity < bytes) {
    memory.reset();
    capacity = 0;
    memory.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
    capacity = bytes;
  }
  return memory.get();
}

// What the schedule tensor says, checked.
struct ScheduleView {
  Header header;
  const Tile* tiles;
  const Unit* units;
  const Segment* segments;
};

ScheduleView read_schedule(const Tensor& schedule) {
  check_index(schedule, "schedule");
  const int64_t words = schedule.numel();
  STD_TORCH_CHECK(words >= kHeaderWords, "schedule has ", words, " words, fewer than its header");
  const int32_t* base = schedule.const_data_ptr<int32_t>();
  ScheduleView view;
  std::memcpy(&view.header, base, sizeof(Header));
  const auto table = [&](const char* name, int64_t offset, int64_t count, int64_t size) {
    const int64_t end = offset + count * size / static_cast<int64_t>(sizeof(int32_t));
    STD_TORCH_CHECK(count >= 0 && offset >= kHeaderWords && end <= words, "schedule: ", count, " ",
                    name, " at word ", offset, " do not lie in its ", words, " words");
    return base + offset;
  };
  const Header& header = view.header;
  view.tiles = reinterpret_cast<const Tile*>(
      table("tiles", header.tile_offset, header.num_tiles, sizeof(Tile)));
  view.units = reinterpret_cast<const Unit*>(
      table("units", header.unit_offset, header.num_units, sizeof(Unit)));
  view.segments = reinterpret_cast<const Segment*>(
      table("segments", header.segment_offset, header.num_segments, sizeof(Segment)));
  return view;
}

// Marks in `served` the tokens whose tile has units.
void check_tiles(const ScheduleView& view, int64_t num_tokens, std::vector<char>* served) {
  const Header& header = view.header;
  STD_TORCH_CHECK(header.num_tokens >= 0 && header.num_tokens <= num_tokens,
                  "the schedule was planned for ", header.num_tokens, " tokens, q has ",
                  num_tokens);
  STD_TORCH_CHECK(header.num_partial_rows >= 0, "schedule: ", header.num_partial_rows,
                  " partial rows");
  int64_t previous_row = 0, previous_unit = 0;
  for (int64_t i = 0; i < header.num_tiles; ++i) {
    const Tile& tile = view.tiles[i];
    // Tiles in order and apart from each other: no two threads write one row.
    STD_TORCH_CHECK(previous_row <= tile.row_begin && tile.row_begin <= tile.row_end &&
                        tile.row_end <= header.num_tokens,
                    "schedule: tile ", i, " has rows [", tile.row_begin, ", ", tile.row_end,
                    ") after row ", previous_row, ", of ", header.num_tokens);
    STD_TORCH_CHECK(previous_unit <= tile.unit_begin && tile.unit_begin <= tile.unit_end &&
                        tile.unit_end <= header.num_units,
                    "schedule: tile ", i, " has units [", tile.unit_begin, ", ", tile.unit_end,
                    ") after unit ", previous_unit, ", of ", header.num_units);
    previous_row = tile.row_end;
    previous_unit = tile.unit_end;
    const int64_t units = tile.unit_end - tile.unit_begin;
    const int64_t rows = tile.row_end - tile.row_begin;
    for (int64_t u = tile.unit_begin; u < tile.unit_end; ++u) {
      const Unit& unit = view.units[u];
      const bool whole = unit.partial_row < 0;
      STD_TORCH_CHECK(unit.tile == i, "schedule: unit ", u, " of tile ", i, " names tile ",
                      unit.tile);
      STD_TORCH_CHECK(whole ? units == 1 : unit.partial_row + rows <= header.num_partial_rows,
                      "schedule: unit ", u, " of ", units, " of its tile has partial row ",
                      unit.partial_row, " of ", header.num_partial_rows);
    }
    if (units > 0) std::memset(served->data() + tile.row_begin, 1, rows);
  }
}

void check_segments(const ScheduleView& view, const std::vector<Tensor>& kv_indices,
                    int64_t page_size, int64_t num_pages) {
  for (int64_t u = 0; u < view.header.num_units; ++u) {
    const Unit& unit = view.units[u];
    STD_TORCH_CHECK(unit.tile >= 0 && unit.tile < view.header.num_tiles, "schedule: unit ", u,
                    " names tile ", unit.tile, " of ", view.header.num_tiles);
    STD_TORCH_CHECK(0 <= unit.segment_begin && unit.segment_begin <= unit.segment_end &&
                        unit.segment_end <= view.header.num_segments,
                    "schedule: unit ", u, " has segments [", unit.segment_begin, ", ",
                    unit.segment_end, ") of ", view.header.num_segments);
    const Tile& tile = view.tiles[unit.tile];
    // check_tiles has seen the partial rows of the tiles' own units only.
    STD_TORCH_CHECK(tile.unit_begin <= u && u < tile.unit_end, "schedule: unit ", u,
                    " is not among the units [", tile.unit_begin, ", ", tile.unit_end,
                    ") of its tile");
    for (int64_t s = unit.segment_begin; s < unit.segment_end; ++s) {
      const Segment& segment = view.segments[s];
      STD_TORCH_CHECK(0 <= segment.level && segment.level < static_cast<int64_t>(kv_indices.size()),
                      "schedule: segment ", s, " has level ", segment.level, " of ",
                      kv_indices.size());
      STD_TORCH_CHECK(tile.row_begin <= segment.row_begin && segment.row_begin <= segment.row_end &&
                          segment.row_end <= tile.row_end,
                      "schedule: segment ", s, " has rows [", segment.row_begin, ", ",
                      segment.row_end, ") outside of its tile's [", tile.row_begin, ", ",
                      tile.row_end, ")");
      const Tensor& indices = kv_indices[segment.level];
      const int64_t first = segment.page_begin + int64_t{segment.kv_begin} / page_size;
      const int64_t last = segment.page_begin + (segment.kv_end + page_size - 1) / page_size;
      STD_TORCH_CHECK(0 <= segment.page_begin && 0 <= segment.kv_begin &&
                          segment.kv_begin <= segment.kv_end && last <= indices.numel(),
                      "schedule: segment ", s, " has KV tokens [", segment.kv_begin, ", ",
                      segment.kv_end, ") from entry ", segment.page_begin, " of kv_indices[",
                      segment.level, "], which has ", indices.numel());
      const int32_t* pages = indices.const_data_ptr<int32_t>();
      for (int64_t i = first; i < last; ++i) {
        STD_TORCH_CHECK(0 <= pages[i] && pages[i] < num_pages, "kv_indices[", segment.level, "][",
                        i, "] is page ", pages[i], ", but the cache has ", num_pages, " pages");
      }
    }
  }
}

ElementType element_type(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::Half:
      return ElementType::kFloat16;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "q has dtype ", toString(q.scalar_type()),
                      ", expected float32, float16 or bfloat16");
  }
}

CacheView cache_view(const Tensor& cache) {
  return {cache.const_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

// Dense units one KV head at a time, streaming units as many as leave each thread some items.
std::vector<AttentionItem> make_items(const AttentionProblem& problem, int64_t num_units,
                                      int64_t threads) {
  const int64_t group = problem.num_qo_heads / problem.num_kv_heads;
  const auto rows_of = [&](const auto& range) {
    return (int64_t{range.row_end} - range.row_begin) * group;
  };
  const auto streams = [&](const Unit& unit) {
    for (int64_t s = unit.segment_begin; s < unit.segment_end; ++s) {
      if (rows_of(problem.segments[s]) > kMaxGemvRows) return false;
    }
    return true;
  };
  // Whole tokens, where one fits.
  const auto item_rows = [&](int64_t heads) {
    const int64_t rows = kMaxItemRows / heads;
    return rows > group ? rows - rows % group : rows;
  };
  std::vector<char> streaming(num_units);
  for (int64_t u = 0; u < num_units; ++u) streaming[u] = streams(problem.units[u]);
  const auto streaming_items = [&](int64_t heads) {
    int64_t count = 0;
    for (int64_t u = 0; u < num_units; ++u) {
      const int64_t rows = rows_of(problem.tiles[problem.units[u].tile]);
      if (streaming[u]) count += (rows + item_rows(heads) - 1) / item_rows(heads);
    }
    return count * (problem.num_kv_heads / heads);
  };
  // Where the heads of a token are not neighbours (HND), a head's tokens are.
  const bool neighbours = problem.k.head_stride < problem.k.slot_stride;
  int64_t heads = neighbours ? std::min(kMaxItemHeads, problem.num_kv_heads) : 1;
  while (heads > 1 && (problem.num_kv_heads % heads != 0 || streaming_items(heads) < 4 * threads)) {
    --heads;
  }
  std::vector<AttentionItem> items;
  for (int64_t u = 0; u < num_units; ++u) {
    const int64_t num_heads = streaming[u] ? heads : 1, step = item_rows(num_heads);
    const int64_t rows = rows_of(problem.tiles[problem.units[u].tile]);
    for (int64_t row = 0; row < rows; row += step) {
      for (int64_t h = 0; h < problem.num_kv_heads; h += num_heads) {
        items.push_back({u, h, h + num_heads, row, std::min(rows, row + step)});
      }
    }
  }
  return items;
}

// Calls f(item, thread) for every item, the threads taking the next one as they get free.
template <typename F>
void for_each_item(int64_t items, int64_t threads, const F& f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = next++; i < items; i = next++) f(i, begin);
  });
}

// cascade_attention.out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor[] qo_indptr,
//     Tensor[] kv_indptr, Tensor[] kv_indices, Tensor[] kv_last_page_len, Tensor schedule,
//     bool causal, float sm_scale, float v_scale, Tensor(a!) out, Tensor(b!) lse) -> ()
// cascade_attention.portable(the same) -> (), since no chip's own kernels stand before these
// The schedule already holds what qo_indptr, kv_indptr, kv_last_page_len and causal say.
void cascade_attention_out(Tensor q, Tensor k_cache, Tensor v_cache, std::vector<Tensor> qo_indptr,
                           std::vector<Tensor> kv_indptr, std::vector<Tensor> kv_indices,
                           std::vector<Tensor> kv_last_page_len, Tensor schedule, bool causal,
                           double sm_scale, double v_scale, Tensor out, Tensor lse) {
  check_sizes(q, {-1, -1, -1}, "q");
  const int64_t num_tokens = q.size(0), num_qo_heads = q.size(1), head_dim = q.size(2);
  check_sizes(k_cache, {-1, -1, -1, head_dim}, "k_cache");
  const int64_t num_pages = k_cache.size(0), page_size = k_cache.size(1);
  const int64_t num_kv_heads = k_cache.size(2);
  check_sizes(v_cache, {num_pages, page_size, num_kv_heads, head_dim}, "v_cache");
  check_sizes(out, {num_tokens, num_qo_heads, head_dim}, "out");
  check_sizes(lse, {num_tokens, num_qo_heads}, "lse");
  check_dtype(k_cache, q.scalar_type(), "k_cache");
  check_dtype(v_cache, q.scalar_type(), "v_cache");
  check_dtype(out, q.scalar_type(), "out");
  check_dtype(lse, ScalarType::Float, "lse");
  check_last_dim_contiguous(q, "q");
  check_last_dim_contiguous(k_cache, "k_cache");
  check_last_dim_contiguous(v_cache, "v_cache");
  check_last_dim_contiguous(out, "out");
  check_writable(out, "out");
  check_writable(lse, "lse");
  if (num_tokens == 0 || num_qo_heads == 0) return;
  STD_TORCH_CHECK(num_kv_heads > 0 && num_qo_heads % num_kv_heads == 0, "num_qo_heads is ",
                  num_qo_heads, ", not a multiple of num_kv_heads, which is ", num_kv_heads);
  STD_TORCH_CHECK(page_size > 0, "k_cache has pages of no tokens");
  for (const Tensor& indices : kv_indices) check_index(indices, "kv_indices");

  const ScheduleView view = read_schedule(schedule);
  std::vector<char> served(num_tokens, 0);
  check_tiles(view, num_tokens, &served);
  check_segments(view, kv_indices, page_size, num_pages);

  AttentionProblem problem{};
  problem.type = element_type(q);
  problem.num_qo_heads = num_qo_heads;
  problem.num_kv_heads = num_kv_heads;
  problem.head_dim = head_dim;
  problem.page_size = page_size;
  problem.scale_log2 = static_cast<float>(sm_scale * 1.44269504088896340736);
  problem.v_scale = static_cast<float>(v_scale);
  problem.q = q.const_data_ptr();
  problem.q_token_stride = q.stride(0);
  problem.q_head_stride = q.stride(1);
  problem.k = cache_view(k_cache);
  problem.v = cache_view(v_cache);
  problem.out = out.mutable_data_ptr();
  problem.out_token_stride = out.stride(0);
  problem.out_head_stride = out.stride(1);
  problem.lse = lse.mutable_data_ptr<float>();
  problem.lse_token_stride = lse.stride(0);
  problem.lse_head_stride = lse.stride(1);
  problem.tiles = view.tiles;
  problem.units = view.units;
  problem.segments = view.segments;
  std::vector<const int32_t*> index_data;
  for (const Tensor& indices : kv_indices) index_data.push_back(indices.const_data_ptr<int32_t>());
  problem.kv_indices = index_data.data();

  const int64_t partial_rows = view.header.num_partial_rows;
  Tensor partial_out, partial_lse;
  if (partial_rows > 0) {
    partial_out = empty(q, {partial_rows, num_qo_heads, head_dim}, ScalarType::Float);
    partial_lse = empty(q, {partial_rows, num_qo_heads}, ScalarType::Float);
    problem.partial_out = partial_out.mutable_data_ptr<float>();
    problem.partial_lse = partial_lse.mutable_data_ptr<float>();
  }

  const AttentionKernel& kernel = *cpu_kernels().attention;
  const int64_t max_threads = torch::stable::get_num_threads();
  const std::vector<AttentionItem> items = make_items(problem, view.header.num_units, max_threads);
  const int64_t num_items = static_cast<int64_t>(items.size());
  const int64_t threads = std::min(max_threads, num_items);
  if (num_items > 0) {
    const int64_t scratch_bytes = (kernel.scratch_bytes(problem) + 63) / 64 * 64;
    char* scratch = scratch_memory(scratch_bytes * threads);
    for_each_item(num_items, threads, [&](int64_t item, int64_t thread) {
      // The other threads are likely to take the items in between.
      const AttentionItem* following =
          item + threads < num_items ? &items[item + threads] : nullptr;
      kernel.run_item(problem, items[item], following, scratch + thread * scratch_bytes);
    });
  }
  if (partial_rows > 0) {
    for_each_item(view.header.num_tiles, threads, [&](int64_t i, int64_t) {
      const Tile& tile = view.tiles[i];
      if (tile.unit_begin == tile.unit_end || view.units[tile.unit_begin].partial_row < 0) return;
      for (int64_t token = tile.row_begin; token < tile.row_end; ++token) {
        kernel.merge_token(problem, i, token);
      }
    });
  }
  for (int64_t token = 0; token < num_tokens; ++token) {
    if (!served[token]) kernel.clear_token(problem, token);
  }
}

// cascade_attention(... as above, without out and lse) -> (Tensor out, Tensor lse)
std::tuple<Tensor, Tensor> cascade_attention(Tensor q, Tensor k_cache, Tensor v_cache,
                                             std::vector<Tensor> qo_indptr,
                                             std::vector<Tensor> kv_indptr,
                                             std::vector<Tensor> kv_indices,
                                             std::vector<Tensor> kv_last_page_len, Tensor schedule,
                                             bool causal, double sm_scale, double v_scale) {
  check_sizes(q, {-1, -1, -1}, "q");
  Tensor out = empty(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor lse = empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  cascade_attention_out(q, k_cache, v_cache, qo_indptr, kv_indptr, kv_indices, kv_last_page_len,
                        schedule, causal, sm_scale, v_scale, out, lse);
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(flashinfer_ops, CPU, m) {
  m.impl("cascade_attention", TORCH_BOX(&cascade_attention));
  m.impl("cascade_attention.out", TORCH_BOX(&cascade_attention_out));
  m.impl("cascade_attention.portable", TORCH_BOX(&cascade_attention_out));
}

}  // namespace

}  // namespace flashinfer_ops
