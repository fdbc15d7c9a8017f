// Appending K and V rows to a paged KV cache.
//
//   cache[kv_indices[kv_indptr[b] + p / page_size], p % page_size] = append[i]
//   with b = batch_indices[i], p = positions[i], for K and V alike
//
// append_key, append_value: [nnz, num_kv_heads, head_dim]; caches: [pages, page_size, num_kv_heads,
// head_dim] with any strides but a contiguous last dimension (HND comes as a permuted view). Rows
// with a negative batch index are padding and are skipped. All targets are checked before the first
// row is written, so a bad index leaves the cache as it was.
#include <algorithm>
#include <cstring>

#include "common/stable.h"

namespace flashinfer_ops {
namespace {

constexpr int64_t kGrainBytes = 65536;

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

  const auto* batch = static_cast<const int32_t*>(batch_indices.data_ptr());
  const auto* position = static_cast<const int32_t*>(positions.data_ptr());
  const auto* page_of = static_cast<const int32_t*>(kv_indices.data_ptr());
  const auto* indptr = static_cast<const int32_t*>(kv_indptr.data_ptr());
  const int64_t batch_size = std::max<int64_t>(0, kv_indptr.size(0) - 1);

  struct Target {
    int64_t page;  // -1: padding
    int64_t slot;
  };
  std::vector<Target> targets(nnz);
  for (int64_t i = 0; i < nnz; ++i) {
    if (batch[i] < 0) {
      targets[i] = {-1, 0};
      continue;
    }
    STD_TORCH_CHECK(batch[i] < batch_size, "batch_indices[", i, "] is ", batch[i],
                    ", expected below ", batch_size);
    const int64_t begin = indptr[batch[i]], end = indptr[batch[i] + 1];
    const int64_t at = begin + position[i] / page_size;
    STD_TORCH_CHECK(position[i] >= 0 && begin >= 0 && at < end && at < kv_indices.size(0),
                    "positions[", i, "] is ", position[i], ", outside of the ",
                    (end - begin) * page_size, " slots of sequence ", batch[i]);
    STD_TORCH_CHECK(page_of[at] >= 0 && page_of[at] < num_pages, "kv_indices[", at, "] is ",
                    page_of[at], ", outside of the cache's ", num_pages, " pages");
    targets[i] = {page_of[at], position[i] % page_size};
  }

  const int64_t row_bytes = head_dim * k_cache.element_size();
  const auto write = [&](const Tensor& source_in, const Tensor& cache) {
    const Tensor source = head_dim <= 1 || source_in.stride(2) == 1
                              ? source_in
                              : torch::stable::contiguous(source_in);
    const int64_t item = cache.element_size();
    const auto* from = static_cast<const char*>(source.data_ptr());
    auto* to = static_cast<char*>(cache.data_ptr());
    const int64_t from_token = source.stride(0) * item, from_head = source.stride(1) * item;
    const int64_t to_page = cache.stride(0) * item, to_slot = cache.stride(1) * item,
                  to_head = cache.stride(2) * item;
    const int64_t grain =
        std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, num_heads * row_bytes));
    torch::stable::parallel_for(0, nnz, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (targets[i].page < 0) continue;
        const char* src = from + i * from_token;
        char* dst = to + targets[i].page * to_page + targets[i].slot * to_slot;
        for (int64_t head = 0; head < num_heads; ++head) {
          std::memcpy(dst + head * to_head, src + head * from_head, row_bytes);
        }
      }
    });
  };
  write(append_key_in, k_cache);
  write(append_value_in, v_cache);
}

}  // namespace
}  // namespace flashinfer_ops

STABLE_TORCH_LIBRARY_IMPL(flashinfer_ops, CPU, m) {
  m.impl("append_paged_kv_cache_", TORCH_BOX(&flashinfer_ops::append_paged_kv_cache_));
}
