"""Scaled dot-product attention with structured masks: one public function, several implementations.

For query row ``t`` of head ``n`` and its key/value head ``n // G``::

    z[t, s] = mod(cap(scale * q[t, n] . k[s, n // G]))
    cap(z) = c tanh(z / c) if logit_cap = c; mod is the score_mod
    p[t, s] = exp(z[t, s]) / (sum_{s visible} exp(z[t, s]) + exp(sink_logits[n]))
    o[t, n] = sum_s p[t, s] v[s, n // G]
    lse[t, n] = log(sum_{s visible} exp(z[t, s]) + exp(sink_logits[n]))

Order of application: scale, logit cap, score_mod, mask, sink logits, softmax.

A row without visible key and
without sink returns zero with zero gradient, and ``lse = -inf``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from attnlab.core import axes
from attnlab.core.dispatch import Device, Implementation, Op
from attnlab.core.errors import ConfigError, DtypeError, ShapeError
from attnlab.core.linear import widened
from attnlab.core.mask import Mask
from attnlab.core.mods import Mod, Program
from attnlab.core.types import Layout
from attnlab.ops.attention import gpu, reference, tpu, triton, vendor, vendor_tokamax_splash, xla
from attnlab.ops.attention.inputs import (
    check_options,
    composed,
    coordinate_specs,
    coordinates,
)
from attnlab.ops.attention.planned import Planned, plan

__all__ = ["OP", "Call", "Planned", "attention", "plan"]


@dataclasses.dataclass(frozen=True)
class Call:
    """The static facts of a call: what an implementation may decide by.

    Args:
        B, T, S, N, K, H, V: shapes. dtype: of q, k and v. mask: the composed mask (block lists and
            prefix lengths in it may be traced). layout: what is promised of positions and segments;
            "full" only if queries and keys are the same row of positions 0..T-1.
        segments, sink_logits, return_lse: whether present. logit_cap: value or None.
        device: what the call is compiled for. softmax_dtype: of logits, sums and lse. score: the
            traced score_mod or None.
    """

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    V: int
    dtype: str
    mask: Mask
    layout: Layout
    segments: bool
    sink_logits: bool
    logit_cap: float | None
    return_lse: bool
    device: Device
    softmax_dtype: str = "float32"
    score: Program | None = None


def _always(call: Call) -> str | None:
    return None


OP = Op(
    "attention",
    [
        Implementation("reference", _always, reference.forward),
        Implementation("xla", _always, xla.forward, step=xla.step),
        *gpu.IMPLEMENTATIONS,
        tpu.IMPLEMENTATION,
        triton.IMPLEMENTATION,
        *vendor.IMPLEMENTATIONS,
        vendor_tokamax_splash.IMPLEMENTATION,
    ],
    {
        "cpu": ("xla",),
        "gpu": ("cudnn", "gpu", "tokamax", "triton", "xla"),
        "tpu": ("splash", "tpu", "xla"),
    },
)


@overload
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, return_lse: Literal[False] = False, **keywords: Any
) -> jax.Array: ...
@overload
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, return_lse: Literal[True], **keywords: Any
) -> tuple[jax.Array, jax.Array]: ...
def attention(  # pyright: ignore[reportInconsistentOverload] - the overloads fold the keywords
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: Mask | Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | Mod | None = None,
    scale: float | None = None,
    positions: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    segments: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    layout: Layout = "any",
    sink_tokens: int = 0,
    sink_logits: Float[Array, " N"] | None = None,
    logit_cap: float | None = None,
    return_lse: bool = False,
    softmax_dtype: str = "float32",
    impl: str | Sequence[str] | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention of ``q[B, T, N, H]`` over ``k[B, S, K, H]`` and ``v[B, S, K, V]``.

    Args:
        mask: a composed mask, or a function ``mask_mod(head, q_pos, k_pos) -> bool``; default
            ``Causal()``. Where segments are given, tokens see each other only inside one segment
            and segment 0 sees nothing, whatever the mask says. ``plan(mask, ...)`` turns it once
            into block lists that all calls of a step share.
        score_mod: ``score_mod(score, head, q_pos, k_pos) -> score``, traced on scalars; it may
            close over arrays (slopes, relative tables, biases), which get their gradients. See
            ``core.mods`` for what else it may read. Inside ``shard_map`` give the numbers of the
            rows and heads at hand: ``Mod.of(f, score_dtype="float32").at(batch=..., heads=...)``,
            and ``MaskMod(Mod.of(f).at(...))`` for a mask.
        scale: multiplies the logits; default ``H**-0.5``.
        positions, segments: int32 ``[B, T]`` for both sides (then S = T), or a pair
            ``([B, T], [B, S])``. No positions means ``0..T-1`` on both sides.
        layout: a static promise about positions and segments (``core.types.Seq``); kernels that
            cannot read positions serve only calls that promise enough.
        sink_tokens: the first tokens of each document stay visible to every later query.
        sink_logits: ``[N]`` learned logits that join the denominator of their head.
        logit_cap: ``c`` in ``c tanh(z / c)``.
        return_lse: also return the log-sum-exp ``[B, T, N]`` in ``softmax_dtype``; differentiable.
        impl: None (first that serves the call), a name, or a sequence of names to try.

    Returns:
        ``o[B, T, N, V]`` in the dtype of v, or ``(o, lse)``. Differentiable in q, k, v, sink_logits
        and what score_mod closes over, through o and lse (kernels: once; second derivatives raise).

    Raises:
        ShapeError, DtypeError, ConfigError: on bad arguments.
        ImplementationError: ``impl`` refuses the call.
    """
    call, given = arguments(
        q, k, v, mask=mask, score_mod=score_mod, scale=scale, positions=positions,
        segments=segments, layout=layout, sink_tokens=sink_tokens, sink_logits=sink_logits,
        logit_cap=logit_cap, return_lse=return_lse, softmax_dtype=softmax_dtype,
    )
    if call.S == 0 or call.B == 0 or call.T == 0:
        raise ShapeError(
            f"B = {call.B}, T = {call.T}, S = {call.S}", "there is nothing to attend to",
            "leave the call out",
        )
    chosen = OP.choose(call, impl)
    forward = chosen.forward
    if not chosen.partitions:
        forward = functools.partial(_over_shards, forward)
    out, lse = forward(q, k, v, **given)
    return (out, lse) if return_lse else out


