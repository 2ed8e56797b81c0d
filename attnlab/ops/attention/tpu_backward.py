"""The backward kernel for TPUs: one pass over the visited tiles gives dq, dk, dv and all the rest.

Tiles are transposed, ``z[block_k, block_q]``, so that lse and delta lie along the lanes and four of
the five products need no transposition::

    p = exp2(z - lse)    dz = p (v do^T - delta)    dv += p do    dk += dz q    dq += dz^T k

A row of tiles ends with its dq. The sums dk and dv of all columns stay in VMEM while the rows and
the G query heads of a key/value head pass by; a column is written out when its last tile is done,
which overlaps the tiles that follow. Where they do not fit, the kernel runs once for each part of
the columns. The score's derivative is taken in place (``jax.vjp`` of the tile function), and the
cotangents of its handed values are summed as vectors, in float32, in the order of the steps.

Arrays: as forward; ``do[B, N, T, V]``; ``lse`` (in base 2) and ``delta`` are ``[B, N, 1, T]``.
"""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnlab.ops.attention.blocks import FULL, NONE, PARTIAL
from attnlab.ops.attention.tpu_scores import LOG2E, NEVER, Tile, folded, product
from attnlab.ops.attention.tpu_steps import (
    COLUMN_FIRST,
    COLUMN_LAST,
    FIRST,
    FLAGS,
    LAST,
    Steps,
    column_of,
    has,
    kind_of,
    part_columns,
    row_of,
)
from attnlab.ops.attention.tpu_tiles import LANES, STRIP, Plan, gathered, specs, window


def backward(
    plan: Plan, q, k, v, do, lse, delta, steps: Steps, arrays: list[jax.Array], leads, *,
    vmem: int, interpret: Any,
):
    """``(dq, dk, dv, sums)``; ``sums``: of every gradient in ``plan.grads``, see ``_sum_shape``."""
    columns = plan.columns // plan.block_k
    each = part_columns(columns, steps)
    call = functools.partial(
        _call, plan, q, k, v, do, lse, delta, steps, arrays, leads, vmem, interpret, each
    )
    table, flush, length = (jnp.asarray(x) for x in (steps.table, steps.flush, steps.length))
    zeros = tuple(
        jnp.zeros(_sum_shape(plan, group, q.shape, each)[0], jnp.float32)
        for group in plan.groups() if group == "dense"
    )
    if steps.parts == 1:
        static = not isinstance(steps.length, jax.Array)
        size = int(steps.length[0]) if static else length[0]
        dq, dk, dv, sums, dense = call(q.dtype, table[0], flush[0], size, 0, zeros)
        return dq, dk, dv, _merged(plan, sums, dense)

    def part(carry, now):
        total, dense = carry
        dq, dk, dv, sums, dense = call(jnp.float32, *now, dense)
        return (total + dq, dense), (dk, dv, sums)

    start = (jnp.zeros(q.shape, jnp.float32), zeros)
    bases = jnp.arange(steps.parts, dtype=jnp.int32) * each
    (dq, dense), (dk, dv, sums) = lax.scan(part, start, (table, flush, length, bases))
    dk, dv = (_joined(x)[:, :, : plan.columns] for x in (dk, dv))
    groups = [group for group in plan.groups() if group != "dense"]
    sums = [
        _joined(x)[:, :, :columns] if group == "columns" else x.sum(0)
        for group, x in zip(groups, sums)
    ]
    return dq.astype(q.dtype), dk, dv, _merged(plan, sums, dense)


