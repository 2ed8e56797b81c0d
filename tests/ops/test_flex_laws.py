"""Laws of score and mask functions that need no oracle, causality at tile borders, and meshes."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flex_cases import bucket
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.core import axes
from attnlab.core.mask import Causal, Coords, MaskMod, Segments, Window
from attnlab.core.mods import Mod
from attnlab.core.versions import make_mesh
from attnlab.ops.attention import _over_shards, attention, reference, xla
from attnlab.parallel.rules import RULES
from attnlab.testing.budget import close, close_trees, identical

B, T, N, K, H = 2, 40, 4, 2, 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(xla, "tile_sizes", lambda *_: (16, 16))


def qkv(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, (N, K, K))]


def draw(*shape):
    return jax.random.normal(jax.random.key(5), shape)


def gradients(f, *arrays):
    def loss(*arrays):
        o, lse = f(*arrays)
        lse = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sin(o).sum() + jnp.cos(lse).sum(), (o, lse)

    return jax.jit(jax.value_and_grad(loss, range(len(arrays)), has_aux=True))(*arrays)


attend = functools.partial(attention, return_lse=True, impl="xla")


def same(f, g, *arrays, count=None):
    (_, outs), found = gradients(f, *arrays)
    (_, others), expected = gradients(g, *arrays)
    close_trees(outs, others)
    close_trees(found[:count], expected[:count])


def test_identity_and_a_mask_function_are_the_plain_call():
    same(
        lambda *a: attend(*a, score_mod=lambda s, h, q, k: s, mask=lambda h, q, k: q >= k),
        lambda *a: attend(*a, mask=Causal()), *qkv(),
    )


def test_the_logarithm_of_a_weight_is_a_mask():
    weights = (draw(T) > 0).astype(jnp.float32)

    def mod(s, h, q, k, *, k_index):
        w = weights[k_index]
        return s + jnp.where(w > 0, jnp.log(jnp.maximum(w, 1e-30)), -jnp.inf)

    same(
        lambda *a: attend(*a, score_mod=mod),
        lambda *a: attend(*a, mask=Causal() & MaskMod.of(
            lambda h, q, k, *, k_index: weights[k_index] > 0
        )), *qkv(),
    )


def test_alibi_is_a_column_of_the_keys():
    """slope (k - q) adds a number a row, which softmax ignores, and a number a key."""
    q, k, v = qkv()
    slope = 2.0 ** -jnp.arange(1.0, N + 1)
    o = attention(q, k, v, score_mod=lambda s, h, q, k: s - slope[h] * (q - k))
    column = jnp.broadcast_to(jnp.arange(T) * 1.0, (B, T))[..., None, None]
    q1 = jnp.concatenate([q, jnp.broadcast_to(slope[:, None], (B, T, N, 1)) * H**0.5], -1)
    k1 = jnp.concatenate([k, jnp.broadcast_to(column, (B, T, K, 1))], -1)
    close(o, attention(q1, k1, v, scale=H**-0.5), name="alibi")


def test_gradient_of_a_captured_table_is_that_of_its_dense_bias_summed():
    table, places = draw(32, N), jnp.arange(T)

    def by_table(q, k, v, table):
        return attend(q, k, v, score_mod=lambda s, h, q, k: s + table[bucket(q - k), h])

    def by_bias(q, k, v, table):
        bias = jnp.moveaxis(table[bucket(places[:, None] - places)], -1, 0)
        return attend(
            q, k, v, score_mod=lambda s, h, q, k, *, q_index, k_index: s + bias[h, q_index, k_index]
        )

    same(by_table, by_bias, *qkv(), table)


def test_groups_are_repeated_keys():
    q, k, v = qkv()
    slope = draw(N)

    def mod(s, h, q, k):
        return s + slope[h] * jnp.cos(1.0 * q * k)

    repeated = [jnp.repeat(x, N // K, axis=2) for x in (k, v)]
    close_trees(attend(q, k, v, score_mod=mod), attend(q, *repeated, score_mod=mod))


def test_two_halves_of_the_keys_merge_by_their_log_sum_exp():
    q, k, v = qkv()
    slope, half, places = draw(N), 24, jnp.broadcast_to(jnp.arange(T), (B, T))

    def mod(s, h, q, k):
        return s * slope[h]

    whole = attend(q, k, v, score_mod=mod)
    parts = [
        attend(q, k[:, x], v[:, x], positions=(places, places[:, x]), score_mod=mod)
        for x in (slice(0, half), slice(half, T))
    ]
    lse = jnp.logaddexp(parts[0][1], parts[1][1])
    o = sum(jnp.exp(part[1] - lse)[..., None] * part[0] for part in parts)
    close_trees((o, lse), whole)


def test_hidden_pairs_may_have_no_value():
    """The logarithm of a negative distance is dropped; its derivative by the score too."""
    q, k, v = qkv()

    def mod(s, h, q, k):
        return s * jnp.log(q - k + 2.0)

    def safe(s, h, q, k):
        return s * jnp.log(jnp.maximum(q - k, 0) + 2.0)

    same(lambda *a: attend(*a, score_mod=mod), lambda *a: attend(*a, score_mod=safe), q, k, v)


def test_second_derivatives_pass_through_the_function():
    slope = draw(1)

    def second(impl):
        def loss(q, k, v, slope):
            o, lse = attention(
                q, k, v, return_lse=True, impl=impl, logit_cap=3.0,
                score_mod=lambda s, h, q, k: jnp.sin(s) * slope[h],
            )
            return jnp.sin(o).sum() + jnp.cos(lse).sum()

        first = jax.grad(loss, (0, 3))
        a = [x[:1, :20, :1, :4] for x in qkv()]
        outer = jax.grad(lambda *a: sum((g**2).sum() for g in first(*a)), (0, 1, 2, 3))
        return jax.jit(outer)(*a, slope)

    close_trees(second("xla"), second("reference"))


def test_vmap_over_captured_arrays():
    q, k, v = qkv()
    slopes = draw(3, N)

    def loss(slope):
        o = attention(q, k, v, impl="xla", score_mod=lambda s, h, q, k: s * slope[h])
        return jnp.sin(o).sum()

    found = jax.jit(jax.vmap(jax.grad(loss)))(slopes)
    close(found, jnp.stack([jax.grad(loss)(x) for x in slopes]), kind="gradient")


def test_no_score_mod_costs_nothing():
    """The identity apart, the program without function has none of its machinery."""
    q, k, v = (x[:, :12] for x in qkv())

    def program(**options):
        def loss(q, k, v):
            return attention(q, k, v, impl="xla", **options).sum()

        return str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v))

    plain, modified = program(), program(score_mod=lambda s, h, q, k: jnp.sinh(s))
    assert "sinh" not in plain and "cosh" not in plain and "cosh" in modified
    assert plain.count("\n") < modified.count("\n")


# Causality, token by token ---------------------------------------------------------------------

ODD = jnp.asarray(np.random.default_rng(3).integers(0, 2, (N, T, T)), bool)
CAUSAL = {
    "mask function": dict(mask=lambda h, q, k: q >= k),
    "its own and a structured one": dict(
        mask=Causal() & MaskMod.of(lambda h, q, k, *, q_index, k_index: (
            ODD[h, q_index, k_index] | (q == k)
        )),
    ),
    "score function": dict(
        mask=Causal() & Window(20), score_mod=lambda s, h, q, k: s * jnp.cos(1.0 * (q - k) * h),
    ),
    "score function that hides": dict(
        mask=lambda h, q, k: k >= 0,
        score_mod=lambda s, h, q, k: jnp.where(q >= k, s, -jnp.inf),
    ),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causality_at_tile_borders(name):
    """Another token changes no output before it, bit for bit, and the output at its place."""
    f = jax.jit(functools.partial(attend, **CAUSAL[name]))
    q, k, v = qkv()
    other = qkv(1)
    o, lse = f(q, k, v)
    for t in (0, 1, 14, 15, 16, 17, 31, 32, 33, 39):
        changed = [jnp.where((jnp.arange(T) == t)[:, None, None], b, a)
                   for a, b in zip((q, k, v), other)]
        o2, lse2 = f(*changed)
        identical((o[:, :t], lse[:, :t]), (o2[:, :t], lse2[:, :t]), name=f"before {t}")
        assert (jnp.abs(o2[:, t] - o[:, t]).max((0, 2)) > 0).all(), t


@pytest.mark.parametrize("name", CAUSAL)
def test_gradients_are_causal_at_tile_borders(name):
    def total(k, v, t):
        q = qkv()[0]
        return (attend(q, k, v, **CAUSAL[name])[0] ** 2)[:, t].sum()

    grad = jax.jit(jax.grad(total, (0, 1)))
    _, k, v = qkv()
    for t in (0, 15, 16, 31, 32):
        for g in grad(k, v, t):
            assert (g[:, t + 1 :] == 0).all() and (jnp.abs(g[:, t]) > 0).any(), t


# Meshes ----------------------------------------------------------------------------------------


@pytest.mark.devices8
def test_four_devices(root):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    path = os.pathsep.join([str(root), str(root / "tests" / "ops")])
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.test_flex_laws"], cwd=root,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def main() -> None:
    q, k, v = qkv()
    a = {"q": q, "k": k, "v": v, "slope": draw(N), "row": draw(B, T), "table": draw(32, N)}

    def mod(a):
        def mod(s, h, q, k, *, batch, k_index):
            return s * a["slope"][h] + a["row"][batch, k_index] + a["table"][bucket(q - k), h]

        return mod

    def mask(h, q, k, *, batch):
        return (q >= k) & ((q - k + h + batch) % 3 > 0)

    def one(a):
        return attend(a["q"], a["k"], a["v"], mask=mask, score_mod=mod(a))

    def grads(f):
        def loss(a):
            o, lse = f(a)
            lse = jnp.where(jnp.isfinite(lse), lse, 0)
            return jnp.sin(o).sum() + jnp.cos(lse).sum()

        return jax.jit(jax.grad(loss))

    xla.tile_sizes = lambda *_: (64, 64)
    expected = grads(one)(a)
    xla.tile_sizes = lambda *_: (16, 16)
    mesh = make_mesh((2, 2), ("data", "tensor"))
    heads = P("data", None, "tensor")
    specs = {n: heads if n in "qkv" else P() for n in a}
    placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in a.items()}
    close_trees(grads(one)(placed), expected, name="GSPMD")

    # Inside shard_map a shard is told the numbers of its rows and heads.
    def shard(a):
        batch = jax.lax.axis_index("data") * B // 2 + jnp.arange(B // 2)
        at = dict(batch=batch, heads=jax.lax.axis_index("tensor") * N // 2 + jnp.arange(N // 2))
        score = Mod.of(mod(a), score_dtype="float32").at(**at)
        return attend(
            a["q"], a["k"], a["v"], mask=MaskMod(Mod.of(mask).at(**at)), score_mod=score
        )

    sharded = jax.shard_map(shard, mesh=mesh, in_specs=(specs,), out_specs=heads)
    close_trees(grads(sharded)(a), expected, name="shard_map")

    # Queries cut over tokens: gradients of captured arrays are sums over the devices.
    line = make_mesh((4,), ("seq",))
    rows, places = P(None, "seq"), jnp.broadcast_to(jnp.arange(T), (B, T))

    def part(a, q_positions):
        return attend(
            a["q"], a["k"], a["v"], mask=mask, score_mod=mod(a), positions=(q_positions, places)
        )

    specs = {n: rows if n == "q" else P() for n in a}
    cut = jax.shard_map(part, mesh=line, in_specs=(specs, rows), out_specs=rows)
    close_trees(grads(lambda a: cut(a, places))(a), expected, name="tokens over devices")

    # As the op maps a kernel over the shards: every array goes where its rows and heads are.
    segments = jnp.where(places < 30, 1, 0)
    coords = Coords(places, segments, jnp.arange(T))
    call = dict(
        mask=(MaskMod.of(mask) & Segments()).bound(B, N), q_coords=coords, k_coords=coords,
        scale=0.3, logit_cap=None, return_lse=True, softmax_dtype=jnp.dtype("float32"),
        layout="any", sink_logits=draw(N),
    )

    def mapped(forward):
        def f(a):
            score = Mod.of(mod(a), score_dtype="float32").bound(B, N)
            return forward(a["q"], a["k"], a["v"], score=score, **call)

        return f

    expected = grads(mapped(reference.forward))(a)
    with axes.sharding(mesh, RULES):
        found = grads(mapped(functools.partial(_over_shards, xla.forward)))(a)
    close_trees(found, expected, name="mapped over the shards")


if __name__ == "__main__":
    main()
