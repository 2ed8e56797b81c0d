"""Block lists: which tiles of keys a tile of queries visits, and where the mask can be left out.

A tile is *full* (every pair visible: neither mask nor index arithmetic), *partial* (the mask
decides pair by pair) or absent. A row of tiles is stored as runs ``(first, count)`` of neighbouring
tiles of one kind, so a causal row of a million tokens takes two runs and nothing has the size
T x S. The backward pass over keys reads the transposed lists. Static masks give lists on the host
(constants of the program), data-dependent ones give lists on the device.

Where a row would need more runs than are stored, its last run covers the rest as partial tiles:
more tiles are visited, none is lost.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.core.errors import ConfigError
from attnlab.core.mask import (
    Blocks,
    Bounds,
    Causal,
    Coords,
    Full,
    Mask,
    MaskMod,
    Segments,
    Window,
    Wrapped,
    conjuncts,
    parts,
)

NONE, PARTIAL, FULL = 0, 1, 2
MOST_RUNS = 16  # stored for a row of tiles at least, where there are so many tiles
ROOM = 2**20  # runs stored for all rows of tiles, if that is more
SCOPE = "block_lists"  # name of what the device computes here, in profiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of tiles of one kind; leading axes are ``[B or 1, N or 1]``.

    Args:
        first, count: int32 ``[., ., E]``, first tile and number of tiles of a run.
        start, number: int32 ``[., ., R]``, where the runs of a row start, and how many.
        blocks: int32 ``[., ., R]``, tiles in all runs of a row.
    """

    first: Any
    count: Any
    start: Any
    number: Any
    blocks: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLists:
    """Full and partial tiles of every row of tiles.

    Forward lists have a row for each tile of ``block_q`` queries and list tiles of ``block_k``
    keys; transposed lists the other way round. ``table``: what ``work`` returns, where it was made
    beforehand.
    """

    full: Runs
    partial: Runs
    block_q: int = dataclasses.field(metadata={"static": True})
    block_k: int = dataclasses.field(metadata={"static": True})
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})
    table: Any = None

    @property
    def heads(self) -> int:
        """1 where all heads share the lists."""
        return self.full.first.shape[1]

    @property
    def rows(self) -> int:
        return self.full.start.shape[2]

    @jax.named_scope(SCOPE)
    def longest_first(self) -> jax.Array:
        """Rows by their number of tiles, so that the last programs to start are short: int32
        ``[R]``."""
        if self.table is not None:
            return self.table[0, 0, :, 0]
        return jnp.asarray(self._order(self._module()))

    @jax.named_scope(SCOPE)
    def work(self) -> jax.Array:
        """What a kernel must know of a row, in one place: int32 ``[., ., R, 10]``, rows in the
        order of ``longest_first``. Columns: row, tiles, then of the full and of the partial runs
        start, number, first and count of the first run."""
        if self.table is not None:
            return self.table
        xp = self._module()
        columns = [xp.arange(self.rows)[None, None], self.full.blocks + self.partial.blocks]
        for runs in (self.full, self.partial):
            at = xp.minimum(runs.start, runs.first.shape[-1] - 1)
            columns += [runs.start, runs.number]
            columns += [xp.take_along_axis(x, at, -1) for x in (runs.first, runs.count)]
        table = xp.stack(xp.broadcast_arrays(*columns), -1)
        return jnp.asarray(table[:, :, self._order(xp)].astype(np.int32))

    def with_table(self) -> BlockLists:
        """These lists with their ``table``."""
        return dataclasses.replace(self, table=self.work())

    def _module(self) -> Any:
        return np if isinstance(self.full.start, np.ndarray) else jnp

    def _order(self, xp: Any) -> Any:
        work = (self.full.blocks + self.partial.blocks).sum((0, 1))
        return xp.argsort(-work, stable=True).astype(np.int32)

    def kinds(self, columns: int) -> np.ndarray:
        """The dense matrix of kinds ``[., ., R, columns]``, for tests."""
        out = np.zeros((*self.full.start.shape, columns), np.int8)
        for runs, kind in ((self.full, FULL), (self.partial, PARTIAL)):
            first, count, start, number = map(
                np.asarray, (runs.first, runs.count, runs.start, runs.number)
            )
            for b, n, r in np.ndindex(start.shape):
                for e in range(start[b, n, r], start[b, n, r] + number[b, n, r]):
                    out[b, n, r, first[b, n, e] : first[b, n, e] + count[b, n, e]] += kind
        return out


