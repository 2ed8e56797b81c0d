"""The kernel for dk and dv of ``gpu_backward_wide``: one warpgroup has dv, the other dk."""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab.ops.attention import gpu_work, order
from attnlab.ops.attention.blocks import BlockLists
from attnlab.ops.attention.gpu_backward import (
    COLUMN,
    _add_products,
    _take_apart,
    _zeros,
    asked,
    pull_scores,
)
from attnlab.ops.attention.gpu_backward_wide import Config, launch
from attnlab.ops.attention.gpu_forward import COMPUTE, ROW, tiled
from attnlab.ops.attention.gpu_plan import Plan
from attnlab.ops.attention.gpu_tiles import LAYOUT, WIDTH, Tile, varying_zero

HALVES = 2


def grad_kv(
    plan: Plan, config: Config, q, k, v, do, lse, delta, lists: BlockLists, operands, *,
    interpret: Any = None,
):
    """See ``gpu_backward.grad_kv``; tiles of the lists have ``block_k = 128`` keys."""
    B, _, N, H = q.shape
    K, V = v.shape[2:]
    G, rows, dtype = N // K, lists.rows, q.dtype
    block_q, stages = config.block_q, config.stages
    shared = config.cluster and interpret is None
    names = [name for name, _ in plan.names]
    wanted = asked(plan, ("columns",))
    items = order.over_keys(q, k, v, lists, config.section)
    inputs = [q, k, v, do, lse, delta, *gpu_work.given(lists), *operands]
    sums = jax.ShapeDtypeStruct((B, N, rows * config.block_k), jnp.float32)
    outs = [
        jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype),
        *[sums for _ in wanted],
    ]
    shape = (WIDTH, block_q)

    def kernel(*refs):
        (q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref), listed, given, results = _take_apart(
            refs, (6, gpu_work.GIVEN, len(names), len(outs))
        )
        listed = gpu_work.Listed(listed)
        operand_refs = dict(zip(names, given, strict=True))

        def scoped(k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, sent, staging, kv_bar,
                   q_bar, do_bar, vector_bar, q_free, do_free, vector_free, sent_bar, sent_free):
            wg = lax.axis_index("wg")
            b, kv, r = items.place(lax.axis_index("tile"))
            k0 = listed.index(b, kv * G, r) * config.block_k + lax.axis_index("half") * WIDTH
            at = (b, pl.ds(k0, WIDTH), kv)

            def walk(step, carry, opened=lambda c: c, closed=lambda n, c: c):
                """``carry = step(i, carry, masked, n)`` over all tiles of all heads."""

                def head(g, carry):
                    n = kv * G + g
                    row = listed.row(b, n, r)
                    carry = row.full.visit(lambda i, c: step(i, c, False, n), opened(carry))
                    return closed(n, row.partial.visit(lambda i, c: step(i, c, True, n), carry))

                return lax.fori_loop(0, G, head, carry)

            def product(left, right):
                def multiply(ref):
                    plgpu.wgmma(ref, left, right.transpose((1, 0)))
                    return ref[...]

                return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

            def vector(ref, slot):
                plgpu.barrier_wait(vector_bar.at[slot])
                x = plgpu.load(ref.at[slot], layout=COLUMN, optimized=False)
                return lax.broadcast_in_dim(x, shape, (1,))

            def weights(s, i, n, lse, masked):
                """``p`` and ``pull(p)``."""

                def local(tile, s):
                    z, pull, row = pull_scores(tile, s, wanted)
                    z = z - lse
                    if row is not None:
                        z += lax.broadcast_in_dim(row, shape, (1,))
                    if masked:
                        z = jnp.where(tile.seen(), z, -jnp.inf)
                    p = jnp.exp2(z)
                    return p, *pull(p)

                tile = Tile(plan, operand_refs, b, n, i * block_q, k0, shape, q_axis=1)
                p, *factors = tile.by_kind(local, s)
                return p, factors

            def started():
                if interpret is None:
                    plgpu.set_max_registers(config.registers, action="increase")
                plgpu.barrier_wait(kv_bar)

            def finished(x, space, out):
                space[...] = x.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(space, out.at[at])
                plgpu.wait_smem_to_gmem(0)

            @pl.when(wg == 0)
            def _values():
                started()

                def step(i, carry, masked, n):
                    dv, it = carry
                    slot, zero = lax.rem(it, stages), varying_zero(i)
                    plgpu.barrier_wait(q_bar.at[slot])
                    s = product(k_smem.at[zero], q_smem.at[slot])
                    plgpu.barrier_arrive(q_free.at[slot])
                    p, (w, *_) = weights(s, i, n, vector(lse_smem, slot), masked)
                    pl.when(it > 0)(lambda: plgpu.barrier_wait(sent_free))
                    sent[...] = s if wanted else w
                    plgpu.barrier_arrive(sent_bar)
                    plgpu.barrier_arrive(vector_free.at[slot])
                    narrow = p.astype(dtype)
                    if interpret is None:
                        dv, narrow = lax.optimization_barrier((dv, narrow))
                    plgpu.barrier_wait(do_bar.at[slot])
                    (dv,) = _add_products((dv,), (narrow,), (do_smem.at[slot],), staging, 0)
                    plgpu.barrier_arrive(do_free.at[slot])
                    return dv, it + 1

                dv, it = walk(step, (_zeros((WIDTH, V), LAYOUT), jnp.int32(0)))
                # The other warpgroup has read its last tile: v is done with.
                pl.when(it > 0)(lambda: plgpu.barrier_wait(sent_free))
                finished(dv, v_smem.at[0], results[1])

            @pl.when(wg == 1)
            def _keys():
                started()

                def step(i, carry, masked, n):
                    dk, sums, it = carry
                    slot, zero = lax.rem(it, stages), varying_zero(i)
                    plgpu.barrier_wait(do_bar.at[slot])
                    dp = product(v_smem.at[zero], do_smem.at[slot])
                    plgpu.barrier_arrive(do_free.at[slot])
                    dp = dp - vector(delta_smem, slot)
                    plgpu.barrier_wait(sent_bar)
                    got = plgpu.layout_cast(sent[...], LAYOUT)
                    factors = (got,)
                    if wanted:
                        x = plgpu.load(lse_smem.at[slot], layout=COLUMN, optimized=False)
                        lse = lax.broadcast_in_dim(x, shape, (1,))
                        factors = weights(got, i, n, lse, masked)[1]
                    plgpu.barrier_arrive(sent_free)
                    plgpu.barrier_arrive(vector_free.at[slot])
                    ds, *rest = (w * dp for w in factors)
                    sums = tuple(a + x.sum(axis=1) for a, x in zip(sums, rest, strict=True))
                    narrow = ds.astype(dtype)
                    if interpret is None:
                        dk, sums, narrow = lax.optimization_barrier((dk, sums, narrow))
                    plgpu.barrier_wait(q_bar.at[slot])
                    (dk,) = _add_products((dk,), (narrow,), (q_smem.at[slot],), staging, 1)
                    plgpu.barrier_arrive(q_free.at[slot])
                    return dk, sums, it + 1

                def opened(carry):
                    return carry[0], tuple(_zeros((WIDTH,), ROW) for _ in wanted), carry[-1]

                def closed(n, carry):
                    dk, sums, it = carry
                    for out, x in zip(results[2:], sums, strict=True):
                        out[b, n, pl.ds(k0, WIDTH)] = x
                    return dk, it

                dk, _ = walk(step, (_zeros((WIDTH, H), LAYOUT), jnp.int32(0)), opened, closed)
                finished(dk * plan.scale, k_smem.at[0], results[0])

            @pl.when(wg == COMPUTE)
            def _copy():
                if interpret is None:
                    plgpu.set_max_registers(24, action="decrease")
                plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[0], kv_bar)
                plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[0], kv_bar)
                both = "half" if shared else None

                def fetch(i, it, masked, n):
                    slot = lax.rem(it, stages)
                    here = pl.ds(i * block_q, block_q)
                    for source, target, bar, free, axes in (
                        (q_ref.at[b, here, n], q_smem, q_bar, q_free, both),
                        (lse_ref.at[b, n, here], lse_smem, vector_bar, vector_free, None),
                        (delta_ref.at[b, n, here], delta_smem, vector_bar, None, None),
                        (do_ref.at[b, here, n], do_smem, do_bar, do_free, both),
                    ):
                        if free is not None:
                            pl.when(it >= stages)(
                                lambda free=free: plgpu.barrier_wait(free.at[slot])
                            )
                        plgpu.copy_gmem_to_smem(
                            source, target.at[slot], bar.at[slot], collective_axes=axes
                        )
                    return it + 1

                it = walk(fetch, jnp.int32(0))
                for free in (q_free, do_free, vector_free):
                    gpu_work.drain(free, it, stages)

        def freed():
            if not shared:
                return plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages)
            return plgpu.ClusterBarrier(
                collective_axes=("half",), num_arrivals=COMPUTE, num_barriers=stages
            )

        sent = plgpu.SMEM(
            shape, jnp.float32,
            transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
        )
        pl.run_scoped(
            scoped,
            tiled(dtype, 1, WIDTH, H), tiled(dtype, 1, WIDTH, V),
            tiled(dtype, stages, block_q, H), tiled(dtype, stages, block_q, V),
            plgpu.SMEM((stages, block_q), jnp.float32), plgpu.SMEM((stages, block_q), jnp.float32),
            sent,
            None if interpret is None else tiled(dtype, COMPUTE, WIDTH, block_q),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            freed(), freed(),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            plgpu.Barrier(), plgpu.Barrier(),
            collective_axes="wg",
        )

    return launch(kernel, outs, (B * K * rows, HALVES), inputs, interpret, cluster=shared)
