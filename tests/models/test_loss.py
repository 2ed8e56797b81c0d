"""Chunked cross-entropy against the dense one in fp64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.versions import enable_x64
from attnlab.models.loss import chunk_length, cross_entropy

B, T, D, VOCAB, ROWS = 2, 12, 5, 11, 16


def inputs(dtype):
    rng = np.random.default_rng(0)
    h = rng.standard_normal((B, T, D)).astype(dtype)
    table = rng.standard_normal((ROWS, D)).astype(dtype)
    table[VOCAB:] *= 50  # padding rows that would win if they took part
    y = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
    w = (rng.random((B, T)) < 0.7).astype(np.float32)
    return h, table, y, w


def dense(h, table, y, w, z_loss):
    z = (h @ table.T)[..., :VOCAB]
    lse = jax.nn.logsumexp(z, axis=-1)
    nll = jnp.sum(w * (lse - jnp.take_along_axis(z, y[..., None], -1)[..., 0]))
    return nll + z_loss * jnp.sum(w * lse**2), nll


@pytest.mark.parametrize("chunk", [*range(1, T + 1), 40, None])
def test_every_chunk_length_is_the_dense_loss(chunk):
    with enable_x64():
        h, table, y, w = inputs(np.float64)
        for z_loss in (0.0, 0.3):
            def chunked(h, table, w, z_loss=z_loss):
                return cross_entropy(
                    h, table, y, w, vocab_size=VOCAB, z_loss=z_loss, chunk=chunk
                )

            (got, nll), grads = jax.value_and_grad(chunked, (0, 1), has_aux=True)(h, table, w)
            (want, plain), wanted = jax.value_and_grad(dense, (0, 1), has_aux=True)(
                h, table, y, w, z_loss
            )
            np.testing.assert_allclose([got, nll], [want, plain], rtol=1e-12)
            for a, b in zip(grads, wanted, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
            assert not np.asarray(grads[1])[VOCAB:].any()
            assert np.isclose(chunked(h, table, w)[0], want), "without gradients"


def test_padding_rows_change_nothing():
    h, table, y, w = inputs(np.float32)
    other = table.copy()
    other[VOCAB:] = 1e4
    a, b = (cross_entropy(h, t, y, w, vocab_size=VOCAB, chunk=4) for t in (table, other))
    assert a[0] == b[0] and a[1] == b[1]


def test_bf16_sums_in_fp32():
    h, table, y, w = inputs(np.float32)
    low = h.astype(jnp.bfloat16)
    total, nll = cross_entropy(low, table, y, w, vocab_size=VOCAB, chunk=3)
    want, _ = dense(
        low.astype(np.float32), table.astype(jnp.bfloat16).astype(np.float32), y, w, 0.0
    )
    assert total.dtype == nll.dtype == jnp.float32
    np.testing.assert_allclose(total, want, rtol=1e-5)


def test_scaled_and_masked_gradient():
    h, table, y, w = inputs(np.float32)

    def loss(h, factor):
        return factor * cross_entropy(h, table, y, w, vocab_size=VOCAB, chunk=5)[0]

    one, three = (jax.grad(loss)(h, f) for f in (1.0, 3.0))
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)
    assert not np.asarray(one)[w == 0].any() and np.asarray(one)[w == 1].any(-1).all()


def test_the_logits_never_exist_whole():
    B, T, D, V = 2, 512, 8, 4096
    h, table = jnp.zeros((B, T, D)), jnp.zeros((V, D))
    y, w = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))

    def temporary(loss):
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(h, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def dense_loss(h, table):
        z = h @ table.T
        return jnp.sum(jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, y[..., None], -1)[..., 0])

    whole = 4 * B * T * V
    small = temporary(lambda h, t: cross_entropy(h, t, y, w, vocab_size=V, chunk=32)[0])
    assert temporary(dense_loss) >= whole, "the measure sees a whole array of logits"
    assert small < whole / 2, (small, whole)


@pytest.mark.parametrize("tokens", [1, 7, 4096, 4099])
def test_chunk_length(tokens):
    for vocab in (257, 32_768, 262_144):
        chunk = chunk_length(8, tokens, vocab)
        assert 1 <= chunk <= tokens
        assert chunk == 1 or 4 * 8 * vocab * chunk <= 256 * 2**20
        chunks = -(-tokens // chunk)
        assert chunks * chunk - tokens < chunks, "at most one token of padding a chunk"
