"""Rows of any tokens and heads: against attention, and against a computation row by row."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flex_cases import bucket
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_cases import (
    MASKS,
    SCORES,
    B,
    G,
    K,
    N,
    R,
    S,
    V,
    arrays,
    brute,
    compare,
    dense,
    pulled,
    ragged,
)

from attnlab.core.mask import Causal, Coords, Full, MaskMod, SinkTokens, Window
from attnlab.core.mods import Mod
from attnlab.core.versions import enable_x64
from attnlab.ops.attention import attention, xla
from attnlab.ops.attention.blocks import FULL, NONE, PARTIAL, block_lists
from attnlab.ops.attention.packed_rows import every_row
from attnlab.ops.attention.rows import _by_head, _with_sinks, attention_rows
from attnlab.testing.budget import close, close_trees


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(xla, "tile_sizes", lambda *_: (8, 8))


@functools.cache
def compiled(mod: str, mask: str, options: tuple, impl: str, dtype: str = "float32"):
    def run(a, places, cotangents):
        def f(a):
            more = dict(options)
            sinks = a["sinks"] if more.pop("sinks", False) else None
            score = SCORES[mod] and SCORES[mod](a)
            return attention_rows(
                a["q"], a["k"], a["v"], num_heads=N, mask=MASKS[mask][0], score_mod=score,
                sink_logits=sinks, return_lse=True, softmax_dtype=dtype, impl=impl, **places, **more
            )

        return pulled(f, a, cotangents)

    return jax.jit(run)


@functools.cache
def exact(mod: str, mask: str, options: tuple):
    def run(a, places, cotangents):
        return pulled(lambda a: dense(a, places, mod, mask, dict(options)), a, cotangents)

    return jax.jit(run)


def check(seed, places, mod, mask, options, impl, dtype="float32") -> None:
    a = arrays(seed)
    rng = np.random.default_rng(seed + 1)
    do, dlse = rng.standard_normal((B, K, R, V)), rng.standard_normal((B, K, R))
    with enable_x64(True):
        wide = jax.tree.map(np.float64, a)
        expected = jax.tree.map(np.asarray, exact(mod, mask, options)(wide, places, (do, dlse)))
        by_row = brute(wide, places, mod, mask, dict(options))
    with enable_x64(dtype == "float64"):
        a = jax.tree.map(lambda x: x.astype(dtype), a)
        run = compiled(mod, mask, options, impl, dtype)
        found = jax.tree.map(np.asarray, run(a, places, (do, dlse)))
    close(expected["o"], by_row[0], dtype="float64", kind="op", name="the oracle itself, o")
    close(expected["lse"], by_row[1], dtype="float64", kind="op", name="the oracle itself, lse")
    compare(found, expected, dtype)
    empty = np.isneginf(by_row[1]) | (places["segments"][0] == 0)
    assert (found["o"][empty] == 0).all() and (found["d"]["q"][empty] == 0).all()


CASES = [
    ("none", "causal", ()),
    ("slopes", "causal", (("sinks", True),)),
    ("tokens", "by head", (("logit_cap", 2.0), ("sink_tokens", 2))),
    ("tables", "prefixes", (("sinks", True), ("scale", 0.7))),
    ("keys of heads", "by head", (("sinks", True), ("logit_cap", 3.0))),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}, {case[1]}")
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20), segments=st.integers(1, 4), ordered=st.booleans(),
    spread=st.sampled_from([1, 30, 500]),
)
def test_ragged_rows(case, seed, segments, ordered, spread):
    """Any heads, positions and documents, rows without keys, padding: everything's gradient."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "tile_sizes", lambda *_: (8, 8))
        check(seed, ragged(seed, segments, spread, ordered), *case, "xla")


@pytest.mark.parametrize("case", CASES[2:], ids=lambda case: f"{case[0]}, {case[1]}")
def test_ragged_rows_of_the_reference_and_in_float64(case):
    check(5, ragged(5), *case, "reference")
    check(6, ragged(6), *case, "xla", "float64")


