"""The short convolution in front of attention: what it is, where it ends, generation with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from attnlab.core import versions
from attnlab.core.errors import ShapeError, UnsupportedError
from attnlab.core.types import Precision, Seq
from attnlab.infer.generate import generate
from attnlab.infer.sample import SampleConfig
from attnlab.layers.gqa import GQAConfig
from attnlab.models.decoder import DecoderConfig
from attnlab.models.short_conv import ShortConv
from attnlab.testing.fixtures import PACKED, pack, randomise

PERIOD = (GQAConfig(dim=16, num_heads=4, num_kv_heads=2),)


def built(**fields):
    config = DecoderConfig(
        vocab_size=21, period=PERIOD, repeats=2, mlp_dim=24, **({"short_conv": 3} | fields)
    )
    graphdef, params = versions.split_module(config.build(nnx.Rngs(0)))
    return config, versions.merge_module(graphdef, randomise(params, spread=0.2))


def test_equation():
    """y = x + conv(x) (x W + b), written out token by token."""
    module = ShortConv(8, 3, Precision(), nnx.Rngs(0))
    module.b_gate[...] = jnp.arange(8.0)
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    y, state = module(x, Seq.full(2, 5))
    rows = np.pad(np.asarray(x, np.float64), ((0, 0), (2, 0), (0, 0)))
    taps, gate = (np.asarray(w[...], np.float64) for w in (module.w_conv, module.w_gate))
    conv = sum(taps[j] * rows[:, j : j + 5] for j in range(3))
    expected = rows[:, 2:] + conv * (rows[:, 2:] @ gate + np.arange(8))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.rows, x[:, 3:])


def test_a_document_alone_is_a_document_in_a_row():
    _, module = built()
    seq = pack(PACKED, "packed")
    tokens = np.random.default_rng(0).integers(0, 21, seq.positions.shape).astype(np.int32)
    whole = module.hidden(tokens, seq).h
    for row, segments in enumerate(np.asarray(seq.segments)):
        for document in set(segments[segments > 0].tolist()):
            at = np.flatnonzero(segments == document)
            alone = module.hidden(tokens[row : row + 1, at], Seq.full(1, len(at))).h
            np.testing.assert_allclose(whole[row, at], alone[0], rtol=1e-4, atol=1e-5)


def test_causality():
    """The loss at a token does not depend on tokens after it."""
    _, module = built()
    h = jax.random.normal(jax.random.key(0), (1, 7, 16))
    derivative = jax.jacobian(lambda h: module._repeat(
        h, Seq.full(1, 7), None, None, None, "train", "reference"
    ).h[0].sum(-1))(h)
    reached = np.abs(np.asarray(derivative)[:, 0]).sum(-1) > 0
    assert (reached == np.tril(np.ones((7, 7), bool))).all()


def test_gradients_of_every_parameter_in_float64():
    with jax.enable_x64(True):
        wide = dict.fromkeys(("params", "compute", "softmax", "cache"), "float64")
        module = ShortConv(4, 3, Precision(**wide), nnx.Rngs(0))
        graphdef, params = versions.split_module(module)
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64) + 0.1, params)
        x = jax.random.normal(jax.random.key(1), (1, 6, 4), jnp.float64)

        def loss(params, x):
            y, _ = versions.merge_module(graphdef, params)(x, Seq.full(1, 6))
            return (y**3).sum()

        # The sums of ops.conv are in float32 or wider: in float64 here.
        check_grads(loss, (params, x), order=1, modes=("rev",), rtol=1e-6, atol=1e-6)


def test_generation_reads_the_tokens_before():
    """Ragged prompts, greedy: each next token is the best of a whole pass over what is there."""
    _, module = built()
    prompts = [[3, 1, 4, 1, 5, 9], [2, 6], [7, 7, 7, 7]]
    greedy = SampleConfig(temperature=0)
    found = generate(module, prompts, new_tokens=5, prefill_chunk=3, sample=greedy)
    for prompt, rest in zip(prompts, found.tokens, strict=True):
        line = list(prompt)
        assert len(rest) == 5
        for token in rest:
            h = module.hidden(np.array([line], np.int32), Seq.full(1, len(line))).h
            assert int(module.logits(h[:, -1]).argmax()) == int(token)
            line.append(int(token))


def test_caches_say_what_they_cannot():
    _, module = built()
    _, plain = built(short_conv=0)
    seq, tokens = Seq.full(1, 4), np.zeros((1, 4), np.int32)
    with pytest.raises(ShapeError, match="cache is a KVCache: this decoder has short convolutions"):
        module.prefill(tokens, seq, plain.init_caches(1, 4))
    with pytest.raises(UnsupportedError, match="cannot be rewound"):
        module.init_caches(1, 4)[0].truncate(2)
