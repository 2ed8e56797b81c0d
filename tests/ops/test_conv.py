"""The short convolution against a loop over tokens in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.errors import ShapeError
from attnlab.ops.conv import ConvState, causal_conv, init_state


def loop(x, w, b, segments):
    """Token by token, tap by tap."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    (B, T, _), k = x.shape, len(w)
    y = np.zeros(x.shape) + (0 if b is None else np.asarray(b, np.float64))
    for row in range(B):
        for t in range(T):
            for j in range(k):
                s = t - (k - 1) + j
                if s >= 0 and segments[row, t] and segments[row, s] == segments[row, t]:
                    y[row, t] += w[j] * x[row, s]
    return y


SEGMENTS = np.array([
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 3, 4, 4, 4, 4, 0],
    [3, 3, 1, 1, 1, 1, 1, 0, 0, 0, 0],
], np.int32)


def case(k=4, C=5, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (*SEGMENTS.shape, C)).astype(dtype)
    return x, jax.random.normal(keys[1], (k, C)), jax.random.normal(keys[2], (C,))


@pytest.mark.parametrize("k", [1, 2, 4, 16])
@pytest.mark.parametrize("packed", [False, True])
def test_sums(k, packed):
    x, w, b = case(k)
    segments = SEGMENTS if packed else np.ones_like(SEGMENTS)
    for bias in (None, b):
        y, _ = jax.jit(causal_conv)(x, w, bias, segments=jnp.asarray(segments) if packed else None)
        np.testing.assert_allclose(y, loop(x, w, bias, segments), atol=1e-5)


@pytest.mark.parametrize("sizes", [(1,) * 11, (3, 8), (6, 1, 4), (2, 2, 2, 5)])
def test_chunks(sizes):
    """Whole or in chunks, with rows that end at different tokens: the same."""
    x, w, b = case()
    whole, end = causal_conv(x, w, b, segments=jnp.asarray(SEGMENTS))
    state, found, at = init_state(3, 4, 5), [], 0
    for size in sizes:
        part = slice(at, at + size)
        segments = jnp.asarray(SEGMENTS[:, part])
        y, state = causal_conv(x[:, part], w, b, segments=segments, state=state)
        found.append(y)
        at += size
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, atol=1e-6)
    assert (state.segments == end.segments).all()
    np.testing.assert_allclose(state.rows, end.rows)
    # After padding a row goes on where its real tokens ended.
    more, _ = causal_conv(x[:, :1], w, b, segments=jnp.ones((3, 1), jnp.int32), state=state)
    grown = np.concatenate([np.asarray(x[2:, :7]), np.asarray(x[2:, :1])], 1)
    expected = loop(grown, w, b, np.array([[3, 3, 1, 1, 1, 1, 1, 1]]))
    np.testing.assert_allclose(more[2, 0], expected[0, -1], atol=1e-5)


def test_causality():
    """Token by token: y[t] depends on x[t - 3 .. t] of its own segment, and on nothing else."""
    x, w, b = case()
    run = functools.partial(causal_conv, w=w, b=b, segments=jnp.asarray(SEGMENTS))
    derivative = np.asarray(jax.jacobian(lambda x: run(x)[0].sum(-1))(x)).any(-1)
    for row, owners in enumerate(SEGMENTS):
        for t in range(11):
            for s in range(11):
                reached = t - 4 < s <= t and owners[t] == owners[s] > 0
                assert derivative[row, t, row, s] == reached, (row, t, s)


def test_gradients():
    """Of x, w, b and of the state, against those of the loop's own sums in float64."""
    x, w, b = case(3)
    state = ConvState(
        jax.random.normal(jax.random.key(7), (3, 2, 5)), jnp.array([[1, 1], [0, 1], [3, 3]])
    )
    pull = np.asarray(jax.random.normal(jax.random.key(8), x.shape), np.float64)

    def loss(x, w, b, rows):
        y, _ = causal_conv(
            x, w, b, segments=jnp.asarray(SEGMENTS), state=ConvState(rows, state.segments)
        )
        return (y * pull.astype(np.float32)).sum()

    found = jax.grad(loss, (0, 1, 2, 3))(x, w, b, state.rows)
    rows = np.concatenate([state.rows, x], 1).astype(np.float64)
    owners = np.concatenate([state.segments, SEGMENTS], 1)
    dx, dw, taps = np.zeros_like(rows), np.zeros((3, 5)), np.asarray(w, np.float64)
    for row in range(3):
        for t in range(11):
            for j in range(3):
                s = t + j
                if owners[row, s] == owners[row, t + 2] > 0:
                    dx[row, s] += taps[j] * pull[row, t]
                    dw[j] += rows[row, s] * pull[row, t]
    for a, expected in zip(found, (dx[:, 2:], dw, pull.sum((0, 1)), dx[:, :2]), strict=True):
        np.testing.assert_allclose(a, expected, atol=2e-5)


def test_bfloat16_is_summed_in_float32():
    x, w, b = case(16, dtype=jnp.bfloat16)
    y, state = causal_conv(x, w, b)
    exact = loop(x, w, b, np.ones_like(SEGMENTS))
    assert y.dtype == state.rows.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("change, message", [
    (dict(x=jnp.ones((2, 3))), "x has shape (2, 3): must be [B, T, C], T > 0"),
    (dict(x=jnp.ones((2, 0, 4))), "x has shape (2, 0, 4): must be"),
    (dict(w=jnp.ones((3, 5))), "w has shape (3, 5): must be [k, 4]"),
    (dict(w=jnp.ones((0, 4))), "w has shape (0, 4): must be [k, 4]"),
    (dict(b=jnp.ones(3)), "b has shape (3,): must be [4]"),
    (dict(segments=jnp.ones((2, 2), jnp.int32)), "segments has shape (2, 2): must be [2, 3]"),
    (dict(state=init_state(2, 4, 4)), "state.rows has shape (2, 3, 4): must be [2, 2, 4]"),
])
def test_shapes(change, message):
    given = dict(x=jnp.ones((2, 3, 4)), w=jnp.ones((3, 4))) | change
    with pytest.raises(ShapeError) as error:
        causal_conv(**given)
    assert message in str(error.value)
