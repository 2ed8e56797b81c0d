"""Backward kernel for Hopper that gives dq, dk and dv at once: 5 products a tile, not 7.

A block owns 128 keys, 64 a warpgroup, as in ``gpu_backward.grad_kv``, and passes the queries from
the last tile to the first, the heads of its group tile by tile. Beside ``dv += p^T do`` and
``dk += ds^T q`` it has the part of a tile of dq that its keys give, ``ds k``: the warpgroups
exchange ``ds`` through shared memory and multiply half of the columns each, a tile later, so that
neither waits for the other. Warps of the third warpgroup load tiles and add the parts to dq in
device memory, float32, by the copy engine. Logits start from ``-lse`` and the products ``v do``
from ``-delta``: two vectors less in registers.

dq is summed in one order: each tile of queries counts the rows of keys that were there, and row r
waits until r were. So results are the same bit for bit in every run. Row r waits for rows before it
alone; these have begun earlier, since blocks take rows in order from a counter (``gpu_work``), and
are ahead of it. Where the rows of a head are ordered by length, that is their order: served are
causal and full masks, whose row r visits the queries from some tile on, all heads the same.

Rows of one head that run at a time wait for each other, so there should be few: items of many
heads are done together. With few key/value heads the query heads of a group are parted among
blocks, and dk and dv are summed like dq, in the order of the parts.
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
from attnlab.ops.attention.gpu_backward import COLUMN, _take_apart, _zeros
from attnlab.ops.attention.gpu_forward import COMPUTE, tiled
from attnlab.ops.attention.gpu_plan import Plan
from attnlab.ops.attention.gpu_tiles import LAYOUT, LOG2E, WIDTH, Tile, varying_zero

BUFFERS = 2  # of ds, and of tiles of dq on their way
HEADS, SECTION = 16, 32  # heads whose rows are done together: at least, and where there are more


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel; see ``gpu_forward.Config``.

    Args:
        section: heads whose rows are done together, at least; 0: see ``HEADS``.
    """

    block_q: int
    block_k: int
    stages: int
    registers: int = 240
    section: int = 0