def arguments(
    q, k, v, *, mask, score_mod, scale, positions, segments, layout, sink_tokens, sink_logits,
    logit_cap, return_lse, softmax_dtype,
) -> tuple[Call, dict[str, Any]]:
    """The facts of a call and the keywords of implementations; raises as ``attention`` does."""
    B, T, N, H, S, K, V = _shapes(q, k, v)
    planned = mask if isinstance(mask, Planned) else None
    mask = composed(mask, sink_tokens, segments is not None)
    q_coords, k_coords, layout = coordinates(positions, segments, layout, B, T, S)
    check_options(N, sink_logits, logit_cap, scale, softmax_dtype)
    if planned is not None:
        planned.check_call(T, S, layout)
    mask.check(B, N, T)
    mask = mask.bound(B, N)
    softmax_dtype = jnp.dtype(softmax_dtype).name
    score = None
    if score_mod is not None:
        score = _score(score_mod, softmax_dtype).bound(B, N)
        score.check_segments(segments is not None)
    call = Call(
        B, T, S, N, K, H, V, q.dtype.name, mask, layout, segments is not None,
        sink_logits is not None, logit_cap, return_lse, Device.default(), softmax_dtype,
        None if score is None else score.program,
    )
    given = dict(
        q_coords=q_coords,
        k_coords=k_coords,
        sink_logits=sink_logits,
        mask=mask,
        score=score,
        scale=1.0 / math.sqrt(H) if scale is None else scale,
        logit_cap=logit_cap,
        return_lse=return_lse,
        softmax_dtype=jnp.dtype(softmax_dtype),
        layout=layout,
    )
    return call, given


