"""The step: accumulation, skipping, donation, one compile."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core import registry
from attnlab.core.errors import ConfigError
from attnlab.models.decoder import DecoderConfig
from attnlab.parallel.mesh import make_mesh
from attnlab.parallel.rules import RULES
from attnlab.train.optimizer import OptimizerConfig
from attnlab.train.state import Trainer, check_batch

ROWS, LENGTH, VOCAB = 8, 12, 21
KEY = jax.random.key(0)
GQA = registry.build_config("gqa", dim=16, num_heads=4, num_kv_heads=2)
MODEL = DecoderConfig(vocab_size=VOCAB, period=(GQA,), repeats=2, mlp_dim=24, z_loss=1e-3)


def trainer(accumulate=1, **fields) -> Trainer:
    config = OptimizerConfig(**({"warmup": 0, "lr": 1e-2} | fields))
    mesh = make_mesh(None, jax.devices()[:1])
    return Trainer(MODEL, config, 20, mesh, RULES, accumulate=accumulate)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions,
        "segments": np.ones((ROWS, LENGTH), np.int32),
        "loss_mask": np.ones((ROWS, LENGTH), np.float32),
    }


def ragged(seed=0):
    """A batch whose microbatches hold very different numbers of targets, one of them none."""
    one = batch(seed)
    mask = (np.random.default_rng(9).random((ROWS, LENGTH)) < 0.6).astype(np.float32)
    mask[1::4] = 0  # all of microbatch 1 of 4
    mask[2::4, 1:] = 0  # one target a row in microbatch 2
    return one | {"loss_mask": mask}


def host(tree):
    return jax.tree.map(np.array, tree)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def plain():
    return trainer()


@pytest.mark.parametrize("make", [batch, ragged])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_one_big_batch(plain, make, accumulate):
    params = plain.init(0).params
    small = trainer(accumulate)
    want, (nll, count, _), _ = jax.jit(plain._gradients)(params, make(), None, KEY)
    got, (nll_, count_, _), _ = jax.jit(small._gradients)(params, make(), None, KEY)
    assert count == count_ == make()["loss_mask"].sum()
    np.testing.assert_allclose(nll_, nll, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6 * np.abs(y).max())
    (_, one), (_, other) = (t.step(t.init(0), make()) for t in (plain, small))
    for name in ("loss", "grad_norm", "loss_tokens"):
        np.testing.assert_allclose(other[name], one[name], rtol=1e-6)
    np.testing.assert_allclose(one["loss"], nll / count, rtol=1e-6)


def test_one_program_and_donation(plain):
    state = plain.init(0)
    before = state
    for seed in range(3):
        state, _ = plain.step(state, batch(seed))
    assert plain.step._cache_size() == 1
    assert all(x.is_deleted() for x in jax.tree.leaves((before.params, before.opt_state)))
    assert int(state.step) == 3 and int(state.skipped) == int(state.streak) == 0


def poisoned(state, value):
    table = state.params["embedding"].at[3, 0].set(value)
    return dataclasses.replace(state, params=state.params | {"embedding": table})


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("what", ["no target", "nan", "inf"])
def test_a_bad_step_changes_nothing(what, accumulate):
    t = trainer(accumulate)
    state, _ = t.step(t.init(0), batch())
    bad = batch(1)
    if what == "no target":
        bad["loss_mask"] = np.zeros_like(bad["loss_mask"])
    else:
        state = poisoned(state, jnp.nan if what == "nan" else jnp.inf)
    before = host(state)
    for n in (1, 2):
        state, metrics = t.step(state, bad)
        assert_same(host(state.params), before.params)
        assert_same(host(state.opt_state), before.opt_state)
        assert int(state.step) == 1 + n and int(state.skipped) == int(state.streak) == n
        assert int(metrics["skipped"]) == int(metrics["streak"]) == n
        assert not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"])
    good = poisoned(state, 0.1)
    state, metrics = t.step(good, batch(2))
    assert int(state.skipped) == 2 and int(state.streak) == 0 and np.isfinite(metrics["loss"])
    assert any((a != b).any() for a, b in zip(
        jax.tree.leaves(host(state.params)), jax.tree.leaves(before.params), strict=True))


def test_abstract_state_describes_the_state(plain):
    for want, got in zip(
        jax.tree.leaves(plain.abstract_state()), jax.tree.leaves(plain.init(0)), strict=True
    ):
        assert (want.shape, want.dtype, want.sharding) == (got.shape, got.dtype, got.sharding)


def test_the_seed_makes_the_weights(plain):
    assert_same(host(plain.init(3).params), host(plain.init(3).params))
    a, b = host(plain.init(3).params), host(plain.init(4).params)
    assert (a["embedding"] != b["embedding"]).any()


def test_batch_must_split():
    mesh = make_mesh(None, jax.devices()[:1])
    check_batch(8, 4, mesh, RULES)
    with pytest.raises(ConfigError, match=r"train.batch = 6.*multiple of accumulate = 4.*use 4"):
        check_batch(6, 4, mesh, RULES)
