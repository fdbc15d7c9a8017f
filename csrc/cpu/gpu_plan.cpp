// The GPU's planner (cuda/planner.h) run by one thread on the host: what tests without a GPU
// compare with, and plan by for kernels under an interpreter.
#include <algorithm>
#include <vector>

#include "cuda/planner.h"

namespace flashinfer_ops::gpu {
namespace {

struct HostBlock {
  int thread() const { return 0; }
  int size() const { return 1; }
  int warp() const { return 0; }
  int num_warps() const { return 1; }
  int lane() const { return 0; }
  int num_lanes() const { return 1; }
  void sync() {}
  void warp_sync() {}
  // The cluster's: it is this block.
  int cluster_thread() const { return 0; }
  int cluster_size() const { return 1; }
  int cluster_warp() const { return 0; }
  int cluster_warps() const { return 1; }
  bool is_first() const { return true; }
  void sync_all() {}
  void arrive_all() {}
  void wait_all() {}
  template <class T>
  void store_all(T* p, T value) {
    *p = value;
  }
  template <class T>
  void warp_store_all(T* p, T value) {
    *p = value;
  }
  void raise_all(int32_t* p, int value) { raise(p, value); }
  void stamp(int phase) {}
  template <class T>
  void add(T* p, T value) {
    *p += value;
  }
  void raise(int32_t* p, int value) { *p = std::max(*p, value); }
  bool any(bool x) { return x; }
  int warp_max(int x) { return x; }
  int warp_sum(int x) { return x; }
  int warp_or(int x) { return x; }
  int warp_scan(int x, int* total) {
    *total = x;
    return 0;
  }
  int warp_rank(bool x, int* total) { return warp_scan(x, total); }
  template <class Time>
  int lowest(Time time) {
    int best = 0;
    for (int k = 1; k < kCandidates; ++k) {
      if (time(k) < time(best)) best = k;
    }
    time(best);
    return best;
  }
  // What its time, the last one computed, has left.
  Sharing of_candidate(const Sharing& x, int k) const { return x; }

  template <int N, class Load, class Store>
  void scan(int n, Load load, Store store, int (&total)[N]) {
    std::fill_n(total, N, 0);
    for (int i = 0; i < n; ++i) {
      int value[N] = {};
      load(i, value);
      store(i, total, value);
      for (int j = 0; j < N; ++j) total[j] = add_up(total[j], value[j]);
    }
  }
};

}  // namespace
}  // namespace flashinfer_ops::gpu

// Writes the schedule of `num_levels` levels of index arrays in host memory. The planner's own
// arrays lie outside of the schedule, as in a GPU's shared memory, when `fast_bytes` are enough for
// them.
extern "C" __attribute__((visibility("default"))) void flashinfer_ops_gpu_plan(
    const int32_t* const* qo_indptr, const int32_t* const* kv_indptr,
    const int32_t* const* kv_last_page_len, const int64_t* num_groups, int64_t num_levels,
    int64_t group_size, int64_t num_kv_heads, int64_t page_size, int64_t causal, int64_t num_sms,
    int64_t packed, int64_t fast_bytes, int32_t* schedule) {
  using namespace flashinfer_ops::gpu;
  PlanInput in{};
  for (int64_t l = 0; l < num_levels; ++l) {
    in.qo_indptr[l] = qo_indptr[l];
    in.kv_indptr[l] = kv_indptr[l];
    in.kv_last_page_len[l] = kv_last_page_len[l];
    in.first_group[l + 1] = in.first_group[l] + static_cast<int32_t>(num_groups[l]);
  }
  in.num_levels = static_cast<int32_t>(num_levels);
  in.page_size = static_cast<int32_t>(page_size);
  in.group_size = static_cast<int32_t>(group_size);
  in.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  in.causal = static_cast<int32_t>(causal);
  in.num_sms = static_cast<int32_t>(num_sms);
  in.packed = static_cast<int32_t>(packed);
  in.costs = packed ? kPackedCosts : kPlainCosts;
  derive(in);
  const Layout layout(num_groups, num_levels);
  std::vector<int32_t> fast(fast_bytes / 4);
  HostBlock block{};
  const PlainMemory outside{fast.data(), fast_bytes / 4};
  if (!Planner<HostBlock, PlainMemory>(block, in, layout, schedule, outside).run()) {
    const PlainMemory inside{schedule + layout.work_at, layout.words - layout.work_at};
    Planner<HostBlock, PlainMemory>(block, in, layout, schedule, inside).run();
  }
}
