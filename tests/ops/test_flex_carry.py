"""Attention over keys in parts equals one call over all of them, whatever the parts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core.errors import ConfigError, ImplementationError, ShapeError
from attnlab.core.mask import Causal, Prefix, Window
from attnlab.core.versions import enable_x64
from attnlab.ops.attention import attention, xla
from attnlab.ops.attention.carry import Carry, attention_step, finish, merge
from attnlab.testing.budget import close_trees

B, T, S, N, K, H, V = 2, 11, 37, 4, 2, 8, 6
OPTIONS = dict(mask=Causal() & Window(30), scale=0.4, logit_cap=3.0)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(xla, "tile_sizes", lambda *_: (8, 8))


def arrays(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 7)
    shapes = {
        "q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, V), "sink": (N,), "slope": (N,),
        "do": (B, T, N, V), "dlse": (B, T, N),
    }
    return {
        n: jax.random.normal(key, s).astype(dtype) for (n, s), key in zip(shapes.items(), keys)
    }


def places(first=10):
    q = jnp.broadcast_to(jnp.arange(T) + first, (B, T))
    return q, jnp.broadcast_to(jnp.arange(S), (B, S))


def modified(slope):
    return lambda s, h, q, k: s - slope[h] * jnp.abs(q - k)


def whole(a, first=10, sink=True):
    return attention(
        a["q"], a["k"], a["v"], positions=places(first), score_mod=modified(a["slope"]),
        sink_logits=a["sink"] if sink else None, return_lse=True,
        softmax_dtype=a["slope"].dtype.name, **OPTIONS,
    )


def step(a, carry, low, high, first=10):
    q, k = places(first)
    return attention_step(
        carry, a["q"], a["k"][:, low:high], a["v"][:, low:high], positions=(q, k[:, low:high]),
        score_mod=modified(a["slope"]), softmax_dtype=a["slope"].dtype.name, **OPTIONS,
    )


def in_parts(a, parts, first=10, sink=True):
    carry = None
    for low, high in parts:
        carry = step(a, carry, low, high, first)
    return finish(carry, a["sink"] if sink else None, a["v"].dtype)


def gradients(f, a):
    """Values and gradients; rows without keys count with their zeros."""

    def loss(a):
        o, lse = f(a)
        seen = jnp.where(jnp.isfinite(lse), lse, 0)
        return (o * a["do"]).sum() + (seen * a["dlse"]).sum(), (o, lse)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(a)


CUTS = [
    [(0, 37)], [(0, 20), (20, 37)], [(30, 37), (0, 1), (1, 30)],
    [(5, 5), (0, 37)], [(0, 9), (9, 9), (9, 37), (37, 37)],
]


@pytest.mark.parametrize("parts", CUTS)
@pytest.mark.parametrize("sink, first", [(True, 10), (False, -6)])
def test_any_split_is_one_call(parts, sink, first):
    """Also where most rows see no key at all (first = -6), in any part or in all of them."""
    a = arrays()
    found = gradients(functools.partial(in_parts, parts=parts, sink=sink, first=first), a)
    expected = gradients(functools.partial(whole, sink=sink, first=first), a)
    if not sink:
        empty = np.isneginf(expected[0][1][1])
        assert empty[:, :6].all() and not empty[:, 6:].any()
        assert (np.asarray(found[1]["q"])[:, :6] == 0).all()
    close_trees(found, expected)


def test_in_float64():
    with enable_x64():
        a = arrays("float64")
        parts = CUTS[2]
        found = gradients(functools.partial(in_parts, parts=parts), a)
        assert found[1]["slope"].dtype == "float64"
        close_trees(found, gradients(whole, a), dtype="float64")


def test_bf16_keeps_a_float32_carry():
    """Parts are not rounded on the way: as exact as one call, whose output is rounded once."""
    a = arrays()
    a = {n: x.astype(jnp.bfloat16) if n in "qkv" else x for n, x in a.items()}
    carry = step(a, step(a, None, 0, 13), 13, S)
    assert {carry.o.dtype, carry.m.dtype, carry.l.dtype} == {jnp.dtype("float32")}
    o, lse = finish(carry, a["sink"], jnp.bfloat16)
    expected = whole(a)
    assert o.dtype == jnp.bfloat16
    np.testing.assert_allclose(lse, expected[1], rtol=2e-5, atol=2e-5)
    error = np.abs(np.float32(o) - np.float32(expected[0])).max()
    assert error <= 2.0**-7 * np.abs(np.float32(expected[0])).max()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(order=st.permutations(range(4)), tree=st.sampled_from(["left", "right", "pairs"]))
def test_merge_in_any_order(order, tree):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "tile_sizes", lambda *_: (8, 8))
        a = arrays()
        cuts = [0, 7, 7, 20, S]
        parts = [jitted_step()(a, cuts[i], cuts[i + 1]) for i in order]
        if tree == "left":
            out = functools.reduce(merge, parts)
        elif tree == "right":
            out = functools.reduce(lambda x, y: merge(y, x), reversed(parts))
        else:
            out = merge(merge(*parts[:2]), merge(*parts[2:]))
        empty = Carry.empty(B, T, N, V)
        close_trees(finish(merge(empty, out), a["sink"]), jitted_whole()(a))


@functools.cache
def jitted_step():
    return jax.jit(lambda a, low, high: step(a, None, low, high), static_argnums=(1, 2))


@functools.cache
def jitted_whole():
    return jax.jit(whole)


def test_nothing_seen():
    empty = Carry.empty(B, T, N, V)
    both = merge(empty, empty)
    o, lse = finish(both)
    assert (o == 0).all() and np.isneginf(lse).all()
    o, lse = finish(both, jnp.arange(4.0))
    assert (o == 0).all() and (lse == jnp.arange(4.0)).all()

    def loss(carry, sink):
        o, lse = finish(merge(carry, carry), sink)
        return o.sum() + lse.sum()

    for x in jax.tree.leaves(jax.grad(loss, (0, 1))(empty, jnp.zeros(4))):
        assert jnp.isfinite(x).all()


def test_a_carry_goes_round_a_scan():
    """As a ring does it: parts of one size, the carry through lax.scan, gradients through all."""
    a = arrays()
    a = {n: x[:, :36] if n in "kv" else x for n, x in a.items()}

    def ring(a):
        q, k = places()
        parts = tuple(
            jnp.stack(jnp.split(x, 4, 1)) for x in (a["k"], a["v"], k[:, :36])
        )

        def one(carry, part):
            k, v, where = part
            return attention_step(
                carry, a["q"], k, v, positions=(q, where), score_mod=modified(a["slope"]),
                **OPTIONS,
            ), None

        carry, _ = jax.lax.scan(one, Carry.empty(B, T, N, V), parts)
        return finish(carry, a["sink"])

    def once(a):
        q, k = places()
        return attention(
            a["q"], a["k"], a["v"], positions=(q, k[:, :36]), score_mod=modified(a["slope"]),
            sink_logits=a["sink"], return_lse=True, **OPTIONS,
        )

    close_trees(gradients(ring, a), gradients(once, a))


def _step(carry=None, **options):
    a = arrays()
    return attention_step(
        carry, a["q"], a["k"], a["v"], positions=places(), **({"mask": Prefix(3)} | options)
    )


@pytest.mark.parametrize("make, error, message", [
    (
        lambda: _step(Carry.empty(B, T + 1, N, V)), ShapeError,
        r"carry.o has shape \(2, 12, 4, 6\): must be \(2, 11, 4, 6\)",
    ),
    (
        lambda: _step(Carry.empty(B, T, N, V, "bfloat16")), ConfigError,
        "carry.o has dtype bfloat16: softmax_dtype is float32",
    ),
    (lambda: merge(Carry.empty(1, 2, 3, 4), Carry.empty(1, 2, 3, 5)), ShapeError, "carry.o has"),
    (
        lambda: finish(Carry.empty(1, 2, 3, 4), jnp.zeros(4)), ShapeError,
        r"sink_logits has shape \(4,\): must be \[N\] = \(3,\)",
    ),
    (lambda: _step(impl="reference"), ImplementationError, "reference: it takes no carry"),
    (lambda: _step(scale=jnp.ones(())), ConfigError, "scale is an array"),
])
def test_bad_carries(make, error, message):
    with pytest.raises(error, match=message):
        make()
