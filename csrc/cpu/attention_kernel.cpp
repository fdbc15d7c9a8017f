// The compute kernel of cascade_attention on the CPU, compiled once per instruction set.
//
//   out[t, h] = v_scale * sum_j P[j] V[j],  P = softmax_j(sm_scale * Q[t, h] . K[j])
//   lse[t, h] = log2(sum_j exp(sm_scale * Q[t, h] . K[j]))
//
// q, out [tokens, num_qo_heads, head_dim], lse [tokens, num_qo_heads], k and v [pages, page_size,
// num_kv_heads, head_dim]; accumulation in float32. One call serves one (work unit, KV head): its
// packed rows, kMaxRows at a time, walk the unit's KV segments in blocks of tokens. Segments that
// many packed rows see take the dense path, the others gemv (attention_matmul.h). While one block
// is computed the next one, of whichever segment, is prefetched.
//
// bfloat16 is multiplied by the bfloat16 dot product where there is one; everywhere else 16-bit
// elements become float32 as they are read.
//
// What a row must not see never reaches it, NaN and infinity included: padding slots of a page are
// not read; rows outside a segment's row range are not computed; of a causal segment's block the
// rows that see none of it are left out; hidden logits are replaced, not added to; and the weight 0
// of a hidden token does not meet its V: gemv stops each row at its own last token, dense, which
// cannot, looks for a V that is not finite in the diagonal blocks and goes row by row if it finds
// one.
//
// Empty state (no token seen, or only logits of -inf): out 0, lse -inf.
#include "cpu/attention_kernel.h"

#include "cpu/attention_matmul.h"
#include "cpu/attention_simd.h"
#include "cpu/attention_softmax.h"

namespace flashinfer_ops {
namespace {

constexpr int64_t kMaxRows = 128;     // packed rows of one pass over the KV
constexpr int64_t kDenseBlock = 128;  // KV tokens of a block
constexpr int64_t kGemvBlock = 64;
// Odd numbers of cache lines, so that a column spreads over all sets of L1.
constexpr int64_t kRowStride = kMaxRows + kLine;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out pieces of the scratch memory; with base null it only counts.
struct Arena {
  char* base;
  int64_t size = 0;

  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + size);
    size += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
};

// The K and V rows of a block of tokens.
template <typename T>
struct RowPointers {
  const T* k[kDenseBlock];
  const T* v[kDenseBlock];
};

template <typename T, typename Units>
struct Scratch {
  explicit Scratch(const AttentionProblem& problem, void* memory) {
    Arena arena{static_cast<char*>(memory)};
    depth = (problem.head_dim + Units::kPerUnit - 1) / Units::kPerUnit;
    q_stride = round_up(depth, kLanes);
    o_stride = round_up(problem.head_dim, kPanel);
    line_stride = kDenseBlock * kLine;
    q_rows = arena.take<float>(kMaxRows * q_stride);
    q_columns = arena.take<float>(depth * kRowStride + kPanel);
    o = arena.take<float>(kMaxRows * o_stride);
    m = arena.take<float>(kRowStride);
    l = arena.take<float>(kRowStride);
    alpha = arena.take<float>(kRowStride);
    limits = arena.take<int32_t>(kRowStride + kPanel);
    k = arena.take<float>(round_up(depth, kLine) * kDenseBlock);
    v = arena.take<float>(o_stride * kDenseBlock);
    s = arena.take<float>(kDenseBlock * kRowStride + kPanel);
    pairs = arena.take<uint16_t>(kMaxGemvRows * kGemvBlock);
    pointers = arena.take<RowPointers<T>>(2);
    bytes = arena.size;
  }

