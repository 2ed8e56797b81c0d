"""Masks against a loop over pairs, and tile bounds against the pairs inside."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.errors import ConfigError
from attnlab.core.mask import (
    And,
    Blocks,
    Causal,
    Coords,
    Full,
    Or,
    Prefix,
    Segments,
    SinkTokens,
    Window,
    conjuncts,
    parts,
    plain,
)

B, N, T, S = 2, 3, 12, 17
LISTS = np.random.default_rng(1).integers(-1, 6, (B, N, 4, 2)).astype(np.int32)
BLOCKS = Blocks(jnp.asarray(LISTS), 3, 3)
MASKS = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(4),
    "window_1": Window(1),
    "ahead": Window(3, ahead=2),
    "segments": Segments(),
    "prefix": Prefix(3),
    "prefix_rows": Prefix(jnp.array([2, 5])),
    "sinks": SinkTokens(2),
    "no_sinks": SinkTokens(0),
    "blocks": BLOCKS,
    "blocks_shared": Blocks(jnp.asarray(LISTS[:1, :1]), 3, 3),
    "streaming": Causal() & (Window(3) | SinkTokens(2)) & Segments(),
    "prefix_lm": (Causal() | Prefix(jnp.array([4, 1]))) & Segments(),
    "nested": (BLOCKS & Causal()) | (Window(2, ahead=0) & Segments()),
}


def coords(seed: int, length: int, offset: int = 0) -> Coords:
    """Odd positions, unordered segments with padding, a slice of a longer array."""
    rng = np.random.default_rng(seed)
    return Coords(
        jnp.asarray(rng.integers(0, 15, (B, length)), jnp.int32),
        jnp.asarray(rng.integers(0, 4, (B, length)), jnp.int32),
        jnp.arange(offset, offset + length, dtype=jnp.int32),
    )


def sees(mask, b, n, q, k) -> bool:
    """The definition, for one pair of ``(position, segment, index)``."""
    distance = q[0] - k[0]
    match mask:
        case And():
            return sees(mask.left, b, n, q, k) and sees(mask.right, b, n, q, k)
        case Or():
            return sees(mask.left, b, n, q, k) or sees(mask.right, b, n, q, k)
        case Full():
            return True
        case Causal():
            return distance >= 0
        case Window():
            return distance < mask.size and (mask.ahead is None or -distance <= mask.ahead)
        case Segments():
            return q[1] == k[1] and q[1] > 0
        case Prefix():
            return k[0] < np.broadcast_to(np.asarray(mask.length), (B,))[b]
        case SinkTokens():
            return k[0] < mask.count and distance >= 0
        case Blocks():
            rows = np.broadcast_to(np.asarray(mask.lists), (B, N, *mask.lists.shape[2:]))[b, n]
            return k[2] // mask.block_k in rows[q[2] // mask.block_q]
    raise AssertionError(mask)


def brute(mask, q: Coords, k: Coords) -> np.ndarray:
    def tokens(side, b):
        return [
            (int(p), int(s), int(i))
            for p, s, i in zip(side.positions[b], side.segments[b], side.index)
        ]

    return np.array([
        [
            [[sees(mask, b, n, x, y) for y in tokens(k, b)] for x in tokens(q, b)]
            for n in range(N)
        ]
        for b in range(B)
    ])


@pytest.mark.parametrize("name", MASKS)
def test_visible_is_the_definition(name):
    q, k = coords(0, T), coords(1, S)
    seen = jax.jit(lambda mask, q, k: mask.visible(q, k))(MASKS[name], q, k)
    assert seen.dtype == bool
    np.testing.assert_array_equal(np.broadcast_to(seen, (B, N, T, S)), brute(MASKS[name], q, k))


@pytest.mark.parametrize("name", MASKS)
def test_maybe_is_never_false_where_a_pair_is_visible(name):
    mask = MASKS[name]

    @jax.jit
    def both(q, k):
        return mask.visible(q, k).any(), jnp.asarray(mask.maybe(q.bounds(), k.bounds()))

    skipped = 0
    rng = np.random.default_rng(0)
    for _ in range(60):
        low, high = rng.integers(0, 20, 2), rng.integers(0, 8, 2)
        q, k = (
            Coords(
                jnp.asarray(rng.integers(low[i], low[i] + 4, (B, 3)), jnp.int32),
                jnp.asarray(rng.integers(high[i], high[i] + 2, (B, 3)) // 2, jnp.int32),
                jnp.arange(3, dtype=jnp.int32) + 3 * rng.integers(0, 4),
            )
            for i in range(2)
        )
        seen, maybe = both(q, k)
        assert maybe or not seen
        skipped += not maybe
    assert skipped > 0 or name in ("full",), f"{name} skips no tile at all"


def test_window_edges():
    row = Coords(jnp.arange(6)[None], None, jnp.arange(6))
    itself = (Causal() & Window(1)).visible(row, row)[0, 0]
    np.testing.assert_array_equal(itself, np.eye(6, dtype=bool))
    three = (Causal() & Window(3)).visible(row, row)[0, 0].sum(-1)
    np.testing.assert_array_equal(three, [1, 2, 3, 3, 3, 3])
    np.testing.assert_array_equal(
        Window(2, ahead=0).visible(row, row), (Causal() & Window(2)).visible(row, row)
    )
    assert (Causal() & Window(100)).visible(row, row).sum() == 21


def test_masks_are_pytrees():
    mask = MASKS["nested"] | Prefix(jnp.array([1, 2]))
    leaves, tree = jax.tree.flatten(mask)
    assert len(leaves) == 2 and tree == jax.tree.structure(jax.jit(lambda m: m)(mask))
    back = jax.jit(lambda m: m)(Window(3, ahead=1))
    assert back == Window(3, ahead=1)


def test_parts_and_plain():
    mask = Causal() & (Window(3) | SinkTokens(2)) & Segments()
    assert parts(mask) == [Causal(), Window(3), SinkTokens(2), Segments()]
    assert conjuncts(mask) == [Causal(), Window(3) | SinkTokens(2), Segments()]
    assert plain(mask) is None
    assert plain(Full()) == plain(Full() & Segments()) == (False, None)
    assert plain(Causal() & Segments()) == (True, None)
    assert plain(Window(7)) == (False, 7)
    assert plain(Window(7) & Causal() & Window(5)) == (True, 5)
    assert plain(Window(7, ahead=0)) == (True, 7)
    for more in (Window(7, ahead=1), Prefix(3), Causal() | Prefix(3), SinkTokens(1), BLOCKS):
        assert plain(more) is None


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Window(0), "window = 0: counts the visible keys including the query itself"),
        (lambda: Window(2, ahead=-1), "ahead = -1: counts the visible keys after the query"),
        (lambda: SinkTokens(-1), "sink_tokens = -1: is a count"),
        (lambda: Blocks(jnp.zeros((1, 1, 1, 1), jnp.int32), 0, 4), "block_q = 0"),
    ],
)
def test_bad_masks(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_segments_without_segments():
    row = Coords(jnp.arange(6)[None], None, jnp.arange(6))
    with pytest.raises(ConfigError, match="segments = None"):
        Segments().visible(row, row)
    with pytest.raises(ConfigError, match="segments = None"):
        Segments().maybe(row.bounds(), row.bounds())
