"""Mosaic GPU kernels for Hopper behind the attention op: what they serve, and their gradient.

Sources: Dao et al. 2022, arXiv 2205.14135 (tiles, backward by recomputation); Shah et al. 2024,
arXiv 2407.08608 (Hopper: copies and two warpgroups that take turns); Dong et al. 2024, arXiv
2412.05496 (score and mask functions, block lists).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.core.axes import vary
from attnlab.core.dispatch import Implementation
from attnlab.core.mask import Blocks, Causal, MaskMod, SinkTokens, conjuncts, masked, parts
from attnlab.core.mods import Mod, Program
from attnlab.core.staging import Body, split, values
from attnlab.core.types import Layout
from attnlab.ops.attention import hopper
from attnlab.ops.attention.gpu_sizes import Sizes, whole_widths
from attnlab.ops.attention.pairs import capped, pair_mod, runs_mod

HALF = ("bfloat16", "float16")
MASK_GROUPS = ("heads", "rows", "columns", "dense")
MOST_GRADIENT = 2**33  # bytes of the gradients of values by query and key, 4 B N T S each
# What Mosaic GPU has no lowering for.
MISSING = frozenset(
    "log1p expm1 pow cbrt tan floor ceil is_finite erf_inv erfc not atan2 population_count".split()
)


def supports(call) -> str | None:
    """None where the kernels serve the call, else the reason."""
    if _wide(call):
        return (
            f"H = {call.H}, V = {call.V}: served up to 256; impl='gpu-wide' serves wider heads, "
            "forward only"
        )
    return next((reason for refused, reason in _limits(call) if refused), None)


def supports_wide(call) -> str | None:
    """As ``supports``, for the kernels of wider heads."""
    if not _wide(call):
        return f"H = {call.H}, V = {call.V}: served by impl='gpu'"
    return next((reason for refused, reason in _limits(call) if refused), None)


def _wide(call) -> bool:
    return max(call.H, call.V) > 256


def _limits(call):
    yield from hopper.limits(call.device)
    yield call.dtype not in HALF, f"dtype is {call.dtype}, served: {', '.join(HALF)}"
    yield call.softmax_dtype != "float32", f"softmax is float32 only, not {call.softmax_dtype}"
    yield call.H > 576 or call.V > 512, (
        f"H = {call.H}, V = {call.V}: served up to 256, and without gradient up to 576 and 512"
    )
    if call.score is not None:
        body = split(call.score, call.T, call.S)
        yield from _body_limits("score_mod", body)
        tables = sum(h.group == "dense" and h.dtype == "float32" for h in body.handed)
        size = 4 * tables * call.B * call.N * call.T * call.S
        yield size > MOST_GRADIENT, (
            f"score_mod {call.score.name} looks up a captured array by query and key: its gradient "
            f"takes {size} bytes, served up to {MOST_GRADIENT}"
        )
        if any(h.group == "distances" for h in body.handed):
            from attnlab.ops.attention import gpu_distance

            yield call.layout == "any", "a table by distance is served in layouts full and packed"
            size = gpu_distance.tile_bytes(body, call.T, call.S, call.N)
            yield size > gpu_distance.MOST_BYTES, (
                f"the table by distance differs on too many diagonals: its tiles take {size} bytes"
            )
            yield call.H + call.V > 448, "a table by distance is served up to H + V = 448"
            blocks = any(isinstance(part, Blocks) for part in parts(call.mask))
            yield blocks, "a table by distance is not served with Blocks"
    for part in parts(call.mask):
        if isinstance(part, MaskMod):
            yield from _body_limits("mask_mod", split(part.mod.program, call.T, call.S))
        if isinstance(part, Blocks):
            under = any(part is other for other in conjuncts(call.mask))
            yield not under, "a Blocks mask is served only under &"
            yield part.block_q % 128 > 0 or part.block_k % 128 > 0, (
                f"Blocks of {part.block_q} x {part.block_k} are not multiples of the 128 x 128 tile"
            )
    listed = sum(isinstance(part, Blocks) for part in conjuncts(call.mask))
    yield listed > 1, "one Blocks mask at most is served"


def _body_limits(what: str, body):
    yield body.refusal is not None, f"{what} {body.program.name}: {body.refusal}"
    missing = body.primitives & MISSING
    yield bool(missing), f"{what} {body.program.name} needs {', '.join(sorted(missing))}"
    if what == "mask_mod":
        yield any(h.group not in MASK_GROUPS for h in body.handed), (
            f"{what} {body.program.name} looks up a captured array by distance"
        )


def forward(
    q, k, v, *, mask, score, q_coords, k_coords, scale, sink_logits, logit_cap, return_lse,
    softmax_dtype, layout, interpret: Any = None, value_is_prefix: bool = False,
):
    """Returns ``(o, lse)``; see ``attention``.

    Args:
        value_is_prefix: ``v`` equals ``k[..., :V]``; heads above 256 then read keys only.
    """
    from attnlab.ops.attention import gpu_attend

    T, V = q.shape[1], v.shape[-1]
    static, q, k, v, handed, fixed = _given(
        q, k, v, mask, capped(score, logit_cap), q_coords, k_coords, scale, layout, interpret,
        value_is_prefix,
    )
    sink = None if sink_logits is None else sink_logits.astype(jnp.float32)
    o, lse = gpu_attend.attend(  # type: ignore[misc] - a custom_vjp has no result type
        static, *vary((q, k, v, sink, handed, fixed))
    )
    return o[:, :T, :, :V], lse[:, :, :T].swapaxes(1, 2)


def step(
    carry, q, k, v, *, mask, score, q_coords, k_coords, scale, sink_logits, logit_cap, return_lse,
    softmax_dtype, layout, interpret: Any = None,
):
    """The state ``(o, m, l)`` of ``carry`` and these keys; see ``carry.attention_step``.

    The kernel starts from the carry and writes the new state once. m is the largest logit so far;
    as a mere reference it passes no gradient on: what ``merge`` and ``finish`` compute has all.
    """
    from attnlab.ops.attention import gpu_attend

    T, V = q.shape[1], v.shape[-1]
    static, q, k, v, handed, fixed = _given(
        q, k, v, mask, capped(score, logit_cap), q_coords, k_coords, scale, layout, interpret
    )
    if carry is not None:
        rows = -T % static.sizes.forward.block_q
        o, m, l = carry
        o = jnp.pad(o, [(0, 0), (0, rows), (0, 0), (0, v.shape[-1] - V)])
        line = [(0, 0), (0, 0), (0, rows)]
        m = jnp.pad(m.swapaxes(1, 2), line, constant_values=-jnp.inf)
        carry = o, m, jnp.pad(l.swapaxes(1, 2), line)
    o, m, l = gpu_attend.advance(  # type: ignore[misc] - a custom_vjp has no result type
        static, *vary((q, k, v, carry, handed, fixed))
    )
    return o[:, :T, :, :V], *(x[:, :, :T].swapaxes(1, 2) for x in (m, l))


def _given(
    q, k, v, mask, score, q_coords, k_coords, scale, layout, interpret, value_is_prefix=False
):
    """The static facts, q, k and v in whole tiles, hoisted values, and what has no gradient."""
    from attnlab.ops.attention import gpu_attend, gpu_distance
    from attnlab.ops.attention.gpu_plan import make_plan

    B, T, N, H = q.shape
    S, V = k.shape[1], v.shape[-1]
    pair = runs_mod(mask, q_coords, layout) or pair_mod(mask, S if S % 128 else None)
    pair = pair.bound(B, N)
    handed, body = [], None
    if score is not None:
        score = score.bound(B, N)
        body = split(score.program, T, S)
        at = None
        if any(h.group == "distances" for h in body.handed):
            at = gpu_distance.distances(body, T, S)
        handed = values(score, body, q_coords, k_coords, at)
    seen = split(pair.program, T, S)
    make = functools.partial(
        make_plan, T=T, S=S, layout=layout, scale=scale, score=score, mask=pair
    )
    sizes = _sizes(q, v, mask, layout, body, seen, value_is_prefix)
    static = gpu_attend.Static(make, layout, sizes, interpret)
    H, V = whole_widths(H, V)
    q, k, v = _whole(q, H), _whole(k, H), _whole(v, V)
    fixed = values(pair, seen, q_coords, k_coords), mask, q_coords, k_coords
    return static, q, k, v, handed, fixed


def _whole(x, width: int):
    """``x[B, T, N, H]`` with zeros up to whole tiles of shared memory: 8 tokens, ``width``."""
    tokens, width = -x.shape[1] % 8, width - x.shape[3]
    return jnp.pad(x, [(0, 0), (0, tokens), (0, 0), (0, width)]) if tokens or width else x


def tiles(
    q, k, v, *, layout: Layout, mask: Any = None, score_mod: Any = None,
    logit_cap: float | None = None, sink_tokens: int = 0,
) -> list[tuple[int, int]]:
    """``(block_q, block_k)`` of the block lists that a call reads, forward and backward: for
    ``plan``. Sizes differ between calls; lists of other sizes are no use to this one.

    Args:
        q, k, v: its arrays or their ``ShapeDtypeStruct`` (of one shard, where there are shards).
        layout: its layout, "full" where it has neither positions nor segments. mask, score_mod,
            logit_cap, sink_tokens: as in ``attention``.
    """
    B, _, N, _ = q.shape
    mask = Causal() if mask is None else masked(mask)
    mask = (mask | SinkTokens(sink_tokens) if sink_tokens else mask).bound(B, N)
    if score_mod is not None and not isinstance(score_mod, Mod):
        score_mod = Mod.of(score_mod, score_dtype="float32")
    score = capped(score_mod, logit_cap)
    return _listed(q, v, mask, layout, None if score is None else score.program)


def _tiles(call) -> list[tuple[int, int]]:
    """``tiles`` of a call of which only the facts are known."""
    q, v = (
        jax.ShapeDtypeStruct(shape, call.dtype) for shape in (
            (call.B, call.T, call.N, call.H), (call.B, call.S, call.K, call.V)
        )
    )
    score = call.score
    if score is None and call.logit_cap is not None:
        score = capped(None, call.logit_cap).program  # type: ignore[union-attr] - there is a cap
    return _listed(q, v, call.mask, call.layout, score)


def _listed(q, v, mask, layout, score: Program | None) -> list[tuple[int, int]]:
    T, S = q.shape[1], v.shape[1]
    body = None if score is None else split(score, T, S)
    pair = pair_mod(mask, S if S % 128 else None)
    sizes = _sizes(q, v, mask, layout, body, split(pair.program, T, S))
    configs = [sizes.forward, *(sizes.backward if max(sizes.key.H, sizes.key.V) <= 256 else ())]
    return list(dict.fromkeys((c.block_q, c.block_k) for c in configs))


def _sizes(q, v, mask, layout, score: Body | None, pair: Body, value_is_prefix=False) -> Sizes:
    bodies = [pair] if score is None else [score, pair]
    dense = any(h.group == "dense" for body in bodies for h in body.handed)
    return Sizes.of(q, v, mask, layout, score, dense, value_is_prefix)


IMPLEMENTATIONS = (
    Implementation("gpu", supports, forward, partitions=False, step=step, tiles=_tiles),
    Implementation("gpu-wide", supports_wide, forward, partitions=False, tiles=_tiles),
)
