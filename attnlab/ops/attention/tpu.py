"""Mosaic TPU kernels behind the attention op: what they serve, and their gradient.

Sources: Dao et al. 2022, arXiv 2205.14135 (tiles, backward by recomputation); Dong et al. 2024,
arXiv 2412.05496 (score and mask functions, block lists).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from attnlab.core.dispatch import Device, Implementation, compiling_for
from attnlab.core.mask import Blocks, MaskMod, conjuncts, parts
from attnlab.core.staging import split, values
from attnlab.ops.attention import tpu_blocks, tpu_steps, tuning
from attnlab.ops.attention.pairs import capped

DTYPES = ("bfloat16", "float32")
CHIPS = ("TPU v4", "TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e", "TPU7x")
MOST_WIDTH = 576
# What Mosaic TPU has no lowering for.
MISSING = frozenset("expm1 cbrt tan erfc".split())


def supports(call) -> str | None:
    """None where the kernels serve the call, else the reason."""
    return next((reason for refused, reason in _limits(call) if refused), None)


def _limits(call):
    yield call.device.platform != "tpu", f"runs on TPUs, not on {call.device.platform}"
    yield call.device.kind not in CHIPS, (
        f"{call.device.kind!r} is not among the chips it is compiled for: {', '.join(CHIPS)}"
    )
    yield call.dtype not in DTYPES, f"dtype is {call.dtype}, served: {', '.join(DTYPES)}"
    yield call.softmax_dtype != "float32", f"softmax is float32 only, not {call.softmax_dtype}"
    for name, width in (("H", call.H), ("V", call.V)):
        yield width % 8 > 0 or not 8 <= width <= MOST_WIDTH, (
            f"{name} = {width} is not a multiple of 8 up to {MOST_WIDTH}"
        )
    if call.score is not None:
        yield from _body_limits(call, "score_mod", call.score)
    for part in parts(call.mask):
        if isinstance(part, MaskMod):
            yield from _body_limits(call, "mask_mod", part.mod.program)
        if isinstance(part, Blocks):
            yield part not in conjuncts(call.mask), "a Blocks mask is served only under &"
            yield part.block_q % 128 > 0 or part.block_k % 128 > 0, (
                f"Blocks of {part.block_q} x {part.block_k} are not multiples of the 128 x 128 tile"
            )
    listed = sum(isinstance(part, Blocks) for part in conjuncts(call.mask))
    yield listed > 1, "one Blocks mask at most is served"
    reason = _overflow(call)
    yield reason is not None, str(reason)


def _overflow(call) -> str | None:
    """The reason where a tile's row or column does not fit into the words of the step tables."""
    rows, columns = tpu_steps.MOST_ROWS, tpu_steps.MOST_COLUMNS
    if call.T <= 16 * rows and call.S <= 128 * columns:  # whatever the tiles are
        return None
    with compiling_for(call.device), tuning.recording():
        for name, choose in (
            ("forward", tpu_blocks.forward_blocks), ("backward", tpu_blocks.backward_blocks)
        ):
            sizes = choose(call.T, call.S, call.H, call.V, call.dtype, call.mask)
            for axis, length, size, most in zip("TS", (call.T, call.S), sizes, (rows, columns)):
                tiles = -(-length // size)
                if tiles > most:
                    return (
                        f"{axis} = {length} makes {tiles} {name} tiles of {size}, at most {most} "
                        "are served: force larger blocks, or take parts (attention_step)"
                    )
    return None


def _body_limits(call, what: str, program):
    body = split(program, call.T, call.S)
    yield body.refusal is not None, f"{what} {program.name}: {body.refusal}"
    missing = body.primitives & MISSING
    yield bool(missing), f"{what} {program.name} needs {', '.join(sorted(missing))}"
    for entry in body.handed:
        yield entry.group == "distances" and call.layout == "any", (
            f"{what} {program.name} looks up a captured array by distance, which needs "
            "layout='full' or 'packed'"
        )


def forward(
    q, k, v, *, mask, score, q_coords, k_coords, scale, sink_logits, logit_cap, return_lse,
    softmax_dtype, layout, interpret: Any = False,
):
    """Returns ``(o, lse)``; see ``attention``.

    ``interpret``: False, True (plain emulation) or ``pltpu.InterpretParams``.
    """
    from attnlab.ops.attention import tpu_attend

    problem, handed, fixed = _staged(
        q, k, mask, score, q_coords, k_coords, scale, logit_cap, layout, interpret
    )
    sink = None if sink_logits is None else sink_logits.astype(jnp.float32)[None]
    if sink is not None:
        sink = problem.folded("heads", sink)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    o, lse = tpu_attend.attend(  # type: ignore[misc] - a custom_vjp has no result type
        problem, problem.rows_of(q), k, v, sink, handed, fixed
    )
    o, lse = problem.tokens_of(o), problem.tokens_of(lse[..., None])
    return o.swapaxes(1, 2), lse[..., 0].swapaxes(1, 2)


def step(
    carry, q, k, v, *, mask, score, q_coords, k_coords, scale, sink_logits, logit_cap, return_lse,
    softmax_dtype, layout, interpret: Any = False,
):
    """The state ``(o, m, l)`` of ``carry`` and these keys; see ``carry.attention_step``."""
    from attnlab.ops.attention.tpu_carry import advance

    problem, handed, fixed = _staged(
        q, k, mask, score, q_coords, k_coords, scale, logit_cap, layout, interpret
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    if carry is not None:
        o, *rows = (x.swapaxes(1, 2) for x in carry)
        carry = (problem.rows_of(o), *(problem.rows_of(x[..., None])[..., 0] for x in rows))
    o, *rows = advance(  # type: ignore[misc] - a custom_vjp has no result type
        problem, carry, problem.rows_of(q), k, v, handed, fixed
    )
    m, l = (problem.tokens_of(x[..., None])[..., 0].swapaxes(1, 2) for x in rows)
    return problem.tokens_of(o).swapaxes(1, 2), m, l


def _staged(q, k, mask, score, q_coords, k_coords, scale, logit_cap, layout, interpret):
    """``(problem, handed, fixed)`` of ``tpu_attend.attend``."""
    from attnlab.ops.attention import tpu_attend

    B, T, N, _ = q.shape
    S, K = k.shape[1:3]
    score = capped(score, logit_cap)
    score = None if score is None else score.bound(B, N)
    body, handed = None, []
    if score is not None:
        body = split(score.program, T, S)
        handed = values(score, body, q_coords, k_coords)
    G = N // K
    fold = G if tpu_attend.folds(mask, body, handed, T, G, layout) else 1
    problem = tpu_attend.Problem(
        None if score is None else score.program, T, S, N, fold, float(scale), layout,
        Device.default().kind, interpret,
    )
    group_of = [] if body is None else [h.group for h in body.handed]
    handed = [problem.folded(g, x) for g, x in zip(group_of, handed)]
    return problem, handed, (mask, q_coords, k_coords)


def _tiles(call) -> list[tuple[int, int]]:
    from attnlab.ops.attention import tpu_attend

    if call.N > call.K and call.T <= tpu_attend.FOLD_TOKENS:
        return []  # heads may be folded into rows: few tokens, whose lists are made in the call
    sizes = call.T, call.S, call.H, call.V, call.dtype, call.mask
    return [tpu_blocks.forward_blocks(*sizes), tpu_blocks.backward_blocks(*sizes)]


IMPLEMENTATION = Implementation(
    "tpu", supports, forward, partitions=False, step=step, tiles=_tiles
)
