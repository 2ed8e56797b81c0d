"""Decoding on Hopper GPUs: what the kernel serves, and the order of work it is given.

The tiles of keys of all tasks (row, key/value head, tile of query rows) are laid end to end and cut
into equal parts, one a thread block, whatever the lengths of the rows are. A part may hold the end
of one task and the beginning of the next; what it finds of a task is a piece, and the pieces of a
task are merged by their log-sum-exps in a second kernel, always in the same order. Part ``j``
writes its piece of task ``i`` at place ``i + j``: no two pieces share a place, and those of one
task stand together.
"""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from attnlab.core.dispatch import Device, Implementation
from attnlab.core.mask import Mask, SinkTokens, Window
from attnlab.core.mask import parts as mask_parts
from attnlab.ops.attention import hopper

HALF = ("bfloat16", "float16")
ROWS = 64  # (token, head) rows of a tile
WIDTHS = (64, 128, 192, 256)
PRODUCER_REGISTERS = 40  # a thread of the warpgroup that copies


def supports(call) -> str | None:
    """None where the kernel serves the call, else the reason."""
    return next((reason for refused, reason in _limits(call) if refused), None)


def _limits(call):
    yield from hopper.limits(call.device)
    yield call.dtype not in HALF, f"dtype is {call.dtype}, served: {', '.join(HALF)}"
    yield call.cache_dtype != call.dtype, (
        f"the cache is {call.cache_dtype} and q is {call.dtype}: served where they agree"
    )
    yield call.softmax_dtype != "float32", f"softmax is float32 only, not {call.softmax_dtype}"
    yield not {call.H, call.V} <= set(WIDTHS), (
        f"H = {call.H}, V = {call.V}: served are {', '.join(map(str, WIDTHS))}"
    )
    if call.page is not None:
        tile = config(call.H, call.V).tile
        fits = call.page % tile == 0 or (tile % call.page == 0 and call.page >= 8)
        yield not fits, (
            f"page = {call.page}: served are 8, 16, 32 and multiples of {tile}"
            if tile > 32 else f"page = {call.page}: served are 8, 16 and multiples of {tile}"
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel.

    Args:
        tile: keys of a tile. stages: tiles in flight, a multiple of consumers. consumers:
            warpgroups that compute, each on its own tiles. registers: of a thread of them.
    """

    tile: int = 64
    stages: int = 4
    consumers: int = 2
    registers: int = 232


def config(H: int, V: int) -> Config:
    """Sizes for key and value widths, within 227 KB of shared memory."""
    if max(H, V) <= 64:
        return Config(stages=8)
    if max(H, V) <= 128:
        return Config(stages=4)
    return Config(stages=4 if H + V <= 320 else 2, consumers=1)


@dataclasses.dataclass(frozen=True)
class Static:
    """Static facts of a call.

    Args:
        B, K, G: shapes. tasks: tiles of 64 query rows a row and key/value head.
        scale, cap, window, sinks: see ``decode``. sizes: of the kernel.
    """

    B: int
    K: int
    G: int
    tasks: int
    scale: float
    cap: float | None
    window: int | None
    sinks: int
    sizes: Config

    def __post_init__(self):
        c = self.sizes
        assert c.stages % c.consumers == 0, c  # a slot has one reader: it counts all its phases
        threads = c.consumers * c.registers + PRODUCER_REGISTERS
        # A warpgroup that asks for more registers than there are waits for ever.
        assert threads <= min(512, (c.consumers + 1) * 255) and c.registers <= 240, c


@dataclasses.dataclass(frozen=True)
class Work:
    """What the kernel reads to find its tiles; see the module.

    Args:
        start: int32 ``[tasks + 1]``, number of tiles before each task. share: int32 ``[1]``, tiles
            of a part. first, last: int32 ``[parts]``, the tasks ``first <= i < last`` of each part.
        order: int32 ``[B, tiles]``, the tiles a row needs in front, or None where these are simply
            the first ones.
    """

    start: Any
    share: Any
    first: Any
    last: Any
    order: Any


def work(mask: Mask, q, k, lengths, *, parts: int, tasks: int, tile: int, window: bool) -> Work:
    """Equal parts of the tiles of ``tasks`` tasks a row."""
    S = k.index.shape[0]
    tiles = -(-S // tile)
    lengths = jnp.clip(lengths, 0, S)
    order = None
    if window:
        alive = k.index < lengths[:, None]
        seen = (mask.visible(q, k)[:, 0] & alive[:, None]).any(1)
        seen = jnp.pad(seen, [(0, 0), (0, tiles * tile - S)]).reshape(-1, tiles, tile).any(2)
        count = seen.sum(1, dtype=jnp.int32)
        place = jnp.where(seen, jnp.cumsum(seen, axis=1) - 1, tiles)
        rows = jnp.arange(seen.shape[0])[:, None]
        order = jnp.zeros(seen.shape, jnp.int32).at[rows, place].set(
            jnp.broadcast_to(jnp.arange(tiles, dtype=jnp.int32), seen.shape), mode="drop"
        )
    else:
        count = -(-lengths // tile)
        if q.segments is not None:  # a row whose queries are all padding needs nothing
            count = jnp.where((q.segments > 0).any(1), count, 0)
    start = jnp.cumsum(jnp.repeat(count, tasks, total_repeat_length=count.shape[0] * tasks))
    start = jnp.pad(start, (1, 0)).astype(jnp.int32)
    share = jnp.maximum(-(-start[-1:] // parts), 1)
    edge = jnp.arange(parts, dtype=jnp.int32) * share
    first = jnp.searchsorted(start[1:], edge, side="right", method="compare_all")
    last = jnp.searchsorted(start[:-1], edge + share, side="left", method="compare_all")
    return Work(start, share, first.astype(jnp.int32), last.astype(jnp.int32), order)


def forward(
    q, k, v, lengths, pages, sink_logits, q_coords, k_coords, *, mask, implied, logit_cap, scale,
    softmax_dtype, splits, interpret: Any = None, sizes: Config | None = None,
):
    """Returns ``(o, lse)``; see ``decode``."""
    from attnlab.ops.attention import gpu_decode, gpu_merge

    B, t, N, H = q.shape
    K, V = v.shape[2:]
    G = N // K
    sizes = config(H, V) if sizes is None else sizes
    tile, tasks = sizes.tile, -(-t * G // ROWS)  # tasks of a row and key/value head
    parts = hopper.cores(Device.default().kind) if splits is None else int(splits)
    window = next((p.size for p in mask_parts(mask) if isinstance(p, Window)), None)
    sinks = next((p.count for p in mask_parts(mask) if isinstance(p, SinkTokens)), 0)
    plan = work(
        mask, q_coords, k_coords, lengths, parts=parts, tasks=K * tasks, tile=tile,
        window=window is not None,
    )
    rows = -(-t * G // 8) * 8 if tasks == 1 else ROWS * tasks
    packed = q.reshape(B, t, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B * K, t * G, H)
    packed = _rows(packed, rows).reshape(B * K * tasks, -1, H)
    limits = _rows(jnp.repeat(q_coords.positions, G, axis=1), ROWS * tasks, -1)
    coords = None
    if not implied:
        extra = -k_coords.index.shape[0] % tile
        coords = [_rows(k_coords.positions, extra + k_coords.index.shape[0])]
        if q_coords.segments is not None:
            own = jnp.where(q_coords.segments > 0, q_coords.segments, -1)
            coords.append(_rows(k_coords.segments, extra + k_coords.index.shape[0]))
            coords.append(_rows(jnp.repeat(own, G, axis=1), ROWS * tasks, -1))
    if pages is not None:  # a tile reads all its pages: those past the length repeat the last one
        last = jnp.maximum(-(-jnp.clip(lengths, 1) // k.shape[1]) - 1, 0)
        place = jnp.minimum(jnp.arange(pages.shape[1]), last[:, None])
        pages = jnp.take_along_axis(pages, place, axis=1)
        pages = jnp.where(lengths[:, None] > 0, pages, 0).astype(jnp.int32)
        pages = jnp.pad(pages, [(0, 0), (0, -pages.shape[1] % max(tile // k.shape[1], 1))], "edge")
    static = Static(B, K, G, tasks, float(scale), logit_cap, window, sinks, sizes)
    o, lse2 = gpu_decode.pieces(
        static, packed, k, v, plan, pages, lengths.astype(jnp.int32), limits, coords,
        interpret=interpret,
    )
    sink = None if sink_logits is None else sink_logits.astype(jnp.float32)
    o, lse = gpu_merge.combine(static, o, lse2, plan, sink, q.dtype, interpret=interpret)
    o = o.reshape(B, K, -1, o.shape[-1])[:, :, : t * G, :V].reshape(B, K, t, G, V)
    lse = lse.reshape(B, K, -1)[:, :, : t * G].reshape(B, K, t, G)
    return (
        o.transpose(0, 2, 1, 3, 4).reshape(B, t, N, V), lse.transpose(0, 2, 1, 3).reshape(B, t, N)
    )


def _rows(x, size: int, fill: int = 0):
    """``x`` with its second axis extended to ``size``."""
    widths = [(0, 0), (0, size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, widths, constant_values=fill)


IMPLEMENTATION = Implementation("gpu", supports, forward, partitions=False)