  int64_t depth;        // head_dim in units
  int64_t q_stride;     // of q_rows
  int64_t o_stride;     // head_dim in whole V panels
  int64_t line_stride;  // of K panels
  float* q_rows;        // [kMaxRows][q_stride] units, zero past depth
  float* q_columns;     // [depth][kRowStride] units
  float* o;             // [kMaxRows][o_stride]
  float* m;             // [kMaxRows] running maximum of the logits, base 2
  float* l;             // [kMaxRows] sum of 2^(logit - m)
  float* alpha;
  int32_t* limits;  // tokens of the block that a row sees
  float* k;         // dense: [lines][kDenseBlock][kLine] units
  float* v;         // dense: [panels][kDenseBlock / kPerUnit][kPanel] units
  float* s;         // dense: [kDenseBlock][kRowStride], gemv: [kMaxGemvRows][kGemvBlock]
  uint16_t* pairs;  // gemv: [kMaxGemvRows][kGemvBlock] weights in bfloat16
  RowPointers<T>* pointers;
  int64_t bytes;
};

// Consecutive KV tokens of one segment and the packed rows of this pass that see any of them.
struct Block {
  const Segment* segment;
  int64_t kv_begin;
  int64_t count;
  int64_t row_begin;
  int64_t row_end;
  bool dense;
  bool masked;  // some of the rows do not see all of the tokens
};

template <typename T, typename Units>
class UnitPass {
 public:
  UnitPass(const AttentionProblem& problem, const AttentionItem& item, void* memory)
      : problem_(problem),
        unit_(problem.units[item.unit]),
        tile_(problem.tiles[unit_.tile]),
        kv_head_(item.kv_head_begin),
        num_heads_(item.kv_head_end - item.kv_head_begin),
        group_(problem.num_qo_heads / problem.num_kv_heads),
        scratch_(problem, memory) {}

  void run() {
    const int64_t rows = (tile_.row_end - tile_.row_begin) * group_;
    max_rows_ = kMaxRows / num_heads_;
    if (max_rows_ > group_) max_rows_ -= max_rows_ % group_;  // no token in two passes
    for (pass_begin_ = 0; pass_begin_ < rows; pass_begin_ += max_rows_) {
      rows_ = min(max_rows_, rows - pass_begin_);
      begin_pass();
      Block block, next;
      bool more = next_block(&block);
      RowPointers<T>*here = &scratch_.pointers[0], *there = &scratch_.pointers[1];
      if (more) locate(block, here);
      while (more) {
        more = next_block(&next);
        next_rows_ = there;
        next_count_ = more ? next.count : 0;
        next_position_ = 0;
        if (more) locate(next, there);
        if (block.dense) {
          run_dense(block, *here);
        } else {
          for (int64_t head = 0; head < num_heads_; ++head) run_gemv(block, *here, head);
        }
        block = next;
        RowPointers<T>* swap = here;
        here = there;
        there = swap;
      }
      for (int64_t head = 0; head < num_heads_; ++head) {
        for (int64_t i = 0; i < rows_; ++i) finish_row(head, i);
      }
    }
  }

 private:
  int64_t token_of(int64_t row) const { return tile_.row_begin + (pass_begin_ + row) / group_; }
  int64_t qo_head_of(int64_t head, int64_t row) const {
    return (kv_head_ + head) * group_ + (pass_begin_ + row) % group_;
  }

  void begin_pass() {
    const int64_t head_dim = problem_.head_dim;
    for (int64_t head = 0; head < num_heads_; ++head) {
      for (int64_t i = 0; i < rows_; ++i) {
        const int64_t state = head * max_rows_ + i;
        const T* q = static_cast<const T*>(problem_.q) + token_of(i) * problem_.q_token_stride +
                     qo_head_of(head, i) * problem_.q_head_stride;
        float* row = scratch_.q_rows + state * scratch_.q_stride;
        for (int64_t u = 0; u < scratch_.q_stride; u += kLanes) {
          store(row + u, load_units_first(q, u, head_dim));
        }
        scratch_.m[state] = -kInfinity;
        scratch_.l[state] = 0.0f;
        memset(scratch_.o + state * scratch_.o_stride, 0, scratch_.o_stride * sizeof(float));
      }
    }
    has_columns_ = false;
    segment_ = unit_.segment_begin;
    position_ = -1;
  }

