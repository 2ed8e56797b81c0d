"""Multi-head latent attention against its oracle, its two forms, and the settings it reduces to."""

import dataclasses
import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.core.errors import ConfigError, ShapeError, UnsupportedError
from attnlab.core.rope import Rope, Yarn
from attnlab.core.types import Precision, Seq
from attnlab.core.versions import enable_x64, merge_module, module_axes, split_module
from attnlab.layers.gqa import GQAConfig
from attnlab.layers.mla import MLAConfig, crossover
from attnlab.testing.flops import matmul_flops
from attnlab.testing.oracle_mla import mla_oracle, yarn_frequencies

TINY = dict(
    dim=12, num_heads=3, kv_rank=8, q_rank=10, nope_dim=6, rope_dim=4, value_dim=5, init_std=0.4
)
YARN = Yarn(factor=8, original_length=64, beta_fast=4, beta_slow=0.25, mscale=0.8)
FP64 = Precision.named("float64")
FORMS = ("expanded", "absorbed")


@pytest.fixture
def x64():
    with enable_x64(True):
        yield


def config(precision=FP64, **changes):
    return MLAConfig(precision=precision, **TINY | changes)


def build(c, seed=0):
    """The module, with norm gains away from one."""
    graph, params = split_module(c.build(nnx.Rngs(seed)))
    key = jax.random.key(seed + 1)
    for name in ("q_norm", "kv_norm"):
        if name in params:
            noise = jax.random.normal(key, params[name].shape, params[name].dtype)
            params[name] = params[name] + 0.3 * noise
    return merge_module(graph, params), graph, params


def tokens(c, batch=2, length=7, seed=3):
    dtype = jnp.dtype(c.precision.compute)
    x = jax.random.normal(jax.random.key(seed), (batch, length, c.dim), jnp.float32)
    return x.astype(dtype)


def oracle(c, params, x, positions, segments=None):
    fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    for name in ("dim", "precision", "decode_form", "init_std"):
        del fields[name]
    if not isinstance(x, jax.core.Tracer):  # numpy compiles nothing
        params, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    return mla_oracle(params, x, positions, segments, **fields)


@functools.partial(jax.jit, static_argnames="form")
def cached(module, x, seq, cache, form):
    return module._cached(x, seq, cache, None, form)


@jax.jit
def decode(module, x, seq, cache):
    return module.decode(x, seq, cache)


@jax.jit
def train(module, x, seq):
    return module(x, seq).y


def close(a, b, tolerance):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def part(batch, start, stop):
    positions = jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (batch, stop - start))
    return Seq(positions)


