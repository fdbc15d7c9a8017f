// What every operator's CUDA file needs besides stable.h: the device and stream of a call, the
// check of a launch, outputs allocated without a detour, and index arithmetic of kernels.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>

#include "common/stable.h"

namespace flashinfer_ops {

// torch's own macro for this needs symbols that a CPU-only libtorch lacks at link time.
inline void check_cuda(cudaError_t error, const char* what) {
  // The runtime keeps it, and whoever asks next would take it for his own.
  if (error != cudaSuccess) cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

// A launch of what `attribute` says, which must outlive it.
inline cudaLaunchConfig_t launch_config(dim3 grid, int threads, int shared_bytes,
                                        cudaStream_t stream, cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}

inline int device_attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

// Whether Hopper's own kernels run there: what is compiled for sm_90a runs on 9.0 and nothing else.
// The planner and attention must agree on it.
inline bool is_hopper(int device) {
  return device_attribute(cudaDevAttrComputeCapabilityMajor, device) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor, device) == 0;
}

// Makes `like`'s device current for the scope, and holds its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& like) : guard_(like.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// The dispatcher lets a CPU tensor stand beside CUDA ones; a kernel cannot read it.
inline void check_same_device(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                  " must be on the device of the others, cuda:", like.get_device_index());
}

// A contiguous tensor on `like`'s device, straight from the C shim: `empty` in stable.h looks its
// operator up by name on every call.
template <size_t N>
Tensor empty_cuda(const Tensor& like, const std::array<int64_t, N>& sizes, ScalarType dtype) {
  std::array<int64_t, N> strides;
  int64_t stride = 1;
  for (size_t dim = N; dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(1, sizes[dim]);
  }
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(N, sizes.data(), strides.data(), shim_dtype,
                                                  aoti_torch_device_type_cuda(),
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

// A stride in bytes; that of a dimension of size 1 is never used and must not spoil alignment.
inline int64_t byte_stride(const Tensor& t, int64_t dim) {
  return t.size(dim) <= 1 ? 0 : t.stride(dim) * static_cast<int64_t>(t.element_size());
}

// n / divisor for n < 2^31 by a multiplication and a shift.
struct Divisor {
  uint32_t divisor;
  uint32_t magic;
  uint32_t shift = 0;

  explicit Divisor(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    magic = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }

#ifdef __CUDACC__
  __device__ uint32_t divide(uint32_t n) const { return (__umulhi(n, magic) + n) >> shift; }
#endif
};

// Rows or items that one launch may count, so that 32-bit indices and `Divisor` serve.
constexpr int64_t kMaxLaunchItems = (int64_t{1} << 31) - 1;

}  // namespace flashinfer_ops
