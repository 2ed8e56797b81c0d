"""What attention() refuses and with what words, which implementation serves a call, and vendors."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.dispatch import Device
from attnlab.core.errors import ConfigError, DtypeError, ImplementationError, ShapeError
from attnlab.core.mask import (
    Blocks,
    Causal,
    Coords,
    Full,
    MaskMod,
    Prefix,
    Segments,
    SinkTokens,
    Window,
)
from attnlab.core.versions import JAX
from attnlab.ops.attention import (
    OP,
    Call,
    attention,
    reference,
    tuning,
    vendor,
    vendor_tokamax_splash,
)
from attnlab.ops.attention.shapes import SHAPES
from attnlab.testing.budget import close

CPU, H200 = Device("cpu", "cpu"), Device("gpu", "NVIDIA H200")
A100, TPU = Device("gpu", "NVIDIA A100-SXM4-80GB"), Device("tpu", "TPU v5 lite")
CALL = Call(
    2, 1024, 1024, 8, 2, 64, 64, "bfloat16", Causal(), "full", False, False, None, False, H200
)


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("cudnn", {}, None),
        ("cudnn", {"mask": Causal() & Window(100)}, None),
        ("cudnn", {"mask": Full()}, None),
        ("cudnn", {"H": 256, "V": 256}, None),
        ("cudnn", {"H": 256, "V": 256, "device": A100}, "H = 256 is not a multiple of 8 up to 128"),
        ("cudnn", {"H": 60, "V": 60}, "H = 60 is not a multiple of 8 up to 256"),
        ("cudnn", {"H": 192, "V": 128}, "H = 192 and V = 128 differ"),
        ("cudnn", {"device": CPU}, "runs on NVIDIA GPUs, not on cpu 'cpu'"),
        ("cudnn", {"dtype": "float32"}, "dtype is float32, served: bfloat16, float16"),
        ("cudnn", {"softmax_dtype": "float64"}, "softmax is float32 only, not float64"),
        ("cudnn", {"layout": "any"}, "layout is 'any', served: full"),
        ("cudnn", {"S": 2048}, "T = 1024 and S = 2048 differ"),
        ("cudnn", {"mask": Causal() | Prefix(3)}, "the mask is more than causal, window and"),
        ("cudnn", {"mask": Window(100)}, "a window is served only under a causal mask"),
        ("cudnn", {"sink_logits": True}, "sink logits are not served"),
        ("cudnn", {"return_lse": True}, "its log-sum-exp has no gradient"),
        ("cudnn", {"logit_cap": 30.0}, "a logit cap is not served"),
        ("tokamax", {"device": A100}, "runs on Hopper GPUs, not on gpu 'NVIDIA A100"),
        ("tokamax", {"device": TPU}, "its backward needs memory quadratic in S"),
        ("tokamax", {"dtype": "float32"}, "dtype is float32"),
        ("tokamax", {"H": 576, "V": 512}, "H = 576 is not a multiple of 8 from 64 to 256"),
        ("tokamax", {"mask": Full(), "segments": True, "layout": "packed"}, "only under a causal"),
        ("tokamax", {"mask": Window(9)}, "a window is served only under a causal mask"),
        ("tokamax", {"segments": True}, "segments need layout='packed'"),
        ("splash", {"device": TPU}, None),
        ("splash", {"device": TPU, "dtype": "float32", "H": 192, "V": 128, "logit_cap": 9.0}, None),
        ("splash", {"device": TPU, "segments": True, "layout": "packed"}, None),
        ("splash", {"device": TPU, "segments": True}, "segments need layout='packed'"),
        ("splash", {}, "runs on TPUs, not on gpu"),
        ("splash", {"device": TPU, "T": 1000, "S": 1000}, "T = 1000 is not a multiple of 128"),
        ("splash", {"device": TPU, "V": 36}, "V = 36 is not a multiple of 8 from 64 to 576"),
        ("splash", {"device": TPU, "mask": SinkTokens(2)}, "the mask is more than causal"),
        ("xla", {"device": TPU, "layout": "any", "sink_logits": True, "return_lse": True}, None),
    ],
)
def test_who_serves_what(name, changes, reason):
    found = OP.implementations[name].supports(dataclasses.replace(CALL, **changes))
    assert found is None if reason is None else reason in found


def test_a_missing_or_changed_tokamax_is_a_reason(monkeypatch):
    supports = OP.implementations["tokamax"].supports
    monkeypatch.setattr(vendor.importlib.util, "find_spec", lambda name: None)
    assert supports(CALL).startswith("tokamax is not installed")
    monkeypatch.setattr(vendor.importlib.util, "find_spec", lambda name: object())

    def gone():
        raise ImportError("cannot import name 'Mask'")

    monkeypatch.setattr(vendor, "_tokamax", gone)
    vendor.broken.cache_clear()
    assert "does not fit: cannot import name 'Mask'" in supports(CALL)
    vendor.broken.cache_clear()


def test_tokamax_splash_is_a_peer_by_name(monkeypatch):
    """Without tokamax a clear reason; never in the order; its blocks are known all the same."""
    call = dataclasses.replace(CALL, device=TPU)
    supports = OP.implementations["tokamax-splash"].supports
    assert supports(CALL) == "runs on TPUs, not on gpu"
    assert "T = 1000 is not" in supports(dataclasses.replace(call, T=1000, S=1000))
    monkeypatch.setattr(vendor.importlib.util, "find_spec", lambda name: None)
    assert supports(call).startswith("tokamax is not installed")
    monkeypatch.setattr(vendor.importlib.util, "find_spec", lambda name: object())

    def gone():
        raise ImportError("No module named 'tokamax'")

    monkeypatch.setattr(vendor_tokamax_splash, "_library", gone)
    vendor.broken.cache_clear()
    assert "does not fit: No module named" in supports(call)
    vendor.broken.cache_clear()
    assert not any("tokamax-splash" in names for names in OP.order.values())
    key = tuning.Key("tokamax-splash", "forward", 64, 64, 1, "bfloat16", 1024, 1024, "causal")
    with tuning.forcing({"k_transposed": 2}), pytest.raises(ConfigError, match="not one of"):
        tuning.choose(key)


def test_order_of_preference():
    def chosen(**changes):
        report = OP.report(dataclasses.replace(CALL, **changes))
        return next(verdict.name for verdict in report if verdict.chosen)

    assert chosen() == "cudnn"
    assert chosen(device=TPU) == "splash"
    assert chosen(device=CPU) == chosen(device=TPU, H=60) == "xla"
    assert chosen(sink_logits=True) == ("gpu" if JAX >= (0, 11, 2) else "xla")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_shapes_are_calls(shape):
    call = shape.call(H200)
    assert call.N % call.K == 0 and set(shape.tags) <= {"primary", "ci", "forward_only"}
    assert OP.report(call)


def _qkv(T=4, S=4, N=4, K=2, H=8, V=8, dtype="float32"):
    return [jnp.zeros((2, *shape), dtype) for shape in ((T, N, H), (S, K, H), (S, K, V))]


def _ints(*shape):
    return jnp.zeros(shape, jnp.int32)


def test_functions_of_a_pair_compose_with_masks():
    """From either side; one that returns a Python truth value is a mask like any other."""
    q, k, v = _qkv()
    even = lambda head, q_pos, k_pos: k_pos % 2 == 0  # noqa: E731
    expected = attention(q, k, v, mask=Causal() & MaskMod.of(even))
    for mask in (Causal() & even, even & Causal()):
        assert (attention(q, k, v, mask=mask) == expected).all()
    either = attention(q, k, v, mask=Causal() | MaskMod.of(even))
    for mask in (Causal() | even, even | Causal()):
        assert (attention(q, k, v, mask=mask) == either).all()
    for impl in ("reference", "xla"):
        found = attention(q, k, v, mask=lambda head, q_pos, k_pos: True, impl=impl)
        assert (found == attention(q, k, v, mask=Full(), impl=impl)).all()
    with pytest.raises(ConfigError, match="mask is a NoneType: must be a mask or a function"):
        _ = Causal() | None


def test_impl_by_name():
    with pytest.raises(ImplementationError, match=re.escape("cudnn: runs on NVIDIA GPUs, not on")):
        attention(*_qkv(), impl="cudnn")
    with pytest.raises(ImplementationError, match=r"cudnn: .*; splash: runs on TPUs"):
        attention(*_qkv(), impl=("cudnn", "splash"))
    with pytest.raises(ConfigError, match="has no such implementation"):
        attention(*_qkv(), impl="flash")
    assert attention(*_qkv(), impl=("cudnn", "xla")).shape == (2, 4, 4, 8)


@pytest.mark.parametrize(
    "qkv, options, error, message",
    [
        ([jnp.zeros((2, 4, 8))] * 3, {}, ShapeError, r"q has shape \(2, 4, 8\): must be \[batch"),
        (_qkv(dtype="int32"), {}, DtypeError, "q has dtype int32: must be floating"),
        (
            [*_qkv()[:2], _qkv(dtype="bfloat16")[2]], {}, DtypeError,
            "q, k, v have dtypes float32, float32, bfloat16: must agree",
        ),
        (
            [_qkv()[0], *_qkv(H=6)[1:]], {}, ShapeError,
            r"q \(2, 4, 4, 8\), k \(2, 4, 2, 6\), v .* must be \[B, T, N, H\]",
        ),
        (_qkv(N=5), {}, ShapeError, "N = 5 query heads over K = 2 key/value heads"),
        (_qkv(S=6), {}, ShapeError, "positions = None with T = 4 and S = 6"),
        (_qkv(), {"positions": _ints(2, 5)}, ShapeError, r"query positions has shape \(2, 5\)"),
        (
            _qkv(), {"positions": (_ints(2, 4), _ints(1, 4))}, ShapeError,
            r"key positions has shape \(1, 4\): must be \(2, 4\)",
        ),
        (_qkv(), {"segments": _ints(4)}, ShapeError, r"query segments has shape \(4,\)"),
        (_qkv(), {"positions": jnp.zeros((2, 4))}, DtypeError, "positions has dtype float32"),
        (_qkv(), {"sink_logits": jnp.zeros(3)}, ShapeError, r"sink_logits has shape \(3,\): must"),
        (_qkv(), {"logit_cap": 0.0}, ConfigError, "logit_cap = 0.0: must be positive"),
        (_qkv(), {"scale": jnp.ones(())}, ConfigError, "scale is an array: must be a Python"),
        (_qkv(), {"scale": float("nan")}, ConfigError, "scale = nan: must be a finite number"),
        (_qkv(), {"scale": "x"}, ConfigError, "scale = 'x': must be a finite number"),
        (_qkv(), {"logit_cap": "a"}, ConfigError, "logit_cap = 'a': must be positive"),
        (_qkv(), {"sink_tokens": -1}, ConfigError, "sink_tokens = -1: is a count"),
        (_qkv(), {"sink_tokens": 1.5}, ConfigError, "sink_tokens = 1.5: must be an integer"),
        ([[[1.0]], *_qkv()[1:]], {}, DtypeError, "q is a list: must be an array"),
        (_qkv(N=0), {}, ShapeError, "heads and width above 0"),
        (_qkv(), {"positions": [0, 1]}, ShapeError, "query positions is no array"),
        (_qkv(), {"positions": (_ints(2, 4),) * 3}, ShapeError, "query positions is no array"),
        (_qkv(), {"mask": Segments()}, ConfigError, "segments = None: the mask holds Segments"),
        (_qkv(), {"layout": "dense"}, ConfigError, "layout = 'dense': unknown"),
        (_qkv(), {"layout": "packed"}, ConfigError, "layout = 'packed' with positions = None"),
        (
            _qkv(), {"layout": "full", "segments": _ints(2, 4)}, ConfigError,
            "layout = 'full' with segments",
        ),
        (
            _qkv(), {"layout": "packed", "positions": (_ints(2, 4), _ints(2, 4)),
                     "segments": _ints(2, 4)}, ConfigError,
            "promises that queries and keys are the same row",
        ),
        (
            _qkv(), {"layout": "packed", "positions": _ints(2, 4)}, ConfigError,
            "layout = 'packed' with segments = None",
        ),
        (_qkv(), {"softmax_dtype": "bfloat16"}, ConfigError, "never below float32"),
        (
            _qkv(), {"mask": Causal() & Blocks(_ints(1, 3, 2, 1), 2, 2)}, ShapeError,
            r"Blocks.lists has shape \(1, 3, 2, 1\): must be .* = \[2 or 1, 4 or 1, 2, M\]",
        ),
        (_qkv(), {"mask": Blocks(_ints(1, 1, 1, 1), 2, 2)}, ShapeError, r"shape \(1, 1, 1, 1\)"),
        (_qkv(), {"mask": Blocks(_ints(2, 2), 2, 2)}, ShapeError, r"shape \(2, 2\)"),
        (_qkv(), {"mask": Prefix(_ints(3))}, ShapeError, r"Prefix.length has shape \(3,\)"),
    ],
)
def test_bad_arguments(qkv, options, error, message):
    with pytest.raises(error, match=message):
        attention(*qkv, **options)


LENGTHS = (100, 30, 90, 36)  # the last is padding


def _check_vendor(f, mask, packed, V, cap):
    """Values and gradients of a vendor's kernel against the reference, fp32."""
    B, T, N, K, H = 1, sum(LENGTHS), 2, 1, 64
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (T, N, H), (T, K, H), (T, K, V), (T, N, V)
    q, k, v, do = (jax.random.normal(key, (B, *shape)) for key, shape in zip(keys, shapes))
    positions = np.concatenate([np.arange(n) for n in LENGTHS]) if packed else np.arange(T)
    segments = jnp.asarray(np.repeat([4, 1, 2, 0], LENGTHS)[None]) if packed else None
    coords = Coords(jnp.asarray(positions[None]), segments, jnp.arange(T))
    options = dict(
        mask=mask & Segments() if packed else mask, score=None,
        q_coords=coords, k_coords=coords, scale=0.1,
        sink_logits=None, logit_cap=cap, return_lse=False, softmax_dtype=jnp.dtype("float32"),
        layout="packed" if packed else "full",
    )

    def run(f):
        o, pull = jax.vjp(lambda *a: f(*a, **options)[0], q, k, v)
        return o, *pull(do)

    found, expected = jax.jit(lambda: run(f))(), run(reference.forward)
    for name, a, b in zip(("o", "dq", "dk", "dv"), found, expected):
        close(a, b, kind="op", name=name)
    if packed:
        assert (found[0][:, -LENGTHS[-1] :] == 0).all()


