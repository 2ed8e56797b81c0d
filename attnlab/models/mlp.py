"""Feed-forward layers."""

from __future__ import annotations

import math

import jax
from flax import nnx

from attnlab.core.axes import WIDTH, constrain, normal, parameter
from attnlab.core.linear import project
from attnlab.core.types import Precision

HIDDEN = ("batch", "time", "mlp")


class SwiGLU(nnx.Module):
    """``y = (silu(x W_gate) * x W_up) W_down`` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int, precision: Precision, std: float, rngs: nnx.Rngs):
        self.precision = precision
        dtype = precision.params
        self.w_gate = parameter(rngs, normal(std), (dim, hidden), ("embed", "mlp"), dtype)
        self.w_up = parameter(rngs, normal(std), (dim, hidden), ("embed", "mlp"), dtype)
        self.w_down = parameter(rngs, normal(std), (hidden, dim), ("mlp", "embed"), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x, wide = x.astype(self.precision.compute), self.precision.softmax
        gate, up = (
            project("btd,df->btf", x, w[...], WIDTH, HIDDEN, wide) for w in (self.w_gate, self.w_up)
        )
        hidden = constrain(jax.nn.silu(gate) * up, *HIDDEN)
        return project("btf,fd->btd", hidden, self.w_down[...], HIDDEN, WIDTH, wide)


def swiglu_flops(tokens: int, dim: int, hidden: int) -> float:
    """Forward FLOPs of ``SwiGLU``."""
    return 6.0 * tokens * dim * hidden


def swiglu_params(dim: int, hidden: int) -> int:
    return 3 * dim * hidden


def round_up(value: float, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return math.ceil(value / multiple) * multiple
