"""Forward kernel for Hopper where a head is wider than 256: absorbed latent attention, 576 / 512.

The accumulator of 64 queries, ``64 V`` floats, is more than one warpgroup holds: two warpgroups
own half of the value columns each. The first also computes logits and softmax, once for both, and
hands over ``p`` (in the dtype of q) and the factor ``alpha`` through shared memory::

    first    s = mod(q k^T)    m' = max(m, rowmax(s))    alpha = exp(m - m')    p = exp(s - m')
    both     o[:, half] = alpha o[:, half] + p v[:, half]

The first starts on the next tile while the second multiplies. If the values are the first V
columns of the keys (``value_is_prefix``), a tile is read once: 72 KB and two slots at 576 / 512;
else keys and values have one slot each, and 136 KB pass for the same ``2 64^2 (H + V)`` FLOPs.

Two blocks of a cluster take the halves of a row of 128 queries. They read the same tiles of keys,
each half of every tile for both (multicast): bytes from L2 a tile of 64 keys and 64 queries are
``64 H`` with ``value_is_prefix``, else ``64 (H + V)``.

FLOPs of a pair: ``2 (H + V)``, the floor; one exponential. There is no backward kernel: dk and dv
of 64 keys at 576 / 512 are 272 KB of accumulators, more than the registers of a multiprocessor.
"""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab.ops.attention import gpu_work, order
from attnlab.ops.attention.blocks import BlockLists
from attnlab.ops.attention.gpu_backward import _take_apart, _zeros
from attnlab.ops.attention.gpu_backward_wide import launch
from attnlab.ops.attention.gpu_forward import COMPUTE, ROW, tiled, with_offset
from attnlab.ops.attention.gpu_plan import Plan
from attnlab.ops.attention.gpu_tiles import LAYOUT, LOG2E, NEVER, WIDTH, Tile, varying_zero

