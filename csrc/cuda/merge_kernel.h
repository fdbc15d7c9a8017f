// The kernels of merge.cu, which says what they compute. Both read a row in vectors of kVec
// elements: 16 bytes where addresses allow, else one element.
//
// merge_pair_kernel: a row belongs to `lanes` threads of one warp (a power of two, at most 32);
//   each thread takes kRowsAThread rows, so that four vectors are on their way before the first is
//   used. Grid: ceil(rows / (256 / lanes * kRowsAThread)) blocks of 256 threads.
// merge_many_kernel: a row belongs to `slots` groups of `lanes` threads, slots * lanes at most 256;
//   slot i takes the states i, i + slots, ... and the slots' sums are joined by shuffles, then
//   through shared memory. Grid: ceil(rows / (256 / (slots * lanes))) blocks of 256 threads.
#pragma once

#include "cuda/merge_rows.h"

namespace flashinfer_ops {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsAThread = 2;     // of a pair
constexpr int kStatesInFlight = 4;  // of a slot

// The rows of a launch and the threads that share one.
struct Layout {
  int64_t first_token;  // of this launch
  uint32_t num_rows;    // of this launch
  Divisor num_heads;
  uint32_t num_vectors;  // of a row
  int lanes_log2;
  int slots_log2;  // of a row of merge_many_kernel
};

struct LsePair {
  Scalars a, b, out;

  struct Value {
    float a, b;
  };

  __device__ Value load(int64_t token, int64_t head) const {
    return {a.at(token, head), b.at(token, head)};
  }

  __device__ void weigh(const Value& s, float (&weights)[2], Value& merged) const {
    const float max = max_nan(s.a, s.b);
    weights[0] = relative_weight(s.a, max);
    weights[1] = relative_weight(s.b, max);
    const float sum = weights[0] + weights[1];
    if (sum == 0.0f) {
      merged.a = neg_inf();
      return;
    }
    weights[0] /= sum;
    weights[1] /= sum;
    merged.a = max + log2f(sum);
  }

  __device__ void store(int64_t token, int64_t head, const Value& merged) const {
    out.at(token, head) = merged.a;
  }
};

struct MaxDenominatorPair {
  Scalars m_a, d_a, m_b, d_b, m_out, d_out;

  struct Value {
    float m_a, d_a, m_b, d_b;
  };

  __device__ Value load(int64_t token, int64_t head) const {
    return {m_a.at(token, head), d_a.at(token, head), m_b.at(token, head), d_b.at(token, head)};
  }

  __device__ void weigh(const Value& s, float (&weights)[2], Value& merged) const {
    const bool empty_a = s.d_a == 0.0f || s.m_a == neg_inf();
    const bool empty_b = s.d_b == 0.0f || s.m_b == neg_inf();
    weights[0] = weights[1] = 0.0f;
    merged.m_a = neg_inf();
    merged.d_a = 0.0f;
    if (empty_a && empty_b) return;
    const float m = empty_a ? s.m_b : empty_b ? s.m_a : max_nan(s.m_a, s.m_b);
    if (!empty_a) weights[0] = s.d_a * relative_weight(s.m_a, m);
    if (!empty_b) weights[1] = s.d_b * relative_weight(s.m_b, m);
    merged.m_a = m;
    merged.d_a = weights[0] + weights[1];
    weights[0] /= merged.d_a;
    weights[1] /= merged.d_a;
  }

