"""Backward kernels in Triton: one over tiles of queries for dq, one over tiles of keys for dk, dv.

Each recomputes its logits, so nothing is added across programs and results are the same bit for bit
in every run. With ``p = exp(z - lse)`` and ``delta = rowsum(o do) - dlse``::

    dz = p * (do v^T - delta)      ds = dz * (1 - (z / c)^2) under a cap c
    dq = scale ds k                dv = p^T do                dk = scale ds^T q

Source: Dao et al. 2022, arXiv 2205.14135. This module needs triton: import it where a kernel is
launched.
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
    beside_queries,
    capped,
    load_tile,
    place_of,
    run_of,
    run_range,
    store_tile,
    visible,
)

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(1e30)  # the lse of rows that take no part: their p is zero


@triton.jit
def _probabilities(
    s, lse, low, high, q_segments, k_positions, k_segments, b, q_at, k_at,
    T: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    CLAUSES: tl.constexpr, FLAGS: tl.constexpr, PLACES: tl.constexpr, MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """``(p, slope)`` of raw logits: ``slope = dz / ds`` up to the scale (1 without a cap)."""
    slope = 1.0
    if CAP > 0:
        z, t = capped(s, SCALE, CAP)
        z = z * LOG2E
        slope = 1.0 - t * t
    else:
        z = s * (SCALE * LOG2E)
    z = z - beside_queries(lse, TRANSPOSED)
    if MASKED:
        seen = visible(
            low, high, q_segments, k_positions, k_segments, b, q_at, k_at, T, S, CLAUSES, FLAGS,
            PLACES, TRANSPOSED,
        )
        z = tl.where(seen, z, float("-inf"))
    return tl.exp2(z), slope


@triton.jit
def _add_dq(
    dq, q, do, k, v, lse, delta, rows, runs, low, high, q_segments, k_positions, k_segments, b, row,
    T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, CLAUSES: tl.constexpr, FLAGS: tl.constexpr,
    PLACES: tl.constexpr, ROWS_STRIDE: tl.constexpr, RUNS_STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
):
    """``dq`` with the tiles of one kind of a row."""
    uneven: tl.constexpr = MASKED and S % BLOCK_K != 0
    start, end = run_range(rows, b, row, ROWS_STRIDE)
    for e in range(start, end):
        first, last = run_of(runs, b, e, RUNS_STRIDE)
        for j in range(first, last):
            k0 = j * BLOCK_K
            keys = load_tile(k, k0, S, H, K * H, BLOCK_K, BLOCK_H, uneven)
            values = load_tile(v, k0, S, V, K * V, BLOCK_K, BLOCK_V, uneven)
            s = tl.dot(q, tl.trans(keys))
            q_at, k_at = row * BLOCK_Q + tl.arange(0, BLOCK_Q), k0 + tl.arange(0, BLOCK_K)
            p, slope = _probabilities(
                s, lse, low, high, q_segments, k_positions, k_segments, b, q_at, k_at, T, S, SCALE,
                CAP, CLAUSES, FLAGS, PLACES, MASKED, False,
            )
            dp = tl.dot(do, tl.trans(values))
            ds = p * (dp - delta[:, None])
            if CAP > 0:
                ds = ds * slope
            dq = tl.dot(ds.to(keys.dtype), keys, dq)
    return dq


@triton.jit
def attention_dq(
    q, k, v, do, lse, delta, order, full_rows, full_runs, partial_rows, partial_runs, low, high,
    q_segments, k_positions, k_segments, dq,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    V: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, CLAUSES: tl.constexpr,
    FLAGS: tl.constexpr, PLACES: tl.constexpr, ROWS_STRIDE: tl.constexpr,
    FULL_STRIDE: tl.constexpr, PARTIAL_STRIDE: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    SECTION: tl.constexpr,
):
    """``dq[B, T, N, H]``; lse (in units of log 2) and delta: fp32 ``[B, N, T]``. Grid and the other
    arguments as in ``attention_fwd``."""
    row, n, b = place_of(order, N, ROWS, SECTION)
    kv = n // (N // K)
    q0 = row * BLOCK_Q
    uneven: tl.constexpr = T % BLOCK_Q != 0
    q_tile = load_tile(base_of(q, b, n, T, N, H), q0, T, H, N * H, BLOCK_Q, BLOCK_H, uneven)
    do_tile = load_tile(base_of(do, b, n, T, N, V), q0, T, V, N * V, BLOCK_Q, BLOCK_V, uneven)
    k, v = base_of(k, b, kv, S, K, H), base_of(v, b, kv, S, K, V)
    at = q0 + tl.arange(0, BLOCK_Q)
    vector = (b * N + n) * T + at
    lse = tl.load(lse + vector, mask=at < T, other=NOTHING)
    delta = tl.load(delta + vector, mask=at < T, other=0.0)
    acc = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    acc = _add_dq(
        acc, q_tile, do_tile, k, v, lse, delta, full_rows, full_runs, low, high, q_segments,
        k_positions, k_segments, b, row, T, S, K, H, V, SCALE, CAP, CLAUSES, FLAGS, PLACES,
        ROWS_STRIDE, FULL_STRIDE, BLOCK_Q, BLOCK_K, BLOCK_H, BLOCK_V, False,
    )
    acc = _add_dq(
        acc, q_tile, do_tile, k, v, lse, delta, partial_rows, partial_runs, low, high, q_segments,
        k_positions, k_segments, b, row, T, S, K, H, V, SCALE, CAP, CLAUSES, FLAGS, PLACES,
        ROWS_STRIDE, PARTIAL_STRIDE, BLOCK_Q, BLOCK_K, BLOCK_H, BLOCK_V, True,
    )
    acc = acc * SCALE
    store_tile(base_of(dq, b, n, T, N, H), q0, acc, T, H, N * H, BLOCK_Q, BLOCK_H)


@triton.jit
def _add_dkv(
    dk, dv, k, v, q, do, lse, delta, rows, runs, low, high, q_segments, k_positions, k_segments, b,
    row,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, CLAUSES: tl.constexpr, FLAGS: tl.constexpr,
    PLACES: tl.constexpr, ROWS_STRIDE: tl.constexpr, RUNS_STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
):
    """``(dk, dv)`` with the tiles of one kind of a row of keys and one query head."""
    uneven: tl.constexpr = T % BLOCK_Q != 0
    start, end = run_range(rows, b, row, ROWS_STRIDE)
    for e in range(start, end):
        first, last = run_of(runs, b, e, RUNS_STRIDE)
        for j in range(first, last):
            q0 = j * BLOCK_Q
            q_at, k_at = q0 + tl.arange(0, BLOCK_Q), row * BLOCK_K + tl.arange(0, BLOCK_K)
            queries = load_tile(q, q0, T, H, N * H, BLOCK_Q, BLOCK_H, uneven)
            dos = load_tile(do, q0, T, V, N * V, BLOCK_Q, BLOCK_V, uneven)
            lses = tl.load(lse + q_at, mask=q_at < T, other=NOTHING)
            deltas = tl.load(delta + q_at, mask=q_at < T, other=0.0)
            s = tl.dot(k, tl.trans(queries))
            p, slope = _probabilities(
                s, lses, low, high, q_segments, k_positions, k_segments, b, q_at, k_at, T, S, SCALE,
                CAP, CLAUSES, FLAGS, PLACES, MASKED, True,
            )
            dv = tl.dot(p.to(dos.dtype), dos, dv)
            dp = tl.dot(v, tl.trans(dos))
            ds = p * (dp - deltas[None, :])
            if CAP > 0:
                ds = ds * slope
            dk = tl.dot(ds.to(queries.dtype), queries, dk)
    return dk, dv


@triton.jit
def attention_dkv(
    q, k, v, do, lse, delta, order, full_rows, full_runs, partial_rows, partial_runs, low, high,
    q_segments, k_positions, k_segments, dk, dv,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    V: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, CLAUSES: tl.constexpr,
    FLAGS: tl.constexpr, PLACES: tl.constexpr, ROWS_STRIDE: tl.constexpr,
    FULL_STRIDE: tl.constexpr, PARTIAL_STRIDE: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    SECTION: tl.constexpr,
):
    """``dk[B, S, K, H]`` and ``dv[B, S, K, V]``, summed over the query heads of a group; a
    program an item of ``order.Items`` over keys; lists are transposed."""
    row, kv, b = place_of(order, K, ROWS, SECTION)
    G: tl.constexpr = N // K
    k0 = row * BLOCK_K
    uneven: tl.constexpr = S % BLOCK_K != 0
    k_tile = load_tile(base_of(k, b, kv, S, K, H), k0, S, H, K * H, BLOCK_K, BLOCK_H, uneven)
    v_tile = load_tile(base_of(v, b, kv, S, K, V), k0, S, V, K * V, BLOCK_K, BLOCK_V, uneven)
    k_sum = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    v_sum = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for g in range(G):
        n = kv * G + g
        queries, dos = base_of(q, b, n, T, N, H), base_of(do, b, n, T, N, V)
        vector = (b * N + n) * T
        k_sum, v_sum = _add_dkv(
            k_sum, v_sum, k_tile, v_tile, queries, dos, lse + vector, delta + vector, full_rows,
            full_runs, low, high, q_segments, k_positions, k_segments, b, row, T, S, N, H, V, SCALE,
            CAP, CLAUSES, FLAGS, PLACES, ROWS_STRIDE, FULL_STRIDE, BLOCK_Q, BLOCK_K, BLOCK_H,
            BLOCK_V, False,
        )
        k_sum, v_sum = _add_dkv(
            k_sum, v_sum, k_tile, v_tile, queries, dos, lse + vector, delta + vector, partial_rows,
            partial_runs, low, high, q_segments, k_positions, k_segments, b, row, T, S, N, H, V,
            SCALE, CAP, CLAUSES, FLAGS, PLACES, ROWS_STRIDE, PARTIAL_STRIDE, BLOCK_Q, BLOCK_K,
            BLOCK_H, BLOCK_V, True,
        )
    k_sum = k_sum * SCALE
    store_tile(base_of(dk, b, kv, S, K, H), k0, k_sum, S, H, K * H, BLOCK_K, BLOCK_H)
    store_tile(base_of(dv, b, kv, S, K, V), k0, v_sum, S, V, K * V, BLOCK_K, BLOCK_V)
