"""Forward kernel for Hopper.

A block of three warpgroups owns one tile of queries of one head. The third copies tiles of keys and
values into a ring of shared memory in the order of the block lists; each of the other two keeps 64
queries, their running maximum ``m`` and sum ``l``, and the accumulator in registers. A pair of
barriers makes the two take turns: while one multiplies, the other computes its softmax (Shah et al.
2024, arXiv 2407.08608). Full tiles run a loop without mask or index arithmetic.

FLOPs of a tile: ``4 block_q block_k H`` (H = V) on the tensor cores, ``block_q block_k``
exponentials; bytes from device memory: q, o once, k and v once a row of tiles, mostly from L2.
"""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab.ops.attention import gpu_work, order
from attnlab.ops.attention.blocks import BlockLists
from attnlab.ops.attention.gpu_plan import Plan
from attnlab.ops.attention.gpu_tiles import (
    LAYOUT,
    LOG2E,
    NEVER,
    WIDTH,
    Tile,
    load,
    positive,
    varying_zero,
)

ROW = LAYOUT.reduce(1)
COMPUTE = 2  # warpgroups


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the forward kernel.

    Args:
        block_q, block_k: tokens of a tile. stages: tiles of keys and values in flight.
        persistent: 1: blocks take one row of tiles after the other; 2: and load the queries of the
            next beside this one's, see ``gpu_work``. section: see ``order``.
    """

    block_q: int
    block_k: int
    stages: int
    registers: int = 232
    persistent: int = 0
    section: int = 0


def tiled(dtype, *shape) -> Any:
    """Shared memory in the form the tensor core and the copy engine want."""
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    )


def with_offset(tile: Tile, m, l):
    """``(m, l, factor)``: maximum and sum of a row of tiles with what its scores left out (see
    ``Tile.row_offset``) and a factor of its accumulator, 0 where that hides every key, or None."""
    offset = tile.row_offset()
    if offset is None:
        return m, l, None
    seen = offset > -jnp.inf
    factor = jnp.where(seen, 1.0, 0.0)
    return m + jnp.where(seen, offset, 0.0) * LOG2E, l * factor, factor


def forward(
    plan: Plan, config: Config, q, k, v, sink, lists: BlockLists, operands, *,
    state: bool = False, carry: Any = None, interpret: Any = None,
):
    """``(o, lse)`` of ``q[B, T, N, H]``, ``k[B, S, K, H]``, ``v[B, S, K, V]``.

    Args:
        sink: float32 ``[N]`` or None. operands: one array an entry of ``plan.names``.
        state: return the state of ``core.softmax`` instead, without a sink. carry: the state to go
            on from, or None: ``(o, m, l)`` as returned.

    Returns:
        o in the dtype of q, lse float32 ``[B, N, T']`` with T' the padded length; as a state
        ``(o, m, l)``, float32 ``[B, T', N, V]`` and twice ``[B, N, T']``: o is not divided by l,
        m is in natural units, -inf where no key was seen.
    """
    B, T, N, H = q.shape
    K, V = v.shape[2:]
    G, rows = N // K, lists.rows
    block_k, stages, dtype = config.block_k, config.stages, q.dtype
    names = [name for name, _ in plan.names]
    items = order.over_queries(q, k, v, lists, config.section)
    blocks = gpu_work.blocks(items.count, config.persistent)
    buffers = gpu_work.buffers(items, blocks, config.persistent)
    vector = jax.ShapeDtypeStruct((B, N, rows * config.block_q), jnp.float32)
    outs = [jax.ShapeDtypeStruct((B, T, N, V), dtype), vector]
    if state:
        outs = [jax.ShapeDtypeStruct((B, vector.shape[2], N, V), jnp.float32), vector, vector]
    before = [] if carry is None else list(carry)
    sinks = [] if sink is None else [sink]
    inputs = [q, k, v, *before, *sinks, *gpu_work.given(lists), *operands]

    def kernel(*refs):
        ins, results = list(refs[: len(inputs)]), refs[len(inputs) :]
        q_ref, k_ref, v_ref, *carried = ins[: 3 + len(before)]
        del ins[: 3 + len(before)]
        sink_ref = None if sink is None else ins.pop(0)
        listed = gpu_work.Listed(ins[: gpu_work.GIVEN])
        operand_refs = dict(zip(names, ins[gpu_work.GIVEN :], strict=True))

        def scoped(qo_smem, k_smem, v_smem, lse_smem, p_smem, q_bar, k_bar, v_bar, k_free, v_free,
                   turn, *box):
            q_smem, o_smem = (qo_smem, qo_smem) if H == V else qo_smem
            wg = lax.axis_index("wg")
            queue = gpu_work.Queue(items, blocks, buffers, *box, interpret)

            def swap_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def load_queries(item, buffer):
                b, n, r = queue.place(item)
                q0 = listed.index(b, n, r) * config.block_q + wg * WIDTH
                here = buffer * COMPUTE + wg
                plgpu.copy_gmem_to_smem(
                    q_ref.at[b, pl.ds(q0, WIDTH), n], q_smem.at[here, pl.ds(0, WIDTH)],
                    q_bar.at[here],
                )

            def attend(buffer, item, pull, it):
                b, n, r = queue.place(item)
                row = listed.row(b, n, r)
                here = buffer * COMPUTE + wg
                q0, end = row.index * config.block_q + wg * WIDTH, it + row.tiles

                plgpu.barrier_wait(q_bar.at[here])
                m = plgpu.layout_cast(jnp.full((WIDTH,), NEVER, jnp.float32), ROW)
                l = plgpu.layout_cast(jnp.full((WIDTH,), 0, jnp.float32), ROW)
                acc = plgpu.layout_cast(jnp.full((WIDTH, V), 0, jnp.float32), LAYOUT)
                matrix, line = (b, pl.ds(q0, WIDTH), n), (b, n, pl.ds(q0, WIDTH))
                if carried:
                    acc, m, l = (
                        load(ref.at[at], layout) for ref, at, layout in zip(
                            carried, (matrix, line, line), (LAYOUT, ROW, ROW), strict=True
                        )
                    )
                    m = jnp.maximum(m * LOG2E, NEVER)
                held = Tile(plan, operand_refs, b, n, q0, 0, (WIDTH, block_k)).hold()
                pl.when(row.tiles > 0)(lambda: plgpu.barrier_wait(k_bar.at[lax.rem(it, stages)]))
                pl.when(wg == 1)(swap_turns)

                def step(j, carry, masked):
                    acc, m, l, it = carry
                    slot = lax.rem(it, stages)
                    tile = dataclasses.replace(held, k0=j * block_k)
                    mine = q_smem.at[here + varying_zero(j), pl.ds(0, WIDTH)]

                    def multiply(ref):
                        plgpu.wgmma(ref, mine, k_smem.at[slot].transpose((1, 0)))
                        early = tile.fetched(masked) if V <= 192 else {}  # registers
                        swap_turns()
                        return ref[...], early

                    acc_s = plgpu.ACC((WIDTH, block_k), jnp.float32)
                    s, tile.early = pl.run_scoped(multiply, acc_s)
                    plgpu.barrier_arrive(k_free.at[slot])
                    unit = plan.scale * LOG2E if plan.score is None else LOG2E
                    s, unit = positive(s if plan.score is None else tile.scores(s), unit)
                    if masked:
                        s = jnp.where(tile.seen(), s, -jnp.inf)
                    top = jnp.maximum(m, s.max(axis=1) * unit)
                    alpha = jnp.exp2(m - top)
                    p = jnp.exp2(s * unit - lax.broadcast_in_dim(top, s.shape, (0,)))
                    m, l = top, l * alpha
                    acc = acc * lax.broadcast_in_dim(alpha, acc.shape, (0,))
                    narrow = p.astype(dtype)
                    l = l + p.sum(axis=1)
                    if interpret is None:
                        acc, l, m, narrow = lax.optimization_barrier((acc, l, m, narrow))
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(v_bar.at[slot])
                    plgpu.barrier_wait(turn)

                    def wait_next():
                        after = lax.rem(it + 1, stages)
                        pl.when(it + 1 < end)(lambda: plgpu.barrier_wait(k_bar.at[after]))

                    if interpret is None:

                        def add(ref):
                            plgpu.wgmma(ref, narrow, v_smem.at[slot])
                            wait_next()

                        acc = pl.run_state(add)(plgpu.ACC.init(acc))
                    else:
                        p_smem[wg] = narrow
                        plgpu.commit_smem()

                        def product(ref):
                            plgpu.wgmma(ref, p_smem.at[wg], v_smem.at[slot])
                            return ref[...]

                        acc += pl.run_scoped(product, plgpu.ACC((WIDTH, V), jnp.float32))
                        wait_next()
                    plgpu.barrier_arrive(v_free.at[slot])
                    return acc, m, l, it + 1

                carry = row.full.visit(lambda j, c: step(j, c, False), (acc, m, l, it))
                after = queue.early(pull, load_queries, buffer)
                acc, m, l, it = row.partial.visit(lambda j, c: step(j, c, True), carry)
                pl.when(wg == 0)(swap_turns)
                if state:
                    m = jnp.where(m <= NEVER, -jnp.inf, m * (1 / LOG2E))
                    for ref, at, x in zip(results, (matrix, line, line), (acc, m, l), strict=True):
                        ref[at] = x
                else:
                    store(held, acc, m, l, o_smem.at[here, pl.ds(0, WIDTH)], matrix, line)
                return queue.late(after, pull, load_queries), it

            def store(tile, acc, m, l, result, matrix, line):
                m, l, factor = with_offset(tile, m, l)
                n = tile.n
                if sink_ref is not None:
                    logit = sink_ref[n] * LOG2E
                    top = jnp.maximum(m, logit)
                    alpha = jnp.exp2(m - top)
                    l = l * alpha + jnp.exp2(logit - top)
                    acc, m = acc * lax.broadcast_in_dim(alpha, acc.shape, (0,)), top
                empty = l == 0.0
                inverse = (1.0 if factor is None else factor) / jnp.where(empty, 1.0, l)
                acc = acc * lax.broadcast_in_dim(inverse, acc.shape, (0,))
                result[...] = acc.astype(dtype)
                lse = (m + jnp.log2(jnp.where(empty, 1.0, l))) * (1 / LOG2E)
                lse_smem[wg] = jnp.where(empty, -jnp.inf, lse)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(result, results[0].at[matrix])
                plgpu.copy_smem_to_gmem(lse_smem.at[wg], results[1].at[line])

            def copy_keys(item, it):
                b, n, r = queue.place(item)
                row, kv = listed.row(b, n, r), lax.div(n, G)

                def fetch(j, it):
                    slot = lax.rem(it, stages)
                    at = (b, pl.ds(j * block_k, block_k), kv)
                    pl.when(it >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[slot], k_bar.at[slot])
                    pl.when(it >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                    plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[slot], v_bar.at[slot])
                    return it + 1

                return row.partial.visit(fetch, row.full.visit(fetch, it))

            rings = (k_free, stages), (v_free, stages)
            pl.when(wg < COMPUTE)(lambda: queue.compute(attend, load_queries, config.registers))
            pl.when(wg == COMPUTE)(lambda: queue.copy(copy_keys, rings, registers=40))

        # o takes the place of q, warpgroup by warpgroup: both must take the same room in it.
        unit = math.lcm(8 * H, 8 * V)
        room = -(-WIDTH * max(H, V) // unit) * unit
        q_space, o_space = (tiled(dtype, buffers * COMPUTE, room // w, w) for w in (H, V))
        staged_p = tiled(dtype, COMPUTE, WIDTH, block_k) if interpret is not None else None
        pl.run_scoped(
            scoped,
            q_space if H == V else plgpu.RefUnion(q_space, o_space),
            tiled(dtype, stages, block_k, H),
            tiled(dtype, stages, block_k, V),
            plgpu.SMEM((COMPUTE, WIDTH), jnp.float32),
            staged_p,
            plgpu.Barrier(num_barriers=buffers * COMPUTE),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE),
            *gpu_work.spaces(blocks < items.count, COMPUTE),
            collective_axes="wg",
        )

    keywords = {} if interpret is None else {"interpret": interpret}
    call = plgpu.kernel(
        kernel,
        out_type=outs,
        grid=(blocks,),
        grid_names=("tile",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **keywords,
    )
    return gpu_work.launched(call, blocks < items.count)(*inputs)
