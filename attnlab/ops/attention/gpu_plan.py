"""What a Hopper kernel is specialised to, and the operands that its score and mask read."""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from attnlab.core.mask import Coords
from attnlab.core.mods import Mod
from attnlab.core.staging import Body, split
from attnlab.ops.attention.affine import Sum, evaluate

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
        kinds |= {f"score{i}": traveling(h.dtype) for i, h in enumerate(body.handed)}
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


def traveling(dtype: str) -> str:
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
