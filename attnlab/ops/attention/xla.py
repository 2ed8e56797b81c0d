"""Chunked attention in plain JAX: memory linear in T and S, on every platform.

Forward: the states of the tiles of keys are merged for one tile of queries (``core.softmax``).

Backward recomputes ``p = exp(z - lse)`` tile by tile from the saved q, k, v, o and lse::

    delta = rowsum(o * do) - dlse
    dv = p^T do       dz = p * (do v^T - delta)       dq = scale dz k       dk = scale dz^T q
    dsink = -sum_rows exp(sink - lse) delta

With a score_mod ``z = mod(y, c)`` of the scaled and capped logits y and captured arrays c, dz goes
back through it first, and ``dc`` is summed over the tiles in the softmax's dtype::

    dy = dz dmod/dy       dc = sum_tiles dz dmod/dc

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

from attnlab.core.axes import vary
from attnlab.core.mask import Coords, Mask
from attnlab.core.mods import Mod
from attnlab.core.softmax import finish_state, finite, merge_states

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
    o, lse = _run(  # type: ignore[misc] - a custom_vjp has no result type
        q, k, v, sink_logits, (mask, score, q_coords, k_coords), scale, logit_cap, softmax_dtype,
        v.dtype,
    )
    return o.astype(v.dtype), lse


def step(
    carry, q, k, v, *, mask, score, q_coords, k_coords, scale, sink_logits, logit_cap, return_lse,
    softmax_dtype, layout,
):
    """The state ``(o, m, l)`` of ``carry`` and these keys; see ``carry.attention_step``."""
    o, lse = _run(  # type: ignore[misc] - a custom_vjp has no result type
        q, k, v, None, (mask, score, q_coords, k_coords), scale, logit_cap, softmax_dtype,
        softmax_dtype,
    )
    lse = lse[..., None]
    state = (lse, (lse > -jnp.inf).astype(o.dtype), o)
    if carry is not None:
        o, m, l = carry
        state = merge_states((m[..., None], l[..., None], o), state)
    return state[2], state[0][..., 0], state[1][..., 0]


def _run(q, k, v, sink_logits, fixed, scale, logit_cap, softmax_dtype, out) -> tuple[Any, Any]:
    """``(o, lse)``, o rounded to ``out`` or the wider dtype of the computation."""
    narrow = jnp.promote_types(q.dtype, softmax_dtype) == softmax_dtype
    dtype = q.dtype if narrow else softmax_dtype
    B, T, N, _ = q.shape
    tiles = tile_sizes(B, N, T, k.shape[1])
    out = jnp.promote_types(out, dtype)
    spec = _Spec(float(scale), logit_cap, jnp.dtype(softmax_dtype), out, *tiles)
    mask, score, *coords = fixed
    floats: tuple = ()
    if score is not None:
        floats, score = score.floats, score.with_floats((None,) * len(score.floats))
    args = (q.astype(dtype), k.astype(dtype), v.astype(dtype), sink_logits, floats)
    return _attend(spec, *vary((*args, (mask, score, *coords))))  # type: ignore[misc]


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
    out: Any
    tile_q: int
    tile_k: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tiling:
    """Mask and coordinates, padded to whole tiles. ``present`` is false on padded keys.

    ``score`` is the score_mod without the arrays that have a gradient, or None.
    """

    mask: Mask
    score: Mod | None
    q: Coords
    k: Coords
    present: jax.Array | None

    @staticmethod
    def of(spec: _Spec, mask: Mask, score: Mod | None, q: Coords, k: Coords) -> _Tiling:
        S = k.index.shape[0]
        padded = -S % spec.tile_k
        present = jnp.arange(S + padded) < S if padded else None
        pad_q = functools.partial(_pad, size=spec.tile_q, axis=-1, mode="edge")
        pad_k = functools.partial(_pad, size=spec.tile_k, axis=-1, mode="edge")
        return _Tiling(mask, score, jax.tree.map(pad_q, q), jax.tree.map(pad_k, k), present)

    @property
    def padding(self) -> str:
        """How q, k and lse are padded: a score_mod must only see pairs like those it is made for.

        Its derivative need not be finite for a logit of zero.
        """
        return "constant" if self.score is None else "edge"

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

    def modify(self, spec: _Spec, i, j) -> Callable[[jax.Array, tuple], jax.Array]:
        """``modify(z, floats)``: the score_mod of the logits ``[B, K, G, tile_q, tile_k]``."""
        if self.score is None:
            return lambda z, floats: z
        score = self.score
        q, k = _cut(self.q, i, spec.tile_q, -1), _cut(self.k, j, spec.tile_k, -1)

        def modify(z, floats):
            B, K, G, *pair = z.shape
            flat = (B, K * G, *pair)
            out = score.with_floats(floats).on_grid(q, k, z.reshape(flat))
            return jnp.broadcast_to(out, flat).reshape(z.shape)

        return modify


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec, q, k, v, sink, floats, fixed):
    return _attend_fwd(spec, q, k, v, sink, floats, fixed)[0]


def _attend_fwd(spec, q, k, v, sink, floats, fixed):
    T, N, K = q.shape[1], q.shape[2], k.shape[2]
    tiling = _Tiling.of(spec, *fixed)
    qs = _pad(_heads(q, K), spec.tile_q, mode=tiling.padding)
    ks = _pad(k.swapaxes(1, 2), spec.tile_k, mode=tiling.padding)
    vs = _pad(v.swapaxes(1, 2), spec.tile_k)
    logits = None if sink is None else sink.astype(spec.wide).reshape(K, N // K, 1, 1)
    o, lse = _rows(spec, tiling, qs, ks, vs, logits, floats)
    o = checkpoint_name(_tokens(o[..., :T, :]).astype(spec.out), "attention_out")
    lse = checkpoint_name(_tokens(lse[..., :T, :])[..., 0], "attention_lse")
    return (o, lse), (q, k, v, sink, floats, fixed, o, lse)


def _attend_bwd(spec, residuals, cotangents):
    q, k, v, sink, floats, fixed, o, lse = residuals
    do, dlse = cotangents
    T, S, K = q.shape[1], k.shape[1], k.shape[2]
    tiling = _Tiling.of(spec, *fixed)
    alive = lse > -jnp.inf
    do = jnp.where(alive[..., None], do, 0).astype(q.dtype)
    delta = (o.astype(spec.wide) * do.astype(spec.wide)).sum(-1) - dlse
    delta = jnp.where(alive, delta, 0)
    lse = jnp.where(alive, lse, 0)
    dsink = None
    if sink is not None:
        p = jnp.where(alive, jnp.exp(sink.astype(spec.wide) - lse), 0)
        dsink = -(p * delta).sum((0, 1)).astype(sink.dtype)
    edge = tiling.padding
    qs, rows = (_pad(_heads(x, K), spec.tile_q, mode=edge) for x in (q, lse[..., None]))
    dos, deltas = (_pad(_heads(x, K), spec.tile_q) for x in (do, delta[..., None]))
    ks = _pad(k.swapaxes(1, 2), spec.tile_k, mode=edge)
    vs = _pad(v.swapaxes(1, 2), spec.tile_k)
    dq, dk, dv, dfloats = _row_grads(spec, tiling, qs, dos, rows, deltas, ks, vs, floats)
    dq = _tokens(dq[..., :T, :]).astype(q.dtype)
    dk, dv = (
        dx[..., :S, :].swapaxes(1, 2).astype(x.dtype) for dx, x in ((dk, k), (dv, v))
    )
    return dq, dk, dv, dsink, tuple(d.astype(x.dtype) for d, x in zip(dfloats, floats)), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _rows(spec: _Spec, tiling: _Tiling, q, k, v, sink, floats):
    """``(o, lse)`` of all query tiles."""
    K = k.shape[1]
    n_q, n_k = q.shape[-2] // spec.tile_q, k.shape[-2] // spec.tile_k

    def tile(i, j):
        qi, kj, vj = _cut(q, i, spec.tile_q), _cut(k, j, spec.tile_k), _cut(v, j, spec.tile_k)
        z = tiling.modify(spec, i, j)(_logits(spec, qi, kj), floats)
        return _partial(spec, z, vj, tiling.seen(spec, i, j, K))

    if n_q == n_k == 1:
        return finish_state(tile(0, 0), sink)
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
                lambda state: merge_states(state, tile(i, j)),
                lambda state: state,
                state,
            ), None

        state, _ = lax.scan(step, empty, jnp.arange(n_k))
        return None, finish_state(state, sink)

    _, (o, lse) = lax.scan(row, None, jnp.arange(n_q))
    return _join(o), _join(lse)


def _row_grads(spec: _Spec, tiling: _Tiling, q, do, lse, delta, k, v, floats):
    """``(dq, dk, dv, dfloats)`` in ``spec.wide``, summed over all tiles."""
    K = k.shape[1]
    n_q, n_k = q.shape[-2] // spec.tile_q, k.shape[-2] // spec.tile_k

    def tile(i, j):
        rows = _cut((q, do, lse, delta), i, spec.tile_q)
        columns = _cut((k, v), j, spec.tile_k)
        modify = None if tiling.score is None else tiling.modify(spec, i, j)
        return _pull(spec, rows, columns, tiling.seen(spec, i, j, K), modify, floats)

    if n_q == n_k == 1:
        return tile(0, 0)
    live = tiling.live(spec)
    zeros = functools.partial(jnp.zeros, dtype=spec.wide)
    no_dq = _vary_like(zeros((*q.shape[:3], spec.tile_q, q.shape[-1])), q)
    none = [_vary_like(zeros(x.shape), q) for x in (k, v, *floats)]

    def row(sums, i):
        def step(sums, j):
            def add(sums):
                dq, dk, dv, dfloats = tile(i, j)
                captured = tuple(x + y for x, y in zip(sums[3], dfloats))
                return sums[0] + dq, _add(sums[1], dk, j), _add(sums[2], dv, j), captured

            return lax.cond(live(i, j), add, lambda sums: sums, sums), None

        (dq, *sums), _ = lax.scan(step, (no_dq, *sums), jnp.arange(n_k))
        return tuple(sums), dq

    sums, dq = lax.scan(row, (none[0], none[1], tuple(none[2:])), jnp.arange(n_q))
    return _join(dq), *sums


def _logits(spec: _Spec, q, k):
    z = spec.scale * _dot("bkgth,bksh->bkgts", q, k, spec.wide)
    return z if spec.cap is None else spec.cap * jnp.tanh(z / spec.cap)


def _partial(spec: _Spec, z, v, seen):
    """The state ``(m, l, a)`` of one tile of logits."""
    z = jnp.where(seen, z, -jnp.inf)
    top = lax.stop_gradient(z.max(-1, keepdims=True))
    e = jnp.exp(z - finite(top))
    return top, e.sum(-1, keepdims=True), _dot("bkgts,bksv->bkgtv", e.astype(v.dtype), v, spec.wide)


def _pull(spec: _Spec, rows, columns, seen, modify, floats):
    """``(dq, dk, dv, dfloats)`` of one tile."""
    (q, do, lse, delta), (k, v) = rows, columns
    y = z = _logits(spec, q, k)
    if modify is not None:
        z, back = jax.vjp(modify, y, floats)
    p = jnp.exp(jnp.where(seen, z - lse, -jnp.inf))
    dv = _dot("bkgts,bkgtv->bksv", p.astype(do.dtype), do, spec.wide)
    dz = p * (_dot("bkgtv,bksv->bkgts", do, v, spec.wide) - delta)
    dfloats: tuple = ()
    if modify is not None:
        dz, dfloats = back(dz)
        dz = jnp.where(p > 0, dz, 0)  # the derivative of hidden pairs need not be finite
        dfloats = tuple(x.astype(spec.wide) for x in dfloats)
    if spec.cap is not None:
        dz *= 1 - (y / spec.cap) ** 2
    dz = dz.astype(q.dtype)
    dq = spec.scale * _dot("bkgts,bksh->bkgth", dz, k, spec.wide)
    dk = spec.scale * _dot("bkgts,bkgth->bksh", dz, q, spec.wide)
    return dq, dk, dv, dfloats


def _at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def _dot(equation: str, a, b, dtype):
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)


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


def _vary_like(tree, like):
    return vary((tree, like))[0]
