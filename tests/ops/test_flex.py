"""The op with score and mask functions against a dense computation in float64: values, log-sum-exp
and the gradients of everything, captured arrays included.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flex_cases import MODS, SHAPES, Shape, coordinates, dense, odd, visible
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core.mask import Blocks, Causal, Full, MaskMod, Prefix, SinkTokens, Window
from attnlab.core.versions import enable_x64
from attnlab.ops.attention import attention, xla
from attnlab.testing.budget import close

TABLE = np.random.default_rng(7).random((4, 40, 40)) < 0.4
TABLE[:, 3] = False  # a query that sees nothing


def places(s: Shape, kind: str) -> dict:
    """Positions and segments: "plain", "packed" documents, "odd" unordered numbers."""
    rng = np.random.default_rng(1)
    if kind == "odd":
        return {
            name: tuple(rng.integers(0, most, (s.B, n)).astype(np.int32) for n in (s.T, s.S))
            for name, most in (("positions", 50), ("segments", 4))
        }
    rows = [np.arange(n) for n in (s.T, s.S)]
    if kind == "plain":
        rows[0] = rows[0] + (s.S - s.T)
        return {"positions": tuple(np.int32(np.broadcast_to(r, (s.B, len(r)))) for r in rows)}
    found: dict = {"positions": [], "segments": []}
    for row in rows:
        cut = len(row) * 2 // 5
        found["positions"].append(np.where(row < cut, row, row - cut))
        found["segments"].append(np.where(row < cut, 1, np.where(row < len(row) - 3, 2, 0)))
    return {
        name: tuple(np.int32(np.broadcast_to(x, (s.B, len(x)))) for x in pair)
        for name, pair in found.items()
    }


# A mask, its dense form, and where the tokens stand.
MASKS = {
    "causal": (Causal(), lambda c: c.q_pos >= c.k_pos, "plain"),
    "table": (
        lambda: lambda h, q, k, *, q_index, k_index: jnp.asarray(TABLE)[h, q_index, k_index],
        lambda c: TABLE[c.head, c.q_index, c.k_index], "plain",
    ),
    "packed": (
        Causal() & (Window(5) | SinkTokens(1)),
        lambda c: (c.q_pos >= c.k_pos) & ((c.q_pos - c.k_pos < 5) | (c.k_pos < 1)), "packed",
    ),
    "strided": (
        lambda: Causal() & MaskMod.of(lambda h, q, k, *, batch: (q - k + h) % 3 <= batch),
        lambda c: (c.q_pos >= c.k_pos) & ((c.q_pos - c.k_pos + c.head) % 3 <= c.batch), "odd",
    ),
    "documents": (
        lambda: lambda h, q, k, *, q_segment, k_segment: (q_segment + k_segment) % 2 == 0,
        lambda c: (c.q_segment + c.k_segment) % 2 == 0, "packed",
    ),
    "full": (Full(), lambda c: c.q_index >= 0, "plain"),
}


def case(mod: str, mask: str, shape: str, options: tuple = ()):
    return pytest.param(mod, mask, shape, dict(options), id=f"{mod}-{mask}-{shape}")


_masks, _shapes = list(MASKS), list(SHAPES)
DIAGONAL = [
    case(mod, _masks[i % len(_masks)], _shapes[i % 2], (("sink", i % 3 == 0),))
    for i, mod in enumerate(MODS)
]
MORE = [
    case("several", "packed", "gqa", (("sink", True), ("cap", 2.0))),
    case("several", "documents", "one_tile", (("cap", 1.5),)),
    case("alibi", "table", "one_tile"), case("holes", "strided", "gqa", (("sink", True),)),
    case("weights", "packed", "gqa"), case("dense_rows", "causal", "one_tile"),
    case("forget", "packed", "cross"), case("t5", "causal", "gqa"),
    case("steep_padding", "causal", "gqa"), case("cap", "documents", "one_tile"),
]
PRODUCT = [
    case(mod, mask, shape, (("sink", (i + j) % 2 == 0),))
    for i, mod in enumerate(MODS) for j, mask in enumerate(MASKS) for shape in SHAPES
    if mod != "several" or MASKS[mask][2] != "plain"  # it reads segments
]


def build(mod: str, mask: str, s: Shape, options: dict):
    """The arrays of a case, its coordinates and what is visible."""
    rng = np.random.default_rng(0)
    shapes = {"q": (s.B, s.T, s.N, s.H), "k": (s.B, s.S, s.K, s.H), "v": (s.B, s.S, s.K, s.V)}
    a: dict = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    if options.get("sink"):
        a["sink_logits"] = rng.standard_normal(s.N)
    a["captured"] = MODS[mod].draw(s)
    if mod == "weights":
        a["captured"]["w"] = np.maximum(a["captured"]["w"], 0)
    cotangents = rng.standard_normal((s.B, s.T, s.N, s.V)), rng.standard_normal((s.B, s.T, s.N))
    where = places(s, MASKS[mask][2])
    c = coordinates(s, where)
    seen = np.broadcast_to(MASKS[mask][1](c), (s.B, s.N, s.T, s.S))
    if "segments" in where:
        seen = seen & np.asarray((c.q_segment == c.k_segment) & (c.q_segment > 0))
    return a, cotangents, where, c, seen


def pulled_on_device(f, a, cotangents):
    (o, lse), pull = jax.vjp(f, a)
    cotangents = tuple(jnp.asarray(x, o.dtype) for x in cotangents)
    return {"o": o, "lse": lse, "d": pull(cotangents)[0]}


def pulled(f, a, cotangents):
    return jax.tree.map(np.asarray, pulled_on_device(f, a, cotangents))


@functools.cache
def oracle(mod: str, mask: str, shape: str, options: tuple):
    s, options_ = SHAPES[shape], dict(options)
    a, cotangents, _, c, seen = build(mod, mask, s, options_)
    with enable_x64(True):
        a = jax.tree.map(jnp.asarray, a)

        def f(a):
            return dense(a, s, seen, MODS[mod], c, scale=0.4, cap=options_.get("cap"))

        return pulled(f, a, tuple(map(jnp.asarray, cotangents)))


def compute(mod: str, mask: str, s: Shape, options: dict, dtype: str, impl: str):
    a, cotangents, where, _, _ = build(mod, mask, s, options)
    mask_of = MASKS[mask][0]
    with enable_x64(dtype == "float64"):
        a, cotangents, where = (
            jax.tree.map(lambda x: jnp.asarray(x, dtype), a),
            tuple(jnp.asarray(x, dtype) for x in cotangents), jax.tree.map(jnp.asarray, where),
        )

        def run(a, cotangents, where):
            def f(a):
                a = dict(a)
                captured = a.pop("captured")
                return attention(
                    **a, **where, mask=mask_of() if callable(mask_of) else mask_of,
                    score_mod=MODS[mod].pair(captured), scale=0.4, logit_cap=options.get("cap"),
                    return_lse=True, softmax_dtype=dtype, impl=impl,
                )

            return pulled_on_device(f, a, cotangents)

        run = jax.jit(run) if impl == "xla" else run
        return jax.tree.map(np.asarray, run(a, cotangents, where))


def compare(found, expected, dtype: str) -> None:
    flat, tree = jax.tree_util.tree_flatten_with_path(found)
    assert tree == jax.tree.structure(expected)
    for (path, x), y in zip(flat, jax.tree.leaves(expected)):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(x).all() or "lse" in name, f"{name} is not finite"
        kind = "gradient" if "captured" in name else "op"
        close(x, y, dtype=dtype, kind=kind, name=name)


def check(mod, mask, shape, options, dtype, impl, monkeypatch):
    s = SHAPES[shape]
    monkeypatch.setattr(xla, "tile_sizes", lambda *_: s.tiles)
    expected = oracle(mod, mask, shape, tuple(options.items()))
    compare(compute(mod, mask, s, options, dtype, impl), expected, dtype)


@pytest.mark.parametrize("mod, mask, shape, options", DIAGONAL + MORE)
def test_against_a_dense_computation(mod, mask, shape, options, monkeypatch):
    check(mod, mask, shape, options, "float32", "xla", monkeypatch)


@pytest.mark.parametrize("mod, mask, shape, options", [MORE[0], MORE[3], MORE[6]])
def test_in_float64(mod, mask, shape, options, monkeypatch):
    check(mod, mask, shape, options, "float64", "xla", monkeypatch)


@pytest.mark.parametrize("mod, mask, shape, options", [MORE[0], MORE[1], *DIAGONAL[12:14]])
def test_the_reference_too(mod, mask, shape, options, monkeypatch):
    check(mod, mask, shape, options, "float32", "reference", monkeypatch)


@functools.cache
def drawn_runs():
    """The op and the oracle with everything that is drawn as data: compiled once."""
    s = Shape(2, 24, 24, 2, 1, 4, 4, (8, 8))
    mod = MODS["several"]

    def run(a, where, table, cotangents):
        def f(a):
            a = dict(a)
            captured = a.pop("captured")
            return attention(
                **a, **where, score_mod=mod.pair(captured), return_lse=True, scale=0.4,
                mask=lambda h, q, k, *, q_index, k_index: table[h, q_index, k_index],
            )

        return pulled_on_device(f, a, cotangents)

    def exact(a, where, table, cotangents):
        c = coordinates(s, where)
        seen = table & (c.q_segment == c.k_segment) & (c.q_segment > 0)
        return pulled_on_device(lambda a: dense(a, s, seen, mod, c, scale=0.4), a, cotangents)

    return s, jax.jit(run), jax.jit(exact)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**30), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    segments=st.integers(1, 5), ordered=st.booleans(), spread=st.sampled_from([1, 24, 1000]),
)
def test_drawn_masks_positions_and_segments(seed, density, segments, ordered, spread):
    """Empty rows, padding, repeated and unordered positions, documents in any order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "tile_sizes", lambda *_: (8, 8))
        s, run, exact = drawn_runs()
        rng = np.random.default_rng(seed)
        where = {
            "positions": tuple(
                rng.integers(0, spread, (s.B, n)).astype(np.int32) for n in (s.T, s.S)
            ),
            "segments": tuple(
                rng.integers(0, segments, (s.B, n)).astype(np.int32) for n in (s.T, s.S)
            ),
        }
        if ordered:
            where = {name: tuple(np.sort(x, -1) for x in pair) for name, pair in where.items()}
        table = rng.random((s.N, s.T, s.S)) < density
        shapes = {"q": (s.B, s.T, s.N, s.H), "k": (s.B, s.S, s.K, s.H), "v": (s.B, s.S, s.K, s.V)}
        a: dict = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        a |= {"captured": MODS["several"].draw(s, seed), "sink_logits": rng.standard_normal(s.N)}
        if seed % 2:
            a["sink_logits"] = a["sink_logits"] * 0 - np.inf  # no sink
        a["captured"]["slope"] = a["captured"]["slope"] / spread
        cotangents = rng.standard_normal((s.B, s.T, s.N, s.V)), rng.standard_normal((s.B, s.T, s.N))
        narrow = jax.tree.map(np.float32, (a, cotangents))
        found = run(narrow[0], where, table, narrow[1])
        with enable_x64(True):
            wide = jax.tree.map(np.float64, narrow)
            expected = exact(wide[0], where, table, wide[1])
        compare(found, expected, "float32")


