"""Rows of selected tokens and heads: packed, attended, put back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core.errors import ConfigError, DtypeError, ShapeError
from attnlab.core.mask import Causal, Coords, Segments, Window
from attnlab.ops.attention import attention, xla
from attnlab.ops.attention.blocks import NONE, block_lists
from attnlab.ops.attention.packed_rows import every_row, pack_rows, pack_tokens
from attnlab.ops.attention.rows import attention_rows
from attnlab.testing.budget import close_trees, identical

B, T, N, K = 2, 15, 6, 2
G = N // K


def drawn(seed: int, density: float = 0.4, shape=(B, N, T)):
    return np.random.default_rng(seed).random(shape) < density


def normal(*shape, seed=0):
    return np.float32(np.random.default_rng(seed).standard_normal(shape))


def check(rows, selected, R: int) -> None:
    """Against the definition, pair by pair in NumPy."""
    heads, tokens, used, places = map(np.asarray, (rows.heads, rows.tokens, rows.used, rows.places))
    assert heads.shape == tokens.shape == used.shape == (B, K, R)
    assert (heads // G == np.arange(K)[:, None]).all()
    for b, kappa in np.ndindex(B, K):
        pairs = [
            (t, n) for t in range(T) for n in range(kappa * G, (kappa + 1) * G) if selected[b, n, t]
        ]
        count = len(pairs)
        mine = list(zip(tokens[b, kappa].tolist(), heads[b, kappa].tolist()))
        assert mine[:count] == pairs and (used[b, kappa] == (np.arange(R) < count)).all()
        assert not count or mine[count:] == [pairs[-1]] * (R - count)
        for r, (t, n) in enumerate(pairs):
            assert places[b, t, n] == r
    assert ((places >= 0) == selected.swapaxes(1, 2)).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_every_selected_pair_has_its_row(seed, density):
    selected = drawn(seed, density)
    check(jax.jit(lambda x: pack_rows(x, K))(selected), selected, T * G)
    most = max(1, selected.reshape(B, K, -1).sum(-1).max())
    check(pack_rows(selected, K, int(most)), selected, most)
    check(pack_rows(selected, K, 50), selected, 50)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), J=st.sampled_from([1, 4, 20]))
def test_listed_tokens(seed, J):
    """Entries in any order, twice, and empty ones on both sides."""
    tokens = np.random.default_rng(seed).integers(-3, T + 3, (B, N, J)).astype(np.int32)
    selected = (tokens[..., None] == np.arange(T)).any(2)
    rows = jax.jit(lambda x: pack_tokens(x, T, K))(tokens)
    check(rows, selected, min(J, T) * G)


def test_every_row_is_all_selected():
    rows, packed = every_row(B, T, N, K), pack_rows(np.ones((B, N, T), bool), K)
    leaves = zip(jax.tree.leaves(rows), jax.tree.leaves(packed), strict=True)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in leaves)
    x, y = normal(B, T, N, 5), normal(B, K, T * G, 5)
    identical((rows.take(x), rows.put(y)), (packed.take(x), packed.put(y)))


@pytest.mark.parametrize("tail", [(), (5,), (2, 3)])
def test_there_and_back(tail):
    """take and put are each other's transpose, and leave what is selected as it is."""
    selected = drawn(1)
    rows = pack_rows(selected, K)
    x, y = normal(B, T, N, *tail), normal(B, K, T * G, *tail, seed=1)
    taken = selected.swapaxes(1, 2).reshape(B, T, N, *[1] * len(tail))
    identical(rows.put(rows.take(x)), jnp.where(taken, x, 0))
    (there, pull), (back, pull_back) = jax.vjp(rows.take, x), jax.vjp(rows.put, y)
    np.testing.assert_allclose((there * y).sum(), (x * back).sum(), rtol=1e-5)
    identical((pull(y)[0], pull_back(x)[0]), (rows.put(y), rows.take(x)))
    second = jax.grad(lambda x: (jax.grad(lambda x: (rows.take(x) ** 3).sum())(x) ** 2).sum())(x)
    np.testing.assert_allclose(second, np.where(taken, 36 * x**3, 0), rtol=1e-5, atol=1e-5)


