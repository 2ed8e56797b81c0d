"""Chunked attention in plain JAX: memory linear in T and S, on every platform.

Forward, for one tile of queries over all tiles of keys (online softmax)::

    m = max_s z[s]    l = sum_s exp(z[s] - m)    a = sum_s exp(z[s] - m) v[s]        of one tile
    (m, l, a) + (m', l', a') = (M, l exp(m - M) + l' exp(m' - M), likewise a)        M = max(m, m')
    o = a / l         lse = m + log l

Backward recomputes ``p = exp(z - lse)`` tile by tile from the saved q, k, v, o and lse::

    delta = rowsum(o * do) - dlse
    dv = p^T do       dz = p * (do v^T - delta)       dq = scale dz k       dk = scale dz^T q
    dsink = -sum_rows exp(sink - lse) delta

Inside, arrays are ``q[B, K, G, T, H]``, ``k[B, K, S, H]``, ``v[B, K, S, V]`` and
``lse[B, K, G, T, 1]``: tokens are always the last axis but one.

Sources: Milakov & Gimelshein 2018, arXiv 1805.02867 (online softmax); Dao et al. 2022, arXiv
2205.14135 (tiled attention and its backward).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from attnlab.core.mask import Coords, Mask

TILE = 512
TILE_BYTES = 64 * 2**20


def forward(
    q, k, v, *, mask, score, q_coords, k_coords, scale, sink_logits, logit_cap, return_lse,
    softmax_dtype, layout,
):
    """Returns ``(o, lse)``; see ``attention``.

    ``jax.checkpoint`` policies see o as "attention_out" and lse as "attention_lse". Second
    derivatives are right, but their memory is that of the dense reference.
    """
    narrow = jnp.promote_types(q.dtype, softmax_dtype) == softmax_dtype
    dtype = q.dtype if narrow else softmax_dtype
    B, T, N, _ = q.shape
    tiles = tile_sizes(B, N, T, k.shape[1])
    spec = _Spec(float(scale), logit_cap, jnp.dtype(softmax_dtype), *tiles)
    args = (q.astype(dtype), k.astype(dtype), v.astype(dtype), sink_logits)
    o, lse = _attend(spec, *_vary((*args, mask, q_coords, k_coords)))  # type: ignore[misc]
    return o.astype(v.dtype), lse


def tile_sizes(B: int, N: int, T: int, S: int) -> tuple[int, int]:
    """Queries and keys in a tile: at most 512, fp32 logits of a tile at most 64 MiB if possible."""
    most = max(TILE_BYTES // (4 * B * N), 1)
    tile_q = _even(T, TILE)
    tile_k = _even(S, TILE)
    while tile_q * tile_k > most and max(tile_q, tile_k) > 64:
        if tile_q >= tile_k:
            tile_q = _even(T, tile_q // 2)
        else:
            tile_k = _even(S, tile_k // 2)
    return tile_q, tile_k


def _even(length: int, most: int) -> int:
    """The tile, a multiple of 16, that cuts ``length`` evenly into parts of at most ``most``."""
    if length <= most:
        return max(length, 1)
    tile = math.ceil(length / math.ceil(length / most))
    return min(16 * math.ceil(tile / 16), most)


@dataclasses.dataclass(frozen=True)
class _Spec:
    scale: float
    cap: float | None
    wide: Any
    tile_q: int
    tile_k: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tiling:
    """Mask and coordinates, padded to whole tiles. ``present`` is false on padded keys."""

    mask: Mask
    q: Coords
    k: Coords
    present: jax.Array | None

    @staticmethod
    def of(spec: _Spec, mask: Mask, q: Coords, k: Coords) -> _Tiling:
        S = k.index.shape[0]
        padded = -S % spec.tile_k
        present = jnp.arange(S + padded) < S if padded else None
        pad_q = functools.partial(_pad, size=spec.tile_q, axis=-1, mode="edge")
        pad_k = functools.partial(_pad, size=spec.tile_k, axis=-1, mode="edge")
        return _Tiling(mask, jax.tree.map(pad_q, q), jax.tree.map(pad_k, k), present)

    def live(self, spec: _Spec) -> Callable[[Any, Any], jax.Array]:
        """Whether tile ``(i, j)`` may hold a visible pair, as a function of ``i`` and ``j``.

        All bounds are taken here, outside the loops: with a sharded batch they cost a collective.
        """

        def bounds(side: Coords, size: int):
            tiles = jnp.arange(side.index.shape[0] // size)
            return jax.vmap(lambda i: _cut(side, i, size, -1).bounds())(tiles)

        q, k = bounds(self.q, spec.tile_q), bounds(self.k, spec.tile_k)
        return lambda i, j: jnp.asarray(self.mask.maybe(_at(q, i), _at(k, j)))

    def seen(self, spec: _Spec, i, j, K: int) -> jax.Array:
        """Visible pairs of tile ``(i, j)``, broadcasts to ``[B, K, G, tile_q, tile_k]``."""
        q, k = _cut(self.q, i, spec.tile_q, -1), _cut(self.k, j, spec.tile_k, -1)
        seen = self.mask.visible(q, k)
        if self.present is not None:
            seen &= _cut(self.present, j, spec.tile_k, -1)
        B, N, *pair = seen.shape
        return seen[:, :, None] if N == 1 else seen.reshape(B, K, N // K, *pair)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec, q, k, v, sink, mask, q_coords, k_coords):
    return _attend_fwd(spec, q, k, v, sink, mask, q_coords, k_coords)[0]


def _attend_fwd(spec, q, k, v, sink, mask, q_coords, k_coords):
    T, N, K = q.shape[1], q.shape[2], k.shape[2]
    tiling = _Tiling.of(spec, mask, q_coords, k_coords)
    qs = _pad(_heads(q, K), spec.tile_q)
    ks, vs = (_pad(x.swapaxes(1, 2), spec.tile_k) for x in (k, v))
    logits = None if sink is None else sink.astype(spec.wide).reshape(K, N // K, 1, 1)
    o, lse = _rows(spec, tiling, qs, ks, vs, logits)
    o = checkpoint_name(_tokens(o[..., :T, :]).astype(v.dtype), "attention_out")
    lse = checkpoint_name(_tokens(lse[..., :T, :])[..., 0], "attention_lse")
    return (o, lse), (q, k, v, sink, mask, q_coords, k_coords, o, lse)


def _attend_bwd(spec, residuals, cotangents):
    q, k, v, sink, mask, q_coords, k_coords, o, lse = residuals
    do, dlse = cotangents
    T, S, K = q.shape[1], k.shape[1], k.shape[2]
    tiling = _Tiling.of(spec, mask, q_coords, k_coords)
    alive = lse > -jnp.inf
    do = jnp.where(alive[..., None], do, 0)
    delta = (o.astype(spec.wide) * do.astype(spec.wide)).sum(-1) - dlse
    delta = jnp.where(alive, delta, 0)
    lse = jnp.where(alive, lse, 0)
    dsink = None
    if sink is not None:
        p = jnp.where(alive, jnp.exp(sink.astype(spec.wide) - lse), 0)
        dsink = -(p * delta).sum((0, 1)).astype(sink.dtype)
    queries = (_heads(x, K) for x in (q, do, lse[..., None], delta[..., None]))
    keys = (x.swapaxes(1, 2) for x in (k, v))
    dq, dk, dv = _row_grads(
        spec, tiling, *(_pad(x, spec.tile_q) for x in queries),
        *(_pad(x, spec.tile_k) for x in keys),
    )
    dq = _tokens(dq[..., :T, :]).astype(q.dtype)
    dk, dv = (
        dx[..., :S, :].swapaxes(1, 2).astype(x.dtype) for dx, x in ((dk, k), (dv, v))
    )
    return dq, dk, dv, dsink, None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _rows(spec: _Spec, tiling: _Tiling, q, k, v, sink):
    """``(o, lse)`` of all query tiles."""
    K = k.shape[1]
    n_q, n_k = q.shape[-2] // spec.tile_q, k.shape[-2] // spec.tile_k

    def tile(i, j):
        qi, kj, vj = _cut(q, i, spec.tile_q), _cut(k, j, spec.tile_k), _cut(v, j, spec.tile_k)
        return _partial(spec, qi, kj, vj, tiling.seen(spec, i, j, K))

    if n_q == n_k == 1:
        return _finish(spec, tile(0, 0), sink)
    live = tiling.live(spec)
    empty = _vary_like(
        tuple(
            jnp.full((*q.shape[:3], spec.tile_q, width), value, spec.wide)
            for width, value in ((1, -jnp.inf), (1, 0), (v.shape[-1], 0))
        ),
        q,
    )

    def row(_, i):
        def step(state, j):
            return lax.cond(
                live(i, j),
                lambda state: _merge(state, tile(i, j)),
                lambda state: state,
                state,
            ), None

        state, _ = lax.scan(step, empty, jnp.arange(n_k))
        return None, _finish(spec, state, sink)

    _, (o, lse) = lax.scan(row, None, jnp.arange(n_q))
    return _join(o), _join(lse)


def _row_grads(spec: _Spec, tiling: _Tiling, q, do, lse, delta, k, v):
    """``(dq, dk, dv)`` in ``spec.wide``, summed over all tiles."""
    K = k.shape[1]
    n_q, n_k = q.shape[-2] // spec.tile_q, k.shape[-2] // spec.tile_k

    def tile(i, j):
        rows = _cut((q, do, lse, delta), i, spec.tile_q)
        columns = _cut((k, v), j, spec.tile_k)
        return _pull(spec, rows, columns, tiling.seen(spec, i, j, K))

    if n_q == n_k == 1:
        return tile(0, 0)
    live = tiling.live(spec)
    zeros = functools.partial(jnp.zeros, dtype=spec.wide)
    no_dq = _vary_like(zeros((*q.shape[:3], spec.tile_q, q.shape[-1])), q)
    no_dk, no_dv = (_vary_like(zeros(x.shape), q) for x in (k, v))

    def row(sums, i):
        def step(sums, j):
            def add(sums):
                dq, dk, dv = tile(i, j)
                return sums[0] + dq, _add(sums[1], dk, j), _add(sums[2], dv, j)

            return lax.cond(live(i, j), add, lambda sums: sums, sums), None

        (dq, *sums), _ = lax.scan(step, (no_dq, *sums), jnp.arange(n_k))
        return tuple(sums), dq

    (dk, dv), dq = lax.scan(row, (no_dk, no_dv), jnp.arange(n_q))
    return _join(dq), dk, dv


def _logits(spec: _Spec, q, k):
    z = spec.scale * _dot("bkgth,bksh->bkgts", q, k, spec.wide)
    return z if spec.cap is None else spec.cap * jnp.tanh(z / spec.cap)


def _partial(spec: _Spec, q, k, v, seen):
    """The state ``(m, l, a)`` of one tile."""
    z = jnp.where(seen, _logits(spec, q, k), -jnp.inf)
    top = lax.stop_gradient(z.max(-1, keepdims=True))
    e = jnp.exp(z - _finite(top))
    return top, e.sum(-1, keepdims=True), _dot("bkgts,bksv->bkgtv", e.astype(v.dtype), v, spec.wide)


def _merge(one, other):
    """The state of the keys of both."""
    top = jnp.maximum(one[0], other[0])
    a, b = (jnp.exp(x[0] - lax.stop_gradient(_finite(top))) for x in (one, other))
    return top, one[1] * a + other[1] * b, one[2] * a + other[2] * b


def _finish(spec: _Spec, state, sink):
    """``(o, lse)`` of a row's state; a sink is one more key whose value is zero."""
    if sink is not None:
        state = _merge(state, (sink, jnp.ones((), spec.wide), jnp.zeros((), spec.wide)))
    top, total, acc = state
    empty = total == 0
    total = jnp.where(empty, 1, total)
    top = lax.stop_gradient(_finite(top))
    return acc / total, jnp.where(empty, -jnp.inf, top + jnp.log(total))


