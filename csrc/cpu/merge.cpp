// Merging attention states: (v, s) with a base-2 log-sum-exp s, or (o, m, d) with s = m + log2(d).
//
//   s = log2(sum_k 2^s_k)            v = sum_k 2^(s_k - s) v_k
//   m = max_k m_k                    d = sum_k d_k 2^(m_k - m)      o = sum_k d_k 2^(m_k - m) o_k /
//   d
//
// v, o: [n, h, d] of float32, float16 or bfloat16, any strides; s, m, d: [n, h], computed in
// float32. An empty state (s = -inf; d = 0 or m = -inf) has weight zero and is the exact identity:
// what its v holds, NaN included, never enters. All states empty: v = 0, s = -inf (m = -inf, d =
// 0). One row is one (token, head) pair; rows are dealt to the threads in contiguous ranges.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/stable.h"
#include "cpu/capability.h"

namespace flashinfer_ops {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr int64_t kGrainElements = 32768;  // elements a thread should at least have to itself

WeightedSum weighted_sum(const Tensor& v, const char* name) {
  const MergeKernel& kernel = *cpu_kernels().merge;
  switch (v.scalar_type()) {
    case ScalarType::Float:
      return kernel.float32;
    case ScalarType::Half:
      return kernel.float16;
    case ScalarType::BFloat16:
      return kernel.bfloat16;
    default:
      STD_TORCH_CHECK(false, name, " has dtype ", toString(v.scalar_type()),
                      ", expected float32, float16 or bfloat16");
  }
}

// Rows of a [n, h, d] tensor as bytes.
struct Rows {
  char* data;
  int64_t token_stride;
  int64_t head_stride;

  explicit Rows(const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())),
        token_stride(t.stride(0) * t.element_size()),
        head_stride(t.stride(1) * t.element_size()) {}

  char* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

// Elements of a [n, h] float32 tensor.
struct Scalars {
  float* data;
  int64_t token_stride;
  int64_t head_stride;

  explicit Scalars(const Tensor& t)
      : data(static_cast<float*>(t.data_ptr())),
        token_stride(t.stride(0)),
        head_stride(t.stride(1)) {}

  float& at(int64_t token, int64_t head) const {
    return data[token * token_stride + head * head_stride];
  }
};

Tensor as_float32(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

// The kernels read rows of unit stride; inputs with another one are copied.
Tensor unit_stride_rows(const Tensor& v) {
  const int64_t last = v.dim() - 1;
  return v.size(last) <= 1 || v.stride(last) == 1 ? v : torch::stable::contiguous(v);
}

// 2^(x - max) without inf - inf: the largest one has weight 1, also when it is +inf.
float relative_weight(float x, float max) { return x == max ? 1.0f : std::exp2(x - max); }

// The larger one; NaN wins, so that it comes out.
float max_nan(float a, float b) { return b <= a || std::isnan(a) ? a : b; }

// Turns lse[0..num) into the states' weights, in place, and returns the merged lse.
float weights_from_lse(float* lse, int64_t num) {
  float max = kNegInf;
  for (int64_t k = 0; k < num; ++k) max = max_nan(max, lse[k]);
  if (max == kNegInf) {
    std::fill(lse, lse + num, 0.0f);
    return kNegInf;
  }
  float sum = 0.0f;
  for (int64_t k = 0; k < num; ++k) sum += lse[k] = relative_weight(lse[k], max);
  for (int64_t k = 0; k < num; ++k) lse[k] /= sum;
  return max + std::log2(sum);
}

// The same for two (m, d) pairs: fills weights[2] and returns the merged pair.
std::pair<float, float> weights_from_md(float m_a, float d_a, float m_b, float d_b,
                                        float* weights) {
  const bool empty_a = d_a == 0.0f || m_a == kNegInf;
  const bool empty_b = d_b == 0.0f || m_b == kNegInf;
  if (empty_a && empty_b) {
    weights[0] = weights[1] = 0.0f;
    return {kNegInf, 0.0f};
  }
  const float m = empty_a ? m_b : empty_b ? m_a : max_nan(m_a, m_b);
  weights[0] = empty_a ? 0.0f : d_a * relative_weight(m_a, m);
  weights[1] = empty_b ? 0.0f : d_b * relative_weight(m_b, m);
  const float d = weights[0] + weights[1];
  weights[0] /= d;
  weights[1] /= d;
  return {m, d};
}

// f(token, head) for every row, in parallel.
template <typename F>
void for_each_row(int64_t num_tokens, int64_t num_heads, int64_t row_elements, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, row_elements));
  torch::stable::parallel_for(0, num_tokens * num_heads, grain, [&](int64_t begin, int64_t end) {
    int64_t token = begin / num_heads;
    int64_t head = begin % num_heads;
    for (int64_t row = begin; row < end; ++row) {
      f(token, head);
      if (++head == num_heads) {
        head = 0;
        ++token;
      }
    }
  });
}

