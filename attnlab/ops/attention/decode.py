"""Attention of the newest tokens over a cache: contiguous or paged, rows of any length.

Row ``b`` holds ``lengths[b]`` keys. Its ``t`` queries are its last tokens, so that query ``i`` has
position ``lengths[b] - t + i`` and sees the keys at or before it::

    z[i, s] = cap(scale * q[i, n] . k[s, n // G])       cap(z) = c tanh(z / c) if logit_cap = c
    p[i, s] = exp(z[i, s]) / (sum_{s visible} exp(z[i, s]) + exp(sink_logits[n]))
    o[i, n] = sum_s p[i, s] v[s, n // G]        lse[i, n] = log of the denominator

With ``positions`` and ``segments`` the rule is the one of ``attention``: a key of the same segment,
at or before the query's position, among the first ``lengths[b]`` of its row. A query without a key
and without a sink returns zero and ``lse = -inf``.

A paged cache keeps pieces of rows in one pool: the keys ``s`` of row ``b`` stand in page
``pages[b, s // page]`` at ``s % page``. Rows may share pages.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from attnlab.core import axes
from attnlab.core.dispatch import Device, Implementation, Op
from attnlab.core.errors import ConfigError, DtypeError, ShapeError, UnsupportedError
from attnlab.core.layer import MAX_DECODE
from attnlab.core.mask import Causal, Coords, Mask, Segments, SinkTokens, Window
from attnlab.ops.attention import decode_gpu, decode_reference, decode_xla
from attnlab.ops.attention.inputs import check_options


@dataclasses.dataclass(frozen=True)
class Call:
    """The static facts of a call: what an implementation may decide by.

    Args:
        B, t, S, N, K, H, V: shapes; S is the room of a row. page: tokens of a page, None for a
            contiguous cache. dtype: of q. cache_dtype: of k and v.
        positions, segments, sink_logits, return_lse: whether given or asked for.
        window, sink_tokens, logit_cap: see ``decode``. device: what the call is compiled for.
    """

    B: int
    t: int
    S: int
    N: int
    K: int
    H: int
    V: int
    page: int | None
    dtype: str
    cache_dtype: str
    positions: bool
    segments: bool
    window: int | None
    sink_tokens: int
    sink_logits: bool
    logit_cap: float | None
    return_lse: bool
    device: Device
    softmax_dtype: str = "float32"


OP = Op(
    "decode",
    [
        Implementation("reference", lambda call: None, decode_reference.forward),
        Implementation("xla", lambda call: None, decode_xla.forward),
        decode_gpu.IMPLEMENTATION,
    ],
    {"cpu": ("xla",), "gpu": ("gpu", "xla"), "tpu": ("xla",)},
)


def decode(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B S K H"] | Float[Array, "P page K H"],
    v: Float[Array, "B S K V"] | Float[Array, "P page K V"],
    *,
    lengths: Int[Array, " B"],
    pages: Int[Array, "B M"] | None = None,
    positions: tuple[Int[Array, "B t"], Int[Array, "B S"]] | None = None,
    segments: tuple[Int[Array, "B t"], Int[Array, "B S"]] | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    sink_logits: Float[Array, " N"] | None = None,
    logit_cap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    softmax_dtype: str = "float32",
    impl: str | Sequence[str] | None = None,
    splits: int | None = None,
) -> Any:
    """``t`` new queries of each row over its cache; 1 <= t <= 8.

    Args:
        k, v: the cache in any floating dtype, read in the dtype of q. Contiguous ``[B, S, K, H]``
            and ``[B, S, K, V]``, or, with ``pages``, pools ``[P, page, K, H]`` and
            ``[P, page, K, V]``. Slots past the length hold finite numbers.
        lengths: int32, keys of each row, those of the new tokens included; 0 is allowed.
        pages: int32, the pages of each row in order. Entries past the length are never used.
        positions, segments: of the queries and of the cached keys, where the last tokens of a row
            are not simply its queries: packed documents, padding (segment 0). Key arrays are
            ``[B, S]`` also for a paged cache, with ``S = M page``.
        window, sink_tokens: a query sees the last ``window`` keys, its own included, and the first
            ``sink_tokens`` of its document. sink_logits: join the denominator of their head.
        logit_cap, scale: see the equation; default scale ``H**-0.5``.
        impl: None (first that serves the call), a name, or a sequence of names to try.
        splits: into how many parts a kernel cuts the keys of the whole batch (default: one a
            multiprocessor). Changes speed and rounding, nothing else.

    Returns:
        ``o[B, t, N, V]`` in the dtype of q, or ``(o, lse[B, t, N])`` with lse in ``softmax_dtype``.
        Without gradient: differentiating raises UnsupportedError.

    Raises:
        ShapeError, DtypeError, ConfigError: on bad arguments.
        ImplementationError: ``impl`` refuses the call.
    """
    B, t, N, H, S, K, V = _shapes(q, k, v, lengths, pages)
    q_coords, k_coords = _coordinates(B, t, S, lengths, positions, segments)
    mask: Mask = Causal()
    sinks = SinkTokens(sink_tokens)
    if window is None:
        sink_tokens = 0  # every key is visible, these too
    else:
        mask = mask & (Window(window) | sinks if sink_tokens else Window(window))
    if segments is not None:
        mask = mask & Segments()
    check_options(N, sink_logits, logit_cap, scale, softmax_dtype)
    if splits is not None and not (isinstance(splits, int | np.integer) and splits >= 1):
        raise ConfigError(f"splits = {splits!r}", "is a count of at least 1", "use None")
    call = Call(
        B, t, S, N, K, H, V, None if pages is None else k.shape[1], q.dtype.name, k.dtype.name,
        positions is not None, segments is not None, window, sink_tokens, sink_logits is not None,
        logit_cap, return_lse, Device.default(), jnp.dtype(softmax_dtype).name,
    )
    chosen = OP.choose(call, impl)
    forward = functools.partial(
        chosen.forward, mask=mask, implied=positions is None, logit_cap=logit_cap,
        scale=1.0 / math.sqrt(H) if scale is None else float(scale),
        softmax_dtype=jnp.dtype(softmax_dtype), splits=splits,
    )
    if not chosen.partitions:
        forward = functools.partial(_over_shards, forward)
    q, k, v = _without_gradient(q, k, v)
    o, lse = forward(q, k, v, lengths, pages, sink_logits, q_coords, k_coords)
    return (o, lse) if return_lse else o


def decode_names(impl: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """The names in ``impl`` that this op has; None, and an empty tuple for names it lacks."""
    if impl is None:
        return None
    return tuple(n for n in ((impl,) if isinstance(impl, str) else impl) if n in OP.implementations)


@jax.custom_vjp
def _without_gradient(q, k, v):
    return q, k, v


def _refuse_gradient(q, k, v):
    raise UnsupportedError(
        "the gradient of decode", "decoding has none",
        "differentiate attention, or the prefill of the layer",
    )


_without_gradient.defvjp(_refuse_gradient, _refuse_gradient)


def _over_shards(forward, q, k, v, lengths, pages, sink_logits, q_coords, k_coords):
    """``forward`` on each device's rows and heads, for kernels that XLA cannot cut itself.

    Rows and heads are independent of each other: nothing is communicated. A pool of pages goes
    whole to every shard of rows. Heads stay whole where the mesh does not cut queries and keys
    alike; a single key/value head goes to every device.
    """
    mesh = axes.mesh_to_cut()
    if mesh is None:
        return forward(q, k, v, lengths, pages, sink_logits, q_coords, k_coords)
    batch, (heads, kv_heads) = axes.cut("batch", q.shape[0]), axes.cut_heads(q.shape[2], k.shape[2])
    coords: Any = Coords(P(batch), P(batch), P())  # type: ignore[arg-type] - specs in its shape
    if q_coords.segments is None:
        coords = dataclasses.replace(coords, segments=None)
    q_spec = P(batch, None, heads)
    kv_spec = P(batch if pages is None else None, None, kv_heads)
    specs = (q_spec, kv_spec, kv_spec, P(batch), P(batch), P(heads), coords, coords)
    return jax.shard_map(
        forward, mesh=mesh, in_specs=specs, out_specs=(q_spec, q_spec), check_vma=False
    )(q, k, v, lengths, pages, sink_logits, q_coords, k_coords)


def _coordinates(B, t, S, lengths, positions, segments) -> tuple[Coords, Coords]:
    """Positions and segments of both sides; by default a row is one document from position 0."""
    if positions is None and segments is not None:
        raise ConfigError(
            "positions = None with segments", "the documents of a row have their own positions",
            "pass positions=(query positions, key positions)",
        )
    if positions is None:
        places = jnp.arange(S, dtype=jnp.int32)
        q_pos = lengths[:, None] - t + jnp.arange(t, dtype=jnp.int32)
        positions = (q_pos, jnp.broadcast_to(places, (B, S)))
    for name, pair in (("positions", positions), ("segments", segments)):
        if pair is None:
            continue
        for side, array, shape in zip(("query", "key"), pair, ((B, t), (B, S)), strict=True):
            if array.shape != shape:
                raise ShapeError(
                    f"{side} {name} has shape {tuple(array.shape)}", f"must be {shape}",
                    f"one entry of {name} a {side} token",
                )
            _check_integers(f"{side} {name}", array)
    seg = (None, None) if segments is None else segments
    return (
        Coords(positions[0], seg[0], jnp.arange(t, dtype=jnp.int32)),
        Coords(positions[1], seg[1], jnp.arange(S, dtype=jnp.int32)),
    )


def _check_integers(name: str, array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise DtypeError(f"{name} has dtype {array.dtype}", "must be int32", "cast it")


def _shapes(q, k, v, lengths, pages) -> tuple[int, int, int, int, int, int, int]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}", "must have four axes",
                "use [batch, tokens, heads, width], or [pages, page, heads, width] with pages=",
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise DtypeError(f"{name} has dtype {x.dtype}", "must be floating", "cast it")
    if k.dtype != v.dtype:
        raise DtypeError(f"k, v have dtypes {k.dtype}, {v.dtype}", "must agree", "cast one")
    B, t, N, H = q.shape
    rows, S, K, _ = k.shape
    if k.shape[3] != H or v.shape[:3] != k.shape[:3] or (pages is None and rows != B):
        raise ShapeError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            "must be [B, t, N, H], [B, S, K, H], [B, S, K, V], or pools [P, page, K, H] and "
            "[P, page, K, V] with pages",
            "check batch, key tokens, key/value heads and the width of q and k",
        )
    if not 1 <= t <= MAX_DECODE:
        raise ShapeError(
            f"q has t = {t} tokens", f"decode takes 1 to {MAX_DECODE}",
            "call attention with positions for longer pieces",
        )
    if N % K:
        raise ShapeError(
            f"N = {N} query heads over K = {K} key/value heads", "N must be a multiple of K",
            "query head n uses key/value head n // (N/K)",
        )
    if lengths.shape != (B,):
        raise ShapeError(
            f"lengths has shape {tuple(lengths.shape)}", f"must be [B] = ({B},)",
            "one number of keys a row",
        )
    _check_integers("lengths", lengths)
    if pages is not None:
        if pages.ndim != 2 or pages.shape[0] != B:
            raise ShapeError(
                f"pages has shape {tuple(pages.shape)}", f"must be [B, M] with B = {B}",
                "list the pages of every row",
            )
        _check_integers("pages", pages)
        S = pages.shape[1] * k.shape[1]
    return B, t, N, H, S, K, v.shape[3]
