"""Block lists against dense masks: no tile lost, none twice, full only where full; and plans."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flex_cases import Dense, odd, visible
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core.errors import ConfigError, ShapeError
from attnlab.core.mask import (
    Blocks,
    Causal,
    Coords,
    Full,
    MaskMod,
    Prefix,
    Segments,
    SinkTokens,
    Window,
    conjuncts,
    parts,
    plain,
)
from attnlab.ops.attention import Planned, attention, blocks, plan
from attnlab.ops.attention.blocks import FULL, NONE, PARTIAL, block_lists
from attnlab.testing.budget import identical

B, N = 2, 3


def visits(lists, columns: int) -> np.ndarray:
    """Kinds ``[., ., R, columns]``, read run by run; fails where a tile is listed twice."""
    out = np.zeros((*np.shape(lists.full.start), columns), np.int8)
    for kind, runs in ((FULL, lists.full), (PARTIAL, lists.partial)):
        first, count, start, number, total = (
            np.asarray(getattr(runs, name))
            for name in ("first", "count", "start", "number", "blocks")
        )
        for b, n, r in np.ndindex(start.shape):
            listed: list[int] = []
            for e in range(start[b, n, r], start[b, n, r] + number[b, n, r]):
                assert count[b, n, e] > 0
                listed += range(first[b, n, e], first[b, n, e] + count[b, n, e])
            assert len(listed) == len(set(listed)) == total[b, n, r], "a tile is listed twice"
            assert (out[b, n, r, listed] == NONE).all(), "a tile is both full and partial"
            assert not listed or (0 <= min(listed) and max(listed) < columns)
            out[b, n, r, listed] = kind
    return out


def read_by_rows(lists, columns: int) -> np.ndarray:
    """The same from ``BlockLists.work``, as the Hopper kernels walk it; longest rows first."""
    work = np.asarray(lists.work())
    out = np.full((*work.shape[:3], columns), -1, np.int8)
    tiles = work[..., 1].sum((0, 1))
    assert (np.diff(tiles) <= 0).all(), "a row comes before a longer one"
    for b, n, r in np.ndindex(work.shape[:3]):
        row, tiles, *entries = work[b, n, r]
        assert (out[b, n, row] == -1).all(), "a row is done twice"
        out[b, n, row] = NONE
        pairs = ((FULL, lists.full, entries[:4]), (PARTIAL, lists.partial, entries[4:]))
        for kind, runs, (start, number, first, count) in pairs:
            at = [i if size > 1 else 0 for i, size in zip((b, n), runs.first.shape[:2])]
            for e in range(number):
                out[b, n, row, first : first + count] = kind
                tiles -= count
                after = start + min(e + 1, number - 1)
                first, count = (int(np.asarray(x)[*at, after]) for x in (runs.first, runs.count))
        assert tiles == 0
    return out


def dense_kinds(seen: np.ndarray, block_q: int, block_k: int, S: int) -> tuple:
    """``(any, all)`` of each tile; a tile that reaches past the last key is never full."""
    T = seen.shape[2]
    pads = [(0, 0), (0, 0), (0, -T % block_q), (0, -S % block_k)]

    def tiles(x):
        return x.reshape(*x.shape[:2], x.shape[2] // block_q, block_q, -1, block_k)

    some = tiles(np.pad(seen, pads)).any((3, 5))
    every = tiles(np.pad(seen, pads, constant_values=True)).all((3, 5))
    every[..., S // block_k :] = False
    return some, every


def check(mask, where, layout, T, S, block_q, block_k, exact=False):
    """Forward and transposed lists of a mask; how many tiles they visit, and how many they must."""
    rows = {name: x if isinstance(x, tuple) else (x, x) for name, x in where.items()}
    segments = rows.get("segments", (None, None))
    q, k = (
        Coords(jnp.asarray(rows["positions"][i]), segments[i], jnp.arange(n, dtype=jnp.int32))
        for i, n in enumerate((T, S))
    )
    if "segments" in rows:
        mask = mask & Segments()
    ones = np.ones((B, 1), np.int32)

    def side(x, axis):
        x = np.asarray(x) if x is not None else ones
        return x[:, None, :, None] if axis == 2 else x[:, None, None, :]

    c = Dense(
        np.arange(B)[:, None, None, None], np.arange(N)[:, None, None],
        side(q.positions, 2), side(k.positions, 3), np.arange(T)[:, None], np.arange(S),
        side(segments[0], 2), side(segments[1], 3),
    )
    seen = np.broadcast_to(np.asarray(visible(mask, c)), (B, N, T, S))
    some, every = dense_kinds(seen, block_q, block_k, S)
    bound, found = mask.bound(B, N), []
    for transposed in (False, True):
        lists = block_lists(
            bound, q, k, block_q=block_q, block_k=block_k, layout=layout, transposed=transposed
        )
        kinds = visits(lists, some.shape[2 if transposed else 3])
        np.testing.assert_array_equal(kinds, lists.kinds(kinds.shape[-1]))
        np.testing.assert_array_equal(*np.broadcast_arrays(
            kinds, read_by_rows(lists, kinds.shape[-1])
        ))
        kinds = np.broadcast_to(kinds.swapaxes(2, 3) if transposed else kinds, some.shape)
        assert (kinds[some] != NONE).all(), "a tile is lost"
        assert every[kinds == FULL].all(), "a tile that is not full is listed as full"
        if exact:
            np.testing.assert_array_equal(kinds != NONE, some)
        found.append((int((kinds != NONE).sum()), int((kinds == FULL).sum())))
    return found, int(some.sum()), int(every.sum())


LISTS = np.array([[[[0, 1, 1], [2, -1, 0], [1, 1, 1], [3, 0, 9], [4, 4, -1], [5, 2, 3]]]], np.int32)
HEADS = (LISTS + np.arange(B * N).reshape(B, N, 1, 1)) % 6
PIECES = st.sampled_from([
    Causal(), Window(1), Window(5), Window(9, ahead=2), Prefix(3), Prefix(np.array([20, 0])),
    SinkTokens(2), Full(), MaskMod.of(odd), Causal() & Window(17),
])
TREES = st.recursive(
    PIECES, lambda inner: st.tuples(inner, inner, st.booleans()).map(
        lambda x: x[0] & x[1] if x[2] else x[0] | x[1]
    ), max_leaves=3,
)
TILES = st.sampled_from([(8, 8), (16, 8), (8, 16)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(mask=TREES, T=st.sampled_from([1, 8, 37, 48]), tiles=TILES)
def test_lists_of_whole_rows(mask, T, tiles):
    """layout="full": made on the host, also where tiles do not divide the length."""
    where = {"positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))}
    check(mask, where, "full", T, T, *tiles)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    mask=TREES, tiles=TILES, seed=st.integers(0, 1000), kind=st.sampled_from(["packed", "any"]),
    shape=st.sampled_from([(37, 37), (40, 40)]),
)
def test_lists_of_documents(mask, tiles, seed, kind, shape):
    """Packed rows, and rows of which nothing is known: unordered, other keys than queries."""
    rng = np.random.default_rng(seed)
    T, S = shape if kind == "packed" else (24, 37)
    if kind == "any":
        where = {
            "positions": tuple(rng.integers(0, 40, (B, n)).astype(np.int32) for n in (T, S)),
            "segments": tuple(
                np.sort(rng.integers(0, 4, (B, n)), -1).astype(np.int32) for n in (T, S)
            ),
        }
        check(mask, where, kind, T, S, *tiles)
        return
    positions, segments = np.zeros((2, B, T), np.int32)
    for b in range(B):
        cuts = [0, *sorted(rng.integers(1, T, 3).tolist()), T]
        for i, (a, z) in enumerate(itertools.pairwise(cuts)):
            positions[b, a:z] = np.arange(z - a)
            segments[b, a:z] = 0 if i == 3 and seed % 2 else i + 1
    check(mask, {"positions": positions, "segments": segments}, kind, T, T, *tiles)


@pytest.mark.parametrize("lists", [LISTS, HEADS], ids=["shared", "of_heads"])
@pytest.mark.parametrize("other", [None, Causal(), MaskMod.of(odd), Causal() & Prefix(9)])
def test_lists_of_blocks(lists, other):
    """Given lists with duplicates, empty entries and numbers past the end; tiles divide them."""
    T = 45
    mask = Blocks(jnp.asarray(lists), 8, 8)
    mask = mask if other is None else mask & other
    where = {"positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))}
    for tiles in ((8, 8), (4, 8)):
        check(mask, where, "full", T, T, *tiles, exact=other is None)
    check(mask, where, "any", T, T, 8, 4)


@pytest.mark.parametrize("mask", [
    Blocks(LISTS, 8, 8) & Blocks(HEADS, 8, 8), Blocks(HEADS, 8, 8) | (Causal() & Window(3)),
    (Blocks(HEADS, 8, 8) | Causal()) & Blocks(LISTS, 8, 8),
])
def test_several_lists_and_lists_under_or(mask):
    T = 45
    where = {"positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))}
    check(mask, where, "full", T, T, 8, 8)


def test_structured_masks_are_exact():
    """What the bounds say is all there is to say for causal, windows and sinks over whole rows."""
    T = 64
    where = {"positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))}
    for mask in (Causal(), Causal() & Window(20), Causal() & (Window(9) | SinkTokens(2)), Full()):
        found, some, every = check(mask, where, "full", T, T, 8, 8, exact=True)
        assert found == [(some, every)] * 2, (mask, found, some, every)


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_more_runs_than_are_stored(most, monkeypatch):
    """The last run covers the rest: more tiles are visited, none is lost."""
    monkeypatch.setattr(blocks, "MOST_RUNS", most)
    monkeypatch.setattr(blocks, "ROOM", 1)
    T = 96
    where = {"positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()}
    comb = MaskMod.of(lambda h, q, k: (k // 8 + h) % 3 != 0)
    dense_form = lambda mask, c: (c.k_pos // 8 + c.head) % 3 != 0  # noqa: E731
    monkeypatch.setattr("test_flex_blocks.visible", dense_form)
    found, some, _ = check(comb, where, "any", T, T, 8, 8)
    assert found[0][0] >= some
    q = Coords(jnp.asarray(where["positions"]), None, jnp.arange(T, dtype=jnp.int32))
    lists = block_lists(comb.bound(B, N), q, q, block_q=8, block_k=8, layout="any")
    number = np.asarray(lists.full.number) + np.asarray(lists.partial.number)
    assert number.max() <= most


def largest(jaxpr) -> int:
    """Entries of the largest array anywhere in a program."""
    sizes = [v.aval.size for v in jaxpr.invars if hasattr(v.aval, "size")]
    for eqn in jaxpr.eqns:
        sizes += [v.aval.size for v in eqn.outvars if hasattr(v.aval, "size")]
        for value in jax.tree.leaves(
            eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest(inner))
    return max(sizes, default=0)


@pytest.mark.parametrize("kind", ["packed", "causal", "lists"])
def test_a_million_tokens(kind):
    """16 bytes a token bound the lists, and no step of making them has the size R x C."""
    S, block = 2**20, 128
    R = S // block
    mask: dict = {
        "packed": Causal() & Window(4096) & Segments(), "causal": Causal(),
        "lists": Blocks(jax.ShapeDtypeStruct((1, 2, R, 64), jnp.int32), 128, 128),
    }
    layout = "full" if kind == "causal" else "packed" if kind == "packed" else "any"
    for transposed in (False, True):

        def make(listed, positions, segments, transposed=transposed):
            index = jnp.arange(S, dtype=jnp.int32)
            side = Coords(positions, segments if kind == "packed" else None, index)
            whole = Causal() & Blocks(listed, block, block) if kind == "lists" else mask[kind]
            return block_lists(
                whole, side, side, block_q=block, block_k=block, layout=layout,
                transposed=transposed,
            )

        lists = jax.ShapeDtypeStruct((1, 2, R, 64), jnp.int32)
        row = jax.ShapeDtypeStruct((1, S), jnp.int32)
        program, out = jax.make_jaxpr(make, return_shape=True)(lists, row, row)
        size = sum(4 * np.prod(x.shape) for x in jax.tree.leaves(out))
        heads = 2 if kind == "lists" else 1
        assert size <= 24 * S * heads, (kind, size)
        assert largest(program.jaxpr) < R * R / 8, (kind, largest(program.jaxpr))
        if kind == "causal":  # two runs a row at most
            assert size <= 40 * R


# Plans ---------------------------------------------------------------------------------------


def test_a_plan_is_its_mask_everywhere():
    T = 24
    mask = Causal() & Window(7)
    planned = plan(mask, batch=B, heads=N, length=T, block_q=8, block_k=8)
    row = Coords(jnp.broadcast_to(jnp.arange(T), (B, T)), None, jnp.arange(T))
    np.testing.assert_array_equal(planned.visible(row, row), mask.visible(row, row))
    box = row.bounds()
    assert bool(planned.maybe(box, box)) == bool(mask.maybe(box, box))
    assert bool(planned.surely(box, box)) == bool(mask.surely(box, box))
    assert parts(planned) == parts(mask) and conjuncts(planned & Full()) == [
        Causal(), Window(7), Full()
    ]
    assert plain(planned) == plain(mask) == (True, 7)
    assert jax.tree.structure(jax.jit(lambda x: x)(planned)) == jax.tree.structure(planned)


def test_kernels_take_the_lists_of_a_plan(monkeypatch):
    """Same tiles, same lists in the same order of work, forward and transposed; other tiles are
    built from the mask."""
    T = 48
    rng = np.random.default_rng(0)
    where = {
        "positions": jnp.asarray(np.broadcast_to(np.arange(T), (B, T)), jnp.int32),
        "segments": jnp.asarray(np.sort(rng.integers(1, 4, (B, T)), -1), jnp.int32),
    }
    mask = Causal() & MaskMod.of(odd)
    planned = plan(mask, **where, batch=B, heads=N, sink_tokens=1, block_q=8, block_k=16)
    planned = plan(planned, **where, batch=B, heads=N, block_q=16, block_k=8)
    assert len(planned.lists) == 4
    whole = ((mask | SinkTokens(1)) & Segments()).bound(B, N)
    q = Coords(where["positions"], where["segments"], jnp.arange(T, dtype=jnp.int32))

    def lists(mask, block_q, block_k, transposed):
        return block_lists(
            mask, q, q, block_q=block_q, block_k=block_k, layout="any", transposed=transposed
        )

    for sizes in ((8, 16), (16, 8), (8, 8)):
        for transposed in (False, True):
            found, made = (lists(m, *sizes, transposed) for m in (planned, whole))
            identical(found.with_table(), made.with_table())

    def never(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(blocks, "_on_device", never)
    assert lists(planned, 8, 16, True) is planned.lists[1]
    with pytest.raises(AssertionError, match="built again"):
        lists(planned, 8, 8, False)


@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_attention_with_a_plan(impl):
    T = 20
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (B, T, N, 4)) for key in keys)
    segments = jnp.asarray(np.repeat([[1, 2, 2, 0]], 5, -1).repeat(B, 0), jnp.int32)
    where = {"positions": jnp.broadcast_to(jnp.arange(T), (B, T)), "segments": segments}
    mask = Causal() & Window(6)

    def loss(mask, sink_tokens):
        return lambda q: (
            attention(q, k, v, mask=mask, sink_tokens=sink_tokens, impl=impl, **where) ** 2
        ).sum()

    planned = plan(mask, **where, sink_tokens=2, batch=B, heads=N, block_q=8, block_k=8)
    identical(jax.grad(loss(planned, 0))(q), jax.grad(loss(mask, 2))(q))

    @jax.jit
    def layers(q, planned):  # a plan made outside, used inside a scan
        def layer(q, _):
            return attention(q, k, v, mask=planned, impl=impl, **where), None

        return jax.lax.scan(layer, q, None, length=2)[0]

    assert jnp.isfinite(layers(q, planned)).all()


def _planned(**options):
    return plan(**({"mask": Causal(), "batch": 2, "heads": 4, "length": 8} | options))


QKV = [jnp.zeros((2, 8, 4, 8))] * 3
PLACES = {"positions": jnp.zeros((2, 8), jnp.int32), "segments": jnp.zeros((2, 8), jnp.int32)}


@pytest.mark.parametrize("make, error, message", [
    (lambda: _planned(length=None), ConfigError, "positions = None and length = None: the lists"),
    (lambda: _planned(block_q=0), ConfigError, "block_q = 0, block_k = 128: count the tokens"),
    (lambda: _planned(**PLACES), ConfigError, "positions and length = 8: .* once"),
    (
        lambda: _planned(mask=Blocks(jnp.zeros((1, 1, 2, 1), jnp.int32), 4, 4), block_q=3),
        ConfigError, "Blocks of 4 x 4 tokens: must be multiples of the tiles of 3 x 128",
    ),
    (lambda: attention(*QKV, mask=_planned(length=9)), ShapeError, "planned for T = 9 and S = 9"),
    (
        lambda: attention(*QKV, mask=_planned(batch=3, mask=MaskMod.of(odd))), ShapeError,
        "bound to batch of shape|planned for 3 rows",
    ),
    (
        lambda: attention(*QKV, mask=_planned(), sink_tokens=2), ConfigError,
        "sink_tokens = 2 with a planned mask: the plan holds the whole mask",
    ),
    (
        lambda: attention(*QKV, mask=_planned(), **PLACES), ConfigError,
        "segments with a mask planned without them",
    ),
    (
        lambda: attention(*QKV, mask=_planned(length=None, **PLACES)), ConfigError,
        r"segments = None: the mask holds Segments\(\)",
    ),
    (
        lambda: attention(*QKV, mask=_planned(), positions=PLACES["positions"]), ConfigError,
        "planned for layout = 'full': the call has layout = 'any'",
    ),
])
def test_plans_that_do_not_fit(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_plan_is_a_value():
    planned = _planned()
    assert isinstance(planned, Planned) and planned.T == planned.S == 8
    assert planned.specs(("data",), ("tensor",)).lists[0].full.first == jax.sharding.PartitionSpec(
        None, None
    )
