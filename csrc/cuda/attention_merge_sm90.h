// Joins the partial states of rows that have several:
//
//   lse = log2(sum_k 2^lse_k),  o = sum_k 2^(lse_k - lse) o_k
//
// Grid: any number of CTAs of kMergeThreads. kWarps warps take one (query token, query head) at a
// time: one where there are many rows, more where few rows have many states each. Which states a
// warp adds, and in which order, depends on nothing else, so that a plan gives the same bits every
// time. Rows with one state were written by their unit; those with none, and those behind the
// plan's last, get the empty state: o = 0, lse = -inf.
#pragma once

#include "cuda/attention_sm90.h"

namespace flashinfer_ops::sm90 {

constexpr int kMergeThreads = 256;

// A state in the making: sums of a lane's elements, relative to `peak`.
template <int kVec>
struct Sums {
  float peak = -INFINITY, total = 0;
  float values[kVec] = {};
};

template <class T, int kHeadDim>
class RowMerger {
 public:
  static constexpr int kVec = kHeadDim / 32;  // elements of a lane

  __device__ __forceinline__ RowMerger(const Params& params, int lane)
      : params_(params), lane_(lane) {}

  // A (query token, query head) and where its states are.
  struct Row {
    int32_t token;
    int32_t head;
    int32_t num_states;
    bool written;   // by its unit, or no row at all
    int32_t first;  // scratch row of the first state, and
    int32_t step;   // the distance to the next
  };

  // Row `item / heads` counts the planned tokens tile by tile, then those behind them.
  __device__ __forceinline__ Row find(const gpu::Header& header, int64_t item) const {
    const int place = static_cast<int>(item / params_.num_qo_heads);
    const int head = static_cast<int>(item - int64_t{place} * params_.num_qo_heads);
    const int planned = header.num_tiles * header.tile_tokens;
    if (place >= planned) return {header.num_tokens + place - planned, head, 0, false, 0, 0};
    const int tile_index = place / header.tile_tokens;
    const int of_tile = place - tile_index * header.tile_tokens;
    const auto& tile =
        reinterpret_cast<const gpu::Tile*>(params_.schedule + params_.tile_at)[tile_index];
    const int token = tile.row_begin + of_tile, step = tile.row_end - tile.row_begin;
    if (of_tile >= step || token >= params_.num_rows) return {0, 0, 1, true, 0, 0};
    const int num_states = tile.num_matrix_states + own_states(tile, token);
    const bool written = tile.partial_row < 0;
    return {token, head, num_states, written, tile.partial_row + of_tile, step};
  }

