// The block step of the attention kernel for many packed rows: gather K and V of the block into
// panels, S^T = K Q^T, online softmax, O = alpha O + P V.
#pragma once

#include "cpu/attention_matmul.h"
#include "cpu/attention_softmax.h"
#include "cpu/attention_walk.h"

namespace flashinfer_ops {
namespace {

template <typename T, typename Units>
class DenseStep {
 public:
  explicit DenseStep(UnitWalk<T, Units>& walk)
      : walk_(walk), problem_(walk.problem), scratch_(walk.scratch) {}

  void run(const Block& block, const RowPointers<T>& rows) {
    if (!walk_.has_columns) transpose_q();
    gather_k(rows.k, block.count);
    gather_v(rows.v, block.count);
    if (block.masked) walk_.find_limits(block);
    const int64_t n = block.row_end - block.row_begin;
    const int64_t pieces = (block.count + kDenseRows - 1) / kDenseRows;
    const int64_t columns = (n + kPanel - 1) / kPanel;
    const int64_t ahead = (walk_.next_count + pieces * columns - 1) / (pieces * columns);
    const Vec scale = splat(problem_.scale_log2);
    for (int64_t c = 0; c < n; c += kPanel) {
      const bool wide = n - c > kLanes;
      const auto* table = wide ? DenseTable<Units, 2>::qk : DenseTable<Units, 1>::qk;
      for_balanced(block.count, [&](int64_t j, int64_t tokens) {
        walk_.prefetch_next(ahead);
        table[tokens - 1](scratch_.k + j * kLine, scratch_.line_stride,
                          scratch_.q_columns + block.row_begin + c, kRowStride, scratch_.depth,
                          scale, scratch_.s + j * kRowStride + c, kRowStride);
      });
      softmax_columns(block, c, n);
      if (wide) softmax_columns(block, c + kLanes, n);
    }
    if (block.masked && !v_is_finite(block.count)) return pv_row_by_row(block);
    const int64_t depth = (block.count + Units::kPerUnit - 1) / Units::kPerUnit;
    const int64_t panel_stride = kDenseBlock / Units::kPerUnit * kPanel;
    for (int64_t c = 0; c < problem_.head_dim; c += kPanel) {
      const auto* table =
          problem_.head_dim - c > kLanes ? DenseTable<Units, 2>::pv : DenseTable<Units, 1>::pv;
      for_balanced(n, [&](int64_t r, int64_t count) {
        table[count - 1](scratch_.s + r, kRowStride, scratch_.v + c / kPanel * panel_stride, depth,
                         scratch_.alpha + r,
                         scratch_.o + (block.row_begin + r) * scratch_.o_stride + c,
                         scratch_.o_stride);
      });
    }
  }

 private:
  void transpose_q() {
    for (int64_t i = 0; i < walk_.rows; ++i) {
      const float* row = scratch_.q_rows + i * scratch_.q_stride;
      for (int64_t d = 0; d < scratch_.depth; ++d) scratch_.q_columns[d * kRowStride + i] = row[d];
    }
    for (int64_t d = 0; d < scratch_.depth; ++d) {
      memset(scratch_.q_columns + d * kRowStride + walk_.rows, 0,
             (kRowStride - walk_.rows) * sizeof(float));
    }
    walk_.has_columns = true;
  }

  void gather_k(const T* const* k, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t u = 0; u < scratch_.depth; u += kLanes) {
        store(scratch_.k + u / kLine * scratch_.line_stride + j * kLine + u % kLine,
              walk_.load_units_first(k[j], u, problem_.head_dim));
      }
    }
  }

