"""What a call says about its tokens (mask, positions, segments, layout), checked and completed."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from attnlab.core.errors import ConfigError, DtypeError, ShapeError
from attnlab.core.mask import (
    Causal,
    Coords,
    Mask,
    MaskMod,
    Segments,
    SinkTokens,
    Wrapped,
    conjuncts,
    masked,
    parts,
)
from attnlab.core.types import LAYOUTS, Layout


def composed(mask: Any, sink_tokens: int, segments: bool) -> Mask:
    """The whole mask of a call: the one given, sink tokens, and segments where there are any.

    A ``Planned`` mask is whole already; it raises ConfigError where it lacks what the call adds.
    """
    if type(sink_tokens) is bool or not isinstance(sink_tokens, numbers.Integral):
        raise ConfigError(f"sink_tokens = {sink_tokens!r}", "must be an integer", "pass a count")
    mask = Causal() if mask is None else masked(mask)
    if isinstance(mask, Wrapped):
        if sink_tokens:
            raise ConfigError(
                f"sink_tokens = {sink_tokens} with a planned mask", "the plan holds the whole mask",
                "pass sink_tokens to plan()",
            )
        if segments and not any(isinstance(part, Segments) for part in conjuncts(mask)):
            raise ConfigError(
                "segments with a mask planned without them", "the plan holds the whole mask",
                "pass segments to plan()",
            )
    else:
        mask = mask | SinkTokens(sink_tokens) if sink_tokens else mask
        mask = mask & Segments() if segments else mask
    for part in parts(mask):
        if isinstance(part, Segments) and not segments:
            raise ConfigError(
                "segments = None", "the mask holds Segments()",
                "pass segments= or leave the mask out",
            )
        if isinstance(part, MaskMod):
            part.mod.check_segments(segments)
    return mask


def coordinates(
    positions: Any, segments: Any, layout: Layout, B: int, T: int, S: int
) -> tuple[Coords, Coords, Layout]:
    """Coordinates of the queries and keys, and what is promised of them."""
    full = positions is None
    if full and T != S:
        raise ShapeError(
            f"positions = None with T = {T} and S = {S}",
            "queries and keys must be the same row of tokens",
            "pass positions=(query positions, key positions)",
        )
    if full:
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        layout = "full" if segments is None and layout == "any" else layout
    q_pos, k_pos = _pair("positions", positions, (B, T), (B, S))
    q_seg, k_seg = (None, None) if segments is None else _pair("segments", segments, (B, T), (B, S))
    if layout not in LAYOUTS:
        raise ConfigError(f"layout = {layout!r}", "unknown", f"use one of {', '.join(LAYOUTS)}")
    if layout == "packed" and (full or segments is None):
        raise ConfigError(
            f"layout = 'packed' with {'positions' if full else 'segments'} = None",
            "promises documents end to end, whose positions restart at 0",
            "pass the positions and segments of the packed row",
        )
    if layout == "full" and segments is not None:
        raise ConfigError(
            "layout = 'full' with segments", "promises one document a row and no padding",
            "use layout='packed' or layout='any'",
        )
    if layout != "any" and isinstance(positions, tuple):
        raise ConfigError(
            f"layout = {layout!r}", "promises that queries and keys are the same row",
            "pass one positions array, or layout='any'",
        )
    index = (jnp.arange(n, dtype=jnp.int32) for n in (T, S))
    return Coords(q_pos, q_seg, next(index)), Coords(k_pos, k_seg, next(index)), layout


def coordinate_specs(coords: Coords, batch: tuple[str, ...]) -> Any:
    """The partition of every array of ``coords`` in its place, rows over these mesh axes."""
    return Coords(P(batch), None if coords.segments is None else P(batch), P())  # type: ignore


def _pair(name, value, q_shape, k_shape):
    pair: Any = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
    q, k = pair
    for side, array, shape in (("query", q, q_shape), ("key", k, k_shape)):
        if getattr(array, "shape", None) != shape:
            got = f"has shape {array.shape}" if hasattr(array, "shape") else "is no array"
            raise ShapeError(
                f"{side} {name} {got}", f"must be {shape}",
                f"one entry of {name} a {side} token",
            )
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise DtypeError(f"{side} {name} has dtype {array.dtype}", "must be int32", "cast it")
    return q.astype(jnp.int32), k.astype(jnp.int32)


def _real(x: Any) -> bool:
    return isinstance(x, numbers.Real)


def check_options(N: int, sink_logits: Any, logit_cap: Any, scale: Any, softmax_dtype: Any) -> None:
    """Raise ShapeError or ConfigError unless these serve ``N`` query heads."""
    if sink_logits is not None and sink_logits.shape != (N,):
        raise ShapeError(
            f"sink_logits has shape {tuple(sink_logits.shape)}", f"must be [N] = ({N},)",
            "one logit a query head",
        )
    if isinstance(scale, jax.Array):
        raise ConfigError("scale is an array", "must be a Python number", "multiply q by it")
    if scale is not None and not (_real(scale) and math.isfinite(scale)):
        raise ConfigError(f"scale = {scale!r}", "must be a finite number", "use None for H**-0.5")
    if logit_cap is not None and not (_real(logit_cap) and logit_cap > 0):
        raise ConfigError(f"logit_cap = {logit_cap!r}", "must be positive", "use None for no cap")
    if jnp.dtype(softmax_dtype).name not in ("float32", "float64"):
        raise ConfigError(
            f"softmax_dtype = {softmax_dtype}", "logits and sums are never below float32",
            'use "float32"',
        )
