"""What the Hopper kernels share: operands of the modified scores and their evaluation on a tile.

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

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import core as jex

from attnlab.core.axes import varying
from attnlab.core.mask import Coords
from attnlab.core.mods import Mod
from attnlab.core.staging import Body, split
from attnlab.ops.attention.affine import Sum, evaluate

LAYOUT = plgpu.Layout.WGMMA
LOG2E = math.log2(math.e)
NEVER = -1e30  # below every score; finite, so that differences of two of them are not NaN
WIDTH = 64  # queries of a warpgroup
RANKS = {"heads": "scalar", "rows": "row", "columns": "column", "dense": "tile"}
COORDINATE_GROUPS = {
    "q_pos": "rows", "q_segment": "rows", "k_pos": "columns", "k_segment": "columns",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Static facts of a kernel.

    Args:
        T, S: tokens. block_q, block_k: tokens of a tile. layout: see ``Seq``. score, mask: what is
            computed inside (None: nothing). scale: of the logits.
        loaded: coordinates that come as operands; the others follow from the place in the array.
        diagonals: of values by distance, see ``gpu_distance``; None without any.
        transposed: rows of a tile are keys. wanted: which handed values of the score need their
            gradient. whole: scores leave nothing out, see ``Tile.row_offset``.
    """

    T: int
    S: int
    block_q: int
    block_k: int
    layout: str
    scale: float
    score: Body | None
    mask: Body | None
    loaded: tuple[str, ...]
    diagonals: Any = None
    transposed: bool = False
    wanted: tuple[bool, ...] = ()
    whole: bool = False

    @property
    def names(self) -> tuple[tuple[str, str], ...]:
        """``(name, group)`` of all operands, in order."""
        out = []
        for kind, body in (("score", self.score), ("mask", self.mask)):
            for i, h in enumerate(body.handed if body is not None else ()):
                both = h.group == "distances"
                ends = (" numbers", " tiles") if both else ("",)
                out += [(f"{kind}{i}{end}", h.group) for end in ends]
            if kind == "score" and self.diagonals is not None:
                out.append(("diagonals", "distances"))
        return (*out, *((name, COORDINATE_GROUPS[name]) for name in self.loaded))


    @functools.cached_property
    def ranks(self) -> dict[str, str]:
        """Rank of everything that a score function may read in a tile."""
        body = self.score
        ranks = {name: "tile" for name in body.coordinates - {"score"}}
        ranks |= {n: RANKS[COORDINATE_GROUPS[n]] for n in ranks if n in self.loaded}
        for name in body.floats:
            side = "row" if name.startswith("q") else "column"
            ranks |= {f"near {name}": side, f"float {name}": side}
        return ranks | {f"score{i}": RANKS[h.group] for i, h in enumerate(body.handed)}

    @functools.cached_property
    def reads(self) -> tuple[frozenset[str], frozenset[str]]:
        """What of ``ranks`` the two results of ``Tile.modified`` depend on.

        What is computed and not used has no layout that the compiler could infer.
        """
        body, ranks = self.score, self.ranks
        sizes = {"scalar": (), "row": (2, 1), "column": (1, 3), "tile": (2, 3)}

        def lift(x, rank, to):
            return jnp.broadcast_to(x, sizes[to])

        def both(given):
            values = {n: (x, ranks[n]) for n, x in given.items()}
            handed = [values.pop(f"score{i}") for i in range(len(body.handed))]
            near = {n: values.pop(f"near {n}") for n in body.floats}
            score = Sum(jnp.zeros(sizes["tile"]), 2.0, {})
            z = evaluate(body, score, values, handed, near, lift)
            return z.settled(lift, but=None if self.whole else "row")

        kinds = {n: "int32" for n in body.coordinates}
        kinds |= {f"score{i}": _traveling(h.dtype) for i, h in enumerate(body.handed)}
        given = {n: jnp.zeros(sizes[r], kinds.get(n, "float32")) for n, r in ranks.items()}
        closed, out = jax.make_jaxpr(both, return_shape=True)(given)
        names, found, at = sorted(given), [], 0
        for result in out:
            live = set() if result is None else {closed.jaxpr.outvars[at]}
            at += result is not None
            for eqn in reversed(closed.jaxpr.eqns):
                if live & set(eqn.outvars):
                    live |= {x for x in eqn.invars if isinstance(x, jex.Var)}
            found.append(frozenset(n for n, x in zip(names, closed.jaxpr.invars) if x in live))
        return found[0], found[1]


