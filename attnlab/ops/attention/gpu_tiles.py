"""What the Hopper kernels share: the modified scores and the mask on a tile of logits.

A warpgroup holds a tile of logits in registers in the layout of the tensor core's accumulator.
Vectors beside it (rows of queries, columns of keys) come in the layouts that this one leaves when
an axis is reduced, so that broadcasting them moves nothing between threads.
"""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab.core.axes import varying
from attnlab.core.staging import Body
from attnlab.ops.attention.affine import Sum, evaluate
from attnlab.ops.attention.gpu_plan import COORDINATE_GROUPS, Plan, traveling

LAYOUT = plgpu.Layout.WGMMA
LOG2E = math.log2(math.e)
NEVER = -1e30  # below every score; finite, so that differences of two of them are not NaN
WIDTH = 64  # queries of a warpgroup


@dataclasses.dataclass
class Tile:
    """One tile of logits inside the kernel: where it stands and how to read beside it.

    Args:
        refs: operand name to its reference in device memory. b, n: row and head.
        q0, k0: index of its first query and key. shape: of the tile. q_axis: the axis of queries.
    """

    plan: Plan
    refs: dict[str, Any]
    b: Any
    n: Any
    q0: Any
    k0: Any
    shape: tuple[int, int]
    q_axis: int = 0
    stored: Any = None  # the slot of its stored tile of values by distance, where it has one
    number: Any = None  # else which number they are
    early: Any = dataclasses.field(default_factory=dict)  # see ``fetched``
    held: Any = None  # see ``hold``

    def hold(self) -> Tile:
        """This tile with the operands that it shares with its row of tiles in registers."""
        mine = ("heads", "rows" if self.q_axis == 0 else "columns")
        held = {name: self.operand(name, group) for name, group in self.plan.names if group in mine}
        return dataclasses.replace(self, held=held)

    def vector(self, name: str, group: str) -> Any:
        """The entries of a vector operand beside this tile."""
        axis = self.q_axis if group == "rows" else 1 - self.q_axis
        start = self.q0 if group == "rows" else self.k0
        ref = self.refs[name]
        at = (*lead(ref, self.b, self.n), pl.ds(start, self.shape[axis]))
        return load(ref.at[at], LAYOUT.reduce(1 - axis))

    def operand(self, name: str, group: str) -> tuple[Any, str]:
        """Value and rank of an operand."""
        if self.held is not None and name in self.held:
            return self.held[name]
        if group == "heads":
            ref = self.refs[name]
            return ref[lead(ref, self.b, self.n)], "scalar"
        if group == "distances" and self.stored is not None:
            ref = self.refs[f"{name} tiles"]
            at = (*lead(ref, self.b, self.n), self.stored)
            return load(ref.at[at], LAYOUT), "tile"
        if group == "distances":
            ref = self.refs[f"{name} numbers"]
            return ref[(*lead(ref, self.b, self.n), self.number)], "scalar"
        if group == "dense":
            return self.early[name] if name in self.early else self.pairs(name), "tile"
        return self.vector(name, group), "row" if group == "rows" else "column"

    def pairs(self, name: str) -> Any:
        """The entries of a value by query and key on this tile."""
        ref = self.refs[name]
        starts = (self.q0, self.k0) if self.q_axis == 0 else (self.k0, self.q0)
        at = (*lead(ref, self.b, self.n), *map(pl.ds, starts, self.shape))
        x = load(ref.at[at], LAYOUT)
        return x.astype(jnp.int32) if ref.dtype == jnp.int8 else x

    def fetched(self, masked: bool) -> dict[str, Any]:
        """The values by query and key: for ``early``, read while products are under way."""
        kinds = ("score", "mask") if masked else ("score",)
        return {
            name: self.pairs(name) for name, group in self.plan.names
            if group == "dense" and name.startswith(kinds)
        }

    def lift(self, x: Any, rank: str, to: str) -> Any:
        """Broadcast; see ``Body``."""
        if rank == to:
            return x
        if rank == "scalar":
            if to == "tile":
                return plgpu.layout_cast(lax.broadcast(x, self.shape), LAYOUT)
            axis = self.q_axis if to == "row" else 1 - self.q_axis
            return plgpu.layout_cast(lax.broadcast(x, (self.shape[axis],)), LAYOUT.reduce(1 - axis))
        axis = self.q_axis if rank == "row" else 1 - self.q_axis
        return lax.broadcast_in_dim(x, self.shape, (axis,))

    def coordinate(self, name: str) -> tuple[Any, str]:
        if name in self.plan.loaded:
            return self.operand(name, COORDINATE_GROUPS[name])
        query = name.startswith("q")
        axis = self.q_axis if query else 1 - self.q_axis
        place = plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=LAYOUT)
        return place + (self.q0 if query else self.k0), "tile"

    def real(self, name: str, near: bool = False) -> tuple[Any, str]:
        """A coordinate as float32, along its own axis only: a conversion costs four additions.
        ``near``: counted from that of the tile's first query."""
        if name in self.plan.loaded:
            x, rank = self.coordinate(name)
            if near:
                ref = self.refs["q" + name[1:]]
                x = x - ref[(*lead(ref, self.b, self.n), self.q0)]
            return x.astype(jnp.float32), rank
        query = name.startswith("q")
        axis = self.q_axis if query else 1 - self.q_axis
        place = plgpu.broadcasted_iota(
            jnp.int32, (self.shape[axis],), 0, layout=LAYOUT.reduce(1 - axis)
        )
        first = self.q0 if query else self.k0
        return _as_float(place + (first - self.q0 if near else first)), "row" if query else "column"

    def known(self, body: Body) -> dict[str, tuple[Any, str]]:
        """The coordinates that ``body`` reads."""
        found = {name: self.coordinate(name) for name in sorted(body.coordinates - {"score"})}
        return found | {f"float {name}": self.real(name) for name in sorted(body.floats)}

    def seen(self) -> Any:
        """The mask on this tile."""
        body = self.plan.mask
        handed = [self.operand(f"mask{i}", h.group) for i, h in enumerate(body.handed)]
        return body(self.known(body), handed, self.lift)

    def by_kind(self, function: Any, *arrays: Any) -> Any:
        """``function(tile, *arrays)``, told where this tile finds its values by distance."""
        d = self.plan.diagonals
        if d is None or self.stored is not None:
            return function(self, *arrays)
        offset = self.q0 - self.k0 - d.first * WIDTH
        kind = self.refs["diagonals"][lax.div(offset, WIDTH)]
        return lax.cond(
            kind < 0,
            lambda *a: function(dataclasses.replace(self, number=-1 - kind), *a),
            lambda *a: function(dataclasses.replace(self, stored=kind), *a),
            *arrays,
        )

    def scores(self, s: Any) -> Any:
        """Modified scores of raw logits ``q k`` without ``row_offset``, natural units."""
        return self.by_kind(
            lambda tile, s: tile.modified(s, tile.plan.scale, *tile.read((0,)))[0], s
        )

    def row_offset(self) -> Any:
        """What ``scores`` leaves out: a number a query, the same for all its tiles; or None."""
        if self.plan.score is None or self.plan.diagonals is not None or self.plan.whole:
            return None
        zero = plgpu.layout_cast(jnp.full(self.shape, 0, jnp.float32), LAYOUT)
        return self.modified(zero, 1.0, *self.read((1,)))[1]

    def read(self, parts: tuple[int, ...] = (0, 1)) -> tuple[Any, Any, Any]:
        """Coordinates, coordinates near the tile and handed values of the score function: those
        that these results of ``affine.evaluate`` depend on, the others are 0."""
        body, plan = self.plan.score, self.plan
        if plan.diagonals is not None:
            handed = [self.operand(f"score{i}", h.group) for i, h in enumerate(body.handed)]
            return self.known(body), {}, handed
        used = frozenset().union(*(plan.reads[i] for i in parts))

        def entry(name, function, dtype):
            if name in used:
                return function()
            return self.lift(jnp.zeros((), dtype), "scalar", plan.ranks[name]), plan.ranks[name]

        known, near, handed = {}, {}, []
        for name in sorted(body.coordinates - {"score"}):
            known[name] = entry(name, lambda n=name: self.coordinate(n), jnp.int32)
        for name in sorted(body.floats):
            real, near_by = f"float {name}", f"near {name}"
            known[real] = entry(real, lambda n=name: self.real(n), jnp.float32)
            near[name] = entry(near_by, lambda n=name: self.real(n, near=True), jnp.float32)
        for i, h in enumerate(body.handed):
            name = f"score{i}"
            read = functools.partial(self.operand, name, h.group)
            handed.append(entry(name, read, traveling(h.dtype)))
        return known, near, handed

    def modified(self, s: Any, scale: float, known: Any, near: Any, handed: Any) -> tuple[Any, Any]:
        """``(scores, row)`` of logits ``scale s`` and of what ``read`` gives; row is left out."""
        body = self.plan.score
        if self.plan.diagonals is not None:
            return body(known | {"score": (s * scale, "tile")}, handed, self.lift), None
        z = evaluate(body, Sum(s, scale, {}), known, handed, near, self.lift)
        return z.settled(self.lift, but=None if self.plan.whole else "row")


