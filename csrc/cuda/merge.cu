// Merging attention states: (v, s) with a base-2 log-sum-exp s, or (o, m, d) with s = m + log2(d).
//
//   s = log2(sum_k 2^s_k)            v = sum_k 2^(s_k - s) v_k
//   m = max_k m_k                    d = sum_k d_k 2^(m_k - m)
//                                    o = sum_k d_k 2^(m_k - m) o_k / d
//
// v, o: [n, h, d] of float32, float16 or bfloat16, any strides; s, m, d: [n, h], computed in
// float32. An empty state (s = -inf; d = 0 or m = -inf) has weight zero and is the exact identity:
// what its v holds, NaN included, never enters. All states empty: v = 0, s = -inf (m = -inf,
// d = 0). One row is one (token, head) pair; merge_kernel.h has the kernels and their grids.
#include "cuda/merge_kernel.h"

namespace flashinfer_ops {
namespace {

// Threads that fill the GPU: below, the states of a row are split over more of them.
constexpr int64_t kFullThreads = 128 * 1024;
// A list's addresses fit the smaller capacity as a rule; the larger one fills most of the 32764
// bytes that a kernel's parameters may take.
constexpr int kShortList = 32;
constexpr int kLongList = 512;

Tensor as_float32(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

// The kernels read rows of unit stride; inputs with another one are copied.
Tensor unit_stride_rows(const Tensor& v) {
  const int64_t last = v.dim() - 1;
  return v.size(last) <= 1 || v.stride(last) == 1 ? v : torch::stable::contiguous(v);
}

// Tokens and heads stand in dimension 0 and `head_dim`.
Rows rows_of(const Tensor& t, int64_t head_dim = 1) {
  return {static_cast<char*>(t.data_ptr()), byte_stride(t, 0), byte_stride(t, head_dim)};
}

Scalars scalars_of(const Tensor& t, int64_t head_dim = 1) {
  return {static_cast<float*>(t.data_ptr()), t.stride(0), t.stride(head_dim)};
}

void check_state(const Tensor& v, const Tensor& like,
                 std::initializer_list<const Tensor*> scalars) {
  STD_TORCH_CHECK(like.dim() == 3, "a state's output has ", like.dim(), " dimensions, expected 3");
  check_sizes(v, {like.size(0), like.size(1), like.size(2)}, "a state's output");
  check_dtype(v, like.scalar_type(), "a state's output");
  check_same_device(v, like, "a state's output");
  for (const Tensor* t : scalars) {
    check_sizes(*t, {like.size(0), like.size(1)}, "a state's lse");
    check_same_device(*t, like, "a state's lse");
  }
}

// Whether addresses, strides and the length of rows allow 16-byte vectors.
class Alignment {
 public:
  explicit Alignment(int64_t row_bytes) : bits_(row_bytes) {}

  void add(const Rows& rows, int64_t state_stride = 0) {
    bits_ |=
        reinterpret_cast<int64_t>(rows.data) | rows.token_stride | rows.head_stride | state_stride;
  }

  bool vectors() const { return bits_ % 16 == 0; }

 private:
  int64_t bits_;
};

template <typename T>
struct Element {
  using type = T;
};

template <int kVec>
struct VectorLength {
  static constexpr int value = kVec;
};

// f(Element<T>, VectorLength<kVec>) for the dtype of v.
template <typename F>
void with_vectors(const Tensor& v, const char* name, bool vectors, const F& f) {
  const auto with = [&](auto element) {
    if (vectors) {
      f(element, VectorLength<16 / sizeof(typename decltype(element)::type)>());
    } else {
      f(element, VectorLength<1>());
    }
  };
  switch (v.scalar_type()) {
    case ScalarType::Float:
      return with(Element<float>());
    case ScalarType::Half:
      return with(Element<__half>());
    case ScalarType::BFloat16:
      return with(Element<__nv_bfloat16>());
    default:
      STD_TORCH_CHECK(false, name, " has dtype ", toString(v.scalar_type()),
                      ", expected float32, float16 or bfloat16");
  }
}

// launch(layout, blocks) for all n * h rows, in as few launches as 32-bit row numbers allow.
// `num_states` is what a row has on average.
template <typename F>
void for_each_launch(int64_t n, int64_t h, int64_t num_vectors, int64_t rows_a_thread,
                     int64_t num_states, const F& launch) {
  if (n == 0 || h == 0) return;
  STD_TORCH_CHECK(h <= kMaxLaunchItems && num_vectors <= kMaxLaunchItems, "a state's output has ",
                  h, " heads, in rows of ", num_vectors, ", more than a launch can count");
  int lanes_log2 = 0, slots_log2 = 0;
  while (lanes_log2 < 5 && (1 << lanes_log2) < num_vectors) ++lanes_log2;
  while ((kThreads >> (lanes_log2 + slots_log2)) > 1 &&
         (kStatesInFlight << slots_log2) < num_states &&
         ((n * h) << (lanes_log2 + slots_log2)) < kFullThreads) {
    ++slots_log2;
  }
  const int64_t rows_a_block = (kThreads >> (lanes_log2 + slots_log2)) * rows_a_thread;
  const int64_t tokens_a_launch = kMaxLaunchItems / h;
  for (int64_t first = 0; first < n; first += tokens_a_launch) {
    const int64_t rows = std::min(n - first, tokens_a_launch) * h;
    const Layout layout{first,
                        static_cast<uint32_t>(rows),
                        Divisor(static_cast<uint32_t>(h)),
                        static_cast<uint32_t>(num_vectors),
                        lanes_log2,
                        slots_log2};
    launch(layout, static_cast<unsigned>((rows + rows_a_block - 1) / rows_a_block));
  }
}

template <typename Pair>
void merge_pair(const Tensor& v_a, const Tensor& v_b, const Tensor& v_out, const Pair& scalars,
                const std::optional<Tensor>& mask, cudaStream_t stream) {
  const int64_t n = v_a.size(0), h = v_a.size(1), dim = v_a.size(2);
  const Rows a = rows_of(v_a), b = rows_of(v_b), out = rows_of(v_out);
  Alignment alignment(dim * static_cast<int64_t>(v_a.element_size()));
  alignment.add(a);
  alignment.add(b);
  alignment.add(out);
  const auto* mask_data =
      mask.has_value() ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  const int64_t mask_stride = mask.has_value() ? mask->stride(0) : 0;
  with_vectors(v_a, "v_a", alignment.vectors(), [&](auto element, auto length) {
    using T = typename decltype(element)::type;
    constexpr int kVec = decltype(length)::value;
    for_each_launch(n, h, dim / kVec, kRowsAThread, 2, [&](const Layout& layout, unsigned blocks) {
      merge_pair_kernel<T, kVec, Pair>
          <<<blocks, kThreads, 0, stream>>>({a, b, out, scalars, mask_data, mask_stride, layout});
      check_launch("merge_state");
    });
  });
}

// Which tokens an in-place merge touches: those whose mask byte is not zero.
void check_mask(const std::optional<Tensor>& mask, const Tensor& v) {
  if (!mask.has_value()) return;
  STD_TORCH_CHECK(
      mask->scalar_type() == ScalarType::Bool || mask->scalar_type() == ScalarType::Byte,
      "mask has dtype ", toString(mask->scalar_type()), ", expected bool or uint8");
  check_sizes(*mask, {v.size(0)}, "mask");
  check_same_device(*mask, v, "mask");
}

// merge_state(Tensor v_a, Tensor s_a, Tensor v_b, Tensor s_b) -> (Tensor v, Tensor s)
std::tuple<Tensor, Tensor> merge_state(const Tensor& v_a_in, const Tensor& s_a_in,
                                       const Tensor& v_b_in, const Tensor& s_b_in) {
  check_state(v_a_in, v_a_in, {&s_a_in});
  check_state(v_b_in, v_a_in, {&s_b_in});
  const OnDevice device(v_a_in);
  const int64_t n = v_a_in.size(0), h = v_a_in.size(1), dim = v_a_in.size(2);
  Tensor v = empty_cuda<3>(v_a_in, {n, h, dim}, v_a_in.scalar_type());
  Tensor s = empty_cuda<2>(v_a_in, {n, h}, ScalarType::Float);
  const Tensor v_a = unit_stride_rows(v_a_in), v_b = unit_stride_rows(v_b_in);
  const Tensor s_a = as_float32(s_a_in), s_b = as_float32(s_b_in);
  merge_pair(v_a, v_b, v, LsePair{scalars_of(s_a), scalars_of(s_b), scalars_of(s)}, std::nullopt,
             device.stream());
  return {v, s};
}

// merge_state.omd(Tensor o_a, Tensor m_a, Tensor d_a, Tensor o_b, Tensor m_b, Tensor d_b)
//   -> (Tensor o, Tensor m, Tensor d)
std::tuple<Tensor, Tensor, Tensor> merge_state_omd(const Tensor& o_a_in, const Tensor& m_a_in,
                                                   const Tensor& d_a_in, const Tensor& o_b_in,
                                                   const Tensor& m_b_in, const Tensor& d_b_in) {
  check_state(o_a_in, o_a_in, {&m_a_in, &d_a_in});
  check_state(o_b_in, o_a_in, {&m_b_in, &d_b_in});
  const OnDevice device(o_a_in);
  const int64_t n = o_a_in.size(0), h = o_a_in.size(1), dim = o_a_in.size(2);
  Tensor o = empty_cuda<3>(o_a_in, {n, h, dim}, o_a_in.scalar_type());
  Tensor m = empty_cuda<2>(o_a_in, {n, h}, ScalarType::Float);
  Tensor d = empty_cuda<2>(o_a_in, {n, h}, ScalarType::Float);
  const Tensor o_a = unit_stride_rows(o_a_in), o_b = unit_stride_rows(o_b_in);
  const Tensor m_a = as_float32(m_a_in), d_a = as_float32(d_a_in);
  const Tensor m_b = as_float32(m_b_in), d_b = as_float32(d_b_in);
  merge_pair(o_a, o_b, o,
             MaxDenominatorPair{scalars_of(m_a), scalars_of(d_a), scalars_of(m_b), scalars_of(d_b),
                                scalars_of(m), scalars_of(d)},
             std::nullopt, device.stream());
  return {o, m, d};
}

// merge_state_(Tensor(a!) v, Tensor(b!) s, Tensor v_other, Tensor s_other, Tensor? mask=None) -> ()
void merge_state_(const Tensor& v, const Tensor& s, const Tensor& v_other_in,
                  const Tensor& s_other_in, const std::optional<Tensor>& mask) {
  check_state(v, v, {&s});
  check_state(v_other_in, v, {&s_other_in});
  check_dtype(s, ScalarType::Float, "s");
  check_last_dim_contiguous(v, "v");
  check_writable(v, "v");
  check_writable(s, "s");
  check_mask(mask, v);
  const OnDevice device(v);
  const Tensor v_other = unit_stride_rows(v_other_in), s_other = as_float32(s_other_in);
  merge_pair(v, v_other, v, LsePair{scalars_of(s), scalars_of(s_other), scalars_of(s)}, mask,
             device.stream());
}

// merge_state_.omd(Tensor(a!) o, Tensor(b!) m, Tensor(c!) d, Tensor o_other, Tensor m_other,
//   Tensor d_other, Tensor? mask=None) -> ()
void merge_state_omd_(const Tensor& o, const Tensor& m, const Tensor& d, const Tensor& o_other_in,
                      const Tensor& m_other_in, const Tensor& d_other_in,
                      const std::optional<Tensor>& mask) {
  check_state(o, o, {&m, &d});
  check_state(o_other_in, o, {&m_other_in, &d_other_in});
  check_dtype(m, ScalarType::Float, "m");
  check_dtype(d, ScalarType::Float, "d");
  check_last_dim_contiguous(o, "o");
  check_writable(o, "o");
  check_writable(m, "m");
  check_writable(d, "d");
  check_mask(mask, o);
  const OnDevice device(o);
  const Tensor o_other = unit_stride_rows(o_other_in);
  const Tensor m_other = as_float32(m_other_in), d_other = as_float32(d_other_in);
  merge_pair(o, o_other, o,
             MaxDenominatorPair{scalars_of(m), scalars_of(d), scalars_of(m_other),
                                scalars_of(d_other), scalars_of(m), scalars_of(d)},
             mask, device.stream());
}

// Merges into `v` [n, h, d] and `s` [n, h] what `states` names, `num_states` a row on average.
template <typename States>
void merge_many(const States& states, int64_t num_states, bool vectors, const Tensor& v,
                const Tensor& s, cudaStream_t stream) {
  const int64_t n = v.size(0), h = v.size(1), dim = v.size(2);
  const Rows out = rows_of(v);
  const Scalars lse_out = scalars_of(s);
  with_vectors(v, "v", vectors, [&](auto element, auto length) {
    using T = typename decltype(element)::type;
    constexpr int kVec = decltype(length)::value;
    for_each_launch(n, h, dim / kVec, 1, num_states, [&](const Layout& layout, unsigned blocks) {
      merge_many_kernel<T, kVec, States>
          <<<blocks, kThreads, 0, stream>>>({states, out, lse_out, layout});
      check_launch("merge_states");
    });
  });
}

// merge_states(Tensor v, Tensor s) -> (Tensor v_merged, Tensor s_merged)
std::tuple<Tensor, Tensor> merge_states(const Tensor& v_in, const Tensor& s_in) {
  STD_TORCH_CHECK(v_in.dim() == 4, "v has ", v_in.dim(), " dimensions, expected 4");
  const int64_t n = v_in.size(0), num_states = v_in.size(1), h = v_in.size(2), dim = v_in.size(3);
  check_sizes(s_in, {n, num_states, h}, "s");
  check_same_device(s_in, v_in, "s");
  const OnDevice device(v_in);
  Tensor v_out = empty_cuda<3>(v_in, {n, h, dim}, v_in.scalar_type());
  Tensor s_out = empty_cuda<2>(v_in, {n, h}, ScalarType::Float);
  const Tensor v = unit_stride_rows(v_in), s = as_float32(s_in);
  const StridedStates states{rows_of(v, 2), scalars_of(s, 2), byte_stride(v, 1),
                             s.stride(1),   num_states,       nullptr};
  Alignment alignment(dim * static_cast<int64_t>(v.element_size()));
  alignment.add(states.v, states.v_state_stride);
  alignment.add(rows_of(v_out));
  merge_many(states, num_states, alignment.vectors(), v_out, s_out, device.stream());
  return {v_out, s_out};
}

// Merges the states of a list that fits the kernel's parameters.
template <int kCapacity>
void merge_list(const std::vector<Tensor>& v, const std::vector<Tensor>& s, const Tensor& v_out,
                const Tensor& s_out, cudaStream_t stream) {
  ListedStates<kCapacity> states;
  Alignment alignment(v_out.size(2) * static_cast<int64_t>(v_out.element_size()));
  alignment.add(rows_of(v_out));
  for (size_t k = 0; k < v.size(); ++k) {
    states.v[k] = rows_of(v[k]);
    states.s_of[k] = scalars_of(s[k]);
    alignment.add(states.v[k]);
  }
  states.num_states = static_cast<int32_t>(v.size());
  merge_many(states, states.num_states, alignment.vectors(), v_out, s_out, stream);
}

// merge_states.list(Tensor[] v, Tensor[] s) -> (Tensor v_merged, Tensor s_merged)
//
// One launch for up to kLongList states. Of a longer list, the states so far are merged first and
// stand in the next launch as one, their v rounded to its dtype once more.
std::tuple<Tensor, Tensor> merge_states_list(const std::vector<Tensor>& v_in,
                                             const std::vector<Tensor>& s_in) {
  STD_TORCH_CHECK(!v_in.empty() && v_in.size() == s_in.size(), "v has ", v_in.size(),
                  " states, s has ", s_in.size(), "; expected as many, and one at least");
  for (size_t k = 0; k < v_in.size(); ++k) check_state(v_in[k], v_in[0], {&s_in[k]});
  const OnDevice device(v_in[0]);
  const int64_t n = v_in[0].size(0), h = v_in[0].size(1), dim = v_in[0].size(2);
  std::vector<Tensor> v, s;
  std::optional<std::tuple<Tensor, Tensor>> merged;
  size_t next = 0;
  while (next < v_in.size()) {
    v.clear();
    s.clear();
    if (merged.has_value()) {
      v.push_back(std::get<0>(*merged));
      s.push_back(std::get<1>(*merged));
    }
    for (; next < v_in.size() && v.size() < kLongList; ++next) {
      v.push_back(unit_stride_rows(v_in[next]));
      s.push_back(as_float32(s_in[next]));
    }
    Tensor v_out = empty_cuda<3>(v_in[0], {n, h, dim}, v_in[0].scalar_type());
    Tensor s_out = empty_cuda<2>(v_in[0], {n, h}, ScalarType::Float);
    if (v.size() <= kShortList) {
      merge_list<kShortList>(v, s, v_out, s_out, device.stream());
    } else {
      merge_list<kLongList>(v, s, v_out, s_out, device.stream());
    }
    merged = {v_out, s_out};
  }
  return *merged;
}

// merge_states.ragged(Tensor v, Tensor s, Tensor indptr) -> (Tensor v_merged, Tensor s_merged)
std::tuple<Tensor, Tensor> merge_states_ragged(const Tensor& v_in, const Tensor& s_in,
                                               const Tensor& indptr) {
  check_state(v_in, v_in, {&s_in});
  check_index(indptr, "indptr");
  check_same_device(indptr, v_in, "indptr");
  STD_TORCH_CHECK(indptr.size(0) >= 1, "indptr is empty, expected at least one element");
  const OnDevice device(v_in);
  const int64_t n = indptr.size(0) - 1, h = v_in.size(1), dim = v_in.size(2);
  Tensor v_out = empty_cuda<3>(v_in, {n, h, dim}, v_in.scalar_type());
  Tensor s_out = empty_cuda<2>(v_in, {n, h}, ScalarType::Float);
  const Tensor v = unit_stride_rows(v_in), s = as_float32(s_in);
  const StridedStates states{
      rows_of(v), scalars_of(s), 0, 0, v.size(0), static_cast<const int32_t*>(indptr.data_ptr())};
  Alignment alignment(dim * static_cast<int64_t>(v.element_size()));
  alignment.add(states.v);
  alignment.add(rows_of(v_out));
  const int64_t average = n == 0 ? 0 : (v.size(0) + n - 1) / n;
  merge_many(states, average, alignment.vectors(), v_out, s_out, device.stream());
  return {v_out, s_out};
}

}  // namespace
}  // namespace flashinfer_ops

STABLE_TORCH_LIBRARY_IMPL(flashinfer_ops, CUDA, m) {
  m.impl("merge_state", TORCH_BOX(&flashinfer_ops::merge_state));
  m.impl("merge_state.omd", TORCH_BOX(&flashinfer_ops::merge_state_omd));
  m.impl("merge_state_", TORCH_BOX(&flashinfer_ops::merge_state_));
  m.impl("merge_state_.omd", TORCH_BOX(&flashinfer_ops::merge_state_omd_));
  m.impl("merge_states", TORCH_BOX(&flashinfer_ops::merge_states));
  m.impl("merge_states.list", TORCH_BOX(&flashinfer_ops::merge_states_list));
  m.impl("merge_states.ragged", TORCH_BOX(&flashinfer_ops::merge_states_ragged));
}
