"""Oracles of layers: plain loops over rows, heads and tokens, written from the equation.

An oracle is ``oracle(params, x, positions, segments, **fields) -> y[B, T, D]``: ``fields`` are the
config's fields that its signature names; positions and segments are concrete. It imports nothing
from the code it judges, runs in the dtype of its inputs (fp64 in the suite), and is differentiable
in params and x.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np


def rotation(positions, theta: float, width: int, head: int, pairing: str) -> np.ndarray:
    """Rotary embedding as one matrix a token, ``[T, H, H]``: rotated head = matrix @ head."""
    turns = np.zeros((len(positions), head, head))
    for t, position in enumerate(positions):
        turns[t] = np.eye(head)
        for i in range(width // 2):
            a, b = (i, i + width // 2) if pairing == "half" else (2 * i, 2 * i + 1)
            angle = float(position) * theta ** (-2.0 * i / width)
            turns[t, a, a] = turns[t, b, b] = math.cos(angle)
            turns[t, a, b], turns[t, b, a] = -math.sin(angle), math.sin(angle)
    return turns


def sight(positions, segments, window: int | None = None, sink_tokens: int = 0) -> np.ndarray:
    """Which key each query of one row sees, ``[T, T]``, one pair at a time."""
    T = len(positions)
    seen = np.zeros((T, T), bool)
    for t in range(T):
        for s in range(T):
            same = segments[t] == segments[s] and segments[t] > 0
            distance = int(positions[t]) - int(positions[s])
            near = window is None or distance < window or positions[s] < sink_tokens
            seen[t, s] = same and distance >= 0 and near
    return seen


def rms(x, weight, eps: float):
    """RMSNorm of the last axis."""
    return weight * x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps)


def attend(q, k, v, seen, scale: float, cap: float | None = None, sink=None):
    """One head: ``q[T, H]``, ``k[T, H]``, ``v[T, V]``; a query that sees nothing gives zero."""
    z = scale * (q @ k.T)
    if cap is not None:
        z = cap * jnp.tanh(z / cap)
    e = jnp.where(seen, jnp.exp(jnp.where(seen, z, 0.0)), 0.0)
    total = e.sum(-1) + (0.0 if sink is None else jnp.exp(sink))
    blind = ~seen.any(-1)
    return (e @ v) / jnp.where(blind, 1.0, total)[:, None]


def gqa_oracle(
    params: dict,
    x,
    positions,
    segments,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    qk_norm: bool = False,
    norm_eps: float = 1e-6,
    rotary_fraction: float = 1.0,
    rope_theta: float = 10_000.0,
    rope_pairing: str = "half",
    window: int | None = None,
    sink_tokens: int = 0,
    sink_logits: bool = False,
    logit_cap: float | None = None,
    scale: float | None = None,
    bias: bool = False,
):
    """Grouped-query attention, ``attnlab.layers.gqa``."""
    positions, segments = np.asarray(positions), np.asarray(segments)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    head_dim = x.shape[-1] // num_heads if head_dim is None else head_dim
    width = 2 * math.floor(head_dim * rotary_fraction / 2)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    rows = []
    for b in range(x.shape[0]):
        turn = rotation(positions[b], rope_theta, width, head_dim, rope_pairing)
        seen = sight(positions[b], segments[b], window, sink_tokens)
        y = jnp.zeros_like(x[b])
        for n in range(num_heads):
            j = n // (num_heads // num_kv_heads)
            q, k = x[b] @ params["w_q"][:, n], x[b] @ params["w_k"][:, j]
            v = x[b] @ params["w_v"][:, j]
            if bias:
                q, k, v = q + params["b_q"][n], k + params["b_k"][j], v + params["b_v"][j]
            if qk_norm:
                q = rms(q, params["q_norm"], norm_eps)
                k = rms(k, params["k_norm"], norm_eps)
            q, k = jnp.einsum("tij,tj->ti", turn, q), jnp.einsum("tij,tj->ti", turn, k)
            sink = params["sink_logits"][n] if sink_logits else None
            y = y + attend(q, k, v, seen, scale, logit_cap, sink) @ params["w_o"][n]
        rows.append(y)
    return jnp.stack(rows)