SETTINGS = {
    "plain": {},
    "no_query_compression": dict(q_rank=None),
    "no_norm": dict(latent_norm=False),
    "half_pairing": dict(rope_pairing="half"),
    "yarn": dict(yarn=YARN),
    "no_rope": dict(rope_dim=0),
    "one_head": dict(num_heads=1),
    "window": dict(window=3, scale=0.7),
    "everything_odd": dict(
        num_heads=2, q_rank=3, kv_rank=5, nope_dim=1, rope_dim=2, value_dim=7, yarn=YARN, window=4
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_forward_equals_the_oracle(name, x64):
    c = config(**SETTINGS[name])
    module, _, params = build(c)
    x, seq = tokens(c), Seq.full(2, 7)
    expected = oracle(c, params, x, seq.positions)
    close(train(module, x, seq), expected, 1e-12)
    for form in FORMS:
        y = cached(module, x, seq, module.init_cache(2, 9), form).y
        close(y, expected, 1e-12)
    if name not in ("plain", "everything_odd"):
        return
    narrow = dataclasses.replace(c, precision=Precision())
    graph = split_module(narrow.build(nnx.Rngs(0)))[0]
    small = merge_module(graph, {k: v.astype(jnp.float32) for k, v in params.items()})
    y = train(small, x.astype(jnp.float32), seq)
    assert y.dtype == jnp.float32
    close(y, expected, 2e-5)
    for form in FORMS:
        cache = small.init_cache(2, 7)
        assert cache.latent.dtype == jnp.float32
        close(cached(small, x.astype(jnp.float32), seq, cache, form).y, expected, 2e-5)


@pytest.mark.parametrize("changes", [{}, dict(q_rank=None, yarn=YARN, window=2)])
def test_every_gradient_equals_the_oracle(changes, x64):
    c = config(num_heads=2, **changes)
    _, graph, params = build(c)
    x = tokens(c, 2, 4)
    positions = np.array([[0, 1, 0, 0], [0, 1, 2, 3]], np.int32)
    segments = np.array([[1, 1, 2, 0], [1, 1, 1, 1]], np.int32)
    seq = Seq(positions, segments, "packed")
    weight = jax.random.normal(jax.random.key(9), x.shape, x.dtype)

    def ours(params, x):
        return (merge_module(graph, params)(x, seq).y * weight).sum()

    def theirs(params, x):
        return (oracle(c, params, x, positions, segments) * weight).sum()

    got = jax.jit(jax.grad(ours, (0, 1)))(params, x)
    want = jax.jit(jax.grad(theirs, (0, 1)))(params, x)
    assert set(got[0]) == set(params)
    for name in params:
        assert np.abs(want[0][name]).max() > 1e-3
        close(got[0][name], want[0][name], 1e-12)
    close(got[1], want[1], 1e-12)
    assert np.all(got[1][0, 3] == 0)  # padding

    narrow = dataclasses.replace(c, precision=Precision())
    graph32 = split_module(narrow.build(nnx.Rngs(0)))[0]
    got32 = jax.jit(jax.grad(
        lambda p: (merge_module(graph32, p)(x.astype(jnp.float32), seq).y * weight).sum()
    ))({k: v.astype(jnp.float32) for k, v in params.items()})
    for name in params:
        close(got32[name], want[0][name], 1e-4)


@pytest.mark.parametrize(
    "changes", [{}, dict(rope_dim=0), dict(q_rank=None, yarn=YARN, window=4)]
)
def test_train_prefill_decode_and_a_switch_of_form_agree(changes, x64):
    c = config(**changes)
    module, _, _ = build(c)
    x = tokens(c, 2, 9)
    full = train(module, x, Seq.full(2, 9))
    close(module.prefill(x, Seq.full(2, 9), module.init_cache(2, 9)).y, full, 1e-12)
    for forms in (FORMS, FORMS[::-1]):
        cache, parts = module.init_cache(2, 11), []
        for i, start in enumerate((0, 3, 6)):
            piece = x[:, start : start + 3]
            out = cached(module, piece, part(2, start, start + 3), cache, forms[i % 2])
            cache, parts = out.cache, [*parts, out.y]
        close(jnp.concatenate(parts, 1), full, 1e-12)
    cache = module.init_cache(2, 9)
    for t in range(9):
        out = decode(module, x[:, t : t + 1], part(2, t, t + 1), cache)
        cache = out.cache
        close(out.y[:, 0], full[:, t], 1e-12)
    assert cache.latent.shape == (2, 9, c.kv_rank) and cache.k_rope.shape == (2, 9, c.rope_dim)
    assert cache.length.tolist() == [9, 9]


def test_public_passes_take_the_form_of_the_config():
    c = config(Precision())
    limit = crossover(c)  # 8 * 11 / ((16 + 4) - (6 + 4 + 5)) = 17.6
    assert limit == pytest.approx(17.6)
    assert c.form(17, "prefill") == "absorbed" and c.form(18, "prefill") == "expanded"
    assert c.form(1, "decode") == "absorbed" and c.form(1, "train") == "expanded"
    always = config(Precision(), decode_form="expanded")
    assert always.form(1, "decode") == always.form(1, "prefill") == "expanded"
    never = config(Precision(), decode_form="absorbed")
    assert never.form(999, "prefill") == "absorbed" and never.form(4, "train") == "expanded"
    # told by the arithmetic that runs, not only by the config
    for changes, form in (({}, "absorbed"), (dict(decode_form="expanded"), "expanded")):
        c = config(Precision(), **changes)
        module, x = build(c)[0], tokens(c, 1, 1)
        cache = module.init_cache(1, 32)

        def passes(method, module=module, x=x, cache=cache):
            return matmul_flops(
                lambda x: getattr(module, method)(
                    x, Seq.full(1, 1), cache, impl="reference"
                ).y, x,
            )

        def told(x, module=module, cache=cache, form=form):
            return module._cached(x, Seq.full(1, 1), cache, "reference", form).y

        same = matmul_flops(told, x)
        assert passes("decode") == passes("prefill") == same


def test_crossover():
    v3, lite = MLAConfig.deepseek_v3(), MLAConfig.deepseek_v2_lite()
    assert crossover(v3) == pytest.approx(512 * 256 / 768) and round(crossover(v3)) == 171
    assert crossover(lite) == crossover(v3)  # the same widths, and heads cancel
    assert crossover(config(kv_rank=5)) == math.inf  # 2R < nope + V: absorbed pairs are cheaper
    # at the crossover both forms cost the same a cached token
    n = crossover(v3)
    expanded = 2 * 128 * (512 * 256 + n * (192 + 128))
    assert expanded == pytest.approx(2 * 128 * n * (2 * 512 + 64))


def test_presets():
    v3 = MLAConfig.deepseek_v3()
    assert v3.param_count() == 187_107_328
    assert v3.cache_bytes(1, "bfloat16") == 2 * 576
    assert v3.logit_scale == pytest.approx(192**-0.5 * 1.8738543)
    lite = MLAConfig.deepseek_v2_lite()
    assert lite.logit_scale == pytest.approx(192**-0.5 * 1.5896260, rel=1e-6)
    assert MLAConfig.deepseek_v3(num_heads=4, yarn=None).logit_scale == 192**-0.5


@pytest.mark.parametrize("name", SETTINGS)
def test_costs_are_what_runs(name):
    c = config(Precision(), **SETTINGS[name])
    module, _, params = build(c)
    assert c.param_count() == sum(a.size for a in params.values())

    def counted(T, S, run):
        cache = module.init_cache(1, S)
        x = jnp.zeros((1, T, c.dim))
        return matmul_flops(lambda x: run(module, x, Seq.full(1, T), cache).y, x)

    train = counted(6, 6, lambda m, x, seq, _: m(x, seq, impl="reference"))
    assert train == c.flops(6, 6, "train").dense
    for T, S in ((6, 11), (20, 23)):
        got = counted(T, S, lambda m, x, seq, k: m.prefill(x, seq, k, impl="reference"))
        assert got == c.flops(T, S, "prefill").dense
    got = counted(2, 16, lambda m, x, seq, k: m.decode(x, seq, k, impl="reference"))
    assert got == c.flops(2, 16, "decode").dense
    flops = c.flops(6, 6, "train")
    pairs = sum(min(t + 1, c.window or 99) for t in range(6))
    assert flops.visible == pytest.approx(flops.attention * pairs / 36)
    cache = module.init_cache(1, 7, "bfloat16")
    assert c.cache_bytes(7, "bfloat16") == cache.latent.nbytes + cache.k_rope.nbytes
    assert c.cache_bytes(7) == 7 * 4 * (c.kv_rank + c.rope_dim)


def test_identity_up_projections_are_grouped_query_attention(x64):
    D, N, K, H = 12, 4, 2, 3
    gqa = GQAConfig(
        dim=D, num_heads=N, num_kv_heads=K, head_dim=H, rotary_fraction=0.0, init_std=0.4,
        precision=FP64,
    )
    base = gqa.build(nnx.Rngs(0))
    p = split_module(base)[1]
    c = MLAConfig(
        dim=D, num_heads=N, kv_rank=2 * K * H, nope_dim=H, rope_dim=0, value_dim=H,
        latent_norm=False, precision=FP64,
    )
    up = np.zeros((2, K, H, N, 2, H))  # latent [key or value, kv head, channel]
    for n in range(N):
        for which in range(2):
            up[which, n // (N // K), :, n, which, :] = np.eye(H)
    module = merge_module(split_module(c.build(nnx.Rngs(1)))[0], {
        "w_q": p["w_q"], "w_o": p["w_o"], "w_ukv": jnp.asarray(up.reshape(2 * K * H, N, 2 * H)),
        "w_dkv": jnp.concatenate([p["w_k"].reshape(D, -1), p["w_v"].reshape(D, -1)], 1),
    })
    x, seq = tokens(c), Seq.full(2, 7)
    want = train(base, x, seq)
    close(train(module, x, seq), want, 1e-14)
    for form in FORMS:
        close(cached(module, x, seq, module.init_cache(2, 7), form).y, want, 1e-14)


@pytest.mark.parametrize("pairing, yarn", [("interleaved", None), ("half", YARN)])
def test_only_relative_positions_matter(pairing, yarn, x64):
    c = config(rope_pairing=pairing, yarn=yarn)
    module = build(c)[0]
    x, seq = tokens(c), Seq.full(2, 7)
    shifted = Seq(seq.positions + 1000)
    close(train(module, x, shifted), train(module, x, seq), 1e-11)
    spread = Seq(seq.positions * 2)
    assert np.abs(train(module, x, spread) - train(module, x, seq)).max() > 1e-3


def test_pairings_are_a_permutation_of_the_rotary_channels(x64):
    c = config()
    module, _, params = build(c)
    turn = np.array([0, 2, 1, 3])
    q, kv = np.arange(c.H), np.arange(c.kv_rank + c.rope_dim)
    q[c.nope_dim :], kv[c.kv_rank :] = q[c.nope_dim :][turn], kv[c.kv_rank :][turn]
    moved = params | {"w_uq": params["w_uq"][..., q], "w_dkv": params["w_dkv"][:, kv]}
    other = merge_module(split_module(config(rope_pairing="half").build(nnx.Rngs(0)))[0], moved)
    x, seq = tokens(c), Seq.full(2, 7)
    close(train(other, x, seq), train(module, x, seq), 1e-13)
    assert np.abs(train(other, x, seq) - merge_module(
        split_module(config(rope_pairing="half").build(nnx.Rngs(0)))[0], params
    )(x, seq).y).max() > 1e-3


def test_the_latent_may_be_rotated_once_its_gain_is_folded(x64):
    c = config()
    module, graph, params = build(c)
    U, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(5), (c.kv_rank,) * 2, jnp.float64))
    down, rope = params["w_dkv"][:, : c.kv_rank], params["w_dkv"][:, c.kv_rank :]
    up = params["kv_norm"][:, None, None] * params["w_ukv"]
    turned = merge_module(graph, params | {
        "w_dkv": jnp.concatenate([down @ U, rope], 1),
        "w_ukv": jnp.einsum("rs,rnh->snh", U, up),
        "kv_norm": jnp.ones_like(params["kv_norm"]),
    })
    x, seq = tokens(c), Seq.full(2, 7)
    for form in FORMS:
        a, b = (
            cached(m, x, seq, m.init_cache(2, 7), form) for m in (module, turned)
        )
        close(a.y, b.y, 1e-13)
    assert np.abs(a.cache.latent - b.cache.latent).max() > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_latent_gradient_is_the_sum_of_its_key_and_value_paths(form, x64):
    c = config()
    module, _, params = build(c)
    x, seq = tokens(c, 1, 5), Seq.full(1, 5)
    q_nope, q_rope, latent, k_rope = module._project(x, seq)
    weight = jax.random.normal(jax.random.key(7), x.shape, x.dtype)

    def ours(latent, k_rope):
        y = module._attend(
            q_nope, q_rope, latent, k_rope, form, mask=module.config.mask,
            positions=seq.positions, layout="full",
        )
        return (y * weight).sum()

    def split(as_key, as_value, k_rope):
        k = jnp.einsum("bsr,rnh->bsnh", as_key, params["w_ukv"][..., : c.nope_dim])
        v = jnp.einsum("bsr,rnh->bsnh", as_value, params["w_ukv"][..., c.nope_dim :])
        z = jnp.einsum("btnh,bsnh->bnts", q_nope, k) + jnp.einsum("btnh,bsh->bnts", q_rope, k_rope)
        z = jnp.where(jnp.tril(jnp.ones((5, 5), bool)), z * c.logit_scale, -jnp.inf)
        o = jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(z), v)
        return (jnp.einsum("btnv,nvd->btd", o, params["w_o"]) * weight).sum()

    got, got_rope = jax.jit(jax.grad(ours, (0, 1)))(latent, k_rope)
    by_key, by_value, rope = jax.jit(jax.grad(split, (0, 1, 2)))(latent, latent, k_rope)
    assert min(np.abs(by_key).max(), np.abs(by_value).max(), np.abs(rope).max()) > 1e-2
    close(got, by_key + by_value, 1e-12)
    close(got_rope, rope, 1e-12)  # one head shared by all: the sum over heads


