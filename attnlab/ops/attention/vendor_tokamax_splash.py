"""tokamax's splash attention on TPUs: a peer for the laboratory, taken by name only.

A sibling of JAX's splash with compact lists of tiles and a backward in one kernel, whose dq leaves
in parts, one for each tile of keys or three in turn. It serves what splash serves, and its blocks
must be given or tuned: it has no public name for its kernel, and a release that moves it becomes a
refusal with that reason.
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.core.dispatch import Implementation
from attnlab.core.mask import plain
from attnlab.ops.attention import tuning
from attnlab.ops.attention.vendor import first, no_padding, splash_limits, tokamax_limits

BLOCKS = {
    "forward": ("block_q", "block_kv", "block_kv_compute", "k_transposed", "other_scheduler"),
    "backward": ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "dq_steps"),
}
# Not sizes: keys with tokens along the lanes; the compiler's other scheduler; 0 or 3 dq parts.
FLAGS = {"k_transposed": (0, 1), "other_scheduler": (0, 1), "dq_steps": (0, 3)}


def _refuses(call) -> str | None:
    return first(itertools.chain(splash_limits(call), tokamax_limits(_library)))


def _library() -> tuple[Any, Any]:
    """The modules of its kernel and of its masks."""
    home = "tokamax._src.ops.experimental.tpu.splash_attention"
    kernel = importlib.import_module(f"{home}.splash_attention_kernel")
    masks = importlib.import_module(f"{home}.splash_attention_mask")
    for module, name in ((kernel, "make_splash_mha"), (kernel, "SplashConfig"),
                         (masks, "LocalMask"), (masks, "CausalMask"), (masks, "FullMask")):
        getattr(module, name)
    return kernel, masks


def forward(
    q, k, v, *, mask, score, q_coords, k_coords, scale, sink_logits, logit_cap, return_lse,
    softmax_dtype, layout, interpret: bool = False,
):
    """Returns ``(o, None)``. It applies no scale, so q is scaled before, as for JAX's splash."""
    lib, masks = _library()
    T = q.shape[1]
    causal, window = plain(mask)  # type: ignore[misc]
    if window is not None:
        sight = masks.LocalMask((T, T), (window - 1, 0 if causal else None), 0)
    else:
        sight = masks.CausalMask((T, T)) if causal else masks.FullMask((T, T))
    keys = (
        tuning.Key.of("tokamax-splash", direction, q, k, v, mask)
        for direction in tuning.DIRECTIONS
    )
    chosen: Any = {n: size for key in keys for n, size in tuning.choose(key).blocks.items()}
    layouts = lib.QKVLayout
    config = lib.SplashConfig(
        **{name: size for name, size in chosen.items() if name not in FLAGS},
        k_layout=layouts.SEQ_MINOR if chosen["k_transposed"] else layouts.HEAD_DIM_MINOR,
        use_experimental_scheduler=bool(chosen["other_scheduler"]),
        dq_reduction_steps=chosen["dq_steps"] or None,
        residual_checkpoint_name="attention_out", attn_logits_soft_cap=logit_cap,
        interpret=interpret,
    )
    kernel = lib.make_splash_mha(sight, config=config, q_seq_shards=1)
    segments = q_coords.segments
    ids = None if segments is None else lib.SegmentIds(segments, k_coords.segments)
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    o: Any = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (scaled, k, v)), ids)
    return no_padding(o.swapaxes(1, 2), segments), None


def _default(key: tuning.Key) -> tuning.Blocks:
    """Square tiles of 1024, or the largest size below it that divides T, 512 keys at once."""
    block = next((size for size in (1024, 512, 256) if key.T % size == 0), 128)
    sizes = (block, block, min(block, 512))
    flags = (0, 0) if key.direction == "forward" else (3,)
    return dict(zip(BLOCKS[key.direction], (*sizes, *flags)))


def _candidates(key: tuning.Key) -> list[tuning.Blocks]:
    """What its own published tuning chose among: 1024 or 2048 squared, both layouts of k."""
    found = [_default(key)]
    flags = [(0, 0), (1, 0), (0, 1), (1, 1)] if key.direction == "forward" else [(3,), (0,)]
    for block in tuning.fitting((512, 1024, 2048), key.T):
        for compute in (256, 512, 1024):
            for more in flags:
                if block % compute == 0:
                    sizes = (block, block, compute, *more)
                    found.append(dict(zip(BLOCKS[key.direction], sizes)))
    return [blocks for i, blocks in enumerate(found) if blocks not in found[:i]]


def _block_refuses(key: tuning.Key, blocks: tuning.Blocks) -> str | None:
    def limits():
        for name in BLOCKS[key.direction]:
            size = blocks.get(name, 0)
            if name in FLAGS:
                yield size not in FLAGS[name], f"{name} = {size} is not one of {FLAGS[name]}"
                continue
            yield size < 128 or size % 128 > 0, f"{name} = {size} is not a multiple of 128"
            if not name.endswith("compute"):
                yield key.T % max(size, 1) > 0, f"{name} = {size} does not divide T = {key.T}"
                continue
            whole = blocks.get(name.removesuffix("_compute"), 0)
            yield whole % max(size, 1) > 0, f"{name} = {size} does not divide a block of {whole}"

    return first(limits())


def _tile(role: str, blocks: tuning.Blocks) -> tuning.Tile:
    suffix = "" if role == "forward" else "_dkv"
    return tuning.Tile(blocks[f"block_q{suffix}"], blocks[f"block_kv{suffix}"])


tuning.register("tokamax-splash", tuning.Space(_default, _candidates, _block_refuses, _tile))

IMPLEMENTATION = Implementation("tokamax-splash", _refuses, forward, partitions=False)
