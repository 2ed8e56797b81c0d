"""Schedules, who decays, which optimizer takes which parameter, and whether training learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.core import registry
from attnlab.core.errors import ConfigError
from attnlab.models.decoder import DecoderConfig
from attnlab.parallel.mesh import make_mesh
from attnlab.parallel.rules import RULES
from attnlab.train import optimizer
from attnlab.train.optimizer import OptimizerConfig, schedule
from attnlab.train.state import Trainer

FIELDS = {
    "gqa": {"num_heads": 4, "num_kv_heads": 2, "bias": True, "qk_norm": True, "sink_logits": True},
    "sqa": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
    "mla": dict(num_heads=2, kv_rank=6, q_rank=5, nope_dim=6, rope_dim=4, value_dim=8),
    "cca": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
}
PROJECTIONS = {
    "gqa": {"w_q", "w_k", "w_v", "w_o"},
    "sqa": {"w_q", "w_k", "w_v", "w_o"},
    "mla": {"w_dq", "w_uq", "w_dkv", "w_ukv", "w_o"},
    "cca": {"w_q", "w_k", "w_v", "w_o"},
}
MLP = {"w_gate", "w_up", "w_down"}


def decoder(name="gqa", **fields) -> DecoderConfig:
    layer = registry.build_config(name, dim=16, **FIELDS[name])
    return DecoderConfig(
        **({"vocab_size": 21, "period": (layer,), "repeats": 2, "mlp_dim": 24, "tied": False}
           | fields)
    )


def trainer(model, steps=30, **fields) -> Trainer:
    config = OptimizerConfig(**fields)
    return Trainer(model, config, steps, make_mesh(None, jax.devices()[:1]), RULES, layout="full")


def batch(rows=4, length=12):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 21, (rows, length + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions,
        "segments": np.ones((rows, length), np.int32),
        "loss_mask": np.ones((rows, length), np.float32),
    }


def lr(at, steps=100, **fields) -> float:
    c = OptimizerConfig(**({"lr": 1.0, "warmup": 10, "final": 0.1} | fields))
    return float(schedule(c, c.lr, steps)(at))


def test_schedules():
    for name in ("cosine", "wsd", "constant"):
        assert lr(0, schedule=name) == pytest.approx(1 / 11), "the first step is not wasted"
        assert lr(5, schedule=name) == pytest.approx((1 + 10 * 0.5) / 11)
        assert lr(10, schedule=name) == 1
        assert lr(0, schedule=name, warmup=0) == 1
    assert lr(55, schedule="cosine") == pytest.approx(0.55), "half-way between 1 and 0.1"
    assert lr(100, schedule="cosine") == pytest.approx(0.1)
    assert lr(99, schedule="cosine") < 0.1005
    assert lr(80, schedule="wsd", decay=0.2) == 1, "the knee"
    assert lr(90, schedule="wsd", decay=0.2) == pytest.approx(0.55)
    assert lr(100, schedule="wsd", decay=0.2) == pytest.approx(0.1)
    assert lr(99, schedule="constant") == 1


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_schedules_of_odd_runs(name):
    assert lr(100, schedule=name, decay=1.0) == pytest.approx(0.1), "decay reaches into the warmup"
    assert 0 < lr(4, steps=5, schedule=name) < 1, "a run shorter than its warmup"
    assert lr(0, steps=1, schedule=name, warmup=0) == 1


def names(tree) -> set[str]:
    """Last parameter name of every leaf that is an array, blocks and head apart."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {path[-1].key for path, _ in paths if hasattr(path[-1], "key")}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_who_takes_what(name):
    t = trainer(decoder(name), name="muon")
    state = t.abstract_state()
    inner = state.opt_state.inner_states
    muon, adam = (names(inner[k].inner_state) for k in ("muon", "adam"))
    everything = names(state.params)
    matrices = PROJECTIONS[name] | MLP
    assert muon & everything == matrices
    assert adam & everything == everything - matrices
    assert {"embedding", "head", "final_norm", "attn_norm", "mlp_norm"} <= adam


