// What runs the planner (planner.h) on a GPU: the threads of a block or of a cluster, and shared
// memory for its arrays.
#pragma once

#include <cuda_pipeline.h>

#include <cstring>

#include "cuda/planner.h"

namespace flashinfer_ops::gpu {

#ifdef FLASHINFER_OPS_PLAN_CLOCKS
constexpr int kStamps = 7;
#endif

// The threads of one block of a cluster, as planner.h asks for them.
template <int kThreads, int kCtas>
struct DeviceBlock {
  static constexpr int kWarps = kThreads / 32;
  static_assert(kWarps <= 32 && (kThreads & (kThreads - 1)) == 0 && kCandidates == 32);

  int32_t* warp_totals;  // [2, 3, kWarps]
  int buffer = 0;
#ifdef FLASHINFER_OPS_PLAN_CLOCKS
  int64_t start = 0;
  int32_t stamps[kStamps] = {};
  __device__ __forceinline__ void stamp(int phase) {
    stamps[phase] = static_cast<int32_t>(clock64() - start);
  }
#else
  __device__ __forceinline__ void stamp(int phase) {}
#endif

  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int size() const { return kThreads; }
  __device__ __forceinline__ int warp() const { return threadIdx.x >> 5; }
  __device__ __forceinline__ int num_warps() const { return kWarps; }
  __device__ __forceinline__ int lane() const { return threadIdx.x & 31; }
  __device__ __forceinline__ int num_lanes() const { return 32; }
  __device__ __forceinline__ void sync() { __syncthreads(); }
  __device__ __forceinline__ void warp_sync() { __syncwarp(); }

  __device__ __forceinline__ int cluster_rank() const {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    if (kCtas > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return static_cast<int>(rank);
  }
  // Warps and threads of one number in all blocks follow each other: few tiles and units are for
  // many blocks.
  __device__ __forceinline__ int cluster_thread() const { return cluster_warp() * 32 + lane(); }
  __device__ __forceinline__ int cluster_size() const { return kCtas * kThreads; }
  __device__ __forceinline__ int cluster_warp() const { return warp() * kCtas + cluster_rank(); }
  __device__ __forceinline__ int cluster_warps() const { return kCtas * kWarps; }
  __device__ __forceinline__ bool is_first() const { return cluster_rank() == 0; }
  // What any thread wrote before is what all see behind.
  __device__ __forceinline__ void sync_all() {
    if constexpr (kCtas == 1) {
      __syncthreads();
    } else {
      arrive_all();
      wait_all();
    }
  }
  __device__ __forceinline__ void arrive_all() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kCtas > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void wait_all() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kCtas > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }
  // To the same place in each block's memory, which is shared memory where there are several.
  template <class T>
  __device__ __forceinline__ void store_all(T* p, T value) {
    if constexpr (kCtas == 1) {
      *p = value;
    } else {
      for_all(p, [&](uint32_t at) { store_shared(at, value); });
    }
  }
  // The same of a value that all lanes of a warp have.
  template <class T>
  __device__ __forceinline__ void warp_store_all(T* p, T value) {
    if constexpr (kCtas == 1) {
      if (lane() == 0) *p = value;
    } else {
      if (lane() < kCtas) store_shared(place_at(p, lane()), value);
    }
  }
  __device__ __forceinline__ void raise_all(int32_t* p, int value) {
    if constexpr (kCtas == 1) {
      raise(p, value);
    } else {
#if __CUDA_ARCH__ >= 900
      for_all(p, [&](uint32_t at) {
        asm volatile("red.relaxed.cluster.shared::cluster.max.s32 [%0], %1;" ::"r"(at), "r"(value)
                     : "memory");
      });
#endif
    }
  }

  // Where a block of the cluster has what this one has at p, in shared memory.
  __device__ __forceinline__ static uint32_t place_at(const void* p, int rank) {
    uint32_t there = 0;
#if __CUDA_ARCH__ >= 900
    const auto here = static_cast<uint32_t>(__cvta_generic_to_shared(p));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
#endif
    return there;
  }
  template <class F>
  __device__ __forceinline__ static void for_all(const void* p, F f) {
#pragma unroll
    for (int rank = 0; rank < kCtas; ++rank) f(place_at(p, rank));
  }
  template <class T>
  __device__ __forceinline__ static void store_shared(uint32_t at, const T& value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#if __CUDA_ARCH__ >= 900
    uint32_t x[4] = {};
    memcpy(x, &value, sizeof(T));
    if constexpr (sizeof(T) == 4) {
      asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(at), "r"(x[0]) : "memory");
    } else if constexpr (sizeof(T) == 8) {
      asm volatile("st.shared::cluster.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(x[0]), "r"(x[1])
                   : "memory");
    } else {
      asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x[0]),
                   "r"(x[1]), "r"(x[2]), "r"(x[3])
                   : "memory");
    }
