"""Backward kernels for Hopper where ``max(H, V)`` is above 128: notation of ``gpu_backward``.

**dq.** As for narrow heads, but the ring of values has fewer slots than the ring of keys: a value
tile is free after ``do v^T``, a key tile only after ``ds k``. The second warpgroup multiplies
values first, so that a single slot is refilled under three products.

**dk, dv.** The two accumulators of 64 keys take ``(H + V) / 2`` registers of a thread: more than
one warpgroup has. The first warpgroup has dv, the second dk::

    first    s^T = k q^T        p = exp(mod(s) - lse)    w = pull(p)    dv += p^T do
    second   dp^T = v do^T      ds = w (dp - delta)                     dk += ds^T q

The tile ``w`` passes through shared memory in float32; ``pull`` is linear and elementwise, so that
``pull(p) (dp - delta)`` is ``pull(p (dp - delta))``. Where columns of the score want a gradient,
``s`` passes instead and both evaluate the score. Nothing is multiplied twice: 4 products a pair,
``2 (2 H + 2 V)`` FLOPs, against 5 products in two kernels of one accumulator each.

Two blocks take the two halves of a row of 128 keys. They read the same tiles of queries, each half
of every tile for both (multicast in a cluster): bytes from L2 a tile of 64 queries and 64 keys are
``64 (H + V)`` instead of ``128 (H + V)``, for ``8 64^2 (H + V)`` FLOPs.

Floor of both kernels: ``2 (2 H + V) + 2 (2 H + 2 V)`` FLOPs a pair (7 products at H = V; 5 would
need sums across blocks, whose order is not fixed).
"""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab.ops.attention import gpu_work, order
from attnlab.ops.attention.blocks import BlockLists
from attnlab.ops.attention.gpu_backward import (
    _add_products,
    _take_apart,
    _zeros,
    gradient_tables,
    row_cotangents,
    row_vectors,
)
from attnlab.ops.attention.gpu_dense import clear_absent
from attnlab.ops.attention.gpu_forward import COMPUTE, ROW, tiled
from attnlab.ops.attention.gpu_plan import Plan
from attnlab.ops.attention.gpu_tiles import LAYOUT, WIDTH, Tile, varying_zero


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a kernel.

    Args:
        block_q, block_k: tokens of a tile of the block lists. stages: tiles of keys (dq) or of
            queries (dk, dv) in flight. stages_v: tiles of values in flight (dq).
        cluster: the two blocks of a row of keys share what they load (dk, dv). turns: the two
            warpgroups take turns on the tensor cores (dq) or run as they come. persistent (dq),
            section: see ``gpu_forward.Config``.
    """

    block_q: int
    block_k: int
    stages: int
    stages_v: int = 1
    cluster: bool = True
    turns: bool = True
    registers: int = 232
    persistent: int = 0
    section: int = 0


def grad_q(
    plan: Plan, config: Config, q, k, v, do, lse, delta, lists: BlockLists, operands, *,
    interpret: Any = None,
):
    """See ``gpu_backward.grad_q``."""
    B, _, N, H = q.shape
    K, V = v.shape[2:]
    G, rows, dtype = N // K, lists.rows, q.dtype
    block_k, stages, stages_v = config.block_k, config.stages, config.stages_v
    names = [name for name, _ in plan.names]
    totals = row_vectors(plan)
    items = order.over_queries(q, k, v, lists, config.section)
    blocks = gpu_work.blocks(items.count, config.persistent)
    buffers = gpu_work.buffers(items, blocks, config.persistent)
    inputs = [q, k, v, do, lse, delta, *gpu_work.given(lists), *operands]
    sums = jax.ShapeDtypeStruct((B, N, rows * config.block_q), jnp.float32)
    tables = gradient_tables(plan, B, N)
    outs = [jax.ShapeDtypeStruct(q.shape, dtype), *[sums] * totals, *tables]

    def kernel(*refs):
        (q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref), listed, given, results = _take_apart(
            refs, (6, gpu_work.GIVEN, len(names), len(outs))
        )
        listed = gpu_work.Listed(listed)
        table_refs = results[len(results) - len(tables) :]
        operand_refs = dict(zip(names, given, strict=True))

        def scoped(q_smem, do_smem, k_smem, v_smem, staging, q_bar, k_bar, v_bar, k_free, v_free,
                   turn, *box):
            wg = lax.axis_index("wg")
            queue = gpu_work.Queue(items, blocks, buffers, *box, interpret)

            def swap_turns():
                if config.turns:
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(turn)

            def load_queries(me: int, item, buffer):
                b, n, r = queue.place(item)
                own = buffer * COMPUTE + me
                at = (b, pl.ds(listed.index(b, n, r) * config.block_q + me * WIDTH, WIDTH), n)
                plgpu.copy_gmem_to_smem(q_ref.at[at], q_smem.at[own], q_bar.at[own])
                plgpu.copy_gmem_to_smem(do_ref.at[at], do_smem.at[own], q_bar.at[own])

            def grad(me: int, buffer, item, pull, it):
                b, n, r = queue.place(item)
                row, own = listed.row(b, n, r), buffer * COMPUTE + me
                load = functools.partial(load_queries, me)
                q0 = row.index * config.block_q + me * WIDTH
                at = (b, pl.ds(q0, WIDTH), n)
                vector = (b, n, pl.ds(q0, WIDTH))
                lse, delta = (
                    plgpu.load(x.at[vector], layout=ROW, optimized=False)
                    for x in (lse_ref, delta_ref)
                )
                here = Tile(plan, operand_refs, b, n, q0, 0, (WIDTH, block_k)).hold()
                plgpu.barrier_wait(q_bar.at[own])
                if me == 1:
                    swap_turns()

                def step(j, carry, masked):
                    dq, sums, it = carry
                    zero = varying_zero(j)
                    slot, slot_v = lax.rem(it, stages), lax.rem(it, stages_v) + zero
                    shape, mine = (WIDTH, block_k), own + zero

                    def scope(s_ref, dp_ref):
                        def values():
                            plgpu.barrier_wait(v_bar.at[slot_v])
                            right = v_smem.at[slot_v].transpose((1, 0))
                            plgpu.wgmma(dp_ref, do_smem.at[mine], right)

                        if me == 1:
                            values()
                        plgpu.barrier_wait(k_bar.at[slot])
                        plgpu.wgmma(s_ref, q_smem.at[mine], k_smem.at[slot].transpose((1, 0)))
                        if me == 0:
                            values()
                        swap_turns()
                        if me == 1:
                            if interpret is None:
                                plgpu.wgmma_wait(1)
                            plgpu.barrier_arrive(v_free.at[slot_v])
                        return s_ref[...], dp_ref[...]

                    acc = plgpu.ACC(shape, jnp.float32)
                    s, dp = pl.run_scoped(scope, acc, acc)
                    if me == 0:
                        plgpu.barrier_arrive(v_free.at[slot_v])
                    tile = dataclasses.replace(here, k0=j * block_k)

                    narrow, sums = row_cotangents(
                        tile, s, dp, lse, delta, sums, masked, dtype, table_refs
                    )
                    if interpret is None:
                        dq, sums, narrow = lax.optimization_barrier((dq, sums, narrow))
                    swap_turns()
                    (dq,) = _add_products((dq,), (narrow,), (k_smem.at[slot],), staging, me)
                    plgpu.barrier_arrive(k_free.at[slot])
                    return dq, sums, it + 1

                carry = (
                    _zeros((WIDTH, H), LAYOUT),
                    tuple(_zeros((WIDTH,), ROW) for _ in range(totals)), it,
                )
                carry = row.full.visit(lambda j, c: step(j, c, False), carry)
                after = queue.early(pull, load, buffer)
                dq, sums, it = row.partial.visit(lambda j, c: step(j, c, True), carry)
                if me == 0:
                    swap_turns()
                q_smem[own] = (dq * plan.scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_smem.at[own], results[0].at[at])
                for out, x in zip(results[1 : 1 + totals], sums, strict=True):
                    out[vector] = x
                return queue.late(after, pull, load), it

            def copy_keys(item, it):
                b, n, r = queue.place(item)
                row, kv = listed.row(b, n, r), lax.div(n, G)

                def fetch(j, it):
                    at = (b, pl.ds(j * block_k, block_k), kv)
                    for source, target, bar, free, size in (
                        (k_ref, k_smem, k_bar, k_free, stages),
                        (v_ref, v_smem, v_bar, v_free, stages_v),
                    ):
                        slot = lax.rem(it, size)
                        pl.when(it >= size)(
                            lambda free=free, slot=slot: plgpu.barrier_wait(free.at[slot])
                        )
                        plgpu.copy_gmem_to_smem(source.at[at], target.at[slot], bar.at[slot])
                    return it + 1

                it = row.partial.visit(fetch, row.full.visit(fetch, it))
                clear_absent(table_refs, row, b, n, (config.block_q, block_k), LAYOUT)
                return it

            for me in range(COMPUTE):
                work = (functools.partial(f, me) for f in (grad, load_queries))
                pl.when(wg == me)(lambda work=work: queue.compute(*work, config.registers))
            rings = (k_free, stages), (v_free, stages_v)
            pl.when(wg == COMPUTE)(lambda: queue.copy(copy_keys, rings, registers=24))

        pl.run_scoped(
            scoped,
            tiled(dtype, buffers * COMPUTE, WIDTH, H), tiled(dtype, buffers * COMPUTE, WIDTH, V),
            tiled(dtype, stages, block_k, H), tiled(dtype, stages_v, block_k, V),
            None if interpret is None else tiled(dtype, COMPUTE, WIDTH, block_k),
            plgpu.Barrier(num_arrivals=2, num_barriers=buffers * COMPUTE),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages_v),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages_v),
            plgpu.Barrier(num_arrivals=COMPUTE),
            *gpu_work.spaces(blocks < items.count, COMPUTE),
            collective_axes="wg",
        )

    return launch(kernel, outs, (blocks,), inputs, interpret, counts=blocks < items.count)


def launch(
    kernel, outs, grid, inputs, interpret, cluster: bool = False, counts: bool = False
):
    """Run ``kernel`` on blocks of three warpgroups, ``grid = (tiles,)`` or ``(tiles, 2)``: the
    last axis, ``half``, is a cluster if asked for (not in the interpreter). Sums along a row of a
    tile stay inside four threads: no scratch is reserved for them. counts: ``gpu_work.launched``.
    """
    keywords: dict[str, Any] = {} if interpret is None else {"interpret": interpret}
    names = ("tile", "half")[: len(grid)]
    if cluster and interpret is None:
        keywords |= dict(cluster=grid[1:], cluster_names=names[1:])
        grid, names = grid[:1], names[:1]
    call = plgpu.kernel(
        kernel, out_type=outs, grid=grid, grid_names=names, num_threads=COMPUTE + 1,
        thread_name="wg", **keywords,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
    return gpu_work.launched(call, counts)(*inputs)