def test_no_segments_and_no_index():
    places = ragged(7) | {"segments": (np.ones((B, K, R), np.int32), np.ones((B, S), np.int32))}
    given = {n: x for n, x in places.items() if n not in ("segments", "index")}
    a, cotangents = arrays(7), (np.ones((B, K, R, V)), np.ones((B, K, R)))
    found = compiled("tokens", "causal", (), "xla")(a, given, cotangents)
    with enable_x64(True):
        wide = jax.tree.map(np.float64, a)
        expected = exact("tokens", "causal", ())(wide, places | {"index": None}, cotangents)
    compare(found, expected)


@pytest.mark.parametrize(
    "N, K, impl",
    [(1, 1, "xla"), (4, 4, "xla"), (6, 2, "xla"), (128, 1, "xla"), (6, 2, "reference")],
)
def test_every_head_of_every_token_is_attention(N, K, impl):
    T = 13 if N > 8 else 20
    keys = iter(jax.random.split(jax.random.key(N), 12))
    shapes = {
        "q": (2, T, N, 8), "k": (2, T, K, 8), "v": (2, T, K, 4), "sinks": (N,), "slope": (N,),
        "gate": (2, N, T), "table": (N, 32),
    }
    a = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    cut = jnp.array([[7], [T - 3]])
    place = jnp.broadcast_to(jnp.arange(T), (2, T))
    segments = jnp.where(place < cut, 1, jnp.where(place < T - 2, 2, 0))
    positions = jnp.where(place < cut, place, place - cut)
    options = dict(
        mask=Causal() & (Window(6) | MaskMod.of(lambda h, q, k: (k + h) % 4 == 0)), impl=impl,
        sink_tokens=1, logit_cap=3.0, return_lse=True,
    )

    def mod(a):
        return lambda s, h, q, k, *, batch, q_index, k_index: (
            s * jnp.tanh(a["gate"][batch, h, q_index]) + a["gate"][batch, h, k_index]
            + a["slope"][h] * (k - q) + a["table"][h, bucket(q - k)]
        )

    def whole(a):
        return attention(
            a["q"], a["k"], a["v"], score_mod=mod(a), sink_logits=a["sinks"], positions=positions,
            segments=segments, **options,
        )

    def by_rows(a):
        rows = every_row(2, T, N, K)
        o, lse = attention_rows(
            rows.take(a["q"]), a["k"], a["v"], num_heads=N, score_mod=mod(a),
            sink_logits=a["sinks"], **rows.keywords(positions, segments), **options,
        )
        return rows.put(o), rows.put(lse)

    cotangents = [jax.random.normal(next(keys), (2, T, N, *tail)) for tail in ((4,), ())]
    runs = [jax.jit(lambda a, f=f: pulled(f, a, cotangents))(a) for f in (by_rows, whole)]
    compare(*runs)


def test_causality_token_by_token():
    """No row sees a key behind its position, and every row sees the one at it."""
    a, places = arrays(3), ragged(3, segments=1)
    places["segments"] = (np.ones((B, K, R), np.int32), np.ones((B, S), np.int32))
    places["positions"] = (places["positions"][0] % S, np.tile(np.int32(np.arange(S)), (B, 1)))
    run, where = compiled("slopes", "causal", (("sinks", True),), "xla"), places["positions"][0]
    for token in range(S):
        here = np.float32(where == token)
        found = run(a, places, (here[..., None] * np.ones(V, np.float32), here))["d"]
        for name in "kv":
            assert (found[name][:, token + 1 :] == 0).all(), (name, token)
            groups = np.abs(found[name][:, token]).max(-1) > 0
            assert (groups == (here.max(-1) > 0)).all(), (name, token)


