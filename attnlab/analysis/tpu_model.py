"""The static cycle model: time of a TPU kernel from its schedule, without running anything.

    cycles = steps * overhead + sum over executed tiles of their bundles + rows * (init + flush)
    seconds = max(cycles / clock / efficiency, HBM bytes / bandwidth)

A *tile* is the innermost predicated region (or loop body) with matrix products: one of them serves
every visible tile; of several, the cheapest serves full tiles and the dearest partial ones. Regions
without matrix products run once a row of tiles. What is left of the grid loop is the overhead of
every step, skipped tiles included. No constant is fitted, but see ``Target.efficiency``. Copies
are taken to overlap with compute; branches that depend on data inside a tile count in full.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from attnlab.analysis.targets import Target
from attnlab.analysis.tpu_schedule import Node, Schedule
from attnlab.core.errors import DataError
from attnlab.ops.attention.shapes import Shape
from attnlab.ops.attention.tuning import Tile

ROLES = ("dkv", "dq", "forward")
PIPELINE = 2  # steps that the software pipeline adds to the loop over the grid
LANES = 128


@dataclasses.dataclass(frozen=True)
class Launch:
    """A Pallas call as traced.

    Args:
        name: of the kernel. steps: product of its grid, None where it depends on data.
        times: how often the program runs it. parallel: a grid dimension may be shared by cores.
    """

    name: str
    steps: int | None
    times: int = 1
    parallel: bool = False

    @property
    def role(self) -> str:
        """forward, dq or dkv (which also names a fused backward), by the kernel's name."""
        name = self.name.lower()
        for role, words in (
            ("dkv", ("dkv", "bwd", "backward")), ("dq", ("dq",)), ("forward", ("fwd", "forward"))
        ):
            if any(word in name for word in words):
                return role
        raise DataError(
            f"kernel {self.name!r}", "its name tells no role",
            "name kernels with fwd, dq, dkv or bwd in it",
        )


