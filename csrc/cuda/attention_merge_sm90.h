// Joins the partial states of rows that have several:
//
//   lse = log2(sum_k 2^lse_k),  o = sum_k 2^(lse_k - lse) o_k
//
// Grid: (query tokens, query heads / heads of a CTA); a CTA goes on to further tokens where the
// grid has fewer. Few rows are given several warps each, which share a row's states; of many rows a
// warp takes some heads of a token at once, which share what must be looked up. Which states a warp
// adds, and in which order, depends on nothing else, so that a plan gives the same bits every time.
// Rows with one state were written by their unit; those with none, and those behind the plan's
// last, get the empty state: o = 0, lse = -inf.
#pragma once

#include "cuda/attention_sm90.h"

namespace flashinfer_ops::sm90 {

// How a CTA divides: kWarps warps a row, or a warp for kHeads rows.
template <int kRowWarps, int kRowHeads, int kCtaWarps>
struct MergeShape {
  static constexpr int kWarps = kRowWarps, kHeads = kRowHeads;
  static constexpr int kThreads = 32 * kCtaWarps;
  // On an SM at once, so that registers are few.
  static constexpr int kCtas = (kHeads > 1 ? 768 : 1024) / kThreads;
  static constexpr int kHeadsAtOnce = kCtaWarps / kWarps * kHeads;
  // States of a row that a warp loads at once, before their weights are known.
  static constexpr int kAhead = kHeads > 2 ? 4 : 8;
  // As many states are worth another warp.
  static constexpr int kWorth = 4;
  static_assert(kWarps == 1 || (kHeads == 1 && kCtaWarps == kWarps));
};

// What the warps of a row have found.
template <int kVec, class M>
struct RowParts {
  alignas(16) float values[M::kWarps > 1 ? M::kThreads : 1][kVec];
  float peak[M::kWarps], total[M::kWarps];
};

// A state in the making: sums of a lane's elements, relative to `peak`.
template <int kVec>
struct Sums {
  float peak, total;
  float values[kVec];
};

template <class T, int kHeadDim, class M>
class RowMerger {
 public:
  static constexpr int kVec = kHeadDim / 32;  // elements of a lane

  __device__ __forceinline__ RowMerger(const Params& params, int lane, int head)
      : params_(params), lane_(lane), head_(head) {}

  // A query token and where its rows' states are.
  struct Row {
    int32_t token;
    int32_t num_states;
    bool written;   // by its unit, or no row at all
    int32_t first;  // scratch row of the first state, and
    int32_t step;   // the distance to the next
  };

  // Places of the planned tokens; a tile that is shorter than the longest leaves some empty.
  __device__ __forceinline__ static int64_t planned_places(const gpu::Header& header) {
    return int64_t{header.num_tiles} * header.tile_tokens;
  }

  // `place` counts these tile by tile, then the tokens behind them.
  __device__ __forceinline__ Row find(const gpu::Header& header, int64_t place) const {
    const int64_t planned = planned_places(header);
    if (place >= planned)
      return {header.num_tokens + static_cast<int>(place - planned), 0, false, 0, 0};
    const int tile_index = place > UINT32_MAX ? static_cast<int>(place / header.tile_tokens)
                                              : static_cast<uint32_t>(place) /
                                                    static_cast<uint32_t>(header.tile_tokens);
    const int of_tile = static_cast<int>(place - int64_t{tile_index} * header.tile_tokens);
    // All of the tile at once: one wait for memory instead of two.
    const auto* tiles = reinterpret_cast<const int4*>(params_.schedule + params_.tile_at);
    const int4 rows = tiles[2 * tile_index], own = tiles[2 * tile_index + 1];
    const int token = rows.x + of_tile, step = rows.y - rows.x;
    if (of_tile >= step || token >= params_.num_rows) return {0, 1, true, 0, 0};
    const int num_states = rows.z + own_states(own.x, own.y, token);
    return {token, num_states, rows.w < 0, rows.w + of_tile, step};
  }

  // Warps that a row is worth.
  __device__ __forceinline__ static int num_parts(const Row& row) {
    return min(max((row.num_states + M::kWorth - 1) / M::kWorth, 1), M::kWarps);
  }

