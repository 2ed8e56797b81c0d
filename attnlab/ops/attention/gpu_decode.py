"""Decode kernel for Hopper: one part of the tiles of all rows a thread block, and the merge.

The query rows of a task are the ``t G`` (token, head) pairs of a key/value group, padded to 64. One
warpgroup copies tiles of keys and values, page by page, into a ring of shared memory and runs ahead
over the ends of tasks; each of the others takes every second tile, with its own running maximum,
sum and accumulator in registers, and writes a piece ``o = acc / l`` and ``lse2 = m + log2 l`` a
task; ``gpu_merge`` merges them.

Bytes of a call: ``sum_b lengths[b] K (H + V) itemsize``, read once: 8.6 GB for 64 rows of 32768
keys, 8 heads of 128 + 128, bf16: at least 1.8 ms at 4.8 TB/s. Pieces are ``(tasks + parts) 2 R``
rows of V fp32, R = t G rounded up to 8: 5 MB written and read there. FLOPs of a tile:
``2 * 64 tile (H + V)`` (padding included), a quarter of what the tensor core could do in the time
of its bytes.
"""

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

from attnlab.ops.attention.decode_gpu import PRODUCER_REGISTERS, ROWS, Static, Work
from attnlab.ops.attention.gpu_forward import ROW, tiled
from attnlab.ops.attention.gpu_tiles import LAYOUT, LOG2E, NEVER, positive
from attnlab.ops.attention.gpu_work import drain

COLUMN = LAYOUT.reduce(0)
LANES = 128  # threads of a warpgroup: rows of pieces take whole multiples of them


