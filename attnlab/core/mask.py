"""Structured attention masks: small values that compose with ``&`` and ``|``.

A mask is a function of the coordinates of queries and keys (position, segment, array index), never
a ``T x S`` array, so the same value serves a full pass, a chunk of it, a cache and a shard. Every
implementation applies it in the same way: ``sees`` on a pair (``visible`` on a tile), and on the
bounds of a tile ``maybe`` to skip tiles that hold no visible pair and ``surely`` to leave the mask
out where every pair is visible.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from attnlab.core.errors import ConfigError, DtypeError, ShapeError
from attnlab.core.mods import Mod

STATIC = {"static": True}  # a field fixed at trace time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coords:
    """Coordinates of one side of a tile.

    Args:
        positions: int32 ``[B, T]``. segments: int32 ``[B, T]`` or None.
        index: int32 ``[T]``, the array index of each token (what block lists refer to).
    """

    positions: jax.Array
    segments: jax.Array | None
    index: jax.Array

    def bounds(self) -> Bounds:
        """The smallest box that holds these coordinates, over the whole batch."""
        segments = self.segments
        return Bounds(
            self.positions.min(),
            self.positions.max(),
            None if segments is None else segments.min(),
            None if segments is None else segments.max(),
            self.index.min(),
            self.index.max(),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """Scalar bounds of a tile's coordinates, all inclusive: positions, segments, array index."""

    first: Any
    last: Any
    segment_min: Any
    segment_max: Any
    index_min: Any
    index_max: Any


@dataclasses.dataclass(frozen=True)
class Pair:
    """One (query, key) pair of a row and head, or arrays of them that broadcast."""

    batch: Any
    head: Any
    q_pos: Any
    k_pos: Any
    q_index: Any
    k_index: Any
    q_segment: Any
    k_segment: Any

    @property
    def distance(self) -> Any:
        """Query position minus key position."""
        return self.q_pos - self.k_pos


class Mask:
    """Base of all masks. ``a & b``: both allow it; ``a | b``: one of them does. Functions of a pair
    compose with masks too."""

    def __and__(self, other: Mask | Callable[..., Any]) -> Mask:
        return And(self, masked(other))

    def __rand__(self, other: Callable[..., Any]) -> Mask:
        return And(masked(other), self)

    def __or__(self, other: Mask | Callable[..., Any]) -> Mask:
        return Or(self, masked(other))

    def __ror__(self, other: Callable[..., Any]) -> Mask:
        return Or(masked(other), self)

    def sees(self, pair: Pair) -> Any:
        """Whether the query of each pair sees its key."""
        raise NotImplementedError(f"{type(self).__name__}.sees")

    def visible(self, q: Coords, k: Coords) -> jax.Array:
        """Bool array that broadcasts to ``[B, N, T, S]``."""

        def row(x):
            return None if x is None else x[..., None, :, None]

        def column(x):
            return None if x is None else x[..., None, None, :]

        batch = jnp.arange(q.positions.shape[0])[:, None, None, None]
        return self.sees(
            Pair(
                batch, None, row(q.positions), column(k.positions), row(q.index[None]),
                column(k.index[None]), row(q.segments), column(k.segments),
            )
        )

    def maybe(self, q: Bounds, k: Bounds) -> Any:
        """False only if no pair of the two boxes is visible."""
        return True

    def surely(self, q: Bounds, k: Bounds) -> Any:
        """True only if every pair of the two boxes is visible."""
        return False

    def bound(self, B: int, N: int) -> Mask:
        """This mask for ``B`` rows and ``N`` heads, where it asks for their numbers."""
        return self

    def check(self, B: int, N: int, T: int) -> None:
        """Raise ShapeError unless the arrays of the mask fit ``T`` queries of B rows, N heads."""

    def specs(self, batch: tuple[str, ...], heads: tuple[str, ...]) -> Mask:
        """This mask with the partition of every array in its place (mesh axes of rows, heads)."""
        return self


