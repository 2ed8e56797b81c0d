"""attnlab layers inside Linen models, and decoder parameters in stacked and listed form."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core, nnx

from attnlab.convert.linen import to_linen
from attnlab.convert.restack import stack, unstack
from attnlab.core.errors import ConfigError, ShapeError
from attnlab.core.types import Seq
from attnlab.core.versions import merge_module, module_axes, split_module
from attnlab.layers.gqa import GQAConfig
from attnlab.models.decoder import DecoderConfig
from attnlab.testing.fixtures import randomise, tokens

ATTENTION = GQAConfig(dim=16, num_heads=4, num_kv_heads=2, qk_norm=True, window=5)
PLAIN = GQAConfig(dim=16, num_heads=2)
DECODER = DecoderConfig(vocab_size=19, period=(ATTENTION, PLAIN), repeats=3, mlp_dim=24)
SEQ = Seq.full(2, 7)
X = tokens(0, 2, 7, 16)


def layer():
    module = ATTENTION.build(nnx.Rngs(0))
    graphdef, params = split_module(module)
    return merge_module(graphdef, randomise(params)), graphdef, randomise(params)


def test_same_parameters_same_output_and_gradient():
    module, graphdef, params = layer()
    wrapped = to_linen(ATTENTION)
    fresh = jax.jit(wrapped.init)(jax.random.key(0), X, SEQ)
    assert list(fresh) == ["params"]
    assert jax.tree.structure(fresh["params"]) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, fresh["params"]) == jax.tree.map(jnp.shape, params)
    assert all(type(leaf) is type(jnp.ones(1)) for leaf in jax.tree.leaves(fresh))
    y = jax.jit(wrapped.apply)({"params": params}, X, SEQ).y
    np.testing.assert_allclose(y, jax.jit(lambda m: m(X, SEQ).y)(module), rtol=1e-6, atol=1e-6)

    got = jax.jit(jax.grad(lambda p: (wrapped.apply({"params": p}, X, SEQ).y ** 2).sum()))(params)
    want = jax.jit(jax.grad(lambda p: (merge_module(graphdef, p)(X, SEQ).y ** 2).sum()))(params)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    frozen = jax.jit(wrapped.apply)(core.freeze({"params": params}), X, SEQ).y
    np.testing.assert_allclose(frozen, y, rtol=1e-6, atol=1e-6)


def test_initialisation_is_that_of_the_layer():
    wrapped = to_linen(ATTENTION)
    init = jax.jit(wrapped.init)
    a = init(jax.random.key(0), X, SEQ)["params"]
    b = jax.jit(lambda k: wrapped.init(k, 2, 8, method="init_cache"))(jax.random.key(0))["params"]
    c = init(jax.random.key(1), X, SEQ)["params"]
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.allclose(a["w_q"], c["w_q"])
    assert not np.allclose(a["w_k"], a["w_v"])
    np.testing.assert_array_equal(a["q_norm"], 1)
    assert np.std(a["w_q"]) == pytest.approx(0.02, rel=0.2)


def test_wrong_shapes_are_refused():
    params = layer()[2]
    with pytest.raises(Exception, match="w_q"):
        to_linen(ATTENTION).apply({"params": params | {"w_q": np.ones((2, 2, 2))}}, X, SEQ)
    with pytest.raises(Exception, match="w_k"):
        without = {k: v for k, v in params.items() if k != "w_k"}
        to_linen(ATTENTION).apply({"params": without}, X, SEQ)


class Mixed(nn.Module):
    """Two attention layers between Linen's own."""

    @nn.compact
    def __call__(self, x, seq):
        for name, config in (("first", ATTENTION), ("second", PLAIN)):
            x = x + to_linen(config, name=name)(nn.LayerNorm()(x), seq).y
            x = x + nn.Dense(16)(nn.gelu(nn.Dense(32)(x)))
        return nn.Dense(4)(x)


def test_trains_inside_a_linen_model():
    model = Mixed()
    params = jax.jit(model.init)(jax.random.key(0), X, SEQ)["params"]
    assert set(params) >= {"first", "second", "Dense_0"}
    target = (jnp.cumsum(X[..., :1], axis=1) > 0).astype(jnp.int32)[..., 0]
    tx = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        def loss(p):
            z = model.apply({"params": p}, X, SEQ)
            return optax.softmax_cross_entropy_with_integer_labels(z, target).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, losses, start = tx.init(params), [], params
    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    for name in ("first", "second"):
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), params[name], start[name])
        assert all(jax.tree.leaves(moved))


def test_decode_through_methods():
    _, _, params = layer()
    wrapped, variables = to_linen(ATTENTION), {"params": params}
    full = jax.jit(wrapped.apply)(variables, X, SEQ).y
    cache = wrapped.apply(variables, 2, 7, method="init_cache")
    part = lambda a, b: Seq(SEQ.positions[:, a:b])  # noqa: E731
    run = jax.jit(wrapped.apply, static_argnames="method")
    out = run(variables, X[:, :4], part(0, 4), cache, method="prefill")
    ys, decode = [out.y], functools.partial(run, method="decode")
    for t in range(4, 7):
        out = decode(variables, X[:, t : t + 1], part(t, t + 1), out.cache)
        ys.append(out.y)
    np.testing.assert_allclose(jnp.concatenate(ys, 1), full, rtol=1e-5, atol=1e-5)


