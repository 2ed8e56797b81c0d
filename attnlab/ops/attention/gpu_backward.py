"""Backward kernels for Hopper: one over tiles of queries for dq, one over tiles of keys for dk, dv.

Each recomputes its logits, so nothing is added across blocks and results are the same bit for bit
in every run. With ``z = mod(scale q k)``, ``p = exp(z - lse)``, ``delta = rowsum(o do) - dlse``::

    dz = p * (do v^T - delta)      ds = pull(dz), the vjp of mod on the tile
    dq = scale ds k                dv = p^T do                dk = scale ds^T q

Gradients of what mod was handed are sums of ``pull(dz)`` over a tile: of scalars and of rows along
the keys (dq kernel), of columns along the queries (dk, dv kernel, whose tiles are transposed); of
values by query and key they are these tiles (dq kernel, see ``gpu_dense``).
FLOPs of a pair: ``2 (2 H + V) + 2 (2 H + 2 V)`` against ``2 (3 H + 2 V)`` without recomputation.
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
from attnlab.ops.attention.gpu_dense import clear_absent
from attnlab.ops.attention.gpu_forward import COMPUTE, ROW, tiled
from attnlab.ops.attention.gpu_plan import Plan
from attnlab.ops.attention.gpu_tiles import LAYOUT, LOG2E, WIDTH, Tile, varying_zero
from attnlab.ops.attention.pairs import with_plain_sums

COLUMN = LAYOUT.reduce(0)
ROW_GROUPS = ("heads", "rows", "distances")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a backward kernel; see ``gpu_forward.Config``.

    Args:
        turns: whether the two warpgroups take turns on the tensor cores or run as they come.
    """

    block_q: int
    block_k: int
    stages: int
    registers: int = 232
    turns: bool = True
    persistent: int = 0
    section: int = 0


def asked(plan: Plan, groups: tuple[str, ...]) -> tuple[int, ...]:
    """Which handed values of the score get a gradient in a kernel that sums ``groups``."""
    if plan.score is None:
        return ()
    return tuple(
        i for i, h in enumerate(plan.score.handed) if h.group in groups and plan.wanted[i]
    )


def row_sums(plan: Plan) -> tuple[int, ...]:
    """How many sums over the keys each of ``asked(plan, ROW_GROUPS)`` takes."""
    return tuple(
        plan.diagonals.numbers.size if plan.score.handed[i].group == "distances" else 1
        for i in asked(plan, ROW_GROUPS)
    )


def row_vectors(plan: Plan) -> int:
    """How many numbers a query the dq kernel sums along the keys, where something of ``ROW_GROUPS``
    needs its gradient: each of ``row_sums`` of ``pull(dz)``, then of ``pull(p)``, and ``dz``.

    With the last two an error ``e`` of delta can be taken out of the first: ``dz`` has ``-p e`` too
    much. ``o`` comes from weights in the dtype of q, so delta has one, and the gradient of a slope
    multiplies it by distances.
    """
    count = sum(row_sums(plan))
    return 2 * count + 1 if count else 0


def gradient_tables(plan: Plan, B: int, N: int) -> list[Any]:
    """What the dq kernel writes for ``asked(plan, ("dense",))``: ``[B, N, T', S']``."""
    rows, columns = plan.T + -plan.T % plan.block_q, plan.S + -plan.S % plan.block_k
    table = jax.ShapeDtypeStruct((B, N, rows, columns), jnp.float32)
    return [table for _ in asked(plan, ("dense",))]


def add_row_sums(tile: Tile, sums, rest) -> list[Any]:
    """Row sums with those of this tile; a value by distance has one for each number."""
    plan, sums, out = tile.plan, list(sums), []
    wanted = asked(plan, ROW_GROUPS)
    for i, count, x in zip(wanted, row_sums(plan), rest, strict=True):
        group, sums = sums[:count], sums[count:]
        if plan.score.handed[i].group != "distances":
            out.append(group[0] + x.sum(axis=1))
        elif tile.number is None:
            out += group  # a stored tile: see gpu_distance.grad_tiles
        else:
            x = x.sum(axis=1)
            out += [g + x * jnp.where(tile.number == j, 1.0, 0.0) for j, g in enumerate(group)]
    return out


