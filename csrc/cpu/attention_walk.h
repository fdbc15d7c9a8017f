// The walk of one item over its unit's KV: its packed rows and their state, and the blocks
// of tokens of the unit's segments, in order, each one's successor known so that it can be
// prefetched.
#pragma once

#include "cpu/attention_kernel.h"
#include "cpu/attention_matmul.h"
#include "cpu/attention_simd.h"

namespace flashinfer_ops {
namespace {

constexpr int64_t kDenseBlock = 128;  // KV tokens of a block
constexpr int64_t kGemvBlock = 64;
// Odd numbers of cache lines, so that a column spreads over all sets of L1.
constexpr int64_t kRowStride = kMaxItemRows + kLine;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out pieces of the scratch memory; with base null it only counts.
struct Arena {
  char* base;
  int64_t size = 0;

  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + size);
    size += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
};

// The K and V rows of a block of tokens.
template <typename T>
struct RowPointers {
  const T* k[kDenseBlock];
  const T* v[kDenseBlock];
};

template <typename T, typename Units>
struct Scratch {
  explicit Scratch(const AttentionProblem& problem, void* memory) {
    Arena arena{static_cast<char*>(memory)};
    depth = (problem.head_dim + Units::kPerUnit - 1) / Units::kPerUnit;
    q_stride = round_up(depth, kLanes);
    o_stride = round_up(problem.head_dim, kPanel);
    line_stride = kDenseBlock * kLine;
    q_rows = arena.take<float>(kMaxItemRows * q_stride);
    q_columns = arena.take<float>(depth * kRowStride + kPanel);
    o = arena.take<float>(kMaxItemRows * o_stride);
    m = arena.take<float>(kRowStride);
    l = arena.take<float>(kRowStride);
    alpha = arena.take<float>(kRowStride);
    limits = arena.take<int32_t>(kRowStride + kPanel);
    k = arena.take<float>(round_up(depth, kLine) * kDenseBlock);
    v = arena.take<float>(o_stride * kDenseBlock);
    s = arena.take<float>(kDenseBlock * kRowStride + kPanel);
    pairs = arena.take<uint16_t>(kMaxGemvRows * kGemvBlock);
    pointers = arena.take<RowPointers<T>>(2);
    bytes = arena.size;
  }

  int64_t depth;        // head_dim in units
  int64_t q_stride;     // of q_rows
  int64_t o_stride;     // head_dim in whole V panels
  int64_t line_stride;  // of K panels
  float* q_rows;        // [kMaxItemRows][q_stride] units, zero past depth
  float* q_columns;     // [depth][kRowStride] units
  float* o;             // [kMaxItemRows][o_stride]
  float* m;             // [kMaxItemRows] running maximum of the logits, base 2
  float* l;             // [kMaxItemRows] sum of 2^(logit - m)
  float* alpha;
  int32_t* limits;  // tokens of the block that a row sees
  float* k;         // dense: [lines][kDenseBlock][kLine] units
  float* v;         // dense: [panels][kDenseBlock / kPerUnit][kPanel] units
  float* s;         // dense: [kDenseBlock][kRowStride], gemv: [kMaxGemvRows][kGemvBlock]
  uint16_t* pairs;  // gemv: [kMaxGemvRows][kGemvBlock] weights in bfloat16
  RowPointers<T>* pointers;
  int64_t bytes;
};

// Consecutive KV tokens of one segment and the packed rows of the item that see any of them.
struct Block {
  const Segment* segment;
  int64_t kv_begin;
  int64_t count;
  int64_t row_begin;
  int64_t row_end;
  bool dense;
  bool masked;  // some of the rows do not see all of the tokens
};

// Rows are numbered within the item, the state of row i of head h is h * rows + i.
template <typename T, typename Units>
struct UnitWalk {
  UnitWalk(const AttentionProblem& problem, const AttentionItem& item, void* memory)
      : problem(problem),
        unit(problem.units[item.unit]),
        tile(problem.tiles[unit.tile]),
        kv_head(item.kv_head_begin),
        num_heads(item.kv_head_end - item.kv_head_begin),
        group(problem.num_qo_heads / problem.num_kv_heads),
        first_row(item.row_begin),
        rows(item.row_end - item.row_begin),
        scratch(problem, memory),
        segment(unit.segment_begin) {}

  int64_t token_of(int64_t row) const { return tile.row_begin + (first_row + row) / group; }
  int64_t qo_head_of(int64_t head, int64_t row) const {
    return (kv_head + head) * group + (first_row + row) % group;
  }

