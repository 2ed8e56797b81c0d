"""Drawn calls of attention and decode against the equation in float64.

A call is a tree of masks, a chain of score functions, shapes, documents, sinks and a cap, all drawn
at once, so that what is right alone is also right together. Forward and every gradient, with the
mask as it is and planned.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flex_cases import Dense, Mod, Shape, coordinates, dense, odd, visible
from hypothesis import given, settings
from hypothesis import strategies as st
from test_flex import compare, pulled_on_device

from attnlab.core.mask import (
    Blocks,
    Causal,
    Full,
    Mask,
    MaskMod,
    Prefix,
    Segments,
    SinkTokens,
    Window,
)
from attnlab.core.versions import enable_x64
from attnlab.ops.attention import attention, decode_xla, plan, xla
from attnlab.ops.attention.blocks import FULL, NONE
from attnlab.ops.attention.decode import decode
from attnlab.testing.budget import close

B, TILE = 2, 8

# Links of a chain: the array that one captures, by axes as in flex_cases ("F": 5 + 2 entries of a
# clipped distance), and the new score from the array, the score and the coordinates. Written once:
# coordinates are scalars where the op traces it and arrays for the oracle.
LINKS = {
    "scale": ("", lambda w, s, c: s * jnp.exp(0.3 * w)),
    "slope of heads": ("N", lambda w, s, c: s + 0.1 * w[c.head] * (c.k_pos - c.q_pos)),
    "cap of heads": ("N", lambda w, s, c: (2 + jnp.sin(w[c.head])) * jnp.tanh(s / 2)),
    "rows": ("BNT", lambda w, s, c: s * jnp.cos(w[c.batch, c.head, c.q_index])),
    "columns": ("NS", lambda w, s, c: s + w[c.head, c.k_index]),
    "columns of rows": ("BS", lambda w, s, c: s - w[c.batch, c.k_index] ** 2),
    "distance": ("NF", lambda w, s, c: s + w[c.head, jnp.clip(c.q_pos - c.k_pos, -2, 4) + 2]),
    "dense": ("TS", lambda w, s, c: s + w[c.q_index, c.k_index]),
    "parity": ("", lambda w, s, c: jnp.where((c.q_pos + c.k_pos) % 2 == 0, s, s * w)),
    "holes": ("N", lambda w, s, c: jnp.where(
        (c.q_index * c.k_index + c.head) % 5 == 4, -jnp.inf, s + w[c.head]
    )),
    "documents": ("N", lambda w, s, c: jnp.where(
        c.q_segment + c.k_segment == 4, s * w[c.head], s
    )),
}


def chain(names: tuple[str, ...]) -> Mod:
    """The links one after another, as a case of ``flex_cases``."""
    arrays = {f"{i} {name}": LINKS[name][0] for i, name in enumerate(names)}

    def through(a, s, c):
        for key, name in zip(arrays, names):
            s = LINKS[name][1](a[key], s, c)
        return s

    def pair(a):
        if "documents" in names:  # the only one that reads segments
            def mod(s, head, q_pos, k_pos, *, batch, q_index, k_index, q_segment, k_segment):
                at = Dense(batch, head, q_pos, k_pos, q_index, k_index, q_segment, k_segment)
                return through(a, s, at)
        else:
            def mod(s, head, q_pos, k_pos, *, batch, q_index, k_index):
                return through(a, s, Dense(batch, head, q_pos, k_pos, q_index, k_index, 0, 0))
        return mod

    return Mod(arrays, pair, through)


def draw(mod: Mod, s: Shape, seed: int) -> dict[str, np.ndarray]:
    sizes = dataclasses.asdict(s) | {"F": 7}
    rng = np.random.default_rng(seed)
    return {
        name: np.float32(rng.standard_normal([sizes[x] for x in axes]))
        for name, axes in mod.arrays.items()
    }


@st.composite
def masks(draw, T: int, S: int, N: int) -> Mask:
    tiles, columns = -(-T // TILE), -(-S // TILE)
    seed = draw(st.integers(0, 99))
    lists = np.random.default_rng(seed).integers(-1, columns, (1, draw(st.sampled_from([1, N])),
                                                               tiles, 2))
    piece = st.sampled_from([
        Causal(), Causal() & Window(5), Window(1), Window(9, ahead=2), Window(3, ahead=0),
        Prefix(4), Prefix(np.array([S, 0])), SinkTokens(2), Full(), MaskMod.of(odd),
        Blocks(np.int32(lists), TILE, TILE),
    ])
    pairs = lambda inner: st.tuples(inner, inner, st.booleans())  # noqa: E731
    tree = st.recursive(
        piece, lambda inner: pairs(inner).map(lambda x: x[0] & x[1] if x[2] else x[0] | x[1]),
        max_leaves=4,
    )
    return draw(tree)


@dataclasses.dataclass(frozen=True)
class Case:
    shape: Shape
    mask: Mask
    links: tuple[str, ...]
    where: str  # "whole": one document; "chunk": the last T of S; "any": unordered documents
    sinks: bool
    sink_tokens: int
    cap: float | None
    planned: bool
    seed: int


@st.composite
def cases(draw) -> Case:
    where = draw(st.sampled_from(["whole", "chunk", "any"]))
    S = draw(st.sampled_from([1, 9, 24, 33]))
    T = S if where == "whole" else draw(st.sampled_from([n for n in (1, 7, 24) if n <= S]))
    K, G = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (1, 8)]))
    shape = Shape(B, T, S, K * G, K, 4, 6, (TILE, TILE))
    links = st.sampled_from([x for x in LINKS if where == "any" or x != "documents"])
    return Case(
        shape, draw(masks(T, S, K * G)), tuple(draw(st.lists(links, max_size=3))), where,
        draw(st.booleans()), draw(st.sampled_from([0, 0, 3])), draw(st.sampled_from([None, 2.0])),
        draw(st.booleans()), draw(st.integers(0, 2**20)),
    )


def places(case: Case) -> dict:
    s, rng = case.shape, np.random.default_rng(case.seed)
    if case.where == "any":
        return {
            name: tuple(np.int32(rng.integers(0, most, (B, n))) for n in (s.T, s.S))
            for name, most in (("positions", 20), ("segments", 4))
        }
    rows = np.arange(s.S - s.T, s.S), np.arange(s.S)
    return {"positions": tuple(np.int32(np.broadcast_to(x, (B, len(x)))) for x in rows)}


def check_lists(planned, seen: np.ndarray) -> None:
    """No visible pair in a tile that is left out, no hidden one in a tile that is full."""
    T, S = seen.shape[2:]
    for lists in planned.lists:
        kinds = lists.kinds(-(-(T if lists.transposed else S) // TILE))
        kinds = kinds.swapaxes(2, 3) if lists.transposed else kinds
        wide = kinds.repeat(TILE, 2).repeat(TILE, 3)[:, :, :T, :S]
        assert not (seen & (wide == NONE)).any(), "a tile is lost"
        assert not (~seen & (wide == FULL)).any(), "a tile is not full"


def check_call(case: Case) -> None:
    s, mod, where = case.shape, chain(case.links), places(case)
    rng = np.random.default_rng(case.seed + 1)
    shapes = {"q": (B, s.T, s.N, s.H), "k": (B, s.S, s.K, s.H), "v": (B, s.S, s.K, s.V)}
    a: dict = {name: np.float32(rng.standard_normal(shape)) for name, shape in shapes.items()}
    if case.sinks:
        a["sink_logits"] = np.float32(rng.standard_normal(s.N))
    a["captured"] = draw(mod, s, case.seed)
    cotangents = [np.float32(rng.standard_normal((B, s.T, s.N, *x))) for x in ((s.V,), ())]
    whole = case.mask | SinkTokens(case.sink_tokens) if case.sink_tokens else case.mask
    whole = whole & Segments() if "segments" in where else whole

    def look(where):
        planned = plan(
            case.mask, batch=B, heads=s.N, sink_tokens=case.sink_tokens, block_q=TILE,
            block_k=TILE, **where,
        )
        seen = jnp.asarray(visible(whole, coordinates(s, where)))
        return planned, jnp.broadcast_to(seen, (B, s.N, s.T, s.S))

    planned, seen = jax.jit(look)(where)
    check_lists(planned, np.asarray(seen))
    mask, sink_tokens = (planned, 0) if case.planned else (case.mask, case.sink_tokens)

    def run(a):
        def f(a):
            a = dict(a)
            captured = a.pop("captured")
            return attention(
                **a, **where, mask=mask, score_mod=mod.pair(captured) if case.links else None,
                scale=0.6, sink_tokens=sink_tokens, logit_cap=case.cap, return_lse=True, impl="xla",
            )

        return pulled_on_device(f, a, cotangents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "tile_sizes", lambda *_: (TILE, TILE))
        found = jax.jit(run)(a)
    with enable_x64(True):
        def exact(a):
            return dense(a, s, seen, mod, coordinates(s, where), scale=0.6, cap=case.cap)

        wide = jax.tree.map(np.float64, (a, tuple(cotangents)))
        expected = jax.jit(lambda a, d: pulled_on_device(exact, a, d))(*wide)
    compare(found, expected, "float32")


@settings(max_examples=14, deadline=None, derandomize=True)
@given(case=cases())
def test_drawn_calls(case):
    check_call(case)


@pytest.mark.heavy
@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_more_drawn_calls(case):
    check_call(case)


# Decoding --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a program is compiled for."""

    t: int
    K: int
    G: int
    page: int | None
    documents: bool
    window: int | None
    sink_tokens: int
    cap: float | None