def pull_scores(tile: Tile, s, wanted: tuple[int, ...]):
    """Modified scores of raw logits ``s``, the function from ``dz`` to the cotangents of
    ``scale * s`` and of each wanted handed value, as tiles, and what the scores leave out a query
    (see ``Tile.modified``). Scores and what they leave out are in units of log 2."""
    if tile.plan.score is None:
        return s * (tile.plan.scale * LOG2E), lambda dz: (dz,), None
    s = s * tile.plan.scale
    known, near, handed = tile.read()

    def modified(s, *tiles):
        given = list(handed)
        for i, x in zip(wanted, tiles, strict=True):
            given[i] = (x, "tile")
        return tile.modified(s, 1.0, known, near, given)

    tiles = [tile.lift(*handed[i], "tile") for i in wanted]
    z, pull, row = jax.vjp(modified, s, *tiles, has_aux=True)
    row = None if row is None else row * LOG2E
    return z * LOG2E, lambda dz: with_plain_sums(pull, dz), row


def row_cotangents(tile: Tile, s, dp, lse, delta, sums, masked: bool, dtype, tables=()):
    """``ds`` of a tile of query rows in ``dtype``, and ``sums`` with those of this tile added.

    Cotangents of ``asked(plan, ("dense",))`` are written to ``tables``.
    """
    wanted, shape = asked(tile.plan, ROW_GROUPS), tile.shape
    pairs = asked(tile.plan, ("dense",))

    def local(tile, s, dp, *sums):
        z, pull, row = pull_scores(tile, s, (*wanted, *pairs))
        z = z - lax.broadcast_in_dim(lse if row is None else lse - row, shape, (0,))
        if masked:
            z = jnp.where(tile.seen(), z, -jnp.inf)
        p = jnp.exp2(z)
        dz = p * (dp - lax.broadcast_in_dim(delta, shape, (0,)))
        ds, *rest = pull(dz)
        for table, x in zip(tables, rest[len(wanted) :], strict=True):
            table[tile.b, tile.n, *map(pl.ds, (tile.q0, tile.k0), shape)] = x
        if wanted:
            half, weights = len(sums) // 2, pull(p)[1 : 1 + len(wanted)]
            sums = (
                *add_row_sums(tile, sums[:half], rest[: len(wanted)]),
                *add_row_sums(tile, sums[half:-1], weights), sums[-1] + dz.sum(axis=1),
            )
        return ds.astype(dtype), *sums

    narrow, *sums = tile.by_kind(local, s, dp, *sums)
    return narrow, tuple(sums)


def _add_products(accumulators, lefts, rights, staging, wg):
    """``acc += left right`` with left in registers, right in shared memory, started together.

    The interpreter takes no register operand: there ``staging`` holds it.
    """
    if staging is None:

        def add(refs):
            for ref, left, right in zip(refs, lefts, rights, strict=True):
                plgpu.wgmma(ref, left, right)

        return pl.run_state(add)(tuple(plgpu.ACC.init(a) for a in accumulators))
    out = []
    for acc, left, right in zip(accumulators, lefts, rights, strict=True):
        staging[wg] = left
        plgpu.commit_smem()

        def product(ref, right=right):
            plgpu.wgmma(ref, staging.at[wg], right)
            return ref[...]

        out.append(acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32)))
    return tuple(out)


def _zeros(shape, layout):
    return plgpu.layout_cast(jnp.full(shape, 0, jnp.float32), layout)


def _take_apart(refs, counts):
    out, at = [], 0
    for count in counts:
        out.append(refs[at : at + count])
        at += count
    return out


