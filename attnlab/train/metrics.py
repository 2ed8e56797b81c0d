"""FLOP/s and model FLOP utilisation, from the layers' own ``flops``.

Counted: causal (visible) attention pairs only, backward = 2 x forward, no credit for recomputation.
"""

from __future__ import annotations

import jax

from attnlab.models.decoder import DecoderConfig

# Dense bf16 FLOP/s by the vendors' datasheets, by a part of jax's device_kind.
PEAK_BF16: tuple[tuple[str, float], ...] = (
    ("H200", 989e12), ("H100", 989e12), ("A100", 312e12),
    ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5", 459e12),
    ("TPU v6", 918e12), ("TPU7x", 2307e12),
)


def peak_flops(kind: str) -> float | None:
    """Peak of one device, or None where none is published (CPUs)."""
    return next((peak for part, peak in PEAK_BF16 if part in kind), None)


def step_flops(model: DecoderConfig, batch: int, seq_len: int) -> float:
    """Useful FLOPs of one training step: three times the forward pass."""
    return 3.0 * batch * model.flops(seq_len)


def rates(model: DecoderConfig, batch: int, seq_len: int, seconds: float) -> dict:
    """``tokens_per_s``, ``tflops_per_s`` over all devices, and ``mfu`` (None on a CPU)."""
    flops = step_flops(model, batch, seq_len) / seconds
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "tokens_per_s": batch * seq_len / seconds,
        "tflops_per_s": flops / 1e12,
        "mfu": None if peak is None else flops / (peak * jax.device_count()),
    }
