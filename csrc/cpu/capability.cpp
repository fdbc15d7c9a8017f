#include "cpu/capability.h"

#include <atomic>
#include <cstring>
#include <vector>

namespace flashinfer_ops {

#if defined(FLASHINFER_OPS_X86_KERNELS)
namespace avx512_bf16 {
extern const AttentionKernel kAttentionKernel;
extern const MergeKernel kMergeKernel;
}  // namespace avx512_bf16
namespace avx512 {
extern const AttentionKernel kAttentionKernel;
extern const MergeKernel kMergeKernel;
}  // namespace avx512
namespace avx2 {
extern const AttentionKernel kAttentionKernel;
extern const MergeKernel kMergeKernel;
}  // namespace avx2
#endif
namespace baseline {
extern const AttentionKernel kAttentionKernel;
extern const MergeKernel kMergeKernel;
}  // namespace baseline

namespace {

// The kernels that this machine can run, best first.
std::vector<CpuKernels> find_supported_kernels() {
  std::vector<CpuKernels> kernels;
#if defined(FLASHINFER_OPS_X86_KERNELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    kernels.push_back({&avx512_bf16::kAttentionKernel, &avx512_bf16::kMergeKernel});
  }
  if (avx512) kernels.push_back({&avx512::kAttentionKernel, &avx512::kMergeKernel});
  if (avx2) kernels.push_back({&avx2::kAttentionKernel, &avx2::kMergeKernel});
#endif
  kernels.push_back({&baseline::kAttentionKernel, &baseline::kMergeKernel});
  return kernels;
}

const std::vector<CpuKernels>& supported_kernels() {
  static const std::vector<CpuKernels> kernels = find_supported_kernels();
  return kernels;
}

std::atomic<const CpuKernels*>& selected_kernels() {
  static std::atomic<const CpuKernels*> kernels{&supported_kernels().front()};
  return kernels;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *selected_kernels().load(std::memory_order_relaxed); }

// The instruction set whose kernels run, one of avx512_bf16, avx512, avx2, baseline.
extern "C" __attribute__((visibility("default"))) const char* flashinfer_ops_cpu_capability() {
  return cpu_kernels().attention->name;
}

// Chooses it by name, for tests; 0 if the name is not known or this machine cannot run it.
extern "C" __attribute__((visibility("default"))) int flashinfer_ops_set_cpu_capability(
    const char* name) {
  for (const CpuKernels& kernels : supported_kernels()) {
    if (std::strcmp(kernels.attention->name, name) != 0) continue;
    selected_kernels() = &kernels;
    return 1;
  }
  return 0;
}

}  // namespace flashinfer_ops
