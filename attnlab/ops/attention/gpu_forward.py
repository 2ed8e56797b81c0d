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

from attnlab.ops.attention.blocks import BlockLists, Runs
from attnlab.ops.attention.gpu_plan import Plan
from attnlab.ops.attention.gpu_tiles import LAYOUT, LOG2E, NEVER, WIDTH, Tile, load

ROW = LAYOUT.reduce(1)
COMPUTE = 2  # warpgroups


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the forward kernel. stages: tiles of keys and values in flight."""

    block_q: int
    block_k: int
    stages: int
    registers: int = 232


def tiled(dtype, *shape) -> Any:
    """Shared memory in the form the tensor core and the copy engine want."""
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    )


def visit(runs: Runs, b, n, row, step, carry):
    """``carry = step(tile, carry)`` over the tiles of a row, in order."""
    b, n = (b if runs.start.shape[0] > 1 else 0), (n if runs.start.shape[1] > 1 else 0)
    start, number = runs.start[b, n, row], runs.number[b, n, row]

    def run(e, carry):
        first, count = runs.first[b, n, e], runs.count[b, n, e]
        return lax.fori_loop(0, count, lambda i, c: step(first + i, c), carry)

    return lax.fori_loop(start, start + number, run, carry)


def drain(free, used, stages: int):
    """Wait until the consumers have freed every slot of a ring that was ``used`` so many times."""
    for slot in range(stages):
        pl.when(used > slot)(lambda slot=slot: plgpu.barrier_wait(free.at[slot]))


def total(runs: Runs, b, n, row):
    """Tiles in a row."""
    b, n = (b if runs.start.shape[0] > 1 else 0), (n if runs.start.shape[1] > 1 else 0)
    return runs.blocks[b, n, row]


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
    plan: Plan, config: Config, q, k, v, sink, lists: BlockLists, order, operands, *,
    state: bool = False, carry: Any = None, interpret: Any = None,
):
    """``(o, lse)`` of ``q[B, T, N, H]``, ``k[B, S, K, H]``, ``v[B, S, K, V]``.

    Args:
        sink: float32 ``[N]`` or None. order: int32 ``[rows]``, rows of tiles, longest first.
        operands: one array an entry of ``plan.names``.
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
    leaves, tree = jax.tree.flatten(lists)
    vector = jax.ShapeDtypeStruct((B, N, rows * config.block_q), jnp.float32)
    outs = [jax.ShapeDtypeStruct((B, T, N, V), dtype), vector]
    if state:
        outs = [jax.ShapeDtypeStruct((B, vector.shape[2], N, V), jnp.float32), vector, vector]
    before = [] if carry is None else list(carry)
    inputs = [q, k, v, *before, *([] if sink is None else [sink]), order, *leaves, *operands]

    def kernel(*refs):
        ins, results = list(refs[: len(inputs)]), refs[len(inputs) :]
        q_ref, k_ref, v_ref, *carried = ins[: 3 + len(before)]
        del ins[: 3 + len(before)]
        sink_ref = None if sink is None else ins.pop(0)
        order_ref = ins.pop(0)
        block_lists = jax.tree.unflatten(tree, ins[: len(leaves)])
        operand_refs = dict(zip(names, ins[len(leaves) :], strict=True))

        def scoped(qo_smem, k_smem, v_smem, lse_smem, p_smem, q_bar, k_bar, v_bar, k_free, v_free,
                   turn):
            q_smem, o_smem = (qo_smem, qo_smem) if H == V else qo_smem
            wg = lax.axis_index("wg")
            step_id = lax.axis_index("tile")
            bn, r = lax.div(step_id, rows), lax.rem(step_id, rows)
            b, n = lax.div(bn, N), lax.rem(bn, N)
            row = order_ref[r]
            full, partial = block_lists.full, block_lists.partial
            tiles = total(full, b, n, row) + total(partial, b, n, row)

            def swap_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            @pl.when(wg < COMPUTE)
            def _compute():
                if interpret is None:
                    plgpu.set_max_registers(config.registers, action="increase")
                q0 = row * config.block_q + wg * WIDTH
                mine, result = (x.at[wg, pl.ds(0, WIDTH)] for x in (q_smem, o_smem))
                plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(q0, WIDTH), n], mine, q_bar.at[wg])
                plgpu.barrier_wait(q_bar.at[wg])
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
                here = Tile(plan, operand_refs, b, n, q0, 0, (WIDTH, block_k)).hold()
                pl.when(tiles > 0)(lambda: plgpu.barrier_wait(k_bar.at[0]))
                pl.when(wg == 1)(swap_turns)

                def step(j, carry, masked):
                    acc, m, l, it = carry
                    slot = lax.rem(it, stages)
                    tile = dataclasses.replace(here, k0=j * block_k)

                    def multiply(ref):
                        plgpu.wgmma(ref, mine, k_smem.at[slot].transpose((1, 0)))
                        early = tile.fetched(masked) if V <= 192 else {}  # registers
                        swap_turns()
                        return ref[...], early

                    acc_s = plgpu.ACC((WIDTH, block_k), jnp.float32)
                    s, tile.early = pl.run_scoped(multiply, acc_s)
                    plgpu.barrier_arrive(k_free.at[slot])
                    unit = plan.scale * LOG2E if plan.score is None else LOG2E
                    if plan.score is not None:
                        s = tile.scores(s)
                    elif unit < 0:
                        s, unit = s * -1.0, -unit
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
                        pl.when(it + 1 < tiles)(lambda: plgpu.barrier_wait(k_bar.at[after]))

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

                carry = (acc, m, l, jnp.int32(0))
                carry = visit(full, b, n, row, lambda j, c: step(j, c, False), carry)
                carry = visit(partial, b, n, row, lambda j, c: step(j, c, True), carry)
                acc, m, l, _ = carry
                pl.when(wg == 0)(swap_turns)
                if state:
                    m = jnp.where(m <= NEVER, -jnp.inf, m * (1 / LOG2E))
                    for ref, at, x in zip(results, (matrix, line, line), (acc, m, l), strict=True):
                        ref[at] = x
                    return
                m, l, factor = with_offset(here, m, l)
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
                plgpu.wait_smem_to_gmem(0)

            @pl.when(wg == COMPUTE)
            def _copy():
                if interpret is None:
                    plgpu.set_max_registers(40, action="decrease")
                kv = lax.div(n, G)

                def fetch(j, it):
                    slot = lax.rem(it, stages)
                    at = (b, pl.ds(j * block_k, block_k), kv)
                    pl.when(it >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[slot], k_bar.at[slot])
                    pl.when(it >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                    plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[slot], v_bar.at[slot])
                    return it + 1

                it = visit(full, b, n, row, fetch, jnp.int32(0))
                it = visit(partial, b, n, row, fetch, it)
                drain(k_free, it, stages)
                drain(v_free, it, stages)

        # o takes the place of q, warpgroup by warpgroup: both must take the same room in it.
        unit = math.lcm(8 * H, 8 * V)
        room = -(-WIDTH * max(H, V) // unit) * unit
        q_space, o_space = (tiled(dtype, COMPUTE, room // w, w) for w in (H, V))
        staged_p = tiled(dtype, COMPUTE, WIDTH, block_k) if interpret is not None else None
        pl.run_scoped(
            scoped,
            q_space if H == V else plgpu.RefUnion(q_space, o_space),
            tiled(dtype, stages, block_k, H),
            tiled(dtype, stages, block_k, V),
            plgpu.SMEM((COMPUTE, WIDTH), jnp.float32),
            staged_p,
            plgpu.Barrier(num_barriers=COMPUTE),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE),
            collective_axes="wg",
        )

    keywords = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        kernel,
        out_type=outs,
        grid=(B * N * rows,),
        grid_names=("tile",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **keywords,
    )(*inputs)