def _traveling(dtype: str) -> str:
    """The dtype of a handed value in a kernel."""
    return "int32" if dtype == "bool" else dtype


def padded(x: jax.Array, size: int) -> jax.Array:
    """``x`` with its last axis extended to a multiple of ``size``."""
    extra = -x.shape[-1] % size
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)], mode="edge") if extra else x


def coordinates(plan: Plan, q: Coords, k: Coords) -> list[jax.Array]:
    """The coordinate operands ``[B, 1, T]``, padded to whole tiles."""
    sides = {"q_pos": q.positions, "q_segment": q.segments, "k_pos": k.positions,
             "k_segment": k.segments}
    out = []
    for name in plan.loaded:
        x = sides[name]
        size = plan.block_q if COORDINATE_GROUPS[name] == "rows" else plan.block_k
        out.append(padded(x.astype(jnp.int32)[:, None], size))
    return out


def handed_operands(plan: Plan, which: str, given: list[jax.Array]) -> list[jax.Array]:
    """Hoisted values in the shape the kernels read, padded to whole tiles."""
    from attnlab.ops.attention import gpu_dense, gpu_distance

    body = plan.score if which == "score" else plan.mask
    out: list[jax.Array] = []
    for entry, x in zip(body.handed if body else (), given, strict=True):
        if entry.group == "distances":
            out += gpu_distance.operands(plan.diagonals, x, plan.S)
        elif entry.group == "heads":
            out.append(x)
        elif entry.group == "dense":
            out.append(
                gpu_dense.operand(x, entry.dtype, plan.block_q, plan.block_k, plan.transposed)
            )
        else:
            out.append(padded(x, plan.block_q if entry.group == "rows" else plan.block_k))
    if which == "score" and plan.diagonals is not None:
        out.append(jnp.asarray(plan.diagonals.kinds))
    return out


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
        at = (*_lead(ref, self.b, self.n), pl.ds(start, self.shape[axis]))
        return load(ref.at[at], LAYOUT.reduce(1 - axis))

    def operand(self, name: str, group: str) -> tuple[Any, str]:
        """Value and rank of an operand."""
        if self.held is not None and name in self.held:
            return self.held[name]
        if group == "heads":
            ref = self.refs[name]
            return ref[_lead(ref, self.b, self.n)], "scalar"
        if group == "distances" and self.stored is not None:
            ref = self.refs[f"{name} tiles"]
            at = (*_lead(ref, self.b, self.n), self.stored)
            return load(ref.at[at], LAYOUT), "tile"
        if group == "distances":
            ref = self.refs[f"{name} numbers"]
            return ref[(*_lead(ref, self.b, self.n), self.number)], "scalar"
        if group == "dense":
            return self.early[name] if name in self.early else self.pairs(name), "tile"
        return self.vector(name, group), "row" if group == "rows" else "column"

    def pairs(self, name: str) -> Any:
        """The entries of a value by query and key on this tile."""
        ref = self.refs[name]
        starts = (self.q0, self.k0) if self.q_axis == 0 else (self.k0, self.q0)
        at = (*_lead(ref, self.b, self.n), *map(pl.ds, starts, self.shape))
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

    def real(self, name: str) -> tuple[Any, str]:
        """A coordinate as float32, along its own axis only: a conversion costs four additions."""
        if name in self.plan.loaded:
            x, rank = self.coordinate(name)
            return x.astype(jnp.float32), rank
        query = name.startswith("q")
        axis = self.q_axis if query else 1 - self.q_axis
        place = plgpu.broadcasted_iota(
            jnp.int32, (self.shape[axis],), 0, layout=LAYOUT.reduce(1 - axis)
        )
        place = place + (self.q0 if query else self.k0)
        return _as_float(place), "row" if query else "column"

    def near(self, name: str) -> tuple[Any, str]:
        """A coordinate as float32, counted from that of the tile's first query."""
        query = name.startswith("q")
        axis = self.q_axis if query else 1 - self.q_axis
        if name in self.plan.loaded:
            x, rank = self.coordinate(name)
            ref = self.refs["q" + name[1:]]
            first = ref[(*_lead(ref, self.b, self.n), self.q0)]
            return (x - first).astype(jnp.float32), rank
        place = plgpu.broadcasted_iota(
            jnp.int32, (self.shape[axis],), 0, layout=LAYOUT.reduce(1 - axis)
        )
        return _as_float(place + (0 if query else self.k0 - self.q0)), "row" if query else "column"

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
            rank = plan.ranks[name]
            zero = jnp.zeros((), dtype), "scalar"
            if name in used:
                return function()
            return (zero if rank == "scalar" else (self.lift(*zero, rank), rank))

        known, near = {}, {}
        for name in sorted(body.coordinates - {"score"}):
            known[name] = entry(name, lambda n=name: self.coordinate(n), jnp.int32)
        for name in sorted(body.floats):
            known[f"float {name}"] = entry(f"float {name}", lambda n=name: self.real(n), jnp.float32)
            near[name] = entry(f"near {name}", lambda n=name: self.near(n), jnp.float32)
        handed = [
            entry(f"score{i}", lambda i=i, h=h: self.operand(f"score{i}", h.group), _traveling(h.dtype))
            for i, h in enumerate(body.handed)
        ]
        return known, near, handed

    def modified(self, s: Any, scale: float, known: Any, near: Any, handed: Any) -> tuple[Any, Any]:
        """``(scores, row)`` of logits ``scale s`` and of what ``read`` gives; row is left out."""
        body = self.plan.score
        if self.plan.diagonals is not None:
            return body(known | {"score": (s * scale, "tile")}, handed, self.lift), None
        z = evaluate(body, Sum(s, scale, {}), known, handed, near, self.lift)
        return z.settled(self.lift, but=None if self.plan.whole else "row")


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


