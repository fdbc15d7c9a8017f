"""The kernels that merge attention states: (v, s) with a base-2 log-sum-exp s, or (o, m, d).

    s = log2(sum_k 2^s_k)            v = sum_k 2^(s_k - s) v_k
    m = max_k m_k    d = sum_k d_k 2^(m_k - m)    o = sum_k d_k 2^(m_k - m) o_k / d

v, o: [n, h, head_dim], any token and head strides; s, m, d: [n, h], read in any floating dtype,
computed in float32. A row is one (token, head) pair; a program has BLOCK_ROWS consecutive rows, a
one-dimensional grid all of them, and columns come BLOCK_D at a time. An empty state (s = -inf;
d = 0 or m = -inf) has weight zero, and what has weight zero is selected out, not multiplied, so
that its NaN or inf cannot leak. All states empty: v = 0, s = -inf (m = -inf, d = 0).

`strides` is None where every tensor is contiguous: rows are then numbered through, and the launch
has no more arguments than it needs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _max_nan(a, b):
    """The larger one; NaN wins, so that it comes out."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _relative_weight(x, largest):
    """2^(x - largest) without inf - inf: the largest has weight 1, also when it is infinite."""
    return tl.where(x == largest, 1.0, tl.exp2(x - largest))


@triton.jit
def _lse_weight(s, largest):
    """The same, and 0 for an empty state also where the largest is empty."""
    return tl.where(s == float("-inf"), 0.0, _relative_weight(s, largest))


@triton.jit
def _weighed(weight, v):
    return tl.where(weight == 0, 0.0, weight * v)


@triton.jit
def _rows(num_rows, BLOCK_ROWS: tl.constexpr):
    """This program's rows, in 64 bits where their number needs them: division is dearer there."""
    first = tl.program_id(0).to(num_rows.dtype) * BLOCK_ROWS
    return first + tl.arange(0, BLOCK_ROWS)


