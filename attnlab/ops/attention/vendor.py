"""Fused kernels of others: cuDNN through jax.nn, tokamax (GPU), JAX's splash attention (TPU).

Each serves what it computes exactly and refuses the rest with a reason. Packages are imported on
use; a missing one is a reason. None of them reads positions, so they serve only the layouts "full"
and "packed", where array order is document order; none returns a differentiable log-sum-exp. Under
``jax.checkpoint`` splash names what its backward needs "attention_out"; cuDNN and tokamax keep
softmax statistics that cannot be named, so a policy by name recomputes their forward.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.core.dispatch import Implementation
from attnlab.core.mask import plain
from attnlab.ops.attention import tuning
from attnlab.ops.attention.hopper import is_hopper

HALF = ("bfloat16", "float16")


def first(refusals: Iterable[tuple[bool, str]]) -> str | None:
    return next((reason for refused, reason in refusals if refused), None)


def _limits(call, dtypes: tuple[str, ...], layouts: tuple[str, ...]):
    """``(refused, reason)`` of the limits all vendors share."""
    yield call.dtype not in dtypes, f"dtype is {call.dtype}, served: {', '.join(dtypes)}"
    yield call.softmax_dtype != "float32", f"softmax is float32 only, not {call.softmax_dtype}"
    yield call.layout not in layouts, f"layout is {call.layout!r}, served: {', '.join(layouts)}"
    yield call.T != call.S, f"T = {call.T} and S = {call.S} differ"
    yield plain(call.mask) is None, "the mask is more than causal, window and segments"
    yield call.sink_logits, "sink logits are not served"
    yield call.score is not None, "a score_mod is not served"
    yield call.return_lse, "its log-sum-exp has no gradient"


def _widths(call, most: int):
    for name, width in (("H", call.H), ("V", call.V)):
        yield width % 8 > 0 or not 64 <= width <= most, (
            f"{name} = {width} is not a multiple of 8 from 64 to {most}"
        )


def _cudnn_refuses(call) -> str | None:
    def limits():
        nvidia = call.device.platform == "gpu" and "NVIDIA" in call.device.kind
        yield not nvidia, f"runs on NVIDIA GPUs, not on {call.device.platform} {call.device.kind!r}"
        yield from _limits(call, HALF, ("full",))
        causal, window = plain(call.mask)  # type: ignore[misc]
        most = 256 if is_hopper(call.device) else 128
        yield call.segments, "segments are not served"
        yield call.logit_cap is not None, "a logit cap is not served"
        yield window is not None and not causal, "a window is served only under a causal mask"
        yield call.H != call.V, f"H = {call.H} and V = {call.V} differ"
        yield call.T % 2 > 0, f"T = {call.T} is odd"
        yield call.H % 8 > 0 or call.H > most, f"H = {call.H} is not a multiple of 8 up to {most}"

    return first(limits())


def cudnn(
    q, k, v, *, mask, score, q_coords, k_coords, scale, sink_logits, logit_cap, return_lse,
    softmax_dtype, layout,
):
    """cuDNN's fused attention, as jax.nn exposes it."""
    causal, window = plain(mask)  # type: ignore[misc]
    o = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, implementation="cudnn",
        local_window_size=None if window is None else (window - 1, 0),
    )
    return o, None


def _tokamax_refuses(call) -> str | None:
    def limits():
        yield call.device.platform == "tpu", (
            "untuned it runs 128-wide tiles on TPU, and its backward needs memory quadratic in S"
        )
        hopper = call.device.platform == "gpu" and is_hopper(call.device)
        yield not hopper, f"runs on Hopper GPUs, not on {call.device.platform} {call.device.kind!r}"
        yield from _limits(call, HALF, ("full", "packed"))
        causal, window = plain(call.mask)  # type: ignore[misc]
        yield call.segments and call.layout != "packed", "segments need layout='packed'"
        yield not causal and window is not None, "a window is served only under a causal mask"
        yield not causal and call.segments, "segments are served only under a causal mask"
        yield from _widths(call, 256)
        yield from tokamax_limits(_tokamax)

    return first(limits())


def tokamax_limits(library):
    """``(refused, reason)`` where tokamax, or what ``library()`` takes from it, is not there."""
    yield importlib.util.find_spec("tokamax") is None, (
        'tokamax is not installed (Python 3.12, pip install "attnlab[kernels]")'
    )
    yield broken(library)


@functools.cache
def broken(library) -> tuple[bool, str]:
    """Whether ``library()`` fails, and why."""
    try:
        library()
    except (ImportError, AttributeError) as error:
        return True, f"the installed tokamax does not fit: {error}"
    return False, ""


def _tokamax():
    """tokamax's Hopper attention op and its mask type, which has no public name."""
    from tokamax._src.ops.attention.base import Mask as Ranges
    from tokamax.ops.gpu import PallasMosaicFlashAttention

    return PallasMosaicFlashAttention(), Ranges


