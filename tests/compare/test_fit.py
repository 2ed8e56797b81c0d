"""Training on generated tasks: what is the same for all, and what is learned."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import tasks
from attnlab.compare.fit import Budget, fit
from attnlab.core.errors import ConfigError
from attnlab.core.registry import build_config
from attnlab.models.decoder import DecoderConfig

SMALL = Budget(steps=6, batch=4, points=3, rows=32)


def model(task, layers=1, dim=16, conv=3, **fields) -> DecoderConfig:
    layer = build_config("gqa", dim=dim, num_heads=1, num_kv_heads=1, **fields)
    return DecoderConfig(
        vocab_size=task.vocab_size, period=(layer,), repeats=layers, mlp_dim=dim, short_conv=conv
    )


def test_rates_and_seeds_alone_are_those_together():
    task = tasks.get("induction", length=12, vocab=8)
    together = fit(model(task), task, SMALL, rates=(1e-2, 1e-3), seeds=(0, 5))
    assert together.loss.shape == together.accuracy.shape == (2, 2, 3)
    assert (together.steps == [2, 4, 6]).all()
    alone = fit(model(task), task, SMALL, rates=(1e-3,), seeds=(5,))
    np.testing.assert_allclose(together.loss[1, 1], alone.loss[0, 0], rtol=1e-5)
    assert len(set(np.round(together.loss[..., -1].ravel(), 6).tolist())) == 4
    right, asked = np.moveaxis(together.groups["distance"], -1, 0)
    assert right.shape == (2, 2, 11) and (asked.sum(-1) == 32).all() and (right <= asked).all()
    np.testing.assert_allclose(right.sum(-1) / 32, together.accuracy[..., -1], rtol=1e-6)


def test_a_rate_of_nothing_learns_nothing():
    task = tasks.get("parity", length=8)
    found = fit(model(task), task, SMALL, rates=(0.0,), seeds=(0,))
    assert np.ptp(found.loss) == 0 and found.accuracy.shape == (1, 1, 3)


def test_models_see_the_same_rows(monkeypatch):
    """The keys of rows come from the seed alone."""
    task = tasks.get("induction", length=12, vocab=8)
    seen = []
    drawn = type(task).sample

    def sample(self, key, batch):
        jax.debug.callback(lambda data: seen.append(tuple(np.asarray(data).tolist())),
                           jax.random.key_data(key))
        return drawn(self, key, batch)

    monkeypatch.setattr(type(task), "sample", sample)
    kept = []
    for layers, conv in ((1, 3), (2, 0)):
        seen.clear()
        fit(model(task, layers, conv=conv), task, SMALL, rates=(1e-3,), seeds=(7,))
        jax.effects_barrier()
        kept.append(sorted(set(seen)))
    assert kept[0] == kept[1] and len(kept[0]) == 6 + 1, "six batches and the test"


def test_the_rate_rises_and_falls():
    budget = Budget(steps=100, warmup=0.1, points=10)
    shape = np.asarray(budget.shape(jnp.arange(100)))
    assert shape[0] == pytest.approx(0.1) and shape[9:11].max() == pytest.approx(1.0)
    assert (np.diff(shape[:10]) > 0).all() and (np.diff(shape[10:]) < 0).all() and shape[-1] < 1e-3
    assert Budget(steps=100, warmup=0, points=10).shape(jnp.int32(0)) == 1


@pytest.mark.parametrize("make, message", [
    (lambda t: Budget(steps=7, points=2), "steps = 7: must be a multiple of points = 2"),
    (lambda t: Budget(batch=0), "batch = 0: must be at least 1"),
    (lambda t: Budget(warmup=1.0), "warmup = 1.0: is a part of the steps"),
    (lambda t: fit(model(t), t, SMALL, rates=()), "name at least one each"),
    (lambda t: fit(dataclasses.replace(model(t), vocab_size=7), t, SMALL, rates=(1e-3,)),
     "vocab_size = 7: the task has 8 tokens"),
])
def test_wrong_arguments(make, message):
    with pytest.raises(ConfigError) as error:
        make(tasks.get("induction", length=12, vocab=8))
    assert message in str(error.value)


# Rows of the notes that reach 0.99 within 600 steps; the others say what the convolution is for.
LEARNED = {
    "mqar, two layers": ("mqar", {}, 2, 3, 600, 3e-3, 0.99, 1.0),
    "mqar, one layer": ("mqar", {}, 1, 3, 600, 3e-3, 0.99, 1.0),
    "induction, one layer": ("induction", {"vocab": 32}, 1, 3, 400, 3e-3, 0.99, 1.0),
    "mqar without a convolution": ("mqar", {}, 2, 0, 600, 3e-3, 0.05, 0.25),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned(name):
    task, fields, layers, conv, steps, rate, least, most = LEARNED[name]
    task = tasks.get(task, **fields)
    budget = Budget(steps=steps, points=4, rows=256)
    found = fit(model(task, layers, dim=64, conv=conv), task, budget, rates=(rate,), seeds=(0,))
    assert least <= found.accuracy[0, 0, -1] <= most, found.accuracy
