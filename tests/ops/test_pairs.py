"""The functions of a pair that kernels evaluate, against the mask itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.mask import Causal, Coords, Full, Mask, Pair, Prefix, Segments, SinkTokens, Window
from attnlab.core.mods import Mod
from attnlab.ops.attention.pairs import pair_mod, runs_mod

LENGTHS = ((5, 1, 9, 4), (13, 7))  # documents of the two rows, then padding
T = 23
RUNS = {
    "documents": Causal() & Segments(),
    "window": Segments() & Causal() & Window(4),
    "two windows": Causal() & Window(6) & Segments() & Full() & Window(3),
}
OTHERS = {
    "no segments": (Causal() & Window(4), "packed"),
    "sinks": (Causal() & (Window(4) | SinkTokens(1)) & Segments(), "packed"),
    "keys ahead": (Causal() & Window(4, ahead=2) & Segments(), "packed"),
    "prefix": (Causal() & Prefix(3) & Segments(), "packed"),
    "not causal": (Segments() & Window(4), "packed"),
    "any layout": (Causal() & Segments(), "any"),
}


def coords() -> Coords:
    positions, segments = np.zeros((2, T), np.int32), np.zeros((2, T), np.int32)
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, length in enumerate(lengths, 1):
            positions[row, at : at + length] = np.arange(length)
            segments[row, at : at + length] = number
            at += length
    return Coords(jnp.asarray(positions), jnp.asarray(segments), jnp.arange(T, dtype=jnp.int32))


def table(mod: Mod, side: Coords):
    """``[2, T, T]``, the function on every pair."""

    def one(batch, t, s):
        known = dict(
            batch=batch, head=jnp.int32(0), q_index=side.index[t], k_index=side.index[s],
            q_pos=side.positions[batch, t], k_pos=side.positions[batch, s],
            q_segment=side.segments[batch, t], k_segment=side.segments[batch, s],
        )
        return mod.of_pair(*(known[name] for name in mod.program.inputs))

    places = jnp.arange(T)
    over = jax.vmap(jax.vmap(jax.vmap(one, (None, None, 0)), (None, 0, None)), (0, None, None))
    return np.asarray(over(jnp.arange(2), places, places))


def seen(mask: Mask, side: Coords):
    pair = Pair(
        None, None, side.positions[:, :, None], side.positions[:, None], side.index[:, None],
        side.index[None], side.segments[:, :, None], side.segments[:, None],
    )
    return np.broadcast_to(np.asarray(mask.sees(pair)), (2, T, T))


@pytest.mark.parametrize("name", RUNS)
def test_runs_of_packed_rows(name):
    side, mask = coords(), RUNS[name]
    mod = runs_mod(mask, side, "packed")
    assert mod is not None
    found = table(mod, side)
    np.testing.assert_array_equal(found, seen(mask, side))
    np.testing.assert_array_equal(found, table(pair_mod(mask, None), side))
    assert found.any(-1).sum() == sum(map(sum, LENGTHS)), "padding sees nothing, all others do"


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_are_no_runs(name):
    mask, layout = OTHERS[name]
    assert runs_mod(mask, coords(), layout) is None
