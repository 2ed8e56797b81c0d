"""Compressed convolutional attention: its oracle, its state, the settings it reduces to."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.errors import ConfigError, UnsupportedError
from attnlab.core.types import Precision, Seq
from attnlab.core.versions import enable_x64, merge_module
from attnlab.layers.cca import CCAConfig
from attnlab.layers.gqa import GQAConfig
from attnlab.testing.budget import close, close_trees, identical
from attnlab.testing.fixtures import (
    PACKED,
    RAGGED,
    Lab,
    cut,
    ones,
    pack,
    spans,
    tokens,
)
from attnlab.testing.flops import matmul_flops
from attnlab.testing.oracle_cca import cca_oracle

# Left, inner and right padding, documents of one token; few shapes, so the oracle compiles little.
ROWS = ((4, 1, -2), (-1, 1, -1, 4))
TINY = dict(dim=10, num_heads=4, num_kv_heads=2, head_dim=4, init_std=0.4)
FP64 = Precision.named("float64")
OFF = dict(convs=0, qk_mean=False, value_shift=False, qk_norm=False)
SWITCHES = {
    "all": {},
    "wide convs": dict(conv_widths=(3, 2), rotary_fraction=0.5, rope_pairing="interleaved"),
    "dense 3, no bias, raw": dict(conv_widths=(1, 3), conv_bias=False, temperature_mode="raw"),
    "odd K, one conv, clamp": dict(
        num_heads=3, num_kv_heads=3, convs=1, temperature_mode="exp_clamp", window=4, sink_tokens=1
    ),
    "K = 1, no conv": dict(num_kv_heads=1, convs=0, sink_logits=True, logit_cap=2.0, scale=0.3),
    "no mean, no norm": dict(qk_mean=False, qk_norm=False),
    "no shift": dict(value_shift=False),
}


def lab(precision=FP64, **fields) -> Lab:
    return _lab(CCAConfig(precision=precision, **TINY | fields))


_lab = functools.cache(Lab)


def oracle(config, params, x, seq):
    names = [
        name for name, p in inspect.signature(cca_oracle).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    fields = {name: getattr(config, name) for name in names}
    return cca_oracle(params, x, seq.positions, seq.segments, **fields)


def mix(lab, x, seq, params=None):
    """q, k, v of whole rows."""
    params = lab.params if params is None else params
    with enable_x64(lab.x64):
        return _mix(lab)(params, jnp.asarray(x, lab.dtype), seq)


@functools.cache
def _mix(lab):
    def run(params, x, seq):
        module = merge_module(lab.graph, params)
        *rows, segments = module._rows(x, seq, module.init_cache(x.shape[0], 1))
        return module._mix(rows, None if seq.segments is None else segments, seq.positions)

    return jax.jit(run)


@pytest.mark.parametrize("name", SWITCHES)
def test_oracle(name):
    """Output and every gradient of packed, padded rows, in fp64 and in fp32."""
    here = lab(**SWITCHES[name])
    x, dy, seq = tokens(1, 2, 7, 10), tokens(2, 2, 7, 10), pack(ROWS)
    with enable_x64():
        y, back = jax.vjp(
            lambda p, x: oracle(here.config, p, x, seq), here.params, jnp.asarray(x, jnp.float64)
        )
        expected = y, *back(jnp.asarray(dy, jnp.float64))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(expected[1]))
    for run, dtype in ((here, "float64"), (here.at("float32"), "float32")):
        y, dparams, dx = run.grads(x, seq, dy)
        close(y, expected[0], dtype=dtype)
        close_trees(dparams, expected[1], dtype=dtype)
        close(dx, expected[2], dtype=dtype, kind="gradient")


def test_layouts_agree():
    here, x = lab(), tokens(1, 3, 24, 10)
    full = here.train(x, Seq.full(3, 24))
    close(here.train(x, ones(3, 24)), full, dtype="float64")
    packed = here.train(x, pack(PACKED, "packed"))
    close(here.train(x, pack(PACKED)), packed, dtype="float64")


def test_first_row_sees_the_bias_of_the_first_convolution():
    """u is padded once: in front of the document y is b0, so z_0 holds b0 w1_0, not zero."""
    here = lab(qk_mean=False, qk_norm=False, rotary_fraction=0.0)
    p = here.params
    x = tokens(1, 1, 3, 10).astype(np.float64)
    q, _, _ = mix(here, x, Seq.full(1, 3))
    with enable_x64():
        u = np.einsum("td,dnh->tnh", x[0], p["w_q"])
        c = {k: np.asarray(v) for k, v in p["q_conv"].items()}
        y0 = c["b0"] + c["w0"][:, 1] * u[0]
        z0 = (
            c["b1"]
            + np.einsum("nc,nch->nh", c["b0"], c["w1"][:, 0])
            + np.einsum("nc,nch->nh", y0, c["w1"][:, 1])
        )
        y1 = c["b0"] + c["w0"][:, 0] * u[0] + c["w0"][:, 1] * u[1]
        z1 = (
            c["b1"]
            + np.einsum("nc,nch->nh", y0, c["w1"][:, 0])
            + np.einsum("nc,nch->nh", y1, c["w1"][:, 1])
        )
    close(q[0, 0], z0, dtype="float64")
    close(q[0, 1], z1, dtype="float64")
    assert np.abs(np.einsum("nc,nch->nh", c["b0"], c["w1"][:, 0])).max() > 0.01


def test_identity_start_is_no_convolution():
    """conv_init="identity": z = u, the same numbers as convs = 0; "torch" keeps its bounds."""
    here, bare = Lab(CCAConfig(**TINY, conv_init="identity")), lab(Precision(), convs=0)
    params = {k: v for k, v in here.initial.items() if k not in ("q_conv", "k_conv")}
    x, seq = tokens(1, 2, 9, 10), Seq.full(2, 9)
    close(here.train(x, seq, params=here.initial), bare.train(x, seq, params=params))
    torch = Lab(CCAConfig(**TINY, conv_widths=(3, 2))).initial["q_conv"]
    for name, bound in (("w0", 3**-0.5), ("b0", 3**-0.5), ("w1", 8**-0.5), ("b1", 8**-0.5)):
        largest = float(np.abs(torch[name]).max())
        assert 0.5 * bound < largest <= bound, name


def test_everything_off_is_gqa():
    here = lab(Precision(), **OFF)
    gqa = Lab(GQAConfig(**TINY), here.params)
    x, dy, seq = tokens(1, 3, 24, 10), tokens(2, 3, 24, 10), pack(PACKED, "packed")
    identical(here.grads(x, seq, dy), gqa.grads(x, seq, dy))


def test_means_of_one_query_per_group_are_equal():
    """G = 1, no convolution, equal w_q and w_k: the means are symmetrical, so q = k."""
    here = lab(num_heads=2, convs=0, qk_norm=False)
    a = here.params | {"w_q": here.params["w_k"]}
    q, k, _ = mix(here, tokens(1, 1, 5, 10), Seq.full(1, 5), a)
    close(q, k, dtype="float64")
    # And the mean of a pair is the same whichever side holds which weights.
    p = here.params
    swapped = p | {"w_q": p["w_k"], "w_k": p["w_q"]}
    x = tokens(1, 1, 5, 10).astype(np.float64)
    q, k, _ = mix(here, x, Seq.full(1, 5))
    q2, k2, _ = mix(here, x, Seq.full(1, 5), swapped)
    with enable_x64():
        close(q + k, q2 + k2, dtype="float64")


def test_scale_of_x_does_not_reach_q_and_k_without_bias():
    here = lab(conv_bias=False)
    x, seq = tokens(1, 1, 6, 10), Seq.full(1, 6)
    a, b = mix(here, x, seq), mix(here, 8 * x, seq)
    close(b[0], a[0], dtype="float64")
    close(b[1], a[1], dtype="float64")
    norms = np.linalg.norm(np.asarray(a[0]), axis=-1)
    np.testing.assert_allclose(norms, 2.0, rtol=1e-9)  # sqrt(H)


@pytest.mark.parametrize("widths", [(2, 2), (3, 2), (1, 1)])
def test_reach_of_a_token(widths):
    """x_j reaches outputs from j on, keys j .. j + k0 + k1 - 2, the value of j and of j + 1."""
    here, x, j = lab(conv_widths=widths), tokens(1, 1, 9, 10), 3
    moved = x.copy()
    moved[0, j] += 1
    seq = Seq.full(1, 9)

    def changed(a, b):
        difference = np.abs(np.asarray(a) - np.asarray(b))[0]
        return difference.reshape(9, -1).max(-1) > 0

    y = changed(here.train(x, seq), here.train(moved, seq))
    assert y.tolist() == [t >= j for t in range(9)]
    (q0, k0, v0), (q1, k1, v1) = mix(here, x, seq), mix(here, moved, seq)
    last = j + sum(widths) - 2
    assert changed(k0, k1).tolist() == [j <= t <= last for t in range(9)]
    assert changed(q0, q1).tolist() == [j <= t <= last for t in range(9)]
    # K = 2: head 0 is the current token, head 1 the token before.
    assert changed(v0[:, :, :1], v1[:, :, :1]).tolist() == [t == j for t in range(9)]
    assert changed(v0[:, :, 1:], v1[:, :, 1:]).tolist() == [t == j + 1 for t in range(9)]


@pytest.mark.parametrize("name", ["wide convs", "odd K, one conv, clamp", "K = 1, no conv"])
def test_pieces_equal_the_whole(name):
    """Prefill in pieces and token by token; padding left, right, between and inside chunks."""
    here, x, seq = lab(**SWITCHES[name]), tokens(1, 3, 24, 10), pack(RAGGED)
    y = here.train(x, seq)
    for widths in ((24,), (1, 2, 1, 2, 14, 2, 2)):
        pieces, cache = here.walk(x, seq, here.cache(3, 24), widths)
        close(pieces, y, dtype="float64", name=f"{widths}")
    steps, last = here.walk(x, seq, here.cache(3, 24), (1,) * 24, decode=True)
    close(steps, y, dtype="float64", name="steps")
    close_trees(last, cache, dtype="float64", name="state")


def test_pieces_without_segments():
    here, x, seq = lab(), tokens(1, 2, 9, 10), Seq.full(2, 9)
    y = here.train(x, seq)
    for widths in ((9,), (2, 5, 2), (1,) * 9):
        pieces, _ = here.walk(x, seq, here.cache(2, 9), widths)
        close(pieces, y, dtype="float64", name=f"{widths}")


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_inside_a_document_leaves_no_trace(side):
    """A document with padding in it, in one call or in chunks with state, is the document."""
    here, x = lab(conv_widths=(3, 2)), tokens(1, 2, 9, 10)
    y = here.train(x, Seq.full(2, 9))
    at = {
        "left": np.array([2, 3, 7, 8, 9, 10, 11, 14, 15]),
        "right": np.array([0, 1, 4, 5, 6, 7, 8, 12, 13]),
        "inside": np.array([0, 2, 3, 5, 6, 8, 11, 12, 15]),
    }[side]
    wide, seg, pos = tokens(5, 2, 16, 10) * 50, np.zeros((2, 16), int), np.full((2, 16), 77)
    wide[:, at], seg[:, at], pos[:, at] = x, 4, np.arange(9)
    seq = Seq(pos.astype(np.int32), seg.astype(np.int32), "any")
    close(here.train(wide, seq)[:, at], y, dtype="float64")
    for widths in ((4, 8, 4), (16,)):
        pieces, cache = here.walk(wide, seq, here.cache(2, 16), widths)
        close(pieces[:, at], y, dtype="float64", name=f"{widths}")
        assert np.all(cache.length == 9)


def test_rows_of_different_length_carry_their_own_state():
    here, x = lab(), tokens(1, 2, 8, 10)
    y = here.train(x, Seq.full(2, 8))
    lengths, cache, got = [[3, 5], [0, 2], [5, 1]], here.cache(2, 8), [[], []]
    start = [0, 0]
    for chunk in lengths:
        T = max(chunk) + 1
        xs, seg, pos = tokens(9, 2, T, 10), np.zeros((2, T), np.int32), np.zeros((2, T), np.int32)
        for b, n in enumerate(chunk):
            xs[b, :n], seg[b, :n] = x[b, start[b] : start[b] + n], 1
            pos[b, :n] = np.arange(start[b], start[b] + n)
        out, cache = here.prefill(xs, Seq(pos, seg), cache)
        for b, n in enumerate(chunk):
            got[b].append(np.asarray(out[b, :n]))
            start[b] += n
    for b in range(2):
        close(np.concatenate(got[b]), y[b], dtype="float64")


def test_packing_equals_separate_documents():
    """Outputs and gradients, documents of one token included."""
    here, x, dy = lab(conv_widths=(3, 2)), tokens(1, 2, 7, 10), tokens(2, 2, 7, 10)
    seq = pack(ROWS)
    y, dparams, dx = here.grads(x, seq, dy)
    total = None
    for b, start, n in spans(ROWS):
        part = slice(b, b + 1), slice(start, start + n)
        own, dp, down = here.grads(x[part], Seq.full(1, n), dy[part])
        close(y[part], own, dtype="float64")
        close(dx[part], down, dtype="float64", kind="gradient")
        dp = jax.tree.map(np.asarray, dp)
        total = dp if total is None else jax.tree.map(np.add, total, dp)
    close_trees(dparams, total, dtype="float64")


def test_temperature():
    x, seq = tokens(1, 1, 4, 10), Seq.full(1, 4)

    def beta(here, params):
        return np.linalg.norm(np.asarray(mix(here, x, seq, params)[1]), axis=-1) / 2  # sqrt(H)

    for mode, expected in (
        ("exp", {0.5: np.exp(0.5)}), ("raw", {0.5: 0.5}),
        ("exp_clamp", {0.5: np.exp(0.5), 3.0: np.exp(2.0), -1.0: 1.0}),
    ):
        here = lab(Precision(), temperature_mode=mode)
        for tau, value in expected.items():
            params = here.params | {"temperature": np.full(2, tau, np.float32)}
            np.testing.assert_allclose(beta(here, params), value, rtol=1e-5)
        np.testing.assert_allclose(beta(here, here.initial), 1, atol=2e-3)
        grads = here.grads(x, seq, tokens(2, 1, 4, 10), params=here.initial)[1]
        assert np.abs(grads["w_k"]).max() > 0 and np.abs(grads["temperature"]).max() > 0, mode


@pytest.mark.parametrize("fields", [{}, SWITCHES["wide convs"], OFF, SWITCHES["K = 1, no conv"]])
def test_counts(fields):
    here = lab(Precision(), **fields)
    c, B, T = here.config, 2, 6
    leaves = jax.tree.leaves(here.params)
    assert sum(leaf.size for leaf in leaves) == c.param_count()
    assert jax.tree.structure(here.axes, is_leaf=lambda a: isinstance(a, tuple)) == (
        jax.tree.structure(here.params)
    )
    x, seq = tokens(1, B, T, 10), Seq.full(B, T)
    counted = matmul_flops(lambda p: here.run(p, x, seq, "reference"), here.params)
    assert counted == B * c.flops(T, T, "train").dense
    cache = here.cache(B, 9, "bfloat16")
    step = matmul_flops(
        lambda p: here.step(p, x[:, :1], cut(seq, 0, 1), cache, "reference"), here.params
    )
    assert step == B * c.flops(1, 9, "decode").dense
    numbers = [a for a in jax.tree.leaves(cache) if a.dtype == jnp.bfloat16]
    assert sum(a.nbytes for a in numbers) == B * c.cache_bytes(9, "bfloat16")
    assert set(cache.AXES) == {f.name for f in dataclasses.fields(cache)}


def test_refusals():
    for fields, text in (
        (dict(head_dim=None), "head_dim"), (dict(num_heads=3, num_kv_heads=3, head_dim=3), "even"),
        (dict(num_kv_heads=3), "divide"), (dict(convs=3), "convs"),
        (dict(conv_widths=(0, 2)), "tap"), (dict(conv_widths=(2,)), "tap"),
        (dict(temperature_mode="log"), "temperature_mode"), (dict(conv_init="zeros"), "conv_init"),
        (dict(window=0), "window"),
    ):
        with pytest.raises(ConfigError, match=text):
            CCAConfig(**TINY | fields)
    names = {f.name for f in dataclasses.fields(CCAConfig)}
    assert not names & {"bias", "value_dim"}
    with pytest.raises(TypeError):
        CCAConfig(**TINY, bias=True)
    here = lab(Precision())
    with pytest.raises(UnsupportedError, match="rewound"):
        here.cache(1, 4).truncate(2)
    with pytest.raises(UnsupportedError):
        here.module.init_cache(1, 4, policy="int8")


def test_bfloat16_runs_in_its_dtypes():
    here = lab(Precision.named("bfloat16"))
    x = tokens(1, 2, 7, 10)
    y = here.train(x, Seq.full(2, 7))
    assert y.dtype == jnp.bfloat16
    close(y, here.at("float64").train(x, Seq.full(2, 7)), dtype="bfloat16")
    steps, cache = here.walk(x, Seq.full(2, 7), here.cache(2, 7), (1,) * 7, decode=True)
    assert cache.u_q.dtype == jnp.bfloat16
    close(steps, y, dtype="bfloat16")