  void gather_v(const T* const* v, int64_t count) {
    const int64_t head_dim = problem_.head_dim;
    const int64_t panel_stride = kDenseBlock / Units::kPerUnit * kPanel;
    if constexpr (Units::kPerUnit == 2) {
      for (int64_t j = 0; j < count; j += 2) {
        float* to = scratch_.v + j / 2 * kPanel;
        for (int64_t u = 0; u < scratch_.depth; u += kLanes, to += panel_stride) {
          const Vec a = walk_.load_units_first(v[j], u, head_dim);
          const Vec b = j + 1 < count ? walk_.load_units_first(v[j + 1], u, head_dim) : Vec{};
          Vec lower, upper;
          interleave_pairs(a, b, &lower, &upper);
          store(to, lower);
          store(to + kLanes, upper);
        }
      }
    } else {
      for (int64_t j = 0; j < count; ++j) {
        float* to = scratch_.v + j * kPanel;
        for (int64_t c = 0; c < scratch_.o_stride; c += kPanel, to += panel_stride) {
          store(to, walk_.load_units_first(v[j], c, head_dim));
          store(to + kLanes, walk_.load_units_first(v[j], c + kLanes, head_dim));
        }
      }
    }
  }

  // The rows [column, column + kLanes) of the block's n; lanes past n change no row's state.
  void softmax_columns(const Block& block, int64_t column, int64_t n) {
    float* m = scratch_.m + block.row_begin + column;
    float* l = scratch_.l + block.row_begin + column;
    const int64_t rows = min(kLanes, n - column);
    Vec m_vec = load_first(m, rows), l_vec = load_first(l, rows), alpha;
    if (block.masked) {
      softmax_lanes<Units, true>(scratch_.s + column, kRowStride, block.count,
                                 scratch_.limits + column, m_vec, l_vec, alpha);
    } else {
      softmax_lanes<Units, false>(scratch_.s + column, kRowStride, block.count, nullptr, m_vec,
                                  l_vec, alpha);
    }
    store_first(m, m_vec, rows);
    store_first(l, l_vec, rows);
    store(scratch_.alpha + column, alpha);
  }

  bool v_is_finite(int64_t count) const {
    const int64_t depth = (count + Units::kPerUnit - 1) / Units::kPerUnit;
    const int64_t panel_stride = kDenseBlock / Units::kPerUnit * kPanel;
    IntVec found = {};
    for (int64_t c = 0; c < scratch_.o_stride; c += kPanel) {
      const float* panel = scratch_.v + c / kPanel * panel_stride;
      for (int64_t i = 0; i < depth * kPanel; i += kLanes) {
        const IntVec x = load_int(panel + i);
        const auto all_ones = [&](int32_t exponent) {
          return (x & splat_int(exponent)) == splat_int(exponent);
        };
        found |=
            Units::kPerUnit == 2 ? all_ones(0x7f800000) | all_ones(0x7f80) : all_ones(0x7f800000);
      }
    }
    for (int i = 0; i < kLanes; ++i) {
      if (found[i]) return false;
    }
    return true;
  }

  void pv_row_by_row(const Block& block) {
    const int64_t panel_stride = kDenseBlock / Units::kPerUnit * kPanel;
    // Element j of a column of units, pairs being (j, j + 1).
    const auto element = [](const float* column, int64_t stride, int64_t j) {
      if constexpr (Units::kPerUnit == 1) return column[j * stride];
      uint32_t bits;
      memcpy(&bits, column + j / 2 * stride, sizeof(bits));
      bits = j % 2 ? bits & 0xffff0000u : bits << 16;
      float x;
      memcpy(&x, &bits, sizeof(x));
      return x;
    };
    for (int64_t i = 0; block.row_begin + i < block.row_end; ++i) {
      float* o = scratch_.o + (block.row_begin + i) * scratch_.o_stride;
      for (int64_t c = 0; c < problem_.head_dim; ++c) {
        const float* v = scratch_.v + c / kPanel * panel_stride + c % kPanel;
        float sum = scratch_.alpha[i] * o[c];
        for (int64_t j = 0; j < scratch_.limits[i]; ++j) {
          sum += element(scratch_.s + i, kRowStride, j) * element(v, kPanel, j);
        }
        o[c] = sum;
      }
    }
  }

  UnitWalk<T, Units>& walk_;
  const AttentionProblem& problem_;
  Scratch<T, Units>& scratch_;
};

}  // namespace
}  // namespace flashinfer_ops
