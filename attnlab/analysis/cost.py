"""What an attention layer costs on a device: FLOPs, bytes, arithmetic intensity, roofline time.

``parts`` splits a layer into what every token meets (weights) and what queries meet (the cache);
the roofline time of each is ``max(FLOPs / peak, bytes / bandwidth)``, and a layer takes the sum.
The part with fewer FLOPs a byte than the device's ridge is bound by memory (the Op/B rule of
Duplex, Yun et al. 2024, arXiv 2409.01141): in decoding a batch shares weights, and never a cache,
so attention keeps its intensity whatever the batch.

FLOPs are those of the configs, which equal the matrix products of the reference; attention counts
pairs that the mask lets through. Bytes are those that no implementation can do without: weights
once, the activations in and out; of the cache, old tokens read once and new ones written once. A
training pass is three forward passes of both.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from typing import Any

import jax.numpy as jnp

from attnlab.analysis import listing
from attnlab.analysis.printing import table
from attnlab.analysis.targets import DEVICES, Target
from attnlab.core import registry
from attnlab.core.errors import ConfigError
from attnlab.core.layer import LayerConfig, Mode
from attnlab.core.types import Precision

PROMPT = 176  # input tokens for each output token of a "mix", as in coding assistants
CONTEXTS = tuple(2**n for n in range(10, 18))
BF16 = Precision(params="bfloat16", compute="bfloat16", cache="bfloat16")


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of a part of a layer."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes

    def seconds(self, target: Target) -> float:
        """Roofline time."""
        return max(self.flops / target.peak, self.bytes / target.bandwidth)

    def bound(self, target: Target) -> str:
        """What the device runs out of first: "compute" or "memory"."""
        return "compute" if self.intensity > target.peak / target.bandwidth else "memory"

    def times(self, factor: float) -> Cost:
        return Cost(self.flops * factor, self.bytes * factor)


def parts(
    config: LayerConfig, mode: Mode, *, tokens: int, context: int, batch: int = 1
) -> dict[str, Cost]:
    """``weights`` and ``attention`` of a pass over ``tokens`` new tokens a row, ``batch`` rows.

    Args:
        context: keys that the last token may see, itself included; training and an ordinary
            prefill have ``context = tokens``.
    """
    if not 0 < tokens <= context:
        raise ConfigError(
            f"tokens = {tokens} with context = {context}", "the context includes the tokens",
            "use context = tokens for a whole sequence",
        )
    passes = 3 if mode == "train" else 1
    flops = config.flops(tokens, context, mode)
    width = jnp.dtype(config.precision.compute).itemsize
    window, sinks = (getattr(config, name, None) for name in ("window", "sink_tokens"))
    seen = context if window is None else min(context, window + (sinks or 0) + tokens - 1)
    moved = 2 * batch * tokens * config.dim * width
    weights = Cost(batch * flops.linear, config.param_count() * width + moved)
    attention = Cost(batch * flops.visible, batch * config.cache_bytes(seen))
    return {"weights": weights.times(passes), "attention": attention.times(passes)}


def seconds(
    config: LayerConfig, mode: str, target: Target, *, context: int, batch: int = 1
) -> float:
    """Roofline time of a layer: of a sequence of ``context`` tokens (train, prefill), of one new
    token a row (decode), or for each answered token with ``PROMPT`` tokens read before (mix)."""
    if mode == "mix":
        prompt = seconds(config, "prefill", target, context=context, batch=batch) / context
        return PROMPT * prompt + seconds(config, "decode", target, context=context, batch=batch)
    tokens = 1 if mode == "decode" else context
    found = parts(config, mode, tokens=tokens, context=context, batch=batch)  # type: ignore
    return sum(part.seconds(target) for part in found.values())


def rows(
    names: list[str], mode: str, target: Target, contexts: list[int], batch: int,
    shape: listing.Shape | None = None,
) -> list[dict[str, Any]]:
    """A row a variant and context length, all variants at one shape, in bf16."""
    found = []
    for name in names:
        config = listing.sized(name, shape, precision=BF16)
        for context in contexts:
            row = {
                "variant": name, "mode": mode, "target": target.name, "context": context,
                "batch": batch, "parameters": config.param_count(),
                "cache_bytes_per_token": config.cache_bytes(2) - config.cache_bytes(1),
                "seconds": seconds(config, mode, target, context=context, batch=batch),
            }
            if mode != "mix":
                tokens = 1 if mode == "decode" else context
                for part, cost in parts(
                    config, mode, tokens=tokens, context=context, batch=batch  # type: ignore
                ).items():
                    row[part] = {
                        "flops": cost.flops, "bytes": cost.bytes, "intensity": cost.intensity,
                        "bound": cost.bound(target), "seconds": cost.seconds(target),
                    }
            found.append(row)
    return found


def main(args: Any) -> int:
    """``attnlab cost``."""
    names = args.variants.split(",") if args.variants else list(registry.VARIANTS)
    for name in names:
        registry.get(name)
    if args.target not in DEVICES:
        near = difflib.get_close_matches(args.target, DEVICES) or sorted(DEVICES)
        raise ConfigError(f"--target {args.target}", "is not known", f"use {' or '.join(near)}")
    target, contexts = DEVICES[args.target], args.contexts or list(CONTEXTS)
    if args.batch < 1:
        raise ConfigError(f"--batch {args.batch}", "must be at least 1", "use 1 or more")
    found = rows(names, args.mode, target, contexts, args.batch)
    if args.plot:
        plot(found, args.plot)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    unit = {"decode": "one token a row", "mix": f"one token answered for {PROMPT} read"}
    print(
        f"{args.mode}, {target.kind}, batch {args.batch}, bf16: roofline time of a layer for "
        f"{unit.get(args.mode, 'whole sequences')}, in microseconds, at {listing.Shape()}\n"
        "c: bound by compute, m: by memory; weights, then attention"
    )
    table(
        ("variant", "parameters", "cache B/token", *(f"{n:,}" for n in contexts)),
        [
            (name, f"{mine[0]['parameters']:,}", f"{mine[0]['cache_bytes_per_token']:,}",
             *(_cell(row) for row in mine))
            for name in names for mine in [[row for row in found if row["variant"] == name]]
        ],
    )
    return 0


def _cell(row: dict[str, Any]) -> str:
    bounds = "".join(row[part]["bound"][0] for part in ("weights", "attention") if part in row)
    return f"{row['seconds'] * 1e6:.4g} {bounds}".rstrip()


def plot(found: list[dict[str, Any]], path: str) -> None:
    """Time a layer against context length, a line a variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(row["variant"] for row in found))
    # Told apart without colour too: by marker and line.
    colors = ("#0077bb", "#ee7733", "#009988", "#cc3311", "#33bbee", "#ee3377", "#555555")
    for i, name in enumerate(names):
        mine = [row for row in found if row["variant"] == name]
        axes.plot(
            [row["context"] for row in mine], [row["seconds"] * 1e6 for row in mine],
            marker="os^Dv*X"[i % 7], ls=("-", "--", "-.", ":")[i % 4], color=colors[i % 7],
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({row["context"] for row in found})
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("microseconds a layer (roofline)")
    first = found[0]
    axes.set_title(f"{first['mode']}, {first['target']}, batch {first['batch']}")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        rule = f"cannot be written ({error})"
        raise ConfigError(f"--plot {path}", rule, "use cost.png") from None
