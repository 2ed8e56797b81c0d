"""Decode caches: immutable pytrees whose slots remember the position and segment of their token.

A slot holds one real token. Padding (segment 0) is not written, so ragged prompts waste nothing and
``length[b]`` counts real tokens. An unwritten slot has segment 0, which no query sees: the mask of
a cached pass is the mask of training.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.core
import jax.numpy as jnp

from attnlab.core.errors import ShapeError, UnsupportedError
from attnlab.core.types import Seq


def segments_of(seq: Seq) -> jax.Array:
    """The segments of ``seq``; a single document without padding is segment 1."""
    return jnp.ones_like(seq.positions) if seq.segments is None else seq.segments


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows ``index[B, T]`` of each batch row of ``x[B, S, ...]``: ``[B, T, ...]``."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def moves(seq: Seq) -> bool:
    """Whether ``compact`` moves tokens."""
    return seq.segments is not None and seq.layout == "any" and seq.segments.shape[1] > 1


def compact(
    x: jax.Array, seq: Seq
) -> tuple[jax.Array, Seq, Callable[[jax.Array], jax.Array]]:
    """``x[B, T, ...]`` and ``seq`` with the real tokens of each row in front, and the way back.

    For mechanisms that read "the token before" (convolutions, recurrences): where padding stands
    left of a chunk or between tokens, that is not the neighbour in the array. After a stable move
    to the front it is, and the state a chunk leaves ends at its number of real tokens. Moves
    nothing where the layout promises order or there is no padding. Moved tokens have no plans.
    """
    if seq.segments is None or not moves(seq):
        return x, seq, lambda y: y
    order = jnp.argsort(seq.segments == 0, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    positions, segments = (take_rows(x, order) for x in (seq.positions, seq.segments))
    moved = dataclasses.replace(seq, positions=positions, segments=segments, plans=None)
    return take_rows(x, order), moved, lambda y: take_rows(y, back)


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Base of caches that keep one entry a token.

    Subclasses add token fields ``[B, S, ...]`` (listed in ``TOKENS``) and may add per-row state.

    Args:
        positions, segments: int32 ``[B, S]`` of the cached tokens.
        length: int32 ``[B]``, tokens written so far.
    """

    positions: jax.Array
    segments: jax.Array
    length: jax.Array

    TOKENS: ClassVar[tuple[str, ...]] = ()
    AXES: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "positions": ("batch", None),
        "segments": ("batch", None),
        "length": ("batch",),
    }

    @property
    def capacity(self) -> int:
        return self.positions.shape[1]

    @classmethod
    def empty_index(cls, batch: int, capacity: int) -> dict[str, jax.Array]:
        """The fields of this base for an empty cache."""
        if capacity < 1 or batch < 1:
            raise ShapeError(
                f"cache of batch {batch} and capacity {capacity}",
                "both must be at least 1",
                "pass the longest prompt plus the tokens to generate as capacity",
            )
        return {
            "positions": jnp.zeros((batch, capacity), jnp.int32),
            "segments": jnp.zeros((batch, capacity), jnp.int32),
            "length": jnp.zeros((batch,), jnp.int32),
        }

    def write(self, seq: Seq, **values: jax.Array) -> Self:
        """Append the real tokens of ``seq``; ``values`` gives ``[B, T, ...]`` of every token field.

        Raises ShapeError if they do not fit. Under a trace only the static bound ``T <= capacity``
        can be checked; ``infer.generate`` checks the rest on the host before it starts.
        """
        batch, tokens = seq.positions.shape
        self.check_batch(batch)
        real = segments_of(seq) > 0
        total = self.length + real.sum(axis=1, dtype=jnp.int32)
        self._check_room(tokens, total)
        slot = self.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        slot = jnp.where(real, slot, self.capacity)  # out of range: padding is not written
        row = jnp.arange(batch)[:, None]
        values |= {"positions": seq.positions, "segments": segments_of(seq)}
        new: dict[str, Any] = {
            name: self._put(name, row, slot, value) for name, value in values.items()
        }
        return dataclasses.replace(self, length=total, **new)

    def _put(self, name: str, row: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
        """Field ``name`` with ``value[B, T, ...]`` at ``slot[B, T]``; slots past the end drop."""
        old = getattr(self, name)
        return old.at[row, slot].set(value.astype(old.dtype), mode="drop", unique_indices=False)

    def check_batch(self, batch: int) -> None:
        """Raise ShapeError unless the cache has this many rows."""
        if batch != self.positions.shape[0]:
            raise ShapeError(
                f"cache batch = {self.positions.shape[0]}", f"tokens have batch {batch}",
                "build the cache with the batch of the tokens",
            )

    def _check_room(self, tokens: int, total: jax.Array) -> None:
        longest = tokens if isinstance(total, jax.core.Tracer) else int(total.max())
        if longest > self.capacity:
            raise ShapeError(
                f"cache capacity = {self.capacity}",
                f"cannot hold {longest} tokens a row",
                f"init_cache with a capacity of at least {longest}",
            )

    def truncate(self, length: jax.Array | int) -> Self:
        """Forget every token after the first ``length`` (an integer or int32 ``[B]``) of a row."""
        if isinstance(length, numbers.Integral) and length < 0:
            raise ShapeError(f"length = {length}", "is a number of tokens", "use 0 to forget all")
        length = jnp.clip(jnp.asarray(length, jnp.int32), 0, self.length)
        keep = jnp.arange(self.capacity)[None, :] < length[:, None]
        return dataclasses.replace(self, length=length, segments=jnp.where(keep, self.segments, 0))


def refuse_truncate(name: str) -> UnsupportedError:
    """The error of caches whose running state cannot go back."""
    return UnsupportedError(
        f"{name}.truncate",
        "the cache carries a running state that cannot be rewound",
        "keep the cache from before the tokens you want to drop",
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(TokenCache):
    """Keys ``[B, S, K, H]`` (after position encoding) and values ``[B, S, K, V]``."""

    k: jax.Array
    v: jax.Array

    TOKENS: ClassVar[tuple[str, ...]] = ("k", "v")
    AXES: ClassVar[dict[str, tuple[str | None, ...]]] = TokenCache.AXES | {
        "k": ("batch", None, "kv_heads", None),
        "v": ("batch", None, "kv_heads", None),
    }

    @classmethod
    def empty(
        cls, batch: int, capacity: int, kv_heads: int, head: int, value: int, dtype
    ) -> KVCache:
        return cls(
            **cls.empty_index(batch, capacity),
            k=jnp.zeros((batch, capacity, kv_heads, head), dtype),
            v=jnp.zeros((batch, capacity, kv_heads, value), dtype),
        )

    def rows(self) -> tuple[jax.Array, jax.Array]:
        """``k[B, S, K, H]`` and ``v[B, S, K, V]``."""
        return self.k, self.v


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache(TokenCache):
    """Latents ``[B, S, R]`` after their norm, shared rotary keys ``[B, S, P]`` after RoPE."""

    latent: jax.Array
    k_rope: jax.Array

    TOKENS: ClassVar[tuple[str, ...]] = ("latent", "k_rope")
    AXES: ClassVar[dict[str, tuple[str | None, ...]]] = TokenCache.AXES | {
        "latent": ("batch", None, "latent"),
        "k_rope": ("batch", None, None),
    }

    @classmethod
    def empty(cls, batch: int, capacity: int, latent: int, rope: int, dtype) -> LatentCache:
        return cls(
            **cls.empty_index(batch, capacity),
            latent=jnp.zeros((batch, capacity, latent), dtype),
            k_rope=jnp.zeros((batch, capacity, rope), dtype),
        )