class Wrapped(Mask):
    """A mask that is its ``inner`` mask, with something known of it besides (``Planned``)."""

    inner: Mask

    def sees(self, pair):
        return self.inner.sees(pair)

    def visible(self, q, k):
        return self.inner.visible(q, k)

    def maybe(self, q, k):
        return self.inner.maybe(q, k)

    def surely(self, q, k):
        return self.inner.surely(q, k)

    def find(self, block_q: int, block_k: int, layout: str, transposed: bool) -> Any:
        """What is known of its tiles of these sizes, or None."""
        return None


def _require(condition, what: str, rule: str, fix: str) -> None:
    if not condition:
        raise ConfigError(what, rule, fix)


@dataclasses.dataclass(frozen=True)
class _Pair(Mask):
    left: Mask
    right: Mask

    def check(self, B, N, T):
        self.left.check(B, N, T)
        self.right.check(B, N, T)

    def bound(self, B, N):
        return type(self)(self.left.bound(B, N), self.right.bound(B, N))

    def specs(self, batch, heads):
        return type(self)(self.left.specs(batch, heads), self.right.specs(batch, heads))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class And(_Pair):
    def sees(self, pair):
        return self.left.sees(pair) & self.right.sees(pair)

    def visible(self, q, k):
        return self.left.visible(q, k) & self.right.visible(q, k)

    def maybe(self, q, k):
        return _and(self.left.maybe(q, k), self.right.maybe(q, k))

    def surely(self, q, k):
        return _and(self.left.surely(q, k), self.right.surely(q, k))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Or(_Pair):
    def sees(self, pair):
        return self.left.sees(pair) | self.right.sees(pair)

    def visible(self, q, k):
        return self.left.visible(q, k) | self.right.visible(q, k)

    def maybe(self, q, k):
        return _or(self.left.maybe(q, k), self.right.maybe(q, k))

    def surely(self, q, k):
        return _or(self.left.surely(q, k), self.right.surely(q, k))


# Bounds are NumPy on the host (static lists) or traced; Python truth values serve both.


def _and(a, b):
    if isinstance(a, bool):
        return b if a else False
    return _and(b, a) if isinstance(b, bool) else a & b


