"""Oracle of compressed convolutional attention, from the equations, document by document and head by head.

It has its own convolutions, norms and masks and runs in the dtype of its inputs.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from attnlab.testing.oracles import attend, rotation, sight


def cca_oracle(
    params, x, positions, segments=None, *, num_heads, head_dim, num_kv_heads=None,
    conv_widths=(2, 2), convs=2, value_shift=True, qk_mean=True, qk_norm=True,
    temperature_mode="exp", norm_eps=1e-12, conv_bias=True, rotary_fraction=1.0,
    rope_theta=10_000.0, rope_pairing="half", window=None, sink_tokens=0, sink_logits=False,
    logit_cap=None, scale=None,
):
    """``y[B, T, D]``. ``segments`` None: one document a row; 0: padding, whose output is zero."""
    N, H, (k0, k1) = num_heads, head_dim, conv_widths
    K = N if num_kv_heads is None else num_kv_heads
    G = N // K
    positions = np.asarray(positions)
    segments = np.ones_like(positions) if segments is None else np.asarray(segments)
    scale = 1 / math.sqrt(H) if scale is None else scale
    width = 2 * math.floor(H * rotary_fraction / 2)

    def convolve(u, p):
        """``z[T, n, H]`` of one document's ``u[T, n, H]``, token by token and tap by tap."""
        T, n, _ = u.shape
        zero = jnp.zeros((n, H), x.dtype)
        b0, b1 = (p["b0"], p.get("b1")) if conv_bias else (zero, zero)
        y, z = {t: b0 for t in range(1 - k1, 0)}, []
        for t in range(T):
            y[t] = b0
            for i in range(k0):
                if t - (k0 - 1) + i >= 0:
                    y[t] = y[t] + p["w0"][:, i] * u[t - (k0 - 1) + i]
        if convs == 1:
            return jnp.stack([y[t] for t in range(T)])
        for t in range(T):
            row = b1
            for j in range(k1):
                row = row + jnp.einsum("nc,nch->nh", y[t - (k1 - 1) + j], p["w1"][:, j])
            z.append(row)
        return jnp.stack(z)

    def unit(rows):
        return math.sqrt(H) * rows / jnp.sqrt((rows * rows).sum(-1, keepdims=True) + norm_eps)

    def beta(g):
        tau = params["temperature"][g]
        if temperature_mode == "raw":
            return tau
        return jnp.exp(jnp.clip(tau, 1e-7, 2.0) if temperature_mode == "exp_clamp" else tau)

    y = jnp.zeros_like(x)
    for b in range(x.shape[0]):
        for name in sorted({int(s) for s in segments[b]} - {0}):
            where = np.flatnonzero(segments[b] == name)
            place, T = positions[b, where], len(where)
            turn = rotation(place, rope_theta, width, H, rope_pairing)
            seen = sight(place, np.ones(T, int), window, sink_tokens)
            tokens = x[b, where]
            u_q = jnp.stack([tokens @ params["w_q"][:, n] for n in range(N)], axis=1)
            u_k = jnp.stack([tokens @ params["w_k"][:, g] for g in range(K)], axis=1)
            z_q = convolve(u_q, params["q_conv"]) if convs else u_q
            z_k = convolve(u_k, params["k_conv"]) if convs else u_k
            # The value halves on the flat channel axis, then the heads.
            flat = params["w_v"].reshape(x.shape[-1], K * H)
            first, second = tokens @ flat[:, : K * H // 2], tokens @ flat[:, K * H // 2 :]
            if value_shift:
                second = jnp.concatenate([jnp.zeros_like(second[:1]), second[:-1]])
            v = jnp.concatenate([first, second], axis=1)
            for n in range(N):
                g = n // G
                q, k = z_q[:, n], z_k[:, g]
                if qk_mean:
                    q = q + (u_q[:, n] + u_k[:, g]) / 2
                    group = sum(u_q[:, g * G + m] for m in range(G)) / G
                    k = k + (group + u_k[:, g]) / 2
                if qk_norm:
                    q, k = unit(q), beta(g) * unit(k)
                q, k = jnp.einsum("tij,tj->ti", turn, q), jnp.einsum("tij,tj->ti", turn, k)
                sink = params["sink_logits"][n] if sink_logits else None
                o = attend(q, k, v[:, g * H : (g + 1) * H], seen, scale, logit_cap, sink)
                y = y.at[b, where].add(o @ params["w_o"][n])
    return y
