// What the parts of Hopper's attention kernel share: parameters, shared memory, roles.
//
// Grid: one CTA an SM, each with a fixed list of items. Block: three warpgroups. The warps of the
// first one produce: they take turns block by block, and look up where each column of KV lies and
// copy it; the others consume, each 64 packed rows at a time. An item is a unit of the schedule
// (schedule.h) and a KV head: a pair item has up to 128 packed rows and is served by both
// consumers, a solo item up to 64 and is served by one.
//
// KV goes through a ring of stages, each kColumns tokens of K and V, rows of 128 bytes in the
// swizzled order of the matrix unit, and an entry that says what they are.
//
//   producers --K, entry, V--> stage --> consumers --> K, then V and entry free again
//
// Pair items come first and go through all of the ring, up to a mark. Every other place is then one
// consumer's: neither waits for the other.
#pragma once

#include <cuda.h>

#include "common/cuda.h"
#include "cuda/schedule.h"
#include "cuda/sm90.h"
#include "cuda/wgmma_sm90.h"

namespace flashinfer_ops::sm90 {

using gpu::kMaxLevels;

constexpr int kWarpgroup = 128;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kConsumers = 2;
constexpr int kRows = 64;     // packed rows of a consumer
constexpr int kColumns = 64;  // KV tokens of a stage
constexpr int kRun = 16;      // of them, neighbours in a page, are copied at once
constexpr int kRuns = kColumns / kRun;

// Of rows, below 2^31: an offset takes few operations then.
struct Strides {
  int32_t token, head;
  int32_t group;  // token - group_size * head: see row_offset
};
struct CacheStrides {
  int64_t page, slot, head;  // in bytes
};

struct Params {
  // Of the caches, where the strides allow it: boxes of 16 slots of a head, in the order of a
  // stage.
  CUtensorMap k_map, v_map;
  const char* q;
  const char* k_cache;
  const char* v_cache;
  char* out;
  float* lse;
  char* partial_o;     // [partial row, query head, head_dim] of q's dtype
  float* partial_lse;  // [partial row, query head]
  const int32_t* schedule;
  const int32_t* kv_indices[kMaxLevels];
  Strides q_stride, out_stride, lse_stride;
  CacheStrides k_stride, v_stride;
  int32_t k_heads, v_heads;  // a page's stride in a map, where a head's is 1
  int32_t num_rows;
  int32_t num_pages;
  int32_t has_tensor_maps;
  int32_t even_pages;  // runs of columns never cross a page's end
  int32_t num_qo_heads;
  Divisor group_size{1};
  Divisor page_size{1};
  Divisor kv_heads{1};
  int32_t matrix_at, stream_at, segment_at, tile_at, own_at;  // in words of the schedule
  float scale_log2;                                           // sm_scale * log2(e), above 0
  float v_scale;
};

// What an item is, for those who load its queries and store its result.
struct Item {
  int32_t first_token;   // of the unit
  int32_t end_token;     // rows of q from here on are not the unit's
  int32_t first_packed;  // the item's first packed row, counted from first_token's
  int32_t kv_head;
  int32_t partial_row;  // scratch row of first_token's state, or -1: to the output
};

namespace flag {
constexpr int kPair = 1;     // both consumers serve the item
constexpr int kLast = 2;     // block of the item
constexpr int kMasked = 4;   // some row does not see some column
constexpr int kSolo = 8;     // no block: from here on each consumer has items of its own
constexpr int kStop = 16;    // no block: there is no other
constexpr int kUnseen = 32;  // times 1 or 2: no row of consumer 0 or 1 sees any column
}  // namespace flag

// One block of columns, as consumers must know it.
struct alignas(16) Entry {
  int2 seen_by[kColumns];  // query tokens [x, y)
  // 16 bytes that are read together.
  int32_t flags;
  int32_t gathered;  // whether threads copied some of the block
  int32_t plain;     // so many blocks behind it have no flag but kPair, and are copied in bulk
  int32_t reserved;
  Item item;
};

// What a consumer begins with, as its lists say.
struct alignas(16) First {
  int32_t is_pair;
  int32_t known;  // it has rows and KV, so that the producers do not pass it over
  Item item;
};

// Where the rows of a block's columns are.
struct Rows {
  const char* k[kColumns];
  const char* v[kColumns];
};

template <int kHeadDim>
struct Shape {
  static constexpr int kChunks = kHeadDim / 8;                // of 16 bytes, in a row
  static constexpr int kAtoms = kHeadDim / 64;                // of 128 bytes
  static constexpr int kAtomBytes = 64 * 128;                 // 64 rows of one atom
  static constexpr int kTileBytes = kAtoms * kAtomBytes;      // K or V of a stage, Q of a consumer
  static constexpr int kGroupBytes = kAtoms * kSwizzleBytes;  // of K or V: 8 rows, atom by atom
  static constexpr int kStages = kHeadDim == 64 ? 12 : kHeadDim == 128 ? 6 : 2;
  // As many as may be at work on stages of their own.
  static constexpr int kProducerWarps = kStages < 4 ? kStages : 4;
  static_assert(kProducerWarps % kConsumers == 0);
  // Queries stay in registers where there is room: so many atoms of them.
  static constexpr int kQueryAtoms = kHeadDim <= 128 ? 1 : 0;
  static constexpr int kQueryBytes = (kAtoms - kQueryAtoms) * kAtomBytes;  // the others
  static constexpr int kStepBlocks = kHeadDim <= 128 ? 2 : 1;  // that a consumer takes at once
  static constexpr int kFirstWarps = kProducerWarps / 2;       // whose first blocks come first
  static constexpr int kProducerRegisters = 88;
  static constexpr int kConsumerRegisters = 208;
};

template <int kHeadDim>
struct Shared {
  using S = Shape<kHeadDim>;
  alignas(kSwizzleBytes) char k[S::kStages][S::kTileBytes];
  alignas(kSwizzleBytes) char v[S::kStages][S::kTileBytes];
  alignas(kSwizzleBytes) char q[S::kQueryBytes > 0 ? kConsumers * S::kQueryBytes : 1];
  // Where a consumer's warp brings eight rows by 64 elements of its output into order.
  alignas(kSwizzleBytes) char order[kConsumers * kWarpgroup / 32][kSwizzleBytes];
  Rows rows[S::kProducerWarps];
  Entry entries[S::kStages];
  First first[kConsumers];
  // An entry is filled when its stage's last values are done with, and free again with its values.
  static constexpr int kBarriers = 5 * S::kStages + 1;
  uint64_t entry_full[S::kStages];
  uint64_t k_full[S::kStages], v_full[S::kStages];
  uint64_t k_empty[S::kStages], v_empty[S::kStages];
  uint64_t first_blocks;  // passed once, when the first warps' first blocks are asked for
};

// A place in a ring and the parity of the round through it.
template <int kSize>
struct RingPlace {
  int index = 0;
  int parity = 0;
  __device__ __forceinline__ void advance(int step = 1) {
    index += step;
    if (index >= kSize) {
      index -= kSize;
      parity ^= 1;
    }
  }
  // This place if it is a consumer's own, else the one before it; before the first place comes one
  // whose barriers count as passed.
  __device__ __forceinline__ RingPlace own_or_before(int consumer) const {
    const int at = index % kConsumers == consumer ? index : index - 1;
    return {at < 0 ? kSize - 1 : at, at < 0 ? parity ^ 1 : parity};
  }
  // On to the next place that is a consumer's own.
  __device__ __forceinline__ void align(int consumer) {
    static_assert(kSize % kConsumers == 0);
    if (index % kConsumers != consumer) advance();
  }
};

// Bytes from a tile's start to a 16-byte chunk of a row.
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk, int atom_bytes) {
  return (chunk >> 3) * atom_bytes + row * 128 + (((chunk ^ row) & 7) << 4);
}