def primitives(jaxpr) -> set[str]:
    inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values()))]
    inner = [getattr(x, "jaxpr", x) for x in inner]
    names = {eqn.primitive.name for eqn in jaxpr.eqns}
    return names.union(*(primitives(x) for x in inner if hasattr(x, "eqns")))


def test_nothing_is_scattered_but_numbers():
    """The only scatter is that of row numbers; values and gradients are gathered."""
    rows = pack_rows(drawn(2), K)

    def loss(x):
        return (rows.put(rows.take(x) ** 2) ** 2).sum()

    sums = {"scatter-add", "scatter_add"}
    plain = primitives(jax.make_jaxpr(jax.grad(lambda x: x[rows.tokens[0]].sum()))(normal(T)).jaxpr)
    assert plain & sums, "what is looked for has this name"
    used = primitives(jax.make_jaxpr(jax.grad(loss))(normal(B, T, N, 4)).jaxpr)
    assert "gather" in used and not used & (sums | {"scatter", "sort"})
    used = primitives(jax.make_jaxpr(lambda x: pack_rows(x, K))(drawn(2)).jaxpr)
    assert {"scatter", "cumsum"} <= used and not used & (sums | {"sort"})


def test_padding_rows_keep_tiles_narrow():
    """They stand at the last position taken: a window visits no tile for their sake."""
    selected = np.zeros((1, 2, 64), bool)
    selected[:, 0, 40:] = True
    rows = pack_rows(selected, 1)
    at = rows.keywords(jnp.arange(64)[None])
    q = Coords(at["positions"][0][0], at["segments"][0][0], jnp.arange(128))
    k = Coords(at["positions"][1], at["segments"][1], jnp.arange(64))
    kinds = block_lists(Causal() & Window(8) & Segments(), q, k, block_q=16, block_k=8).kinds(8)
    # Rows 0 to 15 are tokens 40 to 55, rows 16 to 23 tokens 56 to 63, the rest is padding.
    visited = [np.flatnonzero(row != NONE).tolist() for row in kinds[0, 0]]
    assert visited == [[4, 5, 6], [6, 7], [], [], [], [], [], []]


