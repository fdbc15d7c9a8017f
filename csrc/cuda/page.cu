// Appending K and V rows to a paged KV cache, in one launch.
//
//   cache[kv_indices[kv_indptr[b] + p / page_size], p % page_size] = append[i]
//   with b = batch_indices[i], p = positions[i], for K and V alike
//
// append_key, append_value: [nnz, num_kv_heads, head_dim]; caches: [pages, page_size, num_kv_heads,
// head_dim] with any strides but a contiguous last dimension (HND comes as a permuted view). One
// thread copies one unit of a row of K and the same one of V: 16 bytes, or the largest power of two
// that all addresses and the row's length allow. Grid: ceil(nnz * num_kv_heads * units / 256)
// blocks of 256 threads. Rows with a negative batch index are padding and are skipped; so is, since
// the host does not wait to hear of it, a row whose sequence, position or page does not exist.
#include "common/cuda.h"

namespace flashinfer_ops {
namespace {

constexpr int kThreads = 256;

struct AppendParams {
  const char* from[2];  // K, V
  char* to[2];
  int64_t from_token[2], from_head[2];  // strides in bytes
  int64_t to_page[2], to_slot[2], to_head[2];
  const int32_t* batch_indices;
  const int32_t* positions;
  const int32_t* kv_indices;
  const int32_t* kv_indptr;
  int64_t num_indices;
  int64_t num_pages;
  int32_t batch_size;
  int64_t first_token;  // of this launch
  uint32_t num_items;   // of this launch
  Divisor units;        // of a row
  Divisor num_heads;
  Divisor page_size;
};

template <typename Unit>
__global__ __launch_bounds__(kThreads) void append_kernel(
    const __grid_constant__ AppendParams params) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= params.num_items) return;
  const uint32_t row = params.units.divide(item);
  const int64_t unit = item - row * params.units.divisor;
  const uint32_t token_here = params.num_heads.divide(row);
  const int64_t head = row - token_here * params.num_heads.divisor;
  const int64_t token = params.first_token + token_here;

  const int32_t batch = params.batch_indices[token];
  const int32_t position = params.positions[token];
  if (batch < 0 || batch >= params.batch_size || position < 0) return;
  const uint32_t page_rank = params.page_size.divide(position);
  const int64_t slot = position - page_rank * params.page_size.divisor;
  const int64_t begin = params.kv_indptr[batch];
  const int64_t at = begin + page_rank;
  if (begin < 0 || at >= params.kv_indptr[batch + 1] || at >= params.num_indices) return;
  const int64_t page = params.kv_indices[at];
  if (page < 0 || page >= params.num_pages) return;

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const char* from = params.from[i] + token * params.from_token[i] + head * params.from_head[i];
    char* to = params.to[i] + page * params.to_page[i] + slot * params.to_slot[i] +
               head * params.to_head[i];
    reinterpret_cast<Unit*>(to)[unit] = reinterpret_cast<const Unit*>(from)[unit];
  }
}

Tensor unit_stride_rows(const Tensor& t) {
  return t.size(2) <= 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t);
}

