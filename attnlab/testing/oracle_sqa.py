"""Oracle of sparse query attention, from the equations, one head at a time."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from attnlab.testing.oracles import attend, rms, rotation, sight


def sqa_oracle(
    params, x, positions, segments=None, *, num_heads, num_heads_total=None, head_dim=None,
    num_kv_heads=None, value_dim=None, qk_norm=False, norm_eps=1e-6, gate=False, out_bias=False,
    bias=False, rotary_fraction=1.0, rope_theta=10_000.0, rope_pairing="half", window=None,
    sink_tokens=0, sink_logits=False, logit_cap=None, scale=None,
):
    """``y[B, T, D]``; padding (segment 0) gives zero."""
    N, H = num_heads, x.shape[-1] // num_heads_total if head_dim is None else head_dim
    K = N if num_kv_heads is None else num_kv_heads
    positions = np.asarray(positions)
    segments = np.ones_like(positions) if segments is None else np.asarray(segments)
    scale = 1 / math.sqrt(H) if scale is None else scale
    width = 2 * math.floor(H * rotary_fraction / 2)
    if N >= K:
        pairs = [(n, n // (N // K)) for n in range(N)]
    else:
        pairs = [(j % N, j) for j in range(K)]
    rows = []
    for b in range(x.shape[0]):
        turn = rotation(positions[b], rope_theta, width, H, rope_pairing)
        seen = sight(positions[b], segments[b], window, sink_tokens)
        y = jnp.zeros_like(x[b])
        for m, (n, j) in enumerate(pairs):
            q, k = x[b] @ params["w_q"][:, n], x[b] @ params["w_k"][:, j]
            v = x[b] @ params["w_v"][:, j]
            if bias:
                q, k, v = q + params["b_q"][n], k + params["b_k"][j], v + params["b_v"][j]
            if qk_norm:
                q, k = rms(q, params["q_norm"], norm_eps), rms(k, params["k_norm"], norm_eps)
            q, k = jnp.einsum("tij,tj->ti", turn, q), jnp.einsum("tij,tj->ti", turn, k)
            sink = params["sink_logits"][m] if sink_logits else None
            o = attend(q, k, v, seen, scale, logit_cap, sink)
            if gate:
                o = o / (1 + jnp.exp(-(x[b] @ params["w_g"][:, m])))
            y = y + o @ params["w_o"][m]
        real = jnp.asarray(segments[b] > 0)[:, None]
        rows.append(jnp.where(real, y + params["b_o"], 0) if out_bias else y)
    return jnp.stack(rows)
