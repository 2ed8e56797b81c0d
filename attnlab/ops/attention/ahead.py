"""Block lists made once a step for a whole stack of layers.

Kernels that read block lists build them in every call. In a stack that is scanned or rematerialised
the compiler cannot merge these builds: each layer makes its own, in the backward pass again. A
stack therefore plans ahead, from the configs of its layers, and hands every layer a ``Seq`` that
carries the lists::

    for config in configs:
        seq = config.plan(seq, impl)                     plan_ahead with what the layer will ask for
    ...
    o = attention(q, k, v, **seq.keywords(mask, N))      mask, positions, segments, layout

Only what costs time on the device is planned: lists of a static mask over whole rows are constants,
and implementations that read no lists need none. A layer alone asks a ``Seq`` without plans and
gets its mask back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from attnlab.core import axes
from attnlab.core.dispatch import Device, recording
from attnlab.core.mask import Mask
from attnlab.core.types import Precision, Seq
from attnlab.ops.attention import OP, Call, tuning
from attnlab.ops.attention.blocks import on_host
from attnlab.ops.attention.inputs import composed
from attnlab.ops.attention.planned import Planned, plan


def plan_ahead(
    seq: Seq,
    *,
    mask: Mask,
    heads: tuple[int, int],
    widths: tuple[int, int],
    precision: Precision,
    sink_logits: bool = False,
    logit_cap: float | None = None,
    impl: str | Sequence[str] | None = None,
) -> Seq:
    """``seq`` with the block lists that calls of ``attention`` over its tokens will read.

    Args:
        mask: as the layer will name it in ``seq.planned(mask, N)``. heads: (N, K). widths: (H, V).
        precision: of the layer. sink_logits: whether there are any. logit_cap, impl: as in
            ``attention``.

    Returns ``seq`` as it is where the implementation that will serve the calls reads no lists, and
    where they are constants.

    Raises:
        ConfigError, ShapeError, ImplementationError: as ``attention`` does; ConfigError also where
            ``seq`` has plans of other tokens.
    """
    (B, T), (N, K), (H, V) = seq.positions.shape, heads, widths
    segments = seq.segments is not None
    whole = composed(mask, 0, segments)
    if B == 0 or T == 0 or on_host(whole, seq.layout):
        return seq
    whole.check(B, N, T)
    call = Call(
        B, T, T, N, K, H, V, jnp.dtype(precision.compute).name, whole.bound(B, N), seq.layout,
        segments, sink_logits, logit_cap, False, Device.default(), precision.softmax,
    )
    with recording(), tuning.recording():  # questions, not calls
        chosen = OP.choose(call, impl)
        tiles = () if chosen.tiles is None else chosen.tiles(_of_one_device(call))
    planned = seq.planned(mask, N)
    for block_q, block_k in tiles:
        known = isinstance(planned, Planned) and planned.find(block_q, block_k, seq.layout, False)
        if not known:
            planned = plan(
                planned, positions=seq.positions, segments=seq.segments, layout=seq.layout,
                batch=B, heads=N, block_q=block_q, block_k=block_k,
            )
    return seq if planned is mask else seq.with_plan(mask, N, planned)


def _of_one_device(call: Call) -> Call:
    """The call that a kernel sees on a mesh: of one device's rows and heads."""
    mesh = axes.mesh_to_cut()
    if mesh is None:
        return call
    cuts = axes.cut("batch", call.B), *axes.cut_heads(call.N, call.K)
    rows, heads, kv_heads = (math.prod(mesh.shape[name] for name in names) for names in cuts)
    return dataclasses.replace(call, B=call.B // rows, N=call.N // heads, K=call.K // kv_heads)
