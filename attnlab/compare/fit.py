"""Small decoders trained on generated tasks, all seeds and learning rates of a cell at once.

    fitted = fit(model, tasks.get("mqar"), Budget(steps=600), rates=(1e-3, 3e-3), seeds=(0, 1, 2))
    fitted.accuracy[:, :, -1]                          # [rates, seeds], at the end

One program trains every pair of a rate and a seed (vmap) and draws its rows inside the step. What a
seed draws does not depend on the model: variants see the same rows in the same order, and are
judged on the same rows, which no training step sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attnlab.core import versions
from attnlab.core.errors import ConfigError
from attnlab.core.types import Seq
from attnlab.models.decoder import DecoderConfig
from attnlab.tasks.task import NONE, Task, require_positive

TRAIN, TEST, START = 0, 1, 2  # streams of keys of a seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What every model of a comparison may spend, and how it is trained and judged.

    Args:
        steps: of ``batch`` rows. warmup: part of the steps in which the rate rises to its peak; it
            falls to nothing along a cosine. weight_decay: of matrices (AdamW). clip: most norm of a
            gradient. points: how often it is judged, on ``rows`` rows.
    """

    steps: int = 600
    batch: int = 64
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    points: int = 20
    rows: int = 512

    def __post_init__(self):
        require_positive(self, "steps", "batch", "points", "rows")
        if self.steps % self.points:
            raise ConfigError(
                f"steps = {self.steps}", f"must be a multiple of points = {self.points}",
                f"use steps = {-(-self.steps // self.points) * self.points}",
            )
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup = {self.warmup}", "is a part of the steps", "use 0.1")

    def shape(self, step: jax.Array) -> jax.Array:
        """The rate at ``step``, as a part of its peak."""
        rise = round(self.warmup * self.steps)
        first = jnp.minimum(1.0, (step + 1) / max(1, rise))
        along = jnp.clip((step - rise) / max(1, self.steps - rise), 0, 1)
        return first * 0.5 * (1 + jnp.cos(jnp.pi * along))


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What became of every rate and seed.

    Args:
        steps: int ``[points]``, after how many steps it was judged. loss (nats a label), accuracy:
            ``[rates, seeds, points]`` on the rows of the test. groups: right answers and answers
            asked at the end, ``[rates, seeds, values, 2]`` by the name of a group of the task.
    """

    steps: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    groups: dict[str, np.ndarray]


def fit(
    model: DecoderConfig, task: Task, budget: Budget, *, rates: Sequence[float],
    seeds: Sequence[int] = (0,), impl: str | None = None,
) -> Fitted:
    """Train ``model`` on ``task`` for every rate and seed.

    Raises:
        ConfigError: the model's vocabulary is smaller than the task's, or no rate or seed is given.
    """
    if model.vocab_size < task.vocab_size:
        raise ConfigError(
            f"vocab_size = {model.vocab_size}", f"the task has {task.vocab_size} tokens",
            f"use vocab_size = {task.vocab_size}",
        )
    if not rates or not seeds:
        raise ConfigError(f"rates = {rates}, seeds = {seeds}", "name at least one each", "use 3e-3")
    pairs = [(rate, seed) for rate in rates for seed in seeds]
    train = jax.jit(jax.vmap(lambda rate, seed: _one(model, task, budget, impl, rate, seed)))
    found = train(*(jnp.asarray(x) for x in zip(*pairs, strict=True)))
    loss, accuracy, groups = jax.tree.map(
        lambda x: np.asarray(x).reshape(len(rates), len(seeds), *x.shape[1:]), found
    )
    each = budget.steps // budget.points
    return Fitted(np.arange(1, budget.points + 1) * each, loss, accuracy, groups)


def _one(model: DecoderConfig, task: Task, budget: Budget, impl, rate, seed):
    graphdef, _ = versions.abstract_split(lambda: model.build(nnx.Rngs(params=0)))
    key = jax.random.key(seed)
    keys = [jax.random.fold_in(key, stream) for stream in (TRAIN, TEST, START)]
    params = versions.split_module(model.build(nnx.Rngs(params=keys[START])))[1]
    optimizer = optax.chain(
        optax.clip_by_global_norm(budget.clip), optax.scale_by_adam(b2=0.95),
        optax.add_decayed_weights(
            budget.weight_decay, lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
        ),
    )
    test = task.sample(keys[TEST], budget.rows)

    def merged(params):
        return versions.merge_module(graphdef, params)

    def total(params, batch):
        weights = (batch.labels != NONE).astype(jnp.float32)
        targets = jnp.maximum(batch.labels, 0)
        seq = Seq.full(*batch.tokens.shape)
        summed, nll, _, _ = merged(params).loss(batch.tokens, targets, weights, seq, impl=impl)
        return summed / weights.sum(), nll / weights.sum()

    def step(state, at):
        params, moments = state
        batch = task.sample(jax.random.fold_in(keys[TRAIN], at), budget.batch)
        grads = jax.grad(lambda p: total(p, batch)[0])(params)
        updates, moments = optimizer.update(grads, moments, params)
        updates = jax.tree.map(lambda u: -rate * budget.shape(at) * u, updates)
        return (optax.apply_updates(params, updates), moments), None

    def right(params):
        module = merged(params)
        said = module.logits(module.hidden(test.tokens, Seq.full(*test.tokens.shape), impl=impl).h)
        return (said.argmax(-1) == test.labels) & test.scored

    def part(state, steps):
        state, _ = jax.lax.scan(step, state, steps)
        loss = total(state[0], test)[1]
        return state, (loss, right(state[0]).sum() / test.scored.sum())

    steps = jnp.arange(budget.steps).reshape(budget.points, -1)
    (params, _), (loss, accuracy) = jax.lax.scan(part, (params, optimizer.init(params)), steps)
    hits, asked = right(params).sum(1), test.scored.sum(1)
    groups = {}
    for name, values in test.groups.items():
        size = task.group_size(name)
        groups[name] = jax.ops.segment_sum(jnp.stack([hits, asked], 1), values, size)
    return loss, accuracy, groups
