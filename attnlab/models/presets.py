"""Model presets: named decoder configs. ``attention`` swaps the variant and keeps the rest."""

from __future__ import annotations

from collections.abc import Callable

from attnlab.core.errors import ConfigError
from attnlab.core.layer import LayerConfig
from attnlab.core.registry import get
from attnlab.core.types import Precision
from attnlab.models.decoder import DecoderConfig

BF16 = Precision.named("bfloat16")


def quickstart() -> DecoderConfig:
    """A byte model with compressed convolutional attention that a laptop trains in minutes."""
    cca = get("cca").config()
    attention = cca(dim=128, num_heads=4, num_kv_heads=2, head_dim=32)
    return DecoderConfig(vocab_size=257, period=(attention,), repeats=4, mlp_dim=256)


def _gqa(dim: int, heads: int, kv_heads: int, head_dim: int) -> LayerConfig:
    gqa = get("gqa").config()
    return gqa(
        dim=dim, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, precision=BF16,
        rope_theta=500_000.0,
    )


# Unrolled: scanning copies every saved activation into a stacked buffer, 17 % of a step on an H200.
def _language_model(dim, layers, heads, kv_heads, mlp_dim, head_dim) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=32_768, period=(_gqa(dim, heads, kv_heads, head_dim),), repeats=layers,
        mlp_dim=mlp_dim, precision=BF16, scan=False,
    )


PRESETS: dict[str, Callable[[], DecoderConfig]] = {
    "quickstart": quickstart,
    # dim, layers, query heads, key/value heads, SwiGLU width, head width
    "125m": lambda: _language_model(768, 12, 6, 2, 2304, 128),
    "350m": lambda: _language_model(1024, 24, 8, 4, 3328, 128),
    "1b": lambda: _language_model(2048, 18, 16, 4, 6144, 128),
}


def preset(name: str) -> DecoderConfig:
    """The decoder config of that name."""
    if name not in PRESETS:
        raise ConfigError(f"preset = {name!r}", "unknown", f"use one of {', '.join(PRESETS)}")
    return PRESETS[name]()