  __device__ void store(int64_t token, int64_t head, const Value& merged) const {
    m_out.at(token, head) = merged.m_a;
    d_out.at(token, head) = merged.d_a;
  }
};

template <typename Pair>
struct PairParams {
  Rows a, b, out;
  Pair scalars;
  const uint8_t* mask;  // null: all tokens
  int64_t mask_stride;
  Layout layout;
};

// In place, `out` is `a` and the scalars written are those read.
template <typename T, int kVec, typename Pair>
__global__ __launch_bounds__(kThreads) void merge_pair_kernel(
    const __grid_constant__ PairParams<Pair> params) {
  const Layout& layout = params.layout;
  const uint32_t lanes = 1u << layout.lanes_log2;
  const uint32_t lane = threadIdx.x & (lanes - 1);
  const uint32_t rows_a_pass = kThreads >> layout.lanes_log2;
  const uint32_t first_row =
      blockIdx.x * (rows_a_pass * kRowsAThread) + (threadIdx.x >> layout.lanes_log2);

  bool active[kRowsAThread];
  int64_t token[kRowsAThread], head[kRowsAThread];
  typename Pair::Value scalars[kRowsAThread] = {};
  Vector<T, kVec> v_a[kRowsAThread], v_b[kRowsAThread];
#pragma unroll
  for (int r = 0; r < kRowsAThread; ++r) {
    const uint32_t row = first_row + r * rows_a_pass;
    active[r] = row < layout.num_rows;
    const uint32_t token_here = layout.num_heads.divide(active[r] ? row : 0);
    head[r] = active[r] ? row - token_here * layout.num_heads.divisor : 0;
    token[r] = layout.first_token + token_here;
    if (params.mask != nullptr) {
      active[r] = active[r] && params.mask[token[r] * params.mask_stride] != 0;
    }
    if (active[r]) {
      scalars[r] = params.scalars.load(token[r], head[r]);
      if (lane < layout.num_vectors) {
        v_a[r] = load_vector<T, kVec>(params.a.at(token[r], head[r]), lane);
        v_b[r] = load_vector<T, kVec>(params.b.at(token[r], head[r]), lane);
      }
    }
  }
  // All lanes of a row have read its scalars before the first one may write them.
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kRowsAThread; ++r) {
    if (!active[r]) continue;
    float weights[2];
    typename Pair::Value merged;
    params.scalars.weigh(scalars[r], weights, merged);
    if (lane == 0) params.scalars.store(token[r], head[r], merged);
    for (uint32_t vector = lane; vector < layout.num_vectors; vector += lanes) {
      if (vector != lane) {
        v_a[r] = load_vector<T, kVec>(params.a.at(token[r], head[r]), vector);
        v_b[r] = load_vector<T, kVec>(params.b.at(token[r], head[r]), vector);
      }
      float sum[kVec] = {};
      accumulate(sum, weights[0], v_a[r]);
      accumulate(sum, weights[1], v_b[r]);
      store_vector<T>(params.out.at(token[r], head[r]), vector, sum, 1.0f);
    }
  }
}

// States of one tensor: `num_states` a token, or with `indptr` those of the rows indptr[token] to
// indptr[token + 1], kept within the tensor's `num_states` rows since the host has not read them.
struct StridedStates {
  Rows v;
  Scalars s;
  int64_t v_state_stride, s_state_stride;
  int64_t num_states;
  const int32_t* indptr;

  struct Row {
    const char* v_data;
    const float* s_data;
    int64_t v_stride, s_stride;
    int64_t count;

    __device__ const char* v(int64_t k) const { return v_data + k * v_stride; }
    __device__ float s(int64_t k) const { return __ldg(s_data + k * s_stride); }
  };

  __device__ Row row(int64_t token, int64_t head) const {
    if (indptr == nullptr) {
      return {v.at(token, head), &s.at(token, head), v_state_stride, s_state_stride, num_states};
    }
    const int64_t begin = min(max(int64_t{indptr[token]}, int64_t{0}), num_states);
    const int64_t end = min(int64_t{indptr[token + 1]}, num_states);
    return {v.at(begin, head), &s.at(begin, head), v.token_stride, s.token_stride,
            max(end - begin, int64_t{0})};
  }
};

// States of as many tensors, their addresses in the kernel's parameters.
template <int kCapacity>
struct ListedStates {
  Rows v[kCapacity];
  Scalars s_of[kCapacity];
  int32_t num_states;

  struct Row {
    const ListedStates& states;
    int64_t token, head;
    int64_t count;

    __device__ const char* v(int64_t k) const { return states.v[k].at(token, head); }
    __device__ float s(int64_t k) const { return __ldg(&states.s_of[k].at(token, head)); }
  };

  __device__ Row row(int64_t token, int64_t head) const { return {*this, token, head, num_states}; }
};

template <typename States>
struct ManyParams {
  States states;
  Rows out;
  Scalars lse_out;
  Layout layout;
};

