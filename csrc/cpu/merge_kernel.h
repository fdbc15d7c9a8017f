// The vectorised part of every merge, compiled once per instruction set: a weighted sum of rows.
//
//   out[i] = sum over k of weights[k] * rows[k][i],   i in [0, dim)
//
// in float32. A row of weight zero is left out, not multiplied, so its NaN or inf stays out; with
// no row left the sum is zero. `out` may be one of the rows.
#pragma once

#include <cstdint>

namespace flashinfer_ops {

using WeightedSum = void (*)(void* out, const void* const* rows, const float* weights,
                             int64_t num_rows, int64_t dim);

struct MergeKernel {
  WeightedSum float32;
  WeightedSum float16;
  WeightedSum bfloat16;
};

}  // namespace flashinfer_ops