// append_paged_kv_cache_(Tensor append_key, Tensor append_value, Tensor batch_indices,
//   Tensor positions, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor kv_indices, Tensor kv_indptr)
//   -> ()
void append_paged_kv_cache_(const Tensor& append_key_in, const Tensor& append_value_in,
                            const Tensor& batch_indices, const Tensor& positions,
                            const Tensor& k_cache, const Tensor& v_cache, const Tensor& kv_indices,
                            const Tensor& kv_indptr) {
  STD_TORCH_CHECK(k_cache.dim() == 4, "k_cache has ", k_cache.dim(), " dimensions, expected 4");
  const int64_t num_pages = k_cache.size(0), page_size = k_cache.size(1),
                num_heads = k_cache.size(2), head_dim = k_cache.size(3);
  check_sizes(v_cache, {num_pages, page_size, num_heads, head_dim}, "v_cache");
  STD_TORCH_CHECK(page_size > 0, "k_cache has pages of no tokens");
  check_sizes(append_key_in, {-1, num_heads, head_dim}, "append_key");
  const int64_t nnz = append_key_in.size(0);
  check_sizes(append_value_in, {nnz, num_heads, head_dim}, "append_value");
  for (const Tensor* t : {&append_key_in, &append_value_in, &v_cache}) {
    check_dtype(*t, k_cache.scalar_type(), "append_key, append_value or v_cache");
  }
  check_last_dim_contiguous(k_cache, "k_cache");
  check_last_dim_contiguous(v_cache, "v_cache");
  check_writable(k_cache, "k_cache");
  check_writable(v_cache, "v_cache");
  check_index(batch_indices, "batch_indices");
  check_index(positions, "positions");
  check_index(kv_indices, "kv_indices");
  check_index(kv_indptr, "kv_indptr");
  check_sizes(batch_indices, {nnz}, "batch_indices");
  check_sizes(positions, {nnz}, "positions");
  check_same_device(k_cache, k_cache, "k_cache");
  check_same_device(v_cache, k_cache, "v_cache");
  check_same_device(append_key_in, k_cache, "append_key");
  check_same_device(append_value_in, k_cache, "append_value");
  check_same_device(batch_indices, k_cache, "batch_indices");
  check_same_device(positions, k_cache, "positions");
  check_same_device(kv_indices, k_cache, "kv_indices");
  check_same_device(kv_indptr, k_cache, "kv_indptr");

  const int64_t row_bytes = head_dim * static_cast<int64_t>(k_cache.element_size());
  if (nnz == 0 || num_heads == 0 || row_bytes == 0) return;
  const OnDevice device(k_cache);
  const Tensor sources[2] = {unit_stride_rows(append_key_in), unit_stride_rows(append_value_in)};
  const Tensor* const caches[2] = {&k_cache, &v_cache};

  const char* from[2];
  char* to[2];
  int64_t from_token[2], from_head[2], to_page[2], to_slot[2], to_head[2];
  int64_t bits = 16 | row_bytes;  // its lowest set bit divides every address and length
  for (int i = 0; i < 2; ++i) {
    from[i] = static_cast<const char*>(sources[i].data_ptr());
    to[i] = static_cast<char*>(caches[i]->data_ptr());
    from_token[i] = byte_stride(sources[i], 0);
    from_head[i] = byte_stride(sources[i], 1);
    to_page[i] = byte_stride(*caches[i], 0);
    to_slot[i] = byte_stride(*caches[i], 1);
    to_head[i] = byte_stride(*caches[i], 2);
    bits |= reinterpret_cast<int64_t>(from[i]) | reinterpret_cast<int64_t>(to[i]) | from_token[i] |
            from_head[i] | to_page[i] | to_slot[i] | to_head[i];
  }
  const int64_t unit_bytes = bits & -bits;
  const int64_t units = row_bytes / unit_bytes;
  const int64_t token_items = num_heads * units;
  STD_TORCH_CHECK(token_items <= kMaxLaunchItems && page_size <= kMaxLaunchItems,
                  "k_cache has tokens of ", num_heads, " x ", head_dim, " elements or pages of ",
                  page_size, " tokens, more than a launch can count");

  const int64_t tokens_a_launch = kMaxLaunchItems / token_items;
  for (int64_t first = 0; first < nnz; first += tokens_a_launch) {
    const int64_t items = std::min(nnz - first, tokens_a_launch) * token_items;
    const AppendParams params{{from[0], from[1]},
                              {to[0], to[1]},
                              {from_token[0], from_token[1]},
                              {from_head[0], from_head[1]},
                              {to_page[0], to_page[1]},
                              {to_slot[0], to_slot[1]},
                              {to_head[0], to_head[1]},
                              static_cast<const int32_t*>(batch_indices.data_ptr()),
                              static_cast<const int32_t*>(positions.data_ptr()),
                              static_cast<const int32_t*>(kv_indices.data_ptr()),
                              static_cast<const int32_t*>(kv_indptr.data_ptr()),
                              kv_indices.size(0),
                              num_pages,
                              static_cast<int32_t>(std::max<int64_t>(0, kv_indptr.size(0) - 1)),
                              first,
                              static_cast<uint32_t>(items),
                              Divisor(static_cast<uint32_t>(units)),
                              Divisor(static_cast<uint32_t>(num_heads)),
                              Divisor(static_cast<uint32_t>(page_size))};
    const auto launch = [&](auto kernel) {
      kernel<<<static_cast<unsigned>((items + kThreads - 1) / kThreads), kThreads, 0,
               device.stream()>>>(params);
      check_launch("append_paged_kv_cache_");
    };
    switch (unit_bytes) {
      case 16:
        launch(append_kernel<uint4>);
        break;
      case 8:
        launch(append_kernel<uint64_t>);
        break;
      case 4:
        launch(append_kernel<uint32_t>);
        break;
      case 2:
        launch(append_kernel<uint16_t>);
        break;
      default:
        launch(append_kernel<uint8_t>);
    }
  }
}

}  // namespace
}  // namespace flashinfer_ops

STABLE_TORCH_LIBRARY_IMPL(flashinfer_ops, CUDA, m) {
  m.impl("append_paged_kv_cache_", TORCH_BOX(&flashinfer_ops::append_paged_kv_cache_));
}
