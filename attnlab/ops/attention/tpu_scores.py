"""One tile of scores inside a TPU kernel: the modified scores, their derivative, and the mask."""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from attnlab.core import versions
from attnlab.core.staging import Body
from attnlab.ops.attention.affine import Sum, evaluate
from attnlab.ops.attention.tpu_tiles import LANES, SIDES, STRIP, Plan

LOG2E = math.log2(math.e)
NEVER = -3e38  # a hidden score: finite, so that differences of two of them are numbers
LOWEST = -1e38  # where the running maximum starts: above every hidden score


def lanes(x, width: int):
    """``[n, 128]`` of equal lanes, made ``width`` wide."""
    copies = -(-width // LANES)
    wide = jnp.concatenate([x] * copies, 1) if copies > 1 else x
    return wide if wide.shape[1] == width else wide[:, :width]


def folded(f: Callable[[Any, Any], Any], x):
    """The blocks of 128 lanes of ``x[n, w]`` joined by ``f``: ``[n, 128]``."""
    blocks = [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]
    while len(blocks) > 1:
        pairs = [f(a, b) for a, b in zip(blocks[::2], blocks[1::2])]
        blocks = pairs + blocks[len(pairs) * 2 :]
    return blocks[0]


@dataclasses.dataclass
class Tile:
    """Where a tile stands, and what lies beside it.

    Args:
        refs: operand name to its references. leads: of operands in scalar memory, ``[B, N]``
            sizes. b, n: row of the batch and head. q0, k0: first query and key. columns: the part
            of the tile's lanes that is meant, or None.
    """

    plan: Plan
    refs: dict[str, list[Any]]
    leads: dict[str, tuple[int, int]]
    b: Any
    n: Any
    q0: Any
    k0: Any
    columns: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tile, or of its part."""
        tall, wide = self.plan.shape
        return (tall, wide) if self.columns is None else (tall, self.columns[1] - self.columns[0])

    def _cut(self, x):
        """The part's lanes of what lies along the lanes of the tile."""
        return x if self.columns is None else x[:, self.columns[0] : self.columns[1]]

    def operand(self, name: str, group: str) -> tuple[Any, str]:
        """Value and rank of an operand."""
        refs = self.refs[name]
        if group == "heads":
            rows, heads = self.leads[name]
            b, n = (self.b if rows > 1 else 0), (self.n if heads > 1 else 0)
            return refs[0][b * heads + n], "scalar"
        if group == "dense":
            return self._cut(refs[0][0, 0]), "tile"
        if group == "distances":
            return self._cut(self.toeplitz(refs)), "tile"
        tall = (group == "rows") == (self.plan.q_axis == 0)
        x = refs[0][0, 0]
        return x if tall else self._cut(x), "row" if group == "rows" else "column"

    def coordinate(self, name: str) -> tuple[Any, str]:
        group = SIDES[name]
        if name in self.plan.loaded:
            return self.operand(name, group)
        place, rank = self.place(name)
        return place + (self.q0 if group == "rows" else self.k0), rank

    def place(self, name: str) -> tuple[Any, str]:
        """A coordinate that follows from the place in the array, counted within the tile."""
        rows = SIDES[name] == "rows"
        axis = self.plan.q_axis if rows else 1 - self.plan.q_axis
        shape = (self.shape[0], LANES) if axis == 0 else (1, self.shape[1])
        place = lax.broadcasted_iota(jnp.int32, shape, axis)
        if axis == 1 and self.columns is not None:
            place = place + self.columns[0]
        return place, "row" if rows else "column"

    def lift(self, x: Any, rank: str, to: str) -> Any:
        """Broadcast; see ``Body``."""
        if x.dtype == jnp.bool_:  # truth values are not moved between lanes
            return self.lift(jnp.where(x, 1, 0), rank, to) != 0
        shape = self.shape
        if rank == "scalar":
            tall = (to == "row") == (self.plan.q_axis == 0)
            vector = (shape[0], LANES) if tall else (1, shape[1])
            return jnp.full(shape if to == "tile" else vector, x, x.dtype)
        if (rank == "row") == (self.plan.q_axis == 0):
            return lanes(x, shape[1])
        return jnp.broadcast_to(x, shape)

    def _known(self, body: Body) -> dict[str, tuple[Any, str]]:
        found = {name: self.coordinate(name) for name in body.coordinates - {"score"}}
        for name in body.floats:
            x, rank = self.coordinate(name)
            found[f"float {name}"] = x.astype(jnp.float32), rank
        return found

    def _handed(self, what: str, body: Body) -> list[tuple[Any, str]]:
        groups = dict(self.plan.names)
        names = [f"{what}{i}" for i in range(len(body.handed))]
        return [self.operand(name, groups[name]) for name in names]

    def seen(self) -> Any:
        """The mask on this tile."""
        body = self.plan.mask
        handed = self._handed("mask", body)
        if self.plan.q_axis == 0 and not self.plan.vector_bound:
            # One operation less a pair, hidden behind the products; its other schedule spills.
            return body(self._known(body), handed, self.lift)
        seen = evaluate(body, None, self._known(body), handed, {}, self.lift)
        return seen.settled(self.lift)[0]

    def based(self, raw: Any) -> tuple[Any, Any]:
        """``(z, row)`` of the products ``raw = q k^T``: modified scores in base 2 but for what is
        added to a whole row, None where that is nothing."""
        scale, body = self.plan.scale, self.plan.score
        if body is None:
            return raw * (scale * LOG2E), None
        near = {}
        free = body.floats - set(self.plan.loaded)
        middle = self.plan.block_q // 2
        for name in free:
            rows = SIDES[name] == "rows"
            here = -middle if rows else self.k0 - self.q0 - middle
            place, rank = self.place(name)
            near[name] = (place + here).astype(jnp.float32), rank
        z = evaluate(
            body, Sum(raw, scale, {}), self._known(body), self._handed("score", body), near,
            self.lift,
        )
        return z.scaled(LOG2E, self.lift).settled(self.lift, but="row")

    def scored(self, s: Any) -> tuple[Any, Callable[[Any], tuple[Any, list[Any]]]]:
        """Modified scores, and their derivative: of a cotangent tile, that of ``s`` and tiles of
        the cotangents of every handed value in ``plan.grads``."""
        body = self.plan.score
        if body is None:
            return s, lambda ds: (ds, [])
        handed = self._handed("score", body)
        tiles = [
            handed[i][0] if handed[i][1] == "tile" else self.lift(*handed[i], "tile")
            for i in self.plan.grads
        ]
        known = self._known(body)

        def f(s, *tiles):
            mine = list(handed)
            for i, tile in zip(self.plan.grads, tiles, strict=True):
                mine[i] = (tile, "tile")
            return body(known | {"score": (s, "tile")}, mine, self.lift)

        out, pull = jax.vjp(f, s, *tiles)

        def pulled(cotangent):
            ds, *rest = pull(cotangent)
            return ds, rest

        return out, pulled

    def toeplitz(self, refs) -> Any:
        """The tile of a strip's window ``[8, n0 + n1]``."""
        tall, wide = self.plan.shape
        strip = jnp.concatenate([ref[0, 0] for ref in refs], 1)
        block = min(tall, LANES)
        shifts = [pltpu.roll(strip, at, 1) if at else strip for at in range(0, block, STRIP)]
        rows = jnp.concatenate(shifts, 0)
        starts = range(tall, 0, -block)
        return jnp.concatenate([rows[:, start : start + wide] for start in starts], 0)

    def untoeplitz(self, tile) -> Any:
        """The transpose of ``toeplitz``: sums ``[8, n0 + n1]`` of a tile."""
        tall, wide = self.plan.shape
        block = min(tall, LANES)
        columns: list[Any] = [None] * ((tall + wide) // LANES)
        for r in range(0, tall, block):
            for c in range(0, wide, LANES):
                at = (tall - r + c) // LANES
                part = tile[r : r + block, c : c + LANES]
                columns[at] = part if columns[at] is None else columns[at] + part
        zero = jnp.zeros((block, LANES), tile.dtype)
        rows = jnp.concatenate([zero if x is None else x for x in columns], 1)
        total = rows[:STRIP]
        for at in range(STRIP, block, STRIP):
            total = total + pltpu.roll(rows[at : at + STRIP], tall + wide - at, 1)
        return total


def product(a, b, axes: tuple[int, int]):
    """``a`` and ``b`` contracted over one axis each, in float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=exact,
        preferred_element_type=jnp.float32,
    )


def reciprocal(x):
    """``1 / x`` of numbers from 0 on, in float32 but for the last bit; of 0 a large number."""
    x = jnp.maximum(x, 1e-37)
    guess = versions.reciprocal(x)
    for _ in range(2):  # each doubles the digits; interpreters start from 8 bits
        guess = guess * (2.0 - x * guess)
    return guess
