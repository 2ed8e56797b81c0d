"""Sparse query attention: its oracle, both directions, the settings it reduces to, its counts."""

import functools
import inspect

import jax
import numpy as np
import pytest

from attnlab.core.config import to_dict
from attnlab.core.errors import ConfigError
from attnlab.core.types import Precision, Seq
from attnlab.core.versions import enable_x64
from attnlab.layers.gqa import GQAConfig
from attnlab.layers.sqa import SQAConfig
from attnlab.testing.budget import close, close_trees, identical
from attnlab.testing.fixtures import PACKED, RAGGED, Lab, cut, pack, spans, tokens
from attnlab.testing.flops import matmul_flops
from attnlab.testing.oracle_sqa import sqa_oracle

ROWS = ((4, 1, -2), (-1, 1, -1, 4))
TINY = dict(dim=16, num_heads_total=4, init_std=0.4)
FP64 = Precision.named("float64")
MEMBERS = {
    "sqa": (4, 2), "ssqa": (4, 4), "xsqa": (2, 2), "xsmqa": (2, 1), "lsqa": (6, 2), "rsqa": (2, 4)
}
FORMS = {
    "sqa": dict(num_heads=2, num_kv_heads=1),
    "symmetric, windowed": dict(num_heads=3, qk_norm=True, window=3, sink_tokens=1),
    "reversed": dict(num_heads=2, num_kv_heads=4, gate=True, out_bias=True, sink_logits=True),
    "one query head": dict(num_heads=1, num_kv_heads=3, value_dim=5, head_dim=6, bias=True),
    "gated": dict(num_heads=4, num_kv_heads=2, gate=True, logit_cap=2.0, rotary_fraction=0.5),
}

_lab = functools.cache(Lab)


def lab(precision=FP64, **fields) -> Lab:
    return _lab(SQAConfig(precision=precision, **TINY | fields))


@pytest.mark.parametrize("name", FORMS)
def test_oracle(name):
    """Output and every gradient of packed, padded rows, in fp64 and in fp32."""
    here = lab(**FORMS[name])
    x, dy, seq = tokens(1, 2, 7, 16), tokens(2, 2, 7, 16), pack(ROWS)
    parameters = inspect.signature(sqa_oracle).parameters.values()
    fields = {
        p.name: getattr(here.config, p.name) for p in parameters if p.kind is p.KEYWORD_ONLY
    }

    @jax.jit
    def judge(params, x, dy):
        def run(params, x):
            return sqa_oracle(params, x, seq.positions, seq.segments, **fields)

        y, back = jax.vjp(run, params, x)
        return y, *back(dy)

    with enable_x64():
        expected = judge(here.params, x.astype(np.float64), dy.astype(np.float64))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(expected[1]))
    for run, dtype in ((here, "float64"), (here.at("float32"), "float32")):
        y, dparams, dx = run.grads(x, seq, dy)
        assert np.all(np.asarray(y)[seq.segments == 0] == 0)
        close(y, expected[0], dtype=dtype)
        close_trees(dparams, expected[1], dtype=dtype)
        close(dx, expected[2], dtype=dtype, kind="gradient")


@pytest.mark.parametrize("kv", [2, 4])
def test_all_query_heads_is_gqa(kv):
    """N = H_total is grouped-query attention, N = K = H_total multi-head attention."""
    here = lab(Precision(), num_heads=4, num_kv_heads=kv)
    gqa = Lab(GQAConfig(dim=16, num_heads=4, num_kv_heads=kv), here.params)
    x, dy, seq = tokens(1, 3, 24, 16), tokens(2, 3, 24, 16), pack(PACKED, "packed")
    identical(here.grads(x, seq, dy), gqa.grads(x, seq, dy))


def test_symmetric_is_mha_on_fewer_heads():
    here = lab(Precision(), num_heads=2)
    mha = Lab(GQAConfig(dim=16, num_heads=2, head_dim=4), here.params)
    x, seq = tokens(1, 1, 8, 16), Seq.full(1, 8)
    identical(here.train(x, seq), mha.train(x, seq))


def test_reversed_tiles_and_does_not_block():
    """Key/value head j uses query head j mod N; blocks j // (K/N) are something else for N > 1."""
    x, seq = tokens(1, 1, 8, 16), Seq.full(1, 8)
    here = lab(num_heads=2, num_kv_heads=4)
    mha = GQAConfig(dim=16, num_heads=4, head_dim=4, precision=FP64)

    def with_queries(here, heads):
        w_q = np.asarray(here.params["w_q"])[:, heads]
        return np.asarray(Lab(mha, here.params | {"w_q": w_q}).train(x, seq))

    y = np.asarray(here.train(x, seq))
    close(y, with_queries(here, [0, 1, 0, 1]), dtype="float64")
    assert np.abs(y - with_queries(here, [0, 0, 1, 1])).max() > 0.01 * np.abs(y).max()
    one = lab(num_heads=1, num_kv_heads=4)
    close(one.train(x, seq), with_queries(one, [0, 0, 0, 0]), dtype="float64")