def test_the_rotary_key_is_not_normalised(x64):
    c = config()
    module, graph, params = build(c)
    grown = params["w_dkv"].at[:, c.kv_rank :].multiply(3.0)
    x, seq = tokens(c), Seq.full(2, 7)
    _, _, latent, k_rope = module._project(x, seq)
    _, _, latent3, k_rope3 = merge_module(graph, params | {"w_dkv": grown})._project(x, seq)
    close(latent3, latent, 1e-14)
    close(k_rope3, 3 * k_rope, 1e-14)
    close(jnp.square(latent / params["kv_norm"]).mean(-1), jnp.ones((2, 7)), 1e-4)


def test_packed_rows_equal_separate_documents(x64):
    c = config(window=4)
    _, graph, params = build(c)
    lengths = [[4, 3, 2], [5, 1]]
    x = tokens(c, 2, 9)
    positions, segments = np.zeros((2, 9), np.int32), np.zeros((2, 9), np.int32)
    documents = []
    for b, row in enumerate(lengths):
        start = 0
        for i, n in enumerate(row):
            positions[b, start : start + n] = np.arange(n)
            segments[b, start : start + n] = i + 1
            documents.append((b, start, start + n))
            start += n
    seq = Seq(jnp.asarray(positions), jnp.asarray(segments), "packed")

    def packed(params):
        y = merge_module(graph, params)(x, seq).y
        return jnp.square(y).sum(), y

    def separate(params):
        module = merge_module(graph, params)
        ys = [module(x[b : b + 1, i:j], Seq.full(1, j - i)).y for b, i, j in documents]
        return sum(jnp.square(y).sum() for y in ys), ys

    got, y = jax.jit(jax.grad(packed, has_aux=True))(params)
    want, ys = jax.jit(jax.grad(separate, has_aux=True))(params)
    for (b, i, j), part_y in zip(documents, ys, strict=True):
        close(y[b : b + 1, i:j], part_y, 1e-13)
    assert np.all(y[1, 6:] == 0)
    for name in params:
        close(got[name], want[name], 1e-12)
    module = merge_module(graph, params)
    for form in FORMS:  # the same rows through a cache, padding not written
        out = cached(module, x, seq, module.init_cache(2, 9), form)
        close(out.y, y, 1e-12)
        assert out.cache.length.tolist() == [9, 6]


