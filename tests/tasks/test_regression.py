"""In-context regression: the losses that are known without training."""

from __future__ import annotations

import importlib.util

import jax
import numpy as np
import pytest

from attnlab.core.errors import ConfigError
from attnlab.tasks.regression import LinearRegression, QueryRegression


def test_known_losses():
    """He et al. 2025: 1.10 for nothing, 0.238 for a step of gradient descent, 0.114 for ridge."""
    task = QueryRegression()
    batch = task.sample(jax.random.key(1), 100_000)
    asked = np.asarray(batch.targets)[:, -1]
    loss = lambda said: float(((said - asked) ** 2).mean())  # noqa: E731
    assert abs(loss(0) - 1.10) < 0.02
    assert abs(loss(task.ridge(batch)) - 0.1142) < 0.002
    steps = [loss(task.gradient_step(batch, rate)) for rate in np.linspace(0.7, 0.95, 11)]
    assert abs(min(steps) - 0.2384) < 0.003 and steps[0] > min(steps) < steps[-1]


def test_the_query_has_no_answer():
    batch = QueryRegression(dims=3, pairs=4, noise=0.0).sample(jax.random.key(0), 7)
    inputs, targets = np.asarray(batch.inputs), np.asarray(batch.targets)
    assert inputs.shape == (7, 5, 4) and (inputs[:, -1, -1] == 0).all()
    assert (np.asarray(batch.asked) == [[0, 0, 0, 0, 1]]).all() and (targets[:, :-1] == 0).all()
    w = np.linalg.lstsq(inputs[0, :-1, :-1], inputs[0, :-1, -1], rcond=None)[0]
    assert abs(inputs[0, -1, :-1] @ w - targets[0, -1]) < 1e-5, "the same function"


def test_least_squares_knows_after_as_many_points_as_dimensions():
    task = LinearRegression(dims=4, points=8)
    batch = task.sample(jax.random.key(0), 500)
    targets = np.asarray(batch.targets)
    assert batch.inputs.shape == (500, 16, 4) and (targets[:, 1::2] == 0).all()
    assert (np.asarray(batch.inputs)[:, 1::2, 1:] == 0).all()
    assert (np.asarray(batch.inputs)[:, 1::2, 0] == targets[:, ::2]).all()
    error = ((task.least_squares(batch) - targets[:, ::2]) ** 2).mean(0) / 4
    assert abs(error[0] - 1) < 0.2 and (np.diff(error[:5]) < 0).all() and error[4:].max() < 1e-4


@pytest.fixture
def script(root):
    path = root / "experiments/in_context_regression.py"
    spec = importlib.util.spec_from_file_location("in_context_regression", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_is_softmax_attention_to_the_pairs(script):
    """Against the sums written out, and blind to the order of the pairs."""
    params = script.init(jax.random.key(0), 3)
    batch = script.TASK.sample(jax.random.key(1), 4)
    inputs = np.asarray(batch.inputs, np.float64)
    q, k, v, o = (np.asarray(params[name], np.float64) for name in "qkvo")
    pairs, query = inputs[:, :-1], inputs[:, -1]
    logits = np.einsum("be,ehd,bpf,fhd->bhp", query, q, pairs, k) / np.sqrt(6)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhp,bpe,ehd,hd->b", weights, pairs, v, o)
    np.testing.assert_allclose(script.predict(params, batch.inputs), expected, atol=1e-5)
    turned = batch.inputs.at[:, :-1].set(batch.inputs[:, -2::-1])
    np.testing.assert_allclose(script.predict(params, turned), expected, atol=1e-5)


@pytest.mark.heavy
def test_one_layer_learns_a_step_of_gradient_descent(script):
    """2,000 steps: 0.41 with one head, 0.245 with two, whose values have opposite signs."""
    _, alone = script.train(1, 2000, seeds=1)
    params, two = script.train(2, 2000, seeds=1)
    assert 0.39 < alone[0, -1] < 0.43 and 0.238 < two[0, -1] < 0.26
    found = script.pattern(jax.tree.map(lambda x: x[0], params))
    assert np.prod(found["omega"]) < 0 > np.prod(found["mu"]) and max(found["off"]) < 0.02


@pytest.mark.parametrize("make, message", [
    (lambda: LinearRegression(dims=0), "dims = 0: must be at least 1"),
    (lambda: LinearRegression(noise=-1), "noise = -1: must not be negative"),
    (lambda: QueryRegression(pairs=0), "pairs = 0: must be at least 1"),
])
def test_wrong_fields(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
