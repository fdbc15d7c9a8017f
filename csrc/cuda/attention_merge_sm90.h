// Joins the partial states of rows that have several:
//
//   lse = log2(sum_k 2^lse_k),  o = sum_k 2^(lse_k - lse) o_k
//
// Grid: any number of CTAs of kMergeThreads. A warp takes one (query token, query head) at a time;
// its states come in the order of their ranks, so that a plan gives the same bits every time. Rows
// with one state were written by their unit; those with none, and those behind the plan's last,
// get the empty state: o = 0, lse = -inf.
#pragma once

#include "cuda/attention_sm90.h"

namespace flashinfer_ops::sm90 {

constexpr int kMergeThreads = 256;

template <class T, int kHeadDim>
class RowMerger {
 public:
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

  __device__ __forceinline__ void merge(const Row& row) const {
    if (row.num_states == 0) {
      store(nullptr, 0, -INFINITY, row);
    } else if (!row.written) {
      join(row);
    }
  }

 private:
  static constexpr int kVec = kHeadDim / 32;  // elements of a lane
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

  __device__ __forceinline__ void join(const Row& row) const {
    float sums[kVec] = {};
    float peak = -INFINITY, total = 0;
    for (int base = 0; base < row.num_states; base += 32) {
      const int rank = base + lane_;
      const float lse = rank < row.num_states ? params_.partial_lse[state(row, rank)] : -INFINITY;
      float new_peak = fmaxf(peak, lse);
#pragma unroll
      for (int delta = 16; delta > 0; delta >>= 1) {
        new_peak = fmaxf(new_peak, __shfl_xor_sync(~0u, new_peak, delta));
      }
      const float at = new_peak == -INFINITY ? 0 : new_peak;
      const float weight = exp2f(lse - at), before = exp2f(peak - at);
      float sum = weight;
#pragma unroll
      for (int delta = 16; delta > 0; delta >>= 1) sum += __shfl_xor_sync(~0u, sum, delta);
      total = fmaf(total, before, sum);
      peak = new_peak;
#pragma unroll
      for (float& x : sums) x *= before;
      const int count = min(32, row.num_states - base);
      constexpr int kAhead = 8;
      for (int s = 0; s < count; s += kAhead) {
        Vector loaded[kAhead];
        float weights[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          // Lanes past the last state hold weight 0; what an empty state holds never enters.
          weights[i] = s + i < 32 ? __shfl_sync(~0u, weight, (s + i) & 31) : 0;
          loaded[i] = Vector{};
          if (weights[i] != 0) {
            const int64_t at_state = state(row, base + s + i);
            loaded[i] =
                reinterpret_cast<const Vector*>(params_.partial_o + at_state * kHeadDim * 2)[lane_];
          }
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
#pragma unroll
          for (int j = 0; j < kVec / 2; ++j) {
            const float2 pair = unpack<T>(loaded[i].pairs[j]);
            sums[2 * j] = fmaf(weights[i], pair.x, sums[2 * j]);
            sums[2 * j + 1] = fmaf(weights[i], pair.y, sums[2 * j + 1]);
          }
        }
      }
    }
    const float lse = total == 0 ? -INFINITY : peak + log2f(total);
    store(sums, total == 0 ? 0 : 1 / total, lse, row);
  }

  __device__ __forceinline__ int64_t state(const Row& row, int rank) const {
    return (row.first + int64_t{rank} * row.step) * params_.num_qo_heads + row.head;
  }

  __device__ __forceinline__ void store(const float* sums, float factor, float lse,
                                        const Row& row) const {
    Vector x{};
    if (sums != nullptr) {
#pragma unroll
      for (int j = 0; j < kVec / 2; ++j) {
        x.pairs[j] = pack<T>(sums[2 * j] * factor, sums[2 * j + 1] * factor);
      }
    }
    char* out =
        params_.out + row.token * params_.out_stride.token + row.head * params_.out_stride.head;
    reinterpret_cast<Vector*>(out)[lane_] = x;
    if (lane_ == 0) {
      params_.lse[row.token * params_.lse_stride.token + row.head * params_.lse_stride.head] = lse;
    }
  }

  const Params& params_;
  const int lane_;
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ Params params) {
  const auto& header = *reinterpret_cast<const gpu::Header*>(params.schedule);
  const int behind = max(params.num_rows - header.num_tokens, 0);
  const int64_t items =
      (int64_t{header.num_tiles} * header.tile_tokens + behind) * params.num_qo_heads;
  constexpr int kWarps = kMergeThreads / 32;
  const int64_t step = int64_t{gridDim.x} * kWarps;
  int64_t item = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const RowMerger<T, kHeadDim> merger(params, threadIdx.x % 32);
  // The attention kernel has waited for the planner before it let this one start, so the schedule
  // can be read ahead of the states.
  typename RowMerger<T, kHeadDim>::Row row{};
  if (item < items) row = merger.find(header, item);
  wait_for_earlier_kernels();
  while (item < items) {
    merger.merge(row);
    item += step;
    if (item < items) row = merger.find(header, item);
  }
}

}  // namespace flashinfer_ops::sm90
