"""Paged caches: rows of tokens cut into pages of one pool, and the host's list of free pages.

A pool ``[P, page, ...]`` holds the pieces of all rows; ``pages[b, i]`` says where tokens
``i page`` to ``(i + 1) page - 1`` of row ``b`` stand. A static table gives every row its own pages;
``PageTable`` hands them out as rows grow, so that the pool need only hold the tokens there are.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from attnlab.core.cache import TokenCache
from attnlab.core.errors import ConfigError, ShapeError


@dataclasses.dataclass(frozen=True)
class Paged:
    """The cache policy ``init_cache(..., policy=Paged(page=64))``.

    Args:
        page: tokens of a page. pool: pages in the pool, for tables handed out by ``PageTable``;
            None gives every row its own pages for the whole capacity.
    """

    page: int = 64
    pool: int | None = None

    def __post_init__(self):
        for name in ("page", "pool"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}", "is a count of at least 1", f"use {name}=64")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache(TokenCache):
    """Keys ``k[P, page, K, H]`` (after position encoding), values ``v[P, page, K, V]`` of all rows.

    Args:
        pages: int32 ``[B, M]``, the pages of each row in order, below 0 where none is assigned;
            ``capacity = M page``. A page that several rows share is never written: share only pages
            that are full.
    """

    k: jax.Array
    v: jax.Array
    pages: jax.Array

    TOKENS: ClassVar[tuple[str, ...]] = ("k", "v")
    AXES: ClassVar[dict[str, tuple[str | None, ...]]] = TokenCache.AXES | {
        "k": (None, None, "kv_heads", None),
        "v": (None, None, "kv_heads", None),
        "pages": ("batch", None),
    }

    @property
    def page(self) -> int:
        return self.k.shape[1]

    @classmethod
    def empty(
        cls, batch: int, capacity: int, kv_heads: int, head: int, value: int, dtype, policy: Paged
    ) -> PagedKVCache:
        """A cache of at least ``capacity`` tokens a row; the table is static unless pooled."""
        index = cls.empty_index(batch, -(-capacity // policy.page) * policy.page)
        each = index["positions"].shape[1] // policy.page
        shape = (policy.pool or batch * each, policy.page, kv_heads)
        pages = jnp.arange(batch * each, dtype=jnp.int32).reshape(batch, each)
        return cls(
            **index,
            k=jnp.zeros((*shape, head), dtype),
            v=jnp.zeros((*shape, value), dtype),
            pages=pages if policy.pool is None else jnp.full_like(pages, -1),
        )

    def rows(self) -> tuple[jax.Array, jax.Array]:
        """``k[B, S, K, H]`` and ``v[B, S, K, V]``, gathered; slots past the length hold anything
        finite."""
        table = jnp.clip(self.pages, 0, self.k.shape[0] - 1)
        return tuple(
            x[table].reshape(*self.positions.shape, *x.shape[2:]) for x in (self.k, self.v)
        )  # type: ignore[return-value]

    def _put(self, name: str, row: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
        if name not in self.TOKENS:
            return super()._put(name, row, slot, value)
        old, page = getattr(self, name), self.page
        at = jnp.take_along_axis(self.pages, jnp.minimum(slot // page, self.pages.shape[1] - 1), 1)
        at = jnp.where((slot < self.capacity) & (at >= 0), at, old.shape[0])
        return old.at[at, slot % page].set(value.astype(old.dtype), mode="drop")

    def _check_room(self, tokens: int, total: jax.Array) -> None:
        super()._check_room(tokens, total)
        if isinstance(total, jax.core.Tracer) or isinstance(self.pages, jax.core.Tracer):
            return
        table = np.asarray(self.pages)
        room = ((table >= 0) & (table < self.k.shape[0])).cumprod(1).sum(1) * self.page
        short = np.flatnonzero(room < np.asarray(total))
        if short.size:
            b = int(short[0])
            raise ShapeError(
                f"row {b} has pages for {room[b]} tokens", f"{int(total[b])} are to be cached",
                "assign pages first: PageTable.grow(row, tokens)",
            )


class PageTable:
    """Free pages of a pool, on the host.

    Args:
        batch: rows. pool: pages. page: tokens of a page. capacity: most tokens of a row.

    ``table`` is int32 ``[batch, M]`` with -1 where no page is assigned: put it in the cache with
    ``dataclasses.replace(cache, pages=jnp.asarray(pages.table))``.
    """

    def __init__(self, batch: int, pool: int, page: int, capacity: int):
        self.page = page
        self.table = np.full((batch, -(-capacity // page)), -1, np.int32)
        self.users = np.zeros(pool, int)
        self.free = list(range(pool - 1, -1, -1))

    def grow(self, row: int, tokens: int) -> None:
        """Assign pages until the row holds ``tokens``; raises ShapeError if they do not fit."""
        line = self.table[row]
        have, need = int((line >= 0).sum()), -(-tokens // self.page)
        if need > len(line) or need - have > len(self.free):
            raise ShapeError(
                f"row {row} with {tokens} tokens",
                f"needs {need} pages of {len(line)} at most, has {have}, and {len(self.free)} are "
                "free",
                "release rows, or build the cache with a larger pool or capacity",
            )
        for i in range(have, need):
            line[i] = self.free.pop()
            self.users[line[i]] = 1

    def share(self, row: int, source: int, tokens: int) -> None:
        """Let the empty ``row`` begin with the first ``tokens`` of ``source``: whole pages."""
        count = tokens // self.page
        if tokens % self.page or (self.table[row] >= 0).any() or self.table[source, count - 1] < 0:
            raise ShapeError(
                f"{tokens} tokens of row {source} for row {row}",
                f"shared are whole pages of {self.page} tokens that the source has, by a row "
                "without pages",
                "release the row, and share a multiple of the page",
            )
        self.table[row, :count] = self.table[source, :count]
        self.users[self.table[row, :count]] += 1

    def release(self, row: int) -> None:
        """Take back the pages of a row; those that others share stay theirs."""
        for at in self.table[row][self.table[row] >= 0]:
            self.users[at] -= 1
            if not self.users[at]:
                self.free.append(int(at))
        self.table[row] = -1