  // The next block of this pass, in the order of the segments.
  bool next_block(Block* block) {
    for (; segment_ < unit_.segment_end; ++segment_, position_ = -1) {
      const Segment& segment = problem_.segments[segment_];
      const int64_t first = (segment.row_begin - tile_.row_begin) * group_ - pass_begin_;
      const int64_t last = (segment.row_end - tile_.row_begin) * group_ - pass_begin_;
      block->row_begin = max(first, 0);
      block->row_end = min(last, rows_);
      if (block->row_begin >= block->row_end) continue;
      const bool causal = segment.diagonal != kNoDiagonal;
      int64_t kv_end = segment.kv_end;
      if (causal) kv_end = min(kv_end, token_of(block->row_end - 1) + segment.diagonal + 1);
      block->dense = block->row_end - block->row_begin > kMaxGemvRows;
      if (position_ < 0) {
        position_ = segment.kv_begin;
        if (position_ >= kv_end) continue;
        const int64_t limit = block->dense ? kDenseBlock : kGemvBlock;
        const int64_t blocks = (kv_end - position_ + limit - 1) / limit;
        step_ = round_up((kv_end - position_ + blocks - 1) / blocks, 8);
      }
      if (position_ >= kv_end) continue;
      block->segment = &segment;
      block->kv_begin = position_;
      block->count = min(step_, kv_end - position_);
      block->masked = false;
      if (causal) {
        const int64_t token = position_ - segment.diagonal;  // the first that sees any of it
        block->row_begin = max(block->row_begin, (token - tile_.row_begin) * group_ - pass_begin_);
        block->masked =
            token_of(block->row_begin) + segment.diagonal < position_ + block->count - 1;
      }
      position_ += block->count;
      return true;
    }
    return false;
  }

  void locate(const Block& block, RowPointers<T>* rows) const {
    const int64_t page_size = problem_.page_size;
    const T* k = static_cast<const T*>(problem_.k.data) + kv_head_ * problem_.k.head_stride;
    const T* v = static_cast<const T*>(problem_.v.data) + kv_head_ * problem_.v.head_stride;
    const int32_t* pages = problem_.kv_indices[block.segment->level] + block.segment->page_begin;
    int64_t index = block.kv_begin / page_size, slot = block.kv_begin % page_size;
    for (int64_t j = 0; j < block.count; ++index, slot = 0) {
      const int64_t page = pages[index];
      const T* k_row = k + page * problem_.k.page_stride + slot * problem_.k.slot_stride;
      const T* v_row = v + page * problem_.v.page_stride + slot * problem_.v.slot_stride;
      const int64_t end = min(block.count, j + page_size - slot);
      for (; j < end; ++j) {
        rows->k[j] = k_row;
        rows->v[j] = v_row;
        k_row += problem_.k.slot_stride;
        v_row += problem_.v.slot_stride;
      }
    }
  }

  void prefetch_next(int64_t tokens) {
    const int64_t bytes = problem_.head_dim * static_cast<int64_t>(sizeof(T));
    const int64_t end = min(next_count_, next_position_ + tokens);
    for (; next_position_ < end; ++next_position_) {
      const char* k = reinterpret_cast<const char*>(next_rows_->k[next_position_]);
      const char* v = reinterpret_cast<const char*>(next_rows_->v[next_position_]);
      for (int64_t i = 0; i < bytes; i += 64) {
        prefetch(k + i);
        prefetch(v + i);
      }
    }
  }

  // kLanes units of a row of head_dim elements, from unit u on, zeros past its end.
  static Vec load_units_first(const T* row, int64_t u, int64_t head_dim) {
    const int64_t element = u * Units::kPerUnit, left = head_dim - element;
    if (left >= kLanes * Units::kPerUnit) return load_units<Units>(row + element);
    T buffer[kLanes * Units::kPerUnit] = {};
    if (left > 0) memcpy(buffer, row + element, left * sizeof(T));
    return load_units<Units>(buffer);
  }

  // --- dense -------------------------------------------------------------------------------------

  void transpose_q() {
    for (int64_t i = 0; i < rows_; ++i) {
      const float* row = scratch_.q_rows + i * scratch_.q_stride;
      for (int64_t d = 0; d < scratch_.depth; ++d) scratch_.q_columns[d * kRowStride + i] = row[d];
    }
    for (int64_t d = 0; d < scratch_.depth; ++d) {
      memset(scratch_.q_columns + d * kRowStride + rows_, 0, (kRowStride - rows_) * sizeof(float));
    }
    has_columns_ = true;
  }

