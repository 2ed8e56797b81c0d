"""Decoding in plain JAX, on every platform: a loop over the tiles of keys that some row needs.

The state of a tile and the merge of two are those of online softmax::

    m = max_s z[s]    l = sum_s exp(z[s] - m)    a = sum_s exp(z[s] - m) v[s]
    (m, l, a) + (m', l', a') = (M, l exp(m - M) + l' exp(m' - M), likewise a)        M = max(m, m')

Memory beside the cache is one tile of it. How many tiles are visited follows the lengths, the
window and the segments of this call, not the room of the cache.

Source: Milakov & Gimelshein 2018, arXiv 1805.02867 (online softmax).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from attnlab.core.mask import Coords, Mask

TILE = 512
TILE_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class _Cache:
    """Keys and values of all rows, tile by tile."""

    k: Any
    v: Any
    pages: Any
    lengths: Any
    coords: Coords
    tile: int
    dtype: Any

    def read(self, j):
        """``(k, v, coordinates, present[B, tile])`` of tile ``j``; a key is present in one tile."""
        S = self.coords.index.shape[0]
        start = jnp.minimum(j * self.tile, S - self.tile)  # the last one may begin earlier
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=self.tile)
        index = cut(self.coords.index)
        positions, segments = cut(self.coords.positions, axis=1), self.coords.segments
        segments = None if segments is None else cut(segments, axis=1)
        present = (index >= j * self.tile) & (index < self.lengths[:, None])
        if self.pages is None:
            k, v = (cut(x, axis=1) for x in (self.k, self.v))
        else:
            page = self.k.shape[1]
            table = lax.dynamic_slice_in_dim(self.pages, start // page, self.tile // page, axis=1)
            used = index[::page] < self.lengths[:, None]
            table = jnp.where(used, table, 0)
            k, v = (
                x[table].reshape(table.shape[0], self.tile, *x.shape[2:]) for x in (self.k, self.v)
            )
        return (
            k.astype(self.dtype), v.astype(self.dtype),
            Coords(positions, segments, index), present,  # type: ignore[arg-type]
        )


def forward(
    q, k, v, lengths, pages, sink_logits, q_coords, k_coords, *, mask: Mask, implied, logit_cap,
    scale, softmax_dtype, splits,
):
    """Returns ``(o, lse)``; see ``decode``."""
    B, t, N, H = q.shape
    K, S = k.shape[2], k_coords.index.shape[0]
    narrow = jnp.promote_types(q.dtype, softmax_dtype) == softmax_dtype
    dtype = q.dtype if narrow else softmax_dtype
    size = tile_size(B * N * t, S, 1 if pages is None else k.shape[1])
    cache = _Cache(k, v, pages, lengths, k_coords, size, dtype)
    rows = q.reshape(B, t, K, N // K, H).astype(dtype)

    def tile(j):
        keys, values, coords, present = cache.read(j)
        z = scale * _dot("btkgh,bskh->bkgts", rows, keys, softmax_dtype)
        if logit_cap is not None:
            z = logit_cap * jnp.tanh(z / logit_cap)
        seen = mask.visible(q_coords, coords) & present[:, None, None]
        z = jnp.where(seen[:, :, None], z, -jnp.inf)
        top = z.max(-1, keepdims=True)
        e = jnp.exp(z - _finite(top))
        acc = _dot("bkgts,bskv->bkgtv", e.astype(dtype), values, softmax_dtype)
        return top, e.sum(-1, keepdims=True), acc

    tiles = -(-S // size)
    if tiles == 1:
        state = tile(0)
    else:
        order, count = needed(mask, q_coords, k_coords, lengths, size, tiles)
        state = lax.fori_loop(
            1, count, lambda i, state: _merge(state, tile(order[i])), tile(order[0])
        )
    if sink_logits is not None:
        sink = sink_logits.astype(softmax_dtype).reshape(K, N // K, 1, 1)
        zero = jnp.zeros((), softmax_dtype)
        state = _merge(state, (sink, zero + 1, zero))
    top, total, acc = state
    empty = total == 0
    total = jnp.where(empty, 1, total)
    o = (acc / total).transpose(0, 3, 1, 2, 4).reshape(B, t, N, -1)
    lse = jnp.where(empty, -jnp.inf, _finite(top) + jnp.log(total))[..., 0]
    return o.astype(q.dtype), lse.transpose(0, 3, 1, 2).reshape(B, t, N)


def tile_size(rows: int, S: int, page: int) -> int:
    """Keys of a tile: about 512, whole pages, fp32 logits of a tile at most 64 MiB if possible."""
    most = max(min(TILE, TILE_BYTES // (4 * rows)), 1)
    return min(S, page * max(most // page, 1))


def needed(mask: Mask, q: Coords, k: Coords, lengths, size: int, tiles: int):
    """``(order[tiles], count)``: the first ``count`` entries are the tiles that some row needs."""
    S = k.index.shape[0]
    alive = k.index < lengths[:, None]
    seen = (mask.visible(q, k)[:, 0] & alive[:, None]).any((0, 1))
    seen = jnp.pad(seen, (0, tiles * size - S)).reshape(tiles, size).any(1)
    (order,) = jnp.nonzero(seen, size=tiles, fill_value=0)
    return order, seen.sum(dtype=jnp.int32)


def _merge(one, other):
    """The state of the keys of both."""
    top = jnp.maximum(one[0], other[0])
    a, b = (jnp.exp(x[0] - _finite(top)) for x in (one, other))
    return top, one[1] * a + other[1] * b, one[2] * a + other[2] * b


def _dot(equation: str, a, b, dtype):
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)
