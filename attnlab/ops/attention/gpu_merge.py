"""The second kernel of decoding on Hopper: the pieces of every query row become its result.

    o = sum_p w_p o_p / (sum_p w_p + exp2(sink2))      lse2 = log2 of the denominator
    w_p = exp2(lse2_p - m)      m = max of all lse2_p and sink2, running

A thread block a query row; pieces are added in their order, so the result is the same every time.
"""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab.ops.attention.decode_gpu import ROWS, Static, Work
from attnlab.ops.attention.gpu_tiles import LOG2E, NEVER


def combine(static: Static, o, lse2, work: Work, sink, dtype, *, interpret: Any = None):
    """``(o [tasks, R, V'], lse fp32 [tasks, R])`` of the pieces of ``pieces``.

    Args:
        sink: float32 ``[N]`` or None: the logit that joins the denominator of its head.
    """
    tasks, (_, R, V) = work.start.shape[0] - 1, o.shape
    consumers = static.sizes.consumers
    inputs = [o, lse2, work.start, work.share, *([] if sink is None else [sink])]
    outs = [
        jax.ShapeDtypeStruct((tasks, R, V), dtype), jax.ShapeDtypeStruct((tasks, R), jnp.float32)
    ]

    def kernel(o_ref, lse_ref, start_ref, share_ref, *rest):
        sink_ref, (out_ref, total_ref) = rest[0], rest[-2:]
        at = lax.axis_index("row")
        task, r = lax.div(at, R), lax.rem(at, R)
        low, high, share = start_ref[task], start_ref[task + 1], share_ref[0]
        part = lax.div(low, share)
        number = jnp.where(high > low, lax.div(high - 1, share) - part + 1, 0) * consumers
        begin = (task + part) * consumers

        def step(i, carry):
            acc, m, l = carry
            lse = lse_ref[begin + i, r]
            top = jnp.maximum(m, lse)
            old, new = jnp.exp2(m - top), jnp.exp2(lse - top)
            piece = plgpu.load(o_ref.at[begin + i, r], optimized=False)
            return acc * old + piece * new, top, l * old + new

        m, l = jnp.float32(NEVER), jnp.float32(0)
        if sink is not None:
            head = lax.rem(lax.div(task, static.tasks), static.K)
            row = lax.rem(task, static.tasks) * ROWS + r
            m, l = sink_ref[head * static.G + lax.rem(row, static.G)] * LOG2E, jnp.float32(1)
        acc = jnp.zeros((V,), jnp.float32)
        acc, m, l = lax.fori_loop(0, number, step, (acc, m, l))
        empty = m <= NEVER
        out_ref[task, r] = (acc / jnp.where(empty, 1.0, l)).astype(dtype)
        total_ref[task, r] = jnp.where(empty, -jnp.inf, (m + jnp.log2(l)) * (1 / LOG2E))

    keywords = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        kernel,
        out_type=outs,
        grid=(tasks * R,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **keywords,
    )(*inputs)
