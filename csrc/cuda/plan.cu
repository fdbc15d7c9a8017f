// Planning cascade attention on the GPU: planner.h run by one block of threads, or by a cluster.
//
// Grid: one block, of as many threads as a batch of that many groups keeps busy: what all warps do
// alike (sums over tiles, the choice of runs) costs the more the more warps there are. Where the
// chip has clusters, larger batches are planned by one: what its warps do each for their own tiles
// and units is what takes long, and one SM's schedulers are busy with it.
//
// The kernel lets kernels that depend on it start at once: those that are launched so wait for its
// end before they read the schedule.
#include <cuda_pipeline.h>

#include <cstdlib>
#include <cstring>
#include <mutex>

#include "common/cuda.h"
#include "cuda/planner.h"

namespace flashinfer_ops::gpu {
namespace {

constexpr int kSmallThreads = 256;
constexpr int kLargeThreads = 512;
constexpr int kSmallGroups = 384;
constexpr int kClusterCtas = 8;
constexpr int kAloneGroups = 128;  // up to so many, one block plans
#ifdef FLASHINFER_OPS_PLAN_CLOCKS
constexpr int kStamps = 8;
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

template <int kThreads, int kCtas>
__global__ void __launch_bounds__(kThreads, 1)
    plan_kernel(const __grid_constant__ PlanInput in, const __grid_constant__ Layout layout,
                int32_t* schedule, int shared_words) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  using Block = DeviceBlock<kThreads, kCtas>;
  using Alone = DeviceBlock<kThreads, 1>;
  SharedMemory shared(shared_words);
  Block block{shared.ints(6 * Block::kWarps)};
#ifdef FLASHINFER_OPS_PLAN_CLOCKS
  block.start = clock64();
#endif
  if (!Planner<Block, SharedMemory>(block, in, layout, schedule, shared).run()) {
    // In the one work space that there is.
    if (!block.is_first()) return;
    const PlainMemory memory{schedule + layout.work_at, layout.words - layout.work_at};
    Alone alone{block.warp_totals};
    Planner<Alone, PlainMemory>(alone, in, layout, schedule, memory).run();
  }
#ifdef FLASHINFER_OPS_PLAN_CLOCKS
  if (threadIdx.x == 0 && block.is_first()) {
    block.stamp(kStamps - 1);
    for (int i = 0; i < kStamps; ++i) {
      reinterpret_cast<Header*>(schedule)->reserved[i] = block.stamps[i];
    }
  }
#endif
}

using PlanKernel = void (*)(PlanInput, Layout, int32_t*, int);
constexpr PlanKernel kSmall = plan_kernel<kSmallThreads, 1>, kLarge = plan_kernel<kLargeThreads, 1>,
                     kCluster = plan_kernel<kLargeThreads, kClusterCtas>;

struct DeviceKind {
  int32_t num_sms;
  int32_t packed;  // for Hopper's own kernels
  int32_t shared_words;
  bool clusters;
};

// Asks for the current device's kind and makes the kernels ready there.
DeviceKind prepare(int device) {
  const int shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  for (const PlanKernel kernel : {kSmall, kLarge, kCluster}) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute");
    // As attention's kernels have it: an SM changes its division only when nothing runs there.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               "cudaFuncSetAttribute");
  }
  const int sms = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const bool packed = is_hopper(device);
  const bool clusters = device_attribute(cudaDevAttrClusterLaunch, device) != 0;
  return {packed ? std::min(sms, kMaxCtas) : sms, packed, shared_bytes / 4, clusters};
}

DeviceKind kind_of(int device) {
  constexpr int kDevices = 64;
  static std::array<std::once_flag, kDevices> asked;
  static std::array<DeviceKind, kDevices> kinds;
  if (device < 0 || device >= kDevices) return prepare(device);
  std::call_once(asked[device], [&] { kinds[device] = prepare(device); });
  return kinds[device];
}

// Words of shared memory for the planner's arrays: as many as batches of these shapes are likely to
// take, with 256 tiles and one more for four requests. Others are planned in the schedule's work
// space.
int shared_words(const PlanInput& in, const Layout& layout, int most) {
  const int64_t levels = in.num_levels, groups = in.first_group[levels];
  const int64_t requests = groups - in.first_group[levels - 1];
  const int64_t tiles = std::min(layout.tiles, kBaseTiles + requests / 4),
                pieces = groups + levels * tiles;
  const int64_t words = 3 * groups + 2 * levels + (2 * levels + 18) * tiles + 7 * pieces + 640;
  return static_cast<int>(std::min<int64_t>(words, most));
}

Costs costs_of(bool packed) {
  Costs costs = packed ? kPackedCosts : kPlainCosts;
#ifdef FLASHINFER_OPS_TUNE
  // For measurements: another set of costs for every call of one process.
  if (const char* text = std::getenv("FLASHINFER_OPS_COSTS")) {
    float values[sizeof(Costs) / sizeof(float)];
    for (float& value : values) {
      char* end = nullptr;
      value = std::strtof(text, &end);
      STD_TORCH_CHECK(end != text, "FLASHINFER_OPS_COSTS has fewer than ",
                      sizeof(Costs) / sizeof(float), " numbers");
      text = *end == ',' ? end + 1 : end;
    }
    std::memcpy(&costs, values, sizeof(Costs));
  }
#endif
  return costs;
}

