// merge_kernel.h for one instruction set: vectors of kLanes elements, sums in registers.
#include "cpu/merge_kernel.h"

#include "cpu/attention_simd.h"

namespace flashinfer_ops {
namespace {

template <typename T>
void weighted_sum(void* out, const void* const* rows, const float* weights, int64_t num_rows,
                  int64_t dim) {
  for (int64_t i = 0; i < dim; i += kLanes) {
    Vec sum = splat(0.0f);
    for (int64_t k = 0; k < num_rows; ++k) {
      if (weights[k] == 0.0f) continue;
      sum += splat(weights[k]) * load_first(static_cast<const T*>(rows[k]) + i, dim - i);
    }
    store_first(static_cast<T*>(out) + i, sum, dim - i);
  }
}

}  // namespace

namespace FLASHINFER_OPS_CAPABILITY {
extern const MergeKernel kMergeKernel;
const MergeKernel kMergeKernel = {weighted_sum<float>, weighted_sum<Float16>,
                                  weighted_sum<BFloat16>};
}  // namespace FLASHINFER_OPS_CAPABILITY

}  // namespace flashinfer_ops
