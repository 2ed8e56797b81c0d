"""Draw the next token from logits: temperature, top-k, nucleus.

    z = (logits - max) / temperature
    top-k: the k largest z stay (Fan et al. 2018, arXiv 1805.04833); of equal ones the lowest ids
    top-p: the smallest set of largest z with mass >= p stays (Holtzman et al. 2019,
           arXiv 1904.09751)
    token ~ softmax(z over what stays)

Filters apply in that order, each to the distribution the one before left over. All in fp32.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from attnlab.core.errors import ConfigError, ShapeError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How to choose a token.

    Args:
        temperature: divides the logits; 0 is greedy (the lowest id among equal maxima).
        top_k: tokens kept, None = all; more than the vocabulary keeps all.
        top_p: mass kept, in (0, 1]; None or 1 = all. At least one token is kept.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        t, k, p = self.temperature, self.top_k, self.top_p
        checks = (
            (_number(t) and 0 <= t < math.inf, f"temperature = {t!r}", "is a number >= 0",
             "use 0 for greedy decoding or 1 for the model's own distribution"),
            (k is None or (isinstance(k, int) and not isinstance(k, bool) and k >= 1),
             f"top_k = {k!r}", "is a count of tokens, at least 1", "use None to keep all"),
            (p is None or (_number(p) and 0 < p <= 1), f"top_p = {p!r}",
             "is a probability mass above 0 and at most 1", "use None to keep all"),
        )
        for ok, what, rule, fix in checks:
            if not ok:
                raise ConfigError(f"SampleConfig.{what}", rule, fix)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def sample(logits: jax.Array, key: jax.Array | None, config: SampleConfig) -> jax.Array:
    """Token ids int32 ``[B]`` drawn from ``logits[B, V]``.

    ``-inf`` is a token that cannot be drawn; a row of nothing else gives id 0. ``key`` may be None
    for greedy decoding.
    """
    if logits.ndim != 2:
        raise ShapeError(
            f"logits have shape {tuple(logits.shape)}", "must be [B, V]", "pass one row a sequence"
        )
    z = logits.astype(jnp.float32)
    if config.greedy:
        return jnp.argmax(z, axis=-1).astype(jnp.int32)
    if key is None:
        raise ConfigError("key = None", "sampling is random", "pass jax.random.key(seed)")
    top = jnp.max(z, axis=-1, keepdims=True)
    z = (z - jnp.where(jnp.isfinite(top), top, 0.0)) / config.temperature
    k = z.shape[-1] if config.top_k is None else min(config.top_k, z.shape[-1])
    p = 1.0 if config.top_p is None else config.top_p
    if p == 1 and k == z.shape[-1]:
        return jax.random.categorical(key, z).astype(jnp.int32)
    z, ids = jax.lax.top_k(z, k)  # descending, of equal values the lowest index first
    if p < 1:
        mass = jnp.exp(z)  # <= 1: the maximum was subtracted
        total = jnp.maximum(mass.sum(axis=-1, keepdims=True), jnp.finfo(z.dtype).tiny)
        before = jnp.cumsum(mass, axis=-1) - mass  # of the tokens in front
        before = before.at[:, 0].set(0.0)
        z = jnp.where(before < p * total, z, -jnp.inf)
    drawn = jax.random.categorical(key, z)
    return jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
