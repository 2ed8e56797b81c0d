"""The decoder: stacking, remat, heads, accounting, cached passes."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.core import registry, versions
from attnlab.core.errors import ConfigError
from attnlab.core.types import Seq
from attnlab.layers.gqa import GQAConfig
from attnlab.models.decoder import Decoder, DecoderConfig
from attnlab.testing.fixtures import PACKED, pack, randomise
from attnlab.testing.flops import matmul_flops

DIM = 16
FIELDS = {
    "gqa": {"num_heads": 4, "num_kv_heads": 2},
    "mla": dict(num_heads=2, kv_rank=6, q_rank=5, nope_dim=6, rope_dim=4, value_dim=8),
    "cca": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
}
MIXED = tuple(registry.build_config(name, dim=DIM, **fields) for name, fields in FIELDS.items())


def config(period=MIXED, **fields) -> DecoderConfig:
    return DecoderConfig(**({"vocab_size": 21, "period": period, "repeats": 2, "mlp_dim": 24}
                            | fields))


def build(c: DecoderConfig) -> tuple:
    graphdef, params = versions.split_module(c.build(nnx.Rngs(0)))
    return graphdef, randomise(params, spread=0.2)


def batch(c: DecoderConfig):
    seq = pack(PACKED, "packed")
    rng = np.random.default_rng(3)
    tokens, targets = rng.integers(0, c.vocab_size, (2, *seq.positions.shape)).astype(np.int32)
    return tokens, targets, (seq.segments > 0).astype(np.float32), seq


def loss_and_grad(c: DecoderConfig, params, impl=None):
    graphdef, _ = versions.split_module(c.build(nnx.Rngs(0)))
    tokens, targets, weights, seq = batch(c)

    def loss(params):
        module = versions.merge_module(graphdef, params)
        return module.loss(tokens, targets, weights, seq, impl=impl)[0]

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_close(a, b, rtol=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(1e-3, np.abs(y).max()))


@pytest.fixture(scope="module")
def mixed():
    """``(config, params, loss and gradients)`` of the mixed period, scanned, no remat."""
    c = config(z_loss=1e-3)
    _, params = build(c)
    return c, params, loss_and_grad(c, params)


@pytest.mark.parametrize(
    "change",
    [{"scan": False}, {"remat": "full"}, {"remat": "dots"}, {"remat": "attention"},
     {"remat": "attention", "scan": False}, {"loss_chunk": 5}],
    ids=str,
)
def test_same_loss_and_gradients(mixed, change):
    c, params, want = mixed
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(want[1])), "every parameter is used"
    assert_close(loss_and_grad(dataclasses.replace(c, **change), params), want)


def test_remat_keeps_what_it_names():
    """Bytes the backward pass holds: the leaves of the function that jax.vjp returns."""
    c = config((registry.build_config("gqa", dim=DIM, num_heads=4),), repeats=3)
    tokens, targets, weights, seq = batch(c)

    def held(**change):
        graphdef, params = build(dataclasses.replace(c, **change))

        def backward(params):
            module = versions.merge_module(graphdef, params)
            return jax.vjp(lambda p: versions.merge_module(graphdef, p).loss(
                tokens, targets, weights, seq)[0], params)[1] if module else None

        leaves = jax.tree.leaves(jax.eval_shape(backward, params))
        return sum(x.size * x.dtype.itemsize for x in leaves)

    kept = {name: held(remat=name) for name in ("none", "dots", "attention", "full")}
    assert kept["none"] > kept["dots"] > kept["attention"] > kept["full"], kept
    B, T = tokens.shape
    attention = c.layers * B * T * (DIM + 4) * 4  # outputs [B, T, N, V] and LSE [B, T, N], fp32
    assert kept["attention"] - kept["full"] == attention


def test_untied_head(mixed):
    c, params, (loss, grads) = mixed
    untied = dataclasses.replace(c, tied=False)
    other, other_grads = loss_and_grad(untied, params | {"head": params["embedding"]})
    assert_close(other, loss)
    both = other_grads["embedding"] + other_grads["head"]
    assert_close(both, grads["embedding"])
    assert_close({**other_grads, "embedding": both, "head": 0}, {**grads, "head": 0})
    assert untied.param_count() == c.param_count() + c.rows * DIM


@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize("name", [*FIELDS, "mixed"])
def test_accounts(name, conv):
    own = tuple(p for p in MIXED if registry.name_of(type(p)) == name)
    period = MIXED if name == "mixed" else own
    for tied in (True, False):
        c = config(period, tied=tied, short_conv=conv)
        graphdef, params = build(c)
        assert c.param_count() == sum(p.size for p in jax.tree.leaves(params))
        axes = Decoder.axes(versions.merge_module(graphdef, params))
        is_axes = lambda a: isinstance(a, tuple)  # noqa: E731
        ranks = jax.tree.map(len, axes, is_leaf=is_axes)
        assert ranks == jax.tree.map(lambda p: p.ndim, params)

        def run(params, tokens, c=c, graphdef=graphdef):
            module = versions.merge_module(graphdef, params)
            T = tokens.shape[1]
            h = module.hidden(tokens, Seq.full(1, T), impl="reference")[0]
            return module.logits(h)

        T = 13
        layers = [p.flops(T, T, "train") for p in period]
        hidden = c.repeats * sum(f.dense - f.useful for f in layers)  # pairs the mask hides
        found = matmul_flops(run, params, jnp.zeros((1, T), jnp.int32))
        assert found == pytest.approx(c.flops(T) + hidden, rel=1e-6)
        caches = versions.merge_module(graphdef, params).init_caches(1, T, jnp.bfloat16)
        floats = [x for x in jax.tree.leaves(caches) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert sum(x.nbytes for x in floats) == c.cache_bytes(T, jnp.bfloat16)


@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize("scan", [True, False])
def test_cached_passes_are_the_full_pass(scan, conv):
    c = config(scan=scan, short_conv=conv)
    graphdef, params = build(c)
    T = 11
    tokens = np.random.default_rng(1).integers(0, c.vocab_size, (2, T)).astype(np.int32)

    @jax.jit
    def full(params):
        module = versions.merge_module(graphdef, params)
        return module.logits(module.hidden(tokens, Seq.full(2, T))[0])

    @jax.jit
    def cached(params):
        module = versions.merge_module(graphdef, params)
        caches, out = module.init_caches(2, T), []
        for start, stop, step in ((0, 4, "prefill"), (4, 7, "prefill"), (7, 8, "decode"),
                                  (8, 11, "decode")):
            seq = Seq(Seq.full(2, T).positions[:, start:stop], None, "any")
            h, caches = getattr(module, step)(tokens[:, start:stop], seq, caches)
            out.append(module.logits(h))
        return jnp.concatenate(out, 1)

    want = np.asarray(full(params))
    assert want.shape == (2, T, c.vocab_size), "padding ids are no logits"
    np.testing.assert_allclose(cached(params), want, rtol=2e-4, atol=2e-4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reads(GQAConfig):
    reads: ClassVar = ("memory",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writes(GQAConfig):
    writes: ClassVar = ("memory",)


def test_what_a_layer_reads_must_have_been_written():
    reads, writes = Reads(dim=DIM, num_heads=2), Writes(dim=DIM, num_heads=2)
    config((writes, reads))
    with pytest.raises(ConfigError, match=r"period\[0\] reads \['memory'\].*in front"):
        config((reads, writes))
    with pytest.raises(ConfigError, match=r"period\[1\]"):
        config((MIXED[0], reads))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"vocab_size": 1}, "vocab_size = 1"), ({"period": ()}, "period"),
        ({"repeats": 0}, "repeats = 0"), ({"mlp_dim": 0}, "mlp_dim = 0"),
        ({"z_loss": -1.0}, "z_loss"), ({"remat": "some"}, "remat = 'some'"),
        ({"loss_chunk": 0}, "loss_chunk = 0"), ({"short_conv": 1}, "short_conv = 1: is a number"),
        ({"period": (MIXED[0], GQAConfig(dim=8, num_heads=2))}, r"dims \[16, 8\]"),
    ],
    ids=str,
)
def test_bad_configs(fields, says):
    with pytest.raises(ConfigError, match=says):
        config(**fields)
