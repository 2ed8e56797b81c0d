"""What the Triton kernels share: tiles in memory, the mask on a tile, the cap, the run lists.

This module needs triton: import it where a kernel is launched.
"""

# Inside triton.jit nothing has a type that a checker can follow.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(
    base, first, LENGTH: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHECK: tl.constexpr,
):
    """``[ROWS, COLUMNS]`` from token ``first`` on; zeros past WIDTH and, with CHECK, past LENGTH.

    The step to the tile is 64-bit: long rows of many heads hold more than 2**31 numbers.
    """
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = base + tl.cast(first, tl.int64) * STRIDE + (rows[:, None] * STRIDE + columns[None, :])
    if CHECK:
        inside = (first + rows < LENGTH)[:, None] & (columns < WIDTH)[None, :]
        tile = tl.load(at, mask=inside, other=0.0)
    elif COLUMNS != WIDTH:
        tile = tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_tile(
    base, first, tile, LENGTH: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """The inverse of ``load_tile`` with CHECK, in the dtype of the array."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = base + tl.cast(first, tl.int64) * STRIDE + (rows[:, None] * STRIDE + columns[None, :])
    inside = (first + rows < LENGTH)[:, None] & (columns < WIDTH)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def place_of(order, HEADS: tl.constexpr, ROWS: tl.constexpr, SECTION: tl.constexpr):
    """Row of tiles, head and (64-bit) row of the batch of this program; see ``order.Items``.

    order: int32 ``[ROWS]``, rows of tiles, longest first.
    """
    item = tl.program_id(0)
    part, rest = item // (ROWS * SECTION), item % (ROWS * SECTION)
    head = part * SECTION + rest % SECTION
    return tl.load(order + rest // SECTION), head % HEADS, (head // HEADS).to(tl.int64)


@triton.jit
def base_of(x, b, head, LENGTH: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Where row ``b`` (64-bit) of a head starts in ``x[B, LENGTH, HEADS, WIDTH]``."""
    return x + b * (LENGTH * HEADS * WIDTH) + head * WIDTH


@triton.jit
def beside_queries(x, TRANSPOSED: tl.constexpr):
    """A vector of queries along its axis of the tile (rows, transposed: columns)."""
    if TRANSPOSED:
        out = x[None, :]
    else:
        out = x[:, None]
    return out


@triton.jit
def beside_keys(x, TRANSPOSED: tl.constexpr):
    """A vector of keys along its axis of the tile."""
    if TRANSPOSED:
        out = x[:, None]
    else:
        out = x[None, :]
    return out


@triton.jit
def visible(
    low, high, q_segments, k_positions, k_segments, b, q_at, k_at, T: tl.constexpr,
    S: tl.constexpr, CLAUSES: tl.constexpr, FLAGS: tl.constexpr, PLACES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Which keys ``k_at`` the queries ``q_at`` see: one of the clauses of ``triton_mask`` holds.

    PLACES: key positions are places in the array. Keys past S are hidden; queries past T may see
    anything.
    """
    in_q, in_k = q_at < T, k_at < S
    if PLACES:
        position = k_at
    else:
        position = tl.load(k_positions + b * S + k_at, mask=in_k, other=0)
    position = beside_keys(position, TRANSPOSED)
    seen = beside_keys(in_k, TRANSPOSED)
    for c in tl.static_range(CLAUSES):
        clause = beside_keys(in_k, TRANSPOSED)
        at = (b * CLAUSES + c) * T + q_at
        if (FLAGS >> 3 * c) & 1:  # LOW
            least = tl.load(low + at, mask=in_q, other=0)
            clause = clause & (position >= beside_queries(least, TRANSPOSED))
        if (FLAGS >> 3 * c) & 2:  # HIGH
            most = tl.load(high + at, mask=in_q, other=0)
            clause = clause & (position <= beside_queries(most, TRANSPOSED))
        if (FLAGS >> 3 * c) & 4:  # SEGMENT
            mine = tl.load(q_segments + b * T + q_at, mask=in_q, other=0)
            other = tl.load(k_segments + b * S + k_at, mask=in_k, other=0)
            mine, other = beside_queries(mine, TRANSPOSED), beside_keys(other, TRANSPOSED)
            clause = clause & (mine == other) & (mine > 0)
        if c == 0:
            seen = clause
        else:
            seen = seen | clause
    return seen


@triton.jit
def capped(s, SCALE: tl.constexpr, CAP: tl.constexpr):
    """``(z, t)``: ``z = CAP t``, ``t = tanh(SCALE s / CAP)``, exact to a rounding of CAP."""
    t = 1.0 - 2.0 / (1.0 + tl.exp(s * (2.0 * SCALE / CAP)))
    return t * CAP, t


@triton.jit
def run_range(rows, b, row, STRIDE: tl.constexpr):
    """``(start, end)`` of the runs of a row of tiles in ``rows[B or 1, R, 2]``."""
    at = rows + b * STRIDE + 2 * row
    start = tl.load(at)
    return start, start + tl.load(at + 1)


@triton.jit
def run_of(runs, b, e, STRIDE: tl.constexpr):
    """``(first, end)`` of the tiles of run ``e`` in ``runs[B or 1, E, 2]``."""
    at = runs + b * STRIDE + 2 * e
    first = tl.load(at)
    return first, first + tl.load(at + 1)
