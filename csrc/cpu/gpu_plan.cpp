// The GPU's planner (cuda/planner.h) run by one thread on the host: what tests without a GPU compare
// with, and plan by for kernels under an interpreter.
#include <algorithm>
#include <vector>

#include "cuda/planner.h"

namespace flashinfer_ops::gpu {
namespace {

struct HostBlock {
  float candidates[kCandidates];

  int thread() const { return 0; }
  int size() const { return 1; }
  int warp() const { return 0; }
  int num_warps() const { return 1; }
  int lane() const { return 0; }
  int num_lanes() const { return 1; }
  void sync() {}
  int count(bool x) { return x; }
  int max(int x) { return x; }
  float warp_sum(float x) { return x; }
  float& candidate(int k) { return candidates[k]; }
  void raise(int32_t* p, int value) { *p = std::max(*p, value); }

  template <class Load, class Store>
  Counts scan(int n, Load load, Store store) {
    Counts at{0, 0, 0, 0};
    for (int i = 0; i < n; ++i) {
      const Counts value = load(i);
      store(i, at);
      at = at + value;
    }
    return at;
  }
};

}  // namespace
}  // namespace flashinfer_ops::gpu

// Writes the schedule of `num_levels` levels of index arrays in host memory. `fast_bytes` of its own
// arrays lie outside of the schedule, as they do in a GPU's shared memory.
extern "C" __attribute__((visibility("default"))) void flashinfer_ops_gpu_plan(
    const int32_t* const* qo_indptr, const int32_t* const* kv_indptr,
    const int32_t* const* kv_last_page_len, const int64_t* num_groups, int64_t num_levels,
    int64_t group_size, int64_t num_kv_heads, int64_t page_size, int64_t causal, int64_t num_sms,
    int64_t fast_bytes, int32_t* schedule) {
  using namespace flashinfer_ops::gpu;
  PlanInput in{};
  for (int64_t l = 0; l < num_levels; ++l) {
    in.qo_indptr[l] = qo_indptr[l];
    in.kv_indptr[l] = kv_indptr[l];
    in.kv_last_page_len[l] = kv_last_page_len[l];
    in.num_groups[l] = static_cast<int32_t>(num_groups[l]);
  }
  in.num_levels = static_cast<int32_t>(num_levels);
  in.page_size = static_cast<int32_t>(page_size);
  in.group_size = static_cast<int32_t>(group_size);
  in.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  in.causal = static_cast<int32_t>(causal);
  in.num_sms = static_cast<int32_t>(num_sms);
  const Layout layout(num_groups, num_levels);
  std::vector<char> fast(fast_bytes);
  HostBlock block{};
  Planner<HostBlock>(block, in, layout, schedule, fast.data(), fast_bytes).run();
}