  // The states of ranks part, part + parts, ... of each head. Of kAhead lanes each, heads have
  // their states' lse, and the maximum and sum of these.
  __device__ __forceinline__ void join(const Row& row, int part, int parts,
                                       Sums<kVec> (&sums)[M::kHeads]) {
    constexpr int kAhead = M::kAhead;
    const int heads = params_.num_qo_heads - head_;
    const int head = lane_ / kAhead, ahead = lane_ % kAhead;
    const int64_t stride = int64_t{row.step} * parts * params_.num_qo_heads;
    float peak = -INFINITY, total = 0;
#pragma unroll
    for (Sums<kVec>& x : sums) x = {};
#pragma unroll 1
    for (int base = part; base < row.num_states; base += kAhead * parts) {
      const int left = row.num_states - base;
      const int64_t state = (row.first + int64_t{base} * row.step) * params_.num_qo_heads + head_;
      const bool there = head < min(M::kHeads, heads) && ahead * parts < left;
      const Vector* from = reinterpret_cast<const Vector*>(params_.partial_o) + state * 32 + lane_;
      Vector loaded[kAhead][M::kHeads];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int h = 0; h < M::kHeads; ++h) {
          if (i * parts < left && h < heads) loaded[i][h] = from[h * 32];
        }
        from += stride * 32;
      }
      // Behind these, or the compiler puts some of them behind the wait for the lse.
      __syncwarp();
      const float lse = there ? params_.partial_lse[state + ahead * stride + head] : -INFINITY;
      const float before = peak;
      peak = fmaxf(peak, lse);
#pragma unroll
      for (int delta = kAhead / 2; delta > 0; delta >>= 1) {
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, delta));
      }
      const float at = peak == -INFINITY ? 0 : peak;
      const float weight = exp2_fast(lse - at), rescale = exp2_fast(before - at);
      total = total * rescale + weight;
#pragma unroll
      for (int h = 0; h < M::kHeads; ++h) {
        const float factor = __shfl_sync(~0u, rescale, h * kAhead);
#pragma unroll
        for (float& x : sums[h].values) x = scaled(x, factor);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const float w = __shfl_sync(~0u, weight, h * kAhead + i);
          if (w == 0) continue;  // what an empty state holds never enters
#pragma unroll
          for (int j = 0; j < kVec / 2; ++j) {
            const float2 pair = unpack<T>(loaded[i][h].pairs[j]);
            sums[h].values[2 * j] = fmaf(w, pair.x, sums[h].values[2 * j]);
            sums[h].values[2 * j + 1] = fmaf(w, pair.y, sums[h].values[2 * j + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int delta = kAhead / 2; delta > 0; delta >>= 1) {
      total += __shfl_xor_sync(~0u, total, delta);
    }
#pragma unroll
    for (int h = 0; h < M::kHeads; ++h) {
      sums[h].peak = __shfl_sync(~0u, peak, h * kAhead);
      sums[h].total = __shfl_sync(~0u, total, h * kAhead);
    }
  }

  // All parts of a row, by one warp: lanes weigh a part each.
  __device__ __forceinline__ void add_up(const RowParts<kVec, M>& found, int parts,
                                         Sums<kVec>& sums) const {
    const bool there = lane_ < parts;
    const float mine = there ? found.peak[lane_] : -INFINITY;
    float peak = mine;
#pragma unroll
    for (int delta = M::kWarps / 2; delta > 0; delta >>= 1) {
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, delta));
    }
    peak = __shfl_sync(~0u, peak, 0);
    const float weight = exp2_fast(mine - (peak == -INFINITY ? 0 : peak));
    float total = there ? found.total[lane_] * weight : 0;
#pragma unroll
    for (int delta = M::kWarps / 2; delta > 0; delta >>= 1) {
      total += __shfl_xor_sync(~0u, total, delta);
    }
    sums = {peak, __shfl_sync(~0u, total, 0), {}};
#pragma unroll
    for (int w = 0; w < M::kWarps; ++w) {
      const float factor = __shfl_sync(~0u, weight, w);
      if (w >= parts || factor == 0) continue;  // what an empty part holds never enters
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        sums.values[j] = fmaf(factor, found.values[32 * w + lane_][j], sums.values[j]);
      }
    }
  }

  __device__ __forceinline__ void store(const Row& row, int head, const Sums<kVec>& sums) const {
    const bool empty = sums.total == 0;
    const float factor = empty ? 0 : reciprocal_fast(sums.total);
    Vector x;
#pragma unroll
    for (int j = 0; j < kVec / 2; ++j) {
      x.pairs[j] = pack<T>(sums.values[2 * j] * factor, sums.values[2 * j + 1] * factor);
    }
    char* out = params_.out + int64_t{row.token} * params_.out_stride.token +
                int64_t{head} * params_.out_stride.head;
    reinterpret_cast<Vector*>(out)[lane_] = x;
    if (lane_ == 0) {
      params_.lse[int64_t{row.token} * params_.lse_stride.token +
                  int64_t{head} * params_.lse_stride.head] =
          empty ? -INFINITY : sums.peak + log2_fast(sums.total);
    }
  }

 private:
  // An infinite value of weight 0 must not make a NaN.
  __device__ __forceinline__ static float scaled(float x, float weight) {
    return weight == 0 ? 0 : x * weight;
  }

  struct alignas(kVec * 2) Vector {
    uint32_t pairs[kVec / 2];
  };

  // Of the own pieces [begin, end) that hold the token.
  __device__ __forceinline__ int own_states(int begin, int end, int token) const {
    const auto* pieces = reinterpret_cast<const int4*>(params_.schedule + params_.own_at);
    int count = 0;
#pragma unroll 2
    for (int o = begin + lane_; o < end; o += 32) {
      const int4 piece = pieces[o];
      if (piece.x <= token && token < piece.y) count += piece.w;
    }
    return __reduce_add_sync(~0u, count);
  }

  const Params& params_;
  const int lane_, head_;
};