def grad_q(
    plan: Plan, config: Config, q, k, v, do, lse, delta, lists: BlockLists, operands, *,
    interpret: Any = None,
):
    """``dq[B, T, N, H]`` and, as many as ``row_vectors(plan)`` says, fp32 sums over the keys
    ``[B, N, T']`` of the cotangents of ``asked(plan, ROW_GROUPS)``, then those of
    ``asked(plan, ("dense",))``, fp32 ``[B, N, T', S']``. lse (base 2) and delta: float32
    ``[B, N, T']``."""
    B, _, N, H = q.shape
    K, V = v.shape[2:]
    G, rows, dtype = N // K, lists.rows, q.dtype
    block_k, stages = config.block_k, config.stages
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

        def scoped(q_smem, do_smem, k_smem, v_smem, staging, q_bar, kv_bar, free, turn, *box):
            wg = lax.axis_index("wg")
            queue = gpu_work.Queue(items, blocks, buffers, *box, interpret)

            def load_queries(item, buffer):
                b, n, r = queue.place(item)
                here = buffer * COMPUTE + wg
                at = (b, pl.ds(listed.index(b, n, r) * config.block_q + wg * WIDTH, WIDTH), n)
                plgpu.copy_gmem_to_smem(q_ref.at[at], q_smem.at[here], q_bar.at[here])
                plgpu.copy_gmem_to_smem(do_ref.at[at], do_smem.at[here], q_bar.at[here])

            def swap_turns():
                if config.turns:
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(turn)

            def grad(buffer, item, pull, it):
                b, n, r = queue.place(item)
                row, here = listed.row(b, n, r), buffer * COMPUTE + wg
                q0, end = row.index * config.block_q + wg * WIDTH, it + row.tiles
                at = (b, pl.ds(q0, WIDTH), n)
                vector = (b, n, pl.ds(q0, WIDTH))
                lse, delta = (
                    plgpu.load(x.at[vector], layout=ROW, optimized=False)
                    for x in (lse_ref, delta_ref)
                )
                plgpu.barrier_wait(q_bar.at[here])
                held = Tile(plan, operand_refs, b, n, q0, 0, (WIDTH, block_k)).hold()
                pl.when(row.tiles > 0)(lambda: plgpu.barrier_wait(kv_bar.at[lax.rem(it, stages)]))
                pl.when(wg == 1)(swap_turns)

                def step(j, carry, masked):
                    dq, sums, it = carry
                    slot, mine = lax.rem(it, stages), here + varying_zero(j)
                    shape = (WIDTH, block_k)
                    tile = dataclasses.replace(held, k0=j * block_k)

                    def scope(s_ref, dp_ref):
                        plgpu.wgmma(s_ref, q_smem.at[mine], k_smem.at[slot].transpose((1, 0)))
                        plgpu.wgmma(dp_ref, do_smem.at[mine], v_smem.at[slot].transpose((1, 0)))
                        early = tile.fetched(masked)
                        swap_turns()
                        return s_ref[...], dp_ref[...], early

                    acc = plgpu.ACC(shape, jnp.float32)
                    s, dp, tile.early = pl.run_scoped(scope, acc, acc)
                    narrow, sums = row_cotangents(
                        tile, s, dp, lse, delta, sums, masked, dtype, table_refs
                    )
                    if interpret is None:
                        dq, sums, narrow = lax.optimization_barrier((dq, sums, narrow))
                    swap_turns()
                    (dq,) = _add_products((dq,), (narrow,), (k_smem.at[slot],), staging, wg)
                    plgpu.barrier_arrive(free.at[slot])
                    after = lax.rem(it + 1, stages)
                    pl.when(it + 1 < end)(lambda: plgpu.barrier_wait(kv_bar.at[after]))
                    return dq, sums, it + 1

                carry = (
                    _zeros((WIDTH, H), LAYOUT),
                    tuple(_zeros((WIDTH,), ROW) for _ in range(totals)), it,
                )
                carry = row.full.visit(lambda j, c: step(j, c, False), carry)
                after = queue.early(pull, load_queries, buffer)
                dq, sums, it = row.partial.visit(lambda j, c: step(j, c, True), carry)
                pl.when(wg == 0)(swap_turns)
                q_smem[here] = (dq * plan.scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_smem.at[here], results[0].at[at])
                for out, x in zip(results[1 : 1 + len(sums)], sums, strict=True):
                    out[vector] = x
                return queue.late(after, pull, load_queries), it

            def copy_keys(item, it):
                b, n, r = queue.place(item)
                row, kv = listed.row(b, n, r), lax.div(n, G)

                def fetch(j, it):
                    slot = lax.rem(it, stages)
                    at = (b, pl.ds(j * block_k, block_k), kv)
                    pl.when(it >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[slot], kv_bar.at[slot])
                    plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[slot], kv_bar.at[slot])
                    return it + 1

                it = row.partial.visit(fetch, row.full.visit(fetch, it))
                clear_absent(table_refs, row, b, n, (config.block_q, block_k), LAYOUT)
                return it

            rings = ((free, stages),)
            pl.when(wg < COMPUTE)(lambda: queue.compute(grad, load_queries, config.registers))
            pl.when(wg == COMPUTE)(lambda: queue.copy(copy_keys, rings, registers=40))

        pl.run_scoped(
            scoped,
            tiled(dtype, buffers * COMPUTE, WIDTH, H), tiled(dtype, buffers * COMPUTE, WIDTH, V),
            tiled(dtype, stages, block_k, H), tiled(dtype, stages, block_k, V),
            None if interpret is None else tiled(dtype, COMPUTE, WIDTH, block_k),
            plgpu.Barrier(num_arrivals=2, num_barriers=buffers * COMPUTE),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE),
            *gpu_work.spaces(blocks < items.count, COMPUTE),
            collective_axes="wg",
        )

    return _launch(kernel, outs, blocks, blocks < items.count, inputs, interpret)