def block_lists(
    mask: Mask, q: Coords, k: Coords, *, block_q: int, block_k: int, layout: str = "any",
    transposed: bool = False,
) -> BlockLists:
    """The lists of ``mask`` (bound to its rows and heads) for tiles of block_q x block_k tokens.

    With ``layout="full"`` and a mask without traced arrays they are NumPy arrays; else they are
    computed on the device. A ``Planned`` mask that holds the lists of these tiles gives those.

    Raises ConfigError for a ``Blocks`` mask (under ``&``) whose blocks the tiles do not divide.
    """
    if isinstance(mask, Wrapped):
        found = mask.find(block_q, block_k, layout, transposed)
        if found is not None:
            return found
    listed = [part for part in conjuncts(mask) if isinstance(part, Blocks)]
    rest: Mask = Full()
    for part in conjuncts(mask):
        if not listed or part is not listed[0]:
            rest = part if isinstance(rest, Full) else rest & part
    if listed and (listed[0].block_q % block_q or listed[0].block_k % block_k):
        raise ConfigError(
            f"Blocks of {listed[0].block_q} x {listed[0].block_k} tokens",
            f"must be multiples of the tiles of {block_q} x {block_k}",
            "use blocks that the tiles divide, or smaller tiles",
        )
    host = on_host(mask, layout)
    with jax.ensure_compile_time_eval() if host else jax.named_scope(SCOPE):
        rule = _Rule.of(rest, q, k, block_q, block_k, layout, host)
        if listed:
            full, partial = _from_lists(listed[0], rule, transposed)
        elif host:
            full, partial = _on_host(rule, transposed)
        else:
            full, partial = _on_device(rule, transposed)
    return BlockLists(full, partial, block_q, block_k, transposed)