template <class T, int kHeadDim, class M>
__global__ void __launch_bounds__(M::kThreads, M::kCtas)
    merge_kernel(const __grid_constant__ Params params) {
  using Merger = RowMerger<T, kHeadDim, M>;
  __shared__ RowParts<Merger::kVec, M> found;
  const auto& header = *reinterpret_cast<const gpu::Header*>(params.schedule);
  const int warp = threadIdx.x / 32, part = warp % M::kWarps;
  const int head = blockIdx.y * M::kHeadsAtOnce + warp / M::kWarps * M::kHeads;
  const int64_t places =
      Merger::planned_places(header) + max(params.num_rows - header.num_tokens, 0);
  Merger merger(params, threadIdx.x % 32, head);
  if (head >= params.num_qo_heads) return;
  // What earlier kernels wrote must be there when this one ends.
  if (header.merges == 0 && params.num_rows <= header.num_tokens) {
    if (blockIdx.x == 0) wait_for_earlier_kernels();
    return;
  }
#pragma unroll 1
  for (int64_t place = blockIdx.x; place < places; place += gridDim.x) {
    // The attention kernel has waited for the planner before it let this one start, so the schedule
    // can be read ahead of the states.
    const typename Merger::Row row = merger.find(header, place);
    wait_for_earlier_kernels();
    if (row.num_states == 0 || !row.written) {
      Sums<Merger::kVec> sums[M::kHeads];
      const int parts = Merger::num_parts(row);
      if (part < parts) merger.join(row, part, parts, sums);
      if constexpr (M::kWarps > 1) {
        if (parts > 1) {
          __syncthreads();
          if (part < parts) {
#pragma unroll
            for (int j = 0; j < Merger::kVec; ++j) found.values[threadIdx.x][j] = sums[0].values[j];
            if (threadIdx.x % 32 == 0) {
              found.peak[part] = sums[0].peak;
              found.total[part] = sums[0].total;
            }
          }
          __syncthreads();
          if (part == 0) merger.add_up(found, parts, sums[0]);
        }
      }
#pragma unroll
      for (int h = 0; h < M::kHeads; ++h) {
        if (part == 0 && head + h < params.num_qo_heads) merger.store(row, head + h, sums[h]);
      }
    }
  }
}

}  // namespace flashinfer_ops::sm90