ROOM = 48  # tokens of a row
FACTS = [
    Facts(1, 2, 1, None, False, None, 0, None), Facts(2, 1, 8, 4, False, 5, 0, 2.0),
    Facts(8, 2, 3, 16, True, 9, 2, None), Facts(3, 1, 1, 1, True, None, 0, 3.0),
    Facts(5, 4, 2, 24, False, 1, 3, None), Facts(7, 1, 16, None, True, 6, 0, None),
]


@functools.cache
def decoding(f: Facts, impl: str, dtype: str):
    def run(q, k, v, sinks, lengths, pages, where):
        return decode(
            q, k, v, lengths=lengths, pages=pages, window=f.window, sink_tokens=f.sink_tokens,
            sink_logits=sinks, logit_cap=f.cap, return_lse=True, softmax_dtype=dtype, impl=impl,
            scale=-0.5, **where,
        )

    return jax.jit(run)


@pytest.mark.parametrize("facts", FACTS, ids=lambda f: f"t = {f.t}, page = {f.page}")
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, ROOM), min_size=3, max_size=3), seed=st.integers(0, 2**20),
    sinks=st.booleans(),
)
def test_drawn_caches(facts, lengths, seed, sinks):
    """Lengths from empty to full, pages in any order, shared by rows, documents in any order."""
    f, rng = facts, np.random.default_rng(seed)
    rows, N, H, V = len(lengths), facts.K * facts.G, 4, 6
    pages, lead = None, (rows, ROOM)
    if f.page is not None:
        pool = 5 * ROOM // (2 * f.page)  # fewer pages than entries: rows share some
        pages = np.int32(rng.integers(0, pool, (rows, ROOM // f.page)))
        for row, n in zip(pages, lengths):
            row[-(-n // f.page) :] = rng.choice([-1, pool, 10**6])  # never used
        lead = (pool, f.page)
    q = np.float32(rng.standard_normal((rows, f.t, N, H)))
    k, v = (np.float32(rng.standard_normal((*lead, f.K, x))) for x in (H, V))
    logits = np.float32(rng.standard_normal(N)) if sinks else np.full(N, -np.inf, np.float32)
    where = {}
    if f.documents:
        where = {
            name: tuple(np.int32(rng.integers(0, most, (rows, n))) for n in (f.t, ROOM))
            for name, most in (("positions", 20), ("segments", 3))
        }
    data, more = (q, k, v, logits), (np.int32(lengths), pages, where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_xla, "TILE", 16)
        found = decoding(f, "xla", "float32")(*data, *more)
    with enable_x64(True):
        run = decoding(f, "reference", "float64")
        expected = run(*(np.float64(x) for x in data), *more)
        expected = [np.asarray(x) for x in expected]
    for name, x, y in zip(("o", "lse"), found, expected):
        close(x, y, kind="op", name=name)
    empty = np.isneginf(expected[1])
    assert (np.asarray(found[0])[empty] == 0).all() and (sinks or empty[np.equal(lengths, 0)].all())
