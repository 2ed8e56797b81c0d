"""Every variant at one stated shape: its config, its row in `attnlab list` and in the README."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Callable
from typing import Any

from attnlab.analysis import explain
from attnlab.core import registry
from attnlab.core.errors import ConfigError
from attnlab.core.layer import LayerConfig
from attnlab.core.types import Precision

MARK, END_MARK = "<!-- variants -->", "<!-- /variants -->"
_PLATFORMS = {"cpu": "CPU", "gpu": "GPU", "tpu": "TPU"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The widths variants have in common: D, N, K and H of the legend."""

    dim: int = 2048
    num_heads: int = 16
    num_kv_heads: int = 4
    head_dim: int = 128

    def __str__(self) -> str:
        return f"D = {self.dim}, N = {self.num_heads}, K = {self.num_kv_heads}, H = {self.head_dim}"


# Fields that a config takes from the shape whenever it has them.
_COMMON = ("dim", "num_heads", "num_kv_heads", "head_dim")

# Fields without a default that the shape does not say outright: the proportions of their papers.
_REQUIRED: dict[str, Callable[[Shape], int]] = {
    "kv_rank": lambda s: 4 * s.head_dim,
    "nope_dim": lambda s: s.head_dim,
    "rope_dim": lambda s: 2 * max(s.head_dim // 4, 1),
    "value_dim": lambda s: s.head_dim,
}


def _half_the_query_heads(shape: Shape) -> dict[str, Any]:
    heads = max(shape.num_heads // 2, 1)
    return {
        "num_heads_total": shape.num_heads, "num_heads": heads,
        "num_kv_heads": math.gcd(heads, shape.num_kv_heads),
    }


# Where the point of a variant is not to take a common width: its paper's usual setting.
_OWN: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "cca": lambda s: {"head_dim": 2 * max(s.dim // (4 * s.num_heads), 1)},  # C1 = 2
    "sqa": _half_the_query_heads,
}

# Fields that keep their meaning in every variant; mask and logit fields may not get lost.
_CARRIED = ("precision", "rope_theta", "window", "sink_tokens", "sink_logits", "logit_cap")
_NOT_LOST = _CARRIED[2:]


def sized(name: str, shape: Shape | None = None, **fields: Any) -> LayerConfig:
    """The config of variant ``name`` at ``shape``; ``fields`` win over what the shape says.

    D, N, K and H are taken where the config has them; a width that it needs besides follows the
    proportions of its paper (MLA: R = 4 H, P = H / 2; CCA: H halved so that C1 = 2; SQA: half of
    the query heads).
    """
    shape = shape or Shape()
    cls = registry.get(name).config()
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and (
            field.default_factory is dataclasses.MISSING
        )
        if field.name in _COMMON:
            values[field.name] = getattr(shape, field.name)
        elif required and field.name in _REQUIRED:
            values[field.name] = _REQUIRED[field.name](shape)
        elif required and field.name not in fields:
            raise ConfigError(
                f"{cls.__name__}.{field.name}", "has no default and no rule from D, N, K, H",
                f"give {field.name}, or add a rule to attnlab/analysis/listing.py",
            )
    if name in _OWN:
        values |= _OWN[name](shape)
    return registry.build_config(name, **values | fields)


def swap(config: LayerConfig, name: str) -> LayerConfig:
    """``config`` with its attention replaced by variant ``name``, as ``sized`` at its own widths.

    Precision, RoPE base, window, sinks and logit cap are carried over; ConfigError where one of
    these is set and the new variant does not have it. The same variant stays as it is.
    """
    if registry.name_of(type(config)) == name:
        return config
    known = {f.name for f in dataclasses.fields(registry.get(name).config())}
    carried = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _CARRIED and field.name in known:
            carried[field.name] = value
        elif field.name in _NOT_LOST and value != field.default:
            raise ConfigError(
                f"{field.name} = {value!r}", f"variant {name} has no such field",
                f"--set model.period.0.{field.name}={field.default} before swapping",
            )
    return sized(name, shape_of(config), **carried)


def shape_of(config: LayerConfig) -> Shape:
    """The common widths of a config."""
    heads = getattr(config, "num_heads_total", None) or getattr(config, "num_heads", 1)
    head_dim = getattr(config, "head_dim", None) or getattr(config, "nope_dim", None)
    return Shape(
        dim=config.dim, num_heads=heads, head_dim=head_dim or config.dim // heads,
        num_kv_heads=getattr(config, "num_kv_heads", None) or heads,
    )


def cached_numbers(config: LayerConfig, at: int = 4096) -> int:
    """Numbers that one more token adds to the cache."""
    one = dataclasses.replace(config, precision=Precision())
    return (one.cache_bytes(at + 1) - one.cache_bytes(at)) // 4


def implementations(config: LayerConfig) -> dict[str, list[str]]:
    """Platform to the implementations its ops try, in order."""
    ops = {
        op for mode in (explain.MODES if config.decode else explain.MODES[:1])
        for op, _ in explain.calls(config, mode, 1, 128)
    }
    table: dict[str, list[str]] = {}
    for platform in _PLATFORMS:
        names: list[str] = []
        for op in map(explain.operator, sorted(ops)):
            names += [n for n in op.order.get(platform, ()) if n in op.implementations]
        table[platform] = list(dict.fromkeys(names))
    return table


def note(row: registry.Variant, title: str) -> str:
    """What the layer file's docstring says after ``title:``."""
    doc = importlib.import_module(row.path.partition(":")[0]).__doc__ or ""
    found = re.search(rf"^{title}: (.*?)(?=\n\s*\n|\n[A-Z][\w ]*: |\Z)", doc, re.M | re.S)
    return " ".join(found[1].split()).rstrip(".") if found else "not stated"


def rows(shape: Shape | None = None) -> list[dict[str, Any]]:
    """One dict a variant, JSON-able."""
    return [_row(variant, shape or Shape()) for variant in registry.VARIANTS.values()]


def _row(variant: registry.Variant, shape: Shape) -> dict[str, Any]:
    config = sized(variant.name, shape, precision=Precision.named("bfloat16"))
    formula = re.search(r"([^,;]+?) numbers a token", note(variant, "Cache"))
    numbers = cached_numbers(config)
    return {
        "name": variant.name,
        "summary": variant.summary,
        "paper": variant.paper,
        "cache_formula": formula[1].strip() if formula else "not stated",
        "cache_numbers_per_token": numbers,
        "cache_bytes_per_token_bf16": 2 * numbers,
        "parallel": note(variant, "Parallel forms"),
        "supports": sorted(config.supports),
        "implementations": implementations(config),
    }


def backends(row: dict[str, Any]) -> str:
    """``"CPU xla; GPU ..."`` of a row."""
    return "; ".join(
        f"{_PLATFORMS[p]} {', '.join(names)}" for p, names in row["implementations"].items()
    )


def variant_table() -> str:
    """The variant table of the README, in Markdown."""
    lines = [
        "| variant | what it is | paper | cached numbers a token | backends | parallel forms |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows():
        cells = (
            f"`{row['name']}`", row["summary"], _link(row["paper"]),
            f"{row['cache_formula']} = {row['cache_numbers_per_token']}", backends(row),
            row["parallel"],
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        f"Numbers at {Shape()}; where a variant sets a width its own way, as its paper does: MLA "
        "R = 4 H and P = H / 2, CCA half of H (C1 = 2), SQA half of the query heads.",
    ]
    return "\n".join(lines) + "\n"


def _link(paper: str) -> str:
    who, _, number = paper.partition(", arXiv ")
    return f"[{who}](https://arxiv.org/abs/{number})" if number else paper


def readme_section(text: str) -> str | None:
    """What stands between the marks in a README, None without marks."""
    _, start, rest = text.partition(MARK + "\n")
    section, end, _ = rest.partition(END_MARK)
    return section if start and end else None
