// What attention.cpp (the operator, built on PyTorch's stable ABI) and attention_kernel.cpp (the
// compute kernel, plain C++ compiled once per instruction set) know of each other.
#pragma once

#include <cstdint>

#include "cpu/schedule.h"

namespace flashinfer_ops {

enum class ElementType : int32_t { kFloat32, kFloat16, kBFloat16 };

// Strides in elements; the stride of the last dimension is 1.
struct CacheView {
  const void* data;  // [pages, page_size, num_kv_heads, head_dim]
  int64_t page_stride;
  int64_t slot_stride;
  int64_t head_stride;
};

struct AttentionProblem {
  ElementType type;
  int64_t num_qo_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t page_size;
  float scale_log2;  // sm_scale * log2(e), applied to the logits in float32
  float v_scale;

  const void* q;  // [tokens, num_qo_heads, head_dim]
  int64_t q_token_stride;
  int64_t q_head_stride;
  CacheView k;
  CacheView v;

  void* out;  // as q
  int64_t out_token_stride;
  int64_t out_head_stride;
  float* lse;  // [tokens, num_qo_heads]
  int64_t lse_token_stride;
  int64_t lse_head_stride;

  float* partial_out;  // [num_partial_rows, num_qo_heads, head_dim], normalised, not v-scaled
  float* partial_lse;  // [num_partial_rows, num_qo_heads]

  const Tile* tiles;
  const Unit* units;
  const Segment* segments;
  const int32_t* const* kv_indices;  // one array a level
};

// What one thread computes at a time: of a work unit some packed rows of its tile, for some KV
// heads; at most kMaxItemRows rows for all its heads together. More than one head only where no
// segment has over kMaxGemvRows packed rows a head: such a unit streams its KV, and memory likes
// the heads of a token, which are neighbours, read together.
struct AttentionItem {
  int64_t unit;
  int64_t kv_head_begin;
  int64_t kv_head_end;
  int64_t row_begin;  // of the tile's (row_end - row_begin) * num_qo_heads / num_kv_heads
  int64_t row_end;
};

constexpr int64_t kMaxItemRows = 128;
constexpr int64_t kMaxItemHeads = 8;
constexpr int64_t kMaxGemvRows = 8;

// One instruction set's kernel. No function of it throws or allocates.
struct AttentionKernel {
  const char* name;
  // Bytes of scratch, aligned to 64, that each thread running work units needs.
  int64_t (*scratch_bytes)(const AttentionProblem& problem);
  // The state of an item's rows goes to out and lse, or to the unit's partial. `following` (may be
  // null) is the item that the thread is likely to run next: its first KV is prefetched.
  void (*run_item)(const AttentionProblem& problem, const AttentionItem& item,
                   const AttentionItem* following, void* scratch);
  // Merges the partial states of one query token of a tile, all heads, in the order of the units.
  void (*merge_token)(const AttentionProblem& problem, int64_t tile, int64_t token);
  // Writes the empty state to one query token, all heads.
  void (*clear_token)(const AttentionProblem& problem, int64_t token);
};

}  // namespace flashinfer_ops
