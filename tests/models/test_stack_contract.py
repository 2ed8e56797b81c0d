"""What the stack and the trainer hand to a layer beside activations: shared, state and rng."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.core import versions
from attnlab.core.axes import ones, parameter
from attnlab.core.errors import ConfigError
from attnlab.core.layer import Layer, LayerConfig
from attnlab.core.types import Out, Seq
from attnlab.infer.generate import generate, score
from attnlab.infer.sample import SampleConfig
from attnlab.models.decoder import DecoderConfig
from attnlab.parallel.mesh import make_mesh
from attnlab.parallel.rules import RULES
from attnlab.train.checkpoint import Checkpoints, restore_weights
from attnlab.train.optimizer import OptimizerConfig
from attnlab.train.state import Trainer

D, B, T, VOCAB = 8, 4, 6, 11


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriterConfig(LayerConfig):
    """Writes the mean of its input, counts its calls in its state, adds noise where it gets rng."""

    honest: bool = True
    writes: ClassVar[tuple[str, ...]] = ("mean",)

    def build(self, rngs):
        return Writer(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReaderConfig(LayerConfig):
    """Multiplies its input with what the writer in front of it wrote."""

    reads: ClassVar[tuple[str, ...]] = ("mean",)

    def build(self, rngs):
        return Reader(self, rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoCache:
    AXES: ClassVar[dict] = {}


class Pointwise(Layer):
    """No attention: every token for itself, so that a cache has nothing to hold."""

    def __init__(self, config, rngs: nnx.Rngs):
        self.config = config
        self.w = parameter(rngs, ones, (D,), ("embed",), "float32")

    def init_cache(self, batch, capacity, dtype=None, *, policy=None):
        return NoCache()

    def prefill(self, x, seq, cache, *, impl=None, **more):
        return dataclasses.replace(self(x, seq, **more), cache=cache)


class Writer(Pointwise):
    def init_state(self):
        return {"calls": jnp.zeros(()), "noise": jnp.zeros(())}

    def __call__(self, x, seq, *, impl=None, rng=None, state=None, shared=None) -> Out:
        assert shared == {}
        noise = jnp.zeros(()) if rng is None else jax.random.normal(rng)
        state = {"calls": state["calls"] + 1, "noise": noise}
        wrote: dict[str, Any] = {"mean": x.mean(-1, keepdims=True)}
        y = self.w[...] * x + 0.1 * noise + 0.01 * state["calls"]
        return Out(y, state=state, shared=wrote if self.config.honest else {"median": y})


class Reader(Pointwise):
    def __call__(self, x, seq, *, impl=None, rng=None, state=None, shared=None) -> Out:
        assert state is None and set(shared) == {"mean"}
        return Out(self.w[...] * x * shared["mean"])


def model(**fields) -> DecoderConfig:
    period = (WriterConfig(dim=D), ReaderConfig(dim=D))
    return DecoderConfig(**({"vocab_size": VOCAB, "period": period, "repeats": 3, "mlp_dim": 8,
                             "init_std": 0.3} | fields))


def inputs():
    tokens = np.random.default_rng(0).integers(0, VOCAB, (B, T)).astype(np.int32)
    return tokens, Seq.full(B, T)


def test_shared_goes_from_layer_to_layer():
    """Against the blocks called one by one."""
    decoder = model().build(nnx.Rngs(0))
    tokens, seq = inputs()
    found = decoder.hidden(tokens, seq, state=decoder.init_state())
    graphdef, params = versions.split_module(decoder.blocks)
    h = decoder.embedding[...][tokens]
    for i in range(3):
        blocks = versions.merge_module(graphdef, jax.tree.map(lambda a, i=i: a[i], params))
        zero = {"calls": jnp.zeros(()), "noise": jnp.zeros(())}
        h, out = blocks[0](h, seq, "train", None, state=zero)
        h, _ = blocks[1](h, seq, "train", None, shared=out.shared)
    h = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found.h, h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", [{"scan": False}, {"remat": "full"}])
def test_scan_and_remat_hand_on_the_same(fields):
    tokens, seq = inputs()
    passes = []
    for c in (model(), model(**fields)):
        decoder = c.build(nnx.Rngs(0))
        state = decoder.init_state()
        passes.append(decoder.hidden(tokens, seq, state=state, rng=jax.random.key(3)))
    np.testing.assert_allclose(passes[0].h, passes[1].h, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(jax.tree.leaves(p.state) for p in passes), strict=True):
        np.testing.assert_allclose(a, b)
    writer, reader = passes[0].state
    assert reader is None and writer["calls"].tolist() == [1, 1, 1]
    assert len(set(writer["noise"].tolist())) == 3, "every layer has its own key"


def test_refusals():
    tokens, seq = inputs()
    decoder = model().build(nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"state of Writer = None.*init_state"):
        decoder.hidden(tokens, seq)
    liar = model(period=(WriterConfig(dim=D, honest=False), ReaderConfig(dim=D)))
    decoder = liar.build(nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"WriterConfig wrote \['median'\].*\('mean',\)"):
        decoder.hidden(tokens, seq, state=decoder.init_state())
    with pytest.raises(ConfigError, match="no earlier layer"):
        model(period=(ReaderConfig(dim=D), WriterConfig(dim=D)))


def batch(mask: float = 1.0) -> dict[str, np.ndarray]:
    tokens, seq = inputs()
    return {
        "tokens": tokens, "targets": tokens, "positions": np.asarray(seq.positions),
        "segments": np.ones((B, T), np.int32), "loss_mask": np.full((B, T), mask, np.float32),
    }


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_keeps_the_state(accumulate, tmp_path):
    mesh = make_mesh(None, jax.devices()[:1])
    t = Trainer(model(), OptimizerConfig(), 9, mesh, RULES, accumulate=accumulate, seed=5)
    state = t.init(0)
    noises = []
    for _ in range(2):
        state, _ = t.step(state, batch())
        noises.append(np.asarray(state.layers[0]["noise"]))
    assert state.layers[0]["calls"].tolist() == [2 * accumulate] * 3
    assert (noises[0] != noises[1]).all(), "every step has its own key"
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {"step": 2}, {}, t.replicated)
    checkpoints.close()
    restored = Checkpoints(tmp_path, read_only=True).restore(t)[0]
    weights = restore_weights(tmp_path, t)
    held = (state.params, state.layers)
    for other in ((restored.params, restored.layers), (weights.params, weights.layers)):
        for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)
    held = jax.tree.map(np.array, state.layers)
    one, _ = t.step(restored, batch())
    state, _ = t.step(state, batch())
    assert state.layers[0]["noise"].tolist() == one.layers[0]["noise"].tolist(), "resumed"
    before = jax.tree.map(np.array, state.layers)
    state, _ = t.step(state, batch(mask=0))
    assert int(state.skipped) == 1
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.layers), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inference_uses_the_state():
    decoder = model().build(nnx.Rngs(0))
    fresh = decoder.init_state()
    used = jax.tree.map(lambda a: a + 100, fresh)
    a, b = (score(decoder, [[1, 2, 3]], state=state)[0] for state in (fresh, used))
    assert np.isfinite(a).all() and not np.allclose(a, b)
    greedy = SampleConfig(temperature=0)
    out = generate(decoder, [[1, 2], [3]], new_tokens=3, sample=greedy, state=used).tokens
    full = [1, 2]
    for _ in range(3):
        tokens = np.asarray([full], np.int32)
        h = decoder.hidden(tokens, Seq.full(1, len(full)), state=used).h
        full.append(int(decoder.logits(h)[0, -1].argmax()))
    assert out[0] == full[2:]
    with pytest.raises(ConfigError, match="state of Writer"):
        generate(decoder, [[1]], new_tokens=2, sample=greedy)