def test_sinks_without_keys_and_keys_without_sinks():
    """Values and gradients of the four corners, with cotangents everywhere."""
    lse = jnp.array([-jnp.inf, -jnp.inf, 0.5, 0.5, 90.0, -90.0])
    sink = jnp.array([-jnp.inf, 1.5, -jnp.inf, 1.5, -90.0, 90.0])
    o = jnp.where(lse > -jnp.inf, 2.0, 0.0)[:, None]
    (found, total), pull = jax.vjp(_with_sinks, o, lse, sink)
    do, dlse, dsink = pull((jnp.ones_like(o), jnp.ones_like(lse)))
    share = jax.nn.sigmoid(-1.0)
    close(found[:, 0], np.array([0, 0, 2, 2 * share, 2, 0]))
    close(total, np.array([-np.inf, 1.5, 0.5, np.logaddexp(0.5, 1.5), 90, 90]))
    close(do[:, 0], np.array([0, 0, 1, share, 1, 0]))
    slope = 2 * share * (1 - share)
    close(dlse, np.array([0, 0, 1, share + slope, 1, 0]))
    close(dsink, np.array([0, 1, 0, 1 - share - slope, 0, 1]))


def test_gradients_of_sinks_are_not_scattered():
    heads = jnp.zeros((B, K, R), jnp.int32)
    text = str(jax.make_jaxpr(jax.grad(lambda x: _by_head(x, heads).sum()))(jnp.ones(N)))
    assert "scatter" not in text and "reduce_sum" in text


def test_tiles_of_packed_heads_are_a_triangle():
    rows = every_row(1, 64, 8, 2)
    at = rows.keywords(jnp.arange(64)[None])["positions"]
    q, k = Coords(at[0][0], None, jnp.arange(256)), Coords(at[1], None, jnp.arange(64))
    lists = block_lists(Causal(), q, k, block_q=64, block_k=16)
    expected = np.select([np.tri(4, k=-1) > 0, np.eye(4) > 0], [FULL, PARTIAL], NONE)
    assert (lists.kinds(4) == expected).all()


def test_numbers_of_rows_and_heads_of_a_shard():
    """A function told which heads are at hand: two shards, one group each, are the whole call."""
    a, places = arrays(9), ragged(9)

    def mod(s, h, q, k, *, batch):
        return s + jnp.cos(1.0 * h * k + batch)

    def mask(h, q, k):
        return (q >= k) & ((q + h) % 3 > 0)

    def call(kappa, score, mask):
        cut = {"q": a["q"][:, kappa], "k": a["k"][:, :, kappa], "v": a["v"][:, :, kappa]}
        sides = {n: (x[0][:, kappa], x[1]) for n, x in places.items() if isinstance(x, tuple)}
        first = kappa.start or 0
        heads = places["heads"][:, kappa] - first * G
        return attention_rows(
            **cut, **sides, heads=heads, num_heads=heads.shape[1] * G, mask=mask, score_mod=score,
            return_lse=True,
        )

    whole = jax.jit(lambda: call(slice(None), mod, mask))()
    for i in range(K):
        at = dict(heads=np.arange(i * G, (i + 1) * G), batch=np.arange(B))
        score = Mod.of(mod, score_dtype="float32").at(**at)
        part = jax.jit(
            lambda i=i, score=score, at=at: call(
                slice(i, i + 1), score, MaskMod(Mod.of(mask).at(**at))
            )
        )()
        close_trees(part, tuple(x[:, i : i + 1] for x in whole), name=f"group {i}")


def test_sink_tokens_and_full():
    a, places = arrays(11), ragged(11)
    options = dict(num_heads=N, return_lse=True, **places)
    qkv = a["q"], a["k"], a["v"]
    close_trees(
        attention_rows(*qkv, mask=Window(3), sink_tokens=2, **options),
        attention_rows(*qkv, mask=(Window(3) & Full()) | SinkTokens(2), **options),
    )
