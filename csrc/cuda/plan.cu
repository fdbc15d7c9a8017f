// Planning cascade attention on the GPU: one block of 1024 threads runs planner.h.
#include <atomic>

#include "common/cuda.h"
#include "cuda/planner.h"

namespace flashinfer_ops::gpu {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kFastBytes = 160 * 1024;  // of shared memory for the planner's arrays

struct Shared {
  Counts warp_total[kWarps];
  int32_t warp_max[kWarps];
  float candidate[kCandidates];
};

__device__ __forceinline__ Counts shuffle_up(const Counts& c, int delta) {
  return {__shfl_up_sync(~0u, c.plain, delta), __shfl_up_sync(~0u, c.granules, delta),
          __shfl_up_sync(~0u, c.own, delta), __shfl_up_sync(~0u, c.blocks, delta)};
}

// The threads of one block, as planner.h asks for them.
struct DeviceBlock {
  Shared& shared;

  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int size() const { return kThreads; }
  __device__ __forceinline__ int warp() const { return threadIdx.x >> 5; }
  __device__ __forceinline__ int num_warps() const { return kWarps; }
  __device__ __forceinline__ int lane() const { return threadIdx.x & 31; }
  __device__ __forceinline__ int num_lanes() const { return 32; }
  __device__ __forceinline__ void sync() { __syncthreads(); }
  __device__ __forceinline__ int count(bool x) { return __syncthreads_count(x); }
  __device__ __forceinline__ void raise(int32_t* p, int value) { atomicMax(p, value); }
  __device__ __forceinline__ float& candidate(int k) { return shared.candidate[k]; }

  __device__ __forceinline__ float warp_sum(float x) {
    for (int delta = 16; delta > 0; delta >>= 1) x += __shfl_xor_sync(~0u, x, delta);
    return x;
  }

  __device__ __forceinline__ int max(int x) {
    x = __reduce_max_sync(~0u, x);
    if (lane() == 0) shared.warp_max[warp()] = x;
    __syncthreads();
    x = __reduce_max_sync(~0u, shared.warp_max[lane()]);
    __syncthreads();
    return x;
  }

  // store(i, sum of load(0) to load(i - 1)) for each i below n; the sum of all for every thread.
  template <class Load, class Store>
  __device__ __forceinline__ Counts scan(int n, Load load, Store store) {
    Counts carry{0, 0, 0, 0};
    for (int base = 0; base < n; base += kThreads) {
      const int i = base + thread();
      const Counts value = i < n ? load(i) : Counts{0, 0, 0, 0};
      Counts sum = value;  // inclusive
      for (int delta = 1; delta < 32; delta <<= 1) {
        const Counts other = shuffle_up(sum, delta);
        if (lane() >= delta) sum = sum + other;
      }
      if (lane() == 31) shared.warp_total[warp()] = sum;
      __syncthreads();
      Counts totals = shared.warp_total[lane()];
      for (int delta = 1; delta < 32; delta <<= 1) {
        const Counts other = shuffle_up(totals, delta);
        if (lane() >= delta) totals = totals + other;
      }
      const auto of_lane = [&](int from) {
        return Counts{__shfl_sync(~0u, totals.plain, from), __shfl_sync(~0u, totals.granules, from),
                      __shfl_sync(~0u, totals.own, from), __shfl_sync(~0u, totals.blocks, from)};
      };
      const Counts lower = of_lane(warp() > 0 ? warp() - 1 : 0);
      Counts at = carry;
      if (warp() > 0) at = at + lower;
      at = {at.plain + sum.plain - value.plain, at.granules + sum.granules - value.granules,
            at.own + sum.own - value.own, at.blocks + sum.blocks - value.blocks};
      if (i < n) store(i, at);
      carry = carry + of_lane(31);
      __syncthreads();
    }
    return carry;
  }
};

__global__ void __launch_bounds__(kThreads, 1)
    plan_kernel(const __grid_constant__ PlanInput in, const __grid_constant__ Layout layout,
                int32_t* schedule) {
  extern __shared__ __align__(16) char fast[];
  __shared__ Shared shared;
  DeviceBlock block{shared};
  Planner<DeviceBlock>(block, in, layout, schedule, fast, kFastBytes).run();
}

// The current device's number of SMs; asked for, and the kernel made ready there, once.
int prepare(int device) {
  constexpr int kDevices = 64;
  static std::array<std::atomic<int>, kDevices> cached{};
  const bool known = device >= 0 && device < kDevices;
  int sms = known ? cached[device].load() : 0;
  if (sms == 0) {
    check_cuda(cudaFuncSetAttribute(plan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    kFastBytes),
               "cudaFuncSetAttribute");
    check_cuda(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
    if (known) cached[device].store(sms);
  }
  return sms;
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
    STD_TORCH_CHECK(num_groups[l] >= 0 && num_groups[l] < kNoDiagonal, "kv_indptr[", l, "] has ",
                    num_groups[l] + 1, " elements, expected at least one, below 2^30");
    check_sizes(qo_indptr[l], {num_groups[l] + 1}, "qo_indptr");
    check_sizes(kv_last_page_len[l], {num_groups[l]}, "kv_last_page_len");
    in.qo_indptr[l] = static_cast<const int32_t*>(qo_indptr[l].data_ptr());
    in.kv_indptr[l] = static_cast<const int32_t*>(kv_indptr[l].data_ptr());
    in.kv_last_page_len[l] = static_cast<const int32_t*>(kv_last_page_len[l].data_ptr());
    in.num_groups[l] = static_cast<int32_t>(num_groups[l]);
  }
  const Layout layout(num_groups, static_cast<int64_t>(levels));
  check_index(schedule, "schedule");
  check_sizes(schedule, {layout.words}, "schedule");
  STD_TORCH_CHECK(layout.words < (int64_t{1} << 31), "the plan has too many groups: its schedule "
                  "would take ", layout.words, " words");
  const OnDevice on(schedule);
  in.num_levels = static_cast<int32_t>(levels);
  in.page_size = static_cast<int32_t>(page_size);
  in.group_size = static_cast<int32_t>(num_qo_heads / num_kv_heads);
  in.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  in.causal = causal;
  in.num_sms = prepare(schedule.get_device_index());
  plan_kernel<<<1, kThreads, kFastBytes, on.stream()>>>(
      in, layout, static_cast<int32_t*>(schedule.data_ptr()));
  check_launch("cascade_plan");
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
  Tensor schedule =
      empty_cuda(kv_indptr[0], std::array<int64_t, 1>{layout.words}, ScalarType::Int);
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
