"""Backward kernel for Hopper that gives dq, dk and dv at once: 5 products a tile, not 7.

A block owns 128 keys, 64 a warpgroup, as in ``gpu_backward.grad_kv``, and passes the queries from
the last tile to the first. Beside ``dv += p^T do`` and ``dk += ds^T q`` it has the part of a tile
of dq that its keys give, ``ds k``: the warpgroups exchange ``ds`` through shared memory and
multiply half of the columns each, and the warpgroup that copies adds the part to dq in device
memory, float32, by the copy engine. Logits start from ``-lse`` and the products ``v do`` from
``-delta``: two vectors less in registers.

dq is summed in one order: each tile of queries counts the rows of keys that were there, and row r
waits until r were. So results are the same bit for bit in every run. Row r waits for rows before it
alone; these have begun earlier, since blocks take rows in order from a counter (``gpu_work``), and
are ahead of it. Where the rows of a head are ordered by length, that is their order: served are
causal and full masks, whose row r visits the queries from some tile on, all heads the same.
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
BEHIND = 2  # tiles of queries loaded before the dq of one is sent


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel; see ``gpu_forward.Config``.

    Args:
        section: 0: 16 heads, or fewer rows of a head would begin without waiting for each other.
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
    takes ``4 B T N H`` bytes."""
    B, T, N, H = q.shape
    K, V = v.shape[2:]
    G, dtype = N // K, q.dtype
    block_q, stages = config.block_q, config.stages
    tiles, half = -(-T // block_q), H // COMPUTE
    names = [name for name, _ in plan.names]
    items = order.over_keys(q, k, v, lists, config.section or 16)
    blocks = gpu_work.blocks(items.count, 1)
    inputs = [q, k, v, do, lse, delta, *gpu_work.given(lists), *operands]
    # The interpreter adds nothing in device memory: there each row of keys has a dq of its own.
    own = () if interpret is None else (items.rows,)
    outs = [
        jax.ShapeDtypeStruct((*own, B, tiles * block_q, N, H), jnp.float32),
        jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype),
    ]
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
                   kv_bar, q_bar, free, ds_bar, dq_bar, dq_free, *box):
            wg = lax.axis_index("wg")
            queue = gpu_work.Queue(items, blocks, 1, *box, interpret)

            def accumulated(products, sums) -> Any:
                """``sums`` after ``products(refs)``; the interpreter's start from nothing."""
                if interpret is None:
                    return pl.run_state(products)(tuple(map(plgpu.ACC.init, sums)))

                def scope(*refs):
                    products(refs)
                    return tuple(ref[...] for ref in refs)

                spaces = (plgpu.ACC(x.shape, jnp.float32) for x in sums)
                return tuple(x + y for x, y in zip(sums, pl.run_scoped(scope, *spaces)))

            def walk(item, step, carry):
                """``carry = step(i, n, masked, carry)`` over the tiles of all heads, last first."""
                b, kv, r = queue.place(item)

                def head(g, carry):
                    n = kv * G + g
                    row = listed.row(b, n, r)
                    for runs, masked in ((row.full, False), (row.partial, True)):
                        carry = runs.visit_back(
                            lambda i, c, masked=masked: step(i, n, masked, c), carry
                        )
                    return carry

                return lax.fori_loop(0, G, head, carry)

            def load_keys(me: int, item, _):
                b, kv, r = queue.place(item)
                k0 = listed.index(b, kv * G, r) * config.block_k + me * WIDTH
                at = (b, pl.ds(k0, WIDTH), kv)
                plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[me], kv_bar)
                plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[me], kv_bar)
                if again:
                    plgpu.copy_gmem_to_smem(k_ref.at[at], again_smem.at[me], kv_bar)

            def grad(me: int, _, item, pull, it):
                b, kv, r = queue.place(item)
                k0 = listed.index(b, kv * G, r) * config.block_k + me * WIDTH
                at = (b, pl.ds(k0, WIDTH), kv)
                plgpu.barrier_wait(kv_bar)

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
                    ds_smem[buffer, me] = ds
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(ds_bar)

                    def add_keys(dv_ref, dk_ref):
                        if interpret is None:
                            plgpu.wgmma(dv_ref, p, do_smem.at[slot])
                            plgpu.wgmma(dk_ref, ds, q_smem.at[slot])
                            return
                        p_smem[me] = p
                        plgpu.commit_smem()
                        plgpu.wgmma(dv_ref, p_smem.at[me], do_smem.at[slot])
                        plgpu.wgmma(dk_ref, ds_smem.at[buffer, me], q_smem.at[slot])

                    def add_queries(dq_ref):
                        for w in range(COMPUTE):
                            left = ds_smem.at[buffer, w].transpose((1, 0))
                            columns = pl.ds(me * half, half)
                            keys = again_smem if again else k_smem
                            right = keys.at[w + varying_zero(i), pl.ds(0, WIDTH), columns]
                            plgpu.wgmma(dq_ref, left, right)

                    def add(refs):
                        add_keys(*refs[:2])
                        plgpu.barrier_wait(ds_bar)
                        add_queries(refs[2])

                    # From zeros, not from nothing: else the compiler waits for each product.
                    zero = _zeros((block_q, half), LAYOUT)
                    dv, dk, dq = accumulated(add, (dv, dk, zero))
                    plgpu.barrier_arrive(free.at[slot])
                    pl.when(it >= BUFFERS)(lambda: plgpu.barrier_wait(dq_free.at[buffer]))
                    dq_smem[buffer, me] = dq
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(dq_bar.at[buffer])
                    return dk, dv, it + 1

                carry = _zeros((WIDTH, H), LAYOUT), _zeros((WIDTH, V), LAYOUT), it
                dk, dv, it = walk(item, step, carry)
                # The other warpgroup reads these keys until it has its last tile of dq.
                plgpu.barrier_arrive(ds_bar)
                plgpu.barrier_wait(ds_bar)
                k_smem[me] = (dk * plan.scale).astype(dtype)
                v_smem[me] = dv.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(k_smem.at[me], results[0].at[at])
                plgpu.copy_smem_to_gmem(v_smem.at[me], results[1].at[at])
                return queue.late(None, pull, functools.partial(load_keys, me)), it

            def copy(counts, item, start):
                """Load tiles of queries, and send those of dq that are ready, two tiles later."""
                b, kv, r = queue.place(item)
                row = listed.index(b, kv * G, r)

                def send(buffer, target, first: bool):
                    for w in range(COMPUTE):
                        plgpu.copy_smem_to_gmem(
                            dq_smem.at[buffer, w], target.at[:, pl.ds(w * half, half)],
                            commit_group=w == COMPUTE - 1, reduction_op=None if first else "add",
                        )

                def arrived(index, it, under_way: int):
                    plgpu.wait_smem_to_gmem(under_way)
                    if counts is not None:
                        plgpu.semaphore_signal(counts.at[index], memory_scope="gpu")
                    plgpu.barrier_arrive(dq_free.at[lax.rem(it, BUFFERS)])

                def add(index, before, it):
                    """Send tile ``it`` when it is its turn; then the one before has arrived."""
                    buffer, outer = lax.rem(it, BUFFERS), lax.div(index, tiles)
                    plgpu.barrier_wait(dq_bar.at[buffer])
                    rows = pl.ds((index - outer * tiles) * block_q, block_q)
                    target = b, rows, outer - b * N
                    if counts is None:
                        send(buffer, dq_ref.at[row, *target], True)
                    else:
                        plgpu.semaphore_wait(
                            counts.at[index], row, decrement=False, memory_scope="gpu"
                        )
                        pl.when(row == 0)(lambda: send(buffer, dq_ref.at[target], True))
                        pl.when(row > 0)(lambda: send(buffer, dq_ref.at[target], False))
                    pl.when(it > start)(lambda: arrived(before, it - 1, 1))

                def step(i, n, _, carry):
                    it, *last = carry
                    slot, here = lax.rem(it, stages), pl.ds(i * block_q, block_q)
                    pl.when(it >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    for source, target in (
                        (q_ref.at[b, here, n], q_smem.at[slot]),
                        (do_ref.at[b, here, n], do_smem.at[slot]),
                        (lse_ref.at[b, n, here], row_smem.at[0, slot]),
                        (delta_ref.at[b, n, here], row_smem.at[1, slot]),
                    ):
                        plgpu.copy_gmem_to_smem(source, target, q_bar.at[slot])
                    pl.when(it - start >= BEHIND)(lambda: add(last[-2], last[-1], it - BEHIND))
                    return it + 1, (b * N + n) * tiles + i, *last[:-1]

                none = [jnp.int32(0)] * (BEHIND + 1)
                it, *last = walk(item, step, (start, *none))
                for back in range(BEHIND, 0, -1):
                    pl.when(it - start >= back)(
                        lambda back=back: add(last[back - 1], last[back], it - back)
                    )
                pl.when(it > start)(lambda: arrived(last[0], it - 1, 0))
                return it

            for me in range(COMPUTE):
                work = *(functools.partial(f, me) for f in (grad, load_keys)), config.registers
                sent = ((dq_free, BUFFERS),)
                pl.when(wg == me)(lambda work=work, sent=sent: queue.compute(*work, sent))

            @pl.when(wg == COMPUTE)
            def _copy():
                counts = None
                if interpret is None:
                    counts = pl.get_global(plgpu.SemaphoreType.REGULAR((B * N * tiles,)))
                queue.copy(functools.partial(copy, counts), ((free, stages),), registers=24)

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
            plgpu.Barrier(num_barriers=BUFFERS),
            *gpu_work.spaces(blocks < items.count, COMPUTE),
            collective_axes="wg",
        )

    keywords = {} if interpret is None else {"interpret": interpret}
    dq, dk, dv = plgpu.kernel(
        kernel, out_type=outs, grid=(blocks,), grid_names=("tile",), num_threads=COMPUTE + 1,
        thread_name="wg", **keywords,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(*inputs)
    if interpret is not None:
        seen = lists.kinds(tiles)[0, 0].repeat(block_q, 1) > 0
        dq = jnp.where(seen[:, None, :, None, None], dq, 0).sum(0)
    return (dq[:, :T] * plan.scale).astype(dtype), dk, dv
