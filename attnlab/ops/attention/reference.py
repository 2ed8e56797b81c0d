"""The oracle: dense attention, read straight off the equation. Memory is B N T S."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def forward(
    q, k, v, *, mask, score, q_coords, k_coords, scale, sink_logits, logit_cap, return_lse,
    softmax_dtype, layout,
):
    """Returns ``(o, lse)``; see ``attention``."""
    B, T, N, _ = q.shape
    K = k.shape[2]
    G = N // K
    grouped = q.reshape(B, T, K, G, -1).astype(softmax_dtype)
    z = scale * jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(softmax_dtype))
    if logit_cap is not None:
        z = logit_cap * jnp.tanh(z / logit_cap)
    z = z.reshape(B, N, T, -1)
    if score is not None:
        z = jnp.broadcast_to(score.on_grid(q_coords, k_coords, z), z.shape)
    z = jnp.where(mask.visible(q_coords, k_coords), z, -jnp.inf)
    top = z.max(-1, keepdims=True)
    if sink_logits is not None:
        sink = sink_logits.astype(softmax_dtype)[None, :, None, None]
        top = jnp.maximum(top, sink)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    e = jnp.exp(z - top)
    total = e.sum(-1, keepdims=True)
    if sink_logits is not None:
        total += jnp.exp(sink - top)
    empty = total == 0
    p = e / jnp.where(empty, 1, total)
    o = jnp.einsum("bkgts,bskv->btkgv", p.reshape(B, K, G, T, -1), v.astype(softmax_dtype))
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1, total)))
    return o.reshape(B, T, N, -1).astype(v.dtype), lse[..., 0].swapaxes(1, 2)