PIECES = st.sampled_from([
    Causal(), Window(1), Window(5), Window(9, ahead=2), Prefix(3), Prefix(np.array([20, 0])),
    SinkTokens(2), Full(), MaskMod.of(odd),
    Blocks(np.array([[[[0, 1], [2, -1], [1, 1], [3, 0], [4, 4]]]], np.int32), 8, 8),
])
TREES = st.recursive(
    PIECES, lambda inner: st.tuples(inner, inner, st.booleans()).map(
        lambda x: x[0] & x[1] if x[2] else x[0] | x[1]
    ), max_leaves=4,
)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(mask=TREES, T=st.sampled_from([33, 40]), documents=st.booleans())
def test_drawn_compositions(mask, T, documents):
    """Masks that skip tiles, in any composition, with and without documents."""
    s = Shape(2, T, T, 2, 2, 4, 4, (8, 8))
    where = places(s, "packed" if documents else "plain")
    c = coordinates(s, where)
    seen = np.broadcast_to(np.asarray(visible(mask, c)), (s.B, s.N, T, T))
    if documents:
        seen = seen & np.asarray((c.q_segment == c.k_segment) & (c.q_segment > 0))
    rng = np.random.default_rng(T)
    a: dict = {n: np.float32(rng.standard_normal((s.B, T, 2, 4))) for n in "qkv"}
    a["captured"] = jax.tree.map(np.float32, MODS["alibi"].draw(s))
    cotangents = np.float32(rng.standard_normal((s.B, T, 2, 4))), np.ones((s.B, T, 2), np.float32)

    def f(a):
        captured = a["captured"]
        return attention(
            a["q"], a["k"], a["v"], mask=mask, score_mod=MODS["alibi"].pair(captured), scale=0.4,
            return_lse=True, **where,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "tile_sizes", lambda *_: (8, 8))
        found = jax.jit(lambda a: pulled_on_device(f, a, cotangents))(a)
    with enable_x64(True):
        a = jax.tree.map(np.float64, a)
        expected = pulled(lambda a: dense(a, s, seen, MODS["alibi"], c, scale=0.4), a, cotangents)
    compare(found, expected, "float32")


@pytest.mark.heavy
@pytest.mark.parametrize("mod, mask, shape, options", PRODUCT)
def test_the_whole_product(mod, mask, shape, options, monkeypatch):
    check(mod, mask, shape, options, "float32", "xla", monkeypatch)