def test_causality(x64):
    c = config()
    module = build(c)[0]
    x, seq = tokens(c, 1, 6), Seq.full(1, 6)
    moved = x.at[:, 4].add(1.0)
    for run in (
        lambda x: train(module, x, seq),
        *(functools.partial(
            lambda x, form: cached(module, x, seq, module.init_cache(1, 6), form).y, form=form
        ) for form in FORMS),
    ):
        change = np.abs(run(moved) - run(x)).max(-1)[0]
        assert np.all(change[:4] == 0) and np.all(change[4:] > 1e-4)


def test_yarn_known_values():
    v3 = MLAConfig.deepseek_v3()
    got = np.asarray(v3.rope.frequencies())
    base = 10_000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(got, yarn_frequencies(64, 1e4, v3.yarn), rtol=1e-5)
    # 4096 tokens make 32 turns at pair 10.47 and 1 turn at pair 22.5: the ramp runs from 10 to 23
    np.testing.assert_allclose(got[:11], base[:11], rtol=1e-5)
    np.testing.assert_allclose(got[23:], base[23:] / 40, rtol=1e-5)
    np.testing.assert_allclose(got[16], base[16] * (7 / 13 + 6 / 13 / 40), rtol=1e-5)
    assert Yarn(factor=40).softmax_factor == pytest.approx((1 + 0.1 * math.log(40)) ** 2)
    assert config(yarn=Yarn(factor=1)).logit_scale == config().logit_scale
    same = Rope(width=64, yarn=Yarn(factor=1)).frequencies()
    np.testing.assert_array_equal(same, Rope(width=64).frequencies())
    assert config(yarn=YARN, scale=0.25).logit_scale == 0.25