@pytest.mark.parametrize("name", PROJECTIONS)
def test_only_matrices_decay(name):
    t = trainer(decoder(name), lr=0.5, weight_decay=0.1, warmup=0, schedule="constant")
    params = jax.tree.map(lambda p: np.ones(p.shape, p.dtype), t.abstract_state().params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(t.tx.update)(zeros, t.tx.init(params), params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        want = -0.05 if path[-1].key in PROJECTIONS[name] | MLP else 0.0
        np.testing.assert_allclose(leaf, want, rtol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_muon_orthogonalises_each_layer_between_input_and_output(name):
    t = trainer(
        decoder(name), name="muon", matrix_lr=1.0, weight_decay=0.0, warmup=0, schedule="constant"
    )
    params = t.init(0).params
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    grads = tree.unflatten([rng.standard_normal(p.shape).astype(np.float32) for p in leaves])
    updates, _ = jax.jit(lambda g, p: t.tx.update(g, t.tx.init(p), p))(grads, params)
    axes = jax.tree.leaves(t.axes, is_leaf=lambda a: isinstance(a, tuple))
    seen = 0
    for (path, u), names_ in zip(jax.tree_util.tree_leaves_with_path(updates), axes, strict=True):
        key = path[-1].key
        if key not in PROJECTIONS[name] | MLP:
            continue
        split = -1 if key in ("w_o", "w_down") else 2  # after the input axes
        assert names_[0] == "layers"
        for layer in np.asarray(u):
            width = int(np.prod(layer.shape[: split if split < 0 else split - 1]))
            matrix = layer.reshape(width, -1)
            values = np.linalg.svd(matrix, compute_uv=False)
            scale = 0.2 * max(matrix.shape) ** 0.5  # AdamW's update RMS
            # Newton-Schulz takes all but the smallest values near 1; a head apart would reach 2.
            assert 0.6 < np.median(values) / scale, (key, values / scale)
            assert values.max() / scale < 1.4, (key, values / scale)
            seen += 1
    assert seen == 2 * len(PROJECTIONS[name] | MLP)


@pytest.mark.parametrize(
    "fields", [{"name": "adamw", "lr": 1e-2}, {"name": "muon", "lr": 1e-2, "matrix_lr": 3e-2}],
    ids=lambda f: f["name"],
)
@pytest.mark.parametrize("attention", ["gqa", "cca"])
def test_thirty_steps_learn(fields, attention):
    t = trainer(decoder(attention), warmup=3, weight_decay=0.0, **fields)
    state, one = t.init(0), batch()
    losses = []
    for _ in range(30):
        state, metrics = t.step(state, one)
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - np.log(21)) < 0.2 and losses[-1] < 0.6 * losses[0], losses
    assert int(state.skipped) == 0


def test_clip():
    grads = {"a": jnp.full(4, 3.0), "b": jnp.full(1, 8.0)}
    norm = optax.tree.norm(grads)
    assert norm == 10
    cut = optimizer.clip(grads, norm, 5.0)
    np.testing.assert_allclose(optax.tree.norm(cut), 5, rtol=1e-6)
    np.testing.assert_allclose(cut["a"], 1.5, rtol=1e-6)
    for limit in (None, 20.0):
        np.testing.assert_array_equal(optimizer.clip(grads, norm, limit)["a"], grads["a"])


@pytest.mark.parametrize(
    "fields", [{"lr": 0.0}, {"matrix_lr": -1.0}, {"warmup": -1}, {"final": 2.0}, {"decay": 0.0},
               {"b1": 1.0}, {"clip_norm": 0.0}], ids=str,
)
def test_bad_configs(fields):
    with pytest.raises(ConfigError, match=f"OptimizerConfig.{next(iter(fields))}"):
        OptimizerConfig(**fields)