def test_decoder():
    ids = np.arange(14, dtype=np.int32).reshape(2, 7)
    module = DECODER.build(nnx.Rngs(0))
    params = randomise(split_module(module)[1], spread=0.1)
    module = merge_module(split_module(module)[0], params)
    wrapped, variables = to_linen(DECODER), {"params": params}
    fresh = jax.eval_shape(wrapped.init, jax.random.key(0), ids, SEQ)["params"]
    assert jax.tree.map(lambda s: s.shape, fresh) == jax.tree.map(jnp.shape, params)
    run = jax.jit(wrapped.apply, static_argnames="method")
    logits = run(variables, ids, SEQ).y
    want = jax.jit(lambda m: m.logits(m.hidden(ids, SEQ)[0]))(module)
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)
    cache = wrapped.apply(variables, 2, 7, method="init_cache")
    out = run(variables, ids[:, :6], Seq(SEQ.positions[:, :6]), cache, method="prefill")
    last = run(variables, ids[:, 6:], Seq(SEQ.positions[:, 6:]), out.cache, method="decode")
    np.testing.assert_allclose(
        jnp.concatenate([out.y, last.y], 1), logits, rtol=1e-4, atol=1e-5
    )


def test_partition_specs():
    wrapped = to_linen(ATTENTION, partitioned=True)
    variables = jax.jit(wrapped.init)(jax.random.key(0), X, SEQ)
    specs = nn.get_partition_spec(variables)["params"]
    axes = module_axes(ATTENTION.build(nnx.Rngs(0)))
    assert {k: tuple(v) for k, v in specs.items()} == axes
    mesh_specs = nn.logical_to_mesh(specs, [("heads", "tensor"), ("embed", "fsdp")])
    assert tuple(mesh_specs["w_q"]) == ("fsdp", "tensor", None)
    y = jax.jit(wrapped.apply)(variables, X, SEQ).y
    plain = nn.meta.unbox(variables)
    np.testing.assert_array_equal(y, jax.jit(wrapped.apply)(plain, X, SEQ).y)
    np.testing.assert_array_equal(y, jax.jit(to_linen(ATTENTION).apply)(plain, X, SEQ).y)
    grads = jax.jit(jax.grad(lambda v: wrapped.apply(v, X, SEQ).y.sum()))(variables)
    assert jax.tree.structure(grads) == jax.tree.structure(variables)

    shapes = jax.eval_shape(
        to_linen(DECODER, partitioned=True).init, jax.random.key(0), np.ones((2, 7), int), SEQ
    )
    specs = nn.get_partition_spec(shapes)["params"]
    assert tuple(specs["embedding"]) == ("vocab", "embed")
    assert tuple(specs["blocks"]["1"]["attn"]["w_q"]) == ("layers", "embed", "heads", "head")


class Step(nn.Module):
    partitioned: bool

    @nn.compact
    def __call__(self, x, seq):
        attn = to_linen(ATTENTION, name="attn", partitioned=self.partitioned)
        return x + attn(x, seq).y, None


@pytest.mark.parametrize("partitioned", [False, True])
def test_linen_scan_and_remat(partitioned):
    model = nn.scan(
        nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True},
        in_axes=nn.broadcast, length=3, metadata_params={nn.PARTITION_NAME: "layers"},
    )(partitioned)
    variables = jax.jit(model.init)(jax.random.key(0), X, SEQ)
    h, plain = X, nn.meta.unbox(variables)["params"]["attn"]
    assert not np.allclose(plain["w_q"][0], plain["w_q"][1])
    one = jax.jit(to_linen(ATTENTION).apply)
    for i in range(3):
        params = jax.tree.map(lambda a, i=i: a[i], plain)
        h = h + one({"params": params}, h, SEQ).y
    got = jax.jit(model.apply)(variables, X, SEQ)[0]
    np.testing.assert_allclose(got, h, rtol=1e-5, atol=1e-5)
    if partitioned:
        spec = nn.get_partition_spec(variables)["params"]["attn"]["w_q"]
        assert tuple(spec) == ("layers", "embed", "heads", "head")


def test_restack():
    graphdef, params = split_module(DECODER.build(nnx.Rngs(0)))
    params = randomise(params)
    listed = unstack(params)
    assert len(listed["blocks"]) == DECODER.layers == 6
    for i, block in enumerate(listed["blocks"]):
        repeat, place = divmod(i, 2)
        want = params["blocks"][str(place)]["attn"]["w_q"][repeat]
        np.testing.assert_array_equal(block["attn"]["w_q"], want)
    back = stack(listed, period=2)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(back))
    ids = np.ones((2, 7), np.int32)
    device = stack(unstack(jax.tree.map(jnp.asarray, params)), period=2)
    run = jax.jit(lambda p: merge_module(graphdef, p).hidden(ids, SEQ)[0])
    np.testing.assert_array_equal(run(device), run(params))
    with pytest.raises(ConfigError, match="6 layers"):
        stack(listed, period=4)
    bad = params | {"blocks": params["blocks"] | {"1": {"w": np.ones((2, 3))}}}
    with pytest.raises(ShapeError, match=r"\[2, 3\]"):
        unstack(bad)