def _pull(spec: _Spec, rows, columns, seen):
    """``(dq, dk, dv)`` of one tile."""
    (q, do, lse, delta), (k, v) = rows, columns
    z = _logits(spec, q, k)
    p = jnp.exp(jnp.where(seen, z - lse, -jnp.inf))
    dv = _dot("bkgts,bkgtv->bksv", p.astype(do.dtype), do, spec.wide)
    dz = p * (_dot("bkgtv,bksv->bkgts", do, v, spec.wide) - delta)
    if spec.cap is not None:
        dz *= 1 - (z / spec.cap) ** 2
    dz = dz.astype(q.dtype)
    dq = spec.scale * _dot("bkgts,bksh->bkgth", dz, k, spec.wide)
    dk = spec.scale * _dot("bkgts,bkgth->bksh", dz, q, spec.wide)
    return dq, dk, dv


def _at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def _dot(equation: str, a, b, dtype):
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)


def _heads(x, K: int):
    """``[B, T, N, W]`` to ``[B, K, G, T, W]``."""
    B, T, N, W = x.shape
    return x.reshape(B, T, K, N // K, W).transpose(0, 2, 3, 1, 4)


def _tokens(x):
    """``[B, K, G, T, W]`` to ``[B, T, N, W]``."""
    B, K, G, T, W = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, W)


def _join(x):
    """``[tiles, B, K, G, tile, W]`` to ``[B, K, G, T, W]``."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _cut(tree, i, size: int, axis: int = -2):
    return jax.tree.map(
        lambda x: x if x.shape[axis] == size
        else lax.dynamic_slice_in_dim(x, i * size, size, axis), tree
    )


def _add(x, part, j):
    """Add tile ``j`` to ``x``."""
    size = part.shape[-2]
    return lax.dynamic_update_slice_in_dim(x, _cut(x, j, size) + part, j * size, -2)


def _pad(x, size: int, axis: int = -2, mode: str = "constant"):
    missing = -x.shape[axis] % size
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, mode=mode)


def _axes(x) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying


def _vary(tree):
    """Give all arrays the same varying axes inside shard_map, as scans and cond branches require.

    The transpose of the cast is the sum over those axes that a replicated input's gradient needs.
    """
    axes = frozenset().union(*(_axes(x) for x in jax.tree.leaves(tree)))

    def cast(x):
        missing = tuple(sorted(axes - _axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def _vary_like(tree, like):
    return _vary((tree, like))[0]