def grad_kv(
    plan: Plan, config: Config, q, k, v, do, lse, delta, lists: BlockLists, operands, *,
    interpret: Any = None,
):
    """``dk[B, S, K, H]``, ``dv[B, S, K, V]`` and, for each score of ``asked(plan, ("columns",))``,
    fp32 sums over the queries ``[B, N, S']``. ``lists`` are transposed."""
    B, _, N, H = q.shape
    K, V = v.shape[2:]
    G, rows, dtype = N // K, lists.rows, q.dtype
    block_q, stages = config.block_q, config.stages
    names = [name for name, _ in plan.names]
    wanted = asked(plan, ("columns",))
    items = order.over_keys(q, k, v, lists, config.section)
    blocks = gpu_work.blocks(items.count, config.persistent)
    buffers = gpu_work.buffers(items, blocks, config.persistent)
    inputs = [q, k, v, do, lse, delta, *gpu_work.given(lists), *operands]
    sums = jax.ShapeDtypeStruct((B, N, rows * config.block_k), jnp.float32)
    outs = [
        jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype),
        *[sums for _ in wanted],
    ]

    def kernel(*refs):
        (q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref), listed, given, results = _take_apart(
            refs, (6, gpu_work.GIVEN, len(names), len(outs))
        )
        listed = gpu_work.Listed(listed)
        operand_refs = dict(zip(names, given, strict=True))

        def scoped(k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, staging, kv_bar, q_bar,
                   free, turn, *box):
            wg = lax.axis_index("wg")
            queue = gpu_work.Queue(items, blocks, buffers, *box, interpret)

            def load_keys(item, buffer):
                b, kv, r = queue.place(item)
                here = buffer * COMPUTE + wg
                k0 = listed.index(b, kv * G, r) * config.block_k + wg * WIDTH
                at = (b, pl.ds(k0, WIDTH), kv)
                plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[here], kv_bar.at[here])
                plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[here], kv_bar.at[here])

            def swap_turns():
                if config.turns:
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(turn)

            def grad(buffer, item, pull, it):
                b, kv, r = queue.place(item)
                own = buffer * COMPUTE + wg
                k0 = listed.index(b, kv * G, r) * config.block_k + wg * WIDTH
                at = (b, pl.ds(k0, WIDTH), kv)
                end = it + lax.fori_loop(
                    0, G, lambda g, total: total + listed.tiles(b, kv * G + g, r), jnp.int32(0)
                )
                plgpu.barrier_wait(kv_bar.at[own])
                pl.when(end > it)(lambda: plgpu.barrier_wait(q_bar.at[lax.rem(it, stages)]))
                pl.when(wg == 1)(swap_turns)
                shape = (WIDTH, block_q)

                def step(i, carry, masked, here):
                    dk, dv, sums, it = carry
                    slot, mine = lax.rem(it, stages), own + varying_zero(i)

                    def scope(s_ref, dp_ref):
                        plgpu.wgmma(s_ref, k_smem.at[mine], q_smem.at[slot].transpose((1, 0)))
                        plgpu.wgmma(dp_ref, v_smem.at[mine], do_smem.at[slot].transpose((1, 0)))
                        swap_turns()
                        return s_ref[...], dp_ref[...]

                    acc = plgpu.ACC(shape, jnp.float32)
                    s, dp = pl.run_scoped(scope, acc, acc)
                    lse, delta = (
                        plgpu.load(x.at[slot], layout=COLUMN, optimized=False)
                        for x in (lse_smem, delta_smem)
                    )
                    tile = dataclasses.replace(here, q0=i * block_q)

                    def local(tile, s, dp, *sums):
                        z, pull, row = pull_scores(tile, s, wanted)
                        base = lse if row is None else lse - row
                        z = z - lax.broadcast_in_dim(base, shape, (1,))
                        if masked:
                            z = jnp.where(tile.seen(), z, -jnp.inf)
                        p = jnp.exp2(z)
                        ds, *rest = pull(p * (dp - lax.broadcast_in_dim(delta, shape, (1,))))
                        sums = [a + x.sum(axis=1) for a, x in zip(sums, rest, strict=True)]
                        return p.astype(dtype), ds.astype(dtype), *sums

                    *left, = tile.by_kind(local, s, dp, *sums)
                    left, sums = tuple(left[:2]), tuple(left[2:])
                    if interpret is None:
                        dk, dv, sums, left = lax.optimization_barrier((dk, dv, sums, left))
                    swap_turns()
                    right = (do_smem.at[slot], q_smem.at[slot])
                    dv, dk = _add_products((dv, dk), left, right, staging, wg)
                    plgpu.barrier_arrive(free.at[slot])
                    after = lax.rem(it + 1, stages)
                    pl.when(it + 1 < end)(lambda: plgpu.barrier_wait(q_bar.at[after]))
                    return dk, dv, sums, it + 1

                def load_early():
                    return queue.early(pull, load_keys, buffer)

                def head(g, carry):
                    n = kv * G + g
                    dk, dv, it, *later = carry
                    carry = (dk, dv, tuple(_zeros((WIDTH,), ROW) for _ in wanted), it)
                    here = Tile(plan, operand_refs, b, n, 0, k0, shape, q_axis=1).hold()
                    row = listed.row(b, n, r)
                    carry = row.full.visit(lambda i, c: step(i, c, False, here), carry)
                    if later:
                        later = [lax.cond(g == 0, load_early, lambda: later[0])]
                    carry = row.partial.visit(lambda i, c: step(i, c, True, here), carry)
                    dk, dv, sums, it = carry
                    for out, x in zip(results[2:], sums, strict=True):
                        out[b, n, pl.ds(k0, WIDTH)] = x
                    return dk, dv, it, *later

                later = [jnp.int32(0)] * (buffers - 1)  # the next item, once it is known
                carry = _zeros((WIDTH, H), LAYOUT), _zeros((WIDTH, V), LAYOUT), it, *later
                dk, dv, it, *later = lax.fori_loop(0, G, head, carry)
                pl.when(wg == 0)(swap_turns)
                k_smem[own] = (dk * plan.scale).astype(dtype)
                v_smem[own] = dv.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(k_smem.at[own], results[0].at[at])
                plgpu.copy_smem_to_gmem(v_smem.at[own], results[1].at[at])
                return queue.late(later[0] if later else None, pull, load_keys), it

            def copy_queries(item, it):
                b, kv, r = queue.place(item)

                def fetch(i, it, n):
                    slot = lax.rem(it, stages)
                    here = pl.ds(i * block_q, block_q)
                    pl.when(it >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    for source, target in (
                        (q_ref.at[b, here, n], q_smem), (do_ref.at[b, here, n], do_smem),
                        (lse_ref.at[b, n, here], lse_smem), (delta_ref.at[b, n, here], delta_smem),
                    ):
                        plgpu.copy_gmem_to_smem(source, target.at[slot], q_bar.at[slot])
                    return it + 1

                def head(g, it):
                    n = kv * G + g
                    row = listed.row(b, n, r)
                    it = row.full.visit(lambda i, c: fetch(i, c, n), it)
                    return row.partial.visit(lambda i, c: fetch(i, c, n), it)

                return lax.fori_loop(0, G, head, it)

            rings = ((free, stages),)
            pl.when(wg < COMPUTE)(lambda: queue.compute(grad, load_keys, config.registers))
            pl.when(wg == COMPUTE)(lambda: queue.copy(copy_queries, rings, registers=40))

        pl.run_scoped(
            scoped,
            tiled(dtype, buffers * COMPUTE, WIDTH, H), tiled(dtype, buffers * COMPUTE, WIDTH, V),
            tiled(dtype, stages, block_q, H), tiled(dtype, stages, block_q, V),
            plgpu.SMEM((stages, block_q), jnp.float32), plgpu.SMEM((stages, block_q), jnp.float32),
            None if interpret is None else tiled(dtype, COMPUTE, WIDTH, block_q),
            plgpu.Barrier(num_arrivals=2, num_barriers=buffers * COMPUTE),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE),
            *gpu_work.spaces(blocks < items.count, COMPUTE),
            collective_axes="wg",
        )

    return _launch(kernel, outs, blocks, blocks < items.count, inputs, interpret)


def _launch(kernel, outs, blocks: int, counts: bool, inputs, interpret):
    keywords = {} if interpret is None else {"interpret": interpret}
    call = plgpu.kernel(
        kernel, out_type=outs, grid=(blocks,), grid_names=("tile",), num_threads=COMPUTE + 1,
        thread_name="wg", compiler_params=plgpu.CompilerParams(approx_math=True), **keywords,
    )
    return gpu_work.launched(call, counts)(*inputs)