def _query_and_result(consumers: int, H: int, V: int, dtype, interpret) -> Any:
    """Shared memory where the result of a warpgroup takes the place of its query rows.

    The rows of one must never lie on those of the other's neighbour: both lie equally far apart.
    The race detector takes a union for one thing, so in the interpreter there is none.
    """
    apart = max(ROWS * H * 2, ROWS * V * 4)
    q_rows, o_rows = (8 * -(-apart // (8 * w * size)) for w, size in ((H, 2), (V, 4)))
    assert min(q_rows * H * 2, o_rows * V * 4) >= apart
    result = plgpu.SMEM(
        (consumers, o_rows, V), jnp.float32,
        transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
    )
    queries = tiled(dtype, consumers, q_rows, H)
    return plgpu.RefUnion(queries, result) if interpret is None else (queries, result)


def pieces(
    static: Static, q, k, v, work: Work, pages, lengths, limits, coords, *, interpret: Any = None
):
    """``(o fp32 [places, R, V'], lse2 fp32 [places, 64])``: what each part found of its tasks, with
    V' the next multiple of 128.

    Args:
        q: ``[tasks, R, H]``, rows of (token, head) pairs. k, v: contiguous or pools. pages: int32
            ``[B, M]`` of valid entries, or None. limits: int32 ``[B, rows]``, position of every
            query row, -1 where there is none. coords: None if the keys stand at their positions,
            else the key positions ``[B, S']``, and with segments those of keys and of query rows.
    """
    c = static.sizes
    tile, stages, consumers, dtype = c.tile, c.stages, c.consumers, q.dtype
    tasks, R, H = q.shape
    V = v.shape[-1]
    parts = work.first.shape[0]
    places = consumers * (tasks + parts)
    page = None if pages is None else k.shape[1]
    copies = 1 if page is None or page >= tile else tile // page
    named = {
        "q": q, "k": k, "v": v, "start": work.start, "share": work.share, "first": work.first,
        "last": work.last, "order": work.order, "pages": pages, "lengths": lengths,
        "limits": limits,
    }
    named |= dict(zip(("k_pos", "k_seg", "q_seg"), coords or ()))
    named = {name: x for name, x in named.items() if x is not None}
    outs = [
        jax.ShapeDtypeStruct((places, R, -(-V // LANES) * LANES), jnp.float32),
        jax.ShapeDtypeStruct((places, ROWS), jnp.float32),
    ]

    def kernel(*refs):
        ref = dict(zip(named, refs))
        o_ref, lse_ref = refs[len(named) :]

        def scoped(qo_smem, k_smem, v_smem, lse_smem, p_smem, q_bar, k_bar, v_bar, free):
            q_smem, o_smem = qo_smem
            wg, part = lax.axis_index("wg"), lax.axis_index("part")
            share = ref["share"][0]
            begin, end = part * share, (part + 1) * share

            def each_task(body):
                """``body(task, row, first tile, tiles, tiles before)``, the last over all tasks."""

                def visit(task, before):
                    low, high = ref["start"][task], ref["start"][task + 1]
                    x0 = jnp.maximum(low, begin)
                    count = jnp.maximum(jnp.minimum(high, end) - x0, 0)
                    row = lax.div(task, static.K * static.tasks)
                    pl.when(count > 0)(lambda: body(task, row, x0 - low, count, before))
                    return before + count

                return lax.fori_loop(ref["first"][part], ref["last"][part], visit, jnp.int32(0))

            def place_of(row, x):
                return ref["order"][row, x] if "order" in ref else x

            def task_rows(task):
                return pl.ds(lax.rem(task, static.tasks) * ROWS, ROWS)

            def row_vector(name, task, row):
                at = ref[name].at[row, task_rows(task)]
                return plgpu.load(at, layout=ROW, optimized=False)

            def seen(task, row, where, limit, own):
                """Which keys of the tile at ``where`` the query rows see."""
                shape = (ROWS, tile)
                places = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=LAYOUT) + where
                limit = lax.broadcast_in_dim(limit, shape, (0,))

                def column(name):
                    at = ref[name].at[row, pl.ds(where, tile)]
                    x = plgpu.load(at, layout=COLUMN, optimized=False)
                    return lax.broadcast_in_dim(x, shape, (1,))

                at = column("k_pos") if "k_pos" in ref else places
                out = at <= limit
                if static.window is not None:
                    near = at > limit - static.window
                    out = out & ((near | (at < static.sinks)) if static.sinks else near)
                if "k_pos" in ref:
                    out = out & (places < ref["lengths"][row])
                if own is not None:
                    out = out & (column("k_seg") == lax.broadcast_in_dim(own, shape, (0,)))
                return out

            @pl.when(wg < consumers)
            def _compute():
                if interpret is None:
                    plgpu.set_max_registers(c.registers, action="increase")
                mine, result = (x.at[wg, pl.ds(0, ROWS)] for x in (q_smem, o_smem))

                def one(task, row, x0, count, before):
                    plgpu.copy_gmem_to_smem(
                        ref["q"].at[task], q_smem.at[wg, pl.ds(0, R)], q_bar.at[wg]
                    )
                    limit = row_vector("limits", task, row)
                    own = row_vector("q_seg", task, row) if "q_seg" in ref else None
                    plgpu.barrier_wait(q_bar.at[wg])
                    skip = lax.rem(wg + consumers - lax.rem(before, consumers), consumers)
                    turns = lax.div(jnp.maximum(count - skip, 0) + consumers - 1, consumers)

                    def step(i, carry):
                        acc, m, l = carry
                        x = skip + i * consumers
                        slot = lax.rem(before + x, stages)
                        where = place_of(row, x0 + x) * tile
                        plgpu.barrier_wait(k_bar.at[slot])

                        def multiply(s_ref):
                            plgpu.wgmma(s_ref, mine, k_smem.at[slot].transpose((1, 0)))
                            return s_ref[...]

                        s = pl.run_scoped(multiply, plgpu.ACC((ROWS, tile), jnp.float32))
                        unit = static.scale * LOG2E
                        if static.cap is not None:
                            s = jnp.tanh(s * (static.scale / static.cap)) * static.cap
                            unit = LOG2E
                        s, unit = positive(s, unit)
                        s = jnp.where(seen(task, row, where, limit, own), s, -jnp.inf)
                        top = jnp.maximum(m, s.max(axis=1) * unit)
                        alpha = jnp.exp2(m - top)
                        p = jnp.exp2(s * unit - lax.broadcast_in_dim(top, s.shape, (0,)))
                        l = l * alpha + p.sum(axis=1)
                        acc = acc * lax.broadcast_in_dim(alpha, acc.shape, (0,))
                        narrow = p.astype(dtype)
                        plgpu.barrier_wait(v_bar.at[slot])
                        if interpret is None:
                            acc = pl.run_state(
                                lambda a: plgpu.wgmma(a, narrow, v_smem.at[slot])
                            )(plgpu.ACC.init(acc))
                        else:
                            p_smem[wg] = narrow
                            plgpu.commit_smem()

                            def product(a):
                                plgpu.wgmma(a, p_smem.at[wg], v_smem.at[slot])
                                return a[...]

                            acc += pl.run_scoped(product, plgpu.ACC((ROWS, V), jnp.float32))
                        plgpu.barrier_arrive(free.at[slot])
                        return acc, top, l

                    acc = plgpu.layout_cast(jnp.full((ROWS, V), 0, jnp.float32), LAYOUT)
                    m = plgpu.layout_cast(jnp.full((ROWS,), NEVER, jnp.float32), ROW)
                    l = plgpu.layout_cast(jnp.full((ROWS,), 0, jnp.float32), ROW)
                    acc, m, l = lax.fori_loop(0, turns, step, (acc, m, l))
                    l = jnp.where(l == 0.0, 1.0, l)
                    result[...] = acc * lax.broadcast_in_dim(1.0 / l, acc.shape, (0,))
                    lse_smem[wg] = m + jnp.log2(l)
                    plgpu.commit_smem()
                    to = (task + part) * consumers + wg
                    plgpu.copy_smem_to_gmem(
                        o_smem.at[wg, pl.ds(0, R)], o_ref.at[to, pl.ds(0, R), pl.ds(0, V)]
                    )
                    plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[to])
                    plgpu.wait_smem_to_gmem(0)

                each_task(one)

            @pl.when(wg == consumers)
            def _copy():
                if interpret is None:
                    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

                def one(task, row, x0, count, before):
                    head = lax.rem(lax.div(task, static.tasks), static.K)

                    def fetch(x, _):
                        slot = lax.rem(before + x, stages)
                        j = place_of(row, x0 + x)
                        pl.when(before + x >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                        if page is None:
                            sources = [(row, pl.ds(j * tile, tile), head)]
                        elif page >= tile:
                            each = page // tile
                            at = pl.ds(lax.rem(j, each) * tile, tile)
                            sources = [(ref["pages"][row, lax.div(j, each)], at, head)]
                        else:
                            table = [ref["pages"][row, j * copies + i] for i in range(copies)]
                            sources = [(at, pl.ds(0, page), head) for at in table]
                        for name, smem, bar in (("k", k_smem, k_bar), ("v", v_smem, v_bar)):
                            for i, at in enumerate(sources):
                                into = smem.at[slot, pl.ds(i * (tile // copies), tile // copies)]
                                plgpu.copy_gmem_to_smem(ref[name].at[at], into, bar.at[slot])
                        return 0

                    lax.fori_loop(0, count, fetch, 0)

                drain(free, each_task(one), stages)

        staged_p = tiled(dtype, consumers, ROWS, tile) if interpret is not None else None
        pl.run_scoped(
            scoped,
            _query_and_result(consumers, H, V, dtype, interpret),
            tiled(dtype, stages, tile, H),
            tiled(dtype, stages, tile, V),
            plgpu.SMEM((consumers, ROWS), jnp.float32),
            staged_p,
            plgpu.Barrier(num_barriers=consumers),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            collective_axes="wg",
        )

    keywords = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        kernel,
        out_type=outs,
        grid=(parts,),
        grid_names=("part",),
        num_threads=consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **keywords,
    )(*named.values())
