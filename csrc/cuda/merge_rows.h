// What the kernels of merge.cu take rows and scalars with: vectors of elements, and the weights of
// states.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "common/cuda.h"

namespace flashinfer_ops {

__device__ inline float neg_inf() { return __int_as_float(0xff800000); }

// The larger one; NaN wins, so that it comes out.
__device__ inline float max_nan(float a, float b) { return b <= a || isnan(a) ? a : b; }

// 2^(x - max) without inf - inf: the largest one has weight 1, also when it is +inf; -inf has none.
__device__ inline float relative_weight(float x, float max) {
  if (x == neg_inf()) return 0.0f;
  return x == max ? 1.0f : exp2f(x - max);
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x) {
  return static_cast<T>(x);
}

// kVec elements as they lie in memory. A vector of 16 bytes stays in whole registers until it is
// used: taken apart when loaded, one of 16-bit elements would need twice as many.
template <typename T, int kVec>
struct Vector {
  static_assert(kVec == 1 || kVec * sizeof(T) == 16);
  using Raw =
      std::conditional_t<kVec != 1, uint4, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  Raw raw{};

  __device__ void unpack(float (&values)[kVec]) const {
    T elements[kVec];
    memcpy(elements, &raw, sizeof(raw));
#pragma unroll
    for (int j = 0; j < kVec; ++j) values[j] = to_float(elements[j]);
  }

  __device__ void pack(const float (&values)[kVec], float scale) {
    T elements[kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) elements[j] = from_float<T>(values[j] * scale);
    memcpy(&raw, elements, sizeof(raw));
  }
};

template <typename T, int kVec>
__device__ inline Vector<T, kVec> load_vector(const char* row, uint32_t index) {
  return {reinterpret_cast<const typename Vector<T, kVec>::Raw*>(row)[index]};
}

// The same from memory that no thread of the launch writes.
template <typename T, int kVec>
__device__ inline Vector<T, kVec> load_constant_vector(const char* row, uint32_t index) {
  return {__ldg(reinterpret_cast<const typename Vector<T, kVec>::Raw*>(row) + index)};
}

// A state of weight zero is left out, whatever its v holds.
template <typename T, int kVec>
__device__ inline void accumulate(float (&sum)[kVec], float weight, const Vector<T, kVec>& v) {
  if (weight == 0.0f) return;
  float values[kVec];
  v.unpack(values);
#pragma unroll
  for (int j = 0; j < kVec; ++j) sum[j] = fmaf(weight, values[j], sum[j]);
}

template <typename T, int kVec>
__device__ inline void store_vector(char* row, uint32_t index, const float (&sum)[kVec],
                                    float scale) {
  Vector<T, kVec> out;
  out.pack(sum, scale);
  reinterpret_cast<typename Vector<T, kVec>::Raw*>(row)[index] = out.raw;
}

// Rows of a [n, h, d] tensor; strides in bytes.
struct Rows {
  char* data;
  int64_t token_stride;
  int64_t head_stride;

  __device__ char* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

// Elements of a [n, h] float32 tensor.
struct Scalars {
  float* data;
  int64_t token_stride;
  int64_t head_stride;

  __device__ float& at(int64_t token, int64_t head) const {
    return data[token * token_stride + head * head_stride];
  }
};

}  // namespace flashinfer_ops
