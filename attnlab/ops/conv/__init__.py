"""Causal depthwise convolution, the short convolution of mixers: XLA, with state and segments.

    y, state = causal_conv(x, w)                       # a whole sequence
    y, state = causal_conv(x, w, state=state)          # the tokens after it
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.core.errors import ShapeError


class ConvState(NamedTuple):
    """The last ``k - 1`` real tokens of each row, oldest first.

    Args:
        rows: ``[B, k - 1, C]``. segments: int32 ``[B, k - 1]``, 0 where there was no token yet.
    """

    rows: jax.Array
    segments: jax.Array


def init_state(batch: int, width: int, channels: int, dtype=jnp.float32) -> ConvState:
    """The state before the first token, of a kernel of ``width`` taps."""
    shape = (batch, width - 1)
    return ConvState(jnp.zeros((*shape, channels), dtype), jnp.zeros(shape, jnp.int32))


def causal_conv(
    x: jax.Array, w: jax.Array, b: jax.Array | None = None, *,
    segments: jax.Array | None = None, state: ConvState | None = None,
) -> tuple[jax.Array, ConvState]:
    """``y[t] = b + sum_j w[j] x[t - (k - 1) + j]`` in every channel, and the state after it.

    A tap counts where its token is of the segment of ``t``; before the first token there are
    zeros. Padding (segment 0) gives ``b`` and is not kept in the state: real tokens of a row stand
    in front of it (``core.cache.compact``).

    Args:
        x: ``[B, T, C]``. w: ``[k, C]``, the last tap meets the token itself. b: ``[C]`` or None.
        segments: int32 ``[B, T]``, 0 for padding; None: all of segment 1.
        state: of the tokens before x; None: there are none.

    Returns:
        ``y[B, T, C]`` in the dtype of x, summed in float32 or wider, and the state, rows in the
        dtype of x.

    Raises:
        ShapeError: shapes that do not fit each other.
    """
    _check(x, w, b, segments, state)
    (B, T, C), k = x.shape, len(w)
    segments = jnp.ones((B, T), jnp.int32) if segments is None else segments
    before = init_state(B, k, C, x.dtype) if state is None else state
    rows = jnp.concatenate([before.rows.astype(x.dtype), x], 1)
    owners = jnp.concatenate([before.segments, segments], 1)
    wide = jnp.promote_types(jnp.promote_types(x.dtype, w.dtype), jnp.float32)
    y = jnp.zeros(x.shape, wide) if b is None else jnp.broadcast_to(b.astype(wide), x.shape)
    for j in range(k):
        same = (owners[:, j : j + T] == segments) & (segments > 0)
        y += w[j].astype(wide) * jnp.where(same[..., None], rows[:, j : j + T], 0)
    tokens = (segments > 0).sum(1)
    last = tokens[:, None] + jnp.arange(k - 1)
    kept = ConvState(
        jnp.take_along_axis(rows, last[..., None], 1), jnp.take_along_axis(owners, last, 1)
    )
    return y.astype(x.dtype), kept


def _check(x, w, b, segments, state) -> None:
    def require(good: bool, what: str, got, rule: str, fix: str) -> None:
        if not good:
            raise ShapeError(f"{what} has shape {tuple(got)}", rule, fix)

    require(x.ndim == 3 and x.shape[1] > 0, "x", x.shape, "must be [B, T, C], T > 0", "add an axis")
    (B, T, C), k = x.shape, w.shape[0] if w.ndim else 0
    require(
        w.ndim == 2 and k > 0 and w.shape[1] == C, "w", w.shape, f"must be [k, {C}] for this x",
        "a kernel has a row of channels for each tap",
    )
    given = (
        ("b", b, (C,)), ("segments", segments, (B, T)),
        ("state.rows", state and state.rows, (B, k - 1, C)),
        ("state.segments", state and state.segments, (B, k - 1)),
    )
    for name, array, shape in given:
        require(
            array is None or tuple(array.shape) == shape, name, getattr(array, "shape", ()),
            f"must be {list(shape)} for this x and w", "init_state makes a state that fits",
        )