@pytest.mark.parametrize(
    "mask, packed, V, cap",
    [
        (Causal(), True, 64, None),
        (Causal() & Window(50), False, 128, 3.0),
        (Full(), True, 64, None),
    ],
)
def test_splash_in_the_interpreter(mask, packed, V, cap):
    _check_vendor(functools.partial(vendor.splash, interpret=True), mask, packed, V, cap)


@pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None, reason='needs pip install "attnlab[kernels]"'
)
@pytest.mark.parametrize(
    "mask, packed, V, cap",
    [(Causal(), True, 64, None), (Causal() & Window(9), False, 128, 3.0), (Full(), True, 64, 9.0)],
)
def test_tokamax_splash_in_the_interpreter(mask, packed, V, cap):
    forward = functools.partial(vendor_tokamax_splash.forward, interpret=True)
    with tuning.forcing({"k_transposed": 1, "dq_steps": 0}):
        _check_vendor(forward, mask, packed, V, cap)


def test_splash_lowers_for_tpu():
    def f(q, k, v, segments):
        coords = Coords(segments, segments, jnp.arange(256))
        o, _ = vendor.splash(
            q, k, v, mask=Causal(), score=None,
            q_coords=coords, k_coords=coords, scale=0.1, sink_logits=None,
            logit_cap=None, return_lse=False, softmax_dtype=None, layout="packed",
        )
        return o.astype(jnp.float32).sum()

    q, k, v = (jax.ShapeDtypeStruct((2, 256, n, 64), jnp.bfloat16) for n in (4, 2, 2))
    segments = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    traced = jax.jit(jax.grad(f, (0, 1, 2))).trace(q, k, v, segments)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call") == 3


@pytest.mark.parametrize(
    "mask, packed, V, cap",
    [
        (Causal(), True, 64, None),
        (Causal() & Window(50), True, 64, 3.0),
        (Full(), False, 128, None),
    ],
)
def test_tokamax_ranges(mask, packed, V, cap, monkeypatch):
    """The key ranges we hand to tokamax, through its plain XLA op."""
    base = pytest.importorskip("tokamax._src.ops.attention.base")
    monkeypatch.setattr(vendor, "_tokamax", lambda: (base.DotProductAttention(), base.Mask))
    _check_vendor(vendor.tokamax, mask, packed, V, cap)