void check_state(const Tensor& v, const Tensor& like,
                 std::initializer_list<const Tensor*> scalars) {
  STD_TORCH_CHECK(like.dim() == 3, "a state's output has ", like.dim(), " dimensions, expected 3");
  check_sizes(v, {like.size(0), like.size(1), like.size(2)}, "a state's output");
  check_dtype(v, like.scalar_type(), "a state's output");
  for (const Tensor* t : scalars) {
    check_sizes(*t, {like.size(0), like.size(1)}, "a state's lse");
  }
}

// Which tokens an in-place merge touches: all, or those whose mask byte is not zero.
struct TokenMask {
  const uint8_t* data = nullptr;
  int64_t stride = 0;

  TokenMask(const std::optional<Tensor>& mask, int64_t num_tokens) {
    if (!mask.has_value()) return;
    STD_TORCH_CHECK(
        mask->scalar_type() == ScalarType::Bool || mask->scalar_type() == ScalarType::Byte,
        "mask has dtype ", toString(mask->scalar_type()), ", expected bool or uint8");
    check_sizes(*mask, {num_tokens}, "mask");
    data = static_cast<const uint8_t*>(mask->data_ptr());
    stride = mask->stride(0);
  }

  bool operator()(int64_t token) const { return data == nullptr || data[token * stride] != 0; }
};

void merge_pair(const Tensor& v_a, const Tensor& s_a, const Tensor& v_b, const Tensor& s_b,
                const Tensor& v_out, const Tensor& s_out, const TokenMask& mask) {
  const WeightedSum sum = weighted_sum(v_a, "v_a");
  const Rows a(v_a), b(v_b), out(v_out);
  const Scalars lse_a(s_a), lse_b(s_b), lse_out(s_out);
  const int64_t dim = v_a.size(2);
  for_each_row(v_a.size(0), v_a.size(1), 3 * dim, [&](int64_t token, int64_t head) {
    if (!mask(token)) return;
    float weights[2] = {lse_a.at(token, head), lse_b.at(token, head)};
    const float lse = weights_from_lse(weights, 2);
    const void* rows[2] = {a.at(token, head), b.at(token, head)};
    sum(out.at(token, head), rows, weights, 2, dim);
    lse_out.at(token, head) = lse;
  });
}

void merge_pair_omd(const Tensor& o_a, const Tensor& m_a, const Tensor& d_a, const Tensor& o_b,
                    const Tensor& m_b, const Tensor& d_b, const Tensor& o_out, const Tensor& m_out,
                    const Tensor& d_out, const TokenMask& mask) {
  const WeightedSum sum = weighted_sum(o_a, "o_a");
  const Rows a(o_a), b(o_b), out(o_out);
  const Scalars max_a(m_a), max_b(m_b), max_out(m_out);
  const Scalars den_a(d_a), den_b(d_b), den_out(d_out);
  const int64_t dim = o_a.size(2);
  for_each_row(o_a.size(0), o_a.size(1), 3 * dim, [&](int64_t token, int64_t head) {
    if (!mask(token)) return;
    float weights[2];
    const auto [m, d] = weights_from_md(max_a.at(token, head), den_a.at(token, head),
                                        max_b.at(token, head), den_b.at(token, head), weights);
    const void* rows[2] = {a.at(token, head), b.at(token, head)};
    sum(out.at(token, head), rows, weights, 2, dim);
    max_out.at(token, head) = m;
    den_out.at(token, head) = d;
  });
}

// merge_state(Tensor v_a, Tensor s_a, Tensor v_b, Tensor s_b) -> (Tensor v, Tensor s)
std::tuple<Tensor, Tensor> merge_state(const Tensor& v_a, const Tensor& s_a, const Tensor& v_b,
                                       const Tensor& s_b) {
  check_state(v_a, v_a, {&s_a});
  check_state(v_b, v_a, {&s_b});
  const int64_t n = v_a.size(0), h = v_a.size(1), dim = v_a.size(2);
  Tensor v = empty(v_a, {n, h, dim}, v_a.scalar_type());
  Tensor s = empty(v_a, {n, h}, ScalarType::Float);
  merge_pair(unit_stride_rows(v_a), as_float32(s_a), unit_stride_rows(v_b), as_float32(s_b), v, s,
             TokenMask(std::nullopt, n));
  return {v, s};
}

