"""Root-mean-square and L2 normalisation over the last axis, in fp32 or wider."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float, dtype=jnp.float32) -> jax.Array:
    """``weight * x / sqrt(mean(x^2) + eps)`` (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    wide = x.astype(dtype)
    out = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if weight is not None:
        out = out * weight.astype(dtype)
    return out.astype(x.dtype)


def l2_norm(x: jax.Array, eps: float = 1e-12, dtype=jnp.float32) -> jax.Array:
    """``x / sqrt(sum(x^2) + eps)``."""
    wide = x.astype(dtype)
    out = wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + eps)
    return out.astype(x.dtype)
