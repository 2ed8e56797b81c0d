"""Multi-head latent attention read off the paper's equations, one row and one head at a time.

Independent of the layer: no import from attnlab, plain loops, whatever dtype the parameters have
(float64 in the tests). Differentiable in ``params`` and ``x``; numpy arrays in, numpy out.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np


def yarn_frequencies(width: int, theta: float, yarn: Any) -> np.ndarray:
    """Radians a token of every rotary pair, in float64 (Peng et al. 2023, arXiv 2309.00071).

    A pair with more than ``beta_fast`` turns over the original length keeps its frequency, one with
    less than ``beta_slow`` is slowed by ``factor``, and a ramp over pairs lies between.
    """
    out = []
    for i in range(width // 2):
        frequency = theta ** (-2 * i / width)
        if yarn is not None and yarn.factor > 1:

            def pair_with(turns: float) -> float:
                wavelength = yarn.original_length / turns
                return width / 2 * math.log(wavelength / (2 * math.pi)) / math.log(theta)

            low = max(math.floor(pair_with(yarn.beta_fast)), 0)
            high = min(math.ceil(pair_with(yarn.beta_slow)), width - 1)
            slowed = min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
            frequency = (1 - slowed) * frequency + slowed * frequency / yarn.factor
        out.append(frequency)
    return np.array(out)


def rotation(position: int, width: int, theta: float, pairing: str, yarn: Any) -> np.ndarray:
    """The orthogonal matrix that RoPE applies at a position."""
    matrix = np.zeros((width, width))
    for i, frequency in enumerate(yarn_frequencies(width, theta, yarn)):
        a, b = {"interleaved": (2 * i, 2 * i + 1), "half": (i, i + width // 2)}[pairing]
        c, s = math.cos(position * frequency), math.sin(position * frequency)
        matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


def mla_oracle(
    params: dict,
    x,
    positions,
    segments=None,
    *,
    num_heads: int,
    kv_rank: int,
    nope_dim: int,
    rope_dim: int,
    value_dim: int,
    q_rank: int | None = None,
    latent_norm: bool = True,
    norm_eps: float = 1e-6,
    rope_theta: float = 10_000.0,
    rope_pairing: str = "interleaved",
    yarn: Any = None,
    scale: float | None = None,
    window: int | None = None,
):
    """``y[B, T, D]`` of ``x[B, T, D]``; positions and segments are concrete integers ``[B, T]``."""
    xp = np if isinstance(x, np.ndarray) else jnp
    positions = np.asarray(positions)
    segments = np.ones_like(positions) if segments is None else np.asarray(segments)
    if scale is None:
        scale = 1 / math.sqrt(nope_dim + rope_dim)
        if yarn is not None and yarn.factor > 1:
            scale *= (1 + 0.1 * yarn.mscale * math.log(yarn.factor)) ** 2

    def norm(c, gain):
        return gain * c / xp.sqrt(xp.mean(c**2, axis=-1, keepdims=True) + norm_eps)

    rows = []
    for b in range(x.shape[0]):
        T = x.shape[1]
        turn = [rotation(int(p), rope_dim, rope_theta, rope_pairing, yarn) for p in positions[b]]
        turn = xp.asarray(np.stack(turn), x.dtype)
        seen = np.zeros((T, T), bool)
        for t in range(T):
            for s in range(T):
                ago = positions[b, t] - positions[b, s]
                near = 0 <= ago < (window or math.inf)
                seen[t, s] = near and segments[b, s] == segments[b, t] > 0
        down = x[b] @ params["w_dkv"]
        latent, k_rope = down[:, :kv_rank], xp.einsum("tij,tj->ti", turn, down[:, kv_rank:])
        query = x[b] if q_rank is None else x[b] @ params["w_dq"]
        if latent_norm:
            latent = norm(latent, params["kv_norm"])
            query = query if q_rank is None else norm(query, params["q_norm"])
        y = xp.zeros_like(x[b])
        for n in range(num_heads):
            q = query @ params["w_q" if q_rank is None else "w_uq"][:, n]
            key = latent @ params["w_ukv"][:, n, :nope_dim]
            value = latent @ params["w_ukv"][:, n, nope_dim:]
            assert value.shape[1] == value_dim
            q_rope = xp.einsum("tij,tj->ti", turn, q[:, nope_dim:])
            z = scale * (q[:, :nope_dim] @ key.T + q_rope @ k_rope.T)
            # A query that sees nothing gives zero: its exponentials are all masked away.
            e = xp.where(seen, xp.exp(xp.where(seen, z, 0)), 0)
            total = xp.where(seen.any(1), e.sum(1), 1)
            y = y + (e / total[:, None]) @ value @ params["w_o"][n]
        rows.append(y)
    return xp.stack(rows)