// merge_state.omd(Tensor o_a, Tensor m_a, Tensor d_a, Tensor o_b, Tensor m_b, Tensor d_b)
//   -> (Tensor o, Tensor m, Tensor d)
std::tuple<Tensor, Tensor, Tensor> merge_state_omd(const Tensor& o_a, const Tensor& m_a,
                                                   const Tensor& d_a, const Tensor& o_b,
                                                   const Tensor& m_b, const Tensor& d_b) {
  check_state(o_a, o_a, {&m_a, &d_a});
  check_state(o_b, o_a, {&m_b, &d_b});
  const int64_t n = o_a.size(0), h = o_a.size(1), dim = o_a.size(2);
  Tensor o = empty(o_a, {n, h, dim}, o_a.scalar_type());
  Tensor m = empty(o_a, {n, h}, ScalarType::Float);
  Tensor d = empty(o_a, {n, h}, ScalarType::Float);
  merge_pair_omd(unit_stride_rows(o_a), as_float32(m_a), as_float32(d_a), unit_stride_rows(o_b),
                 as_float32(m_b), as_float32(d_b), o, m, d, TokenMask(std::nullopt, n));
  return {o, m, d};
}

// merge_state_(Tensor(a!) v, Tensor(b!) s, Tensor v_other, Tensor s_other, Tensor? mask=None) -> ()
void merge_state_(const Tensor& v, const Tensor& s, const Tensor& v_other, const Tensor& s_other,
                  const std::optional<Tensor>& mask) {
  check_state(v, v, {&s});
  check_state(v_other, v, {&s_other});
  check_dtype(s, ScalarType::Float, "s");
  check_last_dim_contiguous(v, "v");
  check_writable(v, "v");
  check_writable(s, "s");
  merge_pair(v, s, unit_stride_rows(v_other), as_float32(s_other), v, s,
             TokenMask(mask, v.size(0)));
}

// merge_state_.omd(Tensor(a!) o, Tensor(b!) m, Tensor(c!) d, Tensor o_other, Tensor m_other,
//   Tensor d_other, Tensor? mask=None) -> ()
void merge_state_omd_(const Tensor& o, const Tensor& m, const Tensor& d, const Tensor& o_other,
                      const Tensor& m_other, const Tensor& d_other,
                      const std::optional<Tensor>& mask) {
  check_state(o, o, {&m, &d});
  check_state(o_other, o, {&m_other, &d_other});
  check_dtype(m, ScalarType::Float, "m");
  check_dtype(d, ScalarType::Float, "d");
  check_last_dim_contiguous(o, "o");
  check_writable(o, "o");
  check_writable(m, "m");
  check_writable(d, "d");
  merge_pair_omd(o, m, d, unit_stride_rows(o_other), as_float32(m_other), as_float32(d_other), o, m,
                 d, TokenMask(mask, o.size(0)));
}

// Merges, for each of n rows and h heads, the states k in [0, count(token)): `row(token, head, k)`
// is the state's v, `lse(token, head, k)` its s.
template <typename Count, typename Row, typename Lse>
std::tuple<Tensor, Tensor> merge_many(const Tensor& like, int64_t n, const Count& count,
                                      const Row& row, const Lse& lse) {
  const int64_t h = like.size(like.dim() - 2), dim = like.size(like.dim() - 1);
  const WeightedSum sum = weighted_sum(like, "v");
  Tensor v = empty(like, {n, h, dim}, like.scalar_type());
  Tensor s = empty(like, {n, h}, ScalarType::Float);
  const Rows out(v);
  const Scalars lse_out(s);
  for_each_row(n, h, 2 * dim, [&](int64_t token, int64_t head) {
    thread_local std::vector<float> weights;
    thread_local std::vector<const void*> rows;
    const int64_t num = count(token);
    weights.resize(num);
    rows.resize(num);
    for (int64_t k = 0; k < num; ++k) {
      weights[k] = lse(token, head, k);
      rows[k] = row(token, head, k);
    }
    lse_out.at(token, head) = weights_from_lse(weights.data(), num);
    sum(out.at(token, head), rows.data(), weights.data(), num, dim);
  });
  return {v, s};
}

