// Cascade attention on Hopper, over the schedule that the planner lays out (schedule.h).
//
//   s = q k^T * sm_scale * log2(e),  o = v_scale * sum 2^(s - m) v / sum 2^(s - m),
//   lse = m + log2(sum 2^(s - m)), over the KV of all levels that a row sees
//
// q, out: [tokens, num_qo_heads, head_dim], float16 or bfloat16, head_dim 64, 128 or 256;
// k_cache, v_cache: [pages, page_size, num_kv_heads, head_dim], any strides of whole 16 bytes;
// lse: [tokens, num_qo_heads] float32. A row that sees no KV gets o = 0, lse = -inf.
//
// Two kernels, whatever the batch: the units (attention_sm90.h) and the merge of partial states
// (attention_merge_sm90.h), chained by programmatic dependent launch. What these kernels do not
// serve (other dtypes, head dims, alignments, devices) goes to the portable operator.
#include <cudaTypedefs.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "cuda/attention_consume_sm90.h"
#include "cuda/attention_merge_sm90.h"
#include "cuda/attention_produce_sm90.h"

namespace flashinfer_ops::sm90 {
namespace {

// The warps share the barriers out. They take a barrier each at a time: threads of one warp would
// take theirs in turns, which for all barriers took a microsecond.
template <int kHeadDim>
__device__ __forceinline__ void init_barriers(Shared<kHeadDim>& shared, int warp) {
  constexpr int kStages = Shape<kHeadDim>::kStages, kCount = Shared<kHeadDim>::kBarriers;
  const uint32_t barriers = shared_address(shared.entry_full);
#pragma unroll
  for (int first = 0; first < kCount; first += kThreads / 32) {
    const int i = first + warp;
    // Lanes of a producer warp arrive where something is full, one of them with bulk copies too.
    const int arrivals = i < kStages       ? 32
                         : i < 3 * kStages ? 1 + 32
                         : i < 5 * kStages ? kConsumers * kWarpgroup
                                           : 32 * Shape<kHeadDim>::kFirstWarps;
    if (i < kCount && elect_lane()) barrier_init(barriers + 8 * i, arrivals);
  }
  fence_barrier_init();
}

template <class T, int kHeadDim, bool kBulk>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(const __grid_constant__ Params params) {
  extern __shared__ char memory[];
  // The matrix unit's tiles begin at multiples of 1024 bytes.
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(memory + (-shared_address(memory) & 1023));
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  init_barriers(shared, warp);
  if (kBulk && threadIdx.x == kThreads - 1) {
    prefetch_tensor_map(&params.k_map);
    prefetch_tensor_map(&params.v_map);
  }
  __syncthreads();
  if (warp < kWarpgroup / 32) {
    give_up_registers<Shape<kHeadDim>::kProducerRegisters>();
    wait_for_earlier_kernels();
    let_next_kernel_start();
    if (warp < Shape<kHeadDim>::kProducerWarps) {
      Producer<kHeadDim, kBulk>(params, shared, warp, threadIdx.x % 32).run();
    }
  } else {
    take_registers<Shape<kHeadDim>::kConsumerRegisters>();
    wait_for_earlier_kernels();
    Consumer<T, kHeadDim, kBulk>(params, shared, warp / 4 - 1, threadIdx.x % kWarpgroup).run();
  }
}

// A launch that may begin before the kernels ahead of it end: it waits for them itself.
template <class Kernel>
void launch(Kernel kernel, dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
            const Params& params) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const auto config = launch_config(grid, threads, shared_bytes, stream, &attribute);
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), "cascade_attention");
}

constexpr int kMergeCtas = 64;  // an SM, at most
constexpr int64_t kMaxGridY = 65535;

template <class T, int kHeadDim>
constexpr int kSharedBytes = sizeof(Shared<kHeadDim>) + 1024;