def on_host(mask: Mask, layout: str) -> bool:
    """Whether the lists of these are made on the host, constants of the program."""
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mask))
    listed = any(isinstance(part, Blocks) for part in conjuncts(mask))
    return layout == "full" and not traced and not listed


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How the kind of a tile follows from mask and coordinates (Blocks lists set apart)."""

    mask: Mask
    q: Bounds  # leaves [B, R]
    k: Bounds  # leaves [B, C]
    coords: tuple[Coords, Coords]
    tiles: tuple[int, int]
    blocks: tuple[int, int]
    exact: bool  # the mask holds a MaskMod or Blocks: tiles are classified pair by pair

    @staticmethod
    def of(mask, q: Coords, k: Coords, block_q: int, block_k: int, layout: str, host: bool):
        sides = []
        for side in (q, k):
            T = side.index.shape[0]
            place = np.arange(T, dtype=np.int32)
            if layout == "full":
                side = Coords(place[None], None, place)  # type: ignore[arg-type]
            elif layout == "packed":  # inside a document, positions and places differ alike
                side = dataclasses.replace(side, index=place)  # type: ignore[arg-type]
            sides.append(side)
        by_place = layout == "packed" and not _reads_positions(mask)
        q_bounds, k_bounds = (
            _tile_bounds(s, b, by_place) for s, b in zip(sides, (block_q, block_k))
        )
        tiles = (-(-sides[0].index.shape[0] // block_q), -(-sides[1].index.shape[0] // block_k))
        exact = any(isinstance(part, MaskMod | Blocks) for part in parts(mask))
        return _Rule(
            mask, q_bounds, k_bounds, (sides[0], sides[1]), tiles, (block_q, block_k), exact
        )

    @property
    def length(self) -> tuple[int, int]:
        return self.coords[0].index.shape[0], self.coords[1].index.shape[0]

    def kinds(self, rows, columns, xp) -> Any:
        """Kinds of tiles ``(rows, columns)`` (indices that broadcast): ``[B, *]``."""

        def at(bounds, index):
            return jax.tree.map(lambda x: xp.asarray(x)[:, index], bounds)

        q, k = at(self.q, rows), at(self.k, columns)
        shape = np.broadcast_shapes(np.shape(rows), np.shape(columns))
        size = (self.q.first.shape[0], *shape)
        maybe = xp.broadcast_to(xp.asarray(self.mask.maybe(q, k)), size)
        surely = xp.broadcast_to(xp.asarray(self.mask.surely(q, k)), size)
        whole = (columns + 1) * self.blocks[1] <= self.length[1]
        return xp.where(maybe, xp.where(surely & whole, FULL, PARTIAL), NONE).astype(np.int8)

    def line(self, index, transposed: bool) -> Any:
        """Kinds of all tiles of one row (column, if transposed) of tiles: ``[B, N or 1, C]``."""
        others = jnp.arange(self.tiles[0 if transposed else 1])
        here = jnp.reshape(index, (1,))
        row, column = (others, here) if transposed else (here, others)
        if not self.exact:
            return self.kinds(row, column, jnp)[:, None]
        q, k = self.coords
        side, other = (k, q) if transposed else (q, k)
        size, each = self.blocks[::-1] if transposed else self.blocks
        strip = _strip(side, index, size)
        pad = -other.index.shape[0] % each
        wide = jax.tree.map(
            lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)], mode="edge"), other
        )
        pair = (wide, strip) if transposed else (strip, wide)
        seen = self.mask.visible(*pair)
        seen = seen.swapaxes(-1, -2) if transposed else seen
        seen = jnp.broadcast_to(seen, (*seen.shape[:2], size, wide.index.shape[0]))
        seen = seen.reshape(*seen.shape[:3], -1, each)
        whole = (column + 1) * self.blocks[1] <= self.length[1]
        all_seen = seen.all((2, 4)) & whole
        some = jnp.where(all_seen, FULL, PARTIAL)
        return jnp.where(seen.any((2, 4)), some, NONE).astype(jnp.int8)


def _strip(side: Coords, index, block: int) -> Coords:
    """Coordinates of tile ``index``; those past the end repeat the last token."""
    at = jnp.minimum(index * block + jnp.arange(block), side.index.shape[0] - 1)
    return jax.tree.map(lambda x: jnp.asarray(x)[..., at], side)


def _reads_positions(mask: Mask) -> bool:
    plain = Causal | Window | Segments | Full
    return not all(isinstance(part, plain) for part in parts(mask))


def _tile_bounds(side: Coords, block: int, by_place: bool) -> Bounds:
    positions = side.index[None] if by_place else side.positions
    segments = side.segments
    xp = np if isinstance(positions, np.ndarray) and segments is None else jnp

    def cut(x, how):
        pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)]
        tiles = xp.pad(x, pad, mode="edge")
        return how(tiles.reshape(*x.shape[:-1], -1, block), axis=-1)

    B = max(positions.shape[0], 1 if segments is None else segments.shape[0])
    low, high = xp.min, xp.max
    size = (B, -(-positions.shape[-1] // block))
    first, last = (xp.broadcast_to(cut(positions, f), size) for f in (low, high))
    seg = (None, None) if segments is None else (cut(segments, low), cut(segments, high))
    index = [cut(side.index[None], f) for f in (low, high)]
    index = [xp.broadcast_to(x, size) for x in index]
    return Bounds(first, last, seg[0], seg[1], index[0], index[1])


def _on_host(rule: _Rule, transposed: bool) -> tuple[Runs, Runs]:
    rows, columns = rule.tiles[::-1] if transposed else rule.tiles
    others = np.arange(columns)
    lines: dict[int, list[list[list[tuple[int, int]]]]] = {FULL: [], PARTIAL: []}
    for i in range(rows):
        if rule.exact:
            kinds = np.asarray(rule.line(i, transposed))
        else:
            here = np.asarray([i])
            kinds = rule.kinds(*((others, here) if transposed else (here, others)), np)[:, None]
        kinds = np.asarray(kinds)
        for kind in (FULL, PARTIAL):
            each = [_runs_of(kinds[b, n], kind) for b, n in np.ndindex(kinds.shape[:2])]
            lines[kind].append(each)
        lead = kinds.shape[:2]
    return _packed(lines[FULL], lead), _packed(lines[PARTIAL], lead)


def _runs_of(kinds: np.ndarray, kind: int) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], kinds == kind, [0]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), (edges[1::2] - edges[::2]).tolist()))


def _packed(lines, lead) -> Runs:
    """Runs from Python lists ``[row][batch * head]``."""
    flat = [[run for row in lines for run in row[i]] for i in range(len(lines[0]))]
    most = max(1, *(len(x) for x in flat))
    table = np.zeros((len(flat), most, 2), np.int32)
    for i, runs in enumerate(flat):
        table[i, : len(runs)] = np.asarray(runs, np.int32).reshape(-1, 2)
    number = np.asarray([[len(row[i]) for row in lines] for i in range(len(flat))], np.int32)
    blocks = np.asarray(
        [[sum(c for _, c in row[i]) for row in lines] for i in range(len(flat))], np.int32
    )
    start = np.cumsum(number, 1) - number
    return Runs(*(np.asarray(x, np.int32).reshape(*lead, -1)
                  for x in (table[..., 0], table[..., 1], start, number, blocks)))


def _on_device(rule: _Rule, transposed: bool) -> tuple[Runs, Runs]:
    rows, columns = rule.tiles[::-1] if transposed else rule.tiles
    most = min(columns, max(MOST_RUNS, ROOM // rows))

    def line(i):
        kinds = _bounded(rule.line(i, transposed), most)
        return tuple(_compact(kinds, kind, most) for kind in (FULL, PARTIAL))

    small = rows * columns * rule.q.first.shape[0] <= 2**22 and not rule.exact
    index = jnp.arange(rows)
    found = jax.vmap(line)(index) if small else lax.map(line, index)
    return tuple(_stack(*x, most) for x in found)  # type: ignore[return-value]


def _bounded(kinds, most: int):
    """``kinds[..., C]`` with at most ``most`` runs: what comes after becomes one partial run."""
    before = jnp.concatenate([jnp.zeros_like(kinds[..., :1]), kinds[..., :-1]], -1)
    run = jnp.cumsum((kinds != before) & (kinds != NONE), -1)
    place = jnp.arange(kinds.shape[-1])
    last = jnp.max(jnp.where(kinds != NONE, place, -1), -1, keepdims=True)
    over = (run >= most) & (run[..., -1:] > most)
    begun = over & ((kinds != NONE) | (jnp.cumsum(over & (kinds != NONE), -1) > 0))
    return jnp.where(begun & (place <= last), PARTIAL, kinds).astype(jnp.int8)


def _compact(kinds, kind: int, most: int):
    """``(first, count, number, blocks)`` of the runs of one kind in ``kinds[B, N, C]``."""
    here = kinds == kind
    new = here & ~jnp.concatenate([jnp.zeros_like(here[..., :1]), here[..., :-1]], -1)
    slot = jnp.cumsum(new, -1) - 1

    def one(here, new, slot):
        place = jnp.arange(here.shape[-1], dtype=jnp.int32)
        zero = jnp.zeros((most,), jnp.int32)
        first = zero.at[jnp.where(new, slot, most)].set(place, mode="drop")
        count = zero.at[jnp.where(here, slot, most)].add(1, mode="drop")
        return first, count, new.sum(dtype=jnp.int32), here.sum(dtype=jnp.int32)

    return jax.vmap(jax.vmap(one))(here, new, slot)


def _stack(first, count, number, blocks, most: int) -> Runs:
    """Runs from per-row tables ``[R, B, N, most]``."""
    rows, B, N, _ = first.shape
    first, count = (jnp.moveaxis(x, 0, 2).reshape(B, N, -1) for x in (first, count))
    number, blocks = (jnp.moveaxis(x, 0, 2) for x in (number, blocks))
    start = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32) * most, (B, N, rows))
    return Runs(first, count, start, number, blocks)


def _from_lists(listed: Blocks, rule: _Rule, transposed: bool) -> tuple[Runs, Runs]:
    """Runs of one tile each, straight from the lists; nothing of size R x C is made."""
    per_q, per_k = listed.block_q // rule.blocks[0], listed.block_k // rule.blocks[1]
    rows, columns = rule.tiles
    lists = jnp.sort(jnp.asarray(listed.lists), -1)
    again = lists[..., 1:] == lists[..., :-1]
    lists = lists.at[..., 1:].set(jnp.where(again, -1, lists[..., 1:]))
    lists = lists[..., None] * per_k + jnp.where(lists[..., None] < 0, 0, jnp.arange(per_k))
    lists = lists.reshape(*lists.shape[:3], -1)[:, :, jnp.arange(rows) // per_q]
    row = jnp.arange(rows)[:, None]

    def one(rule_batch, columns_of):
        inside = (columns_of >= 0) & (columns_of < columns)
        kinds = rule.kinds(row, jnp.clip(columns_of, 0, columns - 1), jnp)
        kinds = kinds[jnp.minimum(rule_batch, kinds.shape[0] - 1)]
        return jnp.where(inside, kinds, NONE)

    batch = max(lists.shape[0], rule.q.first.shape[0])
    lists = jnp.broadcast_to(lists, (batch, *lists.shape[1:]))
    kinds = jax.vmap(lambda b, x: jax.vmap(lambda y: one(b, y))(x))(jnp.arange(batch), lists)
    if transposed:
        return tuple(_transpose(kinds == kind, lists, columns) for kind in (FULL, PARTIAL))  # type: ignore[return-value]
    out = []
    for kind in (FULL, PARTIAL):
        here = kinds == kind
        order = jnp.argsort(~here, -1, stable=True)
        first = jnp.take_along_axis(lists, order, -1).astype(jnp.int32)
        number = here.sum(-1, dtype=jnp.int32)
        start = jnp.broadcast_to(
            jnp.arange(rows, dtype=jnp.int32) * lists.shape[-1], number.shape
        )
        flat = jnp.maximum(first, 0).reshape(*first.shape[:2], -1)
        out.append(Runs(flat, jnp.ones_like(flat), start, number, number))
    return out[0], out[1]


def _transpose(here, lists, columns: int) -> Runs:
    """Entries sorted by key tile: for each, the query tiles that list it, in ascending order."""
    B, N, rows, M = lists.shape
    key = jnp.where(here, lists, columns).reshape(B, N, rows * M)
    row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], (rows, M)).reshape(-1)
    key, row = lax.sort((key, jnp.broadcast_to(row, key.shape)), num_keys=1, is_stable=True)
    edge = jnp.arange(columns + 1)
    bounds = jax.vmap(jax.vmap(lambda x: jnp.searchsorted(x, edge).astype(jnp.int32)))(key)
    number = bounds[..., 1:] - bounds[..., :-1]
    return Runs(row, jnp.ones_like(row), bounds[..., :-1], number, number)