#endif
  }
  template <class T>
  __device__ __forceinline__ void add(T* p, T value) {
    atomicAdd(p, value);
  }
  __device__ __forceinline__ void raise(int32_t* p, int value) { atomicMax(p, value); }
  __device__ __forceinline__ bool any(bool x) { return __syncthreads_or(x); }
  __device__ __forceinline__ int warp_max(int x) { return __reduce_max_sync(~0u, x); }
  __device__ __forceinline__ int warp_sum(int x) { return __reduce_add_sync(~0u, x); }
  __device__ __forceinline__ int warp_or(int x) {
    return static_cast<int>(__reduce_or_sync(~0u, static_cast<unsigned>(x)));
  }

  // The sum over the lanes before.
  __device__ __forceinline__ int warp_scan(int x, int* total) {
    int sum = x;  // inclusive
    for (int delta = 1; delta < 32; delta <<= 1) {
      const int other = __shfl_up_sync(~0u, sum, delta);
      if (lane() >= delta) sum += other;
    }
    *total = __shfl_sync(~0u, sum, 31);
    return sum - x;
  }
  __device__ __forceinline__ int warp_rank(bool x, int* total) {
    const unsigned lanes = __ballot_sync(~0u, x);
    *total = __popc(lanes);
    return __popc(lanes & ((1u << lane()) - 1));
  }

  // The first of kCandidates with the lowest time, none of them negative; a lane takes each.
  template <class Time>
  __device__ __forceinline__ int lowest(Time time) {
    const unsigned mine = __float_as_uint(time(lane()));
    return __ffs(__ballot_sync(~0u, mine == __reduce_min_sync(~0u, mine))) - 1;
  }
  // What the time of candidate k left in its lane.
  __device__ __forceinline__ Sharing of_candidate(const Sharing& x, int k) const {
    return {__shfl_sync(~0u, x.time, k), __shfl_sync(~0u, x.matrix_ctas, k),
            __shfl_sync(~0u, x.stream_rounds, k), __shfl_sync(~0u, x.first_free, k)};
  }

  // store(i, sums of load(0) to load(i - 1), load(i)) for each i below n; sums of all in `total`.
  // One barrier a pass: warps leave their sums in one of two buffers by turns.
  template <int N, class Load, class Store>
  __device__ __forceinline__ void scan(int n, Load load, Store store, int (&total)[N]) {
    for (int j = 0; j < N; ++j) total[j] = 0;
    for (int base = 0; base < n; base += kThreads) {
      const int i = base + thread();
      int value[N] = {}, at[N];
      if (i < n) load(i, value);
      for (int j = 0; j < N; ++j) {
        int sum;
        at[j] = warp_scan(value[j], &sum);
        if (lane() == 0) warp_totals[(buffer * 3 + j) * kWarps + warp()] = sum;
      }
      __syncthreads();
      for (int j = 0; j < N; ++j) {
        const int sum = lane() < kWarps ? warp_totals[(buffer * 3 + j) * kWarps + lane()] : 0;
        at[j] += add_up(total[j], warp_sum(lane() < warp() ? sum : 0));
        total[j] = add_up(total[j], warp_sum(sum));
      }
      if (i < n) store(i, at, value);
      buffer ^= 1;
    }
  }
};

// The planner's arrays in shared memory, as the compiler knows.
struct SharedMemory {
  int32_t* base;
  int capacity;  // words
  int used = 0;

  __device__ __forceinline__ explicit SharedMemory(int capacity) : capacity(capacity) {
    extern __shared__ int4 words[];
    auto address = static_cast<unsigned>(__cvta_generic_to_shared(words));
    // Else the compiler computes it wherever it is used, from a special register that is slow.
    asm volatile("" : "+r"(address));
    base = static_cast<int32_t*>(__cvta_shared_to_generic(address));
  }
  __device__ __forceinline__ int32_t* ints(int n) {
    int32_t* p = base + used;
    used += (n + 3) & ~3;
    return p;
  }
  __device__ __forceinline__ bool fits() const { return used <= capacity; }
  __device__ __forceinline__ void copy(int32_t* to, const int32_t* from) {
    __pipeline_memcpy_async(to, from, sizeof(int32_t));
  }
  __device__ __forceinline__ void wait() {
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }
};

}  // namespace flashinfer_ops::gpu