@triton.jit
def _offset(row, num_heads, strides, at: tl.constexpr, width: tl.constexpr):
    """Where each row starts, its strides being strides[at] and strides[at + 1]."""
    if strides is None:
        return row.to(tl.int64) * width
    else:
        token, head = (row // num_heads).to(tl.int64), (row % num_heads).to(tl.int64)
        return token * strides[at] + head * strides[at + 1]


# merge_state, merge_state.omd, merge_state_, merge_state_.omd: the pointers d_out, d_a and d_b are
# None for (v, s) states. strides: of the mask, then two for each of o_out, o_a, o_b, m_out, m_a,
# m_b and, for (o, m, d) states, d_out, d_a, d_b.
@triton.jit(do_not_specialize=["num_rows"])
def merge_pair_kernel(
    o_out,
    m_out,
    d_out,
    o_a,
    m_a,
    d_a,
    o_b,
    m_b,
    d_b,
    mask,
    strides,
    num_rows,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    row = _rows(num_rows, BLOCK_ROWS)
    live = row < num_rows
    if mask is not None:
        token = (row // num_heads).to(tl.int64)
        if strides is not None:
            token *= strides[0]
        live = live & (tl.load(mask + token, mask=live, other=0) != 0)

    # Rows that are not live read as empty states and are not written.
    largest_a = tl.load(
        m_a + _offset(row, num_heads, strides, 9, 1), mask=live, other=float("-inf")
    ).to(tl.float32)
    largest_b = tl.load(
        m_b + _offset(row, num_heads, strides, 11, 1), mask=live, other=float("-inf")
    ).to(tl.float32)
    if d_out is None:
        largest = _max_nan(largest_a, largest_b)
        weight_a = _lse_weight(largest_a, largest)
        weight_b = _lse_weight(largest_b, largest)
        total = weight_a + weight_b
        scale = 1.0 / tl.where(largest == float("-inf"), 1.0, total)
    else:
        den_a = tl.load(d_a + _offset(row, num_heads, strides, 15, 1), mask=live, other=0.0)
        den_b = tl.load(d_b + _offset(row, num_heads, strides, 17, 1), mask=live, other=0.0)
        den_a, den_b = den_a.to(tl.float32), den_b.to(tl.float32)
        empty_a = (den_a == 0) | (largest_a == float("-inf"))
        empty_b = (den_b == 0) | (largest_b == float("-inf"))
        largest = _max_nan(
            tl.where(empty_a, float("-inf"), largest_a), tl.where(empty_b, float("-inf"), largest_b)
        )
        weight_a = tl.where(empty_a, 0.0, den_a * _relative_weight(largest_a, largest))
        weight_b = tl.where(empty_b, 0.0, den_b * _relative_weight(largest_b, largest))
        total = weight_a + weight_b
        scale = 1.0 / tl.where(empty_a & empty_b, 1.0, total)
    weight_a = (weight_a * scale)[:, None]
    weight_b = (weight_b * scale)[:, None]

    at_a = o_a + _offset(row, num_heads, strides, 3, HEAD_DIM)[:, None]
    at_b = o_b + _offset(row, num_heads, strides, 5, HEAD_DIM)[:, None]
    at_out = o_out + _offset(row, num_heads, strides, 1, HEAD_DIM)[:, None]
    for start in range(0, HEAD_DIM, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)[None, :]
        keep = live[:, None] & (col < HEAD_DIM)
        a = tl.load(at_a + col, mask=keep, other=0.0).to(tl.float32)
        b = tl.load(at_b + col, mask=keep, other=0.0).to(tl.float32)
        if IN_PLACE:
            # Threads may hold copies of one element: all have read before one of them writes.
            tl.debug_barrier()
        o = _weighed(weight_a, a) + _weighed(weight_b, b)
        tl.store(at_out + col, o.to(o_out.dtype.element_ty), mask=keep)

    at_m = m_out + _offset(row, num_heads, strides, 7, 1)
    if d_out is None:
        tl.store(at_m, largest + tl.log2(total), mask=live)
    else:
        tl.store(at_m, largest, mask=live)
        tl.store(d_out + _offset(row, num_heads, strides, 13, 1), total, mask=live)


# merge_states and merge_states.ragged. The states of a row are dealt to BLOCK_K lanes, and each
# lane keeps its own running maximum, so that nothing in the loop crosses threads and the next
# loads wait for nothing; the lanes are merged at the end. strides: token, state and head of v, then
# of s; those of the tokens are not used where indptr says which states a token has.
@triton.jit(do_not_specialize=["num_rows"])
def merge_many_kernel(
    v_out,
    s_out,
    v,
    s,
    indptr,
    strides,
    num_rows,
    num_heads,
    num_states,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = _rows(num_rows, BLOCK_ROWS)
    live = row < num_rows
    token, head = (row // num_heads).to(tl.int64), (row % num_heads).to(tl.int64)
    if indptr is None:
        first = token * num_states
        count = tl.where(live, num_states, 0)
        most = num_states
    else:
        # Not validated, for that would need the host: clamped to what there is.
        first = tl.maximum(tl.load(indptr + token, mask=live, other=0).to(tl.int64), 0)
        end = tl.load(indptr + token + 1, mask=live, other=0).to(tl.int64)
        count = tl.minimum(end, num_states) - first
        most = tl.max(count, 0)
    if strides is None:
        v_state = num_heads.to(tl.int64) * HEAD_DIM
        s_state = num_heads.to(tl.int64)
        at_v = v + first * v_state + head * HEAD_DIM
        at_s = s + first * s_state + head
    else:
        v_state, s_state = strides[1], strides[4]
        if indptr is None:
            at_v = v + token * strides[0] + head * strides[2]
            at_s = s + token * strides[3] + head * strides[5]
        else:
            at_v = v + first * v_state + head * strides[2]
            at_s = s + first * s_state + head * strides[5]

    lane = tl.arange(0, BLOCK_K)
    out = v_out + (row.to(tl.int64) * HEAD_DIM)[:, None]
    for start in range(0, max(HEAD_DIM, 1), BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        # Lanes first: threads and warps are dealt to columns, then rows, then lanes, so that with
        # enough rows a thread has all lanes of its elements.
        largest = tl.full([BLOCK_K, BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_K, BLOCK_ROWS], tl.float32)
        acc = tl.zeros([BLOCK_K, BLOCK_ROWS, BLOCK_D], tl.float32)
        for k in tl.range(0, most, BLOCK_K, num_stages=STAGES):
            state = (k + lane).to(tl.int64)[:, None]
            here = state < count[None, :]
            lse = tl.load(at_s[None, :] + state * s_state, mask=here, other=float("-inf"))
            lse = lse.to(tl.float32)
            at = (at_v[None, :] + state * v_state)[:, :, None] + col[None, None, :]
            keep = here[:, :, None] & (col < HEAD_DIM)[None, None, :]
            term = tl.load(at, mask=keep, other=0.0).to(tl.float32)
            before, largest = largest, _max_nan(largest, lse)
            kept = _relative_weight(before, largest)
            weight = _lse_weight(lse, largest)
            total = total * kept + weight
            acc = _weighed(kept[:, :, None], acc) + _weighed(weight[:, :, None], term)
        all_largest = tl.max(largest, 0)
        kept = _relative_weight(largest, all_largest[None, :])
        all_total = tl.sum(total * kept, 0)
        scale = kept / tl.where(all_total == 0, 1.0, all_total)[None, :]
        merged = tl.sum(_weighed(scale[:, :, None], acc), 0)
        keep = live[:, None] & (col < HEAD_DIM)[None, :]
        tl.store(out + col[None, :], merged.to(v_out.dtype.element_ty), mask=keep)
        if start == 0:
            tl.store(s_out + row, all_largest + tl.log2(all_total), mask=live)


# merge_states.list: v and s are tuples of pointers. strides: two of v and two of s for each state.
@triton.jit(do_not_specialize=["num_rows"])
def merge_list_kernel(
    v_out,
    s_out,
    v,
    s,
    strides,
    num_rows,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = _rows(num_rows, BLOCK_ROWS)
    live = row < num_rows
    out = v_out + (row.to(tl.int64) * HEAD_DIM)[:, None]
    for start in range(0, max(HEAD_DIM, 1), BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)[None, :]
        keep = live[:, None] & (col < HEAD_DIM)
        largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
        for i in tl.static_range(len(v)):
            at_s = s[i] + _offset(row, num_heads, strides, 4 * i + 2, 1)
            at_v = v[i] + _offset(row, num_heads, strides, 4 * i, HEAD_DIM)[:, None]
            lse = tl.load(at_s, mask=live, other=float("-inf")).to(tl.float32)
            term = tl.load(at_v + col, mask=keep, other=0.0).to(tl.float32)
            before, largest = largest, _max_nan(largest, lse)
            kept = _relative_weight(before, largest)
            weight = _lse_weight(lse, largest)
            total = total * kept + weight
            acc = _weighed(kept[:, None], acc) + _weighed(weight[:, None], term)
        scale = 1.0 / tl.where(total == 0, 1.0, total)
        merged = (acc * scale[:, None]).to(v_out.dtype.element_ty)
        tl.store(out + col, merged, mask=keep)
        if start == 0:
            tl.store(s_out + row, largest + tl.log2(total), mask=live)