// The first and last query token of a unit's rows [first_packed, first_packed + rows).
struct Tokens {
  int32_t first, last;
};
__device__ __forceinline__ Tokens tokens_of(const Params& params, const Item& item, bool is_pair) {
  const int rows = is_pair ? 2 * kRows : kRows;
  const auto token = [&](int packed) {
    return item.first_token + static_cast<int>(params.group_size.divide(packed));
  };
  return {token(item.first_packed), min(token(item.first_packed + rows - 1), item.end_token - 1)};
}

// Of the CTA; list 0 holds pair items, list 1 + c those of consumer c.
__device__ __forceinline__ const gpu::ItemList& item_list(const Params& params, int list) {
  const auto* lists = reinterpret_cast<const gpu::ItemList*>(params.schedule + gpu::kHeaderWords);
  return lists[list * gpu::kMaxCtas + blockIdx.x];
}

// As words of a unit and a list say; where q has fewer rows or the cache fewer heads than the plan,
// within these.
__device__ __forceinline__ Item make_item(const Params& params, int32_t first_token,
                                          int32_t end_token, int32_t partial_row, int32_t head,
                                          int32_t part) {
  const int heads = params.kv_heads.divisor;
  return {first_token, min(end_token, params.num_rows), part * 2 * kRows, min(head, heads - 1),
          partial_row};
}

// From a tensor's start to a packed row of an item, where rows have these strides; `packed` counts
// from the unit's first row, and is the query token `row` behind the unit's first.
__device__ __forceinline__ int64_t row_offset(const Params& params, const Item& item,
                                              int32_t first_token, int row, int packed,
                                              const Strides& stride) {
  const int first_head = item.kv_head * static_cast<int>(params.group_size.divisor);
  const int64_t first = int64_t{first_token} * stride.token + int64_t{first_head} * stride.head;
  return first + int64_t{row} * stride.group + int64_t{packed} * stride.head;
}

}  // namespace flashinfer_ops::sm90