def test_bfloat16_absorbs_in_fp32():
    c = config(Precision.named("bfloat16"), dim=64, kv_rank=32, nope_dim=16, value_dim=16)
    module = build(c)[0]
    x, seq = tokens(c, 1, 12), Seq.full(1, 12)
    ys = {}
    for form in FORMS:
        out = cached(module, x, seq, module.init_cache(1, 12), form)
        assert out.y.dtype == out.cache.latent.dtype == jnp.bfloat16
        ys[form] = np.asarray(out.y, np.float32)
    assert np.abs(ys["absorbed"] - ys["expanded"]).max() <= 3e-2 * np.abs(ys["expanded"]).max()
    jaxpr = jax.make_jaxpr(
        lambda a, w: module._absorb("btnh,rnh->btnr", a, w)
    )(jnp.zeros((1, 2, 3, 16), jnp.bfloat16), jnp.zeros((32, 3, 16), jnp.bfloat16))
    dot = next(e for e in jaxpr.eqns if e.primitive.name == "dot_general")
    assert dot.invars[0].aval.dtype == jnp.bfloat16 and dot.outvars[0].aval.dtype == jnp.float32


def test_cache_truncates_and_jits_once():
    c = config(Precision())
    module = build(c)[0]
    x = tokens(c, 2, 6)
    traces = []

    @jax.jit
    def step(x, seq, cache):
        traces.append(1)
        return module.decode(x, seq, cache)

    cache = module.prefill(x[:, :3], part(2, 0, 3), module.init_cache(2, 6)).cache
    first = step(x[:, 3:4], part(2, 3, 4), cache)
    again = step(x[:, 3:4], part(2, 3, 4), first.cache.truncate(3))
    close(again.y, first.y, 1e-6)
    assert len(traces) == 1
    assert set(type(cache).AXES) == {f.name for f in dataclasses.fields(cache)}