  // The states of ranks first, first + step, ...
  __device__ __forceinline__ Sums<kVec> join(const Row& row, int first, int step) const {
    Sums<kVec> sums;
    constexpr int kAhead = 8;  // states that are loaded at once, before their weights are known
    for (int base = first; base < row.num_states; base += kAhead * step) {
      const int rank = base + lane_ * step;
      const bool there = lane_ < kAhead && rank < row.num_states;
      const float lse = there ? params_.partial_lse[state(row, rank)] : -INFINITY;
      Vector loaded[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        loaded[i] = Vector{};
        if (base + i * step < row.num_states) {
          loaded[i] = reinterpret_cast<const Vector*>(
              params_.partial_o + state(row, base + i * step) * kHeadDim * 2)[lane_];
        }
      }
      float peak = fmaxf(sums.peak, lse);
#pragma unroll
      for (int delta = kAhead / 2; delta > 0; delta >>= 1) {
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, delta));
      }
      peak = __shfl_sync(~0u, peak, 0);
      const float at = peak == -INFINITY ? 0 : peak;
      const float weight = exp2_fast(lse - at), before = exp2_fast(sums.peak - at);
      sums.peak = peak;
      sums.total *= before;
#pragma unroll
      for (float& x : sums.values) x = scaled(x, before);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const float w = __shfl_sync(~0u, weight, i);
        sums.total += w;
        if (w == 0) continue;  // what an empty state holds never enters
#pragma unroll
        for (int j = 0; j < kVec / 2; ++j) {
          const float2 pair = unpack<T>(loaded[i].pairs[j]);
          sums.values[2 * j] = fmaf(w, pair.x, sums.values[2 * j]);
          sums.values[2 * j + 1] = fmaf(w, pair.y, sums.values[2 * j + 1]);
        }
      }
    }
    return sums;
  }

  __device__ __forceinline__ static void add(Sums<kVec>& sums, const Sums<kVec>& other) {
    const float peak = fmaxf(sums.peak, other.peak);
    const float at = peak == -INFINITY ? 0 : peak;
    const float mine = exp2_fast(sums.peak - at), its = exp2_fast(other.peak - at);
    sums.peak = peak;
    sums.total = sums.total * mine + other.total * its;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      sums.values[j] = scaled(sums.values[j], mine) + scaled(other.values[j], its);
    }
  }

  __device__ __forceinline__ void store(const Row& row, const Sums<kVec>& sums) const {
    const bool empty = sums.total == 0;
    const float factor = empty ? 0 : 1 / sums.total;
    Vector x;
#pragma unroll
    for (int j = 0; j < kVec / 2; ++j) {
      x.pairs[j] = pack<T>(sums.values[2 * j] * factor, sums.values[2 * j + 1] * factor);
    }
    char* out =
        params_.out + row.token * params_.out_stride.token + row.head * params_.out_stride.head;
    reinterpret_cast<Vector*>(out)[lane_] = x;
    if (lane_ == 0) {
      params_.lse[row.token * params_.lse_stride.token + row.head * params_.lse_stride.head] =
          empty ? -INFINITY : sums.peak + log2f(sums.total);
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

  __device__ __forceinline__ int own_states(const gpu::Tile& tile, int row) const {
    const auto* pieces = reinterpret_cast<const gpu::OwnPiece*>(params_.schedule + params_.own_at);
    int count = 0;
    for (int o = tile.own_begin + lane_; o < tile.own_end; o += 32) {
      const int4 piece = *reinterpret_cast<const int4*>(pieces + o);
      if (piece.x <= row && row < piece.y) count += piece.w;
    }
    return __reduce_add_sync(~0u, count);
  }

  __device__ __forceinline__ int64_t state(const Row& row, int rank) const {
    return (row.first + int64_t{rank} * row.step) * params_.num_qo_heads + row.head;
  }

  const Params& params_;
  const int lane_;
};

template <class T, int kHeadDim, int kWarps>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ Params params) {
  using Merger = RowMerger<T, kHeadDim>;
  constexpr int kRowsAtOnce = kMergeThreads / 32 / kWarps;
  __shared__ Sums<Merger::kVec> parts[kWarps > 1 ? kMergeThreads : 1];
  const auto& header = *reinterpret_cast<const gpu::Header*>(params.schedule);
  const int behind = max(params.num_rows - header.num_tokens, 0);
  const int64_t items =
      (int64_t{header.num_tiles} * header.tile_tokens + behind) * params.num_qo_heads;
  const int64_t step = int64_t{gridDim.x} * kRowsAtOnce;
  const int warp = threadIdx.x / 32, part = warp % kWarps;
  int64_t item = int64_t{blockIdx.x} * kRowsAtOnce + warp / kWarps;
  const Merger merger(params, threadIdx.x % 32);
  // The attention kernel has waited for the planner before it let this one start, so the schedule
  // can be read ahead of the states.
  typename Merger::Row row{};
  if (item < items) row = merger.find(header, item);
  wait_for_earlier_kernels();
  // All warps of a CTA go round equally often: they meet at barriers.
  for (int64_t first = int64_t{blockIdx.x} * kRowsAtOnce; first < items; first += step) {
    const bool mine = item < items && (row.num_states == 0 || !row.written);
    Sums<Merger::kVec> sums;
    if (mine) sums = merger.join(row, part, kWarps);
    if constexpr (kWarps > 1) {
      __syncthreads();
      parts[threadIdx.x] = sums;
      __syncthreads();
      if (part == 0) {
#pragma unroll
        for (int w = 1; w < kWarps; ++w) Merger::add(sums, parts[threadIdx.x + 32 * w]);
      }
    }
    if (mine && part == 0) merger.store(row, sums);
    item += step;
    if (item < items) row = merger.find(header, item);
  }
}

}  // namespace flashinfer_ops::sm90
