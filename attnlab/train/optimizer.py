"""Optimizers and schedules, all from optax: AdamW and Muon, cosine and warmup-stable-decay."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from attnlab.core.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Config of the optimizer.

    Args:
        name: "adamw" (Loshchilov & Hutter 2017, arXiv 1711.05101) or "muon" (Jordan et al. 2024;
            Liu et al. 2025, arXiv 2502.16982): orthogonalised momentum on projection
            matrices, AdamW on embeddings, norms and everything else.
        lr: peak learning rate. matrix_lr: Muon's own for matrices, scaled to AdamW's update RMS.
        schedule: after a linear warmup of ``warmup`` steps: "cosine" to ``final`` * lr over the
            run; "wsd": constant, then linear to ``final`` * lr over the last ``decay`` share of the
            run (Hu et al. 2024, arXiv 2404.06395); "constant".
        b1, b2, eps: AdamW's. momentum: Muon's. weight_decay: on matrices only (not on norms,
            biases and embeddings). clip_norm: global gradient norm, None = off.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    matrix_lr: float = 3e-3
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = 100
    final: float = 0.1
    decay: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self):
        for ok, what, rule, fix in (
            (self.lr > 0, f"lr = {self.lr}", "must be positive", "3e-4"),
            (self.matrix_lr > 0, f"matrix_lr = {self.matrix_lr}", "must be positive", "3e-3"),
            (self.warmup >= 0, f"warmup = {self.warmup}", "is a number of steps", "0"),
            (0 <= self.final <= 1, f"final = {self.final}", "is a share of lr", "0.1"),
            (0 < self.decay <= 1, f"decay = {self.decay}", "is a share of the run", "0.2"),
            (0 <= self.b1 < 1 and 0 <= self.b2 < 1, f"b1, b2 = {self.b1}, {self.b2}",
             "must be in [0, 1)", "0.9 and 0.95"),
            (self.clip_norm is None or self.clip_norm > 0, f"clip_norm = {self.clip_norm}",
             "must be positive", "None"),
        ):
            if not ok:
                raise ConfigError(f"OptimizerConfig.{what}", rule, f"use {fix}")


def schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Learning rate at every step of a run of ``steps``."""
    warm = min(config.warmup, steps)
    rest = max(steps - warm, 1)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final)
    else:
        fall = min(max(1, round(config.decay * steps)), rest)
        after = optax.linear_schedule(peak, config.final * peak, fall, rest - fall)
    if warm == 0:
        return after
    rise = optax.linear_schedule(peak / (warm + 1), peak, warm)
    return optax.join_schedules([rise, after], [warm])


_VECTORS = ("embed", "latent", None)  # None: a width without a name, as MLA's query latent


def is_matrix(axes: tuple[str | None, ...]) -> bool:
    """A projection from or to a vector: two or more axes beside ``layers``, and no table."""
    own = [a for a in axes if a != "layers"]
    if len(own) < 2 or "vocab" in own:
        return False
    return own[0] in _VECTORS or own[-1] in _VECTORS[:2]


def matrix_dimensions(axes: tuple[str | None, ...]):
    """How Muon sees a projection as a matrix: input axes against output axes, ``layers`` apart."""
    if not is_matrix(axes):
        return None
    own = [i for i, a in enumerate(axes) if a != "layers"]
    into = own[:1] if axes[own[0]] in _VECTORS else own[:-1]
    out = own[len(into):]
    return optax.contrib.MuonDimensionNumbers(tuple(into), tuple(out))


def build(config: OptimizerConfig, axes: Any, steps: int) -> optax.GradientTransformation:
    """The transformation for parameters with these logical axes; clipping is the caller's."""
    is_axes = lambda a: isinstance(a, tuple)  # noqa: E731
    lr = schedule(config, config.lr, steps)
    decayed = jax.tree.map(is_matrix, axes, is_leaf=is_axes)
    if config.name == "adamw":
        return optax.adamw(
            lr, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decayed
        )
    dimensions = jax.tree.map(matrix_dimensions, axes, is_leaf=is_axes)
    return optax.contrib.muon(
        schedule(config, config.matrix_lr, steps),
        beta=config.momentum,
        weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_learning_rate=lr,
        muon_weight_dimension_numbers=lambda params: dimensions,
        consistent_rms=0.2,
    )


def clip(grads: Any, norm: jax.Array, limit: float | None) -> Any:
    """Scale gradients so that their global norm is at most ``limit``."""
    if limit is None:
        return grads
    factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