def _or(a, b):
    if isinstance(a, bool):
        return True if a else b
    return _or(b, a) if isinstance(b, bool) else a | b


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every key is visible."""

    def sees(self, pair):
        return (pair.q_index >= 0) & (pair.k_index >= 0)

    def surely(self, q, k):
        return True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Keys at the query's position or before."""

    def sees(self, pair):
        return pair.distance >= 0

    def maybe(self, q, k):
        return k.first <= q.last

    def surely(self, q, k):
        return k.last <= q.first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """The last ``size`` keys, the query's own included, and at most ``ahead`` keys after it.

    ``ahead=None`` sets no limit in front: compose with ``Causal()``.
    """

    size: int = dataclasses.field(metadata=STATIC)
    ahead: int | None = dataclasses.field(default=None, metadata=STATIC)

    def __post_init__(self):
        _require(
            isinstance(self.size, int | np.integer) and self.size >= 1,
            f"window = {self.size}",
            "counts the visible keys including the query itself, so it is at least 1",
            "use window=None for no window",
        )
        _require(
            self.ahead is None or self.ahead >= 0,
            f"ahead = {self.ahead}",
            "counts the visible keys after the query",
            "use 0 for none and None for no limit",
        )

    def sees(self, pair):
        seen = pair.distance < self.size
        return seen if self.ahead is None else seen & (pair.distance >= -self.ahead)

    def maybe(self, q, k):
        near = q.first - k.last < self.size
        return near if self.ahead is None else near & (k.first - q.last <= self.ahead)

    def surely(self, q, k):
        near = q.last - k.first < self.size
        return near if self.ahead is None else near & (k.last - q.first <= self.ahead)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments(Mask):
    """Keys of the query's own segment; segment 0 is padding and sees nothing."""

    def sees(self, pair):
        a, b = self._both(pair.q_segment, pair.k_segment)
        return (a == b) & (a > 0)

    def maybe(self, q, k):
        self._both(q.segment_max, k.segment_max)
        overlap = (q.segment_max >= k.segment_min) & (q.segment_min <= k.segment_max)
        return overlap & (q.segment_max > 0) & (k.segment_max > 0)

    def surely(self, q, k):
        self._both(q.segment_max, k.segment_max)
        same = (q.segment_min == k.segment_max) & (q.segment_max == k.segment_min)
        return same & (q.segment_min == q.segment_max) & (q.segment_min > 0)

    def _both(self, q, k) -> tuple[jax.Array, jax.Array]:
        if q is None or k is None:
            raise ConfigError(
                "segments = None",
                "the mask Segments() needs the segment of every query and key",
                "pass segments= to the op or leave the mask out",
            )
        return q, k


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """Keys at positions below ``length`` (an integer or int32 ``[B]``), in front or behind.

    A prefix language model is ``Causal() | Prefix(length)``.
    """

    length: Any

    def sees(self, pair):
        length = jnp.asarray(self.length).reshape(-1)
        return pair.k_pos < (length[pair.batch] if length.size > 1 else length[0])

    def maybe(self, q, k):
        return k.first < jnp.max(jnp.asarray(self.length))

    def surely(self, q, k):
        return k.last < jnp.min(jnp.asarray(self.length))

    def check(self, B, N, T):
        shape = jnp.shape(self.length)
        if shape not in ((), (1,), (B,)):
            raise ShapeError(
                f"Prefix.length has shape {shape}", f"must be a number or [B] = ({B},)",
                "give one length, or one a row",
            )

    def specs(self, batch, heads):
        return Prefix(P(batch) if jnp.size(self.length) > 1 else P())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SinkTokens(Mask):
    """The first ``count`` tokens of the document, never in front of the query."""

    count: int = dataclasses.field(metadata=STATIC)

    def __post_init__(self):
        _require(self.count >= 0, f"sink_tokens = {self.count}", "is a count", "use 0 for none")

    def sees(self, pair):
        return (pair.k_pos < self.count) & (pair.distance >= 0)

    def maybe(self, q, k):
        return (k.first < self.count) & (k.first <= q.last)

    def surely(self, q, k):
        return (k.last < self.count) & (k.last <= q.first)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks(Mask):
    """Explicit block lists: query block ``i`` sees the key blocks ``lists[b, n, i, :]``.

    Args:
        lists: int32 ``[B or 1, N or 1, T/block_q, M]``; entries below 0 are empty.
        block_q, block_k: tokens in a block, counted by array index.
    """

    lists: jax.Array
    block_q: int = dataclasses.field(metadata=STATIC)
    block_k: int = dataclasses.field(metadata=STATIC)

    def __post_init__(self):
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            _require(size >= 1, f"{name} = {size}", "counts the tokens of a block", "use 1 or more")

    def sees(self, pair):
        row = self.lists
        row = row[pair.batch if row.shape[0] > 1 else 0, pair.head if row.shape[1] > 1 else 0]
        return (row[pair.q_index // self.block_q] == pair.k_index // self.block_k).any()

    def visible(self, q, k):
        rows = jnp.take(self.lists, q.index // self.block_q, axis=2)
        columns = k.index // self.block_k
        return (rows[..., None, :] == columns[:, None]).any(-1)

    def maybe(self, q, k):
        if np.ndim(q.index_min) or np.ndim(k.index_min):
            return True  # many tiles at once: looking all of them up costs R x C
        row = jnp.arange(self.lists.shape[2])[:, None]
        inside = (row >= q.index_min // self.block_q) & (row <= q.index_max // self.block_q)
        inside &= self.lists >= k.index_min // self.block_k
        return (inside & (self.lists <= k.index_max // self.block_k)).any()

    def check(self, B, N, T):
        if not jnp.issubdtype(jnp.asarray(self.lists).dtype, jnp.integer):
            raise DtypeError(
                f"Blocks.lists has dtype {jnp.asarray(self.lists).dtype}",
                "holds numbers of key blocks, so it is int32", "cast it",
            )
        shape, rows = jnp.shape(self.lists), -(-T // self.block_q)
        fits = len(shape) == 4 and shape[0] in (1, B) and shape[1] in (1, N) and shape[2] == rows
        if not fits:
            raise ShapeError(
                f"Blocks.lists has shape {shape}",
                f"must be [B or 1, N or 1, T/block_q, M] = [{B} or 1, {N} or 1, {rows}, M]",
                f"list the key blocks of every block of {self.block_q} queries",
            )

    def specs(self, batch, heads):
        rows, columns, *_ = self.lists.shape
        part = P(batch if rows > 1 else None, heads if columns > 1 else None)
        return dataclasses.replace(self, lists=part)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskMod(Mask):
    """Any traced ``mask_mod(head, q_pos, k_pos) -> bool``; see ``core.mods`` for what it may read.

    ``MaskMod.of(lambda head, q_pos, k_pos: (q_pos - k_pos) % 4 == 0)``. Arrays that it closes over
    get no gradient. Nothing is known of its tiles: compose it with structured masks where it can
    be, so that they skip what they rule out.
    """

    mod: Mod

    @staticmethod
    def of(function: Callable[..., Any]) -> MaskMod:
        return MaskMod(Mod.of(function))

    def sees(self, pair):
        known = {name: getattr(pair, name) for name in self.mod.program.inputs}
        for name, numbers in (("batch", self.mod.batch), ("head", self.mod.heads)):
            if numbers is not None and known.get(name) is not None:
                known[name] = numbers[known[name]]  # of a shard: those of the whole array
        return self.mod.of_pair(*(0 if x is None else x for x in known.values()))

    def visible(self, q, k):
        return self.mod.on_grid(q, k)

    def bound(self, B, N):
        return MaskMod(self.mod.bound(B, N))

    def specs(self, batch, heads):
        return MaskMod(self.mod.specs(P, batch, heads))


def masked(mask: Any) -> Mask:
    """A mask, or the mask of a function of a pair; ConfigError for anything else."""
    if isinstance(mask, Mask):
        return mask
    if not callable(mask):
        raise ConfigError(
            f"mask is a {type(mask).__name__}", "must be a mask or a function of a pair",
            "compose Causal(), Window(...), ... with & and |, or use "
            "lambda head, q_pos, k_pos: array[q_pos, k_pos]",
        )
    return MaskMod.of(mask)


def conjuncts(mask: Mask) -> list[Mask]:
    """The masks that ``mask`` joins with ``&``, left to right."""
    if isinstance(mask, Wrapped):
        return conjuncts(mask.inner)
    if isinstance(mask, And):
        return conjuncts(mask.left) + conjuncts(mask.right)
    return [mask]


def parts(mask: Mask) -> list[Mask]:
    """The masks that ``mask`` is composed of with ``&`` and ``|``."""
    if isinstance(mask, Wrapped):
        return parts(mask.inner)
    if isinstance(mask, And | Or):
        return parts(mask.left) + parts(mask.right)
    return [mask]


def same(a: Any, b: Any) -> bool:
    """Whether two masks are certainly one: alike in all that is static, with the very same arrays.

    The values of arrays may not be known. (jax's ``==`` of tree structures takes ``&`` for ``|``.)
    """
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return all(same(getattr(a, name), getattr(b, name)) for name in names)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, int) and a == b


def plain(mask: Mask) -> tuple[bool, int | None] | None:
    """``(causal, window)`` if the mask is only causal and window (segments aside), else None."""
    causal, window = False, None
    for part in conjuncts(mask):
        if isinstance(part, Causal):
            causal = True
        elif isinstance(part, Window) and part.ahead in (None, 0):
            causal |= part.ahead == 0
            window = part.size if window is None else min(window, part.size)
        elif not isinstance(part, Full | Segments):
            return None
    return causal, window
