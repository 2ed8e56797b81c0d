"""The training state and the one jitted, donated step.

A step whose loss or gradients are not finite changes nothing but its counters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnlab.core import versions
from attnlab.core.axes import Rules, check_divisible, sharding, spec
from attnlab.core.errors import ConfigError
from attnlab.core.types import Seq
from attnlab.models.decoder import Decoder, DecoderConfig
from attnlab.train import optimizer
from attnlab.train.optimizer import OptimizerConfig

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes.

    Args:
        step: int32, steps taken (skipped ones included). params, opt_state: trees.
        skipped: int32, steps skipped so far. streak: int32, skipped steps in a row.
        layers: explicit state of the layers (``Decoder.init_state``).
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array
    streak: jax.Array
    layers: Any


class Trainer:
    """A model, an optimizer and a mesh, compiled.

    Args:
        model: decoder config. config: optimizer config. steps: length of the schedule.
        mesh, rules: where everything lives. accumulate: microbatches a step.
        layout: the static promise of ``Seq`` about every batch. impl: attention implementation.
        seed: of the random key that layers get, a function of it, the step and the microbatch.
    """

    def __init__(
        self, model: DecoderConfig, config: OptimizerConfig, steps: int, mesh: Mesh, rules: Rules,
        *, accumulate: int = 1, layout: str = "packed", impl: Any = None, seed: int = 0,
    ):
        self.model, self.config, self.mesh, self.rules = model, config, mesh, rules
        self.accumulate, self.layout, self.impl = accumulate, layout, impl
        self.seed = seed
        self.graphdef, self.axes, abstract = _parts(model)
        self.tx = optimizer.build(config, self.axes, steps)
        self.lr = optimizer.schedule(config, config.lr, steps)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.batch_sharding = NamedSharding(mesh, spec(("batch", "time"), rules, mesh))
        self.param_shardings = _param_shardings(abstract, self.axes, rules, mesh)
        self.state_shardings = self._state_shardings(abstract)
        self.step = jax.jit(
            self._step, donate_argnums=0, out_shardings=(self.state_shardings, self.replicated)
        )
        self.evaluate = jax.jit(self._evaluate, out_shardings=self.replicated)

    def init(self, seed: int) -> TrainState:
        """A fresh state; the same numbers on any mesh."""

        def create(key):
            module = self.model.build(nnx.Rngs(params=key))
            return self._fresh(versions.split_module(module)[1])

        with sharding(self.mesh, self.rules):
            return jax.jit(create, out_shardings=self.state_shardings)(jax.random.key(seed))

    def abstract_batch(self, batch: int, seq_len: int) -> Batch:
        """Shapes, dtypes and shardings of the batches of a step."""
        dtypes = dict.fromkeys(("tokens", "targets", "positions", "segments"), jnp.int32)
        return {
            name: jax.ShapeDtypeStruct((batch, seq_len), dtype, sharding=self.batch_sharding)
            for name, dtype in (dtypes | {"loss_mask": jnp.float32}).items()
        }

    def trace(self, batch: int, seq_len: int) -> None:
        """Raise what the first step would refuse, without compiling it (the trace is kept)."""
        self.step.trace(self.abstract_state(), self.abstract_batch(batch, seq_len))

    def module(self, params: Any) -> Decoder:
        """The decoder around ``params``."""
        return versions.merge_module(self.graphdef, params)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state (what a checkpoint is restored into)."""
        shapes = jax.eval_shape(lambda: self._fresh(_parts(self.model)[2], abstract=True))
        return jax.tree.map(
            lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n),
            shapes, self.state_shardings,
        )

    def _fresh(self, params, abstract=False) -> TrainState:
        if abstract:
            params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params)
        zero = jnp.zeros((), jnp.int32)
        layers = self.module(params).init_state()
        return TrainState(zero, params, self.tx.init(params), zero, zero, layers)

    def _state_shardings(self, abstract) -> TrainState:
        shapes = jax.eval_shape(lambda: self._fresh(abstract, abstract=True))
        by_path = {
            jax.tree_util.keystr(path): (leaf.shape, place)
            for (path, leaf), place in zip(
                jax.tree_util.tree_leaves_with_path(abstract),
                jax.tree.leaves(self.param_shardings), strict=True,
            )
        }

        def place(path, leaf):
            name = jax.tree_util.keystr(path)
            for suffix, (shape, where) in by_path.items():
                if name.endswith(suffix) and leaf.shape == shape:
                    return where
            return self.replicated

        return jax.tree_util.tree_map_with_path(place, shapes)

    def _sums(self, params, batch: Batch, layers, rng):
        """``(total, ((nll, tokens, aux), layers))`` summed over the weighted tokens of a batch."""
        segments = batch["segments"] if self.layout != "full" else None
        seq = Seq(batch["positions"], segments, self.layout)  # type: ignore[arg-type]
        with sharding(self.mesh, self.rules):
            total, nll, aux, layers = self.module(params).loss(
                batch["tokens"], batch["targets"], batch["loss_mask"], seq, state=layers, rng=rng,
                impl=self.impl,
            )
        count = batch["loss_mask"].sum()
        losses = sum((v for k, v in aux.items() if k.endswith("_loss")), 0.0)
        return total + losses * count, ((nll, count, aux), layers)

    def _gradients(self, params, batch: Batch, layers, rng):
        """``(gradients, (nll, tokens, aux), layers)``, microbatch after microbatch."""
        grad = jax.grad(self._sums, has_aux=True)
        if self.accumulate == 1:
            grads, (sums, layers) = grad(params, batch, layers, rng)
            return grads, sums, layers
        # Row b of the batch goes to microbatch b % A, so every device works on every microbatch.
        split = jax.tree.map(
            lambda x: x.reshape(-1, self.accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        keys = jax.random.split(rng, self.accumulate)

        def body(carry, micro):
            *done, layers = carry
            grads, (sums, layers) = grad(params, micro[0], layers, micro[1])
            return (*jax.tree.map(jnp.add, tuple(done), (grads, sums)), layers), None

        first = jax.tree.map(lambda x: x[0], (split, keys))
        rest = jax.tree.map(lambda x: x[1:], (split, keys))
        grads, (sums, layers) = grad(params, first[0], layers, first[1])
        (grads, (nll, count, aux), layers), _ = jax.lax.scan(body, (grads, sums, layers), rest)
        return grads, (nll, count, jax.tree.map(lambda a: a / self.accumulate, aux)), layers

    def _step(self, state: TrainState, batch: Batch):
        rng = jax.random.fold_in(jax.random.key(self.seed), state.step)
        grads, (nll, count, aux), layers = self._gradients(state.params, batch, state.layers, rng)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        loss, norm = nll / count, optax.tree.norm(grads)  # NaN for a batch without any target
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        clipped = optimizer.clip(grads, norm, self.config.clip_norm)
        updates, opt_state = self.tx.update(clipped, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        def keep(new, old):
            return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)

        bad = jnp.where(ok, 0, 1)
        new = TrainState(
            state.step + 1, keep(params, state.params), keep(opt_state, state.opt_state),
            state.skipped + bad, (state.streak + 1) * bad, keep(layers, state.layers),
        )
        metrics = {
            "loss": loss, "grad_norm": norm, "loss_tokens": count, "skipped": new.skipped,
            "streak": new.streak, **aux,
        }
        return new, metrics

    def _evaluate(self, params, batch: Batch, layers=None):
        _, ((nll, count, _), _) = self._sums(params, batch, layers, None)
        return nll, count


def _parts(model: DecoderConfig):
    """``(graphdef, axes, abstract params)`` of a decoder, without computing anything."""
    box: dict[str, Any] = {}

    def trace():
        module = model.build(nnx.Rngs(params=jax.random.key(0)))
        box["axes"] = Decoder.axes(module)
        box["graphdef"], params = versions.split_module(module)
        return params

    abstract = jax.eval_shape(trace)
    return box["graphdef"], box["axes"], abstract


def _param_shardings(abstract, axes, rules, mesh):
    is_axes = lambda a: isinstance(a, tuple)  # noqa: E731
    flat_axes = jax.tree.leaves(axes, is_leaf=is_axes)
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    out = []
    for (path, leaf), names in zip(leaves, flat_axes, strict=True):
        part = spec(names, rules, mesh, leaf.shape)
        check_divisible(f"parameter {jax.tree_util.keystr(path)}", leaf.shape, part, mesh)
        out.append(NamedSharding(mesh, part))
    return jax.tree.unflatten(tree, out)


def check_batch(batch: int, accumulate: int, mesh: Mesh, rules: Rules) -> None:
    """Raise ConfigError unless the rows of a step split over microbatches and batch shards."""
    entry = spec(("batch",), rules, mesh)[0]
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    shards = 1
    for name in names:
        shards *= mesh.shape[name]
    if accumulate < 1 or batch % (accumulate * shards):
        raise ConfigError(
            f"train.batch = {batch}",
            f"must be a multiple of accumulate = {accumulate} times {shards} batch shards",
            f"use {max(1, batch // (accumulate * shards)) * accumulate * shards}",
        )
