"""Relative tables in the Hopper kernels: values that depend on query minus key position.

A tile of 64 rows sees the distances ``offset + r - c`` (``c - r`` in transposed tiles), so it is a
Toeplitz matrix named by its offset alone. Where all its distances look up the same entry (far from
the diagonal of a bucketed or clipped table) it is one number; the few other offsets have their tile
stored, ``[slots, 64, C]`` fp32, whatever the length. Which is which follows from the index
arithmetic of the function, not from the values, so gradients go to the right entries.

Gradients: of the numbers, sums over the keys in the dq kernel; of the stored tiles, a kernel that
walks down each diagonal of tiles and keeps the sum in registers. Both are deterministic.
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
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab.core.staging import Body, index_runs
from attnlab.ops.attention.gpu_tiles import LAYOUT, WIDTH

MOST_NUMBERS = 8
MOST_BYTES = 2**29


@dataclasses.dataclass(frozen=True, eq=False)
class Diagonals:
    """What is known of the tiles of 64 rows by their offset, query minus key of the first entries.

    Args:
        columns: C. q_axis: axis of the queries in a tile. first: smallest offset, over 64. kinds:
            int32, an entry an offset: its slot, or -1 - i where it is the i-th number. numbers:
            the run (see ``index_runs``) that number i is the value of. offsets: of each slot.
            runs: the run of every distance.
    """

    columns: int
    q_axis: int
    first: int
    kinds: np.ndarray
    numbers: np.ndarray
    offsets: np.ndarray
    runs: np.ndarray


@functools.lru_cache(maxsize=128)
def diagonals(body: Body, T: int, S: int, columns: int, q_axis: int) -> Diagonals:
    """Sort the offsets of tiles of ``columns`` into numbers and slots."""
    runs = index_runs(body, T, S)
    first, last = -S // WIDTH - 2, -(-T // WIDTH) + 2
    offsets = np.arange(first, last) * WIDTH
    low, high = (columns - 1, WIDTH - 1) if q_axis == 0 else (WIDTH - 1, columns - 1)
    ends = [np.clip(offsets + S - 1 + x, 0, S - 2 + T) for x in (-low, high)]
    same = runs[ends[0]] == runs[ends[1]]
    names, counts = np.unique(runs[ends[0]][same], return_counts=True)
    kept = names[np.argsort(-counts, kind="stable")[:MOST_NUMBERS]]
    number = {name: i for i, name in enumerate(kept.tolist())}
    kinds = np.full(offsets.shape, 0, np.int32)
    slots = []
    for i, name in enumerate(runs[ends[0]].tolist()):
        if same[i] and name in number:
            kinds[i] = -1 - number[name]
        else:
            kinds[i] = len(slots)
            slots.append(offsets[i])
    numbers = np.asarray(kept if len(kept) else [0], np.int32)
    return Diagonals(
        columns, q_axis, first, kinds, numbers, np.asarray(slots or [0], np.int32), runs
    )


def distances(body: Body, T: int, S: int) -> np.ndarray:
    """One distance of every run: values are taken there, ``[., ., runs]``."""
    return np.unique(index_runs(body, T, S), return_index=True)[1] - (S - 1)


def tile_bytes(body: Body, T: int, S: int, heads: int) -> int:
    """Bytes of the stored tiles of one value, for 128 columns."""
    return diagonals(body, T, S, 128, 0).offsets.size * heads * WIDTH * 128 * 4


def operands(d: Diagonals, value: jax.Array, S: int) -> tuple[jax.Array, jax.Array]:
    """``numbers[., ., R]`` and ``tiles[., ., slots, 64, C]`` of ``value[., ., runs]``."""
    r, c = np.arange(WIDTH)[:, None], np.arange(d.columns)[None]
    inside = r - c if d.q_axis == 0 else c - r
    place = np.clip(d.offsets[:, None, None] + inside + S - 1, 0, d.runs.size - 1)
    return value[..., d.numbers], value[..., d.runs[place]]


def folded(d: Diagonals, numbers: jax.Array, tiles: jax.Array, T: int, S: int) -> jax.Array:
    """Gradient ``[B, N, runs]`` of a value from those of its numbers and stored tiles.

    The tiles are those of query rows (``q_axis = 0``).
    """
    B, N, slots, _, C = tiles.shape
    span, width = S - 1 + T, WIDTH + C - 1
    # Row r of a tile holds the distances offset + r - c: reversed, shifted by r, added up.
    rows = tiles[..., ::-1]
    rows = jnp.pad(rows, [(0, 0)] * 4 + [(0, WIDTH)]).reshape(B, N, slots, -1)
    rows = rows[..., : WIDTH * width].reshape(B, N, slots, WIDTH, width)
    sums = rows.sum(3)
    pad = C + WIDTH + WIDTH * 3
    out = jnp.zeros((B, N, span + 2 * pad), jnp.float32)
    starts = jnp.asarray(d.offsets - (C - 1) + S - 1 + pad)

    def add(i, out):
        here = lax.dynamic_slice_in_dim(out, starts[i], width, 2)
        return lax.dynamic_update_slice_in_dim(out, here + sums[:, :, i], starts[i], 2)

    out = lax.fori_loop(0, slots, add, out) if (d.kinds >= 0).any() else out
    low = out[..., :pad].sum(-1)
    high = out[..., pad + span :].sum(-1)
    out = out[..., pad : pad + span]
    out = out.at[..., 0].add(low).at[..., -1].add(high)
    out = _run_sums(out, d.runs)
    for i, run in enumerate(d.numbers.tolist()):
        out = out.at[..., run].add(numbers[:, :, i])
    return out


def _run_sums(x, runs: np.ndarray):
    """Sums over the entries of each run, in a fixed order (a scatter on a GPU has none)."""
    starts = np.flatnonzero(np.diff(runs, prepend=-1))
    ends = np.append(starts[1:], runs.size)
    out = x[..., starts]
    for i in np.flatnonzero(ends - starts > 1).tolist():
        out = out.at[..., i].set(x[..., starts[i] : ends[i]].sum(-1))
    return out


def grad_tiles(
    plan: Any, d: Diagonals, q, k, v, do, lse, delta, operand_arrays, *, interpret: Any = None
):
    """Cotangents of the stored tiles of the ``asked`` values: fp32 ``[B, N, slots, 64, C]``.

    Every warpgroup takes a share of the query tiles, keeps one offset, and adds up ``pull(dz)`` of
    the tiles down that diagonal. The mask decides every pair: no block lists are read.
    """
    from attnlab.ops.attention.gpu_backward import asked, pull_scores
    from attnlab.ops.attention.gpu_forward import ROW, tiled
    from attnlab.ops.attention.gpu_tiles import Tile

    B, T, N, H = q.shape
    S, K, V = v.shape[1:]
    G, C, dtype, slots = N // K, d.columns, q.dtype, d.offsets.size
    groups = 2
    chunks = max(1, min(8, -(-T // (WIDTH * groups * 8)), 264 // max(1, B * N * slots) + 1))
    rows = -(-T // WIDTH)
    wanted = asked(plan, ("distances",))
    names = [name for name, _ in plan.names]
    offsets = jnp.asarray(d.offsets // WIDTH)  # in tiles: what is copied must start at a tile
    inputs = [q, k, v, do, lse, delta, offsets, *operand_arrays]
    shape = (B, N, slots, chunks * groups, WIDTH, C)
    outs = [jax.ShapeDtypeStruct(shape, jnp.float32) for _ in wanted]

    def kernel(*refs):
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, offset_ref = refs[:7]
        given, results = refs[7 : 7 + len(names)], refs[7 + len(names) :]
        operand_refs = dict(zip(names, given, strict=True))

        def scoped(q_smem, do_smem, k_smem, v_smem, bar):
            wg, step_id = lax.axis_index("wg"), lax.axis_index("tile")
            bn, rest = lax.div(step_id, slots * chunks), lax.rem(step_id, slots * chunks)
            slot, chunk = lax.div(rest, chunks), lax.rem(rest, chunks)
            b, n = lax.div(bn, N), lax.rem(bn, N)
            kv = lax.div(n, G)
            offset = offset_ref[slot]
            share = chunk * groups + wg

            def place(i):
                return i * WIDTH, (i - offset) * WIDTH

            def valid(i):
                q0, k0 = place(i)
                return (k0 >= 0) & (k0 < S) & (lax.rem(k0 + C * rows, C) == 0) & (q0 < T)

            def fetch(i):
                q0, k0 = place(i)
                for source, target in (
                    (q_ref.at[b, pl.ds(q0, WIDTH), n], q_smem),
                    (do_ref.at[b, pl.ds(q0, WIDTH), n], do_smem),
                    (k_ref.at[b, pl.ds(k0, C), kv], k_smem),
                    (v_ref.at[b, pl.ds(k0, C), kv], v_smem),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[wg], bar.at[wg])

            def add(i, sums):
                q0, k0 = place(i)
                fetch(i)
                vector = (b, n, pl.ds(q0, WIDTH))
                lse_row, delta_row = (
                    plgpu.load(x.at[vector], layout=ROW, optimized=False)
                    for x in (lse_ref, delta_ref)
                )
                plgpu.barrier_wait(bar.at[wg])

                def scope(s_acc, dp_acc):
                    plgpu.wgmma(s_acc, q_smem.at[wg], k_smem.at[wg].transpose((1, 0)))
                    plgpu.wgmma(dp_acc, do_smem.at[wg], v_smem.at[wg].transpose((1, 0)))
                    return s_acc[...], dp_acc[...]

                acc = plgpu.ACC((WIDTH, C), jnp.float32)
                s, dp = pl.run_scoped(scope, acc, acc)
                tile = Tile(plan, operand_refs, b, n, q0, k0, (WIDTH, C), stored=slot)
                z, pull, _ = pull_scores(tile, s, wanted)
                z = z - lax.broadcast_in_dim(lse_row, s.shape, (0,))
                z = jnp.where(tile.seen(), z, -jnp.inf)
                dz = jnp.exp2(z) * (dp - lax.broadcast_in_dim(delta_row, s.shape, (0,)))
                return tuple(a + x for a, x in zip(sums, pull(dz)[1:], strict=True))

            def step(i, sums):
                i = share + i * (chunks * groups)
                return lax.cond(valid(i), lambda c: add(i, c), lambda c: c, sums)

            zero = plgpu.layout_cast(jnp.full((WIDTH, C), 0, jnp.float32), LAYOUT)
            sums = lax.fori_loop(
                0, -(-rows // (chunks * groups)), step, tuple(zero for _ in wanted)
            )
            for out, x in zip(results, sums, strict=True):
                out[b, n, slot, share] = x

        pl.run_scoped(
            scoped,
            tiled(dtype, groups, WIDTH, H), tiled(dtype, groups, WIDTH, V),
            tiled(dtype, groups, C, H), tiled(dtype, groups, C, V),
            plgpu.Barrier(num_arrivals=4, num_barriers=groups),
            collective_axes="wg",
        )

    keywords = {} if interpret is None else {"interpret": interpret}
    found = plgpu.kernel(
        kernel, out_type=outs, grid=(B * N * slots * chunks,), grid_names=("tile",),
        num_threads=groups, thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True), **keywords,
    )(*inputs)
    return [x.sum(3) for x in found]
