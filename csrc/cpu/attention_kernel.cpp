// The compute kernel of cascade_attention on the CPU, compiled once per instruction set.
//
//   out[t, h] = v_scale * sum_j P[j] V[j],  P = softmax_j(sm_scale * Q[t, h] . K[j])
//   lse[t, h] = log2(sum_j exp(sm_scale * Q[t, h] . K[j]))
//
// q, out [tokens, num_qo_heads, head_dim], lse [tokens, num_qo_heads], k and v [pages, page_size,
// num_kv_heads, head_dim]; accumulation in float32. One call serves one item (attention_kernel.h):
// its packed rows walk the work unit's KV segments in blocks of tokens. Segments that
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

#include "cpu/attention_dense.h"
#include "cpu/attention_gemv.h"
#include "cpu/attention_simd.h"
#include "cpu/attention_walk.h"

namespace flashinfer_ops {
namespace {

template <typename T, typename Units>
class ItemRun {
 public:
  ItemRun(const AttentionProblem& problem, const AttentionItem& item,
          const AttentionItem* following, void* memory)
      : problem_(problem),
        following_(following),
        memory_(memory),
        walk_(problem, item, memory),
        scratch_(walk_.scratch) {}

  void run() {
    walk_.begin();
    run_blocks();
    for (int64_t head = 0; head < walk_.num_heads; ++head) {
      for (int64_t i = 0; i < walk_.rows; ++i) finish_row(head, i);
    }
  }

 private:
  void run_blocks() {
    DenseStep<T, Units> dense(walk_);
    GemvStep<T, Units> gemv(walk_);
    Block block, next;
    bool more = walk_.next_block(&block);
    RowPointers<T>*here = &scratch_.pointers[0], *there = &scratch_.pointers[1];
    if (more) walk_.locate(block, here);
    while (more) {
      more = walk_.next_block(&next);
      if (more) walk_.locate(next, there);
      walk_.next_rows = there;
      walk_.next_count = more ? next.count : locate_following(there);
      walk_.next_position = 0;
      if (block.dense) {
        dense.run(block, *here);
      } else {
        for (int64_t head = 0; head < walk_.num_heads; ++head) gemv.run(block, *here, head);
      }
      block = next;
      RowPointers<T>* const spare = here;
      here = there;
      there = spare;
    }
  }

  // After the last block the one to prefetch is the first of the following item. Returns its
  // tokens.
  int64_t locate_following(RowPointers<T>* rows) const {
    if (following_ == nullptr) return 0;
    UnitWalk<T, Units> ahead(problem_, *following_, memory_);
    Block block;
    if (ahead.num_heads != walk_.num_heads || !ahead.next_block(&block)) return 0;
    ahead.locate(block, rows);
    return block.count;
  }

  void finish_row(int64_t kv_head, int64_t i) {
    const int64_t state = kv_head * walk_.rows + i;
    const float l = scratch_.l[state];
    const float lse = l == 0.0f ? -kInfinity : scratch_.m[state] + __builtin_log2f(l);
    const float scale = l == 0.0f ? 0.0f : 1.0f / l;
    const float* o = scratch_.o + state * scratch_.o_stride;
    const int64_t token = walk_.token_of(i), head = walk_.qo_head_of(kv_head, i);
    if (walk_.unit.partial_row >= 0) {
      const int64_t row =
          (walk_.unit.partial_row + token - walk_.tile.row_begin) * problem_.num_qo_heads + head;
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
  const AttentionItem* const following_;
  void* const memory_;
  UnitWalk<T, Units> walk_;
  Scratch<T, Units>& scratch_;
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

void run_item(const AttentionProblem& problem, const AttentionItem& item,
              const AttentionItem* following, void* scratch) {
  dispatch(problem.type, [&](auto tag, auto units) {
    ItemRun<typename decltype(tag)::type, decltype(units)>(problem, item, following, scratch).run();
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