def grads(
    plan: Plan, config: Config, q, k, v, do, lse, delta, lists: BlockLists, operands, *,
    interpret: Any = None,
):
    """``dq[B, T, N, H]``, ``dk[B, S, K, H]``, ``dv[B, S, K, V]``, for H = V = 64 or 128, without a
    score function. ``lists`` are transposed, the same for all rows and heads. Beside its results it
    takes ``4 B T N H`` bytes, and ``4 B S K (H + V)`` where groups are parted."""
    B, T, N, H = q.shape
    K, V = v.shape[2:]
    dtype, block_q, stages = q.dtype, config.block_q, config.stages
    parts = parted(B * K, N // K, config.section or HEADS)
    G = N // K // parts  # heads of a block
    tiles, half = -(-T // block_q), H // COMPUTE
    names = [name for name, _ in plan.names]
    count = B * K * parts
    least = min(config.section or SECTION, count)
    section = next(n for n in range(least, count + 1) if count % n == 0)
    items = order.Items(B, K * parts, lists.rows, section)
    blocks = gpu_work.blocks(items.count, 1)
    inputs = [q, k, v, do, lse, delta, *gpu_work.given(lists), *operands]
    # The interpreter adds nothing in device memory: there each addend has an array of its own.
    addends = (lambda n: ()) if interpret is None else lambda n: (n,)
    outs = [jax.ShapeDtypeStruct((*addends(items.rows), B, tiles * block_q, N, H), jnp.float32)]
    for x in (k, v):
        own = (x.shape, dtype) if parts == 1 else ((*addends(parts), *x.shape), jnp.float32)
        outs.append(jax.ShapeDtypeStruct(*own))
    shape, unit = (WIDTH, block_q), plan.scale * LOG2E if plan.scale else 1.0
    # The product with half of the columns of k wants them in whole units of the swizzle: 64 numbers
    # in k as it lies there for the logits, 32 in a copy, and ds in the same form.
    again = half < 64
    narrow = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(64))

    def kernel(*refs):
        (q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref), listed, given, (dq_ref, *results) = (
            _take_apart(refs, (6, gpu_work.GIVEN, len(names), len(outs)))
        )
        listed = gpu_work.Listed(listed)
        operand_refs = dict(zip(names, given, strict=True))

        def scoped(k_smem, v_smem, again_smem, q_smem, do_smem, row_smem, ds_smem, dq_smem, p_smem,
                   kv_bar, q_bar, free, ds_bar, ds_free, dq_bar, dq_free, *box):
            wg = lax.axis_index("wg")
            queue = gpu_work.Queue(items, blocks, 1, *box, interpret, in_order=True)

            def counters(n: int) -> Any:
                """Semaphores that start at 0; the interpreter has none."""
                if interpret is None:
                    return pl.get_global(plgpu.SemaphoreType.REGULAR((n,)))

            def in_turn(counts, index, turn, send, own=()):
                """``send(add)`` once ``turn`` others have arrived there, the first does not add;
                with ``own`` in the interpreter."""
                if counts is None:
                    return send(False, own)
                plgpu.semaphore_wait(counts.at[index], turn, decrement=False, memory_scope="gpu")
                pl.when(turn == 0)(lambda: send(False))
                pl.when(turn > 0)(lambda: send(True))

            def arrived(counts, index):
                plgpu.wait_smem_to_gmem(0)
                if counts is not None:
                    plgpu.semaphore_signal(counts.at[index], memory_scope="gpu")

            def accumulated(products, sums) -> Any:
                """``sums`` after ``products(refs)``; the interpreter's start from nothing."""
                if interpret is None:
                    return pl.run_state(products)(tuple(map(plgpu.ACC.init, sums)))

                def scope(*refs):
                    products(refs)
                    return tuple(ref[...] for ref in refs)

                spaces = (plgpu.ACC(x.shape, jnp.float32) for x in sums)
                return tuple(x + y for x, y in zip(sums, pl.run_scoped(scope, *spaces)))

            def place(item):
                """Row of the batch, key/value head, first query head, part, row of the lists."""
                b, n, r = queue.place(item)
                kv = lax.div(n, parts)
                return b, kv, n * G, n - kv * parts, listed.row(b, kv * (N // K), r)

            def walk(place, step, carry):
                """``carry = step(i, n, masked, carry)`` over the tiles, last first, and heads."""
                _, _, n, _, row = place
                for runs, masked in ((row.full, False), (row.partial, True)):
                    def tile(e, i, c, masked=masked):
                        return step(i, n + e, masked, c)

                    carry = runs.visit_back(tile, carry, times=G)
                return carry

            def load_keys(me: int, item, _):
                b, kv, _, _, row = place(item)
                at = (b, pl.ds(row.index * config.block_k + me * WIDTH, WIDTH), kv)
                plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[me], kv_bar)
                plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[me], kv_bar)
                if again:
                    plgpu.copy_gmem_to_smem(k_ref.at[at], again_smem.at[me], kv_bar)

            def grad(me: int, key_counts, _, item, pull, it):
                b, kv, _, part, row = here = place(item)
                k0, first = row.index * config.block_k + me * WIDTH, it
                at = (b, pl.ds(k0, WIDTH), kv)
                plgpu.barrier_wait(kv_bar)

                def queries(dq_ref, it):
                    """dq of the tile before ``it``; from the first tile on, where there is none,
                    something that is not used, of what this warpgroup wrote."""
                    some = it > first
                    buffer = lax.rem(jnp.where(some, it + 1, it), BUFFERS)
                    for w in range(COMPUTE):
                        left = ds_smem.at[buffer, jnp.where(some, w, me)].transpose((1, 0))
                        keys = (again_smem if again else k_smem).at[w + varying_zero(it)]
                        plgpu.wgmma(dq_ref, left, keys.at[:, pl.ds(me * half, half)])

                def give(dq, it):
                    """Hand dq of the tile before ``it`` to be sent."""
                    buffer = lax.rem(it + 1, BUFFERS)
                    pl.when(it - first > BUFFERS)(lambda: plgpu.barrier_wait(dq_free.at[buffer]))
                    dq_smem[buffer, me] = dq
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(dq_bar.at[buffer])
                    plgpu.barrier_arrive(ds_free.at[buffer])

                def step(i, n, masked, carry):
                    dk, dv, it = carry
                    slot, mine = lax.rem(it, stages), me + varying_zero(i)
                    buffer = lax.rem(it, BUFFERS)
                    plgpu.barrier_wait(q_bar.at[slot])

                    def pairs(refs):
                        s_ref, dp_ref = refs
                        if plan.scale:
                            plgpu.wgmma(s_ref, k_smem.at[mine], q_smem.at[slot].transpose((1, 0)))
                        plgpu.wgmma(dp_ref, v_smem.at[mine], do_smem.at[slot].transpose((1, 0)))

                    def start(x: int, factor: float):
                        row = plgpu.load(row_smem.at[x, slot], layout=COLUMN, optimized=False)
                        return lax.broadcast_in_dim(row * factor, shape, (1,))

                    z, dp = accumulated(pairs, (start(0, -1 / unit), start(1, -1.0)))
                    z = z * unit
                    if masked:
                        tile = Tile(plan, operand_refs, b, n, i * block_q, k0, shape, q_axis=1)
                        z = jnp.where(tile.seen(), z, -jnp.inf)
                    p = jnp.exp2(z)
                    ds = p * dp
                    p, ds = p.astype(dtype), ds.astype(dtype)
                    if interpret is None:
                        dk, dv, p, ds = lax.optimization_barrier((dk, dv, p, ds))
                    # Before this one arrives, or it would count for the other warpgroup's.
                    pl.when(it > first)(lambda: plgpu.barrier_wait(ds_bar))
                    pl.when(it - first >= BUFFERS)(lambda: plgpu.barrier_wait(ds_free.at[buffer]))
                    ds_smem[buffer, me] = ds
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(ds_bar)

                    def add(refs):
                        queries(refs[0], it)
                        if interpret is None:
                            plgpu.wgmma(refs[1], p, do_smem.at[slot])
                            plgpu.wgmma(refs[2], ds, q_smem.at[slot])
                            dq = plgpu.wgmma_accumulator_load(refs[0], wait_n=2)
                            pl.when(it > first)(lambda: give(dq, it))
                            return
                        p_smem[me] = p
                        plgpu.commit_smem()
                        plgpu.wgmma(refs[1], p_smem.at[me], do_smem.at[slot])
                        plgpu.wgmma(refs[2], ds_smem.at[buffer, me], q_smem.at[slot])

                    # From zeros, not from nothing: else the compiler waits for each product.
                    dq, dv, dk = accumulated(add, (_zeros((block_q, half), LAYOUT), dv, dk))
                    if interpret is not None:
                        pl.when(it > first)(lambda: give(dq, it))
                    plgpu.barrier_arrive(free.at[slot])
                    return dk, dv, it + 1

                def last(it):
                    plgpu.barrier_wait(ds_bar)
                    zero = _zeros((block_q, half), LAYOUT)
                    (dq,) = accumulated(lambda refs: queries(refs[0], it), (zero,))
                    give(dq, it)

                def drain(given, it):
                    for back in range(BUFFERS, 0, -1):
                        buffer = lax.rem(it + BUFFERS - back, BUFFERS)
                        pl.when(it - first >= back)(
                            lambda buffer=buffer: plgpu.barrier_wait(given.at[buffer])
                        )

                carry = _zeros((WIDTH, H), LAYOUT), _zeros((WIDTH, V), LAYOUT), it
                dk, dv, it = walk(here, step, carry)
                pl.when(it > first)(lambda: last(it))
                drain(ds_free, it)  # then the other warpgroup reads these keys no more
                if parts == 1:
                    k_smem[me] = (dk * plan.scale).astype(dtype)
                    v_smem[me] = dv.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(k_smem.at[me], results[0].at[at])
                    plgpu.copy_smem_to_gmem(v_smem.at[me], results[1].at[at])
                else:
                    drain(dq_free, it)
                    index = ((b * K + kv) * items.rows + row.index) * COMPUTE + me
                    for x, out in ((dk, results[0]), (dv, results[1])):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        for c in range(COMPUTE):
                            dq_smem[c, me] = x[:, c * half : (c + 1) * half]
                        plgpu.commit_smem()

                        def send(add: bool, own=(), out=out):
                            for c in range(COMPUTE):
                                columns = out.at[(*own, *at)].at[:, pl.ds(c * half, half)]
                                plgpu.copy_smem_to_gmem(
                                    dq_smem.at[c, me], columns, reduction_op="add" if add else None
                                )

                        in_turn(key_counts, index, part, send, (part,))
                    arrived(key_counts, index)
                after = queue.late(None, pull, functools.partial(load_keys, me))
                if parts == 1:
                    drain(dq_free, it)
                return after, it

            def copy(counts, item, start):
                """Load tiles of queries, and send those of dq: a warp for each of their buffers."""
                here = place(item)
                b, row = here[0], here[-1]

                def load(i, n, _, it):
                    slot, rows = lax.rem(it, stages), pl.ds(i * block_q, block_q)
                    pl.when(it - start >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    for source, target in (
                        (q_ref.at[b, rows, n], q_smem.at[slot]),
                        (do_ref.at[b, rows, n], do_smem.at[slot]),
                        (lse_ref.at[b, n, rows], row_smem.at[0, slot]),
                        (delta_ref.at[b, n, rows], row_smem.at[1, slot]),
                    ):
                        plgpu.copy_gmem_to_smem(source, target, q_bar.at[slot])
                    return it + 1

                def send_queries(buffer: int):
                    def send_tile(i, n):
                        index, at = (b * N + n) * tiles + i, (b, pl.ds(i * block_q, block_q), n)
                        plgpu.barrier_wait(dq_bar.at[buffer])

                        def send(add: bool, own=()):
                            for w in range(COMPUTE):
                                columns = dq_ref.at[(*own, *at)].at[:, pl.ds(w * half, half)]
                                plgpu.copy_smem_to_gmem(
                                    dq_smem.at[buffer, w], columns,
                                    reduction_op="add" if add else None,
                                )

                        in_turn(counts, index, row.index, send, (row.index,))
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        plgpu.barrier_arrive(dq_free.at[buffer])
                        arrived(counts, index)

                    def step(i, n, _, it):
                        pl.when(lax.rem(it, BUFFERS) == buffer)(lambda: send_tile(i, n))
                        return it + 1

                    walk(here, step, start)

                def load_tiles():
                    end = walk(here, load, start)
                    for back in range(stages, 0, -1):
                        slot = lax.rem(end + stages - back, stages)
                        pl.when(end - start >= back)(
                            lambda slot=slot: plgpu.barrier_wait(free.at[slot])
                        )

                @plgpu.warp_map
                def _(warp):
                    for buffer in range(BUFFERS):
                        pl.when(warp == buffer)(functools.partial(send_queries, buffer))
                    pl.when(warp == BUFFERS)(load_tiles)

                return start + row.tiles * G

            key_counts = counters(B * K * items.rows * COMPUTE) if parts > 1 else None
            for me in range(COMPUTE):
                work = functools.partial(grad, me, key_counts), functools.partial(load_keys, me)
                pl.when(wg == me)(lambda work=work: queue.compute(*work, config.registers))

            @pl.when(wg == COMPUTE)
            def _copy():
                counts = counters(B * N * tiles)
                queue.copy(functools.partial(copy, counts), (), registers=24)

        pl.run_scoped(
            scoped,
            tiled(dtype, COMPUTE, WIDTH, H), tiled(dtype, COMPUTE, WIDTH, V),
            plgpu.SMEM((COMPUTE, WIDTH, H), dtype, transforms=narrow) if again else None,
            tiled(dtype, stages, block_q, H), tiled(dtype, stages, block_q, V),
            plgpu.SMEM((2, stages, block_q), jnp.float32),
            plgpu.SMEM((BUFFERS, COMPUTE, WIDTH, block_q), dtype, transforms=narrow) if again
            else tiled(dtype, BUFFERS, COMPUTE, WIDTH, block_q),
            plgpu.SMEM(
                (BUFFERS, COMPUTE, block_q, half), jnp.float32,
                transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
            ),
            None if interpret is None else tiled(dtype, COMPUTE, WIDTH, block_q),
            plgpu.Barrier(num_arrivals=(3 if again else 2) * COMPUTE),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=BUFFERS),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=BUFFERS),
            plgpu.Barrier(num_barriers=BUFFERS),
            *gpu_work.spaces(True, COMPUTE),
            collective_axes="wg",
        )

    keywords = {} if interpret is None else {"interpret": interpret}
    call = plgpu.kernel(
        kernel, out_type=outs, grid=(blocks,), grid_names=("tile",), num_threads=COMPUTE + 1,
        thread_name="wg", **keywords,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
    dq, dk, dv = gpu_work.launched(call, True)(*inputs)
    if interpret is not None:
        seen = lists.kinds(tiles)[0, 0].repeat(block_q, 1) > 0
        dq = jnp.where(seen[:, None, :, None, None], dq, 0).sum(0)
        dk, dv = (dk, dv) if parts == 1 else (dk.sum(0), dv.sum(0))
    dk = dk if parts == 1 else dk * plan.scale
    return (dq[:, :T] * plan.scale).astype(dtype), dk.astype(dtype), dv.astype(dtype)


def parted(heads: int, G: int, least: int) -> int:
    """Among how many blocks the ``G`` query heads of a group are parted, for ``least`` heads."""
    return next((n for n in range(1, G + 1) if G % n == 0 and heads * n >= least), G)
