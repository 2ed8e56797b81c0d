"""Which kernels serve rows, what they give in the interpreters, and what is refused."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows_cases import (
    PARAMETERS,
    SCORES,
    B,
    K,
    N,
    R,
    S,
    V,
    arrays,
    compare,
    pulled,
    ragged,
    striped,
)

from attnlab.core.dispatch import Device, Implementation, compiling_for
from attnlab.core.errors import ConfigError, DtypeError, ImplementationError, ShapeError
from attnlab.core.mask import Blocks, Causal, MaskMod, Prefix, Segments, Window
from attnlab.core.mods import Mod
from attnlab.core.versions import JAX
from attnlab.ops.attention import OP, attention, gpu, hopper, plan, reference, tpu, tpu_blocks
from attnlab.ops.attention.packed_rows import every_row
from attnlab.ops.attention.rows import attention_rows


def kernel_case(dtype, name: str):
    """Packed rows of two groups with padding, slopes and values by token, sinks and a cap."""
    T, N, K, H = 50, 6, 2, 64
    keys = iter(jax.random.split(jax.random.key(1), 8))
    shapes = {
        "q": (1, T, N, H), "k": (1, T, K, H), "v": (1, T, K, H), "slope": (N,), "sinks": (N,),
        "gate": (1, N, T),
    }
    a = {n: jax.random.normal(next(keys), shape) for n, shape in shapes.items()}
    a = {n: x.astype(dtype).astype(jnp.float32) if n in "qkv" else x for n, x in a.items()}
    cotangents = [jax.random.normal(next(keys), (1, T, N, *tail)) for tail in ((H,), ())]
    segments = jnp.asarray(np.repeat([1, 2, 0], [31, 15, 4]))[None]
    positions = jnp.asarray(np.r_[:31, :15, :4])[None]

    def mod(a):
        return lambda s, h, q, k, *, batch, q_index: (
            s * jnp.tanh(a["gate"][batch, h, q_index]) + 0.1 * a["slope"][h] * (k - q)
        )

    def f(a, kernel: bool):
        options = dict(
            score_mod=mod(a), sink_logits=a["sinks"], logit_cap=5.0, return_lse=True,
            mask=Causal() & (Window(20) | MaskMod.of(lambda h, q, k: k == h)),
        )
        if not kernel:
            return attention(
                a["q"], a["k"], a["v"], positions=positions, segments=segments, **options,
                impl="reference",
            )
        rows, (q, k, v) = every_row(1, T, N, K), (a[n].astype(dtype) for n in "qkv")
        o, lse = attention_rows(
            rows.take(q), k, v, num_heads=N, impl=name, **rows.keywords(positions, segments),
            **options,
        )
        return rows.put(o), rows.put(lse)

    def run(kernel):
        return jax.jit(lambda a: pulled(lambda a: f(a, kernel), a, cotangents))(a)

    return run(True), run(False)


def install(monkeypatch, name: str, forward, **options) -> None:
    one = Implementation(name, lambda call: None, functools.partial(forward, **options))
    monkeypatch.setitem(OP.implementations, name, one)


@pytest.mark.skipif(JAX < (0, 11, 2), reason="Mosaic GPU kernels need jax >= 0.11.2")
def test_the_hopper_kernels_interpreted(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams(detect_races=True)
    install(monkeypatch, "interpreted", gpu.forward, interpret=interpret)
    found, expected = kernel_case("bfloat16", "interpreted")
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        x, y = (np.asarray(x, np.float64) for x in (x, y))
        assert (np.isfinite(x) == np.isfinite(y)).all(), path
        x, y = (np.nan_to_num(x, neginf=0) for x in (x, y))
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error < 1e-2, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


def test_the_tpu_kernels_interpreted(monkeypatch):
    def small(T, S, H, V, dtype, mask):
        return tpu_blocks.dividing(mask, T + -T % 16 if T < 128 else 128, 128)

    monkeypatch.setattr(tpu_blocks, "forward_blocks", small)
    monkeypatch.setattr(tpu_blocks, "backward_blocks", lambda T, *rest: small(max(T, 128), *rest))
    install(monkeypatch, "interpreted", tpu.forward, interpret=True)
    compare(*kernel_case("float32", "interpreted"))


@pytest.mark.parametrize(
    "mod, groups, reason",
    [
        ("slopes", 3, None), ("tokens", 3, None), ("none", 1, None),
        ("tables", 3, "query and key together"), ("keys of heads", 3, "query and key together"),
        ("keys of heads", 1, None),  # the group settles the head
    ],
)
@pytest.mark.parametrize("device", [Device("gpu", "NVIDIA H200"), Device("tpu", "TPU v5 lite")])
def test_what_the_kernels_serve(mod, groups, reason, device, monkeypatch):
    monkeypatch.setattr(hopper, "JAX", (0, 11, 2))
    kernel = dataclasses.replace(OP.implementations[device.platform], forward=reference.forward)
    monkeypatch.setitem(OP.implementations, device.platform, kernel)
    N, T = 2 * groups, 256
    sizes = {"row": (1, N, T), "column": (1, T), "bias": (N, T)}
    a = {n: jnp.ones(s) for n, s in (PARAMETERS | sizes).items() if n not in "qkv"}
    rows = every_row(1, T, N, 2)
    seg, k = jnp.ones((1, T), jnp.int32), jnp.ones((1, T, 2, 64), "bfloat16")

    def run(impl):
        return attention_rows(
            jnp.ones((1, 2, T * groups, 64), "bfloat16"), k, k, num_heads=N,
            score_mod=SCORES[mod] and SCORES[mod](a), impl=impl,
            **rows.keywords(jnp.arange(T)[None], seg),
        )

    with compiling_for(device):
        if reason is None:
            jax.eval_shape(lambda: run(device.platform))
            return
        with pytest.raises(ImplementationError, match=reason):
            jax.eval_shape(lambda: run(device.platform))


# Bad arguments --------------------------------------------------------------------------------


def arguments(**changes):
    a, places = arrays(0), ragged(0)
    return {n: a[n] for n in "qkv"} | {"num_heads": N} | places | changes


TWO = np.zeros((B, K, R, 2, 2), np.float32)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"q": TWO}, ShapeError, r"must be \[B, K, R, H\], \[B, S, K, H\]"),
        ({"k": arrays(0)["v"]}, ShapeError, r"must be \[B, K, R, H\]"),
        ({"v": np.zeros((B, S, 1, V), "f4")}, ShapeError, r"\[B, S, K, V\]"),
        ({"v": np.zeros((B, S, K, V), "f2")}, DtypeError, "must agree"),
        ({"num_heads": 5}, ShapeError, "num_heads = 5 over K = 2"),
        ({"num_heads": 4}, ConfigError, r"heads\[.*the heads of group . are"),
        ({"heads": np.zeros((B, K, R), np.int32)}, ConfigError,
         r"heads\[0, 1, 0\] = 0: the heads of group 1 are 3 to 5"),
        ({"heads": np.zeros((B, R), np.int32)}, ShapeError, "heads has shape"),
        ({"heads": np.zeros((B, K, R))}, DtypeError, "heads has dtype float64"),
        ({"index": np.zeros((B, R), np.int32)}, ShapeError, "index has shape"),
        ({"positions": np.zeros((B, S), np.int32)}, ConfigError, "rows and keys have their own"),
        ({"positions": ragged(0)["positions"][::-1]}, ShapeError, "row positions has shape"),
        ({"segments": (np.zeros((B, K, R)),) * 2}, DtypeError, "row segments has dtype"),
        ({"segments": None, "mask": Segments()}, ConfigError, "segments = None"),
        ({"mask": Blocks(np.zeros((1, 1, 3, 1), np.int32), 8, 8)}, ConfigError,
         "mask is a Blocks: its lists are of blocks of tokens"),
        ({"mask": Causal() | Blocks(np.zeros((1, 1, 3, 1), np.int32), 8, 8)}, ConfigError,
         "mask is a Blocks"),
        ({"mask": plan(batch=B, heads=N, length=R)}, ConfigError, "mask is a Planned"),
        ({"mask": 3}, ConfigError, "mask is a int"),
        ({"mask": Prefix(np.zeros(3, np.int32))}, ShapeError, "Prefix.length has shape"),
        ({"mask": MaskMod(Mod.of(striped).at(heads=np.arange(4)))}, ShapeError, "the call has 6"),
        ({"score_mod": 3}, ConfigError, "score_mod is a int"),
        ({"sink_logits": np.zeros(3, np.float32)}, ShapeError, r"must be \[N\] = \(6,\)"),
        ({"logit_cap": -1.0}, ConfigError, "logit_cap = -1.0"),
        ({"impl": "splash"}, ImplementationError, "splash"),
    ],
)
def test_bad_arguments_raise(changes, error, message):
    with pytest.raises(error, match=message):
        attention_rows(**arguments(**changes))