@pytest.mark.parametrize("segments", [None, np.tile(np.int32(np.arange(T) // 3), (B, 1))])
def test_padding_is_of_segment_zero(segments):
    """With and without documents, the first of them padding; rows behind repeat the last token."""
    rows, positions = pack_rows(drawn(5), K), np.tile(np.int32(np.arange(T)), (B, 1))
    own, keys = rows.keywords(positions, segments)["segments"]
    kept = np.ones((B, T), np.int32) if segments is None else segments
    expected = np.where(rows.used, kept[np.arange(B)[:, None, None], np.asarray(rows.tokens)], 0)
    assert (own == expected).all() and (keys == kept).all() and not np.asarray(rows.used).all()


CASES = {"one document": False, "documents and padding": True}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["selected", "tokens"])
def test_routed_heads_are_attention_of_the_selected(name, form, monkeypatch):
    """Outputs, log-sum-exps and all gradients; what is not selected is zero."""
    monkeypatch.setattr(xla, "tile_sizes", lambda *_: (8, 8))
    H, J = 8, 5
    a = {
        "q": normal(B, T, N, H, seed=1), "k": normal(B, T, K, H, seed=2),
        "v": normal(B, T, K, 4, seed=3), "sinks": normal(N, seed=4), "slope": normal(N, seed=5),
        "gate": normal(B, N, T, seed=6),
    }
    place = jnp.broadcast_to(jnp.arange(T), (B, T))
    segments = jnp.where(place < 6, 1, jnp.where(place < 12, 2, 0)) if CASES[name] else None
    positions = jnp.where(place < 6, place, place - 6) if CASES[name] else place
    order = np.argsort(np.random.default_rng(3).random((B, N, T)), -1)
    tokens = np.int32(order[..., :J])
    selected = (tokens[..., None] == np.arange(T)).any(2)
    options = dict(mask=Causal() & Window(6), logit_cap=3.0, return_lse=True)

    def mod(a):
        return lambda s, h, q, k, *, batch, q_index, k_index: (
            s * jnp.tanh(a["gate"][batch, h, q_index]) + a["gate"][batch, h, k_index]
            + a["slope"][h] * (k - q)
        )

    def whole(a, selected):
        o, lse = attention(
            a["q"], a["k"], a["v"], score_mod=mod(a), sink_logits=a["sinks"], positions=positions,
            segments=segments, **options,
        )
        taken = selected.swapaxes(1, 2)
        return jnp.where(taken[..., None], o, 0), jnp.where(taken, lse, 0)

    def routed(a, selected, tokens):
        rows = pack_rows(selected, K) if form == "selected" else pack_tokens(tokens, T, K)
        o, lse = attention_rows(
            rows.take(a["q"]), a["k"], a["v"], num_heads=N, score_mod=mod(a),
            sink_logits=a["sinks"], **rows.keywords(positions, segments), **options,
        )
        return rows.put(o), rows.put(lse)

    def pulled(f, *more):
        outs, pull = jax.vjp(lambda a: f(a, *more), a)
        return outs, pull((normal(B, T, N, 4, seed=8), normal(B, T, N, seed=9)))

    found = jax.jit(lambda *more: pulled(routed, *more))(selected, tokens)
    close_trees(found, jax.jit(lambda x: pulled(whole, x))(selected))


def test_keys_that_are_not_the_tokens():
    """New tokens over a longer cache."""
    selected, S = drawn(4), 40
    rows = pack_rows(selected, K)
    q, k, v = normal(B, T, N, 8), normal(B, S, K, 8, seed=1), normal(B, S, K, 8, seed=2)
    places = [np.tile(np.int32(x), (B, 1)) for x in (np.arange(S - T, S), np.arange(S))]
    o = attention_rows(
        rows.take(q), k, v, num_heads=N, **rows.keywords(places[0], keys=(places[1], None))
    )
    expected = attention(q, k, v, positions=tuple(map(jnp.asarray, places)))
    close_trees(rows.put(o), jnp.where(selected.swapaxes(1, 2)[..., None], expected, 0))


ROWS = every_row(B, T, N, K)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: pack_rows(drawn(0)[0], K), ShapeError, r"must be \[B, N, T\]"),
        (lambda: pack_rows(drawn(0)[:0], K), ShapeError, "none of them 0"),
        (lambda: pack_rows(np.int32(drawn(0)), K), DtypeError, "selected has dtype int32"),
        (lambda: pack_rows(drawn(0), 4), ShapeError, "N = 6 query heads over K = 4"),
        (lambda: every_row(B, T, N, 0), ShapeError, "over K = 0"),
        (lambda: pack_rows(drawn(0, 1.0), K, 44), ConfigError, "capacity = 44.* up to 45 pairs"),
        (lambda: jax.jit(lambda x: pack_rows(x, K, 44))(drawn(0, 0.1)), ConfigError, "up to 45"),
        (lambda: pack_tokens(drawn(0), T, K), DtypeError, "tokens has dtype bool"),
        (lambda: pack_tokens(np.zeros((B, N, 4), "i4"), T, K, 11), ConfigError, "up to 12 pairs"),
        (lambda: ROWS.take(normal(B, N, T)), ShapeError, r"must start with \(2, 15, 6\)"),
        (lambda: ROWS.put(normal(B, T, N)), ShapeError, r"must start with \(2, 2, 45\)"),
        (lambda: ROWS.keywords(np.zeros((B, 3), "i4")), ShapeError, r"must be \[B, T\]"),
        (
            lambda: ROWS.keywords(np.zeros((B, T), "i4"), keys=(np.zeros((B, 3)),) * 2),
            ConfigError, "segments of the queries = None",
        ),
    ],
)
def test_bad_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
