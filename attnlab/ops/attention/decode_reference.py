"""The oracle of decoding: dense, read straight off the equation. Memory is B N t S."""

from __future__ import annotations

import jax.numpy as jnp


def forward(
    q, k, v, lengths, pages, sink_logits, q_coords, k_coords, *, mask, implied, logit_cap, scale,
    softmax_dtype, splits,
):
    """Returns ``(o, lse)``; see ``decode``."""
    B, t, N, H = q.shape
    K = k.shape[2]
    if pages is not None:
        used = jnp.arange(pages.shape[1]) * k.shape[1] < lengths[:, None]
        k, v = (x[jnp.where(used, pages, 0)].reshape(B, -1, K, x.shape[-1]) for x in (k, v))
    grouped = q.reshape(B, t, K, N // K, H).astype(softmax_dtype)
    k, v = (x.astype(q.dtype).astype(softmax_dtype) for x in (k, v))
    z = scale * jnp.einsum("btkgh,bskh->bkgts", grouped, k)
    if logit_cap is not None:
        z = logit_cap * jnp.tanh(z / logit_cap)
    present = k_coords.index < lengths[:, None]
    seen = mask.visible(q_coords, k_coords) & present[:, None, None]  # [B, 1, t, S]
    z = jnp.where(seen[:, :, None], z, -jnp.inf)
    top = z.max(-1, keepdims=True)
    if sink_logits is not None:
        sink = sink_logits.astype(softmax_dtype).reshape(K, N // K, 1, 1)
        top = jnp.maximum(top, sink)
    top = jnp.where(jnp.isfinite(top), top, 0)
    e = jnp.exp(z - top)
    total = e.sum(-1, keepdims=True)
    if sink_logits is not None:
        total += jnp.exp(sink - top)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    o = jnp.einsum("bkgts,bskv->btkgv", e / total, v).reshape(B, t, N, -1)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]
    return o.astype(q.dtype), lse.transpose(0, 3, 1, 2).reshape(B, t, N)