def tokamax(
    q, k, v, *, mask, score, q_coords, k_coords, scale, sink_logits, logit_cap, return_lse,
    softmax_dtype, layout,
):
    """tokamax's Mosaic GPU kernel, as key ranges ``[k_start, k_end)`` of every query row."""
    op, ranges = _tokamax()
    causal, window = plain(mask)  # type: ignore[misc]
    start, segments = None, q_coords.segments
    index = q_coords.index[None]
    if window is not None:
        start = jnp.maximum(index - (window - 1), 0)
    if segments is not None:
        # Documents are contiguous, so a query's document starts `position` places before it. A
        # padding row sees itself, which keeps its softmax finite.
        first = jnp.where(segments > 0, index - q_coords.positions, index)
        start = first if start is None else jnp.maximum(first, start)
    o = op(
        q, k, v,
        mask=ranges(is_causal=causal, k_start=None if start is None else start[:, None]),
        logits_scale=scale, logits_soft_cap=logit_cap,
    )
    return no_padding(o, segments), None


def splash_limits(call):
    """``(refused, reason)`` of both splashes."""
    yield call.device.platform != "tpu", f"runs on TPUs, not on {call.device.platform}"
    yield from _limits(call, ("bfloat16", "float32"), ("full", "packed"))
    yield call.segments and call.layout != "packed", "segments need layout='packed'"
    yield call.T % 128 > 0, f"T = {call.T} is not a multiple of 128"
    yield from _widths(call, 576)


def _splash_refuses(call) -> str | None:
    return first(splash_limits(call))


def splash(
    q, k, v, *, mask, score, q_coords, k_coords, scale, sink_logits, logit_cap, return_lse,
    softmax_dtype, layout, interpret: bool = False,
):
    """JAX's splash attention. It applies no scale, so q is scaled before (one rounding in bf16)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as lib
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N = q.shape[1:3]
    causal, window = plain(mask)  # type: ignore[misc]
    left, right = None if window is None else window - 1, 0 if causal else None
    everything = left is right is None
    sight = masks.FullMask((T, T)) if everything else masks.LocalMask((T, T), (left, right), 0)
    keys = (tuning.Key.of("splash", direction, q, k, v, mask) for direction in tuning.DIRECTIONS)
    blocks: Any = {n: size for key in keys for n, size in tuning.choose(key).blocks.items()}
    kernel = lib.make_splash_mha(
        mask=masks.MultiHeadMask([sight] * N), block_sizes=lib.BlockSizes(**blocks),
        attn_logits_soft_cap=logit_cap, head_shards=1, q_seq_shards=1,
        residual_checkpoint_name="attention_out", interpret=interpret,
    )
    segments = q_coords.segments
    ids = None if segments is None else lib.SegmentIds(segments, k_coords.segments)
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    o: Any = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (scaled, k, v)), ids)
    return no_padding(o.swapaxes(1, 2), segments), None


SPLASH_BLOCKS = {
    "forward": ("block_q", "block_kv", "block_kv_compute"),
    "backward": (
        "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq",
    ),
}


def _splash_default(key: tuning.Key) -> tuning.Blocks:
    """Square tiles of 512, or the largest size below it that divides T."""
    block = next((size for size in (512, 256) if key.T % size == 0), 128)
    return dict.fromkeys(SPLASH_BLOCKS[key.direction], block)


def _splash_candidates(key: tuning.Key) -> list[tuning.Blocks]:
    """Rows of 512 to 2048 queries against 512 to 2048 keys, computed 512 or 1024 at a time.

    Backward up to 1024: larger tiles spill and take minutes to compile.
    """
    rows = tuning.fitting((512, 1024, 2048)[: 3 if key.direction == "forward" else 2], key.T)
    columns = [
        (kv, compute) for kv in rows for compute in (512, 1024) if kv % compute == 0
    ]
    found = [_splash_default(key)]
    for q in rows:
        for kv, compute in columns:
            sizes = (q, kv, compute) if key.direction == "forward" else (q, kv, compute, q, kv)
            found.append(dict(zip(SPLASH_BLOCKS[key.direction], sizes)))
    return [blocks for i, blocks in enumerate(found) if blocks not in found[:i]]


def _splash_block_refuses(key: tuning.Key, blocks: tuning.Blocks) -> str | None:
    def limits():
        for name in SPLASH_BLOCKS[key.direction]:
            size = blocks.get(name, 0)
            yield size < 128 or size % 128 > 0, f"{name} = {size} is not a multiple of 128"
            if not name.endswith("compute"):
                yield key.T % max(size, 1) > 0, f"{name} = {size} does not divide T = {key.T}"
                continue
            whole = blocks.get(name.removesuffix("_compute"), 0)
            yield whole % max(size, 1) > 0, f"{name} = {size} does not divide a block of {whole}"

    return first(limits())


def _splash_tile(role: str, blocks: tuning.Blocks) -> tuning.Tile:
    suffix = "" if role == "forward" else f"_{role}"
    return tuning.Tile(blocks[f"block_q{suffix}"], blocks[f"block_kv{suffix}"])


tuning.register("splash", tuning.Space(
    _splash_default, _splash_candidates, _splash_block_refuses, _splash_tile
))


def no_padding(o, segments):
    """Zero the rows of segment 0, which the kernels let see each other; their gradient follows."""
    return o if segments is None else jnp.where(segments[:, :, None, None] > 0, o, 0)


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("cudnn", _cudnn_refuses, cudnn),
    Implementation("tokamax", _tokamax_refuses, tokamax, partitions=False),
    Implementation("splash", _splash_refuses, splash, partitions=False),
)
