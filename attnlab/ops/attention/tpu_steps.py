"""Step tables: the visited tiles of a kernel in order, one packed integer a step of the grid.

Block lists (``blocks.Runs``) say which tiles a row of tiles visits. A grid step needs one tile, and
its index maps may only read a few scalars, so the runs are written out: entry ``s`` holds the row
and the column of the tile and what happens there. Every row has at least one step (an empty row
still writes its zeros), and in the backward every column too. Steps past the end repeat the last
tile, so that they move no data and compute nothing.

========  =====  ==================================================
bits      name   meaning
========  =====  ==================================================
0, 1      kind   NONE, PARTIAL, FULL of ``blocks``
2, 3             first, last step of this row
4, 5             first, last step of this column (backward only)
6 to 18   col    column of the tile
19 to 30  row    row of the tile
========  =====  ==================================================

Tables live in scalar memory (1 MiB). Larger ones are cut: the forward by rows, the backward by
columns, and the kernel runs once for every part.
"""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.ops.attention.blocks import FULL, NONE, PARTIAL, BlockLists

FIRST, LAST, COLUMN_FIRST, COLUMN_LAST = 4, 8, 16, 32
FLAGS = 63  # all of these and the kind
COLUMN_AT, ROW_AT = 6, 19
MOST_COLUMNS, MOST_ROWS = 1 << (ROW_AT - COLUMN_AT), 1 << (31 - ROW_AT)
MOST_STEPS = 180_000  # entries of a table in scalar memory, beside what else is there


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """The tables of a kernel, one for each part of its work.

    Args:
        table: int32 ``[parts, leads * width]``, packed entries; a lead is a row of the batch and a
            head that has lists of its own. flush: the same shape, the column whose sums are
            written next, counted from the part's first (backward), or None. length: int32
            ``[parts]``, steps that the grid takes.
        batch, heads: numbers of leads. width: entries of a lead.
    """

    table: Any
    flush: Any
    length: Any
    batch: int = dataclasses.field(metadata={"static": True})
    heads: int = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})

    @property
    def parts(self) -> int:
        return self.table.shape[0]


def column_of(entry):
    return (entry >> COLUMN_AT) & (MOST_COLUMNS - 1)


def row_of(entry):
    return entry >> ROW_AT


def kind_of(entry):
    return entry & 3


def has(entry, flag):
    return (entry & flag) != 0


