"""What decode() refuses and with what words, and which implementation serves a call."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from attnlab.core.dispatch import Device
from attnlab.core.errors import ConfigError, DtypeError, ShapeError, UnsupportedError
from attnlab.ops.attention import decode_gpu, hopper
from attnlab.ops.attention.decode import OP, Call, decode, decode_names

H200 = Device("gpu", "NVIDIA H200")
CALL = Call(
    64, 1, 32768, 32, 8, 128, 128, 128, "bfloat16", "bfloat16", False, False, None, 0, False,
    None, False, H200,
)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, None),
        ({"page": None, "positions": True, "segments": True, "window": 9, "t": 8}, None),
        ({"H": 192, "page": 16}, None),
        ({"device": Device("gpu", "NVIDIA A100-SXM4-80GB")}, "runs on Hopper GPUs, not on gpu"),
        ({"dtype": "float32"}, "dtype is float32, served: bfloat16, float16"),
        ({"cache_dtype": "float32"}, "the cache is float32 and q is bfloat16"),
        ({"softmax_dtype": "float64"}, "softmax is float32 only"),
        ({"H": 96}, "H = 96, V = 128: served are 64, 128, 192, 256"),
        ({"page": 24}, "page = 24: served are 8, 16, 32 and multiples of 64"),
        ({"page": 4}, "page = 4: served are"),
    ],
)
def test_what_the_kernel_serves(changes, reason, monkeypatch):
    monkeypatch.setattr(hopper, "JAX", (0, 11, 2))
    found = decode_gpu.supports(dataclasses.replace(CALL, **changes))
    assert found is None if reason is None else reason in found


def test_an_old_jax_is_a_reason(monkeypatch):
    monkeypatch.setattr(hopper, "JAX", (0, 10, 2))
    assert "needs jax >= 0.11.2 (Mosaic GPU), this is 0.10.2" in decode_gpu.supports(CALL)
    assert [v.name for v in OP.report(CALL) if v.chosen] == ["xla"]
    assert hopper.cores("NVIDIA H20") == 78 and hopper.cores("NVIDIA H200") == 132


def test_names_of_implementations():
    assert decode_names(None) is None and decode_names("xla") == ("xla",)
    assert decode_names("cudnn") == () and decode_names(("cudnn", "gpu")) == ("gpu",)


def _args(**changes):
    shapes = {"q": (2, 1, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 8)}
    given = {n: jnp.zeros(shape) for n, shape in shapes.items()}
    return given | {"lengths": jnp.zeros(2, jnp.int32)} | changes


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"q": jnp.zeros((2, 9, 4, 8))}, ShapeError, "t = 9 tokens: decode takes 1 to 8"),
        ({"q": jnp.zeros((2, 1, 3, 8))}, ShapeError, "N = 3 query heads over K = 2"),
        ({"q": jnp.zeros((3, 1, 4, 8))}, ShapeError, r"must be \[B, t, N, H\]"),
        ({"k": jnp.zeros((5, 2, 8))}, ShapeError, r"k has shape \(5, 2, 8\): must have four axes"),
        ({"v": jnp.zeros((2, 5, 2, 8), "int32")}, DtypeError, "v has dtype int32"),
        ({"v": jnp.zeros((2, 5, 2, 8), "bfloat16")}, DtypeError, "k, v have dtypes"),
        ({"lengths": jnp.zeros(3, jnp.int32)}, ShapeError, r"lengths has shape \(3,\)"),
        ({"lengths": jnp.zeros(2)}, DtypeError, "lengths has dtype float32"),
        ({"pages": jnp.zeros((3, 1), jnp.int32)}, ShapeError, r"pages has shape \(3, 1\)"),
        ({"segments": (jnp.ones((2, 1), int),) * 2}, ConfigError, "positions = None with segments"),
        (
            {"positions": (jnp.zeros((2, 1), int), jnp.zeros((2, 4), int))}, ShapeError,
            r"key positions has shape \(2, 4\): must be \(2, 5\)",
        ),
        ({"window": 0}, ConfigError, "window = 0"),
        ({"sink_tokens": -1}, ConfigError, "sink_tokens = -1"),
        ({"sink_logits": jnp.zeros(3)}, ShapeError, r"sink_logits has shape \(3,\)"),
        ({"logit_cap": 0.0}, ConfigError, "logit_cap = 0.0: must be positive"),
        ({"scale": jnp.ones(())}, ConfigError, "scale is an array"),
        ({"softmax_dtype": "bfloat16"}, ConfigError, "never below float32"),
        ({"splits": 0}, ConfigError, "splits = 0: is a count"),
        ({"impl": "cudnn"}, ConfigError, "decode has no such implementation"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        decode(**_args(**changes))


def test_gradient_is_refused():
    with pytest.raises(UnsupportedError, match="the gradient of decode: decoding has none"):
        jax.grad(lambda q: decode(**_args(q=q)).sum())(jnp.ones((2, 1, 4, 8)))