template <class T, int kHeadDim>
void run(const Params& params, int sms, cudaStream_t stream) {
  static_assert(kSharedBytes<T, kHeadDim> <= 227 * 1024);
  const auto kernel = params.has_tensor_maps ? attention_kernel<T, kHeadDim, true>
                                             : attention_kernel<T, kHeadDim, false>;
  launch(kernel, dim3(sms), kThreads, kSharedBytes<T, kHeadDim>, stream, params);
  const auto merge = [&](auto shape) {
    using M = decltype(shape);
    const int y = (params.num_qo_heads + M::kHeadsAtOnce - 1) / M::kHeadsAtOnce;
    const int x = std::clamp(sms * kMergeCtas / y, 1, params.num_rows);
    launch(merge_kernel<T, kHeadDim, M>, dim3(x, y), M::kThreads, 0, stream, params);
  };
  // The bounds are the fastest of some tried. A warp has no room for the states of several large
  // heads.
  constexpr int kHeads = kHeadDim <= 128 ? 4 : 1;
  const int64_t rows = int64_t{params.num_rows} * params.num_qo_heads;
  if (rows <= sms * 4) {
    merge(MergeShape<8, 1, 8>{});
  } else if (rows <= sms * 12) {
    merge(MergeShape<4, 1, 4>{});
  } else if (rows <= sms * 32) {
    merge(MergeShape<1, 1, 8>{});
  } else {
    merge(MergeShape<1, kHeads, 4>{});
  }
}

// f(T{}, head_dim as a constant) for what there is a kernel for; false for the rest.
template <class F>
bool dispatch(ScalarType dtype, int64_t head_dim, F f) {
  const auto by_dim = [&](auto element) {
    if (head_dim == 64) return f(element, std::integral_constant<int, 64>{}), true;
    if (head_dim == 128) return f(element, std::integral_constant<int, 128>{}), true;
    if (head_dim == 256) return f(element, std::integral_constant<int, 256>{}), true;
    return false;
  };
  if (dtype == ScalarType::Half) return by_dim(__half{});
  if (dtype == ScalarType::BFloat16) return by_dim(__nv_bfloat16{});
  return false;
}

// The number of CTAs for a device that runs these kernels, 0 of any other; asked for, and the
// kernels made ready there, once.
int hopper_sms(int device) {
  constexpr int kDevices = 64;
  static std::array<std::atomic<int>, kDevices> cached{};  // the number + 1
  const bool known = device >= 0 && device < kDevices;
  if (known && cached[device].load() > 0) return cached[device].load() - 1;
  int sms = 0;
  if (is_hopper(device)) {
    sms = std::min(device_attribute(cudaDevAttrMultiProcessorCount, device), gpu::kMaxCtas);
    for (const ScalarType dtype : {ScalarType::Half, ScalarType::BFloat16}) {
      for (const int64_t head_dim : {64, 128, 256}) {
        dispatch(dtype, head_dim, [](auto element, auto dim) {
          using T = decltype(element);
          for (const auto kernel :
               {attention_kernel<T, dim(), false>, attention_kernel<T, dim(), true>}) {
            check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            kSharedBytes<T, dim()>),
                       "cudaFuncSetAttribute");
          }
        });
      }
    }
  }
  if (known) cached[device].store(sms + 1);
  return sms;
}

// The driver's encoder of tensor maps, found at run time: the library links no driver.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(usable ? function : nullptr);
  }();
  return encoder;
}

