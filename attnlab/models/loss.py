"""Next-token cross-entropy over a large vocabulary, a chunk of tokens at a time.

    nll = sum_t w_t (lse_t - z_t[y_t])        z = h W^T + mask of padding ids, fp32
    z_loss = sum_t w_t lse_t^2                (Chowdhery et al. 2022, arXiv 2204.02311)

Only one chunk of logits ``[B, C, vocabulary]`` exists at a time. The gradient in h and W is formed
in the forward pass, chunk by chunk, so no chunk of logits is computed twice.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.core.axes import constrain, shards
from attnlab.core.linear import held

_LOGIT_BYTES = 256 * 2**20


def chunk_length(batch: int, tokens: int, vocab: int, limit: int = _LOGIT_BYTES) -> int:
    """Tokens a row in one chunk: as few equal chunks as keep fp32 logits under ``limit`` bytes."""
    most = max(1, limit // (4 * batch * vocab))
    return -(-tokens // -(-tokens // most))


def cross_entropy(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "rows D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    vocab_size: int,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``(total, nll)``, both sums over weighted tokens, fp32.

    Args:
        hidden: ``[B, T, D]``. table: ``[rows, D]`` rows >= vocab_size, the rest is padding.
        targets: int32 ``[B, T]``, below vocab_size where they count. weights: ``[B, T]``, 0 where
            a target does not count; constants, no gradient flows to them.
        z_loss: weight of lse^2 in ``total``; ``nll`` never contains it and carries no gradient.
        chunk: tokens a row at a time; default bounds the logits at 256 MiB. Where it does not
            divide T, rows are filled up with tokens of weight 0.
    """
    B, T, _ = hidden.shape
    # Batch shards are an axis of their own, so that each device sums its part of the gradient of
    # the table over all chunks and the parts meet once, not once a chunk.
    parts = shards("batch", B)
    chunk = min(chunk or chunk_length(B // parts, T, table.shape[0]), T)
    chunks = -(-T // chunk)

    def split(x):
        if chunks * chunk > T:
            x = jnp.pad(x, [(0, 0), (0, chunks * chunk - T)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(parts, B // parts, chunks, chunk, *x.shape[2:])
        x = jnp.moveaxis(x, 2, 0)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    rows = (split(hidden), split(targets), split(weights))
    table = constrain(table, "vocab", "width")
    total, nll = _chunked(rows[0], table, rows[1], rows[2], vocab_size, z_loss)
    return total, jax.lax.stop_gradient(nll)


def _logits(h, table, vocab_size):
    z = jnp.einsum("pbcd,vd->pbcv", h, table, preferred_element_type=_wide(h.dtype))
    real = jnp.arange(table.shape[0]) < vocab_size
    return jnp.where(real, z, -1e30)


def _wide(dtype):
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _sums(h, table, y, w, vocab_size, z_loss):
    z = _logits(h, table, vocab_size)
    lse = jax.nn.logsumexp(z, axis=-1)
    hit = jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0]
    nll = jnp.sum(jnp.where(w == 0, 0, w * (lse - hit)))  # an ignored target may be any number
    return z, lse, nll, nll + z_loss * jnp.sum(w * lse * lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(hidden, table, targets, weights, vocab_size, z_loss):
    def body(carry, row):
        h, y, w = row
        _, _, nll, total = _sums(h, table.astype(h.dtype), y, w, vocab_size, z_loss)
        return (carry[0] + total, carry[1] + nll), None

    zero = jnp.zeros((), _wide(hidden.dtype))
    return jax.lax.scan(body, (zero, zero), (hidden, targets, weights))[0]


def _chunked_fwd(hidden, table, targets, weights, vocab_size, z_loss):
    cast = table.astype(hidden.dtype)
    wide = _wide(hidden.dtype)
    over = wide if shards("vocab", table.shape[0]) > 1 else None  # a sum over devices

    def body(carry, row):
        total, nll, d_table = carry
        h, y, w = row
        z, lse, part_nll, part = _sums(h, cast, y, w, vocab_size, z_loss)
        p = jnp.exp(z - lse[..., None])
        d = p * (1 + 2 * z_loss * lse)[..., None] - jax.nn.one_hot(y, z.shape[-1], dtype=wide)
        d = (d * w[..., None]).astype(h.dtype)
        d_h = jnp.einsum("pbcv,vd->pbcd", d, cast, preferred_element_type=over)
        d_h = (d_h if over is None else held(d_h)).astype(h.dtype)
        here = jnp.einsum("pbcv,pbcd->pvd", d, h, preferred_element_type=wide)
        d_table = constrain(d_table + here, "batch", "vocab", "width")
        return (total + part, nll + part_nll, d_table), d_h

    zero = jnp.zeros((), wide)
    start = (zero, zero, jnp.zeros((hidden.shape[1], *table.shape), wide))
    (total, nll, d_table), d_hidden = jax.lax.scan(body, start, (hidden, targets, weights))
    return (total, nll), (d_hidden, d_table.sum(0).astype(table.dtype), weights)


def _chunked_bwd(vocab_size, z_loss, residuals, cotangents):
    d_hidden, d_table, weights = residuals
    g = cotangents[0]
    return (
        (g * d_hidden).astype(d_hidden.dtype),
        (g * d_table).astype(d_table.dtype),
        None,
        jnp.zeros_like(weights),
    )


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