def forward_steps(lists: BlockLists, columns: int, listed: bool) -> Steps:
    """The tables of a forward kernel over ``columns`` tiles of keys.

    ``listed``: the lists come from a ``Blocks`` mask, whose rows have few tiles.
    """
    runs, host = _uniform(lists)
    batch, heads, rows, most, _ = runs.shape
    a_row = min(columns, most) if listed else columns
    each = min(rows, max(1, MOST_STEPS // (batch * heads * a_row)))
    parts = -(-rows // each)
    if host and _total(runs) * batch * heads <= MOST_STEPS:
        each, parts = rows, 1
    cut = [runs[:, :, i * each : (i + 1) * each] for i in range(parts)]
    lines = [
        _lines(part, columns, (0, columns), i * each, each * a_row, host, None)
        for i, part in enumerate(cut)
    ]
    return _stacked(lines, batch, heads, host)


def backward_steps(
    lists: BlockLists, columns: int, listed: bool, group: int, most_columns: int
) -> Steps:
    """The tables of a backward kernel: as forward, cut into parts of at most ``most_columns``.

    Where heads have lists of their own, a column is finished when the last of its ``group`` heads
    has visited it; else every head repeats the steps, and the kernel counts heads itself.
    """
    runs, host = _uniform(lists)
    batch, heads, rows, most, _ = runs.shape
    a_row = min(columns, most) if listed else columns
    each = min(columns, most_columns, max(1, MOST_STEPS // (2 * batch * heads * rows)))
    if host and 2 * _total(runs) * batch * heads <= MOST_STEPS:
        each = min(columns, most_columns)
    parts = -(-columns // each)
    each = -(-columns // parts)
    group = group if heads > 1 else 1
    runs = runs.reshape(batch, heads // group, group, rows, most, 3)
    lines = []
    for i in range(parts):
        here = (i * each, min((i + 1) * each, columns))
        width = rows * min(a_row, each) + each
        lines.append(_lines(runs, columns, here, 0, width, host, group))
    return _stacked(lines, batch, heads, host)


def part_columns(columns: int, steps: Steps) -> int:
    """Columns of every part of a backward's work but the last."""
    return -(-columns // steps.parts)


def _total(runs) -> int:
    """Steps of the longest lead, empty rows included."""
    rows = np.maximum(runs[..., 1].sum(-1), 1)
    return int(rows.sum(-1).max()) + int(runs.shape[2])


def _uniform(lists: BlockLists):
    """Runs ``[B, N, R, E, (first, count, kind)]`` of both kinds, and whether they are on the host.

    Each row has as many slots; those it does not need have count 0.
    """
    host = isinstance(lists.full.first, np.ndarray)
    tables = []
    for runs, kind in ((lists.full, FULL), (lists.partial, PARTIAL)):
        if host:
            slots = np.arange(max(1, int(runs.number.max())))
            at = np.minimum(runs.start[..., None] + slots, runs.first.shape[-1] - 1)
            flat = at.reshape(*at.shape[:2], -1)
            first, count = (
                np.take_along_axis(x, flat, -1).reshape(at.shape)
                for x in (runs.first, runs.count)
            )
        else:  # lists made on the device have as many slots in every row
            shape = (*runs.start.shape, runs.first.shape[-1] // runs.start.shape[-1])
            first, count = runs.first.reshape(shape), runs.count.reshape(shape)
            slots = jnp.arange(shape[-1])
        xp = np if host else jnp
        count = xp.where(slots < runs.number[..., None], count, 0)
        tables.append(xp.stack([first, count, xp.full_like(first, kind)], -1))
    xp = np if host else jnp
    lead = np.broadcast_shapes(*(x.shape[:3] for x in tables))
    tables = [xp.broadcast_to(x, (*lead, *x.shape[3:])) for x in tables]
    return xp.concatenate(tables, 3), host


def _lines(runs, columns: int, here, base: int, width: int, host: bool, group: int | None):
    """``(table, flush, length)`` with one line a lead; ``runs[..., R, E, 3]``."""
    xp: Any = np if host else jnp
    low, high = here
    first = xp.maximum(runs[..., 0], low)
    count = xp.maximum(xp.minimum(runs[..., 0] + runs[..., 1], high) - first, 0)
    kind = runs[..., 2]
    empty = count.sum(-1, keepdims=True) == 0
    first = xp.concatenate([first, xp.full_like(first[..., :1], low)], -1)
    count = xp.concatenate([count, empty.astype(count.dtype)], -1)
    kind = xp.concatenate([kind, xp.full_like(kind[..., :1], NONE)], -1)
    if group is None:
        flat = [x.reshape(-1, *x.shape[-2:]) for x in (first, count, kind)]
        return _each(lambda *x: _line(*x, None, low, base, width, xp), flat, host)
    flat = [x.reshape(-1, *x.shape[-3:]) for x in (first, count, kind)]
    return _each(lambda *x: _columns(*x, (low, high), width, xp), flat, host)


def _each(f, arrays, host: bool):
    """``f`` on every lead, with equal widths."""
    if not host:
        return jax.vmap(f)(*arrays)
    done = [f(*line) for line in zip(*arrays)]
    longest = max(line[0].shape[-1] for line in done)
    tables, flushes = (
        None if done[0][i] is None else np.stack([_longer(x[i], longest, i == 0) for x in done])
        for i in (0, 1)
    )
    return tables, flushes, np.asarray([line[2] for line in done])


def _longer(x, width: int, table: bool):
    """``x`` with its last axis repeated to ``width``; repeated entries of a table do nothing."""
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    more = width - x.shape[-1]
    if not more:
        return x
    last = xp.repeat(x[..., -1:], more, -1)
    return xp.concatenate([x, last & ~FLAGS if table else last], -1)


def _line(first, count, kind, unseen, low: int, base: int, width: int, xp):
    """The steps of one lead: ``(entries, None, length)``; ``first`` and the others ``[R, E]``.

    ``unseen``: bool ``[C]``, columns (from ``low`` on) to finish without a tile, at the end.
    """
    rows, slots = first.shape
    flat = [x.reshape(-1) for x in (first, count, kind)]
    if unseen is not None:
        extra = xp.arange(unseen.shape[0]) + low
        more = (extra, unseen, xp.full_like(extra, NONE))
        flat = [xp.concatenate([a, b.astype(a.dtype)]) for a, b in zip(flat, more)]
    first, count, kind = flat
    ends = xp.cumsum(count)
    total = ends[-1]
    if xp is np:
        width = int(total)
    place = xp.minimum(xp.arange(width), total - 1)
    run = xp.searchsorted(ends, place, side="right")
    column = first[run] + place - (ends - count)[run]
    row = run // slots
    before = xp.concatenate([xp.full_like(row[:1], -1), row[:-1]])
    after = xp.concatenate([row[1:], xp.full_like(row[:1], -1)])
    live = (xp.arange(width) < total) & (row < rows)
    flags = FIRST * (row != before) + LAST * ((row != after) | (place == total - 1))
    entry = xp.where(live, kind[run] + flags, 0)
    entry += (column << COLUMN_AT) + ((xp.minimum(row, rows - 1) + base) << ROW_AT)
    return entry.astype(xp.int32), None, total.astype(xp.int32)


def _columns(first, count, kind, here, width: int, xp):
    """The steps of a group of heads with their column flags: ``([Q, W], [Q, W], length)``."""
    low, high = here
    heads = first.shape[0]
    real = xp.where(kind != NONE, count, 0)
    starts = xp.where(real > 0, first - low, high - low)
    change = _sums(xp, starts, xp.ones_like(starts), high - low + 1)
    stops = xp.where(real > 0, first + real - low, high - low)
    change = change - _sums(xp, stops, xp.ones_like(stops), high - low + 1)
    unseen = xp.cumsum(change)[:-1] == 0
    lines = [
        _line(
            first[g], count[g], kind[g], unseen if g == heads - 1 else unseen & False, low, 0,
            width, xp,
        )
        for g in range(heads)
    ]
    longest = max(line[0].shape[-1] for line in lines)
    entries = [_longer(line[0], longest, True) for line in lines]
    table = xp.stack(entries).reshape(-1)
    lengths = xp.stack([line[2] for line in lines])
    place = xp.arange(longest)
    valid = (place < lengths[:, None]).reshape(-1)
    # Steps of empty rows touch no column; those appended for unseen columns have no row flags.
    counted = valid & ((kind_of(table) != NONE) | (table & (FIRST + LAST) == 0))
    key = xp.where(counted, column_of(table), MOST_COLUMNS)
    order = xp.argsort(key, stable=True)
    back = xp.argsort(order, stable=True)
    ranked = key[order]
    edge = xp.full_like(ranked[:1], -1)
    opens = (ranked != xp.concatenate([edge, ranked[:-1]]))[back] & counted
    closes = (ranked != xp.concatenate([ranked[1:], edge]))[back] & counted
    at = xp.where(closes, xp.arange(table.shape[0]), table.shape[0])
    nearest = at[::-1]
    nearest = np.minimum.accumulate(nearest) if xp is np else lax.cummin(nearest)
    last = xp.max(xp.where(closes, xp.arange(table.shape[0]), 0))
    flush = column_of(table)[xp.minimum(nearest[::-1], last)] - low
    table = table + COLUMN_FIRST * opens + COLUMN_LAST * closes
    shape = (heads, longest)
    return (
        table.astype(xp.int32).reshape(shape), flush.astype(xp.int32).reshape(shape),
        xp.max(lengths).astype(xp.int32),
    )


def _sums(xp, index, weights, size: int):
    if xp is np:
        return np.bincount(index.reshape(-1), weights.reshape(-1), size).astype(np.int64)
    return jnp.zeros(size, jnp.int32).at[index.reshape(-1)].add(weights.reshape(-1))


def _stacked(lines, batch: int, heads: int, host: bool) -> Steps:
    xp: Any = np if host else jnp
    width = max(line[0].shape[-1] for line in lines)
    tables = [_longer(line[0], width, True).reshape(-1) for line in lines]
    flushes = [_longer(x[1], width, False).reshape(-1) for x in lines if x[1] is not None]
    lengths = xp.stack([xp.max(line[2]) for line in lines]).astype(xp.int32)
    return Steps(
        xp.stack(tables), xp.stack(flushes) if flushes else None, lengths, batch, heads, width
    )
