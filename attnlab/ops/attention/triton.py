"""Triton kernels through jax-triton behind the attention op, for NVIDIA GPUs from Ampere on.

Sources: Dao et al. 2022, arXiv 2205.14135 (tiles, backward by recomputation); Dong et al. 2024,
arXiv 2412.05496 (block lists). The kernels are imported where they are launched: attnlab imports
without triton.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from attnlab.core.dispatch import Device, Implementation
from attnlab.core.mask import Blocks, MaskMod, parts
from attnlab.ops.attention import order, triton_mask, tuning
from attnlab.ops.attention.blocks import Runs, block_lists
from attnlab.ops.attention.triton_sizes import KINDS, NAMES, capability, padded

HALF = ("bfloat16", "float16")
MOST_WIDTH, MOST_CLAUSES = 256, 8
# (jax, jax-triton, triton): jax-triton speaks to private parts of both, so other triples may break.
TESTED = (("0.11.2", "0.3.1", "3.6.0"),)
LOG2E = float(np.log2(np.e))
NOTHING = 1e30  # the lse of rows that take no part in the backward: their p is zero


def supports(call) -> str | None:
    """None where the kernels serve the call, else the reason."""
    return next((reason for refused, reason in _limits(call) if refused), None)


def _limits(call):
    nvidia = call.device.platform == "gpu" and "NVIDIA" in call.device.kind
    yield not nvidia, f"runs on NVIDIA GPUs, not on {call.device.platform} {call.device.kind!r}"
    yield capability(call.device.kind) is None, (
        f"{call.device.kind!r} is not among the GPUs it is compiled for (compute capability "
        f"{', '.join(f'{cc / 10}' for cc in KINDS)})"
    )
    yield call.dtype not in HALF, f"dtype is {call.dtype}, served: {', '.join(HALF)}"
    yield call.softmax_dtype != "float32", f"softmax is float32 only, not {call.softmax_dtype}"
    for name, width in (("H", call.H), ("V", call.V)):
        yield width % 8 > 0 or not 8 <= width <= MOST_WIDTH, (
            f"{name} = {width} is not a multiple of 8 up to {MOST_WIDTH}"
        )
    yield call.score is not None, "a score_mod is not served"
    for part in parts(call.mask):
        yield isinstance(part, MaskMod), "a mask_mod is not served"
        yield isinstance(part, Blocks), "a Blocks mask is not served"
    found = triton_mask.count(call.mask)
    yield found > MOST_CLAUSES, (
        f"the mask has {found} alternatives once | stands outside &, served: {MOST_CLAUSES}"
    )
    missing = _missing()
    yield missing is not None, str(missing)


@functools.cache
def _missing() -> str | None:
    """Why the packages cannot be used, None where they can."""
    found = []
    for name in ("jax", "jax-triton", "triton"):
        try:
            found.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            return f'{name} is not installed (Python 3.12, pip install "attnlab[triton]")'
    if tuple(found) not in TESTED:
        pairs = "; ".join(f"jax {a}, jax-triton {b}, triton {c}" for a, b, c in TESTED)
        return "jax {}, jax-triton {}, triton {} were not tested together, ".format(*found) + (
            f"these were: {pairs}"
        )
    try:
        for name in ("triton", "jax_triton"):
            importlib.import_module(name)
    except (ImportError, AttributeError) as error:
        return f"{name} does not import: {' '.join(str(error).split())}"
    return None


@dataclasses.dataclass(frozen=True)
class Launch:
    """A call of a kernel: arrays in, ``outs`` out; ``constants`` are its compile-time arguments."""

    kernel: Any
    arrays: Sequence[jax.Array]
    outs: Sequence[jax.ShapeDtypeStruct]
    grid: tuple[int]
    warps: int
    stages: int
    constants: dict[str, Any]


def on_device(call: Launch) -> Sequence[jax.Array]:
    """Run a kernel through jax-triton."""
    import jax_triton

    return jax_triton.triton_call(
        *call.arrays, kernel=call.kernel, out_shape=call.outs, grid=call.grid,
        num_warps=call.warps, num_stages=call.stages, name=call.kernel.__name__,
        compute_capability=capability(Device.default().kind), **call.constants,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Static:
    """What the custom derivative is specialised to."""

    scale: float
    cap: float | None
    layout: str
    launch: Callable[[Launch], Sequence[jax.Array]]


def forward(
    q, k, v, *, mask, score, q_coords, k_coords, scale, sink_logits, logit_cap, return_lse,
    softmax_dtype, layout, launch: Callable[[Launch], Sequence[jax.Array]] = on_device,
):
    """Returns ``(o, lse)``; see ``attention``. launch: runs a kernel."""
    q, scale = _positive(q, float(scale))
    sink = jnp.full(q.shape[2], -jnp.inf) if sink_logits is None else sink_logits
    static = _Static(scale, None if logit_cap is None else float(logit_cap), layout, launch)
    o, lse = _attend(  # type: ignore[misc] - a custom_vjp has no result type
        static, q, k, v, sink.astype(jnp.float32), (mask, q_coords, k_coords)
    )
    return o, lse.swapaxes(1, 2)


def _positive(q, scale: float):
    """The same logits with a scale above zero: hidden logits are -inf, which must stay so."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, sink, fixed):
    return _attend_fwd(static, q, k, v, sink, fixed)[0]


