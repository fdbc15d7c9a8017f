// The GPU's planner (cuda/planner.h) run on the host: what tests without a GPU compare with, and
// plan by for kernels under an interpreter. A block has one thread; a cluster's blocks run beside
// each other, each with a memory of its own.
#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda/planner.h"

namespace flashinfer_ops::gpu {
namespace {

class Cluster {
 public:
  Cluster(int64_t size, int64_t words) : memories(size, std::vector<int32_t>(words)) {}

  void sync() {
    std::unique_lock<std::mutex> lock(mutex);
    const int64_t mine = round;
    if (++arrived == static_cast<int64_t>(memories.size())) {
      arrived = 0;
      ++round;
      all_arrived.notify_all();
    } else {
      all_arrived.wait(lock, [&] { return round != mine; });
    }
  }

  std::vector<std::vector<int32_t>> memories;
  std::mutex mutex;

 private:
  std::condition_variable all_arrived;
  int64_t arrived = 0, round = 0;
};

struct HostBlock {
  Cluster* cluster;
  int rank = 0;

  int thread() const { return 0; }
  int size() const { return 1; }
  int warp() const { return 0; }
  int num_warps() const { return 1; }
  int lane() const { return 0; }
  int num_lanes() const { return 1; }
  void sync() {}
  void warp_sync() {}
  // The cluster's.
  int cluster_thread() const { return rank; }
  int cluster_size() const { return static_cast<int>(cluster->memories.size()); }
  int cluster_warp() const { return rank; }
  int cluster_warps() const { return cluster_size(); }
  bool is_first() const { return rank == 0; }
  void sync_all() { cluster->sync(); }
  void arrive_all() {}
  void wait_all() { cluster->sync(); }
  template <class F>
  void for_all(int32_t* p, F f) {
    if (cluster_size() == 1) return f(p);  // wherever that is
    const auto at = p - cluster->memories[rank].data();
    for (auto& memory : cluster->memories) f(memory.data() + at);
  }
  template <class T>
  void store_all(T* p, T value) {
    for_all(reinterpret_cast<int32_t*>(p), [&](int32_t* q) { *reinterpret_cast<T*>(q) = value; });
  }
  template <class T>
  void warp_store_all(T* p, T value) {
    store_all(p, value);
  }
  void raise_all(int32_t* p, int value) {
    const std::lock_guard<std::mutex> lock(cluster->mutex);
    for_all(p, [&](int32_t* q) { raise(q, value); });
  }
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
// them; then a cluster of `num_blocks` plans.
extern "C" __attribute__((visibility("default"))) void flashinfer_ops_gpu_plan(
    const int32_t* const* qo_indptr, const int32_t* const* kv_indptr,
    const int32_t* const* kv_last_page_len, const int64_t* num_groups, int64_t num_levels,
    int64_t group_size, int64_t num_kv_heads, int64_t page_size, int64_t causal, int64_t num_sms,
    int64_t packed, int64_t fast_bytes, int64_t num_blocks, int32_t* schedule) {
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
  Cluster cluster(num_blocks, fast_bytes / 4), alone(1, 0);
  const auto run = [&](int rank) {
    HostBlock block{&cluster, rank};
    const PlainMemory outside{cluster.memories[rank].data(), fast_bytes / 4};
    return Planner<HostBlock, PlainMemory>(block, in, layout, schedule, outside).run();
  };
  std::vector<std::thread> others;
  for (int rank = 1; rank < num_blocks; ++rank) others.emplace_back(run, rank);
  const bool has_room = run(0);
  for (std::thread& other : others) other.join();
  if (!has_room) {
    HostBlock block{&alone};
    const PlainMemory inside{schedule + layout.work_at, layout.words - layout.work_at};
    Planner<HostBlock, PlainMemory>(block, in, layout, schedule, inside).run();
  }
}