// [pages, page_size, heads, head_dim] in boxes of kRun slots of a head, as they lie in a stage:
//
//   64 elements | 8 slots | the head's other elements | the next 8 slots | a page's head
//
// where pages lie a whole number of heads apart, `heads`. A box may begin at any slot: what is
// behind the first 8 is a dimension of its own, of which it takes all. False where the tensor is
// not of a shape for that.
bool encode_cache(const Tensor& cache, CUtensorMap& map, int32_t& heads) {
  const auto encode = tensor_map_encoder();
  const int64_t pages = cache.size(0), page_size = cache.size(1), head_dim = cache.size(3);
  if (encode == nullptr || page_size < kRun) return false;
  const int64_t slot = byte_stride(cache, 1), page = pages > 1 ? byte_stride(cache, 0) : 0;
  // The stride of a dimension of size 1 is never used, but must be a valid one.
  const int64_t head = cache.size(2) > 1 ? byte_stride(cache, 2) : page > 0 ? page : head_dim * 2;
  constexpr int64_t kMostBytes = int64_t{1} << 40, kMostHeads = INT32_MAX;
  for (const int64_t stride : {8 * slot, head}) {
    if (stride <= 0 || stride >= kMostBytes) return false;
  }
  if (page < 0 || page % head != 0) return false;
  const int64_t all_heads = (pages - 1) * (page / head) + cache.size(2);
  if (all_heads > kMostHeads) return false;
  heads = static_cast<int32_t>(page / head);
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t sizes[] = {64, size(page_size), size(head_dim / 64), 2, size(all_heads)};
  const cuuint64_t strides[] = {size(slot), 128, size(8 * slot), size(head)};
  const cuuint32_t box[] = {64, 8, static_cast<cuuint32_t>(head_dim / 64), kRun / 8, 1};
  const cuuint32_t step[] = {1, 1, 1, 1, 1};
  const auto dtype = cache.scalar_type() == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode(&map, dtype, 5, cache.data_ptr(), sizes, strides, box, step,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Strides of tokens and heads times `scale`; false where they are too large.
bool row_strides(const Tensor& t, int64_t scale, int64_t group_size, Strides& strides) {
  constexpr int64_t kMost = INT32_MAX;
  const auto stride = [&](int64_t dim) { return t.size(dim) > 1 ? t.stride(dim) * scale : 0; };
  const int64_t token = stride(0), head = stride(1);
  if (token > kMost || head > kMost / group_size) return false;
  strides = {static_cast<int32_t>(token), static_cast<int32_t>(head),
             static_cast<int32_t>(token - group_size * head)};
  return true;
}

// Rows are read and written 16 bytes at a time.
bool aligned(const Tensor& t) {
  int64_t bits = reinterpret_cast<int64_t>(t.data_ptr());
  for (int64_t dim = 0; dim + 1 < t.dim(); ++dim) bits |= byte_stride(t, dim);
  return bits % 16 == 0;
}

void portable(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
              const std::vector<Tensor>& qo_indptr, const std::vector<Tensor>& kv_indptr,
              const std::vector<Tensor>& kv_indices, const std::vector<Tensor>& kv_last_page_len,
              const Tensor& schedule, bool causal, double sm_scale, double v_scale,
              const Tensor& out, const Tensor& lse) {
  using torch::stable::detail::from;
  std::array<StableIValue, 13> stack{
      from(q),         from(k_cache),    from(v_cache),          from(qo_indptr),
      from(kv_indptr), from(kv_indices), from(kv_last_page_len), from(schedule),
      from(causal),    from(sm_scale),   from(v_scale),          from(out),
      from(lse)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("flashinfer_ops::cascade_attention", "portable",
                                               stack.data(), TORCH_ABI_VERSION));
}

// cascade_attention.out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor[] qo_indptr,
//   Tensor[] kv_indptr, Tensor[] kv_indices, Tensor[] kv_last_page_len, Tensor schedule,
//   bool causal, float sm_scale, float v_scale, Tensor(a!) out, Tensor(b!) lse) -> ()
void cascade_attention_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                           const std::vector<Tensor>& qo_indptr,
                           const std::vector<Tensor>& kv_indptr,
                           const std::vector<Tensor>& kv_indices,
                           const std::vector<Tensor>& kv_last_page_len, const Tensor& schedule,
                           bool causal, double sm_scale, double v_scale, const Tensor& out,
                           const Tensor& lse) {
  STD_TORCH_CHECK(q.dim() == 3, "q has ", q.dim(), " dimensions, expected 3");
  check_sizes(k_cache, {-1, -1, -1, q.size(2)}, "k_cache");
  check_sizes(v_cache, {k_cache.size(0), k_cache.size(1), k_cache.size(2), q.size(2)}, "v_cache");
  check_sizes(out, {q.size(0), q.size(1), q.size(2)}, "out");
  check_sizes(lse, {q.size(0), q.size(1)}, "lse");
  check_dtype(k_cache, q.scalar_type(), "k_cache");
  check_dtype(v_cache, q.scalar_type(), "v_cache");
  check_dtype(out, q.scalar_type(), "out");
  check_dtype(lse, ScalarType::Float, "lse");
  for (const auto& [tensor, name] :
       {std::pair{&q, "q"}, {&k_cache, "k_cache"}, {&v_cache, "v_cache"}, {&out, "out"}}) {
    check_last_dim_contiguous(*tensor, name);
    check_same_device(*tensor, schedule, name);
  }
  check_writable(out, "out");
  check_writable(lse, "lse");
  check_same_device(lse, schedule, "lse");
  check_index(schedule, "schedule");
  const size_t levels = kv_indptr.size();
  STD_TORCH_CHECK(levels > 0 && levels <= kMaxLevels && kv_indices.size() == levels,
                  "kv_indptr and kv_indices have ", levels, " and ", kv_indices.size(),
                  " levels, expected as many, 1 to ", kMaxLevels);
  const int64_t num_rows = q.size(0), num_qo_heads = q.size(1), num_kv_heads = k_cache.size(2);
  STD_TORCH_CHECK(num_kv_heads > 0 && num_qo_heads % num_kv_heads == 0, "q has ", num_qo_heads,
                  " heads, expected a multiple of k_cache's ", num_kv_heads);
  if (num_rows == 0 || num_qo_heads == 0) return;
  Params params{};
  int64_t num_groups[kMaxLevels];
  for (size_t l = 0; l < levels; ++l) {
    check_index(kv_indices[l], "kv_indices");
    check_same_device(kv_indices[l], schedule, "kv_indices");
    params.kv_indices[l] = static_cast<const int32_t*>(kv_indices[l].data_ptr());
    num_groups[l] = kv_indptr[l].size(0) - 1;
  }
  const gpu::Layout layout(num_groups, static_cast<int64_t>(levels));
  check_sizes(schedule, {layout.words}, "schedule");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(schedule.data_ptr()) % 16 == 0,
                  "schedule begins at an address that is no multiple of 16");

  const OnDevice on(q);  // the kernels are made ready on the current device
  const int sms = hopper_sms(q.get_device_index());
  const int64_t head_dim = q.size(2), num_pages = k_cache.size(0), page_size = k_cache.size(1);
  constexpr int64_t kMost = 1 << 30;
  const int64_t group_size = num_qo_heads / num_kv_heads, itemsize = 2;
  const bool served = sms > 0 && dispatch(q.scalar_type(), head_dim, [](auto, auto) {}) &&
                      aligned(q) && aligned(k_cache) && aligned(v_cache) && aligned(out) &&
                      sm_scale > 1e-37 && sm_scale < 1e30 && num_pages > 0 && page_size > 0 &&
                      num_pages < kMost && page_size < kMost && num_rows < kMost &&
                      num_qo_heads <= kMaxGridY && layout.words < kMost &&
                      row_strides(q, itemsize, group_size, params.q_stride) &&
                      row_strides(out, itemsize, group_size, params.out_stride) &&
                      row_strides(lse, 1, group_size, params.lse_stride);
  if (!served) {
    portable(q, k_cache, v_cache, qo_indptr, kv_indptr, kv_indices, kv_last_page_len, schedule,
             causal, sm_scale, v_scale, out, lse);
    return;
  }
  const int64_t states = layout.partial_rows * num_qo_heads, row_bytes = head_dim * 2;
  const Tensor scratch =
      empty_cuda<1>(q, {states * (row_bytes + int64_t{sizeof(float)})}, ScalarType::Byte);
  const auto cache_strides = [](const Tensor& t) {
    return CacheStrides{byte_stride(t, 0), byte_stride(t, 1), byte_stride(t, 2)};
  };
  params.q = static_cast<const char*>(q.data_ptr());
  params.k_cache = static_cast<const char*>(k_cache.data_ptr());
  params.v_cache = static_cast<const char*>(v_cache.data_ptr());
  params.out = static_cast<char*>(out.data_ptr());
  params.lse = static_cast<float*>(lse.data_ptr());
  params.partial_o = static_cast<char*>(scratch.data_ptr());
  params.partial_lse = reinterpret_cast<float*>(params.partial_o + states * row_bytes);
  params.schedule = static_cast<const int32_t*>(schedule.data_ptr());
  params.k_stride = cache_strides(k_cache);
  params.v_stride = cache_strides(v_cache);
  params.num_rows = static_cast<int32_t>(num_rows);
  params.num_pages = static_cast<int32_t>(num_pages);
  params.num_qo_heads = static_cast<int32_t>(num_qo_heads);
  params.group_size = Divisor(static_cast<uint32_t>(group_size));
  params.page_size = Divisor(static_cast<uint32_t>(page_size));
  params.kv_heads = Divisor(static_cast<uint32_t>(num_kv_heads));
  params.matrix_at = static_cast<int32_t>(layout.matrix_at);
  params.stream_at = static_cast<int32_t>(layout.stream_at);
  params.segment_at = static_cast<int32_t>(layout.segment_at);
  params.tile_at = static_cast<int32_t>(layout.tile_at);
  params.own_at = static_cast<int32_t>(layout.own_at);
  params.has_tensor_maps = encode_cache(k_cache, params.k_map, params.k_heads) &&
                           encode_cache(v_cache, params.v_map, params.v_heads);
  params.even_pages = page_size % kRun == 0;
  params.scale_log2 = static_cast<float>(sm_scale * 1.4426950408889634);
  params.v_scale = static_cast<float>(v_scale);
  dispatch(q.scalar_type(), head_dim, [&](auto element, auto dim) {
    run<decltype(element), dim()>(params, sms, on.stream());
  });
}

