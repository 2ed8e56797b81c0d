"""The order in which kernels do the rows of tiles of all heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import Causal, SinkTokens, Window
from attnlab.core.mask import Coords
from attnlab.ops.attention import order
from attnlab.ops.attention.blocks import block_lists


def lists(T: int, mask=None, layout: str = "full", transposed: bool = False, block: int = 128):
    place = jnp.arange(T, dtype=jnp.int32)
    coords = Coords(place[None], None, place)
    mask = (Causal() if mask is None else mask).bound(1, 1)
    return block_lists(
        mask, coords, coords, block_q=block, block_k=block, layout=layout, transposed=transposed
    )


def arrays(B, T, N, K, H, V):
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, V)
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


@pytest.mark.parametrize("batch, heads, rows, section", [
    (1, 1, 5, 1), (2, 6, 4, 3), (3, 4, 7, 6), (2, 3, 1, 6), (2, 2, 3, 1),
])
def test_every_item_once_and_the_longest_of_a_section_first(batch, heads, rows, section):
    items = order.Items(batch, heads, rows, section)
    b, n, rank = map(np.asarray, items.place(jnp.arange(items.count)))
    assert set(zip(b.tolist(), n.tolist(), rank.tolist(), strict=True)) == {
        (i, j, k) for i in range(batch) for j in range(heads) for k in range(rows)
    }
    part = np.arange(items.count) // (rows * section)
    assert (part == (b * heads + n) // section).all(), "sections one after the other"
    for p in range(batch * heads // section):
        assert (np.diff(rank[part == p]) >= 0).all()
        assert (rank[part == p][:section] == 0).all(), "the longest of all its heads"


def test_a_section_is_what_fits_into_l2():
    T = 16384  # a head reads half of its 8 MB of keys and values: 4 MB
    causal = lists(T)
    assert order.over_queries(*arrays(1, T, 16, 16, 128, 128), causal).section == 4
    assert order.over_queries(*arrays(1, T, 12, 12, 128, 128), causal).section == 6
    assert order.over_queries(*arrays(1, T, 16, 4, 128, 128), causal).section == 16, "shared by 4"
    assert order.over_queries(*arrays(1, T, 7, 7, 128, 128), causal).section == 7
    assert order.over_queries(*arrays(1, T, 11, 11, 128, 128), causal).section == 1, "a divisor"
    over = order.over_keys(*arrays(2, T, 16, 4, 128, 128), lists(T, transposed=True))
    assert (over.batch, over.heads, over.rows, over.section) == (2, 4, 128, 1), "4 heads each"
    q, k, _ = arrays(1, T, 8, 8, 128, 128)
    assert order.over_queries(q, k, None, causal).section == 8, "values are part of the keys"


def test_the_mask_counts():
    """A window reads little of its head; what only the device knows counts in full."""
    T = 16384
    given = arrays(1, T, 16, 16, 128, 128)
    near = Causal() & (Window(1024) | SinkTokens(4))
    assert order.over_keys(*given, lists(T, near, transposed=True)).section == 16
    unknown = jax.eval_shape(lambda: lists(T, layout="any"))
    assert order.over_queries(*given, unknown).section == 4, "8 MB each"


def test_a_given_section_is_lowered_to_a_divisor():
    given = arrays(2, 256, 6, 6, 64, 64)
    sections = [order.over_queries(*given, lists(256), n).section for n in (1, 2, 5, 12, 99)]
    assert sections == [1, 2, 4, 12, 12]