def _joined(x):
    """``[parts, B, K, n, ...]`` to ``[B, K, parts n, ...]``."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _merged(plan: Plan, sums, dense):
    sums, dense = list(sums), list(dense)
    return [(dense if group == "dense" else sums).pop(0) for group in plan.groups()]


def _sum_shape(plan: Plan, group: str, q_shape, each: int):
    """Shape and block of the sums of a gradient, and what its place depends on.

    ========  =============================  ==========================
    heads     ``[B, N, 8, 128]``             add all
    rows      ``[B, N, 8, T]``               add the 8
    columns   ``[B, N, tiles, 8, block_k]``  add the 8
    distances ``[B, N, pieces, 8, unit]``    see ``tpu_tiles.strip``
    dense     ``[B, N, S, T]``
    ========  =============================  ==========================
    """
    lead = q_shape[:2]
    pieces = (plan.rows + plan.columns) // plan.unit
    shape, block = {
        "heads": ((STRIP, LANES), (STRIP, LANES)),
        "rows": ((STRIP, plan.rows), (STRIP, plan.block_q)),
        "columns": ((each, STRIP, plan.block_k),) * 2,
        "distances": ((pieces, STRIP, plan.unit),) * 2,
        "dense": ((plan.columns, plan.rows), (plan.block_k, plan.block_q)),
    }[group]
    return (*lead, *shape), (1, 1, *block)


def _call(
    plan, q, k, v, do, lse, delta, steps, arrays, leads, vmem, interpret, each, dq_dtype, table,
    flush, length, base, dense,
):
    B, N, _, H = q.shape
    K, V, G = k.shape[1], v.shape[-1], N // k.shape[1]
    bq, bk = plan.block_q, plan.block_k
    shared = steps.heads == 1

    def place(b, k, g, s):
        lead = (b * steps.heads if steps.batch > 1 else 0) + (0 if shared else k * G + g)
        return lead * steps.width + s

    def at(b, k, g, s, table, *_):
        e = table[place(b, k, g, s)]
        return b, k * G + g, row_of(e), column_of(e)

    def queries(*i):
        b, n, row, _ = at(*i)
        return b, n, row, 0

    def statistics(*i):
        b, n, row, _ = at(*i)
        return b, n, 0, row

    def keys(*i):
        return i[0], i[1], at(*i)[3], 0

    def finished(b, k, g, s, table, flush, _):
        here = flush[place(b, k, g, s)]
        if shared and G > 1:
            here = jnp.where(g == G - 1, here, flush[place(b, k, g, 0)])
        return b, k, here, 0

    def sums_at(group):
        def index(*i):
            b, n, row, column = at(*i)
            return {
                "rows": (b, n, 0, row), "dense": (b, n, column, row), "heads": (b, n, 0, 0),
            }.get(group, (b, n, 0, 0, 0))

        return index

    more_specs, more = specs(plan, arrays, at)
    row = pl.BlockSpec((1, 1, bq, H), queries), pl.BlockSpec((1, 1, bk, H), keys)
    in_specs = [
        *row, pl.BlockSpec((1, 1, bk, V), keys), pl.BlockSpec((1, 1, bq, V), queries),
        pl.BlockSpec((1, 1, 1, bq), statistics), pl.BlockSpec((1, 1, 1, bq), statistics),
        *more_specs, *[pl.BlockSpec(memory_space=pl.ANY) for _ in dense],
    ]
    given = [q, k, v, do, lse, delta, *more, *dense]
    groups = plan.groups()
    shapes = [_sum_shape(plan, group, q.shape, each) for group in groups]
    written = [i for i, group in enumerate(groups) if group == "dense"]
    out_shape = [
        jax.ShapeDtypeStruct(q.shape, dq_dtype),
        jax.ShapeDtypeStruct((B, K, each * bk, H), k.dtype),
        jax.ShapeDtypeStruct((B, K, each * bk, V), v.dtype),
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in shapes),
    ]
    out = pl.pallas_call(
        functools.partial(_kernel, plan, place, leads, G, shared, len(dense)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(B, K, G, length), in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((1, 1, bq, H), queries), pl.BlockSpec((1, 1, bk, H), finished),
                pl.BlockSpec((1, 1, bk, V), finished),
                *(pl.BlockSpec(block, sums_at(g)) for (_, block), g in zip(shapes, groups)),
            ],
            scratch_shapes=[
                pltpu.VMEM((bq, H), jnp.float32), pltpu.VMEM((each, bk, H), jnp.float32),
                pltpu.VMEM((each, bk, V), jnp.float32),
            ],
        ),
        out_shape=out_shape, interpret=interpret, name="attnlab_bwd",
        input_output_aliases={
            3 + len(given) - len(dense) + i: 3 + j for i, j in enumerate(written)
        },
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem, disable_bounds_checks=True,
        ),
    )(table, flush, jnp.full((1,), base, jnp.int32), *given)
    dq, dk, dv, *sums = out
    return (
        dq, dk, dv, [x for i, x in enumerate(sums) if i not in written],
        tuple(sums[i] for i in written),
    )


def _kernel(plan: Plan, place, leads, G: int, shared: bool, unread: int, table, flush, base, *refs):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *rest = refs
    groups = plan.groups()
    outputs = rest[len(rest) - 6 - len(groups) :]
    rest = rest[: len(rest) - 6 - len(groups) - unread]
    dq_ref, dk_ref, dv_ref = outputs[:3]
    sum_refs, (dq_sum, dk_sum, dv_sum) = outputs[3:-3], outputs[-3:]
    b, kv, g, s = (pl.program_id(i) for i in range(4))
    here, n = table[place(b, kv, g, s)], kv * G + g
    row, column = row_of(here), column_of(here)
    slot = column - base[0]
    tile = Tile(
        plan, gathered(plan, rest), leads, b, n, row * plan.block_q, column * plan.block_k
    )
    opens, closes = has(here, COLUMN_FIRST), has(here, COLUMN_LAST)
    if shared and G > 1:
        opens, closes = opens & (g == 0), closes & (g == G - 1)

    @pl.when(has(here, FIRST))
    def _():
        dq_sum[...] = jnp.zeros(dq_sum.shape, jnp.float32)
        for group, ref in zip(groups, sum_refs):
            if group == "rows":
                ref[...] = jnp.zeros(ref.shape, jnp.float32)

    @pl.when(opens)
    def _():
        dk_sum[slot] = jnp.zeros(dk_sum.shape[1:], jnp.float32)
        dv_sum[slot] = jnp.zeros(dv_sum.shape[1:], jnp.float32)

    whole = [ref for group, ref in zip(groups, sum_refs) if group not in ("rows", "dense")]
    if whole:
        @pl.when(s == 0)
        def _():
            for ref in whole:
                ref[...] = jnp.zeros(ref.shape, jnp.float32)

    if "dense" in groups:
        @pl.when((kind_of(here) == NONE) & (here & FLAGS != 0))
        def _():
            for group, ref in zip(groups, sum_refs):
                if group == "dense":
                    ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def visit(partial: bool):
        q, k, do = q_ref[0, 0], k_ref[0, 0], do_ref[0, 0]
        raw = product(k, q, (1, 1))
        if plan.score is None:
            z, pull = raw * (plan.scale * LOG2E), None
        else:
            z, pull = tile.scored(raw * plan.scale)
            z = z * LOG2E
        seen = tile.seen() if partial else None
        if seen is not None:
            z = jnp.where(seen, z, NEVER)
        p = jnp.exp2(z - lse_ref[0, 0])
        dp = product(v_ref[0, 0], do, (1, 1))
        dz = p * (dp - delta_ref[0, 0])
        cotangents: list[Any] = []
        if pull is not None:
            dz, cotangents = pull(dz)
            if seen is not None:  # a score may have no derivative where it is hidden
                dz = jnp.where(seen, dz, 0.0)
                cotangents = [jnp.where(seen, x, 0.0) for x in cotangents]
        dv_sum[slot] += product(p.astype(do.dtype), do, (1, 0))
        narrow = dz.astype(q.dtype)
        dk_sum[slot] += product(narrow, q, (1, 0))
        dq_sum[...] += product(narrow, k, (0, 0))
        for group, ref, x in zip(groups, sum_refs, cotangents):
            _add(plan, tile, group, ref, x, slot, row, column)

    pl.when(kind_of(here) == FULL)(lambda: visit(False))
    pl.when(kind_of(here) == PARTIAL)(lambda: visit(True))

    @pl.when(has(here, LAST))
    def _():
        dq_ref[0, 0] = (dq_sum[...] * plan.scale).astype(dq_ref.dtype)

    @pl.when(closes)
    def _():
        dk_ref[0, 0] = (dk_sum[slot] * plan.scale).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_sum[slot].astype(dv_ref.dtype)


def _add(plan: Plan, tile: Tile, group: str, ref, x, slot, row, column) -> None:
    """Add the cotangent tile ``x[block_k, block_q]`` to the sums of its group."""
    if group == "dense":
        ref[0, 0] = x
    elif group == "rows":
        ref[0, 0] += _eights(x)
    elif group == "heads":
        ref[0, 0] += _eights(folded(jnp.add, x))
    elif group == "columns":
        ref[0, 0, slot] += _eights(jnp.transpose(folded(jnp.add, x)))
    else:
        sums, first = tile.untoeplitz(x), window(plan, row, column)
        for i in range(plan.pieces):
            ref[0, 0, first + i] += sums[:, i * plan.unit : (i + 1) * plan.unit]


def _eights(x):
    """Rows ``r, r + 8, ...`` added up: ``[8, w]``."""
    parts = [x[at : at + STRIP] for at in range(0, x.shape[0], STRIP)]
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2])]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