// cascade_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor[] qo_indptr,
//   Tensor[] kv_indptr, Tensor[] kv_indices, Tensor[] kv_last_page_len, Tensor schedule,
//   bool causal, float sm_scale, float v_scale) -> (Tensor out, Tensor lse)
std::tuple<Tensor, Tensor> cascade_attention(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
    const std::vector<Tensor>& qo_indptr, const std::vector<Tensor>& kv_indptr,
    const std::vector<Tensor>& kv_indices, const std::vector<Tensor>& kv_last_page_len,
    const Tensor& schedule, bool causal, double sm_scale, double v_scale) {
  STD_TORCH_CHECK(q.dim() == 3, "q has ", q.dim(), " dimensions, expected 3");
  Tensor out = empty_cuda<3>(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor lse = empty_cuda<2>(q, {q.size(0), q.size(1)}, ScalarType::Float);
  cascade_attention_out(q, k_cache, v_cache, qo_indptr, kv_indptr, kv_indices, kv_last_page_len,
                        schedule, causal, sm_scale, v_scale, out, lse);
  return {out, lse};
}

}  // namespace
}  // namespace flashinfer_ops::sm90

STABLE_TORCH_LIBRARY_IMPL(flashinfer_ops, CUDA, m) {
  m.impl("cascade_attention", TORCH_BOX(&flashinfer_ops::sm90::cascade_attention));
  m.impl("cascade_attention.out", TORCH_BOX(&flashinfer_ops::sm90::cascade_attention_out));
}
