"""Which implementation every op of a layer would use on a device, and why the others do not run.

The layer is traced abstractly, so the answer is about the calls it really makes; nothing is
computed.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.core import versions
from attnlab.core.dispatch import Device, Op, recording
from attnlab.core.errors import ConfigError
from attnlab.core.layer import LayerConfig, Mode
from attnlab.core.types import Layout, Seq

MODES: tuple[Mode, ...] = ("train", "prefill", "decode")

# Ops that do not stand in a folder of their name.
PLACES = {"decode": "attention.decode"}

# What a question about hardware that is not here is answered for.
KINDS = {"cpu": "cpu", "gpu": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5 lite"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One op in one pass of one layer.

    Args:
        layer: label of the layer. mode, dtypes: of the pass; dtypes with one answer share a row.
        op, chosen: names. others: ``(implementation, why it does not run)`` for the rest.
    """

    layer: str
    mode: Mode
    dtypes: tuple[str, ...]
    op: str
    chosen: str
    others: tuple[tuple[str, str], ...]


def device(platform: str | None = None, kind: str | None = None) -> Device:
    """The device asked about: the default one, or any by name."""
    if platform is None:
        here = Device.default()
        return here if kind is None else Device(here.platform, kind)
    if platform not in KINDS:
        raise ConfigError(f"platform = {platform!r}", "unknown", f"use {', '.join(KINDS)}")
    return Device(platform, kind or KINDS[platform])


def calls(
    config: LayerConfig, mode: Mode, batch: int, tokens: int, layout: Layout = "packed"
) -> list[tuple[str, Any]]:
    """``(op, call)`` of every op that one pass of the layer makes.

    ``tokens`` is the row length in training, the prompt in prefill and the cache in decode.
    Training rows hold packed documents, or one document each with ``layout="full"``.
    """
    graphdef, params = versions.abstract_split(lambda: config.build(nnx.Rngs(0)))
    T = 1 if mode == "decode" else tokens
    x = jax.ShapeDtypeStruct((batch, T, config.dim), jnp.dtype(config.precision.compute))
    index = jax.ShapeDtypeStruct((batch, T), jnp.dtype("int32"))
    if mode == "train":
        seq = Seq(index, None if layout == "full" else index, layout)
    else:
        seq = Seq(index)

    def run(params, x, seq):
        layer = versions.merge_module(graphdef, params)
        if mode == "train":
            return layer(x, seq).y
        return getattr(layer, mode)(x, seq, layer.init_cache(batch, tokens)).y

    with recording() as rows:
        jax.eval_shape(run, params, x, seq)
    seen: dict[str, tuple[str, Any]] = {}
    for op, call, _ in rows:
        seen.setdefault(f"{op} {call}", (op, call))
    return list(seen.values())


def operator(name: str) -> Op:
    """The op called ``name``."""
    return importlib.import_module(f"attnlab.ops.{PLACES.get(name, name)}").OP


def explain(
    layers: Iterable[tuple[str, LayerConfig]],
    *,
    batch: int = 1,
    tokens: int = 4096,
    layout: Layout = "packed",
    on: Device | None = None,
) -> list[Row]:
    """Rows for every ``(label, config)``; a layer at several dtypes has one label."""
    rows: list[Row] = []
    for label, config in layers:
        for mode in MODES if config.decode else MODES[:1]:
            for name, call in calls(config, mode, batch, tokens, layout):
                rows.append(_row(label, mode, config.precision.compute, name, call, on))
    return _merge(rows)


def _row(label, mode, dtype, name, call, on) -> Row:
    op = operator(name)
    call = call if on is None else dataclasses.replace(call, device=on)
    order = op.order.get(call.device.platform, op.order["cpu"])
    verdicts = op.report(call)
    chosen = next(v.name for v in verdicts if v.chosen)
    others = tuple(
        (v.name, v.reason or _why_not(v.name, chosen, order)) for v in verdicts if not v.chosen
    )
    return Row(label, mode, (dtype,), name, chosen, others)


def _why_not(name: str, chosen: str, order) -> str:
    """The reason of an implementation that would serve the call but is not the one."""
    if name in order:
        return f"would serve it, comes after {chosen}"
    return f'runs only when asked for, impl="{name}"'


def _merge(rows: list[Row]) -> list[Row]:
    merged: dict[tuple, Row] = {}
    for row in rows:
        key = (row.layer, row.mode, row.op, row.chosen, row.others)
        before = merged.get(key)
        if before is None:
            merged[key] = row
        elif row.dtypes[0] not in before.dtypes:
            merged[key] = dataclasses.replace(before, dtypes=before.dtypes + row.dtypes)
    order = {label: i for i, label in enumerate(dict.fromkeys(row.layer for row in rows))}
    return sorted(merged.values(), key=lambda r: (order[r.layer], MODES.index(r.mode)))