  void gather_k(const T* const* k, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t u = 0; u < scratch_.depth; u += kLanes) {
        store(scratch_.k + u / kLine * scratch_.line_stride + j * kLine + u % kLine,
              load_units_first(k[j], u, problem_.head_dim));
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
          const Vec a = load_units_first(v[j], u, head_dim);
          const Vec b = j + 1 < count ? load_units_first(v[j + 1], u, head_dim) : Vec{};
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
          store(to, load_units_first(v[j], c, head_dim));
          store(to + kLanes, load_units_first(v[j], c + kLanes, head_dim));
        }
      }
    }
  }

  void run_dense(const Block& block, const RowPointers<T>& rows) {
    if (!has_columns_) transpose_q();
    gather_k(rows.k, block.count);
    gather_v(rows.v, block.count);
    if (block.masked) find_limits(block);
    const int64_t n = block.row_end - block.row_begin;
    const int64_t pieces = (block.count + kDenseRows - 1) / kDenseRows;
    const int64_t columns = (n + kPanel - 1) / kPanel;
    const int64_t ahead = (next_count_ + pieces * columns - 1) / (pieces * columns);
    const Vec scale = splat(problem_.scale_log2);
    for (int64_t c = 0; c < n; c += kPanel) {
      const bool wide = n - c > kLanes;
      const auto* table = wide ? DenseTable<Units, 2>::qk : DenseTable<Units, 1>::qk;
      for_balanced(block.count, [&](int64_t j, int64_t tokens) {
        prefetch_next(ahead);
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

  // limits[i] for the block's rows, from its first on.
  void find_limits(const Block& block) {
    for (int64_t i = 0; block.row_begin + i < block.row_end; ++i) {
      const int64_t visible =
          token_of(block.row_begin + i) + block.segment->diagonal + 1 - block.kv_begin;
      scratch_.limits[i] = static_cast<int32_t>(max(0, min(visible, block.count)));
    }
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

  // --- gemv --------------------------------------------------------------------------------------

  void run_gemv(const Block& block, const RowPointers<T>& located, int64_t head) {
    constexpr int64_t kWidth = kLanes * Units::kPerUnit;
    const int64_t n = block.row_end - block.row_begin, count = block.count;
    const int64_t padded = round_up(count, kLanes);
    const int64_t state = head * max_rows_ + block.row_begin;
    const T *k[kGemvBlock], *v[kGemvBlock], *next_k[kGemvBlock], *next_v[kGemvBlock];
    // For each row of this block one of the next block is prefetched, all heads of a token in turn.
    int64_t ahead_token = head * count / num_heads_, ahead_head = head * count % num_heads_;
    for (int64_t j = 0; j < padded; ++j) {
      k[j] = located.k[min(j, count - 1)] + head * problem_.k.head_stride;
      v[j] = located.v[min(j, count - 1)] + head * problem_.v.head_stride;
      const bool any = j < count && ahead_token < next_count_;
      next_k[j] = any ? next_rows_->k[ahead_token] + ahead_head * problem_.k.head_stride : k[j];
      next_v[j] = any ? next_rows_->v[ahead_token] + ahead_head * problem_.v.head_stride : v[j];
      if (++ahead_head == num_heads_) ahead_head = 0, ++ahead_token;
    }
    if (problem_.head_dim % kWidth != 0) {
      // Rows that are no whole number of vectors are first copied and padded with zeros.
      const int64_t stride = round_up(problem_.head_dim, kWidth);
      T *k_copy = reinterpret_cast<T*>(scratch_.k), *v_copy = reinterpret_cast<T*>(scratch_.v);
      for (int64_t j = 0; j < padded; ++j, k_copy += stride, v_copy += stride) {
        memcpy(k_copy, k[j], problem_.head_dim * sizeof(T));
        memset(k_copy + problem_.head_dim, 0, (stride - problem_.head_dim) * sizeof(T));
        k[j] = k_copy;
        memcpy(v_copy, v[j], problem_.head_dim * sizeof(T));
        memset(v_copy + problem_.head_dim, 0, (stride - problem_.head_dim) * sizeof(T));
        v[j] = v_copy;
      }
    }
    for (int64_t j = 0; j < padded; j += kLanes) {
      for (int64_t r = 0; r < n; r += kGemvRows) {
        qk_table<>::kTable[min(kGemvRows, n - r) - 1](
            k + j, (r == 0 ? next_k : k) + j, kLanes,
            scratch_.q_rows + (state + r) * scratch_.q_stride, scratch_.q_stride, scratch_.q_stride,
            problem_.scale_log2, scratch_.s + r * kGemvBlock + j, kGemvBlock);
      }
    }
    for (int64_t i = 0; i < n; ++i) scratch_.limits[i] = static_cast<int32_t>(count);
    if (block.masked) find_limits(block);
    for (int64_t r = 0; r < n; ++r) {
      softmax_row<Units>(scratch_.s + r * kGemvBlock, count, scratch_.limits[r],
                         scratch_.pairs + r * kGemvBlock, scratch_.m[state + r],
                         scratch_.l[state + r], scratch_.alpha[r]);
    }
    // Rows that see the same tokens go together, up to kGemvRows.
    for (int64_t r = 0, end; r < n; r = end) {
      for (end = r + 1; end < min(n, r + kGemvRows); ++end) {
        if (scratch_.limits[end] != scratch_.limits[r]) break;
      }
      float* o = scratch_.o + (state + r) * scratch_.o_stride;
      for (int64_t c = 0; c < problem_.head_dim;) {
        const int64_t vectors = (problem_.head_dim - c + kLanes - 1) / kLanes;
        const int wide = vectors >= kGemvColumns ? kGemvColumns : vectors >= 2 ? 2 : 1;
        pv(static_cast<int>(end - r), wide, r, v, r == 0 ? next_v : v, c, scratch_.limits[r],
           o + c);
        c += max(wide, Units::kPerUnit) * kLanes;
      }
    }
  }

  using QkKernel = void (*)(const T* const*, const T* const*, int64_t, const float*, int64_t,
                            int64_t, float, float*, int64_t);
  template <typename Rows = typename MakeIndices<kGemvRows>::type>
  struct qk_table;
  template <int... I>
  struct qk_table<Indices<I...>> {
    static constexpr QkKernel kTable[] = {gemv_qk<Units, T, I + 1>...};
  };

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

  template <int N>
  struct Constant {
    static constexpr int value = N;
  };

  // --- results -----------------------------------------------------------------------------------

  void finish_row(int64_t kv_head, int64_t i) {
    const int64_t state = kv_head * max_rows_ + i;
    const float l = scratch_.l[state];
    const float lse = l == 0.0f ? -kInfinity : scratch_.m[state] + __builtin_log2f(l);
    const float scale = l == 0.0f ? 0.0f : 1.0f / l;
    const float* o = scratch_.o + state * scratch_.o_stride;
    const int64_t token = token_of(i), head = qo_head_of(kv_head, i);
    if (unit_.partial_row >= 0) {
      const int64_t row =
          (unit_.partial_row + token - tile_.row_begin) * problem_.num_qo_heads + head;
      problem_.partial_lse[row] = lse;
      write_row(problem_.partial_out + row * problem_.head_dim, o, scale, l == 0.0f);
    } else {
      problem_.lse[token * problem_.lse_token_stride + head * problem_.lse_head_stride] = lse;
      write_row(static_cast<T*>(problem_.out) + token * problem_.out_token_stride +
                    head * problem_.out_head_stride,
                o, scale * problem_.v_scale, l == 0.0f);
    }
  }

  // An empty row is written as zeros, whatever the product of its zero weights was.
  template <typename To>
  void write_row(To* to, const float* o, float scale, bool empty) {
    for (int64_t c = 0; c < problem_.head_dim; c += kLanes) {
      const Vec x = empty ? Vec{} : load(o + c) * splat(scale);
      store_first(to + c, x, problem_.head_dim - c);
    }
  }

  const AttentionProblem& problem_;
  const Unit unit_;
  const Tile tile_;
  const int64_t kv_head_;    // the first of num_heads_
  const int64_t num_heads_;  // 1 where a segment is dense
  const int64_t group_;
  Scratch<T, Units> scratch_;

  int64_t pass_begin_ = 0;  // first packed row of the tile in this pass
  int64_t max_rows_ = 0;    // of a pass; state of head h, row i is number h * max_rows_ + i
  int64_t rows_ = 0;        // of this pass
  bool has_columns_ = false;
  int64_t segment_ = 0;
  int64_t position_ = -1;  // next KV token of the segment, -1 before its first block
  int64_t step_ = 0;
  const RowPointers<T>* next_rows_ = nullptr;
  int64_t next_count_ = 0;
  int64_t next_position_ = 0;
};

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f(element type, unit type).
template <typename F>
void dispatch(ElementType type, const F& f) {
  switch (type) {
    case ElementType::kFloat32:
      return f(TypeTag<float>{}, FloatUnits{});
    case ElementType::kFloat16:
      return f(TypeTag<Float16>{}, FloatUnits{});
    case ElementType::kBFloat16:
      if constexpr (kHasBFloat16Dot) {
        return f(TypeTag<BFloat16>{}, PairUnits{});
      } else {
        return f(TypeTag<BFloat16>{}, FloatUnits{});
      }
  }
}

int64_t scratch_bytes(const AttentionProblem& problem) {
  int64_t bytes = 0;
  dispatch(problem.type, [&](auto tag, auto units) {
    bytes = Scratch<typename decltype(tag)::type, decltype(units)>(problem, nullptr).bytes;
  });
  return bytes;
}

void run_item(const AttentionProblem& problem, const AttentionItem& item, void* scratch) {
  dispatch(problem.type, [&](auto tag, auto units) {
    UnitPass<typename decltype(tag)::type, decltype(units)>(problem, item, scratch).run();
  });
}

// An empty partial is left out, not multiplied by 0.
void merge_token(const AttentionProblem& problem, int64_t tile_index, int64_t token) {
  const Tile& tile = problem.tiles[tile_index];
  const int64_t head_dim = problem.head_dim;
  dispatch(problem.type, [&](auto tag, auto) {
    using T = typename decltype(tag)::type;
    for (int64_t head = 0; head < problem.num_qo_heads; ++head) {
      const auto row = [&](int64_t unit) {
        return (problem.units[unit].partial_row + token - tile.row_begin) * problem.num_qo_heads +
               head;
      };
      float m = -kInfinity, l = 0.0f;
      for (int64_t u = tile.unit_begin; u < tile.unit_end; ++u) {
        const float lse = problem.partial_lse[row(u)];
        m = lse > m || lse != lse ? lse : m;
      }
      const bool empty = m == -kInfinity;
      const float shift = empty ? 0.0f : m;
      for (int64_t u = tile.unit_begin; u < tile.unit_end; ++u) {
        l += exp2_scalar(problem.partial_lse[row(u)] - shift);
      }
      T* out = static_cast<T*>(problem.out) + token * problem.out_token_stride +
               head * problem.out_head_stride;
      for (int64_t c = 0; c < head_dim; c += kLanes) {
        Vec sum = {};
        for (int64_t u = tile.unit_begin; u < tile.unit_end; ++u) {
          const float lse = problem.partial_lse[row(u)];
          if (lse == -kInfinity) continue;
          const Vec x = load_first(problem.partial_out + row(u) * head_dim + c, head_dim - c);
          sum += x * splat(exp2_scalar(lse - shift) * problem.v_scale / l);
        }
        store_first(out + c, sum, head_dim - c);
      }
      problem.lse[token * problem.lse_token_stride + head * problem.lse_head_stride] =
          empty ? -kInfinity : m + __builtin_log2f(l);
    }
  });
}

void clear_token(const AttentionProblem& problem, int64_t token) {
  const int64_t size = problem.type == ElementType::kFloat32 ? 4 : 2;
  for (int64_t head = 0; head < problem.num_qo_heads; ++head) {
    char* out = static_cast<char*>(problem.out) +
                (token * problem.out_token_stride + head * problem.out_head_stride) * size;
    memset(out, 0, problem.head_dim * size);
    problem.lse[token * problem.lse_token_stride + head * problem.lse_head_stride] = -kInfinity;
  }
}

}  // namespace

#if !defined(FLASHINFER_OPS_CAPABILITY)
#define FLASHINFER_OPS_CAPABILITY baseline
#endif
#define FLASHINFER_OPS_STRING_IMPL(x) #x
#define FLASHINFER_OPS_STRING(x) FLASHINFER_OPS_STRING_IMPL(x)

namespace FLASHINFER_OPS_CAPABILITY {
extern const AttentionKernel kAttentionKernel;
const AttentionKernel kAttentionKernel = {FLASHINFER_OPS_STRING(FLASHINFER_OPS_CAPABILITY),
                                          scratch_bytes, run_item, merge_token, clear_token};
}  // namespace FLASHINFER_OPS_CAPABILITY

}  // namespace flashinfer_ops