def positive(s, unit: float):
    """The same products of logits and unit with a unit above 0: hidden logits are -inf, which must
    stay so."""
    if unit > 0:
        return s, unit
    return (s * -1.0, -unit) if unit < 0 else (s * 0.0, 1.0)


def _as_float(x):
    """float32 of integers below 2**22: two cheap instructions instead of a conversion."""
    magic = 0x4B400000  # the bits of 1.5 * 2**23: adding x to them adds x to the number
    return lax.bitcast_convert_type(x + magic, jnp.float32) - float(3 * 2**22)


def load(ref, layout):
    """What ``ref`` (a place in device memory) holds, in registers.

    Inside shard_map it says that it varies, which nothing else in a kernel does: products drop it.
    """
    x = plgpu.load(ref, layout=layout, optimized=False)
    return x * jnp.ones((), x.dtype) if varying(x) else x


def varying_zero(j):
    """0, for any tile ``j``, in a form that changes in the loop for all the compiler knows.

    As part of the place of an operand that stays put it keeps the descriptors of all its slices,
    32 registers for 256 columns, from being computed before the loop and kept.
    """
    return jnp.minimum(j, 0)


def lead(ref, b, n):
    """Index of row and head, 0 where all share the entry."""
    return (b if ref.shape[0] > 1 else 0, n if ref.shape[1] > 1 else 0)