template <typename T, int kVec, typename States>
__global__ __launch_bounds__(kThreads, 4) void merge_many_kernel(
    const __grid_constant__ ManyParams<States> params) {
  __shared__ float warp_max[kWarps], warp_weight[kWarps];
  __shared__ alignas(16) float warp_sum[kWarps][32 * kVec];
  const Layout& layout = params.layout;
  const int lanes = 1 << layout.lanes_log2;
  const int slots = 1 << layout.slots_log2;
  const int group = lanes * slots;  // threads of a row
  const int in_warp = min(group, 32);
  const int rank = threadIdx.x & (group - 1);
  const int lane = rank & (lanes - 1);
  const int slot = rank >> layout.lanes_log2;
  const int warp = threadIdx.x / 32;
  const int first_warp = warp & ~(max(group / 32, 1) - 1);  // of the row

  const uint32_t row_here = blockIdx.x * (kThreads / group) + threadIdx.x / group;
  const bool active = row_here < layout.num_rows;
  const uint32_t token_here = layout.num_heads.divide(active ? row_here : 0);
  const int64_t head = active ? row_here - token_here * layout.num_heads.divisor : 0;
  const int64_t token = layout.first_token + token_here;
  const auto row = params.states.row(token, head);
  const int64_t count = active ? row.count : 0;

  float max_lse = neg_inf();
  for (uint32_t chunk = 0; chunk < max(layout.num_vectors, 1u); chunk += lanes) {
    const uint32_t vector = chunk + lane;
    const bool in_row = vector < layout.num_vectors;
    Vector<T, kVec> v[kStatesInFlight];
    float s[kStatesInFlight];
    const auto load = [&](int64_t k0) {
#pragma unroll
      for (int u = 0; u < kStatesInFlight; ++u) {
        const int64_t k = k0 + u * slots;
        s[u] = neg_inf();
        if (k < count) {
          s[u] = row.s(k);
          if (in_row) v[u] = load_constant_vector<T, kVec>(row.v(k), vector);
        }
      }
    };
    load(slot);

    // The largest lse, while the first vectors are on their way.
    if (chunk == 0) {
      for (int64_t k = rank; k < count; k += group) max_lse = max_nan(max_lse, row.s(k));
      for (int delta = 1; delta < in_warp; delta *= 2) {
        max_lse = max_nan(max_lse, __shfl_xor_sync(~0u, max_lse, delta));
      }
      if (group > 32) {
        if (threadIdx.x % 32 == 0) warp_max[warp] = max_lse;
        __syncthreads();
        for (int i = 0; i < group / 32; ++i) max_lse = max_nan(max_lse, warp_max[first_warp + i]);
      }
    }

    float sum[kVec] = {};
    float total = 0.0f;
    for (int64_t k = slot; k < count; k += kStatesInFlight * slots) {
      if (k != slot) load(k);
#pragma unroll
      for (int u = 0; u < kStatesInFlight; ++u) {
        const float weight = relative_weight(s[u], max_lse);
        total += weight;
        accumulate(sum, weight, v[u]);
      }
    }

    for (int delta = lanes; delta < in_warp; delta *= 2) {
      total += __shfl_xor_sync(~0u, total, delta);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] += __shfl_xor_sync(~0u, sum[j], delta);
    }
    if (group > 32) {
      if (threadIdx.x % 32 < lanes) {
        if (lane == 0) warp_weight[warp] = total;
#pragma unroll
        for (int j = 0; j < kVec; ++j) warp_sum[warp][lane * kVec + j] = sum[j];
      }
      __syncthreads();
      if (slot == 0) {
        for (int i = 1; i < group / 32; ++i) {
          total += warp_weight[first_warp + i];
#pragma unroll
          for (int j = 0; j < kVec; ++j) sum[j] += warp_sum[first_warp + i][lane * kVec + j];
        }
      }
      __syncthreads();
    }

    if (active && slot == 0) {
      const bool empty = total == 0.0f;
      if (in_row) {
        store_vector<T>(params.out.at(token, head), vector, sum, empty ? 0.0f : 1.0f / total);
      }
      if (chunk == 0 && lane == 0) {
        params.lse_out.at(token, head) = empty ? neg_inf() : max_lse + log2f(total);
      }
    }
  }
}

}  // namespace flashinfer_ops
