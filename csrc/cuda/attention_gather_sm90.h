// The gather warps: columns of KV that no bulk copy brings, 16 bytes at a time.
#pragma once

#include "cuda/attention_sm90.h"

namespace flashinfer_ops::sm90 {

// kRun rows of a tile from row `begin` on, zeros where the offset is negative.
template <int kHeadDim>
__device__ __forceinline__ void gather_run(const char* cache, const int64_t* offsets, char* tile,
                                           int begin, int lane) {
  using S = Shape<kHeadDim>;
  constexpr int kRowStep = 32 / S::kChunks > 0 ? 32 / S::kChunks : 1;
  constexpr int kSteps = kRun / kRowStep;
  const int chunk = lane % S::kChunks, first = begin + lane / S::kChunks;
  const uint32_t to = shared_address(tile);
  // All offsets are read before the first copy, so that their latencies overlap.
  int64_t offset[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) offset[i] = offsets[first + i * kRowStep];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const bool live = offset[i] >= 0;
    copy_async(to + chunk_offset(first + i * kRowStep, chunk, S::kAtomBytes),
               cache + (live ? offset[i] : 0) + chunk * 16, live);
  }
}

template <int kHeadDim>
__device__ __forceinline__ void gather(const Params& params, Shared<kHeadDim>& shared, int warp,
                                       int lane) {
  using S = Shape<kHeadDim>;
  RingPlace<kEntries> place;
  RingPlace<S::kStages> stage;
  for (;; place.advance(), stage.advance()) {
    barrier_wait(&shared.entry_full[place.index], place.parity);
    const Entry& entry = shared.entries[place.index];
    if (entry.flags & flag::kStop) return;
    const int runs = entry.gathered[warp];
    if (runs != 0) {
      // The lookup warps have waited for the stage's K to be free before they wrote the entry.
      const int i = stage.index, begin = warp * kColumns / kGatherWarps;
      const auto half = [&](const char* cache, const int64_t* offsets, char* tile) {
        if (runs & 1) gather_run<kHeadDim>(cache, offsets, tile, begin, lane);
        if (runs & 2) gather_run<kHeadDim>(cache, offsets, tile, begin + kRun, lane);
      };
      half(params.k_cache, entry.k, shared.k[i]);
      barrier_arrive_after_copies(&shared.k_full[i]);
      barrier_wait(&shared.v_empty[i], stage.parity ^ 1);
      half(params.v_cache, entry.v, shared.v[i]);
      barrier_arrive_after_copies(&shared.v_full[i]);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.entry_empty[place.index]);
  }
}

}  // namespace flashinfer_ops::sm90