void launch(const PlanInput& in, const Layout& layout, int32_t* schedule, int shared_words,
            bool clusters, cudaStream_t stream) {
  const int groups = in.first_group[in.num_levels];
  const bool several = clusters && groups > kAloneGroups, small = groups <= kSmallGroups;
  const unsigned ctas = several ? kClusterCtas : 1;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {ctas, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(small && !several ? kSmallThreads : kLargeThreads);
  config.dynamicSmemBytes = 4 * shared_words;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = several;
  check_cuda(cudaLaunchKernelEx(&config,
                                several ? kCluster
                                : small ? kSmall
                                        : kLarge,
                                in, layout, schedule, shared_words),
             "cascade_plan");
}

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
  const size_t levels = kv_indptr.size();
  STD_TORCH_CHECK(levels > 0 && levels <= kMaxLevels && qo_indptr.size() == levels &&
                      kv_last_page_len.size() == levels,
                  "qo_indptr, kv_indptr and kv_last_page_len have ", qo_indptr.size(), ", ", levels,
                  " and ", kv_last_page_len.size(), " levels, expected as many, 1 to ", kMaxLevels);
  PlanInput in{};
  int64_t num_groups[kMaxLevels];
  for (size_t l = 0; l < levels; ++l) {
    check_index(qo_indptr[l], "qo_indptr");
    check_index(kv_indptr[l], "kv_indptr");
    check_index(kv_last_page_len[l], "kv_last_page_len");
    check_same_device(qo_indptr[l], schedule, "qo_indptr");
    check_same_device(kv_indptr[l], schedule, "kv_indptr");
    check_same_device(kv_last_page_len[l], schedule, "kv_last_page_len");
    num_groups[l] = kv_indptr[l].size(0) - 1;
    STD_TORCH_CHECK(num_groups[l] >= 0, "kv_indptr[", l,
                    "] is empty, expected one element or more");
    check_sizes(qo_indptr[l], {num_groups[l] + 1}, "qo_indptr");
    check_sizes(kv_last_page_len[l], {num_groups[l]}, "kv_last_page_len");
    in.qo_indptr[l] = static_cast<const int32_t*>(qo_indptr[l].data_ptr());
    in.kv_indptr[l] = static_cast<const int32_t*>(kv_indptr[l].data_ptr());
    in.kv_last_page_len[l] = static_cast<const int32_t*>(kv_last_page_len[l].data_ptr());
    STD_TORCH_CHECK(in.first_group[l] + num_groups[l] <= kMaxGroups, "the plan has more than ",
                    kMaxGroups, " groups");
    in.first_group[l + 1] = in.first_group[l] + static_cast<int32_t>(num_groups[l]);
  }
  const Layout layout(num_groups, static_cast<int64_t>(levels));
  check_index(schedule, "schedule");
  check_sizes(schedule, {layout.words}, "schedule");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(schedule.data_ptr()) % 16 == 0,
                  "schedule is not aligned to 16 bytes");
  const OnDevice on(schedule);
  in.num_levels = static_cast<int32_t>(levels);
  in.page_size = static_cast<int32_t>(page_size);
  in.group_size = static_cast<int32_t>(num_qo_heads / num_kv_heads);
  in.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  in.causal = causal;
  const DeviceKind kind = kind_of(schedule.get_device_index());
  in.num_sms = kind.num_sms;
  in.packed = kind.packed;
  in.costs = costs_of(kind.packed);
  derive(in);
  const int words = shared_words(in, layout, kind.shared_words);
  launch(in, layout, static_cast<int32_t*>(schedule.data_ptr()), words, kind.clusters, on.stream());
}

// cascade_plan(Tensor[] qo_indptr, Tensor[] kv_indptr, Tensor[] kv_last_page_len, int num_qo_heads,
//   int num_kv_heads, int head_dim, int page_size, bool causal) -> Tensor
Tensor cascade_plan(const std::vector<Tensor>& qo_indptr, const std::vector<Tensor>& kv_indptr,
                    const std::vector<Tensor>& kv_last_page_len, int64_t num_qo_heads,
                    int64_t num_kv_heads, int64_t head_dim, int64_t page_size, bool causal) {
  STD_TORCH_CHECK(!kv_indptr.empty() && kv_indptr.size() <= kMaxLevels, "kv_indptr has ",
                  kv_indptr.size(), " levels, expected 1 to ", kMaxLevels);
  int64_t num_groups[kMaxLevels];
  for (size_t l = 0; l < kv_indptr.size(); ++l) num_groups[l] = kv_indptr[l].size(0) - 1;
  const Layout layout(num_groups, static_cast<int64_t>(kv_indptr.size()));
  Tensor schedule = empty_cuda(kv_indptr[0], std::array<int64_t, 1>{layout.words}, ScalarType::Int);
  cascade_plan_out(qo_indptr, kv_indptr, kv_last_page_len, num_qo_heads, num_kv_heads, head_dim,
                   page_size, causal, schedule);
  return schedule;
}

}  // namespace
}  // namespace flashinfer_ops::gpu

STABLE_TORCH_LIBRARY_IMPL(flashinfer_ops, CUDA, m) {
  m.impl("cascade_plan", TORCH_BOX(&flashinfer_ops::gpu::cascade_plan));
  m.impl("cascade_plan.out", TORCH_BOX(&flashinfer_ops::gpu::cascade_plan_out));
}