  // Makes the state of all rows empty.
  void begin() {
    const int64_t head_dim = problem.head_dim;
    for (int64_t head = 0; head < num_heads; ++head) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t state = head * rows + i;
        const T* q = static_cast<const T*>(problem.q) + token_of(i) * problem.q_token_stride +
                     qo_head_of(head, i) * problem.q_head_stride;
        float* row = scratch.q_rows + state * scratch.q_stride;
        for (int64_t u = 0; u < scratch.q_stride; u += kLanes) {
          store(row + u, load_units_first(q, u, head_dim));
        }
        scratch.m[state] = -kInfinity;
        scratch.l[state] = 0.0f;
        memset(scratch.o + state * scratch.o_stride, 0, scratch.o_stride * sizeof(float));
      }
    }
  }

  // The next block of tokens that any row sees, in the order of the segments.
  bool next_block(Block* block) {
    for (; segment < unit.segment_end; ++segment, position = -1) {
      const Segment& current = problem.segments[segment];
      const int64_t first = (current.row_begin - tile.row_begin) * group - first_row;
      const int64_t last = (current.row_end - tile.row_begin) * group - first_row;
      block->row_begin = max(first, 0);
      block->row_end = min(last, rows);
      if (block->row_begin >= block->row_end) continue;
      const bool causal = current.diagonal != kNoDiagonal;
      int64_t kv_end = current.kv_end;
      if (causal) kv_end = min(kv_end, token_of(block->row_end - 1) + current.diagonal + 1);
      block->dense = block->row_end - block->row_begin > kMaxGemvRows;
      if (position < 0) {
        position = current.kv_begin;
        if (position >= kv_end) continue;
        const int64_t limit = block->dense ? kDenseBlock : kGemvBlock;
        const int64_t blocks = (kv_end - position + limit - 1) / limit;
        step = round_up((kv_end - position + blocks - 1) / blocks, 8);
      }
      if (position >= kv_end) continue;
      block->segment = &current;
      block->kv_begin = position;
      block->count = min(step, kv_end - position);
      block->masked = false;
      if (causal) {
        const int64_t token = position - current.diagonal;  // the first that sees any of it
        block->row_begin = max(block->row_begin, (token - tile.row_begin) * group - first_row);
        block->masked = token_of(block->row_begin) + current.diagonal < position + block->count - 1;
      }
      position += block->count;
      return true;
    }
    return false;
  }

  void locate(const Block& block, RowPointers<T>* located) const {
    const int64_t page_size = problem.page_size;
    const T* k = static_cast<const T*>(problem.k.data) + kv_head * problem.k.head_stride;
    const T* v = static_cast<const T*>(problem.v.data) + kv_head * problem.v.head_stride;
    const int32_t* pages = problem.kv_indices[block.segment->level] + block.segment->page_begin;
    int64_t index = block.kv_begin / page_size, slot = block.kv_begin % page_size;
    for (int64_t j = 0; j < block.count; ++index, slot = 0) {
      const int64_t page = pages[index];
      const T* k_row = k + page * problem.k.page_stride + slot * problem.k.slot_stride;
      const T* v_row = v + page * problem.v.page_stride + slot * problem.v.slot_stride;
      const int64_t end = min(block.count, j + page_size - slot);
      for (; j < end; ++j) {
        located->k[j] = k_row;
        located->v[j] = v_row;
        k_row += problem.k.slot_stride;
        v_row += problem.v.slot_stride;
      }
    }
  }

  // limits[i] for the block's rows, from its first on.
  void find_limits(const Block& block) {
    for (int64_t i = 0; block.row_begin + i < block.row_end; ++i) {
      const int64_t visible =
          token_of(block.row_begin + i) + block.segment->diagonal + 1 - block.kv_begin;
      scratch.limits[i] = static_cast<int32_t>(max(0, min(visible, block.count)));
    }
  }

  // Prefetches that many more tokens of the next block, the first head only.
  void prefetch_next(int64_t tokens) {
    const int64_t bytes = problem.head_dim * static_cast<int64_t>(sizeof(T));
    const int64_t end = min(next_count, next_position + tokens);
    for (; next_position < end; ++next_position) {
      const char* k = reinterpret_cast<const char*>(next_rows->k[next_position]);
      const char* v = reinterpret_cast<const char*>(next_rows->v[next_position]);
      for (int64_t i = 0; i < bytes; i += 64) {
        prefetch(k + i);
        prefetch(v + i);
      }
    }
  }

  // kLanes units of a row of head_dim elements, from unit u on, zeros past its end.
  static Vec load_units_first(const T* row, int64_t u, int64_t head_dim) {
    const int64_t element = u * Units::kPerUnit, left = head_dim - element;
    if (left >= kLanes * Units::kPerUnit) return load_units<Units>(row + element);
    T buffer[kLanes * Units::kPerUnit] = {};
    if (left > 0) memcpy(buffer, row + element, left * sizeof(T));
    return load_units<Units>(buffer);
  }

  const AttentionProblem& problem;
  const Unit unit;
  const Tile tile;
  const int64_t kv_head;    // the first of num_heads
  const int64_t num_heads;  // 1 where a segment is dense
  const int64_t group;      // query heads of a KV head
  const int64_t first_row;  // of the tile's packed rows
  const int64_t rows;       // as many
  Scratch<T, Units> scratch;

  bool has_columns = false;  // q_columns holds the rows
  int64_t segment;
  int64_t position = -1;  // next KV token of the segment, -1 before its first block
  int64_t step = 0;       // tokens of its blocks
  const RowPointers<T>* next_rows = nullptr;
  int64_t next_count = 0;
  int64_t next_position = 0;
};

}  // namespace
}  // namespace flashinfer_ops