// merge_states(Tensor v, Tensor s) -> (Tensor v_merged, Tensor s_merged)
std::tuple<Tensor, Tensor> merge_states(const Tensor& v_in, const Tensor& s_in) {
  STD_TORCH_CHECK(v_in.dim() == 4, "v has ", v_in.dim(), " dimensions, expected 4");
  check_sizes(s_in, {v_in.size(0), v_in.size(1), v_in.size(2)}, "s");
  const Tensor v = unit_stride_rows(v_in), s = as_float32(s_in);
  const int64_t num_states = v.size(1);
  const auto* v_data = static_cast<const char*>(v.data_ptr());
  const auto* s_data = static_cast<const float*>(s.data_ptr());
  const int64_t item = v.element_size();
  const int64_t v_token = v.stride(0) * item, v_state = v.stride(1) * item,
                v_head = v.stride(2) * item;
  const int64_t s_token = s.stride(0), s_state = s.stride(1), s_head = s.stride(2);
  return merge_many(
      v, v.size(0), [&](int64_t) { return num_states; },
      [&](int64_t token, int64_t head, int64_t k) {
        return v_data + token * v_token + k * v_state + head * v_head;
      },
      [&](int64_t token, int64_t head, int64_t k) {
        return s_data[token * s_token + k * s_state + head * s_head];
      });
}

// merge_states.list(Tensor[] v, Tensor[] s) -> (Tensor v_merged, Tensor s_merged)
std::tuple<Tensor, Tensor> merge_states_list(const std::vector<Tensor>& v_in,
                                             const std::vector<Tensor>& s_in) {
  STD_TORCH_CHECK(!v_in.empty() && v_in.size() == s_in.size(), "v has ", v_in.size(),
                  " states, s has ", s_in.size(), "; expected as many, and one at least");
  std::vector<Tensor> owned;  // keeps copies alive
  std::vector<Rows> v;
  std::vector<Scalars> s;
  for (size_t k = 0; k < v_in.size(); ++k) {
    check_state(v_in[k], v_in[0], {&s_in[k]});
    owned.push_back(unit_stride_rows(v_in[k]));
    v.emplace_back(owned.back());
    owned.push_back(as_float32(s_in[k]));
    s.emplace_back(owned.back());
  }
  const auto num_states = static_cast<int64_t>(v.size());
  return merge_many(
      v_in[0], v_in[0].size(0), [&](int64_t) { return num_states; },
      [&](int64_t token, int64_t head, int64_t k) { return v[k].at(token, head); },
      [&](int64_t token, int64_t head, int64_t k) { return s[k].at(token, head); });
}

// merge_states.ragged(Tensor v, Tensor s, Tensor indptr) -> (Tensor v_merged, Tensor s_merged)
std::tuple<Tensor, Tensor> merge_states_ragged(const Tensor& v_in, const Tensor& s_in,
                                               const Tensor& indptr) {
  check_state(v_in, v_in, {&s_in});
  check_index(indptr, "indptr");
  STD_TORCH_CHECK(indptr.size(0) >= 1, "indptr is empty, expected at least one element");
  const auto* ptr = static_cast<const int32_t*>(indptr.data_ptr());
  const int64_t n = indptr.size(0) - 1;
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(ptr[i] >= 0 && ptr[i] <= ptr[i + 1] && ptr[i + 1] <= v_in.size(0),
                    "indptr must not decrease and must stay within the ", v_in.size(0),
                    " rows of v, but goes from ", ptr[i], " to ", ptr[i + 1]);
  }
  const Tensor v = unit_stride_rows(v_in), s = as_float32(s_in);
  const Rows v_rows(v);
  const Scalars s_rows(s);
  return merge_many(
      v, n, [&](int64_t token) { return int64_t{ptr[token + 1]} - ptr[token]; },
      [&](int64_t token, int64_t head, int64_t k) { return v_rows.at(ptr[token] + k, head); },
      [&](int64_t token, int64_t head, int64_t k) { return s_rows.at(ptr[token] + k, head); });
}

}  // namespace
}  // namespace flashinfer_ops

STABLE_TORCH_LIBRARY_IMPL(flashinfer_ops, CPU, m) {
  m.impl("merge_state", TORCH_BOX(&flashinfer_ops::merge_state));
  m.impl("merge_state.omd", TORCH_BOX(&flashinfer_ops::merge_state_omd));
  m.impl("merge_state_", TORCH_BOX(&flashinfer_ops::merge_state_));
  m.impl("merge_state_.omd", TORCH_BOX(&flashinfer_ops::merge_state_omd_));
  m.impl("merge_states", TORCH_BOX(&flashinfer_ops::merge_states));
  m.impl("merge_states.list", TORCH_BOX(&flashinfer_ops::merge_states_list));
  m.impl("merge_states.ragged", TORCH_BOX(&flashinfer_ops::merge_states_ragged));
}