@pytest.mark.parametrize("name", ["sqa", "reversed"])
def test_pieces_equal_the_whole(name):
    here, x, seq = lab(**FORMS[name]), tokens(1, 3, 24, 16), pack(RAGGED)
    y = here.train(x, seq)
    pieces, _ = here.walk(x, seq, here.cache(3, 24), (1, 2, 1, 2, 14, 2, 2))
    close(pieces, y, dtype="float64")
    steps, cache = here.walk(x, seq, here.cache(3, 24), (1,) * 24, decode=True)
    close(steps, y, dtype="float64")
    keep = np.array([6, 0, 9])
    assert np.array_equal(cache.truncate(keep).length, keep)


def test_packing_equals_separate_documents():
    here, x, seq = lab(**FORMS["reversed"]), tokens(1, 2, 7, 16), pack(ROWS)
    y = here.train(x, seq)
    for b, start, n in spans(ROWS):
        own = here.train(x[b : b + 1, start : start + n], Seq.full(1, n))
        close(y[b : b + 1, start : start + n], own, dtype="float64")


@pytest.mark.parametrize("name", FORMS)
def test_counts(name):
    here = lab(Precision(), **FORMS[name])
    c, B, T = here.config, 2, 6
    assert sum(leaf.size for leaf in jax.tree.leaves(here.params)) == c.param_count()
    assert jax.tree.structure(here.axes, is_leaf=lambda a: isinstance(a, tuple)) == (
        jax.tree.structure(here.params)
    )
    x, seq = tokens(1, B, T, 16), Seq.full(B, T)
    counted = matmul_flops(lambda p: here.run(p, x, seq, "reference"), here.params)
    assert counted == B * c.flops(T, T, "train").dense
    cache = here.cache(B, 9)
    step = matmul_flops(
        lambda p: here.step(p, x[:, :1], cut(seq, 0, 1), cache, "reference"), here.params
    )
    assert step == B * c.flops(1, 9, "decode").dense
    assert cache.k.nbytes + cache.v.nbytes == B * c.cache_bytes(9)


@pytest.mark.parametrize("name", MEMBERS)
def test_members(name):
    c = SQAConfig.member(name, dim=64, num_heads_total=8, window=16)
    assert (c.num_heads, c.K, c.H, c.window) == (*MEMBERS[name], 8, 16)
    mha = GQAConfig(dim=64, num_heads=8)
    share = c.flops(32, 32, "train").attention / mha.flops(32, 32, "train").attention
    assert share == max(MEMBERS[name]) / 8
    assert to_dict(c)["variant"] == "sqa" and SQAConfig(**vars(c)) == c


def test_gate_and_bias_start():
    """The gate starts near ones, the output bias at zero; both are off by default."""
    c = SQAConfig(**TINY, num_heads=2)
    assert not c.gate and not c.out_bias
    start = lab(Precision(), **FORMS["reversed"]).initial
    assert start["w_g"].shape == (16, 4, 4) and start["w_o"].shape == (4, 4, 16)
    assert abs(float(start["w_g"].mean()) - 1) < 0.01 and 0.005 < float(start["w_g"].std()) < 0.02
    assert not np.any(start["b_o"]) and start["sink_logits"].shape == (4,)


def test_refusals():
    for fields, text in (
        (dict(num_heads=3, num_kv_heads=2), "multiple"),
        (dict(num_heads=2, num_kv_heads=3), "multiple"),
        (dict(num_heads=2, num_heads_total=None), "num_heads_total"),
        (dict(num_heads=2, num_heads_total=5), "num_heads_total"),
        (dict(num_heads=0), "num_heads"), (dict(num_heads=2, num_kv_heads=0), "num_kv_heads"),
        (dict(num_heads=2, window=0), "window"),
        (dict(num_heads=1, num_kv_heads=4, window=0), "window"),
    ):
        with pytest.raises(ConfigError, match=text):
            SQAConfig(**TINY | fields)
    with pytest.raises(ConfigError, match="member"):
        SQAConfig.member("msqa", dim=64, num_heads_total=8)
    with pytest.raises(ConfigError, match="multiple of 4"):
        SQAConfig.member("sqa", dim=64, num_heads_total=6)
