"""Rows for ``attention_rows``: which heads and tokens each row stands for, there and back.

Each head takes part in some tokens. The (token, head) pairs of a key/value group become its rows,
tokens first, then heads, so that positions ascend and the tiles of a causal mask stay a triangle::

    rows = pack_rows(selected, K)                              # which head takes part where
    o = attention_rows(
        rows.take(q), k, v, num_heads=N, **rows.keywords(positions, segments)
    )
    o = rows.put(o)                                            # [B, T, N, V], zero where not taken

The place of a pair is the number of pairs before it, a cumulative sum: no sort, and no pair is
dropped, since the room is that of the worst case. ``take`` and ``put`` are each other's transpose,
so both are gathers, and so are their gradients.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.core.errors import ConfigError, DtypeError, ShapeError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of every key/value group, and where each (token, head) pair stands among them.

    Args:
        heads, tokens: int32 ``[B, K, R]``. Padding repeats the last row, to keep tiles narrow.
        used: bool ``[B, K, R]``, false for padding, which comes last.
        places: int32 ``[B, T, N]``, the row of each pair in its group; -1: it is not taken.
        every: all pairs are taken, row ``t G + g`` of a group is token t of its head g. Then
            ``take`` and ``put`` are transpositions.
    """

    heads: jax.Array
    tokens: jax.Array
    used: jax.Array
    places: jax.Array
    every: bool = dataclasses.field(default=False, metadata={"static": True})

    def keywords(
        self, positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None,
        keys: tuple[jax.Array, jax.Array | None] | None = None,
    ) -> dict[str, Any]:
        """``heads, index, positions, segments`` of ``attention_rows``.

        Args:
            positions, segments: of the tokens; ``segments=None``: one document, no padding.
            keys: positions and segments ``[B, S]`` of the keys, where they are not the tokens.
        """
        k_positions, k_segments = (positions, segments) if keys is None else keys
        if (segments is None) != (k_segments is None):
            raise ConfigError(
                f"segments of the {'queries' if segments is None else 'keys'} = None",
                "both sides have segments, or none has", "pass those of both",
            )
        B, T, _ = self.places.shape
        for name, x in (("positions", positions), ("segments", segments)):
            if x is not None and x.shape != (B, T):
                raise ShapeError(
                    f"{name} has shape {tuple(x.shape)}", f"must be [B, T] = ({B}, {T})",
                    "one entry a token",
                )

        def of_rows(x):
            return jax.vmap(lambda x, tokens: x[tokens])(x, self.tokens)

        sides = None
        if segments is not None and k_segments is not None:
            sides = jnp.where(self.used, of_rows(segments), 0), k_segments
        elif not self.every:
            sides = self.used.astype(jnp.int32), jnp.ones(k_positions.shape, jnp.int32)
        return dict(
            heads=self.heads, index=self.tokens, positions=(of_rows(positions), k_positions),
            segments=sides,
        )

    def take(self, x: jax.Array) -> jax.Array:
        """``[B, K, R, ...]``: the rows of ``x[B, T, N, ...]``, zero for padding."""
        if x.shape[:3] != self.places.shape:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}", f"must start with {tuple(self.places.shape)}",
                "give an entry to every token and head",
            )
        if self.every:
            B, K, R = self.heads.shape
            x = x.reshape(B, x.shape[1], K, -1, *x.shape[3:])
            return x.swapaxes(1, 2).reshape(B, K, R, *x.shape[4:])
        return _take(x, self)

    def put(self, y: jax.Array) -> jax.Array:
        """``[B, T, N, ...]``: the rows ``y[B, K, R, ...]`` in their places, zero elsewhere."""
        if y.shape[:3] != self.heads.shape:
            raise ShapeError(
                f"y has shape {tuple(y.shape)}", f"must start with {tuple(self.heads.shape)}",
                "give an entry to every row",
            )
        if self.every:
            B, T, N = self.places.shape
            y = y.reshape(B, y.shape[1], T, -1, *y.shape[3:])
            return y.swapaxes(1, 2).reshape(B, T, N, *y.shape[4:])
        return _put(y, self)


