"""What the TPU kernels share: the operands of modified scores and their evaluation on a tile.

A tile of scores has the queries on its rows (``q_axis = 0``: the forward) or on its lanes
(``q_axis = 1``: the backward, where it is the transpose). Vectors beside it come in the shape that
broadcasts without moving data between lanes: along the rows ``[n, 128]`` with equal lanes ("tall"),
along the lanes ``[1, n]`` ("wide").

A value that depends on ``q - k`` only makes a Toeplitz tile, ``tile[r, c] = g[o + c - r]``. The
kernel is handed the strip ``u[a, x] = g[x - a]`` of 8 rows; sixteen of its rotations are 128 rows
of the tile, and every block of 128 rows is a slice of those.
"""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnlab.core.mask import Coords
from attnlab.core.staging import Body

LANES = 128
CHUNK = 512  # keys that the forward takes at once
STRIP = 8  # rows of the strip of a Toeplitz tile
SIDES = {"q_pos": "rows", "q_index": "rows", "q_segment": "rows",
         "k_pos": "columns", "k_index": "columns", "k_segment": "columns"}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Static facts of a kernel.

    Args:
        T, S: queries and keys. block_q, block_k: of a tile.
        q_axis: the axis of a tile that queries lie on. scale: of the logits. score, mask: what is
            computed inside (None: nothing). loaded: coordinates that come as operands; the others
            follow from the place in the array. grads: numbers of the score's handed values whose
            gradient is asked for. names: ``(name, group)`` of all operands, in order. vector_bound:
            the vector unit is the limit of the forward, not the matrix units.
    """

    T: int
    S: int
    block_q: int
    block_k: int
    q_axis: int
    scale: float
    score: Body | None
    mask: Body
    loaded: tuple[str, ...]
    grads: tuple[int, ...]
    names: tuple[tuple[str, str], ...]
    vector_bound: bool = False

    @property
    def rows(self) -> int:
        """Queries, padded to whole tiles."""
        return -(-self.T // self.block_q) * self.block_q

    @property
    def columns(self) -> int:
        """Keys, padded to whole tiles."""
        return -(-self.S // self.block_k) * self.block_k

    @property
    def shape(self) -> tuple[int, int]:
        """Of a tile in the kernel."""
        return (self.block_k, self.block_q)[:: 1 if self.q_axis else -1]

    @property
    def chunk(self) -> int:
        """Keys of a tile that the forward takes at once.

        Many spill; where the vector unit is the limit, one sum over all is worth more than that.
        """
        most = 2 * CHUNK if self.vector_bound and self.score is not None else CHUNK
        return next(c for c in (most, CHUNK, self.block_k) if self.block_k % c == 0)

    @property
    def unit(self) -> int:
        """Width of the pieces that a Toeplitz window is made of."""
        return math.gcd(self.block_q, self.block_k)

    @property
    def pieces(self) -> int:
        return (self.block_q + self.block_k) // self.unit

    def groups(self) -> list[str]:
        """The group of every gradient asked for."""
        known = dict(self.names)
        return [known[f"score{i}"] for i in self.grads]


def make_plan(
    score: Body | None, mask: Body, groups: tuple[tuple[str, ...], tuple[str, ...]], T: int, S: int,
    block_q: int, block_k: int, q_axis: int, scale: float, free: frozenset[str],
    grads: tuple[int, ...] = (), sink: str | None = None,
) -> Plan:
    """A plan; ``free``: coordinates that follow from the place of a token."""
    bodies = [b for b in (score, mask) if b is not None]
    used = frozenset().union(*(b.coordinates | b.floats for b in bodies))
    loaded = tuple(n for n in SIDES if n in used and n not in free)
    names = [(f"score{i}", group) for i, group in enumerate(groups[0])]
    names += [(f"mask{i}", group) for i, group in enumerate(groups[1])]
    names += [(name, SIDES[name]) for name in loaded]
    names += [] if sink is None else [("sink", sink)]
    return Plan(
        T, S, block_q, block_k, q_axis, float(scale), score, mask, loaded, grads, tuple(names)
    )


def padded(x: jax.Array, size: int, axis: int = -1, mode: str = "edge") -> jax.Array:
    """``x`` with one axis extended to a multiple of ``size``."""
    extra = -x.shape[axis] % size
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, extra)
    return jnp.pad(x, widths, mode=mode) if extra else x


def operands(plan: Plan, handed: list, seen: list, q: Coords, k: Coords, sink=None) -> list:
    """The operands named by ``plan.names`` as the kernels read them.

    Args:
        handed, seen: hoisted values of the score and of the mask, see ``core.staging``.
        q, k: coordinates, positions ``[B or 1, 1, T]`` (segments and index likewise).
        sink: logits ``[1, N]`` or, a row of queries each, ``[1, N, T]``.
    """
    sides = {"q_pos": q.positions, "q_segment": q.segments, "q_index": q.index,
             "k_pos": k.positions, "k_segment": k.segments}
    values = [*handed, *seen, *(sides[name].astype(jnp.int32) for name in plan.loaded)]
    values += [] if sink is None else [sink]
    return [arranged(plan, group, x) for (_, group), x in zip(plan.names, values, strict=True)]


def leads(plan: Plan, handed: list, seen: list, sink=None) -> dict[str, tuple[int, int]]:
    """Sizes ``[B, N]`` of the operands in scalar memory."""
    values = [*handed, *seen, *(None for _ in plan.loaded), sink]
    return {
        name: x.shape[:2] for (name, group), x in zip(plan.names, values) if group == "heads"
    }


def arranged(plan: Plan, group: str, x: jax.Array) -> jax.Array:
    """A hoisted value of a group, padded to whole tiles, in the shape that the kernel reads."""
    if group == "heads":
        return x.reshape(-1)
    if group in ("rows", "columns"):
        rows = group == "rows"
        x = padded(x, plan.block_q if rows else plan.block_k)
        if (plan.q_axis == 0) == rows:
            return jnp.broadcast_to(x[..., None], (*x.shape, LANES))
        return x[:, :, None]
    if group == "dense":
        x = padded(padded(x, plan.block_q, -2), plan.block_k)
        return x.swapaxes(-1, -2) if plan.q_axis else x
    return strip(plan, x)


def strip(plan: Plan, x: jax.Array) -> jax.Array:
    """``u[B, N, 8, X]`` of values ``x[B, N, S - 1 + T]`` at the distances ``-(S - 1) .. T - 1``.

    A place ``zero`` stands for distance 0; both ends repeat the last value.
    """
    zero = plan.columns if plan.q_axis else plan.rows
    place = jnp.arange(plan.rows + plan.columns) - jnp.arange(STRIP)[:, None] - zero
    distance = place if plan.q_axis else -place
    return jnp.take(x, jnp.clip(distance + plan.S - 1, 0, x.shape[-1] - 1), axis=-1)


def window(plan: Plan, i, j):
    """The first piece of the strip that tile ``(i, j)`` needs (pieces are ``plan.unit`` wide)."""
    q, k = plan.block_q // plan.unit, plan.block_k // plan.unit
    if plan.q_axis:
        return plan.columns // plan.unit + i * q - (j + 1) * k
    return plan.rows // plan.unit + j * k - (i + 1) * q


def specs(plan: Plan, arrays: list[jax.Array], at: Callable[..., Any]):
    """``(block specs, arrays)`` of the operands; a strip is handed in pieces.

    ``at(*grid indices and tables) -> (row of the batch, head, row and column of the tile)``.
    """
    out, given = [], []
    for (_, group), x in zip(plan.names, arrays, strict=True):
        for piece in range(plan.pieces if group == "distances" else 1):
            out.append(_spec(plan, group, x.shape, at, piece))
            given.append(x)
    return out, given


def _spec(plan: Plan, group: str, shape, at, piece: int) -> pl.BlockSpec:
    if group == "heads":
        return pl.BlockSpec(memory_space=pltpu.SMEM)
    tall, wide = plan.shape

    def place(*indices):
        b, n, i, j = at(*indices)
        b, n = (0 if size == 1 else x for size, x in zip(shape, (b, n)))
        if group == "dense":
            return (b, n, j, i) if plan.q_axis else (b, n, i, j)
        if group == "distances":
            return b, n, 0, window(plan, i, j) + piece
        at_rows = i if group == "rows" else j
        return (b, n, 0, at_rows) if _is_wide(plan, group) else (b, n, at_rows, 0)

    block = {"dense": (tall, wide), "distances": (STRIP, plan.unit)}.get(
        group, (1, wide) if _is_wide(plan, group) else (tall, LANES)
    )
    return pl.BlockSpec((1, 1, *block), place)


def _is_wide(plan: Plan, group: str) -> bool:
    """Whether a vector operand of this group lies along the lanes."""
    return (plan.q_axis == 1) == (group == "rows")


def gathered(plan: Plan, refs: Sequence[Any]) -> dict[str, list[Any]]:
    """Operand name to its references, in the order of ``specs``."""
    out: dict[str, list[Any]] = {}
    rest = list(refs)
    for name, group in plan.names:
        count = plan.pieces if group == "distances" else 1
        out[name], rest = rest[:count], rest[count:]
    return out