def _attend_fwd(static, q, k, v, sink, fixed):
    from attnlab.ops.attention.triton_forward import attention_fwd

    B, T, N, _ = q.shape
    blocks = tuning.choose(tuning.Key.of("triton", "forward", q, k, v, fixed[0])).blocks
    outs = [
        jax.ShapeDtypeStruct((B, T, N, v.shape[-1]), q.dtype),
        jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    ]
    o, lse = _run(static, attention_fwd, (q, k, v, sink), outs, blocks, "", fixed)
    o = checkpoint_name(o, "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return (o, lse), (q, k, v, sink, fixed, o, lse)


def _attend_bwd(static, residuals, cotangents):
    from attnlab.ops.attention.triton_backward import attention_dkv, attention_dq

    q, k, v, sink, fixed, o, lse = residuals
    do, dlse = cotangents
    alive = lse > -jnp.inf
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - dlse
    delta = jnp.where(alive, delta, 0)
    p = jnp.where(alive, jnp.exp(sink[:, None] - lse), 0)
    dsink = -(p * delta).sum((0, 2))
    base2 = jnp.where(alive, lse * LOG2E, NOTHING)
    arrays = (q, k, v, do.astype(q.dtype), base2, delta)
    blocks = tuning.choose(tuning.Key.of("triton", "backward", q, k, v, fixed[0])).blocks
    (dq,) = _run(static, attention_dq, arrays, [q], blocks, "_dq", fixed)
    dk, dv = _run(static, attention_dkv, arrays, [k, v], blocks, "_dkv", fixed)
    return dq, dk, dv, dsink, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _run(static: _Static, kernel, arrays, outs, blocks, end: str, fixed):
    """Launch a kernel over its rows of tiles, for each head and row of the batch."""
    mask, q_coords, k_coords = fixed
    q, k, v = arrays[:3]
    T, N, H = q.shape[1:]
    S, K, V = v.shape[1:]
    block_q, block_k, warps, stages = (blocks[name + end] for name in NAMES)
    over_keys = end == "_dkv"
    lists = block_lists(
        mask, q_coords, k_coords, block_q=block_q, block_k=block_k, layout=static.layout,
        transposed=over_keys,
    )
    clauses = triton_mask.clauses(mask, q_coords)
    segments = [c.positions if c.segments is None else c.segments for c in (q_coords, k_coords)]
    constants = dict(
        T=T, S=S, N=N, K=K, H=H, V=V, SCALE=static.scale, CAP=static.cap or 0.0,
        CLAUSES=clauses.number, FLAGS=clauses.flags, PLACES=static.layout == "full",
        BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_H=padded(H), BLOCK_V=padded(V),
    )
    given = [*arrays, lists.longest_first()]
    for name, runs in (("FULL", lists.full), ("PARTIAL", lists.partial)):
        rows, listed = _packed(runs)
        given += [rows, listed]
        shared = rows.shape[0] == 1
        constants["ROWS_STRIDE"] = 0 if shared else 2 * rows.shape[1]
        constants[f"{name}_STRIDE"] = 0 if shared else 2 * listed.shape[1]
    given += [clauses.low, clauses.high, segments[0], k_coords.positions, segments[1]]
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs]
    over = order.over_keys if over_keys else order.over_queries
    items = over(q, k, v, lists)
    constants |= dict(ROWS=items.rows, SECTION=items.section)
    return static.launch(Launch(kernel, given, outs, (items.count,), warps, stages, constants))


def _packed(runs: Runs) -> tuple[jax.Array, jax.Array]:
    """``(start, number)`` of every row ``[B or 1, R, 2]``, ``(first, count)`` of every run
    ``[B or 1, E, 2]``: the heads share the lists of a structured mask."""
    stack: Any = np.stack if isinstance(runs.start, np.ndarray) else jnp.stack
    pairs = (runs.start, runs.number), (runs.first, runs.count)
    rows, listed = (jnp.asarray(stack([x[:, 0] for x in pair], -1)) for pair in pairs)
    return rows, listed


def _tiles(call) -> list[tuple[int, int]]:
    space, blocks = tuning.space("triton"), {}
    for direction in tuning.DIRECTIONS:
        blocks |= tuning.choose(tuning.Key.of_call("triton", direction, call)).blocks
    found = [space.tile(role, blocks) for role in ("forward", "dq", "dkv")]
    return [(tile.q, tile.kv) for tile in found]


IMPLEMENTATION = Implementation("triton", supports, forward, partitions=False, tiles=_tiles)