def test_axes_and_shapes_of_the_parameters():
    module = config(Precision()).build(nnx.Rngs(0))
    assert module_axes(module) == {
        "w_dq": ("embed", None), "q_norm": (None,), "w_uq": (None, "heads", "head"),
        "w_dkv": ("embed", "latent"), "kv_norm": ("latent",),
        "w_ukv": ("latent", "heads", "head"), "w_o": ("heads", "head", "embed"),
    }
    shapes = {k: v.shape for k, v in split_module(module)[1].items()}
    assert shapes == {
        "w_dq": (12, 10), "q_norm": (10,), "w_uq": (10, 3, 10), "w_dkv": (12, 12), "kv_norm": (8,),
        "w_ukv": (8, 3, 11), "w_o": (3, 5, 12),
    }
    bare = config(Precision(), q_rank=None, latent_norm=False).build(nnx.Rngs(0))
    assert set(split_module(bare)[1]) == {"w_q", "w_dkv", "w_ukv", "w_o"}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_heads=0), "MLAConfig.num_heads = 0: must be an integer of at least 1"),
        (dict(kv_rank=0), "MLAConfig.kv_rank = 0"),
        (dict(q_rank=0), "MLAConfig.q_rank = 0"),
        (dict(nope_dim=0), "MLAConfig.nope_dim = 0"),
        (dict(value_dim=2.5), "MLAConfig.value_dim = 2.5"),
        (dict(rope_dim=3), "MLAConfig.rope_dim = 3: must be even and not negative"),
        (dict(rope_dim=-2), "MLAConfig.rope_dim = -2"),
        (dict(window=0), "MLAConfig.window = 0: counts visible keys"),
        (dict(decode_form="naive"), "MLAConfig.decode_form = 'naive'"),
        (dict(rope_pairing="neox"), "rope pairing = 'neox'"),
    ],
)
def test_a_wrong_config_says_so(changes, message):
    with pytest.raises(ConfigError) as error:
        config(**changes)
    assert message in str(error.value) and "Fix: " in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_wrong_calls_say_so():
    c = config(Precision())
    module = build(c)[0]
    with pytest.raises(ShapeError, match=r"must be \[B, T, D\]"):
        module(jnp.zeros((1, 2, 5)), Seq.full(1, 2))
    with pytest.raises(ShapeError, match="takes 1 to 8"):
        module.decode(tokens(c, 1, 9), Seq.full(1, 9), module.init_cache(1, 9))
    with pytest.raises(ShapeError, match="cannot hold 7 tokens"):
        module.prefill(tokens(c, 1, 7), Seq.full(1, 7), module.init_cache(1, 6))
    with pytest.raises(UnsupportedError, match="only the plain cache"):
        module.init_cache(1, 4, policy="int8")