@dataclasses.dataclass(frozen=True)
class Work:
    """What the tiles of one kernel amount to for one shape: counts over all rows and heads.

    Args:
        full, partial: tiles that see everything or something. rows: rows of tiles.
        hbm_bytes: read and written, with widths padded to 128 lanes.
    """

    full: int
    partial: int
    rows: int
    hbm_bytes: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The model's answer for one kernel.

    Args:
        name, role: see ``Launch``. steps: of the grid. cores: that share them. full, partial:
            bundles of such a tile. overhead: bundles of every step. row: bundles once a row of
            tiles. spills: spill stores in the kernel's code. mxu: share of the matrix units'
            issue slots over the kernel's cycles. seconds, hbm_seconds: time, and the part that
            memory alone would take.
    """

    name: str
    role: str
    steps: int
    cores: int
    full: int
    partial: int
    overhead: int
    row: int
    spills: int
    mxu: float
    seconds: float
    hbm_seconds: float

    def row_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def launches(jaxpr: Any, times: int = 1) -> list[Launch]:
    """Every Pallas call of a jaxpr, in order, also inside scans and calls."""
    found: list[Launch] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            grid = eqn.params["grid_mapping"].grid
            static = all(isinstance(size, int) for size in grid)
            name = eqn.params["name_and_src_info"].name if "name_and_src_info" in eqn.params else (
                eqn.params["name"]
            )
            parallel = "parallel" in str(eqn.params.get("compiler_params", "")).lower()
            found.append(Launch(name, math.prod(grid) if static else None, times, parallel))
            continue
        repeats = times * int(eqn.params["length"]) if eqn.primitive.name == "scan" else times
        for inner in _inner(eqn.params.values()):
            found += launches(inner, repeats)
    return found


def _inner(values: Iterable[Any]):
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _inner(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(getattr(value, "jaxpr", None), "eqns"):
            yield value.jaxpr


def work(shape: Shape, role: str, tile: Tile) -> Work:
    """The tiles of ``shape`` for the kernel with this role."""
    first_q = np.arange(0, shape.T, tile.q)[:, None]
    first_k = np.arange(0, shape.T, tile.kv)[None, :]
    last_q = np.minimum(first_q + tile.q, shape.T) - 1
    last_k = np.minimum(first_k + tile.kv, shape.T) - 1
    some = np.ones((first_q.size, first_k.size), bool)
    every = some.copy()
    if shape.causal:
        some &= first_k <= last_q
        every &= last_k <= first_q
    if shape.window is not None:
        some &= last_k > first_q - shape.window
        every &= first_k > last_q - shape.window
    heads = shape.B * shape.N // tile.heads
    count, full = int(some.sum()) * heads, int((some & every).sum()) * heads
    width = sum(math.ceil(w / LANES) * LANES for w in (shape.H, shape.V)) * 2  # bytes a token, bf16
    # forward: k, v a tile; q, o once. dq: the same with do, dq. dkv: q, do a tile; k, v, dk, dv.
    streamed = count * (tile.q * tile.heads if role == "dkv" else tile.kv) * width
    kept = {"forward": shape.N, "dq": 2 * shape.N, "dkv": 2 * shape.K}[role]
    rows = shape.B * shape.K * first_k.size if role == "dkv" else heads * first_q.size
    return Work(full, count - full, rows, streamed + shape.B * shape.T * kept * width)


def visible_pairs(shape: Shape) -> int:
    """Pairs of query and key that see each other, in one row and head."""
    seen = np.arange(1, shape.T + 1) if shape.causal else np.full(shape.T, shape.T)
    return int(seen.sum() if shape.window is None else np.minimum(seen, shape.window).sum())


def flops(shape: Shape, direction: str) -> float:
    """Useful FLOPs: QK and PV forward, five products backward (no credit for recomputation)."""
    forward = 2.0 * shape.B * shape.N * visible_pairs(shape) * (shape.H + shape.V)
    if direction == "forward":
        return forward
    return forward + 2.0 * shape.B * shape.N * visible_pairs(shape) * (3 * shape.H + 2 * shape.V)


def predict(schedule: Schedule, launch: Launch, work: Work, target: Target) -> Prediction:
    """The time of one kernel of the shape that ``work`` was counted for.

    Raises:
        DataError: the schedule holds no matrix product, or its loop and the grid disagree.
    """
    grid = schedule.grid() or schedule.root
    unit = schedule.matrix_unit
    has = lambda node: schedule.use(unit, node) > 0  # noqa: E731
    tiles = _tiles(grid, has)
    if not tiles:
        raise DataError(
            f"kernel {schedule.name}", "its schedule holds no matrix product",
            "the static model reads attention kernels only",
        )
    inside = {id(node) for tile in tiles for node in tile.walk()}
    around = [
        node for node in grid.walk()
        if node is not grid and not node.loop and id(node) not in inside and not has(node)
    ]
    nested = {id(child) for node in around for child in node.walk() if child is not node}
    once = [node for node in around if id(node) not in nested]
    lengths = sorted((_cycles(tile), tile.bundles, schedule.use(unit, tile)) for tile in tiles)
    cheap, dear = lengths[0], lengths[-1]
    row = sum(_cycles(node) for node in once)
    whole_step = tiles == [grid]
    overhead = 0 if whole_step else (
        grid.bundles - sum(t.bundles for t in tiles) - sum(n.bundles for n in once)
    )
    steps, cores = _steps(launch, grid, work, target, schedule.name)
    cycles = steps * overhead + work.full * cheap[0] + work.partial * dear[0] + work.rows * row
    slots = work.full * cheap[2] + work.partial * dear[2]
    hbm = work.hbm_bytes / target.bandwidth
    seconds = max(cycles / cores / target.clock / target.efficiency, hbm)
    return Prediction(
        schedule.name, launch.role, steps, cores, cheap[0], dear[0], overhead, row,
        schedule.use("VSTORE:SPILL", schedule.root),
        slots / max(1, cycles * schedule.capacity.get(unit, 1)),
        seconds * launch.times, hbm * launch.times,
    )


def _tiles(node: Node, has) -> list[Node]:
    """Innermost regions with matrix products; plain loops of known length belong to theirs."""

    def plain(child: Node) -> bool:
        regions = any(has(below) for below in child.walk() if not below.loop)
        return child.loop and child.trips is not None and not regions

    deeper = [
        tile for child in node.children if has(child) and not plain(child)
        for tile in _tiles(child, has)
    ]
    return deeper or ([node] if has(node) else [])


def _cycles(node: Node) -> int:
    """Bundles of one pass, inner loops of known length repeated."""
    extra = sum(
        (child.trips - 1) * _cycles(child) if child.loop and child.trips else 0
        for child in node.children
    )
    return node.bundles + extra


def _steps(launch: Launch, grid: Node, work: Work, target: Target, name: str) -> tuple[int, int]:
    """Grid steps and the cores that share them (the compiler halves the loop on two-core chips)."""
    if launch.steps is None:  # compact lists: one step a visible tile
        return work.full + work.partial, target.cores if launch.parallel else 1
    if not grid.loop or grid.trips is None:
        return launch.steps, 1
    mine = grid.trips - PIPELINE
    for cores in range(1, target.cores + 1):
        if mine > 0 and launch.steps <= mine * cores < launch.steps * 1.5:
            return launch.steps, cores
    raise DataError(
        f"kernel {name}: a grid of {launch.steps} steps, a loop of {mine}", "they disagree",
        "use the libtpu of the extra aot",
    )