def _score(score_mod: Callable[..., Any] | Mod, softmax_dtype: str) -> Mod:
    if not isinstance(score_mod, Mod):
        if not callable(score_mod):
            raise ConfigError(
                f"score_mod is a {type(score_mod).__name__}", "must be a function of a pair",
                "lambda score, head, q_pos, k_pos: score + bias[head, q_pos - k_pos]",
            )
        return Mod.of(score_mod, score_dtype=softmax_dtype)
    program = score_mod.program
    traced = dict(zip(program.inputs, program.jaxpr.invars)).get("score")
    if traced is None or traced.aval.dtype != softmax_dtype:
        raise ConfigError(
            f"score_mod = Mod {program.name}, traced for "
            f"{'a mask' if traced is None else traced.aval.dtype}",
            f"the scores are {softmax_dtype}", f"Mod.of(f, score_dtype={softmax_dtype!r})",
        )
    return score_mod


def _over_shards(forward, *arrays, mask, score, q_coords, k_coords, sink_logits, **static):
    """``forward`` on each device's rows and heads, for kernels that XLA cannot cut itself.

    Rows and heads are independent of each other: nothing is communicated. Heads stay whole where
    the mesh does not cut queries and keys alike; a single key/value head goes to every device.
    Inside ``shard_map`` they are at hand already. ``arrays``: q, k, v; a step has its carry before.
    """
    *carry, q, k, v = arrays
    dtype = k.dtype

    def part(carry, q, k, v, mask, score, q_coords, k_coords, sink_logits):
        k, v = k.astype(dtype), v.astype(dtype)
        return forward(
            *carry, q, k, v, mask=mask, score=score, q_coords=q_coords, k_coords=k_coords,
            sink_logits=sink_logits, **static,
        )

    mesh = axes.mesh_to_cut()
    if mesh is None:
        return part(carry, q, k, v, mask, score, q_coords, k_coords, sink_logits)
    batch, (heads, kv_heads) = axes.cut("batch", q.shape[0]), axes.cut_heads(q.shape[2], k.shape[2])
    if heads and not kv_heads:
        k, v = widened(k, "float32"), widened(v, "float32")
    q_spec, kv_spec = P(batch, None, heads), P(batch, None, kv_heads)
    coords = coordinate_specs(q_coords, batch)
    mods = None if score is None else score.specs(P, batch, heads)
    carried = jax.tree.map(lambda _: q_spec, carry)
    specs = (
        carried, q_spec, kv_spec, kv_spec, mask.specs(batch, heads), mods, coords, coords, P(heads)
    )
    return jax.shard_map(
        part, mesh=mesh, in_specs=specs, out_specs=(q_spec,) * (2 + len(carry)),
        check_vma=False,
    )(carry, q, k, v, mask, score, q_coords, k_coords, sink_logits)


def _shapes(q, k, v) -> tuple[int, int, int, int, int, int, int]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            kind = type(x).__name__
            raise DtypeError(f"{name} is a {kind}", "must be an array", "use jnp.asarray")
        if x.ndim != 4 or 0 in x.shape[2:]:
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}",
                "must be [batch, tokens, heads, width], with heads and width above 0",
                "the layout is always B T N H",
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise DtypeError(f"{name} has dtype {x.dtype}", "must be floating", "cast it")
    if not q.dtype == k.dtype == v.dtype:
        raise DtypeError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}", "must agree", "cast them to one"
        )
    B, T, N, H = q.shape
    _, S, K, _ = k.shape
    if k.shape != (B, S, K, H) or v.shape[:3] != (B, S, K):
        raise ShapeError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            "must be [B, T, N, H], [B, S, K, H], [B, S, K, V]",
            "check batch, key tokens, key/value heads and the width of q and k",
        )
    if N % K:
        raise ShapeError(
            f"N = {N} query heads over K = {K} key/value heads", "N must be a multiple of K",
            "query head n uses key/value head n // (N/K)",
        )
    return B, T, N, H, S, K, v.shape[3]
