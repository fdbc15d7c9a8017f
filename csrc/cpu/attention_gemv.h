// The block step of the attention kernel for few packed rows: K and V are read once, where they
// lie.
#pragma once

#include "cpu/attention_matmul.h"
#include "cpu/attention_softmax.h"
#include "cpu/attention_walk.h"

namespace flashinfer_ops {
namespace {

template <typename T, typename Units>
class GemvStep {
 public:
  explicit GemvStep(UnitWalk<T, Units>& walk)
      : walk_(walk), problem_(walk.problem), scratch_(walk.scratch) {}

  // One head of the item, its number within it.
  void run(const Block& block, const RowPointers<T>& located, int64_t head) {
    const int64_t n = block.row_end - block.row_begin, count = block.count;
    const int64_t padded = round_up(count, kLanes);
    const int64_t state = head * walk_.rows + block.row_begin;
    const T *k[kGemvBlock], *v[kGemvBlock], *next[kGemvBlock];
    for (int64_t j = 0; j < padded; ++j) {
      k[j] = located.k[min(j, count - 1)] + head * problem_.k.head_stride;
      v[j] = located.v[min(j, count - 1)] + head * problem_.v.head_stride;
    }
    find_ahead(walk_.next_rows->k, problem_.k.head_stride, head * count, padded, 1, k, next);
    if (problem_.head_dim % kWidth != 0) pad_rows(padded, k, v);
    for (int64_t j = 0; j < count; j += kLanes) {
      for (int64_t r = 0; r < n; r += kGemvRows) {
        QkTable<>::kTable[min(kGemvRows, n - r) - 1](
            k + j, (r == 0 ? next : k) + j, min(kLanes, count - j),
            scratch_.q_rows + (state + r) * scratch_.q_stride, scratch_.q_stride, scratch_.q_stride,
            problem_.scale_log2, scratch_.s + r * kGemvBlock + j, kGemvBlock);
      }
    }
    for (int64_t i = 0; i < n; ++i) scratch_.limits[i] = static_cast<int32_t>(count);
    if (block.masked) walk_.find_limits(block);
    for (int64_t r = 0; r < n; ++r) {
      softmax_row<Units>(scratch_.s + r * kGemvBlock, count, scratch_.limits[r],
                         scratch_.pairs + r * kGemvBlock, scratch_.m[state + r],
                         scratch_.l[state + r], scratch_.alpha[r]);
    }
    const int64_t width = kGemvColumns * kLanes;
    const int64_t parts = (problem_.head_dim + width - 1) / width;
    for (int64_t part = 0; part < parts; ++part) {
      find_ahead(walk_.next_rows->v, problem_.v.head_stride, (head * parts + part) * count, padded,
                 parts, v, next);
      // Rows that see the same tokens go together, up to kGemvRows.
      for (int64_t r = 0, end; r < n; r = end) {
        for (end = r + 1; end < min(n, r + kGemvRows); ++end) {
          if (scratch_.limits[end] != scratch_.limits[r]) break;
        }
        const int64_t stop = min(problem_.head_dim, (part + 1) * width);
        for (int64_t c = part * width; c < stop;) {
          const int64_t vectors = (stop - c + kLanes - 1) / kLanes;
          const int wide = vectors >= kGemvColumns ? kGemvColumns : vectors >= 2 ? 2 : 1;
          pv(static_cast<int>(end - r), wide, r, v, r == 0 ? next : v, c, scratch_.limits[r],
             scratch_.o + (state + r) * scratch_.o_stride + c);
          c += max(wide, Units::kPerUnit) * kLanes;
        }
      }
    }
  }

 private:
  static constexpr int64_t kWidth = kLanes * Units::kPerUnit;  // elements of a vector of units

  // What to prefetch while padded rows of this block are read: from `position` on, the next block's
  // pieces in the order of memory, each row being `parts` pieces, the item's heads of a token in
  // turn. The kernels prefetch a line for each they read; past the next block's end their own.
  void find_ahead(const T* const* rows, int64_t head_stride, int64_t position, int64_t padded,
                  int64_t parts, const T* const* own, const T** ahead) const {
    const int64_t width = kGemvColumns * kLanes;
    int64_t part = position % parts, head = position / parts % walk_.num_heads;
    int64_t j = 0, token = position / parts / walk_.num_heads;
    for (; j < padded && token < walk_.next_count; ++token, head = 0) {
      const T* row = rows[token] + head * head_stride;
      for (; j < padded && head < walk_.num_heads; ++head, row += head_stride, part = 0) {
        for (; j < padded && part < parts; ++part) ahead[j++] = row + part * width;
      }
    }
    for (; j < padded; ++j) ahead[j] = own[j];
  }

  // Rows that are no whole number of vectors are copied and padded with zeros.
  void pad_rows(int64_t count, const T** k, const T** v) {
    const int64_t head_dim = problem_.head_dim, stride = round_up(head_dim, kWidth);
    const auto pad = [&](const T** rows, T* to) {
      for (int64_t j = 0; j < count; ++j, to += stride) {
        memcpy(to, rows[j], head_dim * sizeof(T));
        memset(to + head_dim, 0, (stride - head_dim) * sizeof(T));
        rows[j] = to;
      }
    };
    pad(k, reinterpret_cast<T*>(scratch_.k));
    pad(v, reinterpret_cast<T*>(scratch_.v));
  }

  using QkKernel = void (*)(const T* const*, const T* const*, int64_t, const float*, int64_t,
                            int64_t, float, float*, int64_t);
  template <typename Rows = typename MakeIndices<kGemvRows>::type>
  struct QkTable;
  template <int... I>
  struct QkTable<Indices<I...>> {
    static constexpr QkKernel kTable[] = {gemv_qk<Units, T, I + 1>...};
  };

  template <int N>
  struct Constant {
    static constexpr int value = N;
  };

  // Rows [r, r + rows) of the block, `columns` vectors of head_dim from c on, tokens [0, n).
  template <int R = kGemvRows>
  void pv(int rows, int columns, int64_t r, const T* const* v, const T* const* next, int64_t c,
          int64_t n, float* o) {
    if constexpr (R > 1) {
      if (rows < R) return pv<R - 1>(rows, columns, r, v, next, c, n, o);
    }
    const auto call = [&](auto tag) {
      constexpr int C = decltype(tag)::value;
      if constexpr (Units::kPerUnit == 2) {
        gemv_pv_pairs < R, C<2 ? 2 : C>(scratch_.pairs + r * kGemvBlock, kGemvBlock, v, next, c, n,
                                        scratch_.alpha + r, o, scratch_.o_stride);
      } else {
        gemv_pv<T, R, C>(scratch_.s + r * kGemvBlock, kGemvBlock, v, next, c, n, scratch_.alpha + r,
                         o, scratch_.o_stride);
      }
    };
    if (columns == kGemvColumns) {
      call(Constant<kGemvColumns>{});
    } else if (columns == 2) {
      call(Constant<2>{});
    } else {
      call(Constant<1>{});
    }
  }

  UnitWalk<T, Units>& walk_;
  const AttentionProblem& problem_;
  Scratch<T, Units>& scratch_;
};

}  // namespace
}  // namespace flashinfer_ops
