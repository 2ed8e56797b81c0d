"""Gradients of lookups in captured arrays: the right sums, in one order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core.lookups import ordered_sum
from attnlab.core.mask import Coords
from attnlab.core.mods import Mod
from attnlab.core.staging import split, values

B, N, T = 2, 3, 40
TABLE = jax.random.normal(jax.random.key(0), (N, 8))
LINE = jax.random.normal(jax.random.key(1), (2 * T - 1,))
ROWS = jax.random.normal(jax.random.key(2), (B, T))
SHARED = jnp.asarray([0, 3, 3, 1, 7, 3], jnp.int32)

FUNCTIONS = {
    "by head": (TABLE[:, 0], lambda x: lambda s, head, q, k: s * x[head]),
    "buckets": (TABLE, lambda x: lambda s, head, q, k: s + x[head, jnp.abs(q - k) // 5]),
    "clipped": (LINE, lambda x: lambda s, head, q, k: s + x.at[2 * (q - k)].get(mode="clip")),
    "filled": (
        LINE, lambda x: lambda s, head, q, k: s + x.at[q + 60].get(mode="fill", fill_value=0.0)
    ),
    "from the end": (LINE, lambda x: lambda s, head, q, k: s + x[q - 50]),
    "through another table": (TABLE, lambda x: lambda s, h, q, k: s + x[h, SHARED[k % 6]]),
    "by row and query": (
        ROWS, lambda x: lambda s, head, q, k, *, batch, q_index: s + x[batch, q_index // 3]
    ),
    "twice": (TABLE, lambda x: lambda s, h, q, k: s + x[h, q % 8] * jnp.tanh(x[0, k % 2])),
}


def coords():
    index = jnp.arange(T, dtype=jnp.int32)
    return Coords(jnp.broadcast_to(index, (B, T)), None, index)


def handed(x, make):
    mod = Mod.of(make(x), score_dtype=jnp.float32).bound(B, N)
    body = split(mod.program, T, T)
    assert body.refusal is None
    return values(mod, body, coords(), coords())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_plain_lookups(name):
    """Handed values and their pull to the array, beside the function on all pairs."""
    x, make = FUNCTIONS[name]
    zero = jnp.zeros((B, N, T, T))

    def on_grid(x):
        mod = Mod.of(make(x), score_dtype=jnp.float32).bound(B, N)
        return jnp.broadcast_to(mod.on_grid(coords(), coords(), zero + 1.5), zero.shape)

    def by_parts(x):
        mod = Mod.of(make(x), score_dtype=jnp.float32).bound(B, N)
        body = split(mod.program, T, T)
        given = []
        distance = jnp.arange(T)[:, None] - jnp.arange(T) + T - 1
        spread = {"heads": np.s_[..., None, None], "rows": np.s_[..., None],
                  "columns": np.s_[..., None, :], "distances": np.s_[..., distance]}
        for entry, value in zip(body.handed, values(mod, body, coords(), coords()), strict=True):
            value = value[spread[entry.group]]
            given.append((jnp.broadcast_to(value, zero.shape), "tile"))
        tile = {"score": zero + 1.5, "q_pos": zero.astype(jnp.int32) + jnp.arange(T)[:, None],
                "k_pos": zero.astype(jnp.int32) + jnp.arange(T)}
        known = {n: (tile[n], "tile") for n in body.coordinates | {"score"}}
        known |= {f"float {n}": (tile[n].astype(jnp.float32), "tile") for n in body.floats}
        return body(known, given, lambda v, rank, to: jnp.broadcast_to(v, zero.shape))

    weights = jax.random.normal(jax.random.key(3), zero.shape)
    (found, pull), (wanted, expected) = (jax.vjp(f, x) for f in (by_parts, on_grid))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(pull(weights)[0], expected(weights)[0], rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_scattered(name):
    """XLA adds what a scatter brings to one place in any order on a GPU."""
    x, make = FUNCTIONS[name]
    text = str(jax.make_jaxpr(jax.grad(lambda x: sum(v.sum() for v in handed(x, make))))(x))
    assert "scatter" not in text and ("sort" in text or "dynamic_update" in text)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(-2, 9), min_size=1, max_size=70), st.integers(1, 8))
def test_sums(places, size):
    """Entries of any number of values, places that are out of range."""
    x = np.random.default_rng(0).integers(-4, 5, len(places)).astype(np.float32)
    expected = np.zeros(size)
    for place, value in zip(places, x):
        if 0 <= place < size:
            expected[place] += value
    found = ordered_sum(jnp.asarray(x), jnp.asarray(places, jnp.int32), size)
    np.testing.assert_array_equal(found, expected)
