"""Forward kernel in Triton: a program owns one tile of queries of one head.

It visits the tiles of keys in the order of the block lists, keeps the running maximum ``m`` (in
units of log 2), the sum ``l`` and the accumulator (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao
et al. 2022, arXiv 2205.14135), and evaluates the mask on partial tiles only.

This module needs triton: import it where a kernel is launched.
"""

# Inside triton.jit nothing has a type that a checker can follow.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl

from attnlab.ops.attention.triton_tiles import (
    base_of,
    capped,
    load_tile,
    place_of,
    run_of,
    run_range,
    store_tile,
    visible,
)

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1e30)  # below every logit; finite, so that differences are not NaN


@triton.jit
def _add_tiles(
    acc, m, l, q, k, v, rows, runs, low, high, q_segments, k_positions, k_segments, b, row,
    T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, CLAUSES: tl.constexpr, FLAGS: tl.constexpr,
    PLACES: tl.constexpr, ROWS_STRIDE: tl.constexpr, RUNS_STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
):
    """``(acc, m, l)`` with the tiles of one kind of a row."""
    uneven: tl.constexpr = MASKED and S % BLOCK_K != 0
    unit: tl.constexpr = (1.0 if CAP > 0 else SCALE) * LOG2E
    start, end = run_range(rows, b, row, ROWS_STRIDE)
    for e in range(start, end):
        first, last = run_of(runs, b, e, RUNS_STRIDE)
        for j in range(first, last):
            k0 = j * BLOCK_K
            keys = load_tile(k, k0, S, H, K * H, BLOCK_K, BLOCK_H, uneven)
            s = tl.dot(q, tl.trans(keys))
            if CAP > 0:
                s, _ = capped(s, SCALE, CAP)
            if MASKED:
                q_at = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
                k_at = k0 + tl.arange(0, BLOCK_K)
                seen = visible(
                    low, high, q_segments, k_positions, k_segments, b, q_at, k_at, T, S, CLAUSES,
                    FLAGS, PLACES, False,
                )
                s = tl.where(seen, s, float("-inf"))
            # The unit is positive: it need not touch the tile before the one multiply-add here.
            top = tl.maximum(m, tl.max(s, 1) * unit)
            p = tl.exp2(s * unit - top[:, None])
            alpha = tl.exp2(m - top)
            l = l * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None]
            values = load_tile(v, k0, S, V, K * V, BLOCK_K, BLOCK_V, uneven)
            acc = tl.dot(p.to(values.dtype), values, acc)
            m = top
    return acc, m, l


@triton.jit
def attention_fwd(
    q, k, v, sink, order, full_rows, full_runs, partial_rows, partial_runs, low, high, q_segments,
    k_positions, k_segments, o, lse,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    V: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, CLAUSES: tl.constexpr,
    FLAGS: tl.constexpr, PLACES: tl.constexpr, ROWS_STRIDE: tl.constexpr,
    FULL_STRIDE: tl.constexpr, PARTIAL_STRIDE: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    SECTION: tl.constexpr,
):
    """``o[B, T, N, V]`` and fp32 ``lse[B, N, T]`` of ``q[B, T, N, H]``, ``k[B, S, K, H]``,
    ``v[B, S, K, V]``; a program an item of ``order.Items``.

    Args:
        sink: fp32 ``[N]``, -inf for none. order, ROWS, SECTION: see ``place_of``. full_rows, ...:
            see ``run_range``. low, ...: see ``visible``.
    """
    row, n, b = place_of(order, N, ROWS, SECTION)
    kv = n // (N // K)
    q_tile = load_tile(
        base_of(q, b, n, T, N, H), row * BLOCK_Q, T, H, N * H, BLOCK_Q, BLOCK_H, T % BLOCK_Q != 0
    )
    k, v = base_of(k, b, kv, S, K, H), base_of(v, b, kv, S, K, V)
    # The sink is one more key, with value zero.
    logit = tl.load(sink + n) * LOG2E
    m = tl.zeros([BLOCK_Q], tl.float32) + tl.maximum(logit, NEVER)
    l = tl.exp2(logit - m)
    acc = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    acc, m, l = _add_tiles(
        acc, m, l, q_tile, k, v, full_rows, full_runs, low, high, q_segments, k_positions,
        k_segments, b, row, T, S, K, H, V, SCALE, CAP, CLAUSES, FLAGS, PLACES, ROWS_STRIDE,
        FULL_STRIDE, BLOCK_Q, BLOCK_K, BLOCK_H, BLOCK_V, False,
    )
    acc, m, l = _add_tiles(
        acc, m, l, q_tile, k, v, partial_rows, partial_runs, low, high, q_segments, k_positions,
        k_segments, b, row, T, S, K, H, V, SCALE, CAP, CLAUSES, FLAGS, PLACES, ROWS_STRIDE,
        PARTIAL_STRIDE, BLOCK_Q, BLOCK_K, BLOCK_H, BLOCK_V, True,
    )
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    acc = acc * (1.0 / l)[:, None]
    store_tile(
        base_of(o, b, n, T, N, V), row * BLOCK_Q, acc, T, V, N * V, BLOCK_Q, BLOCK_V
    )
    at = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    total = tl.where(empty, float("-inf"), (m + tl.log2(l)) / LOG2E)
    tl.store(lse + (b * N + n) * T + at, total, mask=at < T)
