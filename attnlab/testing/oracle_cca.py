"""Oracle of compressed convolutional attention, from the equations, row by row and head by head.

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

    def convolve(u, p, before):
        """``z[T, n, H]`` of one row's ``u[T, n, H]``, tap by tap, as matrices over time."""
        zero = jnp.zeros(u.shape[1:], x.dtype)
        y = b0 = p["b0"] if conv_bias else zero
        for i in range(k0):
            y = y + p["w0"][:, i] * jnp.einsum("ts,snh->tnh", before(k0 - 1 - i), u)
        if convs == 1:
            return y
        z = p["b1"] if conv_bias else zero
        for j in range(k1):
            back = before(k1 - 1 - j)
            front = jnp.asarray(back.sum(1) == 0, x.dtype)  # the tap lies before the document
            tap = jnp.einsum("ts,snh->tnh", back, y) + front[:, None, None] * b0
            z = z + jnp.einsum("tnc,nch->tnh", tap, p["w1"][:, j])
        return z

    def unit(rows):
        return math.sqrt(H) * rows / jnp.sqrt((rows * rows).sum(-1, keepdims=True) + norm_eps)

    def beta(g):
        tau = params["temperature"][g]
        if temperature_mode == "raw":
            return tau
        return jnp.exp(jnp.clip(tau, 1e-7, 2.0) if temperature_mode == "exp_clamp" else tau)

    rows = []
    for b in range(x.shape[0]):
        turn = rotation(positions[b], rope_theta, width, H, rope_pairing)
        seen = sight(positions[b], segments[b], window, sink_tokens)

        def before(steps, names=segments[b]):
            """Picks the token ``steps`` places earlier in the document of each token, or none."""
            pick = np.zeros((len(names), len(names)))
            for name in set(names.tolist()) - {0}:
                document = np.flatnonzero(names == name)
                for i in range(steps, len(document)):
                    pick[document[i], document[i - steps]] = 1
            return jnp.asarray(pick, x.dtype)

        u_q = jnp.stack([x[b] @ params["w_q"][:, n] for n in range(N)], axis=1)
        u_k = jnp.stack([x[b] @ params["w_k"][:, g] for g in range(K)], axis=1)
        z_q = convolve(u_q, params["q_conv"], before) if convs else u_q
        z_k = convolve(u_k, params["k_conv"], before) if convs else u_k
        # The value halves on the flat channel axis, then the heads.
        flat = params["w_v"].reshape(x.shape[-1], K * H)
        first, second = x[b] @ flat[:, : K * H // 2], x[b] @ flat[:, K * H // 2 :]
        if value_shift:
            second = before(1) @ second
        v = jnp.concatenate([first, second], axis=1)
        y = jnp.zeros_like(x[b])
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
            y = y + o @ params["w_o"][n]
        rows.append(y)
    return jnp.stack(rows)
