"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), YaRN (Peng et al. 2023,
arXiv 2309.00071).

For pair ``i`` of ``P/2`` and position ``t`` the pair ``(a, b)`` turns by ``t * theta^(-2i/P)``:
``(a cos - b sin, a sin + b cos)``. Two pairings exist and both are needed for checkpoints:
``"half"`` pairs channel ``i`` with ``i + P/2`` (NeoX, Llama), ``"interleaved"`` pairs ``2i`` with
``2i + 1`` (GPT-J, DeepSeek).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from attnlab.core.errors import ConfigError

Pairing = Literal["half", "interleaved"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension.

    Args:
        factor: new length over original length. original_length: tokens seen in training.
        beta_fast, beta_slow: turns over the original length that bound the interpolation ramp.
        mscale: weight of the logarithm in the softmax temperature.
    """

    factor: float
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0

    def __post_init__(self):
        if not min(self.original_length, self.beta_fast, self.beta_slow) > 0:
            raise ConfigError(
                f"yarn.original_length, beta_fast, beta_slow = {self.original_length}, "
                f"{self.beta_fast}, {self.beta_slow}", "must be positive", "use 4096, 32, 1"
            )
        if not self.factor >= 1:
            raise ConfigError(
                f"yarn.factor = {self.factor}", "is new length over original length, >= 1", "use 1"
            )

    @property
    def softmax_factor(self) -> float:
        """``m^2`` with ``m = 0.1 mscale ln(factor) + 1``: multiplies the softmax scale."""
        return (0.1 * self.mscale * math.log(self.factor) + 1.0) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary embedding of ``width`` channels.

    Args:
        width: rotated channels P, even; 0 switches rotation off.
        theta: base. pairing: ``"half"`` or ``"interleaved"``. yarn: context extension or None.
    """

    width: int
    theta: float = 10_000.0
    pairing: Pairing = "half"
    yarn: Yarn | None = None

    def __post_init__(self):
        if self.width < 0 or self.width % 2:
            raise ConfigError(
                f"rope width = {self.width}", "must be even and not negative", "round it down"
            )
        if not self.theta > 0:
            raise ConfigError(f"rope theta = {self.theta}", "must be positive", "use 10000")
        if self.pairing not in ("half", "interleaved"):
            raise ConfigError(
                f"rope pairing = {self.pairing!r}",
                "unknown",
                'use "half" (Llama, NeoX) or "interleaved" (GPT-J, DeepSeek)',
            )

    def frequencies(self, dtype=jnp.float32) -> jax.Array:
        """Radians a token of every pair, ``[P/2]``."""
        pairs = jnp.arange(0, self.width, 2, dtype=dtype) / self.width
        base = jnp.asarray(self.theta, dtype) ** -pairs
        if self.yarn is None or self.yarn.factor == 1:
            return base
        y = self.yarn

        def pair_of(turns: float) -> float:
            return (
                self.width
                * math.log(y.original_length / (turns * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low = max(math.floor(pair_of(y.beta_fast)), 0)
        high = min(math.ceil(pair_of(y.beta_slow)), self.width - 1)
        ramp = jnp.clip(
            (jnp.arange(self.width // 2, dtype=dtype) - low) / max(high - low, 1e-3), 0, 1
        )
        return base / y.factor * ramp + base * (1 - ramp)

    def __call__(self, x: jax.Array, positions: jax.Array, dtype=jnp.float32) -> jax.Array:
        """Rotate ``x[B, T, N, P]`` at ``positions[B, T]``; angles and products in ``dtype``."""
        if self.width == 0:
            return x
        angle = positions[..., None].astype(dtype) * self.frequencies(dtype)
        cos, sin = jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]
        wide = x.astype(dtype)
        if self.pairing == "half":
            a, b = jnp.split(wide, 2, axis=-1)
            out = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
        else:
            a, b = wide[..., 0::2], wide[..., 1::2]
            out = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
        return out.astype(x.dtype)

    def first(self, x: jax.Array, positions: jax.Array, dtype=jnp.float32) -> jax.Array:
        """Partial rotation: the first ``width`` channels of ``x[B, T, N, H]`` turn."""
        if self.width == x.shape[-1]:
            return self(x, positions, dtype)
        turned = self(x[..., : self.width], positions, dtype)
        return jnp.concatenate([turned, x[..., self.width :]], axis=-1)
