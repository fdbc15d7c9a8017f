// Planning cascade attention on the GPU: planner.h run by one block of threads, or by a cluster.
//
// Grid: one cluster where the chip has clusters, as what warps do each for their own tiles and
// units takes long, and more of them wait less for one SM's schedulers. Else one block, of as many
// threads as a batch of that many groups keeps busy: what all warps do alike (sums over tiles, the
// choice of runs) costs the more the more warps there are.
//
// The kernel lets kernels that depend on it start at once: those that are launched so wait for its
// end before they read the schedule.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "common/cuda.h"
#include "cuda/planner.h"
#include "cuda/planner_threads.h"

namespace flashinfer_ops::gpu {
namespace {

constexpr int kSmallThreads = 256;
constexpr int kLargeThreads = 512;
constexpr int kSmallGroups = 384;
constexpr int kClusterCtas = 8;

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

// What tests allow the planner: to see that every kernel makes the same plans.
struct Limits {
  std::atomic<bool> clusters{true};
  std::atomic<int32_t> shared_words{INT32_MAX};
} limits;

cudaLaunchConfig_t cluster_config(int shared_bytes, cudaStream_t stream,
                                  cudaLaunchAttribute* attribute) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim = {kClusterCtas, 1, 1};
  return launch_config(kClusterCtas, kLargeThreads, shared_bytes, stream, attribute);
}

// Whether the current device has room for the cluster, and this build has code for it.
bool has_clusters(int device, int shared_bytes) {
  if (device_attribute(cudaDevAttrClusterLaunch, device) == 0) return false;
  cudaFuncAttributes code{};
  check_cuda(cudaFuncGetAttributes(&code, kCluster), "cudaFuncGetAttributes");
  if (code.ptxVersion < 90) return false;
  cudaLaunchAttribute attribute;
  const auto config = cluster_config(shared_bytes, nullptr, &attribute);
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kCluster, &config);
  if (error != cudaSuccess) cudaGetLastError();  // one block plans as well
  return error == cudaSuccess && clusters > 0;
}

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
  return {packed ? std::min(sms, kMaxCtas) : sms, packed, shared_bytes / 4,
          has_clusters(device, shared_bytes)};
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
  if (clusters) {
    cudaLaunchAttribute attribute;
    const auto config = cluster_config(4 * shared_words, stream, &attribute);
    if (cudaLaunchKernelEx(&config, kCluster, in, layout, schedule, shared_words) == cudaSuccess) {
      return;
    }
    cudaGetLastError();  // a context may have too few of the SMs; one block plans as well
  }
  const bool small = in.first_group[in.num_levels] <= kSmallGroups;
  const PlanKernel kernel = small ? kSmall : kLarge;
  kernel<<<1, small ? kSmallThreads : kLargeThreads, 4 * shared_words, stream>>>(
      in, layout, schedule, shared_words);
  check_launch("cascade_plan");
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
  const int words =
      shared_words(in, layout, std::min(kind.shared_words, limits.shared_words.load()));
  launch(in, layout, static_cast<int32_t*>(schedule.data_ptr()), words,
         kind.clusters && limits.clusters.load(), on.stream());
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

// From now on, for tests: whether clusters may plan, and in how much shared memory a block may.
extern "C" __attribute__((visibility("default"))) void flashinfer_ops_limit_planner(
    int32_t clusters, int32_t shared_words) {
  flashinfer_ops::gpu::limits.clusters.store(clusters != 0);
  constexpr int32_t kLeast = 128;  // which is taken without asking
  flashinfer_ops::gpu::limits.shared_words.store(std::max(shared_words, kLeast));
}

STABLE_TORCH_LIBRARY_IMPL(flashinfer_ops, CUDA, m) {
  m.impl("cascade_plan", TORCH_BOX(&flashinfer_ops::gpu::cascade_plan));
  m.impl("cascade_plan.out", TORCH_BOX(&flashinfer_ops::gpu::cascade_plan_out));
}
