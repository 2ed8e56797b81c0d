"""Mosaic GPU kernels for Hopper behind the attention op: what they serve, and their gradient.

Sources: Dao et al. 2022, arXiv 2205.14135 (tiles, backward by recomputation); Shah et al. 2024,
arXiv 2407.08608 (Hopper: copies and two warpgroups that take turns); Dong et al. 2024, arXiv
2412.05496 (score and mask functions, block lists).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from attnlab.core.dispatch import Implementation
from attnlab.core.errors import UnsupportedError
from attnlab.core.mask import Blocks, MaskMod, conjuncts, parts
from attnlab.core.staging import Body, split, values
from attnlab.core.versions import JAX
from attnlab.ops.attention.blocks import BlockLists, block_lists
from attnlab.ops.attention.pairs import capped, pair_mod

HALF = ("bfloat16", "float16")
HOPPER = ("H100", "H200", "H800", "H20", "GH200")
GROUPS = ("heads", "rows", "columns", "distances")
# What Mosaic GPU has no lowering for.
MISSING = frozenset(
    "log1p expm1 pow cbrt tan floor ceil is_finite erf_inv erfc not atan2 population_count".split()
)


def supports(call) -> str | None:
    """None where the kernels serve the call, else the reason."""
    if _wide(call):
        return (
            f"H = {call.H}, V = {call.V}: served up to 192 and 128; impl='gpu-wide' serves wider "
            "heads, but has not been timed on a device yet"
        )
    return next((reason for refused, reason in _limits(call) if refused), None)


def supports_wide(call) -> str | None:
    """As ``supports``, for the kernels of wider heads."""
    if not _wide(call):
        return f"H = {call.H}, V = {call.V}: served by impl='gpu'"
    return next((reason for refused, reason in _limits(call) if refused), None)


def _wide(call) -> bool:
    return call.H > 192 or call.V > 128


def _limits(call):
    hopper = call.device.platform == "gpu" and any(n in call.device.kind for n in HOPPER)
    yield not hopper, f"runs on Hopper GPUs, not on {call.device.platform} {call.device.kind!r}"
    yield JAX < (0, 11, 2), f"needs jax >= 0.11.2 (Mosaic GPU), this is {'.'.join(map(str, JAX))}"
    yield call.dtype not in HALF, f"dtype is {call.dtype}, served: {', '.join(HALF)}"
    yield call.softmax_dtype != "float32", f"softmax is float32 only, not {call.softmax_dtype}"
    yield call.H > 576 or call.V > 512, (
        f"H = {call.H}, V = {call.V}: served up to 256, and without gradient up to 576 and 512"
    )
    if call.score is not None:
        body = split(call.score, call.T, call.S)
        yield from _body_limits("score_mod", body)
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
    served = GROUPS if what == "score_mod" else GROUPS[:3]
    for entry in body.handed:
        yield entry.group not in served, (
            f"{what} {body.program.name} looks up a captured array by "
            f"{'distance' if entry.group == 'distances' else 'query and key'}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Static:
    """What the custom derivative is specialised to."""

    options: dict[str, Any]
    interpret: Any


def forward(
    q, k, v, *, mask, score, q_coords, k_coords, scale, sink_logits, logit_cap, return_lse,
    softmax_dtype, layout, interpret: Any = None, value_is_prefix: bool = False,
):
    """Returns ``(o, lse)``; see ``attention``.

    Args:
        value_is_prefix: ``v`` equals ``k[..., :V]``; heads above 256 then read keys only.
    """
    from attnlab.ops.attention import gpu_distance
    from attnlab.ops.attention.gpu_tiles import make_plan

    T, S, N, V = q.shape[1], k.shape[1], q.shape[2], v.shape[-1]
    q, k = (_whole(x) for x in (q, k))
    v = _whole(v, 64 if max(k.shape[-1], V) <= 256 else 128)
    score = capped(score, logit_cap)
    if score is not None:
        score = score.bound(q.shape[0], N)
    pair = pair_mod(mask, S if S % 128 else None)
    pair = pair.bound(q.shape[0], N) if score is None else dataclasses.replace(
        pair, batch=score.batch, heads=score.heads
    )
    make = functools.partial(
        make_plan, T=T, S=S, layout=layout, scale=scale, score=score, mask=pair
    )
    handed = []
    if score is not None:
        body = split(score.program, T, S)
        at = None
        if any(h.group == "distances" for h in body.handed):
            at = gpu_distance.distances(body, T, S)
        handed = values(score, body, q_coords, k_coords, at)
    seen = values(pair, split(pair.program, T, S), q_coords, k_coords)
    options = dict(
        make=make, layout=layout, score=None if score is None else split(score.program, T, S),
        value_is_prefix=value_is_prefix,
    )
    static = _Static(options, interpret)
    sink = None if sink_logits is None else sink_logits.astype(jnp.float32)
    o, lse = _attend(  # type: ignore[misc] - a custom_vjp has no result type
        static, q, k, v, sink, handed, (seen, mask, q_coords, k_coords)
    )
    return o[:, :T, :, :V], lse[:, :, :T].swapaxes(1, 2)


def _whole(x, numbers: int = 64):
    """``x[B, T, N, H]`` with zeros up to the 8 tokens and 64 numbers of a shared-memory tile."""
    tokens, width = -x.shape[1] % 8, -x.shape[3] % numbers
    return jnp.pad(x, [(0, 0), (0, tokens), (0, 0), (0, width)]) if tokens or width else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, sink, handed, fixed):
    return _attend_fwd(static, q, k, v, sink, handed, fixed)[0]


def _attend_fwd(static, q, k, v, sink, handed, fixed):
    from attnlab.ops.attention import gpu_widths

    config = forward_config(q.shape[-1], v.shape[-1], static.options["value_is_prefix"])
    kernel: Any = gpu_widths.forward_of(config)
    plan, lists, order, operands = _prepared(static, config, handed, fixed, False)
    o, lse = kernel(
        plan, config, q, k, v, sink, lists, order, operands, interpret=static.interpret
    )
    o = checkpoint_name(o, "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return (o, lse), (q, k, v, sink, handed, fixed, o, lse)


def _attend_bwd(static, residuals, cotangents):
    from attnlab.ops.attention import gpu_backward, gpu_distance, gpu_widths

    q, k, v, sink, handed, fixed, o, lse = residuals
    if max(q.shape[-1], v.shape[-1]) > 256:
        raise UnsupportedError(
            f"gradient of attention with H = {q.shape[-1]}, V = {v.shape[-1]} and impl = 'gpu'",
            "above 256 the kernel has a forward pass only",
            "train the expanded form (heads up to 256), or use impl='xla'",
        )
    do, dlse = cotangents
    T = q.shape[1]
    alive = lse > -jnp.inf
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    delta = jnp.pad(delta, [(0, 0), (0, 0), (0, lse.shape[-1] - T)]) - dlse
    delta = jnp.where(alive, delta, 0)
    dsink = None
    if sink is not None:
        p = jnp.where(alive, jnp.exp(sink[:, None] - lse), 0)
        dsink = -(p * delta)[..., :T].sum((0, 2))
    base2 = jnp.where(alive, lse * gpu_backward.LOG2E, 1e30)
    do = do.astype(q.dtype)
    score = static.options["score"]
    grads, plans = [], []
    configs = backward_configs(q.shape[-1], v.shape[-1], score)
    for kernel, config, transposed in gpu_widths.backward_of(*configs):
        plan, lists, order, operands = _prepared(static, config, handed, fixed, transposed)
        plans.append((plan, operands))
        grads.append(
            kernel(plan, config, q, k, v, do, base2, delta, lists, order, operands,
                   interpret=static.interpret)
        )
    (dq, *row_sums), (dk, dv, *column_sums) = grads
    plan, operands = plans[0]
    dhanded: list[Any] = [None] * len(handed)
    for i, x in zip(gpu_backward.asked(plan, ("columns",)), column_sums, strict=True):
        dhanded[i] = _like(x, handed[i])
    tiles = {}
    if asked := gpu_backward.asked(plan, ("distances",)):
        found = gpu_distance.grad_tiles(
            plan, plan.diagonals, q, k, v, do, base2, delta, operands, interpret=static.interpret
        )
        tiles = dict(zip(asked, found, strict=True))
    counts = gpu_backward.row_sums(plan)
    for i, count in zip(gpu_backward.asked(plan, gpu_backward.ROW_GROUPS), counts, strict=True):
        sums, row_sums = row_sums[:count], row_sums[count:]
        if i in tiles:
            numbers = jnp.stack([x.sum(-1) for x in sums], -1)
            x = gpu_distance.folded(plan.diagonals, numbers, tiles[i], plan.T, plan.S)
            dhanded[i] = _like(x, handed[i], whole=True)
        else:
            dhanded[i] = _like(sums[0], handed[i])
    for i, x in enumerate(handed):
        if dhanded[i] is None:
            dhanded[i] = np.zeros(x.shape, jax.dtypes.float0)
    return dq, dk, dv, dsink, dhanded, None


def _like(x, given, whole: bool = False):
    """Sums ``[B, N, T']`` in the shape of the handed value: the axes it lacks are summed."""
    if not whole:
        x = x.sum(-1) if given.ndim == 2 else x[..., : given.shape[-1]]
    for axis in (0, 1):
        if given.shape[axis] == 1:
            x = x.sum(axis, keepdims=True)
    return x


_attend.defvjp(_attend_fwd, _attend_bwd)


def _prepared(static: _Static, config, handed, fixed, transposed: bool):
    """Plan, lists, order of work and operands of a kernel."""
    from attnlab.ops.attention.gpu_tiles import coordinates, handed_operands

    seen, mask, q_coords, k_coords = fixed
    plan = static.options["make"](
        block_q=config.block_q, block_k=config.block_k, transposed=transposed
    )
    operands = [
        *handed_operands(plan, "score", handed), *handed_operands(plan, "mask", seen),
        *coordinates(plan, q_coords, k_coords),
    ]
    lists = block_lists(
        mask, q_coords, k_coords, block_q=config.block_q, block_k=config.block_k,
        layout=static.options["layout"], transposed=transposed,
    )
    return plan, jax.tree.map(jnp.asarray, lists), _longest_first(lists), operands


def _longest_first(lists: BlockLists):
    """Rows of tiles by their number of tiles, so that the last blocks to start are short."""
    work = lists.full.blocks + lists.partial.blocks
    if isinstance(work, np.ndarray):
        return jnp.asarray(np.argsort(-work.sum((0, 1)), kind="stable").astype(np.int32))
    return jnp.argsort(-work.sum((0, 1)), stable=True).astype(jnp.int32)


def forward_config(H: int, V: int, value_is_prefix: bool = False):
    from attnlab.ops.attention import gpu_widths
    from attnlab.ops.attention.gpu_forward import Config

    if max(H, V) > 256:
        return gpu_widths.forward_config(H, V, value_is_prefix)
    if max(H, V) > 192 or V > 128:
        return Config(128, 64, 2)
    return Config(128, 128, 4 if max(H, V) <= 64 else 2)


def backward_configs(H: int, V: int, score: Body | None = None):
    """Sizes of the kernel for dq and of the one for dk and dv, by measurement on an H200.

    With a score function both are short of registers: smaller tiles, and turns only where it reads
    coordinates.
    """
    from attnlab.ops.attention import gpu_widths
    from attnlab.ops.attention.gpu_backward import Config

    if max(H, V) <= 64:
        return Config(128, 64, 3, turns=False), Config(64, 128, 3, turns=False)
    if H > 192 or V > 128:
        return gpu_widths.backward_configs(H, V)
    if max(H, V) > 128:
        return Config(128, 64, 2, turns=False), Config(64, 128, 2, turns=False)
    if score is None:
        return Config(128, 128, 2, turns=False), Config(64, 128, 3)
    places = bool((score.coordinates - {"score"}) | score.floats) or bool(score.handed)
    return Config(128, 64, 3, turns=False), Config(64, 128, 3, turns=places)


IMPLEMENTATIONS = (
    Implementation("gpu", supports, forward, partitions=False),
    Implementation("gpu-wide", supports_wide, forward, partitions=False),
)
