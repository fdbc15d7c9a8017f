// What every operator's C++ file needs of PyTorch's stable ABI: short names, checks of what memory
// safety rests on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

namespace flashinfer_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has dtype ", toString(t.scalar_type()),
                  ", expected ", toString(dtype));
}

// `t` has just these sizes; -1 stands for any.
inline void check_sizes(const Tensor& t, std::initializer_list<int64_t> sizes, const char* name) {
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(sizes.size()), name, " has ", t.dim(),
                  " dimensions, expected ", sizes.size());
  int64_t dim = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(size < 0 || t.size(dim) == size, name, " has size ", t.size(dim), " in dim ",
                    dim, ", expected ", size);
    ++dim;
  }
}

inline void check_last_dim_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, name,
                  " must be contiguous in its last dimension, its stride there is ",
                  t.stride(t.dim() - 1));
}

// An expanded tensor cannot be written: threads would race for its elements.
inline void check_writable(const Tensor& t, const char* name) {
  for (int64_t dim = 0; dim < t.dim(); ++dim) {
    STD_TORCH_CHECK(t.size(dim) <= 1 || t.stride(dim) != 0, name,
                    " is written, but its elements in dim ", dim, " share one place in memory");
  }
}

// An int32 index array: one-dimensional and contiguous.
inline void check_index(const Tensor& t, const char* name) {
  check_dtype(t, ScalarType::Int, name);
  STD_TORCH_CHECK(t.dim() == 1, name, " has ", t.dim(), " dimensions, expected 1");
  check_last_dim_contiguous(t, name);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::vector<int64_t> shape(sizes);
  return torch::stable::new_empty(like, shape, dtype);
}

}  // namespace flashinfer_ops
