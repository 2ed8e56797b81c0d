"""Attention of any rows of queries: (token, head) pairs of one key/value group, places as data.

The rows of a group share its keys and values, whatever heads and tokens they belong to. Row ``r``
of group ``kappa`` is a query of head ``n = heads[kappa, r]`` at position ``positions[kappa, r]``::

    z[r, s] = mod(cap(scale * q[kappa, r] . k[s, kappa]), n, position of r, position of s)
    p[r, s] = exp(z[r, s]) / (sum_{s visible} exp(z[r, s]) + exp(sink_logits[n]))
    o[kappa, r] = sum_s p[r, s] v[s, kappa]       lse[kappa, r] = log of the denominator

Scale, cap, score_mod, mask and sinks are those of ``attention``, in its order. All heads of all
tokens are grouped-query attention with the heads of a group as rows; some of them are routed heads;
rows of segment 0 fill up what is ragged. ``packed_rows`` makes such rows and puts them back.

How: groups join the batch, ``q[B K, R, 1, H]`` over ``k[B K, S, 1, H]``, and a function that asks
for the head looks it up by the row: for a kernel that is a vector beside the queries. Sinks, which
kernels take by head, join afterwards: ``o sigmoid(lse - sink)`` and ``logaddexp(lse, sink)``.

Source: Ainslie et al. 2023, arXiv 2305.13245 (groups of queries that share their keys).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.core.errors import ConfigError, DtypeError, ShapeError
from attnlab.core.mask import (
    And,
    Blocks,
    Causal,
    Full,
    Mask,
    MaskMod,
    Or,
    Prefix,
    Segments,
    SinkTokens,
    Window,
    Wrapped,
    masked,
)
from attnlab.core.mods import Mod
from attnlab.ops.attention import _score, attention
from attnlab.ops.attention.inputs import check_options

Sides = tuple[Int[Array, "B K R"], Int[Array, "B S"]]


def attention_rows(
    q: Float[Array, "B K R H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    heads: Int[Array, "B K R"],
    num_heads: int,
    positions: Sides,
    segments: Sides | None = None,
    index: Int[Array, "B K R"] | None = None,
    mask: Mask | Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | Mod | None = None,
    scale: float | None = None,
    sink_tokens: int = 0,
    sink_logits: Float[Array, " N"] | None = None,
    logit_cap: float | None = None,
    return_lse: bool = False,
    softmax_dtype: str = "float32",
    impl: str | Sequence[str] | None = None,
) -> Any:
    """Attention of ``R`` rows of queries in each key/value group.

    Args:
        q, k, v: one floating dtype.
        heads: the query head of each row, numbered over all ``num_heads``; those of group ``kappa``
            are ``kappa G .. (kappa + 1) G - 1``. Others raise where the values are known; traced
            they cannot be seen, and functions and sinks then read another head's entries.
        num_heads: N, a multiple of K.
        positions, segments: of the rows and of the keys. A row of segment 0 is padding.
        index: what functions of a pair see as ``q_index`` (a row's token, say, for captured arrays
            by token); default: the place ``r`` of the row.
        mask: default ``Causal()``; any but ``Blocks`` and planned masks, which list blocks of
            tokens. Rows in the order of their positions visit few tiles.
        score_mod, scale, sink_tokens, sink_logits, logit_cap, return_lse, softmax_dtype, impl: as
            in ``attention``; functions written for it serve here.

    Returns:
        ``o[B, K, R, V]`` in the dtype of v, or ``(o, lse[B, K, R])`` with lse in ``softmax_dtype``;
        differentiable as ``attention`` is. A row without keys is zero with zero gradient and has
        ``lse = -inf``, or that of its sink. Below float32 a sink rounds o once more.

    With ``K > 1`` the keys and values are brought into the order ``[B, K, S, .]``, which moves
    ``2 B S K (H + V)`` numbers through memory, and as many for their gradients. ``xla`` and ``tpu``
    do so in any call; it is an additional cost in the Hopper kernels. With ``K = 1`` nothing moves.

    Raises:
        ShapeError, DtypeError, ConfigError: on bad arguments.
        ImplementationError: ``impl`` refuses the call. Kernels refuse functions that look up a
            captured array by head and key or by head and distance together.
    """
    B, K, R, S = _shapes(q, k, v, num_heads)
    for name, x in (("heads", heads), ("index", index)):
        if x is not None:
            _check(name, x, (B, K, R))
    for name, sides in (("positions", positions), ("segments", segments)):
        if sides is not None or name == "positions":
            _check_sides(name, sides, (B, K, R), (B, S))
    _check_heads(heads, num_heads // K)
    check_options(num_heads, sink_logits, logit_cap, scale, softmax_dtype)
    softmax_dtype = jnp.dtype(softmax_dtype).name
    of_row = _OfRow.of(heads, index, num_heads)
    if score_mod is not None:
        score_mod = of_row.mod(_score(score_mod, softmax_dtype), softmax_dtype)
    q = q.reshape(B * K, R, 1, q.shape[-1])
    k, v = (x.swapaxes(1, 2).reshape(B * K, S, 1, x.shape[-1]) for x in (k, v))
    o, lse = attention(
        q, k, v, mask=_mask(mask, of_row), score_mod=score_mod, scale=scale,
        positions=_folded(positions, K), layout="any", sink_tokens=sink_tokens,
        segments=None if segments is None else _folded(segments, K), logit_cap=logit_cap,
        return_lse=True, softmax_dtype=softmax_dtype, impl=impl,
    )
    o, lse = o.reshape(B, K, R, v.shape[-1]), lse.reshape(B, K, R)
    if sink_logits is not None:
        o, lse = _with_sinks(o, lse, _by_head(sink_logits.astype(lse.dtype), heads))
    return (o, lse) if return_lse else o


@dataclasses.dataclass(frozen=True)
class _OfRow:
    """What is known of row ``q_index`` of the folded batch ``b K + kappa``.

    Args:
        B, K, R, N: of the call. heads: ``[B K, R]``, or None where each group is one head.
        index: ``[B K, R]`` or None.
    """

    B: int
    K: int
    R: int
    N: int
    heads: jax.Array | None
    index: jax.Array | None

    @staticmethod
    def of(heads, index, N: int) -> _OfRow:
        B, K, R = heads.shape
        heads, index = (
            None if x is None else jnp.asarray(x, jnp.int32).reshape(-1, R)
            for x in (None if N == K else heads, index)
        )
        return _OfRow(B, K, R, N, heads, index)

    def mod(self, mod: Mod, score_dtype: str | None = None) -> Mod:
        """``mod``, of B rows and N heads, as a function of pairs of the folded call."""
        mod.bound(self.B, self.N)  # raises where it is bound to others

        def pair(head, q_pos, k_pos, *, batch, q_index, k_index, q_segment, k_segment, score=None):
            head = batch % self.K if self.heads is None else self.heads[batch, q_index]
            known = dict(
                score=score, q_pos=q_pos, k_pos=k_pos, k_index=k_index, q_segment=q_segment,
                k_segment=k_segment, head=head if mod.heads is None else mod.heads[head],
                batch=batch // self.K if mod.batch is None else mod.batch[batch // self.K],
                q_index=q_index if self.index is None else self.index[batch, q_index],
            )
            return mod.of_pair(*(known[name] for name in mod.program.inputs))

        def scored(score, head, q_pos, k_pos, *, batch, q_index, k_index, q_segment, k_segment):
            return pair(
                head, q_pos, k_pos, batch=batch, q_index=q_index, k_index=k_index,
                q_segment=q_segment, k_segment=k_segment, score=score,
            )

        function = pair if score_dtype is None else scored
        function.__name__ = mod.program.name
        return Mod.of(function, score_dtype=score_dtype)


def _mask(mask: Any, of_row: _OfRow) -> Mask:
    """The mask of the folded call."""
    if mask is None:
        return Causal()
    mask = masked(mask)
    match mask:
        case And() | Or():
            return type(mask)(*(_mask(x, of_row) for x in (mask.left, mask.right)))
        case Full() | Causal() | Window() | Segments() | SinkTokens():
            return mask
        case Prefix():
            mask.check(of_row.B, of_row.N, of_row.R)
            length = jnp.asarray(mask.length).reshape(-1)
            return Prefix(jnp.repeat(length, of_row.K) if length.size > 1 else mask.length)
        case MaskMod():
            return MaskMod(of_row.mod(mask.mod))
        case Blocks():
            rule = "its lists are of blocks of tokens, and rows are any tokens and heads"
        case Wrapped():
            rule = "its lists speak of tokens, and rows are any tokens and heads"
        case _:
            rule = "rows take the masks of attnlab.core.mask and functions of a pair"
    raise ConfigError(
        f"mask is a {type(mask).__name__}", rule,
        "use masks of positions and segments, or a function of a pair",
    )


def _by_head(logits: jax.Array, heads) -> jax.Array:
    """``logits[heads]``, ``[B, K, R]``. A choice among G: its gradient sums in a fixed order."""
    K = heads.shape[1]
    logits = logits.reshape(K, 1, -1)
    G = logits.shape[-1]
    wanted = (heads - G * np.arange(K)[:, None])[..., None] == np.arange(G)
    return jnp.where(wanted, logits, 0).sum(-1)


def _with_sinks(o, lse, sink) -> tuple[jax.Array, jax.Array]:
    """``(o, lse)`` with one more key of value 0 and logit ``sink`` in the sum of each row."""
    empty = lse == -jnp.inf
    z = jnp.where(empty, 0, lse)
    share = jnp.where(empty, 0, jax.nn.sigmoid(z - sink))
    total = z + jax.nn.softplus(sink - z)
    alone = jnp.where(sink > -jnp.inf, sink, -jnp.inf)  # no sink: no gradient
    return (o * share[..., None]).astype(o.dtype), jnp.where(empty, alone, total)


def _folded(sides, K: int) -> tuple[jax.Array, jax.Array]:
    rows, keys = sides
    B, S = keys.shape
    keys = jnp.broadcast_to(keys[:, None], (B, K, S)).reshape(B * K, S)
    return rows.reshape(B * K, -1), keys


def _check_sides(name: str, sides, rows: tuple[int, ...], keys: tuple[int, ...]) -> None:
    if not isinstance(sides, tuple) or len(sides) != 2:
        raise ConfigError(
            f"{name} is a {type(sides).__name__}", "rows and keys have their own",
            f"pass {name}=(of the rows [B, K, R], of the keys [B, S])",
        )
    for side, x, shape in zip(("row", "key"), sides, (rows, keys)):
        _check(f"{side} {name}", x, shape)


def _check(name: str, x, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}", f"must be {shape}", "one entry a row or key"
        )
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise DtypeError(f"{name} has dtype {x.dtype}", "must be int32", "cast it")


def _check_heads(heads, G: int) -> None:
    if isinstance(heads, jax.core.Tracer):
        return
    found = np.asarray(heads)
    wrong = np.argwhere(found // G != np.arange(found.shape[1])[:, None])
    if len(wrong):
        b, kappa, r = wrong[0].tolist()
        raise ConfigError(
            f"heads[{b}, {kappa}, {r}] = {found[b, kappa, r]}",
            f"the heads of group {kappa} are {kappa * G} to {kappa * G + G - 1}",
            "put the row where the keys of its head are, padding rows too",
        )


def _shapes(q, k, v, N: int) -> tuple[int, int, int, int]:
    fits = q.ndim == k.ndim == v.ndim == 4
    if fits:
        (B, K, R, H), S = q.shape, k.shape[1]
        fits = k.shape == (B, S, K, H) and v.shape[:3] == (B, S, K)
    if not fits:
        raise ShapeError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            "must be [B, K, R, H], [B, S, K, H], [B, S, K, V]",
            "the rows of a key/value head stand together; packed_rows makes them",
        )
    if not isinstance(N, int | np.integer) or N < 1 or N % K:
        raise ShapeError(
            f"num_heads = {N} over K = {K} key/value heads", "must be a multiple of K",
            "query head n uses key/value head n // (N/K)",
        )
    return B, K, R, S
