"""Values by query and key in the Hopper kernels: a bias ``[N, T, S]``, a boolean table in a mask.

Nothing is shared between tiles, so a tile is read straight from device memory in the layout of the
accumulator, 8 bytes a thread and a full sector four threads, while the tensor cores compute the
logits beside it. The kernel over keys reads a transposed copy. Truth values travel as int8.

The gradient of a floating value is ``pull(dz)`` itself: the dq kernel writes it tile by tile, fp32
``[B, N, T', S']`` whatever the value's own leading axes, which are summed outside. Every tile is
written once, those that the mask rules out as zeros: no order of sums, no atomics.
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


def operand(x: jax.Array, dtype: str, block_q: int, block_k: int, transposed: bool) -> jax.Array:
    """``x[., ., T, S]`` padded to whole tiles, ``[., ., S', T']`` where tiles are transposed."""
    extra = [(0, -n % size) for n, size in zip(x.shape[2:], (block_q, block_k), strict=True)]
    x = x.astype(jnp.int8) if dtype == "bool" else x
    x = jnp.pad(x, [(0, 0), (0, 0), *extra], mode="edge") if any(map(any, extra)) else x
    return x.swapaxes(2, 3) if transposed else x


def clear_absent(tables: Any, row: Any, b: Any, n: Any, blocks: Any, layout: Any) -> None:
    """Zeros in the tiles (of ``blocks`` queries and keys) that a ``gpu_work.Row`` does not visit,
    in every reference of ``tables``.

    Runs of both kinds are ascending and apart from each other: they are walked together.
    """
    if not tables:
        return
    columns = tables[0].shape[-1] // blocks[1]

    def zero(j, carry):
        here = [pl.ds(i * size, size) for i, size in zip((row.index, j), blocks, strict=True)]
        for table in tables:
            none = jnp.full(blocks, 0, jnp.float32)
            table[b, n, *here] = plgpu.layout_cast(none, layout)
        return carry

    def step(_, carry):
        place, *done = carry
        found = []
        for runs, e in zip((row.full, row.partial), done, strict=True):
            at = runs.start + jnp.minimum(e, jnp.maximum(runs.number - 1, 0))
            first, count = runs.at(jnp.minimum(at, runs.firsts.shape[-1] - 1))
            found.append((jnp.where(e < runs.number, first, columns), count))
        (full, full_count), (partial, partial_count) = found
        one = full < partial
        first = jnp.where(one, full, partial)
        lax.fori_loop(place, first, zero, jnp.int32(0))
        place = first + jnp.where(one, full_count, partial_count)
        one = one.astype(jnp.int32)
        return place, done[0] + one, done[1] + 1 - one

    number = row.full.number + row.partial.number
    place, *_ = lax.fori_loop(0, number, step, (jnp.int32(0),) * 3)
    lax.fori_loop(place, columns, zero, jnp.int32(0))