def pack_rows(selected: Bool[Array, "B N T"], K: int, capacity: int | None = None) -> Rows:
    """The rows of the pairs that are ``selected``.

    Args:
        selected: whether head n takes part in token t.
        K: key/value heads; head n belongs to group ``n // (N / K)``.
        capacity: R, rows of a group. Default: ``T N / K``, room for all pairs. Less is taken where
            the values of ``selected`` are known and fit; traced, they might not.

    Raises:
        ShapeError, DtypeError, ConfigError: on bad arguments, a capacity that might not suffice
            included.
    """
    B, N, T = _shape(selected, "selected", "B, N, T", jnp.bool_)
    _check_groups(N, K)
    most = T * (N // K)
    if capacity is not None and capacity < most and not isinstance(selected, jax.core.Tracer):
        most = int(np.asarray(selected).reshape(B, K, -1).sum(-1).max(initial=1))
    return _packed(jnp.asarray(selected), K, _room(capacity, most))


def pack_tokens(
    tokens: Int[Array, "B N J"], T: int, K: int, capacity: int | None = None
) -> Rows:
    """The rows of the tokens that each head lists, in ascending order of tokens.

    Args:
        tokens: at most J tokens of ``0 .. T - 1`` a head; other entries are empty, and a token that
            a head lists twice is taken once.
        K: key/value heads. capacity: R; default and least ``J N / K``, room for all entries.

    Raises:
        ShapeError, DtypeError, ConfigError: on bad arguments.
    """
    _, N, J = _shape(tokens, "tokens", "B, N, J", jnp.integer)
    _check_groups(N, K)
    at = jnp.where(tokens < 0, T, tokens)  # negative numbers would count from the end
    none = jnp.zeros((T,), bool)
    selected = jax.vmap(jax.vmap(lambda at: none.at[at].set(True, mode="drop")))(at)
    return _packed(selected, K, _room(capacity, min(J, T) * (N // K)))


def every_row(B: int, T: int, N: int, K: int) -> Rows:
    """All heads of all tokens, ``R = T N / K``: grouped-query attention with packed rows."""
    _check_groups(N, K)
    G = N // K
    row = jnp.arange(T * G, dtype=jnp.int32)
    first = G * jnp.arange(K, dtype=jnp.int32)[:, None]
    heads, tokens = (jnp.broadcast_to(x, (B, K, T * G)) for x in (first + row % G, row // G))
    places = G * jnp.arange(T, dtype=jnp.int32)[:, None] + jnp.arange(N, dtype=jnp.int32) % G
    used = jnp.ones((B, K, T * G), bool)
    return Rows(heads, tokens, used, jnp.broadcast_to(places, (B, T, N)), every=True)


def _packed(selected: jax.Array, K: int, R: int) -> Rows:
    B, N, T = selected.shape
    G = N // K
    pairs = selected.reshape(B, K, G, T).swapaxes(2, 3).reshape(B, K, T * G)
    count = jnp.cumsum(pairs, -1, dtype=jnp.int32)
    number = jnp.arange(T * G, dtype=jnp.int32)

    def of_group(pairs, count):
        # Pairs that are not taken have places of their own behind the last row, which are dropped.
        place = jnp.where(pairs, count - 1, R + number)
        at = jnp.zeros((R,), jnp.int32).at[place].set(number, mode="drop", unique_indices=True)
        used = jnp.arange(R) < count[-1]
        return jnp.where(used, at, jnp.where(pairs, number, 0).max()), used

    at, used = jax.vmap(jax.vmap(of_group))(pairs, count)
    places = jnp.where(pairs, count - 1, -1).reshape(B, K, T, G).swapaxes(1, 2).reshape(B, T, N)
    first = G * jnp.arange(K, dtype=jnp.int32)[:, None]
    return Rows(first + at % G, at // G, used, places)


@jax.custom_vjp
def _take(x, rows: Rows):
    B, T, N, *rest = x.shape
    flat = (rows.tokens * N + rows.heads).reshape(B, -1)
    out = jax.vmap(lambda x, at: x[at])(x.reshape(B, T * N, *rest), flat)
    return _where(rows.used, out.reshape(*rows.used.shape, *rest))


@jax.custom_vjp
def _put(y, rows: Rows):
    B, K, R, *rest = y.shape
    _, T, N = rows.places.shape
    flat = np.arange(N) // (N // K) * R + jnp.maximum(rows.places, 0)
    out = jax.vmap(lambda y, at: y[at])(y.reshape(B, K * R, *rest), flat.reshape(B, -1))
    return _where(rows.places >= 0, out.reshape(B, T, N, *rest))


_take.defvjp(lambda x, rows: (_take(x, rows), rows), lambda rows, dy: (_put(dy, rows), None))
_put.defvjp(lambda y, rows: (_put(y, rows), rows), lambda rows, dx: (_take(dx, rows), None))


def _where(taken: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(taken.reshape(*taken.shape, *[1] * (x.ndim - taken.ndim)), x, 0)


def _room(capacity: int | None, most: int) -> int:
    if capacity is None:
        return most
    if capacity < most:
        raise ConfigError(
            f"capacity = {capacity} rows a group", f"up to {most} pairs may be taken, none is lost",
            f"use at least {most}, or list at most J tokens a head with pack_tokens",
        )
    return capacity


def _check_groups(N: int, K: int) -> None:
    if K < 1 or N % K:
        raise ShapeError(
            f"N = {N} query heads over K = {K} key/value heads", "N must be a multiple of K",
            "query head n uses key/value head n // (N/K)",
        )


def _shape(x, name: str, axes: str, kind: Any) -> tuple[int, ...]:
    if x.ndim != 3 or 0 in x.shape:
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}", f"must be [{axes}], none of them 0",
            "one entry a row of the batch and query head",
        )
    if not (x.dtype == kind if kind == jnp.bool_ else jnp.issubdtype(x.dtype, kind)):
        raise DtypeError(
            f"{name} has dtype {x.dtype}", f"must be {'bool' if kind == jnp.bool_ else 'int32'}",
            "pass selected [B, N, T] to pack_rows and tokens [B, N, J] to pack_tokens",
        )
    return x.shape