HALVES = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel.

    Args:
        block_q, block_k: tokens of a tile of the block lists; ``block_q = 128``. stages: tiles of
            keys in flight. stages_v: tiles of values. cluster: the two blocks of a row of queries
            share what they load. value_is_prefix: ``v = k[..., :V]``, and v is not read.
            section: see ``gpu_forward.Config``.
    """

    block_q: int
    block_k: int
    stages: int
    stages_v: int = 1
    cluster: bool = True
    value_is_prefix: bool = False
    registers: int = 232
    section: int = 0


def forward(
    plan: Plan, config: Config, q, k, v, sink, lists: BlockLists, operands, *,
    interpret: Any = None,
):
    """See ``gpu_forward.forward``; V is a multiple of 128."""
    B, T, N, H = q.shape
    K, V = v.shape[2:]
    G, rows, dtype, half = N // K, lists.rows, q.dtype, V // 2
    block_k, stages, prefix = config.block_k, config.stages, config.value_is_prefix
    stages_v = stages if prefix else config.stages_v
    shared = config.cluster and interpret is None
    shape = (WIDTH, block_k)
    names = [name for name, _ in plan.names]
    outs = [
        jax.ShapeDtypeStruct((B, T, N, V), dtype),
        jax.ShapeDtypeStruct((B, N, rows * config.block_q), jnp.float32),
    ]
    tensors = [q, k, *([] if prefix else [v]), *([] if sink is None else [sink])]
    items = order.over_queries(q, k, None if prefix else v, lists, config.section)
    inputs = [*tensors, *gpu_work.given(lists), *operands]

    def kernel(*refs):
        ins, listed, given, (o_ref, lse_ref) = _take_apart(
            refs, (len(tensors), gpu_work.GIVEN, len(names), len(outs))
        )
        q_ref, k_ref, *ins = ins
        v_ref = None if prefix else ins.pop(0)
        sink_ref = ins[0] if ins else None
        listed = gpu_work.Listed(listed)
        operand_refs = dict(zip(names, given, strict=True))

        def scoped(qo_smem, k_smem, v_smem, p_smem, factor_smem, lse_smem, q_bar, k_bar, v_bar,
                   k_free, v_free, p_bar, p_free):
            q_smem, o_smem = qo_smem
            wg = lax.axis_index("wg")
            b, n, r = items.place(lax.axis_index("tile"))
            row = listed.row(b, n, r)
            q0 = row.index * config.block_q + lax.axis_index("half") * WIDTH

            def rescaled(acc, factor):
                return acc * lax.broadcast_in_dim(factor, acc.shape, (0,))

            def add_values(acc, it, me: int):
                """``acc + p v`` of the columns of this warpgroup; p and the tile are then free."""
                slot = lax.rem(it, stages_v)
                if not prefix:
                    plgpu.barrier_wait(v_bar.at[slot])
                source = k_smem if prefix else v_smem
                right = source.at[slot, pl.ds(0, block_k), pl.ds(me * half, half)]
                if interpret is None:
                    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p_smem, right))(
                        plgpu.ACC.init(acc)
                    )
                else:

                    def product(ref):
                        plgpu.wgmma(ref, p_smem, right)
                        return ref[...]

                    acc += pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))
                if me == 1:
                    plgpu.barrier_arrive(p_free)
                plgpu.barrier_arrive((k_free if prefix else v_free).at[slot])
                return acc

            def finished(acc, inverse, me: int):
                """Normalise and write the columns of this warpgroup."""
                out = o_smem.at[me, pl.ds(0, WIDTH)]
                out[...] = rescaled(acc, inverse).astype(dtype)
                plgpu.commit_smem()
                at = (b, pl.ds(q0, WIDTH), n, pl.ds(me * half, half))
                plgpu.copy_smem_to_gmem(out, o_ref.at[at])
                plgpu.wait_smem_to_gmem(0)

            @pl.when(wg == 0)
            def _first():
                if interpret is None:
                    plgpu.set_max_registers(config.registers, action="increase")
                here = Tile(plan, operand_refs, b, n, q0, 0, shape).hold()
                plgpu.barrier_wait(q_bar)

                def step(j, carry, masked):
                    acc, m, l, it = carry
                    slot, zero = lax.rem(it, stages), varying_zero(j)
                    plgpu.barrier_wait(k_bar.at[slot])

                    def multiply(ref):
                        keys = k_smem.at[slot + zero].transpose((1, 0))
                        plgpu.wgmma(ref, q_smem.at[zero], keys)
                        return ref[...]

                    s = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                    if not prefix:
                        plgpu.barrier_arrive(k_free.at[slot])
                    tile = dataclasses.replace(here, k0=j * block_k)
                    plain = plan.score is None
                    s = s * (plan.scale * LOG2E) if plain else tile.scores(s) * LOG2E
                    if masked:
                        s = jnp.where(tile.seen(), s, -jnp.inf)
                    top = jnp.maximum(m, s.max(axis=1))
                    alpha = jnp.exp2(m - top)
                    p = jnp.exp2(s - lax.broadcast_in_dim(top, shape, (0,)))
                    l = l * alpha + p.sum(axis=1)
                    pl.when(it > 0)(lambda: plgpu.barrier_wait(p_free))
                    p_smem[...] = p.astype(dtype)
                    factor_smem[...] = alpha
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(p_bar)
                    return add_values(rescaled(acc, alpha), it, 0), top, l, it + 1

                carry = (
                    _zeros((WIDTH, half), LAYOUT),
                    plgpu.layout_cast(jnp.full((WIDTH,), NEVER, jnp.float32), ROW),
                    _zeros((WIDTH,), ROW), jnp.int32(0),
                )
                carry = row.full.visit(lambda j, c: step(j, c, False), carry)
                acc, m, l, it = row.partial.visit(lambda j, c: step(j, c, True), carry)
                m, l, factor = with_offset(here, m, l)
                if sink_ref is not None:
                    logit = sink_ref[n] * LOG2E
                    top = jnp.maximum(m, logit)
                    alpha = jnp.exp2(m - top)
                    l, m = l * alpha + jnp.exp2(logit - top), top
                    factor = alpha if factor is None else alpha * factor
                empty = l == 0.0
                l = jnp.where(empty, 1.0, l)
                inverse = (1.0 if factor is None else factor) / l
                pl.when(it > 0)(lambda: plgpu.barrier_wait(p_free))
                factor_smem[...] = inverse
                lse = (m + jnp.log2(l)) * (1 / LOG2E)
                lse_smem[...] = jnp.where(empty, -jnp.inf, lse)
                plgpu.commit_smem()
                plgpu.barrier_arrive(p_bar)
                plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[b, n, pl.ds(q0, WIDTH)])
                finished(acc, inverse, 0)

            @pl.when(wg == 1)
            def _second():
                if interpret is None:
                    plgpu.set_max_registers(config.registers, action="increase")

                def received():
                    plgpu.barrier_wait(p_bar)
                    return plgpu.load(factor_smem, layout=ROW, optimized=False)

                def step(j, carry):
                    acc, it = carry
                    return add_values(rescaled(acc, received()), it, 1), it + 1

                carry = _zeros((WIDTH, half), LAYOUT), jnp.int32(0)
                acc, _ = row.partial.visit(step, row.full.visit(step, carry))
                finished(acc, received(), 1)

            @pl.when(wg == COMPUTE)
            def _copy():
                if interpret is None:
                    plgpu.set_max_registers(24, action="decrease")
                kv = lax.div(n, G)
                plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(q0, WIDTH), n], q_smem.at[0], q_bar)
                both = "half" if shared else None
                rings = [(k_ref, k_smem, k_bar, k_free, stages)]
                if not prefix:
                    rings.append((v_ref, v_smem, v_bar, v_free, stages_v))

                def fetch(j, it):
                    at = (b, pl.ds(j * block_k, block_k), kv)
                    for source, target, bar, free, size in rings:
                        slot = lax.rem(it, size)
                        pl.when(it >= size)(
                            lambda free=free, slot=slot: plgpu.barrier_wait(free.at[slot])
                        )
                        plgpu.copy_gmem_to_smem(
                            source.at[at], target.at[slot], bar.at[slot], collective_axes=both
                        )
                    return it + 1

                it = row.partial.visit(fetch, row.full.visit(fetch, jnp.int32(0)))
                for *_, free, size in rings:
                    gpu_work.drain(free, it, size)

        def free(arrivals: int, size: int):
            if not shared:
                return plgpu.Barrier(num_arrivals=arrivals, num_barriers=size)
            return plgpu.ClusterBarrier(
                collective_axes=("half",), num_arrivals=arrivals, num_barriers=size
            )

        pl.run_scoped(
            scoped,
            plgpu.RefUnion(tiled(dtype, 1, WIDTH, H), tiled(dtype, COMPUTE, WIDTH, half)),
            tiled(dtype, stages, block_k, H),
            None if prefix else tiled(dtype, stages_v, block_k, V),
            tiled(dtype, WIDTH, block_k),
            plgpu.SMEM((WIDTH,), jnp.float32), plgpu.SMEM((WIDTH,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages_v),
            free(COMPUTE if prefix else 1, stages),
            None if prefix else free(COMPUTE, stages_v),
            plgpu.Barrier(), plgpu.Barrier(),
            collective_axes="wg",
        )

    return launch(kernel, outs, (B * N * rows, HALVES), inputs, interpret, cluster=shared)