def _lead(ref, b, n):
    """Index of row and head, 0 where all share the entry."""
    return (b if ref.shape[0] > 1 else 0, n if ref.shape[1] > 1 else 0)


def make_plan(
    *, T: int, S: int, block_q: int, block_k: int, layout: str, scale: float, score: Mod | None,
    mask: Mod, transposed: bool = False, wanted: tuple[bool, ...] = (), whole: bool = False,
) -> Plan:
    """Split score and mask, and note which coordinates must be loaded."""
    from attnlab.ops.attention.gpu_distance import diagonals

    bodies = [None if m is None else split(m.program, T, S) for m in (score, mask)]
    used = frozenset().union(*(b.coordinates | b.floats for b in bodies if b is not None))
    places = set() if layout != "full" else {"q_pos", "k_pos"}
    loaded = tuple(n for n in COORDINATE_GROUPS if n in used and n not in places)
    found = None
    if bodies[0] is not None and any(h.group == "distances" for h in bodies[0].handed):
        columns, q_axis = (block_q, 1) if transposed else (block_k, 0)
        found = diagonals(bodies[0], T, S, columns, q_axis)
    return Plan(
        T, S, block_q, block_k, layout, float(scale), bodies[0], bodies[1], loaded, found,
        transposed, wanted, whole,
    )
