"""In what order a kernel does the rows of tiles of all heads.

An item is one row of tiles (of queries or of keys) of one head. Rows differ in length, so blocks
must begin with the longest, or the last long ones are waited for while the rest of the GPU is idle;
but rows of too many heads at a time push each other's keys and values out of L2. So items are done
section by section, of as many heads as fit, and inside a section by length, whatever their head.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax import lax

from attnlab.ops.attention.blocks import BlockLists

L2 = 32 * 2**20  # bytes that the heads of a section may read; H100, H200 have 50 MB, A100 40


@dataclasses.dataclass(frozen=True)
class Items:
    """The items of a kernel and their order.

    Args:
        batch, heads, rows: how many; an item is one of each. section: heads (of any row of the
            batch) whose items are done together, a divisor of all.
    """

    batch: int
    heads: int
    rows: int
    section: int

    @property
    def count(self) -> int:
        return self.batch * self.heads * self.rows

    def place(self, item: Any) -> tuple[Any, Any, Any]:
        """Row of the batch, head, and rank of the row of tiles by length."""
        part, rest = _divided(item, self.rows * self.section)
        rank, inside = _divided(rest, self.section)
        return *_divided(part * self.section + inside, self.heads), rank


def _divided(n, by: int):
    return lax.div(n, by), lax.rem(n, by)


def over_queries(q, k, v, lists: BlockLists, section: int = 0) -> Items:
    """The items of a kernel with a row for each tile of ``q[B, T, N, H]``.

    Args:
        v: None if it is part of k. section: heads of one at most; 0: as many as fit into L2.
    """
    (B, _, N, H), (S, K) = q.shape, k.shape[1:3]
    width = H + (0 if v is None else v.shape[-1])
    size = lists.block_k * width * q.dtype.itemsize * K / N  # heads of a group read the same
    return _items(B, N, lists, -(-S // lists.block_k), size, section)


def over_keys(q, k, v, lists: BlockLists, section: int = 0) -> Items:
    """The same with a row for each tile of ``k[B, S, K, H]``; ``lists`` are transposed."""
    (B, T, N, H), (K, V) = q.shape, v.shape[2:]
    size = lists.block_q * (H + V) * q.dtype.itemsize * N / K
    return _items(B, K, lists, -(-T // lists.block_q), size, section)


def _items(B: int, heads: int, lists: BlockLists, tiles: float, size: float, section: int) -> Items:
    """tiles: what a row visits, where only the device knows it. size: bytes that a tile reads."""
    visited = lists.full.blocks, lists.partial.blocks
    if all(isinstance(x, np.ndarray) for x in visited):
        tiles = float(np.mean(visited[0] + visited[1]))
    count, most = B * heads, section or int(L2 / max(1.0, tiles * size))
    fitting = [n for n in range(1, count + 1) if count % n == 0 and n <= most]
    return Items(B, heads, lists.rows, max(fitting, default=1))
