"""The forward kernel for TPUs: online softmax over the visited tiles of every row of tiles.

One step of the grid ``[B, K, G, steps]`` is one tile ``s[block_q, block_k]``. In base 2::

    m' = max(m, rowmax(s))    p = exp2(s - m')    l = l exp2(m - m') + p    a = a exp2(m - m') + p v
    o = a / l         lse = (m + log2 l) ln 2

``m`` is kept in every lane, ``l`` as 128 partial sums a row that are joined once at the end. A sink
logit is one more key with value 0, taken in at the end. Rows without visible key keep ``l = 0``:
their o is 0 and their lse -inf.

A *state* of earlier keys (``core.softmax``) is where m, l and a start from instead of nothing, and
what they are written to, undivided: ``m`` in natural units, -inf in rows that saw no key. Writing
it rounds m, so a and l are brought to the rounded one: the next kernel then goes on from exactly
the weights that this one meant.

Arrays: ``q[B, N, T, H]``, ``k[B, K, S, H]``, ``v[B, K, S, V]``, lengths in whole tiles; state
``(o[B, N, T, V], m[B, N, T], l[B, N, T])`` in float32.

Sources: Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135.
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
from jax.experimental.pallas import tpu as pltpu

from attnlab.ops.attention.blocks import FULL, PARTIAL
from attnlab.ops.attention.tpu_scores import (
    LOG2E,
    LOWEST,
    NEVER,
    Tile,
    folded,
    lanes,
    product,
    reciprocal,
)
from attnlab.ops.attention.tpu_steps import FIRST, LAST, Steps, column_of, has, kind_of, row_of
from attnlab.ops.attention.tpu_tiles import LANES, Plan, gathered, specs


def forward(
    plan: Plan, q, k, v, steps: Steps, arrays: list[jax.Array], leads, *, vmem: int,
    interpret: Any, state: tuple | None = None,
):
    """``(o[B, N, T, V], lse[B, N, T])``; with a ``state``, empty for none yet, the new one."""
    B, N, T, V = *q.shape[:3], v.shape[-1]
    width = _lse_width(plan)
    row = jax.ShapeDtypeStruct((B, N, 1, T) if width is None else (B, N, T, width), jnp.float32)
    out = (jax.ShapeDtypeStruct((B, N, T, V), v.dtype if state is None else jnp.float32), row)
    if state is not None:
        out += (row,)
    if state:
        state = (state[0], *(_laid(x, row.shape) for x in state[1:]))
    call = functools.partial(
        _call, plan, q, k, v, steps, arrays, leads, out, state, vmem, interpret
    )
    if steps.parts == 1:
        fixed = not isinstance(steps.length, jax.Array)
        length = int(steps.length[0]) if fixed else steps.length[0]
        o, *rows = call(jnp.asarray(steps.table[0]), length, None)
    else:
        empty = tuple(jnp.zeros(x.shape, x.dtype) for x in out)

        def part(done, table):
            return call(*table, done), None

        tables = (jnp.asarray(steps.table), jnp.asarray(steps.length))
        (o, *rows), _ = lax.scan(part, empty, tables)
    return o, *(x[:, :, 0] if width is None else x[..., 0] for x in rows)


def _laid(x, shape):
    """Numbers ``[B, N, T]`` as the kernel reads them: along the lanes or in every lane."""
    return jnp.broadcast_to(x[..., None], shape) if shape[-2] > 1 else x[:, :, None]


def _lse_width(plan: Plan) -> int | None:
    """Lanes of the lse output; None where it lies along the lanes itself."""
    return None if plan.block_q % LANES == 0 else LANES


def _call(
    plan, q, k, v, steps, arrays, leads, out, state, vmem, interpret, table, length, done
):
    B, N, _, H = q.shape
    K, V, G = k.shape[1], v.shape[-1], N // k.shape[1]

    def entry(b, k, g, s, table):
        lead = (b * steps.heads if steps.batch > 1 else 0) + (k * G + g if steps.heads > 1 else 0)
        return table[lead * steps.width + s]

    def at(b, k, g, s, table):
        e = entry(b, k, g, s, table)
        return b, k * G + g, row_of(e), column_of(e)

    def queries(*i):
        b, n, row, _ = at(*i)
        return b, n, row, 0

    def keys(*i):
        return i[0], i[1], column_of(entry(*i)), 0

    def statistics(*i):
        b, n, row, _ = at(*i)
        return (b, n, 0, row) if _lse_width(plan) is None else (b, n, row, 0)

    more_specs, more = specs(plan, arrays, at)
    bq, bk = plan.block_q, plan.block_k
    lse_block = (1, bq) if _lse_width(plan) is None else (bq, LANES)
    in_specs = [
        pl.BlockSpec((1, 1, bq, H), queries), pl.BlockSpec((1, 1, bk, H), keys),
        pl.BlockSpec((1, 1, bk, V), keys), *more_specs,
    ]
    out_specs = [pl.BlockSpec((1, 1, bq, V), queries)]
    out_specs += [pl.BlockSpec((1, 1, *lse_block), statistics)] * (len(out) - 1)
    given = [q, k, v, *more, *(state or ())]
    in_specs += out_specs if state else []
    aliases = {}
    if done is not None:
        aliases = {1 + len(given) + i: i for i in range(len(out))}
        in_specs += [pl.BlockSpec(memory_space=pl.ANY)] * len(out)
        given += done
    unread = 0 if done is None else len(out)
    kernel = functools.partial(_kernel, plan, entry, leads, G, unread)
    if state is not None:
        kernel = functools.partial(kernel, carried=bool(state))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(B, K, G, length), in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((bq, LANES), jnp.float32), pltpu.VMEM((bq, LANES), jnp.float32),
                pltpu.VMEM((bq, V), jnp.float32),
            ],
        ),
        out_shape=out, input_output_aliases=aliases, interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem, disable_bounds_checks=True,
        ),
        name="attnlab_fwd" if state is None else "attnlab_step_fwd",
    )(table, *given)


def _kernel(
    plan: Plan, entry, leads, G: int, unread: int, table, *refs, carried: bool | None = None
):
    """``carried``: whether it goes on from a state; None where it neither reads nor writes one."""
    q_ref, k_ref, v_ref, *rest = refs
    *rest, m_ref, l_ref, a_ref = rest
    outputs = 2 if carried is None else 3
    rest, (o_ref, *row_refs) = rest[:-outputs], rest[-outputs:]
    rest = rest[: len(rest) - unread]
    rest, before = (rest[:-3], rest[-3:]) if carried else (rest, None)
    b, kv, g, s = (pl.program_id(i) for i in range(4))
    here, n = entry(b, kv, g, s, table), kv * G + g
    tile = Tile(
        plan, gathered(plan, rest), leads, b, n, row_of(here) * plan.block_q,
        column_of(here) * plan.block_k,
    )
    V, along = a_ref.shape[-1], _lse_width(plan) is None
    owed: list[bool] = []  # whether scores lack what is added to a whole row

    @pl.when(has(here, FIRST))
    def _():
        if before is not None:
            _resume(before, m_ref, l_ref, a_ref, along)
            return
        m_ref[...] = jnp.full(m_ref.shape, LOWEST, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        a_ref[...] = jnp.zeros(a_ref.shape, jnp.float32)

    def visit(partial: bool):
        for start in range(0, plan.block_k, plan.chunk):
            part = dataclasses.replace(tile, columns=(start, start + plan.chunk))
            keys = pl.ds(start, plan.chunk)
            raw = product(q_ref[0, 0], k_ref[0, 0, keys], (1, 1))
            z, row = part.based(raw)
            owed.append(row is not None)
            if row is not None and carried is not None:  # a state's reference counts it
                z = z + part.lift(row, "row", "tile")
            if partial:
                z = jnp.where(part.seen(), z, NEVER)
            before = m_ref[...]
            top = jnp.maximum(before, jnp.max(folded(jnp.maximum, z), 1, keepdims=True))
            p = jnp.exp2(z - lanes(top, plan.chunk))
            shrink = jnp.exp2(before - top)
            m_ref[...] = top
            l_ref[...] = shrink * l_ref[...] + folded(jnp.add, p)
            pv = product(p.astype(v_ref.dtype), v_ref[0, 0, keys], (1, 0))
            a_ref[...] = a_ref[...] * lanes(shrink, V) + pv

    pl.when(kind_of(here) == FULL)(lambda: visit(False))
    pl.when(kind_of(here) == PARTIAL)(lambda: visit(True))

    @pl.when(has(here, LAST))
    def _():
        top, shares = m_ref[...], l_ref[...]
        total = jnp.broadcast_to(jnp.sum(shares, 1, keepdims=True), top.shape)
        if carried is not None:
            _suspend(top, total, a_ref, (o_ref, *row_refs), along)
            return
        factor = row = None
        if any(owed):  # -inf hides the row
            part = dataclasses.replace(tile, columns=(0, LANES))
            _, row = part.based(jnp.zeros((plan.block_q, LANES), jnp.float32))
            top, total = top + row, jnp.where(row > LOWEST, total, 0.0)
        if "sink" in dict(plan.names):
            logit, rank = tile.operand("sink", dict(plan.names)["sink"])
            sink = (logit if rank == "row" else tile.lift(logit, rank, "row")) * LOG2E
            both = jnp.maximum(top, sink)
            factor, top = jnp.exp2(top - both), both
            total = total * factor + jnp.exp2(sink - both)
        share = reciprocal(total)
        if row is not None and factor is None:
            share = jnp.where(row > LOWEST, share, 0.0)
        share = share if factor is None else share * factor
        o_ref[0, 0] = (a_ref[...] * lanes(share, V)).astype(o_ref.dtype)
        if along:  # few vectors to take logarithms of
            top, total = _turned(top, total)
        alive = total > 0
        lse = (top + jnp.log2(jnp.where(alive, total, 1.0))) * (1 / LOG2E)
        row_refs[0][0, 0] = jnp.where(alive, lse, -math.inf)


def _turned(a, b):
    """Two columns ``[n, 128]`` of equal lanes as rows ``[1, n]``, in one transposition."""
    lane = lax.broadcasted_iota(jnp.int32, a.shape, 1)
    both = jnp.transpose(jnp.where(lane < LANES // 2, a, b))
    return both[:1], both[LANES // 2 : LANES // 2 + 1]


def _resume(before, m_ref, l_ref, a_ref, along: bool) -> None:
    """Start from a state; l goes in equal shares to all lanes, which is exact."""
    m, l = (ref[0, 0] for ref in before[1:])
    if along:
        m, l = (jnp.transpose(jnp.broadcast_to(x, (LANES, x.shape[1]))) for x in (m, l))
    m_ref[...] = jnp.maximum(m * LOG2E, LOWEST)
    l_ref[...] = l * (1 / LANES)
    a_ref[...] = before[0][0, 0]


def _suspend(top, total, a_ref, outputs, along: bool) -> None:
    """Write the state."""
    reference = top * (1 / LOG2E)
    shift = jnp.exp2(top - reference * LOG2E)
    outputs[0][0, 0] = a_ref[...] * lanes(shift, a_ref.shape[-1])
    total = total * shift
    if along:
        reference, total = _turned(reference, total)
    outputs[1][0, 0] = jnp.where(total > 0, reference, -math.inf)
    outputs[2][0, 0] = total
